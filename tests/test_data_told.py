"""What `data convert` says: what it warns of, what it leaves out and counts, and remedies that work."""

import gzip
import json
import re
import shlex
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import ask, asked, said, say

from verl_hpt.data.commands import main


@pytest.mark.parametrize(
    "options",
    [["--val-share", "2"], ["--format", "messages"], ["--prompt-key", "nope"], ["--drop", "nope"], ["--limit", "0"]],
    ids=" ".join,
)
def test_wrong_options_are_one_message(tmp_path, capsys, options):
    (tmp_path / "in.jsonl").write_text('{"question": "a?", "answer": "#### 1"}\n', encoding="utf-8")
    assert main(["convert", str(tmp_path / "in.jsonl"), str(tmp_path / "out.parquet"), *options]) == 2
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "out.parquet").exists()


def test_output_never_overwrites_its_input(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "a?", "answer": "#### 1"}]), path)
    assert main(["convert", str(path), str(path)]) == 2
    assert "different files" in capsys.readouterr().err
    assert pq.read_table(path).num_rows == 1


def test_a_file_without_demonstrations_is_warned_of(tmp_path, capsys):
    row = {"question": "a?", "answer": "1", "proof": "x"}
    status, (made,), _, err = said(tmp_path, capsys, [row])
    assert status == 0 and "its fields are `question`, `answer`, `proof`: --demo-key" in err and made["proof"] == "x"
    assert not said(tmp_path, capsys, [row], "--demo-key", "proof")[3]


def test_an_empty_training_file_is_warned_of(tmp_path, capsys):
    options = ["--val", str(tmp_path / "val.parquet"), "--val-share"]
    status, made, _, err = said(tmp_path, capsys, [asked()], *options, "0.999999")
    assert status == 0 and made == [] and "lower --val-share" in err
    assert "raise --val-share" in said(tmp_path, capsys, [asked()], *options, "0.000001")[3]


def test_bad_rows_are_left_out_and_counted(tmp_path, capsys):
    late = {"messages": [ask("x?"), {**say("#### 1"), "weight": "x"}]}
    rows = [{"messages": [ask(f"{i}?"), {**say("#### 1"), "weight": 1}]} for i in range(600)]
    bad = [{}, {"messages": [ask("b?"), say("no")]}, {"messages": [ask("c?"), say("no")]}, late]
    text = "".join(json.dumps(r) + "\n" for r in [*bad[:1], *rows, *bad[1:]]) + "[1]\n{cut\n"
    assert said(tmp_path, capsys, text)[0] == 2
    status, made, out, _ = said(tmp_path, capsys, text, "--skip-bad")
    assert status == 0 and len(made) == 600 and [r["extra_info"]["index"] for r in made] == list(range(600))
    assert "--skip-bad left out 6 bad rows:" in out and "  2 × `messages`: no expected answer" in out
    assert out.count("for example") == 5 and "in.jsonl: row 602: field `messages`" in out
    assert "`messages.weight`: fits no one type with the rows before it, which have intN" in out
    status, made, out, err = said(tmp_path, capsys, [{"question": "a?", "answer": None}], "--skip-bad")
    assert status == 2 and made is None and "no row was written" in err and "1 bad rows" in out
    (tmp_path / "list.json").write_text(json.dumps([asked(), 5, asked()]), encoding="utf-8")
    assert main(["convert", str(tmp_path / "list.json"), str(tmp_path / "out.parquet"), "--skip-bad"]) == 0
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 2


def test_a_row_that_arrow_refuses_is_left_out_too(tmp_path, capsys):
    rows = [{"messages": [{**ask("a?"), "name": name}, say("#### 1")]} for name in ("ann", 5, "bob")]
    status, _, _, err = said(tmp_path, capsys, rows)
    assert status == 2 and "row 2: field `messages.name`" in err
    status, made, *_ = said(tmp_path, capsys, rows, "--skip-bad")
    assert status == 0 and [r["prompt"][0]["name"] for r in made] == ["ann", "bob"]


def test_a_missing_expected_answer_says_what_to_do(tmp_path, capsys):
    for row in (
        {"question": "a?"},
        {"question": "a?", "answer": None},
        {"question": "a?", "answer": "", "solution": "x"},
    ):
        status, _, _, err = said(tmp_path, capsys, [row])
        assert status == 2 and "the reward needs one" in err and "--answer-key" in err and "--skip-bad" in err
        assert "demonstration" not in err


def test_two_lists_of_rows_in_an_object_are_pointed_at_and_the_remedy_works(tmp_path, capsys):
    for name in ("in it's.json", "in.json.gz"):
        path, text = tmp_path / name, json.dumps({"train": [asked()], "test": [asked()]}, indent=1)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        assert main(["convert", str(path), str(tmp_path / "out.parquet")]) == 2
        err = capsys.readouterr().err
        assert "several lists of rows, `train`, `test`; if `train` holds the rows" in err and len(err) < 500
        command = err.partition("alone: ")[2].replace("python", shlex.quote(sys.executable), 1)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert main(["convert", str(tmp_path / "rows.json"), str(tmp_path / "out.parquet")]) == 0
        assert pq.read_table(tmp_path / "out.parquet").to_pylist()[0]["prompt"] == [ask("a?")]


def test_tables_of_text_say_how_to_make_json_of_them(tmp_path, capsys):
    for name, sep in (("a.csv", ","), ("a.tsv", "\t")):
        path = tmp_path / name
        path.write_text(f"question{sep}answer\n1+1?{sep}#### 2\n", encoding="utf-8")
        assert main(["convert", str(path), str(tmp_path / "o.parquet")]) == 2
        err = capsys.readouterr().err
        subprocess.run([sys.executable, "-c", re.search('python -c "(.*)"', err)[1]], check=True, cwd=tmp_path)
        _, (made,), *_ = said(tmp_path, capsys, (tmp_path / "rows.jsonl").read_text())
        assert made["prompt"] == [ask("1+1?")] and made["reward_model"]["ground_truth"] == "2"


@pytest.mark.parametrize("name", ["out.parquet.part", "val.parquet.part"])
def test_an_input_called_like_the_provisional_output_is_kept(tmp_path, capsys, name):
    path = tmp_path / name
    path.write_text(json.dumps(asked()), encoding="utf-8")
    command = ["convert", str(path), str(tmp_path / "out.parquet"), "--val", str(tmp_path / "val.parquet")]
    assert main(command) == 2 and path.exists() and "different files" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_a_limit_is_one_or_more(tmp_path, capsys, limit):
    status, _, _, err = said(tmp_path, capsys, [asked()], "--limit", limit)
    assert status == 2 and "--limit must be 1 or more" in err
