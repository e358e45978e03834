"""Any values under the known names: a row is converted or refused, never a traceback, nothing lost without a word."""

import json
import random

import pyarrow.parquet as pq
import pytest

from verl_hpt.data import answers, fields
from verl_hpt.data.commands import main

CHAT = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "So \\boxed{1}."}]
CALL = {"name": "f", "arguments": {"a": 1}}
VALUES = [
    *(None, "", " ", "a?", "So \\boxed{1}.", "1\n#### 2", "#### ", "[]", "{}", "[1]", 0, 1, 2.5, True, False, [], {}),
    *([None], ["x", "y"], [1, 2], ["a) x", "b) y"], [["a", "b"]], [[]], {"a": 1}, {"A": "x", "B": "y"}),
    *(CHAT, CHAT[:1], CHAT[1:], [CHAT, CHAT], {"messages": CHAT}, json.dumps(CHAT), {"from": "gpt", "value": "x"}),
    *([{"content": "x"}], [{"role": "user"}], [{"from": "gpt"}], [{"name": "f"}], [CALL], json.dumps([CALL])),
    *({"text": ["x"], "label": ["A"]}, {"text": ["x"], "label": []}, [{"label": "A", "text": None}]),
    [{"role": "user", "content": [{"type": "text", "value": "x"}]}],
    [{"role": "user", "content": [{"type": "image"}]}],
]
NAMES = sorted({*fields.NEEDED, *fields.JSON_FIELDS, *fields.GRADES, *fields.LABELS, "system", "answer", "answerKey"})
NAMES += ["reward_model", "extra_info", "data_source", "ability", "gt", "correct", "label", "ground_truth", "Question"]
ASKED = ["prompt", "question", "messages", "instruction", "query", "chosen"]


@pytest.mark.parametrize("seed", range(8))
def test_known_names_with_any_values(tmp_path, capsys, seed):
    draw = random.Random(seed)
    path, out, written = tmp_path / "in.jsonl", tmp_path / "out.parquet", 0
    for _ in range(80):
        names = [draw.choice(ASKED), *draw.sample(NAMES, draw.randrange(1, 5))]
        rows = [{name: draw.choice(VALUES) for name in names if draw.random() < 0.9} for _ in range(3)]
        rows = [{**row, names[0]: draw.choice(["a?", "b?", CHAT, CHAT[:1]])} for row in rows[: draw.randrange(1, 4)]]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        out.unlink(missing_ok=True)
        options = draw.choice([[], ["--no-answer"], ["--no-answer", "--skip-bad"], ["--best-of-graded", "--skip-bad"]])
        status = main(["convert", str(path), str(out), *options])
        printed = capsys.readouterr()
        assert status in (0, 2) and "Traceback" not in printed.err and len(printed.out + printed.err) < 10_000
        if status == 2:
            assert not out.exists() and (f"{path}: " in printed.err or "no row" in printed.err)
            continue
        written += 1
        for made in pq.read_table(out).to_pylist():
            assert made["prompt"][-1]["role"] != "assistant" and made["reward_model"]["ground_truth"] is not None
        assert main(["check", str(path), "--reward", "none"]) in (0, 1, 2)
        assert "Traceback" not in capsys.readouterr().err
    assert written > 3


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["1", "2", "3", "4"], 2, "C"),  # an index, whatever the options say
        (["4", "2", "6", "0"], 2, "C"),
        (["4", "2", "6", "0"], "2", "B"),  # an option's text
        (["4", "2", "6", "0"], 6, "C"),  # no index
        (["x", "y"], "b", "B"),
    ],
)
def test_an_expected_letter(options, answer, letter):
    assert fields.letter(fields.Choices(list("ABCD")[: len(options)], options, ""), answer) == letter


@pytest.mark.parametrize("label", [(True, False), (1, 0)])
def test_what_is_labelled_bad_is_no_demonstration(tmp_path, label):
    rows = [
        {"prompt": "a?", "completion": f"So \\boxed{{{i}}}.", "label": x, "answer": "1"} for i, x in enumerate(label)
    ]
    file, out = tmp_path / "kto.jsonl", tmp_path / "out.parquet"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["convert", str(file), str(out)]) == 0
    targets = [row["target"] for row in pq.read_table(out).to_pylist()]
    assert targets[0] and not targets[1]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So\n#### 1,080", "1080"),
        ("So\n#### $1,234,567.50 dollars", "$1234567.50 dollars"),
        ("So\n#### (1,234)", "(1,234)"),
        ("So\n#### \\{100,200\\}", "\\{100,200\\}"),
        ("It is \\boxed{3} or \\boxed{4}.", "3, 4"),
        ("First \\boxed{3}. In the end, after all of this and more, it is \\boxed{4}.", "4"),
    ],
)
def test_what_a_worked_text_ends_in(text, answer):
    assert answers.final_answer(text) == answer


def test_a_system_message_is_in_the_prompt_or_refused(tmp_path, capsys):
    ask, say = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "So \\boxed{1}."}
    brief, long = ({"role": "system", "content": text} for text in ("Be brief.", "Be long."))
    file, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"

    def convert(**row) -> int:
        file.write_text(json.dumps({"target": "So \\boxed{1}.", "answer": "1", **row}) + "\n")
        return main(["convert", str(file), str(out)])

    assert convert(prompt=[ask], system="Be brief.") == 0
    assert pq.read_table(out).to_pylist()[0]["prompt"] == [brief, ask]
    assert convert(prompt=[brief, ask], target=[brief, ask, say]) == 0
    assert pq.read_table(out).to_pylist()[0]["target"] == [say]
    for prompt in ([ask], [long, ask]):
        capsys.readouterr()
        assert convert(prompt=prompt, target=[brief, ask, say]) == 2
        assert "field `target`: begins with a system message that the prompt has not" in capsys.readouterr().err
