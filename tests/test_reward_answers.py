"""What the graders read in an answer, in this process: numbers after `####`, boxes, letters; which grader reads it."""

import logging

import numpy as np
import pytest

from verl_hpt import reward

RIGHT = {"score": 1.0, "acc": 1.0, "grading_failed": 0.0}
WRONG = {"score": 0.0, "acc": 0.0, "grading_failed": 0.0}
FAILED = {"score": 0.0, "acc": 0.0, "grading_failed": 1.0}


@pytest.mark.parametrize(
    ("truth", "right", "wrong"),
    [
        ("5", ["5", "+5", "**5**", "__5__", "*5*", "`5`", "**5.**", "$5$", "\\(5\\)", "\\$5", "$ 5", "€5", "5."], []),
        ("5", ["5.0", "5.00", "05", "5,", "10/2", "5e0", "x = 5", "x=5", "Answer: 5", "= $5", "\\boxed{5}"], []),
        ("5", ["$\\boxed{5}$.", "\\textbf{5}", "5\\text{ eggs}", "5 $", "\\mathrm{5}"], []),
        ("5", ["5°", "5^\\circ", "5^{\\circ}", "5\\degree", "5 cm²", "5 m^2", "5 ft^{3}", "5 km/h", "$5/hour"], []),
        ("5", ["5 a day", "5eggs", "5 times as many", "5 m", "5個", "5 eggs (2 + 3)", "**5** eggs", "5 eggs!"], []),
        ("5", ["5 pounds after 2 weeks", "$5 for 14 peaches", "5 boxes of 12"], []),
        ("5", [], ["-5", "−5", "x = -5", "5 or 6", "5 and 6", "5 to 6", "5 eggs or 6 eggs", "5 eggs for 2 or 6 for 3"]),
        ("5", [], ["5-6", "5 - 6", "5–6", "5 6", "5, 6", "5+6", "5*6", "5 × 6", "5 minus six", "5 plus six"]),
        ("5", [], ["5x", "5 x", "5y + z", "5xy", "5n", "5i", "5e", "5k", "5\\pi", "5π", "5 pi", "5\\sqrt{2}", "5^2"]),
        ("5", [], ["5!", "5²", "5½", "5(2)", "5?", "5:30", "5 and a half", "5 out of 6", "5 in 6", "5 of 6"]),
        ("5", [], ["5 hundredths", "5 tenths", "5 thousand", "5 < x", "x > 5", "5 = 6", "5 hours and 30 minutes"]),
        ("5", [], ["50", "0.5", "5e1", "5e-1", "5/1/1", "5/0", "1 5", "", ".", "$", "five", "nan", "inf", "0x5"]),
        ("-5", ["-5", "−5", "-$5", "$-5", "- 5", "-5.0 dollars", "x = -5", "-10/2"], ["5", "+5", "--5", "-5 - 1"]),
        ("100000", ["1e5", "1E5", "1e+5", "100,000", "1,00,000", "100 thousand", "0.1 million"], ["1", "1e4", "1e55"]),
        ("1", ["1", "1.000"], ["1e5", "1/2", "1 1/2", "1,0", "1 hundred"]),
        ("2", ["2"], ["2x+1", "2x", "2+1", "2 + x"]),
        ("1,080", ["$1,080", "1080", "1,080.00", "1{,}080", "1\\,080", "1.08e3"], ["1.080", "1", "108,0"]),
        ("1080", ["$1,080", "1,080"], ["1,08", "1 080 x", "108"]),
        ("500", ["5 hundred", "5 Hundred eggs", "0.5 thousand"], ["5", "5 thousand"]),
        ("1000000000", ["1 billion", "1 Billion dollars", "1000 million", "1e9"], ["1 million"]),
        ("72", ["72 eggs", "72.", "72 eggs.", "72/1", "72\n3 more"], ["72/2", "7", "2", "720", "72 eggs, 6 hens"]),
        ("50", ["50%", "50 %", "50\\%", "50 percent"], ["50% of 20", "5%"]),
        ("50%", ["50%", "50"], ["5%", "51"]),
        ("5 1/2", ["5 1/2", "5.5", "11/2", "5\\frac{1}{2}", "5 1/2 cups"], ["5", "5/2", "51/2", "-5.5"]),
        ("-5.5", ["-5 1/2", "-\\frac{11}{2}", "-\\dfrac{11}{2}", "-\\tfrac {11} {2}"], ["-4 1/2", "5 1/2"]),
        ("1/2", ["1/2", "0.5", ".5", "2/4", "\\frac{1}{2}", "1 / 2"], ["1", "2", "12", "1/2/1", "1/2x"]),
        ("3.5e-2", ["0.035", "3.5e-2", "35e-3"], ["3.5", "3.5e2", "3.5e-2x"]),
        ("33.33", ["33.33", "33.330"], ["33.333", "33", "33.3"]),
        ("0", ["0", "0.0", "-0"], ["", "5/0", "0/0", "nothing"]),
        ("noon", ["noon", " Noon "], ["12", "noon."]),
        ("5:30", ["5:30"], ["5", "530"]),
        ("5/0", ["5/0"], ["5", "0"]),
    ],
)  # fmt: skip
def test_the_number_after_the_marks_is_right_where_a_person_says_so(truth, right, wrong):
    def verdict(given):
        return reward.hash_answer("openai/gsm8k", f"We add.\n#### {given}", truth)

    assert [given for given in right if verdict(given) != RIGHT] == []
    assert [given for given in wrong if verdict(given) != WRONG] == []


def test_only_what_follows_the_last_marks_to_the_end_of_its_line_counts():
    grade = reward.hash_answer
    assert grade("", "#### 3\n#### 5", "5") == RIGHT and grade("", "#### 5\n#### 3", "5") == WRONG
    assert grade("", "####\n5\n6", "5") == RIGHT and grade("", "####\n6\n5", "5") == WRONG
    assert grade("", "### 5", "5") == WRONG and grade("", "5", "5") == WRONG
    assert grade("", "#### 5", "We add. #### 5") == RIGHT and grade("", "#### 5", ["3", "5"]) == RIGHT
    assert grade("", "####", "5") == WRONG


def test_long_and_huge_numbers_are_bounded():
    assert reward._number("0" * 199 + "5") == 5 and reward._number("0" * 200 + "5") is None
    assert reward._number("1e999") == 10**999 and reward._number("1e1000") is None
    assert reward.hash_answer("", "#### 9e999999999", "1") == WRONG


# --- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{5}", "5"),
        ("\\fbox{5}", "5"),
        ("\\boxed{1} \\fbox{2}", "2"),
        ("\\fbox{1} \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} or so}", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{}", ""),
        ("\\boxed{a{b}{c{d}}e}", "a{b}{c{d}}e"),
        ("\\boxed5 and boxed{5}", None),
        ("\\boxed{5", None),
        ("", None),
    ],
)
def test_the_last_box_whose_braces_close(text, content):
    assert reward.last_boxed(text) == content


def test_the_search_for_a_box_is_bounded():
    box, open_box = "\\boxed{5}", "\\boxed{"
    assert reward.last_boxed(box + open_box * 19) == "5" and reward.last_boxed(box + open_box * 20) is None
    reach = 50_000 - len(box)
    assert reward.last_boxed("x" * 9 + box + "x" * reach) == "5" and reward.last_boxed(box + "x" * (reach + 1)) is None


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        (" 5 ", "5"),
        ("$5$", "5"),
        ("$ 5 $", "5"),
        ("$", "$"),
        ("$$", ""),
        ("$5", "$5"),
        ("5$", "5$"),
        ("$5$ and $6$", "$5$ and $6$"),
        ("\\boxed{ 5 }", "5"),
        ("$\\boxed{5}$", "5"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1}+\\boxed{2}", "\\boxed{1}+\\boxed{2}"),
        ("\\boxed{1}{2}", "\\boxed{1}{2}"),
        ("\\fbox{5}", "\\fbox{5}"),
        ("a\\fbox{5}", "a\\fbox{5}"),
        ("x \\boxed{5}", "x \\boxed{5}"),
        ("\\boxed{5", "\\boxed{5"),
    ],
)
def test_dollars_and_a_box_around_the_whole_go(text, bare):
    assert reward.unboxed(text) == bare


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        ("5", ["5"]),
        (5, ["5"]),
        (0, ["0"]),
        (" $5$ ", ["5"]),
        (["1", " 2 "], ["1", "2"]),
        (("1", None, ""), ["1"]),
        (np.array(["1", "2"], dtype=object), ["1", "2"]),
        (np.array("1"), ["1"]),
        (np.float64(0.5), ["0.5"]),
        (np.str_("a"), ["a"]),
        ([1.5, float("nan")], ["1.5"]),
        (None, []),
        (float("nan"), []),
        ("  ", []),
        ([], []),
        ("\\boxed{}", []),
    ],
    ids=str,
)
def test_accepted_answers(given, accepted):
    assert reward._truths(given) == accepted


def test_exact_match_takes_the_whole_or_the_last_box_and_nothing_near():
    grade = reward.exact_match
    assert grade("", " a b \n", "a b") == RIGHT and grade("", "so \\boxed{ a b }", ["z", "a b"]) == RIGHT
    assert grade("", "A b", "a b") == WRONG and grade("", "a b.", "a b") == WRONG and grade("", "", "a") == WRONG
    assert grade("", "\\boxed{a} \\boxed{b}", "a") == WRONG and grade("", "\\boxed{}", ["a"]) == WRONG


@pytest.mark.parametrize(
    ("box", "letter"),
    [
        *[(box, "C") for box in ("C", "(C)", "C)", "C.", "C: x", "C 5", "(C) 5", "C.\nbecause\nit is", " C ")],
        *[(f"\\{name}{{{box}}}", "C") for name in ("text", "mathrm", "textbf", "mathbf") for box in ("C", "(C)")],
        ("\\text{C.\nbecause}", "C"),
        *[(box, None) for box in ("c", "CD", "C5", "C,D", "[C]", "\\mathit{C}", "", "x C", "\\text{C} D", "((C")],
    ],
)
def test_multiple_choice_reads_one_capital_letter(box, letter):
    solution = f"\\boxed{{A}} no, \\boxed{{{box}}}"
    assert reward.multiple_choice("", solution, "C") == (RIGHT if letter == "C" else WRONG)
    assert reward.multiple_choice("", solution, ["B", "C"]) == (RIGHT if letter == "C" else WRONG)
    assert reward.multiple_choice("", solution, "A") == WRONG and reward.multiple_choice("", box, "C") == WRONG


# --- which grader, with what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "solution", "chosen", "name"),
    [
        ("Idavidrein/GPQA_diamond", "#### 5", {}, "multiple_choice"),
        ("gpqa", "", {}, "multiple_choice"),
        ("openai/GSM8K", "#### 5", {}, "hash_answer"),
        ("gsm8k", "\\boxed{5}", {}, "math_verify"),
        ("gsm8k", "\\boxed{5} #### 5", {}, "hash_answer"),
        ("gsm8k", "5", {}, "hash_answer"),
        ("math", "#### 5", {}, "math_verify"),
        (None, "#### 5", {}, "math_verify"),
        ("gsm8k", "", {"grader": "exact_match", "graders": {"gsm8k": "multiple_choice"}}, "exact_match"),
        ("gsm8k", "", {"graders": {"gsm8k": "multiple_choice"}}, "multiple_choice"),
        ("gsm8k", "", {"graders": {"GSM8K": "multiple_choice"}}, "hash_answer"),
    ],
)
def test_the_grader_of_a_row(source, solution, chosen, name):
    assert reward.grader_of(source, solution, **chosen) is reward.GRADERS[name] is getattr(reward, name)


def test_an_unknown_grader_is_named_with_those_that_there_are():
    with pytest.raises(ValueError) as caught:
        reward.compute_score("mine", "5", "5", graders={"mine": "maths"})
    assert str(caught.value) == (
        "unknown grader 'maths' for data source 'mine'; choose from "
        "['exact_match', 'hash_answer', 'math_verify', 'multiple_choice']"
    )


def test_the_grader_gets_the_row_and_every_keyword(monkeypatch):
    calls = []
    monkeypatch.setitem(reward.GRADERS, "exact_match", lambda *args, **kwargs: calls.append((args, kwargs)) or RIGHT)
    given = reward.score_and_source("s", 5, ["5"], {"index": 1}, grader="exact_match", timeout=3.0)
    assert given == {**RIGHT, "data_source": "s"}
    assert calls == [(("s", "5", ["5"], {"index": 1}), {"timeout": 3.0})]
    assert reward.score_and_source(None, "", None)["data_source"] == ""


@pytest.mark.parametrize("truth", [None, "", " ", [], [None, ""], float("nan"), "\\boxed{}"], ids=str)
def test_a_row_without_an_expected_answer_is_no_wrong_answer_and_is_told_once_a_source(truth, monkeypatch, caplog):
    monkeypatch.setattr(reward, "_warned", set())
    with caplog.at_level(logging.WARNING, reward.__name__):
        for source in ("a", "a", "b"):
            assert reward.compute_score(source, "\\boxed{5}", truth, grader="exact_match") == FAILED
    told = "no expected answer (reward_model.ground_truth) on a row of {!r}: it scores 0"
    assert [record.getMessage() for record in caplog.records] == [told.format("a"), told.format("b")]


class Replies:
    """Stands in for the pool: what it was asked, and answers in order."""

    def __init__(self, *replies):
        self.replies, self.sizes, self.asked = list(replies), [], []

    def __call__(self, *size):
        self.sizes.append(size)
        return self

    def grade(self, *request):
        self.asked.append(request)
        return self.replies.pop(0)


def ask(monkeypatch, solution, truth, *replies, **kwargs):
    pool = Replies(*(replies or [{"score": 1.0}]))
    monkeypatch.setattr(reward, "pool", pool)
    return reward.math_verify("math", solution, truth, **kwargs), pool


def test_limits_reach_the_pool_and_have_these_defaults(monkeypatch):
    verdict, pool = ask(monkeypatch, "it is 5", "5.0")
    assert verdict == RIGHT and pool.sizes == [(2, 2048)] and pool.asked == [("it is 5", "5.0", 10.0)]
    _, pool = ask(monkeypatch, "it is 5", "5.0", timeout=3.0, workers=7, memory_mb=300)
    assert pool.sizes == [(7, 300)] and pool.asked == [("it is 5", "5.0", 3.0)]


def test_any_accepted_answer_will_do_and_a_failure_counts_only_where_none_does(monkeypatch):
    good, bad, broken = {"score": 1.0}, {"score": 0.0}, {"score": 0.0, "error": "x"}
    for replies, expected, asked in (
        ([good], RIGHT, ["1"]),
        ([bad, good], RIGHT, ["1", "2"]),
        ([broken, good], RIGHT, ["1", "2"]),
        ([bad, bad], WRONG, ["1", "2"]),
        ([broken, bad], FAILED, ["1", "2"]),
        ([bad, broken], FAILED, ["1", "2"]),
    ):
        verdict, pool = ask(monkeypatch, "\\boxed{3}", ["1", "2"], *replies)
        assert verdict == expected and [truth for _, truth, _ in pool.asked] == asked


def test_the_same_text_and_no_text_need_no_algebra(monkeypatch):
    for solution, truth, expected in (
        ("so \\boxed{$ Evelyn $}", ["\\text{x}", "Evelyn"], RIGHT),
        ("", "5", WRONG),
        (" \n", "5", WRONG),
    ):
        verdict, pool = ask(monkeypatch, solution, truth)
        assert verdict == expected and pool.asked == []


def test_what_the_symbolic_grader_reads_of_a_long_solution(monkeypatch):
    """The last box alone, however long; 4,000 characters at the end where there is none."""

    def seen(solution):
        return ask(monkeypatch, solution, "7")[1].asked[0][0]

    assert seen("a" + "b" * 3999) == "a" + "b" * 3999 and seen("a" + "b" * 4000) == "b" * 4000
    for before, after in ((3600, 399), (5000, 10), (5000, 399), (5000, 9000)):
        assert seen("a" * before + " 7 " + "\\boxed{5}" + "5" * after) == "\\boxed{5}"
    long = "\\boxed{" + "1+" * 3000 + "1}"
    assert seen("a" * 5000 + long + "b" * 5000) == seen("aa" + long + "bb") == long
    assert seen("$7$, so \\fbox{ 5 +\n  6 } or 7") == seen("7 \\boxed {5 + 6}") == "\\boxed{5 + 6}"
