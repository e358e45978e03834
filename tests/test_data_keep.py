"""`data convert --keep`: what is carried over is carried unchanged, and what is not is named."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_convert import ask, asked, said, say

from verl_hpt.data.commands import main

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
        "not carried over: `reward_model.tests`, `extra_info.level`, `extra_info.tests`, `agent_name`, "
        "`extra_info.index`, `extra_info.split`, `extra_info.file`; to carry one over: --keep NAME, --keep extra_info, "
    )
    assert lines[1:] == ["not carried over, of messages: `target[].weight`"]
    assert made["extra_info"] == {"index": 0, "split": "train", "file": "in.jsonl", "row": 1}
    some = ["--keep", "extra_info.tests", "--keep", "reward_model.tests", "--keep", "agent_name"]
    _, (made,), out, _ = said(tmp_path, capsys, [VERL], *some)
    assert "not carried over: `extra_info.level`, `extra_info.index`" in out and made["agent_name"] == "tool_agent"
    assert made["reward_model"] == {"style": "model", "ground_truth": "1", "tests": [1]}
    assert made["extra_info"] == {"index": 0, "split": "train", "file": "in.jsonl", "row": 1, "tests": ["t"]}


def test_a_rows_own_extra_info_is_merged_with_ours(tmp_path, capsys):
    _, (made,), out, _ = said(tmp_path, capsys, [VERL], "--keep", "extra_info")
    own = {"index": 7, "split": "test", "level": 3, "tests": ["t"]}
    assert made["extra_info"] == {**own, "file": "in.jsonl", "row": 1}
    assert "`extra_info.file`;" in out and out.count("`extra_info.") == 1
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


CALLS = [5, "x", {"a": 1}, [5], [{"function": {"arguments": "{}"}}], [{"function": {"name": 5}}], [{"function": "f"}]]


@pytest.mark.parametrize("calls", CALLS, ids=str)
def test_tool_calls_that_are_none_name_their_message(tmp_path, capsys, calls):
    row = {"messages": [ask("a?"), {**say(""), "tool_calls": calls}, say("#### 1")]}
    status, made, _, err = said(tmp_path, capsys, [row])
    assert status == 2 and made is None and "row 1: field `messages[1].tool_calls`: must be a list of calls" in err


@pytest.mark.parametrize("name", ["out.parquet.part", "val.parquet.part"])
def test_an_input_called_like_the_provisional_output_is_kept(tmp_path, capsys, name):
    path = tmp_path / name
    path.write_text(json.dumps(asked()), encoding="utf-8")
    command = ["convert", str(path), str(tmp_path / "out.parquet"), "--val", str(tmp_path / "val.parquet")]
    assert main(command) == 2 and path.exists() and "different files" in capsys.readouterr().err


def test_our_own_output_loses_nothing_but_an_odd_style_is_named(tmp_path, capsys):
    made = said(tmp_path, capsys, [asked(), asked()])[1]
    assert "not carried" not in said(tmp_path, capsys, made)[2]
    out = said(tmp_path, capsys, [{**VERL, "reward_model": {"style": 5, "ground_truth": "1"}}])[2]
    assert "not carried over: `reward_model.style`, `extra_info.level`" in out
    made[0]["extra_info"]["index"] = 7
    assert (
        "not carried over: `extra_info.index`; to carry one over: --keep extra_info\n"
        in said(tmp_path, capsys, made)[2]
    )


def test_ability_is_the_options_then_the_rows(tmp_path, capsys):
    for options, ability in (([], "code"), (["--ability", "x"], "x")):
        assert said(tmp_path, capsys, [asked(ability="code")], *options)[1][0]["ability"] == ability
    assert said(tmp_path, capsys, [asked()])[1][0]["ability"] == "math"


@pytest.mark.parametrize("kind", ["float", "halffloat", "list<float>", "list<list<halffloat>>"])
def test_a_number_that_a_narrow_type_makes_infinite_is_refused(tmp_path, capsys, kind):
    def nested(value):
        for _ in range(kind.count("list")):
            value = [value]
        return value

    status, _, _, err = said(tmp_path, capsys, [asked(r=nested(1e300))], "--keep", f"r:{kind}")
    assert status == 2 and "field `r" in err and f"--keep r:{re.sub('(half)?float', 'double', kind)}\n" in err
    status, made, *_ = said(tmp_path, capsys, [asked(r=nested(0.1))], "--keep", f"r:{kind}")
    assert status == 0 and made[0]["r"] is not None


@pytest.mark.parametrize("source", [[], ["x"], {"a": 1}, 0.5, True], ids=str)
def test_a_data_source_must_be_text(tmp_path, capsys, source):
    status, _, _, err = said(tmp_path, capsys, [asked(data_source=source)])
    assert status == 2 and "field `data_source`: must be text" in err
    assert said(tmp_path, capsys, [asked(data_source=source)], "--data-source", "x")[0] == 0


@pytest.mark.parametrize("answer", [float("inf"), float("-inf"), float("nan")])
def test_an_expected_answer_is_a_finite_number(tmp_path, capsys, answer):
    status, _, _, err = said(tmp_path, capsys, [{"question": "a?", "answer": answer}])
    assert status == 2 and "field `answer`: must be the expected answer" in err


def test_kept_numbers_count_towards_a_row_group(tmp_path, capsys):
    assert said(tmp_path, capsys, [asked(r=[0] * 50_000)] * 40, "--keep", "r")[0] == 0
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 4


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_a_limit_is_one_or_more(tmp_path, capsys, limit):
    status, _, _, err = said(tmp_path, capsys, [asked()], "--limit", limit)
    assert status == 2 and "--limit must be 1 or more" in err


def test_a_named_demonstration_beside_messages_may_lack_roles(tmp_path, capsys):
    row = {"messages": [ask("a?")], "proof": [{"content": "#### 1"}]}
    _, (made,), *_ = said(tmp_path, capsys, [row], "--demo-key", "proof")
    assert made["target"] == [say("#### 1")]
    status, _, _, err = said(tmp_path, capsys, [{**row, "proof": 5}], "--demo-key", "proof")
    assert status == 2 and "field `proof`: a demonstration must be" in err


def test_a_damaged_gzip_is_one_message(tmp_path, capsys):
    whole = gzip.compress("".join(json.dumps(asked(n=i * 7919)) + "\n" for i in range(5000)).encode())
    for at in (12, len(whole) // 2):
        path = tmp_path / "in.jsonl.gz"
        path.write_bytes(whole[:at] + b"\xff" * 40 + whole[at + 40 :])
        assert main(["convert", str(path), str(tmp_path / "out.parquet")]) == 2
        assert f"{path}: " in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_message(tmp_path, capsys, monkeypatch):
    (tmp_path / "in.jsonl").write_text(json.dumps(asked()), encoding="utf-8")
    (tmp_path / "folder.parquet").mkdir()
    for out in ("in.jsonl/out.parquet", "in.jsonl/a/out.parquet", "folder.parquet"):
        assert main(["convert", str(tmp_path / "in.jsonl"), str(tmp_path / out)]) == 2
        assert "cannot be written" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    for method in ("write_table", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(pq.ParquetWriter, method, full)
            status, made, _, err = said(tmp_path, capsys, [asked()])
            assert status == 2 and made is None and "out.parquet: cannot be written: [Errno 28]" in err


def test_names_that_cannot_be_printed_are_escaped(tmp_path, capsys):
    status, made, out, _ = said(tmp_path, capsys, [asked(**{"half \ud800": 1})])
    assert status == 0 and made and "`half \\ud800`" in out


CHATS = [say("#### 1"), [say("#### 1")], [{"content": "#### 1"}], {"content": "#### 1"}]


@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_every_form_of_a_chat_may_stand_as_json_text(tmp_path, capsys, chat):
    text = json.dumps(chat)
    _, (made,), out, _ = said(tmp_path, capsys, [{"prompt": json.dumps(ask("a?")), "target": text, "answer": "1"}])
    assert made["prompt"] == [ask("a?")] and made["target"] == [say("#### 1")] and out.count(": parsed") == 2
    _, (made,), *_ = said(tmp_path, capsys, [{"prompt": "a?", "target": [text, text], "answer": "1"}])
    assert made["target"] == [[say("#### 1")]] * 2
    _, (made,), *_ = said(tmp_path, capsys, [{"messages": [json.dumps(m) for m in (ask("a?"), say("#### 1"))]}])
    assert made["prompt"] == [ask("a?")] and made["target"] == [say("#### 1")]
    asks = '{"content": "x"} is what?'
    assert said(tmp_path, capsys, [{"question": asks, "answer": "1"}])[1][0]["prompt"] == [ask(asks)]


def test_only_remedies_that_work_are_named(tmp_path, capsys):
    row = {"q": {"text": "a?", "level": 3}, "answer": "#### 1", "target": "x", "prompt": "b?", "a.b": 1}
    options = ["--prompt-key", "q.text", "--demo-key", "answer"]
    out = said(tmp_path, capsys, [row], *options)[2]
    assert "not carried over: `q.level`, `target`, `prompt`, `a.b`; to carry one over: " in out
    remedies = "--keep NAME, --keep q, --demo-key target, --prompt-key prompt\n"
    assert out.partition("carry one over: ")[2].startswith(remedies)
    _, (made,), out, _ = said(tmp_path, capsys, [row], *options, "--keep", "q", "--keep", "a.b")
    assert made["q"] == row["q"] and made["a.b"] == 1 and "not carried over: `target`, `prompt`;" in out


def test_a_chat_that_asks_nothing_is_refused(tmp_path, capsys):
    system = {"role": "system", "content": "Think."}
    for row in ({"prompt": [system, ask(" ")], "target": "#### 1"}, {"messages": [system, ask(""), say("#### 1")]}):
        status, _, _, err = said(tmp_path, capsys, [row])
        assert status == 2 and "asks nothing" in err


def test_a_system_text_and_a_kept_column_may_come_and_go(tmp_path, capsys):
    row = {"messages": [ask("a?"), say("#### 1")], "r": 1}
    late = {"messages": row["messages"], "system": "Think."}
    _, made, out, _ = said(tmp_path, capsys, [row, late], "--keep", "r")
    assert made[1]["prompt"] == [{"role": "system", "content": "Think."}, ask("a?")] and "not carried" not in out
    assert [m["r"] for m in made] == [1, None]
    status, _, _, err = said(tmp_path, capsys, [late, row], "--keep", "r")
    assert status == 2 and "row 1: field `r`: no such field (--keep)" in err


def test_a_list_after_a_byte_order_mark(tmp_path, capsys):
    assert said(tmp_path, capsys, "\ufeff" + json.dumps([asked(), asked()]))[0] == 0


def test_the_type_that_is_suggested_takes_the_value(tmp_path, capsys):
    for rows in ([0.5, True], [[0.5], [True]]):
        status, _, _, err = said(tmp_path, capsys, [asked(r=r) for r in rows], "--keep", "r")
        assert status == 2 and "--peek" not in err and "--keep r:string" in err
    path, out = tmp_path / "in.parquet", str(tmp_path / "out.parquet")
    pq.write_table(pa.Table.from_pylist([asked(r=b"\xff")]), path)
    assert main(["convert", str(path), out, "--keep", "r:string"]) == 2
    assert "--keep r:binary\n" in capsys.readouterr().err
    assert main(["convert", str(path), out, "--keep", "r:binary"]) == 0
