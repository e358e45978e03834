"""Demonstrations and their columns at the edges: each message, each bound, each way through."""

from collections import UserList

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_tokenizers import tiny

from verl_hpt.demos import encode as encoding
from verl_hpt.demos.demonstration import Unusable, message_text, plain, single_text
from verl_hpt.demos.encode import encode
from verl_hpt.demos.select import SELECTORS, select, stable_hash

# --- plain values -----------------------------------------------------------------------------------------------------


class Wrapped:
    def __init__(self, data):
        self.data = data


class NonTensorData(Wrapped):
    """As tensordict's, known by its name."""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2.5, "a", None, True], [1, 2.5, "a", None, True]),
        ((1, 2), [1, 2]),
        ((1, (2, [3])), [1, [2, [3]]]),
        ([np.int64(1), np.float32(0.5), np.bool_(True)], [1, 0.5, True]),
        ([1, np.array([1, 2])], [1, [1, 2]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array(5), 5),
        (np.array(["a", None, np.int64(3)], dtype=object), ["a", None, 3]),
        (np.array([{"a": None, 1: np.array([2])}], dtype=object), [{"1": [2]}]),
        (np.array([(1, "a")], dtype=[("n", int), ("t", "U1")]), [[1, "a"]]),
        (np.array(["a", "bb"]), ["a", "bb"]),
        (np.array([b"a"]), [b"a"]),
        (pa.array([1.0, 2.0]).to_numpy(), [1.0, 2.0]),
        (pa.scalar([1.0, None]), [1.0, None]),
        ([pa.scalar(1), 2], [1, 2]),
        (torch.tensor([1, 2]), [1, 2]),
        (NonTensorData(np.array([1])), [1]),
        (UserList([1, np.int64(2)]), [1, 2]),
        (b"ab", b"ab"),
        (bytearray(b"ab"), bytearray(b"ab")),
        ({"a": (1, None), "b": None}, {"a": [1, None]}),
    ],
    ids=str,
)
def test_plain_values(value, expected):
    def kinds(v):
        return [kinds(x) for x in v] if isinstance(v, list) else type(v)

    assert plain(value) == expected and kinds(plain(value)) == kinds(expected)


def test_plain_lists_are_new_and_unknown_objects_stay():
    given, other = [1.0, 2.0], object()
    assert plain(given) == given and plain(given) is not given
    assert plain(other) is other and plain([other]) == [other]
    assert isinstance(plain([np.float64(1.0)])[0], float)


# --- texts ------------------------------------------------------------------------------------------------------------


def refused(demo, **kwargs) -> tuple[str, str]:
    tokenizer = tiny("qwen2.5")
    with pytest.raises(Unusable) as caught:
        encode(demo, tokenizer, tokenizer.eos_token_id, **kwargs)
    return caught.value.reason, caught.value.detail


def say(content, **more):
    return {"role": "assistant", "content": content, **more}


def test_what_was_got_is_told():
    user = {"role": "user", "content": "hi"}
    for demo, why in (
        (7, ("not_text", "got int")),
        (["a", 5], ("not_text", "got a list of int, str")),
        ([say(5)], ("not_text", "content is int")),
        ([say([{"type": "image"}, "a"])], ("not_text", "content parts a list of dict, str")),
        ([say([5])], ("not_text", "content parts a list of int")),
        ("ab\ud800", ("not_text", "a lone surrogate at character 2")),
        ([user, say("a")], ("bad_roles", "got user, assistant")),
        ([say("a"), user], ("bad_roles", "got assistant, user")),
        ([{"role": "x" * 300, "content": ""}], ("bad_roles", ("got " + "x" * 300)[:204])),
        (
            [say("a"), say("b")],
            ("bad_roles", "two assistant messages in a row; several demonstrations are a list of lists"),
        ),
        ([], ("empty", "")),
        (None, ("null", "")),
    ):
        assert refused(demo) == why


def test_parts_of_text_are_joined_and_a_message_without_a_role_is_the_assistants():
    assert message_text(say(["a", {"type": "text", "text": "b"}, "c"])) == "abc"
    assert single_text([{"content": "a"}]) == "a" and single_text("a") == "a"
    assert message_text(say(None, tool_calls=[{}])) == ""
    assert single_text([say("a", tool_calls=[{}])]) is None


def test_reasoning_goes_before_the_answer_once():
    assert message_text(say("a", reasoning_content=" r ")) == "<think>\nr\n</think>\n\na"
    for unchanged in (say("a", reasoning_content=" "), say("a", reasoning_content=5), say("x</think>a")):
        assert message_text(unchanged) == unchanged["content"]
    assert message_text(say("x</think>a", reasoning_content="r")) == "x</think>a"


@pytest.mark.parametrize(
    ("text", "ends", "tail", "expected"),
    [
        (" a ", ["<e>"], None, " a "),
        (" a <e> \n", ["<e>"], None, " a "),
        ("a<e><f><e>", ["<e>", "<f>"], None, "a"),
        ("a<e>b", ["<e>"], None, "a<e>b"),
        ("a", [""], None, "a"),
        ("<think>a", [], None, "<think>a"),
        (" <think>\na", [], "\n", "a"),
        ("<think>a", [], "\n", "a"),
        ("<think>\n\na", [], "\n", "\na"),
        ("b<think>a", [], "", "b<think>a"),
        (" a", [], "\n", " a"),
    ],
)
def test_cleaned_texts(text, ends, tail, expected):
    assert encoding.clean_text(text, ends, tail) == expected


@pytest.mark.parametrize(("text", "tail"), [("<think>", ""), ("<think>\n", "\n"), ("<e>", None), (" ", None)])
def test_nothing_left_is_empty(text, tail):
    with pytest.raises(Unusable) as caught:
        encoding.clean_text(text, ["<e>"], tail)
    assert caught.value.reason == "empty"


class Names:
    """A tokenizer that only knows what its tokens look like."""

    eos_token_id = 2

    def convert_ids_to_tokens(self, token):
        return {1: "<b>", 2: "<e>", 3: "e!", 4: None}[token]

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens is False
        return "".join(map(chr, ids))


def test_what_eos_looks_like():
    assert encoding.eos_texts(Names(), 2) == ["<e>"] and encoding.eos_texts(Names(), 1) == ["<b>", "<e>"]
    assert encoding.eos_texts(Names(), 3) == ["<e>"]  # two characters may be an answer's own end
    assert encoding.eos_texts(Names(), 4) == ["<e>"]
    none = Names()
    none.eos_token_id = None
    assert encoding.eos_texts(none, 1) == ["<b>"]


@pytest.mark.parametrize(
    ("prompt", "tail"),
    [
        ("x<think>", ""),
        ("x<think>\n", "\n"),
        ("x<think>" + "\n" * 9, "\n" * 9),
        ("<think>" + "\n" * 10, "\n" * 10),
        ("<think>" + " " * 5000, " " * 5000),
        ("think>" + " " * 5000, None),
        (" " * 5000, None),
        ("<think>a", None),
        ("<think></think>", None),
        ("abc", None),
        ("", None),
    ],
)
def test_an_open_reasoning_tag_at_the_prompts_end(prompt, tail):
    assert encoding.open_think([ord(letter) for letter in prompt], Names()) == tail
    assert encoding.open_think(np.array([ord(letter) for letter in prompt], dtype=int), Names()) == tail


def test_of_a_long_prompt_only_its_end_is_decoded(monkeypatch):
    decoded, decode = [], Names.decode

    def counting(self, ids, skip_special_tokens):
        decoded.append(len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Names, "decode", counting)
    for prompt, tail, expected in (
        ("a" * 5000, None, [16]),
        ("a" * 5000 + "<think>\n\n", "\n\n", [16]),
        ("a" * 5000 + "<think>" + "\n" * 10, "\n" * 10, [16, 32]),
        ("<think>", "", [7]),
        ("a ", None, [2]),
    ):
        decoded.clear()
        assert encoding.open_think([ord(letter) for letter in prompt], Names()) == tail and decoded == expected


def test_without_a_prompt_no_tag_is_open():
    assert encoding.open_think(None, Names()) is None


def test_finished_tokens():
    assert encoding.finish([5, 6], 2, 3) == [5, 6, 2] and encoding.finish(np.array([5]), 2, None) == [5, 2]
    for ids, limit, why in (
        ([5, 2, 6], None, ("eos_inside", "token 1 of 4")),
        ([5, 6], 2, ("too_long", "3 tokens, limit 2")),
    ):
        with pytest.raises(Unusable) as caught:
            encoding.finish(ids, 2, limit)
        assert (caught.value.reason, caught.value.detail) == why


def test_a_hopelessly_long_text_is_not_tokenised():
    encoding.bound_characters("a" * 2048, 2)
    encoding.bound_characters("a" * 10**5, None)
    with pytest.raises(Unusable) as caught:
        encoding.bound_characters("a" * 2049, 2)
    assert (caught.value.reason, caught.value.detail) == ("too_long", "2049 characters, limit 2 tokens")


def test_an_unclosed_reasoning_tag_is_a_warning():
    tokenizer = tiny("qwen2.5")
    opened, closed = (tokenizer.encode(text, add_special_tokens=False) for text in ("Why? <think>", "Why?"))
    found = {
        (text, tail): encode(text, tokenizer, tokenizer.eos_token_id, prompt_ids=ids).unclosed_think
        for text in ("a", "a</think>")
        for tail, ids in (("open", opened), ("closed", closed))
    }
    assert [case for case, unclosed in found.items() if unclosed] == [("a", "open")]


# --- several turns ----------------------------------------------------------------------------------------------------


def call(name="add", arguments='{"a": 1}', **more):
    return {"id": "1", "function": {"name": name, "arguments": arguments, **more}}


def turns(first=None, last="It is 4."):
    return [first or say("Hm.", tool_calls=[call()]), {"role": "tool", "content": "4"}, say(last)]


def test_tool_calls_are_told_of_by_name():
    for calls, why in (
        ([{"id": "1"}], "a tool call needs a function with a name"),
        (["add"], "a tool call needs a function with a name"),
        ([call(name=5)], "a tool call needs a function with a name"),
        ([call(arguments="{" * 80)], f"a tool call's arguments are no JSON: {'{' * 60!r}"),
    ):
        assert refused(turns(say("x", tool_calls=calls))) == ("not_text", why)


def test_a_tool_call_may_be_bare_and_its_arguments_a_dict():
    tokenizer = tiny("qwen2.5")

    def tokens(content):
        demo = encode(content, tokenizer, tokenizer.eos_token_id)
        return demo.ids, demo.mask

    expected = tokens(turns())
    for same in ({"name": "add", "arguments": {"a": 1}}, call(arguments={"a": 1})):
        assert tokens(turns(say("Hm.", tool_calls=[same]))) == expected
    no_arguments = {"function": {"name": "add"}}
    bare = tokens(turns(say("Hm.", tool_calls=[call(arguments={})])))
    assert tokens(turns(say("Hm.", tool_calls=[no_arguments]))) == bare


def test_turns_are_bounded_and_may_not_be_empty():
    tokenizer = tiny("qwen2.5")
    length = len(encode(turns(), tokenizer, tokenizer.eos_token_id).ids)
    assert len(encode(turns(), tokenizer, tokenizer.eos_token_id, max_length=length).ids) == length
    assert refused(turns(), max_length=length - 1) == ("too_long", f"more than {length - 1} tokens at turn 3")
    assert refused(turns(), max_length=3)[1] == "more than 3 tokens at turn 1"
    assert refused(turns(say("a"), "b<|im_end|>c")) == ("eos_inside", "the last turn has text after EOS")
    assert refused([say(5), {"role": "tool", "content": "4"}, say("a")]) == ("not_text", "content is int")


def test_turns_of_which_a_template_leaves_nothing_are_empty(monkeypatch):
    ends = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    monkeypatch.setattr(tiny("qwen2.5"), "chat_template", ends)
    user = {"role": "user", "content": ""}
    assert refused([say(""), user, say("")]) == ("empty", "")
    tokenizer = tiny("qwen2.5")
    said = encode([say(""), user, say("a")], tokenizer, tokenizer.eos_token_id)
    assert said.mask == [1, 1, 1] and tokenizer.decode(said.ids) == "<|im_end|>a<|im_end|>"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no tools') }}", "TemplateError: no tools"),
        ("{{ messages | length }}", "the text before turn 1 is not what a rollout is given there"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "'<|im_end|>' does not end turn 1"),
        (
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            "it leaves out the call of tool 'add' in turn 1",
        ),
    ],
)
def test_templates_that_cannot_say_what_is_the_assistants(template, why, monkeypatch):
    monkeypatch.setattr(tiny("qwen2.5"), "chat_template", template)
    assert refused(turns()) == ("template", why)


def test_what_a_template_says_wrong_is_told_in_two_hundred_characters(monkeypatch):
    monkeypatch.setattr(tiny("qwen2.5"), "chat_template", "{{ raise_exception('x' * 300) }}")
    assert refused(turns()) == ("template", ("TemplateError: " + "x" * 300)[:200])


# --- which one --------------------------------------------------------------------------------------------------------


def test_the_hash_is_the_same_for_ever():
    assert stable_hash() == 0xE4A6A0577479B2B4 and stable_hash("a", 1) == stable_hash("a\x1f1") != stable_hash("a1")
    assert stable_hash("\ud800") < 2**64


def test_choices_are_the_same_for_ever():
    """What a run's history and a resumed run rely on."""
    demos_of = list("abcdefg")
    picked = [select(demos_of, "random", 3, seed=1, draw=d, question_key="q") for d in range(4)]
    assert picked == [[3, 5, 6], [1, 2, 3], [0, 5, 6], [0, 4, 6]]
    turns_of = [select(demos_of, "round_robin", 3, seed=1, draw=d, question_key="q") for d in range(3)]
    start = stable_hash(1, "q") % 7
    assert turns_of == [[(start + 3 * d + i) % 7 for i in range(3)] for d in range(3)]
    assert select(demos_of, "unseen_first", 7, seed=1, question_key="q") == sorted(
        range(7), key=lambda i: stable_hash(1, "q", 0, i)
    )


def test_defaults_and_bounds_of_a_choice():
    assert select("ab") == [0] and select("ab", k=0) == [] and select("ab", k=-1) == [] and select("", "random") == []
    assert select(["bb", "a"], "shortest") == [1] and select([["x"], "aaaaaa"], "shortest") == [0]
    assert select([["x"], "aa"], "shortest") == [1], "messages count with their marks"
    assert select("abc", "shortest", 3, lengths=[2, 1, 1]) == [1, 2, 0]
    assert select("abc", "likelihood", 3, log_likelihoods=[-2.0, -1.0, -1.0]) == [1, 2, 0]
    assert select("abc", "likelihood", 2, log_likelihoods=[None, float("nan"), -9.0]) == [2, 0]
    assert select("abc", "unseen_first", 2, seen=[9, 0, 4].__getitem__) == [1, 2]
    assert select("abc", "unseen_first", 2, seen={0: 1, 1: None, 2: 3}) == [1, 0]
    assert SELECTORS == ("first", "random", "round_robin", "shortest", "likelihood", "unseen_first")


@pytest.mark.parametrize("how", ["random", "round_robin", "unseen_first"])
def test_a_choice_of_which_nothing_is_said_is_that_of_seed_and_draw_0_and_an_empty_key(how):
    chosen = [select("abcdefgh", how, 3, question_key=key) for key in range(9)]
    assert chosen == [select("abcdefgh", how, 3, seed=0, draw=0, question_key=key) for key in range(9)]
    assert chosen != [select("abcdefgh", how, 3, seed=1, draw=0, question_key=key) for key in range(9)]
    assert chosen != [select("abcdefgh", how, 3, seed=0, draw=1, question_key=key) for key in range(9)]
    assert select("abcdefgh", how, 8) == select("abcdefgh", how, 8, question_key="")


@pytest.mark.parametrize("seed", range(9))
def test_a_demonstration_never_seen_comes_before_one_that_was_seen_once(seed):
    for unseen in (None, 0):
        assert select("abc", "unseen_first", 1, seed=seed, seen={0: 1, 1: unseen, 2: 1}) == [1]


def test_what_a_choice_lacks_is_told():
    for given, got in ((None, "none"), ([-1.0], "1")):
        with pytest.raises(ValueError) as caught:
            select("ab", "likelihood", log_likelihoods=given)
        told = f"demo.select=likelihood needs a mean log-prob for each of 2 demonstrations, got {got}"
        assert str(caught.value) == told
    with pytest.raises(ValueError) as caught:
        select("", "best")
    assert str(caught.value) == (
        "demo.select is 'best'; choose from first, random, round_robin, shortest, likelihood, unseen_first"
    )
