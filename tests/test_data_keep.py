"""`data convert --keep`: what is carried over is carried unchanged, and what is not is named."""

import json
import re

import pytest
from test_data_convert import ask, asked, said, say

LATE = [  # first value, late value, field named, type that keeps both, what then stands there
    (0, 0.5, "r", "double", 0.5),
    ([0], [0.5], r"r\[0\]", "list<double>", [0.5]),
    ([[1]], [[0.5, 2]], r"r\[0\]\[0\]", "list<list<double>>", [[0.5, 2.0]]),
    ({"a": 1}, {"a": 1, "b": 2}, "r.b", "string", '{"a": 1, "b": 2}'),
    ("x", 5, "r", "string", "5"),
    (1, True, "r", "string", "true"),
    (0.5, True, "r", "string", "true"),
    (None, 0.5, "r", "double", 0.5),
    (1, 2**70, "r", "string", str(2**70)),
]


@pytest.mark.parametrize("first, late, field, kind, kept", LATE, ids=[f"{a}-{b}" for a, b, *_ in LATE])
def test_a_late_value_is_never_bent_to_its_columns_type(tmp_path, capsys, first, late, field, kind, kept):
    rows = [asked(r=first) for _ in range(600)] + [asked(r=late)]
    status, made, _, err = said(tmp_path, capsys, rows, "--keep", "r")
    assert status == 2 and made is None and re.search(rf"in\.jsonl: row 601: field `{field}`: ", err)
    assert f"--keep r:{kind}" in err
    status, made, *_ = said(tmp_path, capsys, rows, "--keep", f"r:{kind}")
    assert status == 0 and made[600]["r"] == kept
    status, made, out, _ = said(tmp_path, capsys, rows, "--keep", "r", "--skip-bad")
    assert status == 0 and len(made) == 600 and "1 bad rows" in out
    if "--peek 601" in err and kind != "string":
        status, made, *_ = said(tmp_path, capsys, rows, "--keep", "r", "--peek", "601")
        assert status == 0 and made[600]["r"] == kept


def test_a_type_that_is_none_is_named(tmp_path, capsys):
    status, _, _, err = said(tmp_path, capsys, [asked(r=1)], "--keep", "r:doubel")
    assert status == 2 and "`doubel` is no type" in err
    status, _, _, err = said(tmp_path, capsys, [asked(r=0.5)], "--keep", "r:int64")
    assert status == 2 and "row 1: field `r`: must be int64 as --keep says, got 0.5" in err and "r:double" in err


@pytest.mark.parametrize("value", [2**70, {}, [{}], {"a": {}}], ids=str)
def test_what_parquet_cannot_hold_is_one_message_and_text_can_hold_it(tmp_path, capsys, value):
    status, made, _, err = said(tmp_path, capsys, [asked(r=value)], "--keep", "r")
    assert status == 2 and made is None and "--keep r:string" in err
    assert said(tmp_path, capsys, [asked(r=value)], "--keep", "r:string")[1][0]["r"] == json.dumps(value)


def test_types_that_do_not_mix_name_the_row(tmp_path, capsys):
    rows = [asked(r=1), asked(r="x"), asked(r=2)]
    status, _, _, err = said(tmp_path, capsys, rows, "--keep", "r")
    assert status == 2 and "row 2: field `r`: fits no one type" in err
    status, made, *_ = said(tmp_path, capsys, rows, "--keep", "r", "--skip-bad")
    assert status == 0 and [row["r"] for row in made] == [1, 2]


@pytest.mark.parametrize("name", ["data_source", "ability", "reward_model", "prompt", "target", "extra_info.index"])
def test_columns_that_convert_writes_cannot_be_kept(tmp_path, capsys, name):
    row = {"prompt": "a?", "target": "#### 1", "data_source": "x", "ability": "y", "reward_model": {}, "extra_info": {}}
    status, made, _, err = said(tmp_path, capsys, [row], "--keep", name)
    assert status == 2 and made is None and f"--keep {name}: convert writes that" in err


VERL = {
    "prompt": [ask("a?")],
    "target": [{**say("#### 1"), "weight": 1}],
    "reward_model": {"style": "model", "ground_truth": "1", "tests": [1]},
    "extra_info": {"index": 7, "split": "test", "file": "x", "level": 3, "tests": ["t"], "none": None},
    "agent_name": "tool_agent",
}


def test_what_is_not_carried_over_is_said_and_can_be_kept(tmp_path, capsys):
    _, (made,), out, _ = said(tmp_path, capsys, [VERL])
    lines = [line for line in out.splitlines() if line.startswith("not carried over")]
    assert lines[0].startswith(
        "not carried over: `reward_model.tests`, `extra_info.level`, `extra_info.tests`, `agent_name`; to carry"
    )
    assert lines[1:] == ["not carried over, of messages: `target[].weight`"]
    assert made["extra_info"] == {"index": 0, "split": "train", "file": "in.jsonl", "row": 1}
    some = ["--keep", "extra_info.tests", "--keep", "reward_model.tests", "--keep", "agent_name"]
    _, (made,), out, _ = said(tmp_path, capsys, [VERL], *some)
    assert "not carried over: `extra_info.level`;" in out and made["agent_name"] == "tool_agent"
    assert made["reward_model"] == {"style": "model", "ground_truth": "1", "tests": [1]}
    assert made["extra_info"] == {"index": 0, "split": "train", "file": "in.jsonl", "row": 1, "tests": ["t"]}


def test_a_rows_own_extra_info_is_merged_with_ours(tmp_path, capsys):
    _, (made,), out, _ = said(tmp_path, capsys, [VERL], "--keep", "extra_info")
    own = {"index": 7, "split": "test", "level": 3, "tests": ["t"]}
    assert made["extra_info"] == {**own, "file": "in.jsonl", "row": 1} and "`extra_info." not in out
    odd = {**VERL, "extra_info": {"index": "a-7", "split": 5}}
    _, (made,), out, _ = said(tmp_path, capsys, [odd], "--keep", "extra_info")
    assert made["extra_info"] == {"index": 0, "split": "train", "file": "in.jsonl", "row": 1}
    assert "`extra_info.index`, `extra_info.split`" in out
    rows = [VERL] * 600 + [{**VERL, "extra_info": {"new": 1}}]
    status, _, _, err = said(tmp_path, capsys, rows, "--keep", "extra_info")
    assert status == 2 and "row 601: field `extra_info.new`: appears first here, after 600 rows" in err
    for remedy in (["--peek", "601"], ["--keep", "extra_info.new:int64"]):
        status, made, *_ = said(tmp_path, capsys, rows, "--keep", "extra_info", *remedy)
        assert status == 0 and made[600]["extra_info"]["new"] == 1
