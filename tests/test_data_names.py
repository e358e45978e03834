"""Any values under the known names: a row is converted or refused, never a traceback, nothing lost without a word."""

import json
import random
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from verl_hpt.data import answers, fields
from verl_hpt.data.commands import main
from verl_hpt.demos.demonstration import demonstrations, single_text

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
        (["x", "y"], "1", "B"),  # an index written as text
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


def one_row(tmp_path, row):
    file, out = tmp_path / "one.jsonl", tmp_path / "one.parquet"
    file.write_text(json.dumps({"answer": "1", **row}) + "\n", encoding="utf-8")
    status = main(["convert", str(file), str(out)])
    return pq.read_table(out).to_pylist()[0] if status == 0 else None


def test_reasoning_beside_a_reply_is_a_part_of_it(tmp_path):
    reply = {"role": "assistant", "content": "So \\boxed{1}.", "thinking": "Let me see."}
    text = single_text(demonstrations(one_row(tmp_path, {"messages": [CHAT[0], reply]})["target"])[0])
    assert text == "<think>\nLet me see.\n</think>\n\nSo \\boxed{1}."


@pytest.mark.parametrize(("weights", "demos"), [((1, 1), 1), ((None, None), 1), ((0, 0), 0), ((0, 1), None)])
def test_replies_with_weight_zero_are_no_demonstration(tmp_path, capsys, weights, demos):
    replies = [{**CHAT[1], "weight": w} if w is not None else CHAT[1] for w in weights]
    row = one_row(tmp_path, {"messages": [CHAT[0], *replies]})
    if demos is None:
        assert row is None and "weight 0" in capsys.readouterr().err
    else:
        assert bool(row["target"]) == bool(demos)


def test_a_system_prompt_of_its_own_field_comes_first(tmp_path):
    row = one_row(tmp_path, {"system_prompt": "Be brief.", "prompt": "a?", "completion": "So \\boxed{1}."})
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]


def test_the_remedy_for_csv_keeps_every_value_as_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("question,solution,answer\na?,So.,007\nb?,So.,NA\n")
    assert main(["convert", "rows.csv", "out.parquet"]) == 2
    code = capsys.readouterr().err.split('python -c "')[1].rsplit('"', 1)[0]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["007", "NA"]
