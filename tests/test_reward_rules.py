"""The grader's rule: one answer in many spellings is right, near ones are wrong, and the last box alone is graded."""

import json
import os
import random
from pathlib import Path

import pytest
from made_data import VARIABLE

from verl_hpt import reward, reward_worker


def score(solution, truth, source="math"):
    return reward.compute_score(source, solution, truth, timeout=30.0)["score"]


def boxed(answer, truth, source="math"):
    return score(f"So it is $\\boxed{{{answer}}}$.", truth, source)


# --- the same number in other spellings -------------------------------------------------------------------------------

NUMBERS = ["6", "-6", "0", "1000", "1234567", "0.5", "3.25", "\\frac{3}{4}", "-\\frac{7}{3}", "2\\sqrt{2}", "2^{10}"]
SPELLINGS = ["@.", "@ .", "@~cm", "@ cm", "@ cm^2", "@ cm^{3}", "@\\text{ cm}^2", "@\\,\\mathrm{m}", "@ chairs"]
SPELLINGS += ["@°", "@^\\circ", "@ \\degree", "@^{\\circ}", "\\$@", "x = @", "x=@", "\\theta = @", "f(2) = @", "= @"]
SPELLINGS += ["\\approx @", "\\text{Area} = @", " @ ", "\\;@\\;", "\\displaystyle @", "\\mathbf{@}", "\\boldsymbol{@}"]
SPELLINGS += ["@\n", "\n@\n", "@\\text{ dollars}.", "\\text{@ cm}", "\\left(@\\right)", "{@}"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_number_is_right_in_every_spelling_and_another_number_in_none(spelling):
    spelt = [spelling.replace("@", number) for number in NUMBERS]
    assert [n for n, answer in zip(NUMBERS, spelt, strict=True) if boxed(answer, n) != 1.0] == []
    assert [n for n, answer in zip(NUMBERS, spelt[1:] + spelt[:1], strict=True) if boxed(answer, n) != 0.0] == []


@pytest.mark.parametrize("joint", ["\\,", " ", "{,}", "\\!", "~", "\\ ", "\\;", ","])
def test_thousands_may_stand_apart_but_only_three_by_three(joint):
    rng = random.Random(joint)
    for number in [1000, 1080, 12_000, 999_001, *(rng.randrange(1000, 10**9) for _ in range(3))]:
        spelt = f"{number:,}".replace(",", joint)
        assert boxed(spelt, str(number)) == 1.0, spelt
        assert boxed(f"-{spelt}.5", f"-{number}.5") == 1.0, spelt
        assert boxed(spelt, str(number + 1)) == 0.0 and boxed(str(number), f"{number:,}") == 1.0
    for wrong, truth in (("4{}2", "42"), ("10{}00", "1000"), ("1{}0000", "10000"), ("1{}00", "100"), ("1{}000", "1")):
        assert (
            boxed(wrong.format(joint) if joint != "{,}" else wrong.replace("{}", joint), truth) == 0.0 or joint == "\\!"
        )


@pytest.mark.parametrize("sign", ["\\%", "%", " \\%", "\\,\\%", "\\text{\\%}", " percent", "\\text{ percent}"])
def test_a_percentage_is_its_number_or_its_hundredth_where_the_other_has_no_sign(sign):
    for number, hundredth in (("50", "0.5"), ("50", "\\frac{1}{2}"), ("12.5", "0.125"), ("100", "1"), ("1", "0.01")):
        spelt = number + sign
        for right in (number, hundredth, number + "\\%"):
            assert boxed(spelt, right) == boxed(right, spelt) == 1.0, (spelt, right)
        for wrong in ("5", "500", "0.05", "5000", "0.5\\%", "5\\%", "5000\\%"):
            assert boxed(spelt, wrong) == boxed(wrong, spelt) == 0.0, (spelt, wrong)
    assert boxed("0.5", "50") == boxed("50", "0.5") == 0.0


@pytest.mark.parametrize(
    ("answer", "truth", "wrong"),
    [
        ("5 million", "5000000", "5"),
        ("5\\text{ million}", "5000000", "5"),
        ("2.5\\text{ million dollars}", "2500000", "2.5"),
        ("3 hundred", "300", "3"),
        ("1.5e3", "1500", "1.5"),
        ("7.02 \\times 10^5", "7.02e5", "702"),
        ("2.55\\cdot 10^{-10} \\text{ m}", "2.55e-10", "0.0"),
        ("0.0000004", "4e-7", "0"),
        ("2e^3", "2e^3", "2000"),
        ("1 1/2", "1.5", "5.5"),
        ("6 dozen", "6 dozen", "6"),
        ("6 squared", "6 squared", "6"),
        ("6 m^2", "6", "36"),
        ("6 plus", "6 plus", "6"),
        ("6x", "6x", "6"),
        ("6 xy", "6xy", "6"),
        ("6 \\pi", "6\\pi", "6"),
        ("\\sin 30^\\circ", "\\sin(30^\\circ)", "30"),
        ("25°C", "25", "26"),
        ("0+i", "i", "0"),
        ("3 + 4\\,i", "3+4i", "7"),
        ("3+4i", "3 + 4 i", "3"),
        ("\\frac{2x}{2}", "x", "2"),
        ("\\frac\\pi2", "\\frac{\\pi}{2}", "\\pi"),
        ("\\dfrac1\\pi", "\\frac{1}{\\pi}", "\\pi"),
        ("\\left(3,\\frac\\pi2\\right)", "(3, \\frac{\\pi}{2})", "3"),
        ("f\\circ g", "f\\circ g", "f"),
        ("\\text{No solution}", "\\emptyset", "0"),
        ("\\varnothing", "\\text{no solutions}", "0"),
        ("\\{6\\}", "6", "\\{6,7\\}"),
        ("1,200", "1200", "\\{1, 200, 3\\}"),
        ("\\sum_{i=1}^{42} 1", "42", "1"),
    ],
)
def test_scales_variables_constants_and_words_behind_a_number_are_no_units(answer, truth, wrong):
    assert boxed(answer, truth) == 1.0 and boxed(answer, wrong) == 0.0


LESS = {"<": "(", "\\lt ": "(", "\\le ": "[", "\\leq ": "["}


@pytest.mark.parametrize("low", LESS)
@pytest.mark.parametrize("high", LESS)
def test_a_chain_of_inequalities_is_its_interval_and_no_other(low, high):
    for a, variable, b in (("-2", "x", "3"), ("-\\sqrt{2}", "t", "\\frac{1}{2}")):
        chain, right = f"{a} {low}{variable} {high}{b}", LESS[low] + f"{a}, {b}" + {"(": ")", "[": "]"}[LESS[high]]
        for truth in (f"{left}{a}, {b}{close}" for left in "([" for close in ")]"):
            assert boxed(chain, truth) == (truth == right), (chain, truth)
    assert boxed("x \\ge 2", "[2, \\infty)") == 1.0 and boxed("x > 2", "[2, \\infty)") == 0.0


# --- sides, relations, words ------------------------------------------------------------------------------------------


def test_every_side_that_is_a_number_must_be_right():
    for answer in ("5 = 6", "1=2=3=6", "6 = 7", "\\frac{1}{2} = 6", "x = 5 = 6", "\\pi = 6", "\\sqrt{25} = 6", "5.9=6"):
        assert boxed(answer, "6") == 0.0, answer
    for answer in (
        "2+4=6",
        "x = 6",
        "x = 2+4 = 6",
        "a+b=6",
        "\\sqrt{36} = 6",
        "S = 6",
        "|AB| = 6",
        "x = \\frac{12}{2} = 6.0",
    ):
        assert boxed(answer, "6") == 1.0, answer
    assert boxed("y = 2x+3", "y = 2x+3") == 1.0 and boxed("y = 2x-3", "y=2x+3") == 0.0


@pytest.mark.parametrize(
    "sign", ["\\neq", "\\ne", ">", "<", "\\ge", "\\leq", "x \\neq", "x <", "\\text{not}", "?", "\\sim", "\\pm"]
)
def test_a_relation_or_a_doubt_before_a_number_makes_it_another_answer(sign):
    for truth in NUMBERS:
        if truth != "0":
            assert boxed(f"{sign} {truth}", truth) == 0.0, (sign, truth)


OTHERS = ["6 \\text{ or 7}", "6\\text{ (or 7)}", "6\\text{ hours and 30 minutes}", "6\\text{ not 7}"]


def test_a_box_that_cannot_be_read_is_not_searched_for_numbers():
    for answer in (
        "?",
        "?? 6",
        "I think 6",
        "?? \\frac{1}{2}",
        "final answer is 6",
        "\\# 6",
        "6 ?",
        "6 or 7",
        "not 6",
        *OTHERS,
    ):
        assert boxed(answer, "6") == boxed(answer, "\\frac{1}{2}") == 0.0, answer


def test_words_are_equal_in_any_letter_case_and_markup_but_letters_are_not():
    for word in ("even", "Evelyn", "Yes", "no", "New York", "acute triangle"):
        for spelt in (
            word,
            word.upper(),
            word.title(),
            f"\\text{{{word}}}",
            f"\\textbf{{{word}}}",
            f"\\text{{ {word.lower()}.}}",
        ):
            assert boxed(spelt, word) == boxed(word, spelt) == 1.0, spelt
        for wrong in (word[:-1], word + "s", f"{word} or odd", f"\\text{{not {word}}}", f"{word}/no", "odd"):
            assert boxed(wrong, word) == 0.0, wrong
    assert score("the answer is 42", "the answer is 42") == 1.0


# --- which box --------------------------------------------------------------------------------------------------------

BOXES = [
    "\\boxed{{{}}}",
    "\\fbox{{{}}}",
    "\\boxed {{{}}}",
    "\\boxed {}",
    "\\boxed{}",
    "$\\boxed{{{}}}$",
    "$$\\fbox{{{}}}$$",
]
BOXES += [
    "\\[\\boxed{{{}}}\\]",
    "\\boxed{{ \\boxed{{{}}} }}",
    "\\boxed{{\n{}\n}}",
    "\\boxed{{$ {} $}}",
    "**\\boxed{{{}}}**",
]


@pytest.mark.parametrize("box", BOXES)
def test_the_last_box_alone_is_graded_whatever_its_spelling(box):
    for other in BOXES:
        solution = f"First {other.format(8)} as $7$ holds, then {box.format(6)} and not 5, $5$, 5"
        assert reward.unboxed(reward.boxed_answer(solution).strip()) == "6", solution
    assert score(solution, "6") == score(solution, "6", "openai/gsm8k") == 1.0
    assert [score(solution, wrong) for wrong in ("5", "7", "8")] == [0.0] * 3


@pytest.mark.parametrize("empty", ["", " ", "~", "\\,", "\n", "?", "\\text{}", "$ $"])
def test_an_empty_box_is_no_answer_whatever_stands_elsewhere(empty):
    for truth in ("6", "C", "even", "0"):
        for solution in (f"It is ${truth}$: \\boxed{{{empty}}} {truth}", f"\\boxed{{{truth}}}, so \\boxed{{{empty}}}"):
            assert score(solution, truth) == score(solution, truth, "gpqa") == 0.0


def test_boxes_side_by_side_are_one_answer():
    for joint in ("", " ", ",", ", ", " and ", " or ", " \\text{ or } ", "$ or $", ", and "):
        two = f"$\\boxed{{1}}{joint}\\boxed{{2}}$"
        assert score(two, "1") == score(two, "2") == 0.0, two
        assert score(two, "1, 2") == score(two, "\\{2, 1\\}") == 1.0, two
        letters = f"\\boxed{{C}}{joint}\\boxed{{D}}"
        assert score(letters, "D", "gpqa") == score(letters, "D") == score(letters, "C") == 0.0
        assert score(f"\\boxed{{6}}{joint}\\boxed{{6}}", "6") == 1.0
    assert score("\\boxed{1}\n\\boxed{2}", "2") == score("\\boxed{1}, no: \\boxed{2}", "2") == 1.0
    assert score("\\boxed{6} \\boxed{}", "6") == 0.0


def test_a_box_within_boxes_that_do_not_close_is_cut_off():
    assert score("\\boxed{\\boxed{\\boxed{6}}}", "6") == 1.0
    assert score("\\boxed{\\boxed{\\boxed{6}}", "6") == score("\\boxed{" * 50 + "6}}}", "6") == 0.0
    assert score("Put it in \\boxed{ as asked: \\boxed{6}", "6") == 1.0


def test_a_sentence_about_boxes_is_no_box():
    for solution in ("\\boxed{6}: I used \\boxed for it", "\\boxed{6} stands in \\boxed."):
        assert score(solution, "6") == 1.0


# --- letters ----------------------------------------------------------------------------------------------------------

RIGHT = [
    "C",
    "(C)",
    "C.",
    "C)",
    "(C).",
    "\\text{C}",
    "\\textbf{(C)}",
    "\\mathrm{(C)}",
    "\\text{C. } 5",
    "(C) 12",
    "(C)\\ 12",
    "C: yes",
]
RIGHT += [
    "\\textbf{(C)}\\ \\frac{1}{2}",
    "C. Vitamin D",
    "(C) E. coli",
    "C. because A is wrong",
    "(C) A and B only",
    "$C$",
    "(C) C",
]
HEDGED = [
    "C and D",
    "C or D",
    "C, D",
    "C/D",
    "C & D",
    "(C) or (D)",
    "(C) \\text{ or } (D)",
    "C \\text{ and } D",
    "C) A) B) D)",
    "C D",
]
HEDGED += [
    "A. B. C. D.",
    "(A)(B)(C)(D)",
    "ABCD",
    "C. or D.",
    "C, or maybe D",
    "\\text{C or D}",
    "C; D",
    "(C), (D)",
    "not C",
    "CD",
    "C?",
]


@pytest.mark.parametrize(
    "source", ["Idavidrein/gpqa", "TIGER-Lab/MMLU-Pro", "allenai/ai2_arc", "arc_c", "my_multiple_choice", "math"]
)
def test_an_expected_letter_takes_one_letter_and_no_hedge(source):
    for truth in ("C", "(C)", "\\text{(C)}", ["C"]):
        assert [answer for answer in RIGHT if boxed(answer, truth, source) != 1.0] == []
        assert [answer for answer in HEDGED if boxed(answer, truth, source) != 0.0] == []
    for letter in "ABD":
        assert [answer for answer in RIGHT + HEDGED[:10] if boxed(answer, letter, source) != 0.0] == []


def test_a_multiple_choice_row_that_expects_no_letter_is_compared_as_mathematics():
    assert boxed("2.0", 2, "cais/mmlu") == 1.0 and boxed("C", 2, "cais/mmlu") == 0.0


@pytest.mark.parametrize("source", ["ARC-AGI", "search", "arcade", "math", "aime24", "olympiad_bench", "minerva"])
def test_other_sources_are_no_multiple_choice(source):
    assert reward.grader_of(source, "") is reward.math_verify


# --- the answer behind #### -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        "**18**",
        "x=18",
        "x = 18",
        "18.",
        "18~cm",
        "$18",
        "18 cm^2",
        "18°",
        "\\boxed{18}",
        "__18__",
        "18.0",
        "18 dollars.",
    ],
)
def test_spellings_behind_the_marks(given):
    assert score(f"We add.\n#### {given}", "18", "openai/gsm8k") == 1.0
    assert score(f"We add.\n#### {given}", "19", "openai/gsm8k") == 0.0


def test_thousands_behind_the_marks():
    for given in ("1,080", "1 080", "1\\,080", "1{,}080", "1\\!080", "1080"):
        for truth in ("1080", "1,080"):
            assert score(f"#### {given}", truth, "openai/gsm8k") == 1.0
    for given in ("1 2 18", "10 80", "1 0800", "~1080 or so", "1080~2"):
        assert score(f"#### {given}", "1080", "openai/gsm8k") == score(f"#### {given}", "18", "openai/gsm8k") == 0.0


# --- labelled answers: people's where the files are, else a few of our own --------------------------------------------

CASES = Path(os.environ.get(VARIABLE) or "nowhere", "grading", "cases.jsonl")
OURS = [
    {"answer": f"Adding up, ${answer}$.", "ground_truth": truth, "data_source": "math", "accept": accept}
    for answer, truth, accept in (
        ("\\boxed{\\tfrac12}", "\\frac{1}{2}", True),
        ("\\boxed{0.5}", "\\frac{1}{2}", True),
        ("\\boxed{1{,}080}", "1080", True),
        ("\\boxed{12~\\text{cm}^2}", "12", True),
        ("\\boxed{x = 7}", "7", True),
        ("\\boxed{(C)}", "C", True),
        ("\\boxed{7} \\text{ or } \\boxed{8}", "7", False),
        ("\\boxed{7 \\text{ or } 8}", "7", False),
        ("\\boxed{}", "7", False),
        ("\\boxed{C \\text{ and } D}", "C", False),
        ("7 \\text{, so } \\boxed{9}", "7", False),
        ("\\boxed{108}", "1080", False),
    )
]


def test_the_labelled_answers():
    labelled = CASES.is_file()
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()] if labelled else OURS
    scores = [score(case["answer"], case["ground_truth"], case["data_source"]) for case in cases]
    accepted = [case for case, got in zip(cases, scores, strict=True) if got == 1.0 and not case["accept"]]
    rejected = [case for case, got in zip(cases, scores, strict=True) if got == 0.0 and case["accept"]]
    assert len(cases) == (247 if labelled else 12)
    assert (len(accepted), len(rejected)) <= ((2, 5) if labelled else (0, 0)), (accepted, rejected)
    assert len(rejected) <= (5 if labelled else 0), rejected


def test_tidying_is_done_once_for_all_and_leaves_what_it_does_not_know():
    for text in (
        "\\frac{1}{2}",
        "x^2 + 2x + 1",
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
        "(1,200)",
        "\\{1,200\\}",
        "1000",
        "3!",
    ):
        assert reward_worker.tidy(text) == text
    for text in ("12 cm^2", "1\\,000", "90°", "5 million dollars", "50 percent", "6~cm.", "no solution", "\\frac\\pi2"):
        assert reward_worker.tidy(reward_worker.tidy(text)) == reward_worker.tidy(text)


@pytest.mark.parametrize(
    "word",
    ["thirds", "thousandths", "wrong", "tenths", "fifths", "gross", "score", "negative", "inverse", "dozen", "squared"],
)
def test_a_word_that_changes_a_number_is_no_unit(word):
    assert boxed(f"12 {word}", "12") == 0.0
    assert score(f"#### 12 {word}", "12", "openai/gsm8k") == 0.0


def test_large_numbers_behind_the_marks_have_their_scale():
    assert score("#### 6 trillion", "6", "openai/gsm8k") == 0.0
    assert score("#### 6 trillion", "6000000000000", "openai/gsm8k") == 1.0


@pytest.mark.parametrize("hedged", ["A maybe B", "A could be B", "A. 5 or B. 6", "A, perhaps (C)"])
def test_a_letter_with_another_in_doubt_is_a_hedge(hedged):
    assert (
        boxed(hedged, "A", "gpqa") == 0.0
        and boxed("A. 5", "A", "gpqa") == boxed("(A) to be or not", "A", "gpqa") == 1.0
    )
