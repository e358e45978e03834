"""Demonstrations: real ones come back whole, every shape of cell is understood, bad ones say why."""

import numpy as np
import pyarrow as pa
import pytest
from made_data import gsm8k
from some_columns import THREE, check_values
from tensordict import NonTensorData, NonTensorStack
from tiny_tokenizers import STYLES, tiny

from verl_hpt.demos.demonstration import REASONS, Unusable, demonstrations, of_row
from verl_hpt.demos.demonstration import Demonstration as Demo
from verl_hpt.demos.encode import encode
from verl_hpt.demos.select import SELECTORS, select


def say(content, **more):
    return {"role": "assistant", "content": content, **more}


def reason(demo, style="qwen2.5", **kwargs):
    tokenizer = tiny(style)
    with pytest.raises(Unusable) as caught:
        encode(demo, tokenizer, tokenizer.eos_token_id, **kwargs)
    assert caught.value.reason in REASONS
    return caught.value.reason


@pytest.mark.parametrize("style", STYLES)
def test_every_gsm8k_demonstration_round_trips(style):
    """Of 7,473 real ones 7,473: rendered beside its prompt, tokenised, decoded, it is the text plus one EOS."""
    tokenizer, rows = tiny(style), gsm8k()
    eos = tokenizer.eos_token_id
    whole = 0
    for row in rows:
        question = [{"role": "user", "content": row["question"]}]
        rendered = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer.encode(rendered, add_special_tokens=False)
        encoded = encode([say(row["answer"])], tokenizer, eos, prompt_ids=prompt_ids, max_length=1024)
        assert encoded.ids.count(eos) == 1 and encoded.ids[-1] == eos
        assert encoded.mask == [1] * len(encoded.ids) and not encoded.unclosed_think
        assert tokenizer.decode(encoded.ids[:-1], skip_special_tokens=False) == row["answer"]
        beside = tokenizer.decode(prompt_ids + encoded.ids, skip_special_tokens=False)
        assert beside == rendered + row["answer"] + tokenizer.eos_token
        conversation = tokenizer.apply_chat_template([*question, say(row["answer"])], tokenize=False)
        assert conversation.removesuffix("\n") == beside
        whole += 1
    assert whole == len(rows)


@pytest.mark.parametrize("style", STYLES)
def test_text_and_messages_and_ready_ended_text_give_the_same_tokens(style):
    tokenizer = tiny(style)
    eos, end = tokenizer.eos_token_id, tokenizer.eos_token
    for row in gsm8k()[:300]:
        text = row["answer"]
        plain = encode(text, tokenizer, eos)
        for same in ([say(text)], text + end, text + end + "\n", text + end + end, [say(text + end + "\n")]):
            found = encode(same, tokenizer, eos)
            assert (found.ids, found.mask, found.text) == (plain.ids, plain.mask, plain.text)


def test_another_eos_replaces_the_tokenizers_own():
    tokenizer = tiny("llama3")
    other = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    for text in ("It is 4.", "It is 4.<|eot_id|>", "It is 4.<|end_of_text|>", "It is 4.<|eot_id|>\n"):
        ids = encode(text, tokenizer, other).ids
        assert ids[-1] == other and tokenizer.decode(ids[:-1], skip_special_tokens=False) == "It is 4."


TEXT = "It is 4."


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (TEXT, [TEXT]),
        (say(TEXT), [[say(TEXT)]]),
        ([say(TEXT)], [[say(TEXT)]]),
        (["a", "b"], ["a", "b"]),
        ([[say("a")], [say("b")]], [[say("a")], [say("b")]]),
        ([["a"], ["b"]], [["a"], ["b"]]),
        (None, []),
        ([], []),
        (float("nan"), []),
        (np.array(["a", "b"], dtype=object), ["a", "b"]),
        (np.array([say(TEXT)], dtype=object), [[say(TEXT)]]),
        (np.str_(TEXT), [TEXT]),
        (pa.scalar(["a", "b"]), ["a", "b"]),
        (pa.scalar([{"role": "assistant", "content": TEXT, "tool_calls": None}]), [[say(TEXT)]]),
        (("a", "b"), ["a", "b"]),
        ("", [""]),
        (7, [7]),
        (["a", None], ["a", None]),
    ],
    ids=str,
)
def test_cells_of_every_shape_hold_the_demonstrations_they_hold(cell, expected):
    assert demonstrations(cell) == expected


def test_tensordict_wrappers_are_opened():
    assert demonstrations(NonTensorData([say(TEXT)])) == [[say(TEXT)]]
    assert demonstrations(NonTensorData(TEXT)) == [TEXT]
    assert demonstrations(NonTensorStack("a", "b")) == ["a", "b"]


@pytest.mark.parametrize(
    ("demo", "why"),
    [
        (None, "null"),
        (float("nan"), "null"),
        ("", "empty"),
        (" \n\t", "empty"),
        ("<|im_end|>\n", "empty"),
        ([], "empty"),
        ([say("")], "empty"),
        (7, "not_text"),
        (b"bytes", "not_text"),
        (["a"], "not_text"),
        ("half \ud800 a pair", "not_text"),
        ([say(None)], "not_text"),
        ([say(5)], "not_text"),
        ([say([{"type": "image", "image": "x.png"}])], "not_text"),
        ([{"role": "user", "content": "hi"}], "bad_roles"),
        ([{"role": "user", "content": "hi"}, say("a")], "bad_roles"),
        ([say("a"), {"role": "user", "content": "hi"}], "bad_roles"),
        ([say("a"), say("b")], "bad_roles"),
        ("one<|im_end|>two", "eos_inside"),
        ([say("one<|im_end|>\n<|im_start|>user\nmore")], "eos_inside"),
    ],
    ids=str,
)
def test_unusable_demonstrations_say_why(demo, why):
    assert reason(demo) == why


def test_limit_counts_eos():
    tokenizer = tiny("qwen2.5")
    ids = encode(TEXT, tokenizer, tokenizer.eos_token_id).ids
    assert encode(TEXT, tokenizer, tokenizer.eos_token_id, max_length=len(ids)).ids == ids
    assert reason(TEXT, max_length=len(ids) - 1) == "too_long"
    assert reason("a" * 10_000_000, max_length=16) == "too_long"


def test_reasoning_tag_is_not_opened_twice():
    tokenizer = tiny("qwen3")
    question = [{"role": "user", "content": "2+2?"}]
    text = "<think>\nTwo and two.\n</think>\n\nIt is 4."

    def both(demo, **kwargs):
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **kwargs)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        encoded = encode(demo, tokenizer, tokenizer.eos_token_id, prompt_ids=prompt_ids)
        return tokenizer.decode(prompt_ids + encoded.ids, skip_special_tokens=False), encoded.unclosed_think

    start = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert both(text) == (start + text + "<|im_end|>", False)
    assert both(text, open_thinking=True) == (start + text + "<|im_end|>", False)
    assert both(text.removeprefix("<think>\n"), open_thinking=True) == (start + text + "<|im_end|>", False)
    assert (
        both([say("It is 4.", reasoning_content="Two and two.")], open_thinking=True)[0] == start + text + "<|im_end|>"
    )
    assert both("It is 4.", open_thinking=True)[1] is True
    assert both("It is 4.", enable_thinking=False)[0].endswith("</think>\n\nIt is 4.<|im_end|>")


def tool_demo():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    return [say("I will add.", tool_calls=[call]), {"role": "tool", "content": "4"}, say("It is 4.")]


@pytest.mark.parametrize("style", ["qwen2.5", "qwen3"])
def test_tool_demonstrations_train_what_the_assistant_said_and_nothing_else(style):
    tokenizer = tiny(style)
    question = [{"role": "user", "content": "2+2?"}]
    encoded = encode(tool_demo(), tokenizer, tokenizer.eos_token_id, prompt_messages=question)
    assert len(encoded.ids) == len(encoded.mask)
    said = [i for i, m in zip(encoded.ids, encoded.mask, strict=True) if m]
    call = '\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
    assert tokenizer.decode(said, skip_special_tokens=False) == f"I will add.{call}<|im_end|>It is 4.<|im_end|>"
    between = [i for i, m in zip(encoded.ids, encoded.mask, strict=True) if not m]
    answer = "\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(between, skip_special_tokens=False) == answer
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*question, *with_dicts(tool_demo())], tokenize=False)
    assert prompt + tokenizer.decode(encoded.ids, skip_special_tokens=False) == whole.removesuffix("\n")


def with_dicts(demo):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    return [{**m, "tool_calls": [call]} if "tool_calls" in m else m for m in demo]


def test_turns_of_llama_style_round_trip():
    tokenizer = tiny("llama3")
    demo = [say("Which two?"), {"role": "user", "content": "Two."}, say("It is 4.")]
    encoded = encode(demo, tokenizer, tokenizer.eos_token_id)
    said = [i for i, m in zip(encoded.ids, encoded.mask, strict=True) if m]
    assert tokenizer.decode(said, skip_special_tokens=False) == "Which two?<|eot_id|>It is 4.<|eot_id|>"


def test_no_begin_token_comes_into_a_demonstration():
    """Llama 3's post-processor puts one before whatever is tokenised with special tokens, the middle of a row too."""
    tokenizer = tiny("llama3")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenizer.encode(TEXT) == [bos, *plain] and bos not in plain
    for demo in (TEXT, TEXT + tokenizer.eos_token, say(TEXT), [say(TEXT)], [say([{"type": "text", "text": TEXT}])]):
        (demo,) = demonstrations(demo)
        assert encode(demo, tokenizer, eos).ids == [*plain, eos]
    turns = [say("Which two?"), {"role": "user", "content": "Two."}, say(TEXT)]
    ids = encode(turns, tokenizer, eos, prompt_messages=[{"role": "user", "content": "2+2?"}]).ids
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    rendered = f"Which two?<|eot_id|>{head.format('user')}Two.<|eot_id|>{head.format('assistant')}{TEXT}<|eot_id|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == rendered and bos not in ids


def test_template_that_rewrites_earlier_turns_is_refused():
    """Qwen3's drops the reasoning of turns before the last question: no rollout was ever given that text."""
    demo = [say("<think>\nHm.\n</think>\n\nWhich?"), {"role": "user", "content": "Two."}, say("It is 4.")]
    tokenizer = tiny("qwen3")
    encoded = encode(demo, tokenizer, tokenizer.eos_token_id)  # the same at both places: stable, if shorter
    assert "Hm." not in tokenizer.decode(encoded.ids)
    tokenizer = tiny("qwen2.5")
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages | length }}" + template
        assert reason(demo) == "template"
        tokenizer.chat_template = "{{ raise_exception('no tools here') }}"
        assert reason(demo) == "template"
    finally:
        tokenizer.chat_template = template


def test_columns_beside_the_demonstrations_follow_them():
    row = {"target": ["a", "b"], "r": [0.5, 1.0], "w": [[1.0, 1.0], [2.0, 0.0]], "s": ["x", "y"], "lp": None}
    found = of_row(row, "target", dict(reward="r", token_weights="w", source="s", teacher_log_prob="lp"))
    assert found == [
        Demo("a", 0, {"reward": 0.5, "token_weights": [1.0, 1.0], "source": "x"}),
        Demo("b", 1, {"reward": 1.0, "token_weights": [2.0, 0.0], "source": "y"}),
    ]
    assert of_row({"target": "a", "r": 0.5}, "target", dict(reward="r"))[0].values == {"reward": 0.5}
    (one,) = of_row({"target": "a", "w": [1.0, 2.0]}, "target", dict(token_weights="w"))
    assert one.values == {"token_weights": [1.0, 2.0]}


@pytest.mark.parametrize(
    "row",
    [
        {"target": ["a", "b"], "reward": 1.0},
        {"target": ["a", "b"], "reward": [1.0]},
        {"target": "a", "reward": float("nan")},
        {"target": "a", "reward": float("inf")},
        {"target": "a", "reward": "1"},
        {"target": "a", "reward": True},
        {"target": "a", "token_weights": [1.0, -1.0]},
        {"target": "a", "token_weights": [0.0, 0.0]},
        {"target": "a", "token_weights": 1.0},
        {"target": "a", "teacher_log_prob": [-1.0, float("nan")]},
        {"target": "a", "teacher_log_prob": [-1.0, 0.1]},
        {"target": "a", "source": 3},
    ],
    ids=str,
)
def test_columns_that_do_not_fit_are_refused(row):
    name = next(k for k in row if k != "target")
    with pytest.raises(Unusable) as caught:
        for demo in of_row(row, "target", dict(**{name: name})):
            check_values(demo, dict(**{name: name}))
    assert caught.value.reason == "bad_column"


def test_per_token_columns_must_have_a_value_for_each_token_and_eos():
    tokenizer = tiny("qwen2.5")
    encoded = encode(TEXT, tokenizer, tokenizer.eos_token_id)
    columns = dict(token_weights="w")
    check_values(Demo(TEXT, 0, {"token_weights": [1.0] * len(encoded.ids)}), columns, encoded)
    teacher = dict(teacher_log_prob="lp")
    with pytest.raises(Unusable, match="EOS included"):
        check_values(Demo(TEXT, 0, {"teacher_log_prob": [-1.0] * (len(encoded.ids) - 1)}), teacher, encoded)
    with pytest.raises(Unusable, match="has no value for demonstration 1"):
        check_values(Demo(TEXT, 0, {}), teacher, encoded)
    with pytest.raises(Unusable, match="on what the assistant says"):
        check_values(Demo(TEXT, 0, {"token_weights": [0.0, 1.0, 0.0]}), columns, THREE)


DEMOS = ["aaa", "b", "cc", "dddd", "b"]


@pytest.mark.parametrize("how", SELECTORS)
def test_choice_depends_on_its_arguments_alone(how):
    more = {"log_likelihoods": [-1.0, -2.0, None, -0.5, float("nan")], "seen": {0: 2, 1: 1}}
    for draw in range(5):
        chosen = select(DEMOS, how, 2, seed=1, draw=draw, question_key="q", **more)
        assert chosen == select(list(DEMOS), how, 2, seed=1, draw=draw, question_key="q", **more)
        assert len(set(chosen)) == 2 and all(0 <= i < len(DEMOS) for i in chosen)
        assert len(select(DEMOS, how, 9, question_key="q", **more)) == len(DEMOS)
        assert select([], how, 1, question_key="q") == []


def test_each_rule_chooses_what_it_says():
    assert select(DEMOS, "first", 2) == [0, 1]
    assert select(DEMOS, "shortest", 3) == [1, 4, 2]
    assert select(DEMOS, "shortest", 1, lengths=[5, 4, 3, 2, 1]) == [4]
    assert select(DEMOS, "likelihood", 3, log_likelihoods=[-1.0, -2.0, None, -0.5, float("nan")]) == [3, 0, 1]
    assert set(select(DEMOS, "unseen_first", 3, seen={0: 2, 1: 1})) == {2, 3, 4}
    assert select(DEMOS, "unseen_first", 5, seen={0: 2, 1: 1})[3:] == [1, 0]
    turns = [select(DEMOS, "round_robin", 2, draw=d, question_key="q") for d in range(5)]
    assert sorted(i for turn in turns for i in turn) == sorted([*range(5), *range(5)])
    drawn = [select(DEMOS, "random", 1, draw=d, question_key=q)[0] for d in range(40) for q in "abcdefghij"]
    assert all(50 < drawn.count(i) < 110 for i in range(5))
    assert select(DEMOS, "random", 1, seed=0, question_key="q") is not None
    assert any(
        select(DEMOS, "random", 1, seed=0, draw=d) != select(DEMOS, "random", 1, seed=1, draw=d) for d in range(10)
    )


def test_choice_names_what_is_missing():
    with pytest.raises(ValueError, match=r"demo\.select is 'best'.*unseen_first"):
        select(DEMOS, "best")
    with pytest.raises(ValueError, match="mean log-prob for each of 5"):
        select(DEMOS, "likelihood")
