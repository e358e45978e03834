"""`data convert` on chats: every message, call and key of theirs is carried, or named by row and field."""

import json

import pytest
from conversions import ask, said, say

from verl_hpt.demos.demonstration import plain

pytestmark = pytest.mark.usefixtures("group_rows")


CALLS = [5, "x", {"a": 1}, [5], [{"function": {"arguments": "{}"}}], [{"function": {"name": 5}}], [{"function": "f"}]]


@pytest.mark.parametrize("calls", CALLS, ids=str)
def test_tool_calls_that_are_none_name_their_message(tmp_path, capsys, calls):
    row = {"messages": [ask("a?"), {**say(""), "tool_calls": calls}, say("#### 1")]}
    status, made, _, err = said(tmp_path, capsys, [row])
    assert status == 2 and made is None and "row 1: field `messages[1].tool_calls`: must be a list of calls" in err


def test_a_named_demonstration_beside_messages_may_lack_roles(tmp_path, capsys):
    row = {"messages": [ask("a?")], "proof": [{"content": "#### 1"}]}
    _, (made,), *_ = said(tmp_path, capsys, [row], "--demo-key", "proof")
    assert made["target"] == [say("#### 1")]
    status, _, _, err = said(tmp_path, capsys, [{**row, "proof": 5}], "--demo-key", "proof")
    assert status == 2 and "field `proof`: a demonstration must be" in err


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


def test_a_chat_that_asks_nothing_is_refused(tmp_path, capsys):
    system = {"role": "system", "content": "Think."}
    for row in ({"prompt": [system, ask(" ")], "target": "#### 1"}, {"messages": [system, ask(""), say("#### 1")]}):
        status, _, _, err = said(tmp_path, capsys, [row])
        assert status == 2 and "asks nothing" in err


def test_a_system_text_and_a_column_may_come_and_go(tmp_path, capsys):
    row = {"messages": [ask("a?"), say("#### 1")], "r": 1}
    late = {"messages": row["messages"], "system": "Think."}
    for rows in ([row, late], [late, row]):
        status, made, *_ = said(tmp_path, capsys, rows)
        assert status == 0 and "system" not in made[0]
        assert [m["prompt"][0]["role"] == "system" for m in made] == ["system" in r for r in rows]
        assert [m["r"] for m in made] == [r.get("r") for r in rows]


def test_content_in_parts_is_joined_where_nothing_is_lost(tmp_path, capsys):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "?", "image": None}]
    assert said(tmp_path, capsys, [{"messages": [ask(parts), say("#### 1")]}])[1][0]["prompt"] == [ask("a?")]
    row = {"messages": [ask([*parts, {"text": "b", "cache": 1}]), say("#### 1")]}
    status, _, _, err = said(tmp_path, capsys, [row])
    assert status == 2 and "row 1: field `messages[0].content`: must be text, got list" in err
    _, (made,), *_ = said(tmp_path, capsys, [row], "--drop", "messages.content.cache")
    assert made["prompt"] == [ask("a?b")]


def test_further_keys_of_tool_calls_are_carried(tmp_path, capsys):
    call = {"id": "1", "index": 3, "type": "function", "function": {"name": "f", "arguments": {"a": 2}, "strict": True}}
    bare = {"id": "2", "name": "f", "arguments": '{"a": 1}'}
    turn = {**say(""), "tool_calls": [call, bare]}
    row = {"messages": [ask("a?"), turn, {"role": "tool", "content": "4"}, say("#### 1")]}
    _, (made,), *_ = said(tmp_path, capsys, [row])
    first, second = plain(made["target"][0]["tool_calls"])
    assert first == {**call, "function": {**call["function"], "arguments": '{"a": 2}'}}
    assert second == {"id": "2", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
