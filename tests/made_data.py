"""The data of the tests: made here, or the real files where VERL_HPT_TEST_DATA names their folder.

The made files have the names and the form of the real ones: GSM8K's questions with worked solutions, and one set for
each evaluation set of the paper, with answers as they are written there. Seeds make them, so they never change.
"""

import functools
import json
import os
import random
import tempfile
from pathlib import Path

VARIABLE = "VERL_HPT_TEST_DATA"
EVAL = ("aime24", "aime25", "amc23", "gpqa", "math-500", "minerva", "olympiad-bench")
# Rows of every file: the real ones', and those made here.
_EVAL_ROWS = {"real": (30, 30, 40, 198, 500, 272, 674), "made": (30, 30, 40, 60, 120, 80, 120)}
ROWS = {
    kind: {"gsm8k/train.jsonl": train, "gsm8k/test.jsonl": test}
    | {f"eval/{name}.json": rows for name, rows in zip(EVAL, _EVAL_ROWS[kind], strict=True)}
    for kind, train, test in (("real", 7473, 1319), ("made", 2000, 300))
}


def kind() -> str:
    """`real` where the variable names a folder, else `made`."""
    return "real" if os.environ.get(VARIABLE) else "made"


def said() -> str:
    """One line: which data the tests use. Raises `FileNotFoundError` as `folder` does."""
    if kind() == "real":
        return f"test data: the real files in {folder()} ({VARIABLE})"
    return f"test data: made by tests/made_data.py ({VARIABLE} names no folder with the real files)"


@functools.cache
def folder() -> Path:
    """The folder with the files; raises `FileNotFoundError` where the variable names one that lacks a file."""
    if kind() == "made":
        made = tempfile.TemporaryDirectory(prefix="verl-hpt-test-data-")
        _kept.append(made)
        return _write(Path(made.name))
    named = Path(os.environ[VARIABLE]).absolute()
    for file in ROWS["real"]:
        if not (named / file).is_file():
            raise FileNotFoundError(
                f"{named / file}: no such file. {VARIABLE}={os.environ[VARIABLE]} must name a folder with "
                f"{', '.join(ROWS['real'])}; without {VARIABLE} the tests make their data"
            )
    return named


_kept: list = []  # until the process ends


@functools.cache
def gsm8k(split: str = "train") -> list[dict]:
    """Questions with worked solutions."""
    with open(folder() / "gsm8k" / f"{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def eval_file(name: str) -> Path:
    return folder() / "eval" / f"{name}.json"


def eval_set(name: str) -> list[dict]:
    """Questions of an evaluation set, each with its expected answer."""
    return json.loads(eval_file(name).read_text(encoding="utf-8"))


def _write(to: Path) -> Path:
    (to / "gsm8k").mkdir()
    (to / "eval").mkdir()
    asked: set[str] = set()
    for split in ("train", "test"):
        draw, name = random.Random(split), f"gsm8k/{split}.jsonl"
        rows = [_solved(draw, asked) for _ in range(ROWS["made"][name])]
        # Characters as they are, not as JSON escapes, where the real files have escapes: both must be read.
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (to / name).write_text(text, encoding="utf-8")
    for name in EVAL:
        file = f"eval/{name}.json"
        rows = [_evaluated(name, i, random.Random(f"{name} {i}")) for i in range(ROWS["made"][file])]
        (to / file).write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return to


# Words enough that a tokenizer of two thousand tokens finds its merges: names are put together, things have adjectives.
_WORDS = {
    "begin": "Al Ber Chi Da El Fa Gor Ha In Jo Ke Lu Mar No Ow Pri Quen Ro Sven Tar Um Vi Wil Xan Yas Zel",
    "middle": "be da fre go hi ju ka len mi nu o pe ra si tho u va wen xi za",
    "end": "bert dia fan gus han jin kov la mon na rick sha ton vy wood",
    "thing": """apples stamps marbles pencils candles postcards seashells cookies tickets bricks sunflowers notebooks
        buttons kites lemons ribbons muffins magnets feathers puzzles lanterns turnips whistles blankets""",
    "kind": """amber broken cheap dusty empty fancy green heavy identical jagged knitted large mixed narrow old painted
        quiet round small tiny unused violet wooden young zigzag ancient bright curved damp elegant frozen golden hollow
        imported junior kindly loose modern numbered orange plastic rusty silver twisted useful varnished worn yellow
        expensive foreign glittering handmade ironed jolly leftover magnetic naughty ordinary precious rectangular
        smooth transparent ugly valuable waterproof polished wrinkled scented striped square triangular faded folded
        fresh dried sealed labelled unlabelled second-hand half-price oversized miniature experimental""",
}
_WORDS = {name: words.split() for name, words in _WORDS.items()}
_NAMES = ["José", "Zoë", "Renée", "Anaïs", "Mrs. Nuñez", "Dr. O’Hara", "the baker’s son"]
_THINGS = [*_WORDS["thing"], "cans of paint", "crème brûlées", "jars of honey", "30-page booklets", "AA-batteries"]
_PLACES = ["the market", "school", "her aunt's garden", "Lake Orta", "the fair (which opens at 9 a.m.)", "a café"]
_MORE = ["finds", "is given", "buys", "wins", "collects", "picks up", "orders", "unpacks", "borrows", "makes"]
_LESS = ["gives away", "loses", "sells", "lends", "breaks", "throws out", "returns", "uses up", "trades", "hides"]
_WHEN = ["On Monday", "The next day", "After lunch", "In March", "Later", "That same week", "At 6:30 p.m.", "By noon"]
_FIRST = ["", "", "", "First, ", "Then ", "So, ", "Now ", "This means that ", "In all, ", "We know that ", "Therefore "]
_WHY = ["", "", "", " in total", " by the end of the day", ", because nothing else was added or taken", " ."]
_ASIDE = [
    "It rains most of the time, and nobody minds.",
    "Her brother – who is twice as old – only watches…",
    '"That\'s not fair!" says the youngest.',
    "The bus ride costs €2.50 each way, but that is another matter.",
    "A box measures 3½ ft × 2 ft and weighs 12\u00a0kg.",
    "(The label says 100% cotton, size А.)",
    "Everyone is happy 🙂; the sign at the door reads 漢字.",
    "They do n't count what fell\u2028on the floor\u200b.",
]


def _number(draw: random.Random, value: int) -> str:
    return f"{value:,}" if draw.random() < (0.7 if abs(value) < 10_000 else 0.3) else str(value)


def _step(draw: random.Random, have: int) -> tuple[str, str, int, str]:
    """(what the question says, the calculation, its result, what was calculated)"""
    small, large, when = draw.randint(2, 12), draw.randint(5, 60 if draw.random() < 0.7 else 4000), draw.choice(_WHEN)
    ways = ["more", "times"] if have < 10**5 else []
    ways += ["less"] * 2 if have > 3 else []
    ways += ["share"] * 3 if have % small == 0 and have > small else []
    ways += ["percent"] if have % 20 == 0 else []  # of which any part below is a whole number
    way = draw.choice(ways or ["more"])
    if way == "more":
        return f"{when} WHO {draw.choice(_MORE)} {_number(draw, large)} more.", f"{have}+{large}", have + large, "has"
    if way == "less":
        lost = draw.randint(1, have - 1)
        text = f"{when} WHO {draw.choice(_LESS)} {_number(draw, lost)} of them."
        return text, f"{have}-{lost}", have - lost, "has left"
    if way == "times":
        return f"{when} the number grows to {small} times as many.", f"{have}*{small}", have * small, "now has"
    if way == "share":
        return f"{when} WHO keeps 1/{small} of them.", f"{have}/{small}", have // small, "keeps"
    part = draw.choice([5, 10, 15, 20, 25, 40, 50, 75])
    text = f"{when} {part}% of them turn out to be WHO’s own."
    return text, f"{have}*{part}/100", have * part // 100, "owns"


def _solved(draw: random.Random, asked: set[str]) -> dict[str, str]:
    """One question that none of `asked` is, with its worked solution; about one in seventy has no calculator marks."""
    who = (
        draw.choice(_NAMES)
        if draw.random() < 0.2
        else "".join(draw.choice(_WORDS[at]) for at in ("begin", "middle", "end"))
    )
    thing, where = f"{draw.choice(_WORDS['kind'])} {draw.choice(_THINGS)}", draw.choice(_PLACES)
    have, marks, sign = draw.randint(2, 400), draw.random() > 1 / 70, draw.choice(["*", "x", "×"])
    told, lines = [f"{who} has {_number(draw, have)} {thing} at {where}."], []
    if draw.random() < 0.3:
        told.append(draw.choice(_ASIDE))
    for _ in range(draw.choice([1, 2, 2, 3, 3, 4, 5, 6, 8, 12])):
        said, sum_, have, verb = _step(draw, have)
        told.append(said.replace("WHO", draw.choice([who, who, "she", "he"])))
        shown = sum_.replace("*", f" {sign} ").replace("+", " + ").replace("-", " - ")
        mark = f"<<{sum_}={have}>>" if marks else ""
        line = f"{draw.choice(_FIRST)}{who} {verb} {shown} = {mark}{_number(draw, have)} {thing}{draw.choice(_WHY)}"
        lines.append(line if line.endswith(".") else f"{line}.")
    asks, end = [f"How many {thing} does {who} have then?", f"What is the number of {thing} left for {who}?"], have
    if draw.random() < 0.3:
        price = draw.choice([2, 3, 5, 8, 12, 25])
        end = have * price
        asks = [
            f"How much does {who} get for all of them, at ${price} each?",
            f"If one is ${price}, what are all worth?",
        ]
        mark = f"<<{have}*{price}={end}>>" if marks else ""
        lines.append(f"They are worth {have} {sign} ${price} = ${mark}{_number(draw, end)} altogether.")
    elif draw.random() < 0.05:
        end = have - have - draw.randint(1, 40)
        asks = [f"{who} promised {have - end} of them to a friend. What is left, if what is missing counts below zero?"]
        mark = f"<<{have}-{have - end}={end}>>" if marks else ""
        lines.append(f"What is missing counts below zero: {have} − {have - end} = {mark}{end} {thing}.")
    told.append(draw.choice(asks))
    question = " ".join(told)
    if question.casefold() in asked:
        return _solved(draw, asked)
    asked.add(question.casefold())
    return {"question": question, "answer": "\n".join([*lines, f"#### {_number(draw, end)}"])}


# Answers as the sets write them; a < b < c are numbers from 2 to 60 without a common divisor.
_ANSWERS = {
    "aime24": [r"\boxed{@a@b}"],
    "aime25": ["@c", "@a@b"],
    "amc23": ["@b", "@a@c", "-@a"],
    "math-500": [
        r"@a", r"-@c", r"@a.@b", r"\frac{@a}{@c}", r"-\dfrac{@a}{@b}", r"\frac{@a\sqrt{3}}{@b}", r"@a \sqrt{7}",
        r"@a+@bi", r"@c^\circ", r"\left( @a, \frac{\pi}{@b} \right)", r"(@a,@b,@c)", r"(-\infty, @a) \cup (@b, \infty)",
        r"[-@a,\infty)", r"x \in [-@a,@b]", r"\begin{pmatrix} -@a \\ @b/@c \\ @c \end{pmatrix}",
        r"\begin{pmatrix} -@a & 0 \\ @b & @c \end{pmatrix}", r"\{@a\pm\sqrt{5},-@b\}", r"@a \pm @b \sqrt{19}",
        r"@a,\!080", r"\$@a.50", r"@a\%", r"@b\mbox{ cm}^2", r"@c \text{ cents}", r"\text{(C)}", r"\text{east}",
        r"4210_{5}", r"x=@a", r"y = @ax + @b", r"x^5 - @ax^3 + @b", r"@ax - @by + @cz = 0", r"\pi", r"2^{@a}",
    ],
    "minerva": [
        "@a.@b", "@a.@be@a", "@ae-@b", r"\frac{@a}{@b} \frac{C}{S}", r"\ln @a + i\pi / @b", r"e^{t} / @a",
        r"@b p^{\frac{1}{2}}", r"\sqrt{@a \pi G \rho_{0} r_{0}^{2}}", r"\frac{@a}{s+1}-\frac{e^{-@b}}{s}", "MR=SRMC",
        r"(@a - @be^{-2t} + @ce^{-5t}) u(t)", r"x^{\prime}+\frac{r}{V} x-r c=0", r"\frac{t}{@a} \sin (@b t)",
        r"m_{p} c^{2}\left(\gamma^{2}-1\right) \sin ^{2} \theta", "I(0)",
    ],
    "olympiad-bench": [
        "@a", r"$\frac{@a}{@b}$", r"$\sqrt{@a}$", r"$-(n-@a) / @b$", r"$2^{n}-@a n-1$", r"$[\frac{1}{@a}, @b]$",
        "@a,-@a,@b,-@b", "$@a$,$@b$", r"$\frac{1}{@a},\sqrt{x}$", "62.5%", r"$@a \%$", r"$@c^{\circ}$",
        "$f(n)=@a n+@b$",
        "$k=2 n-@a$", r"$\left\lfloor\log _{2} n\right\rfloor+@a$", r"$\frac{100!}{2^{@b}}$",
        r"$@a^{100}$,$@b^{1 / @a}$",
        r"$(-\sqrt{@a},-2)\cup (\sqrt{@a},@c)$", r"$(@a, \log _{10} @b)$", r"$a=@a$, $a=-@b-4 \sqrt{2}$",
    ],
}  # fmt: skip


def _evaluated(name: str, index: int, draw: random.Random) -> dict[str, str]:
    """One question of an evaluation set; every form of answer comes in turn."""
    a, b, c = sorted(draw.sample([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59], 3))
    more = {"source": name, "id": str(index)} if name in ("gpqa", "math-500") else {}
    if name == "gpqa":
        choices = "\n".join(f"{x}. {n} m s^-1" for x, n in zip("ABCD", draw.sample(range(90), 4), strict=True))
        return {
            "prompt": f"A {a} kg body falls {c} m.\n\nHow fast?\n\n{choices}",
            "answer": draw.choice("ABCD"),
            **more,
        }
    answer = _ANSWERS[name][index % len(_ANSWERS[name])]
    for letter, number in (("@a", a), ("@b", b), ("@c", c)):
        answer = answer.replace(letter, str(number))
    prompt = f"Let $p={a}$, $q={b}$ and $r={c}$ be sides of figure {index} of {name}. Find $x_{{{index}}}$."
    return {"prompt": prompt, "answer": answer, **more}
