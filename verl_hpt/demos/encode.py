"""Demonstrations: from what stands in a dataset's cell to the tokens that are trained on.

One row of verl's dataset has a prompt and, in the column `hpt.demo.key`, one demonstration or several. A demonstration
is a string (the answer), or a list of chat messages that continues the prompt: one assistant message, or assistant and
tool messages in turn, ending with the assistant's. Tokens are those that a rollout saying the same would have: the text
after the generation prompt, tokenised without special tokens, and exactly one EOS at the end.

Used by the trainer on the driver and by `verl-hpt data check`, so that the check shows what training does.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from verl_hpt.demos.select import SELECTORS, select, stable_hash
from verl_hpt.errors import UserError

__all__ = [
    "REASONS",
    "SELECTORS",
    "Demo",
    "EncodedDemo",
    "Unusable",
    "demonstrations",
    "encode",
    "plain",
    "select",
    "stable_hash",
]

REASONS = {
    "null": "no demonstration in this row",
    "empty": "no text, or nothing but spaces",
    "not_text": "neither text nor chat messages with text",
    "bad_roles": "messages must continue the prompt: assistant first, assistant last, tools or users between",
    "eos_inside": "the EOS token stands in the middle of the text",
    "too_long": "more tokens, EOS included, than a response may have",
    "template": "the chat template cannot say which tokens are the assistant's",
    "bad_column": "a per-demonstration column does not fit the demonstrations",
}

_PLAIN = (str, bool, int, float, type(None))
_CHARACTERS_A_TOKEN = 1024  # no vocabulary has longer tokens: a text above that many times the limit is not tokenised


class Unusable(ValueError):
    """A demonstration cannot be trained on; `reason` is a key of `REASONS`, `detail` says what was got."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{REASONS[reason]}{f' ({detail})' if detail else ''}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class EncodedDemo:
    """A demonstration's tokens: all follow the prompt's own tokens, the last one is EOS.

    `mask` is 1 on what the assistant says (its EOS included) and 0 on what tools or users say between.
    `warnings` names what is odd but trainable: `think_unclosed` (the prompt opens a reasoning tag that the text never
    closes).
    """

    ids: list[int]  # (tokens,)
    mask: list[int]  # (tokens,)
    warnings: tuple[str, ...] = ()


@dataclass
class Demo:
    """One demonstration of a row: as the dataset has it, what the columns beside it say, and what became of it.

    text: what is tokenised, None where only the chat template can say. length: tokens, EOS included, those of one that
    is too long too. encoded: None for one without a tokenizer, or one that cannot be trained on; bad: why not.
    """

    content: Any
    index: int = 0  # position in the row's cell
    values: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    length: int | None = None
    encoded: EncodedDemo | None = None
    bad: Unusable | None = None


def plain(value: Any) -> Any:
    """The same value in plain Python: NumPy, Arrow and tensordict wrappers opened, keys of dicts that hold None gone.

    A row read back from verl's queue or from Arrow has its lists as arrays, its messages' unused keys as None.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        # A column with a number a token has thousands: they are not walked through one by one.
        simple = all(issubclass(kind, _PLAIN) for kind in set(map(type, value)))
        return list(value) if simple else [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist()) if value.dtype.kind in "OV" else value.tolist()
    if hasattr(value, "as_py"):  # pyarrow scalars
        return plain(value.as_py())
    if type(value).__name__ == "NonTensorData":
        return plain(value.data)
    if hasattr(value, "tolist"):  # tensordict's stacks, torch tensors
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(v) for v in value]
    return value


def demonstrations(cell: Any) -> list[Any]:
    """The raw demonstrations of one row's cell: each a string, a list of message dicts, or something unusable.

    None and an empty list have none; a string, one message, or a list of messages is one; a list of strings or of
    message lists is several.
    """
    cell = plain(cell)
    if cell is None or cell != cell:  # pandas writes a missing text as NaN
        return []
    if isinstance(cell, dict):
        return [[cell]]
    if not isinstance(cell, list):
        return [cell]
    if cell and all(isinstance(item, dict) for item in cell):
        return [cell]
    return [[item] if isinstance(item, dict) else item for item in cell]


def message_text(message: dict) -> str:
    """A message's text, its reasoning in `<think>` tags before it; raises `Unusable` where it is not text."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [p if isinstance(p, str) else p.get("text") if isinstance(p, dict) else None for p in content]
        if not all(isinstance(p, str) for p in parts):
            raise Unusable("not_text", f"content parts {_kinds(content)}")
        content = "".join(parts)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise Unusable("not_text", f"content is {type(content).__name__}")
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip() and "</think>" not in content:
        content = f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"
    return content


def single_text(demo: Any) -> str | None:
    """The text of a one-turn demonstration, or None where only the chat template can render it; raises `Unusable`."""
    if demo is None or demo != demo:
        raise Unusable("null")
    if isinstance(demo, str):
        return demo
    if not isinstance(demo, list) or not all(isinstance(m, dict) for m in demo):
        raise Unusable("not_text", f"got {_kinds(demo)}")
    if not demo:
        raise Unusable("empty")
    roles = [m.get("role", "assistant") for m in demo]
    if roles[0] != "assistant" or roles[-1] != "assistant":
        raise Unusable("bad_roles", f"got {', '.join(map(str, roles))[:200]}")
    if any(a == b == "assistant" for a, b in itertools.pairwise(roles)):
        raise Unusable("bad_roles", "two assistant messages in a row; several demonstrations are a list of lists")
    if len(demo) == 1 and not demo[0].get("tool_calls"):
        return message_text(demo[0])
    return None


def clean_text(text: str, eos_texts: Sequence[str], think_tail: str | None = None) -> str:
    """The text to tokenise: without EOS at its end, without a reasoning tag that the prompt has already opened.

    `think_tail` is what the prompt has after its open `<think>` (see `open_think`), None where none is open.
    Raises `Unusable` for text that is empty or cannot be encoded.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable("not_text", f"a lone surrogate at character {error.start}") from None
    stripped = True
    while stripped:
        stripped = False
        for eos in eos_texts:
            if eos and text.rstrip().endswith(eos):
                text, stripped = text.rstrip()[: -len(eos)], True
    if think_tail is not None:
        opened = text.lstrip()
        if opened.startswith("<think>"):
            opened = opened[len("<think>") :]
            text = opened[len(think_tail) :] if opened.startswith(think_tail) else opened
    if not text.strip():
        raise Unusable("empty")
    return text


def eos_texts(tokenizer: Any, eos_id: int) -> list[str]:
    """What EOS looks like at the end of a text: the run's EOS, and the tokenizer's own where that is another."""
    ids = {int(eos_id), getattr(tokenizer, "eos_token_id", None)} - {None}
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in sorted(ids)]
    return [t for t in tokens if isinstance(t, str) and len(t) > 2]


def open_think(prompt_ids: Sequence[int] | None, tokenizer: Any) -> str | None:
    """What follows an open `<think>` at the prompt's end (often a newline), or None where none is open.

    Only so many of the last tokens are decoded as have the text that decides, spaces at the end aside.
    """
    if prompt_ids is None or len(prompt_ids) == 0:
        return None
    for count in (16 << doubled for doubled in itertools.count()):
        end = tokenizer.decode([int(i) for i in prompt_ids[-count:]], skip_special_tokens=False)
        text = end.rstrip()
        if len(text) >= len("<think>") or count >= len(prompt_ids):
            return end[len(text) :] if text.endswith("<think>") else None


def end_of_answers(tokenizer: Any, model_path: str, eos: int | None = None) -> tuple[int, set[int], str | None]:
    """The id that ends a demonstration, the ids at which rollouts stop, and what is wrong where it is none of those.

    Rollouts stop at the tokenizer's EOS and at the ids of the model's own generation config. eos: `hpt.demo.eos`, None
    for the tokenizer's. Raises `UserError` where there is no id to end with.
    """
    own = tokenizer.eos_token_id
    if own is None and eos is None:
        raise UserError("the tokenizer has no EOS token; set hpt.demo.eos (`data`: --eos) to the id of an answer's end")
    eos, stops = own if eos is None else eos, stop_ids(model_path) | ({own} - {None})
    named = f"demonstrations would end with token {eos} (hpt.demo.eos), but generation stops at {sorted(stops)}"
    return int(eos), stops, None if eos in stops else f"{named}; set it to one of these"


def stop_ids(model_path: str) -> set[int]:
    """Ids at which the model's own generation config stops; none where it says nothing. Raises `UserError`."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(model_path).eos_token_id
    except Exception as error:  # whatever transformers raises where there is none, or a damaged one
        path = Path(model_path) / "generation_config.json"
        if path.is_file():
            raise UserError(
                f"{path}: cannot be read ({type(error).__name__}); mend it: rollouts stop where it says"
            ) from None
        return set()
    return set(ids) if isinstance(ids, list) else {ids} - {None}


def finish(ids: Sequence[int], eos_id: int, max_length: int | None) -> list[int]:
    """The tokens of a cleaned text, EOS appended; raises `Unusable` for EOS in the middle, or for too many."""
    ids = [*map(int, ids), int(eos_id)]
    if eos_id in ids[:-1]:
        raise Unusable("eos_inside", f"token {ids.index(eos_id)} of {len(ids)}")
    if max_length is not None and len(ids) > max_length:
        raise Unusable("too_long", f"{len(ids)} tokens, limit {max_length}")
    return ids


def encode(demo: Any, tokenizer: Any, eos_id: int, *, prompt_ids=None, prompt_messages=None, **more) -> EncodedDemo:
    """Tokens and mask of one raw demonstration; raises `Unusable` with the reason. Arguments as of ``encode_all``."""
    one = Demo(demo)
    encode_all([(one, prompt_ids, prompt_messages)], tokenizer, eos_id, **more)
    if one.bad is not None:
        raise one.bad
    return one.encoded


def encode_all(
    asked: Sequence[tuple[Demo, Sequence[int] | None, list[dict] | None]],
    tokenizer: Any,
    eos_id: int | None,
    max_length: int | None = None,
    template_kwargs: dict | None = None,
    tokens: Callable[[list[str]], list[list[int]]] | None = None,
) -> None:
    """Give each demonstration its tokens, or the reason why it has none; without a tokenizer, its cleaned text.

    Args:
        asked: each demonstration with the rollouts' own prompt tokens (do they open a reasoning tag?) and the messages
            that the prompt was rendered from, as with ``template_kwargs`` (`tools`, `enable_thinking` …): for
            demonstrations of several turns or with tool calls.
        max_length: tokens that a response may have, EOS included. tokens: tokenises many texts; default: one by one.
    """
    ends = [] if tokenizer is None else eos_texts(tokenizer, eos_id)
    singles = []
    for demo, prompt_ids, messages in asked:
        try:
            content = plain(demo.content)
            text = single_text(content)
            if text is not None:
                tail = open_think(prompt_ids, tokenizer)
                demo.text = clean_text(text, ends, tail)
                bound_characters(demo.text, max_length)
                singles.append((demo, tail))
            elif tokenizer is not None:
                demo.encoded = _encode_turns(content, tokenizer, eos_id, max_length, messages, template_kwargs, ends)
                demo.length = len(demo.encoded.ids)
        except Unusable as bad:
            demo.bad = bad
    if tokenizer is None:
        return
    tokens = tokens or (lambda texts: [tokenizer.encode(text, add_special_tokens=False) for text in texts])
    for (demo, tail), ids in zip(singles, tokens([demo.text for demo, _ in singles]), strict=True):
        demo.length = len(ids) + 1
        try:
            ids = finish(ids, eos_id, max_length)
            demo.encoded = EncodedDemo(ids, [1] * len(ids), think_warnings(demo.text, tail))
        except Unusable as bad:
            demo.bad = bad


def think_warnings(text: str, think_tail: str | None) -> tuple[str, ...]:
    """`think_unclosed` where the prompt opens a reasoning tag and the cleaned text never closes it."""
    return ("think_unclosed",) if think_tail is not None and "</think>" not in text else ()


def bound_characters(text: str, max_length: int | None) -> None:
    """Raise `Unusable` for a text that no vocabulary could bring under the limit, without tokenising it."""
    if max_length is not None and len(text) > max_length * _CHARACTERS_A_TOKEN:
        raise Unusable("too_long", f"{len(text)} characters, limit {max_length} tokens")


def _tokens(text: str, tokenizer: Any, max_length: int | None) -> list[int]:
    bound_characters(text, max_length)
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def _encode_turns(demo, tokenizer, eos_id, max_length, prompt_messages, template_kwargs, ends) -> EncodedDemo:
    """Several turns: the whole conversation rendered once, each assistant turn found in it by the prompt before it.

    What stands before assistant turn i must be exactly what a rollout would be given there: the template's rendering of
    the messages before it with the generation prompt. Where it is not (templates that drop earlier reasoning, say), the
    tokens to train on would not be those of any rollout, and the demonstration is refused.
    """
    if prompt_messages is None:
        prompt_messages = [{"role": "user", "content": ""}]
    eos = tokenizer.convert_ids_to_tokens(int(eos_id))
    turns = [_for_template(m) for m in demo]
    for message in turns:
        message_text(message)

    def render(messages: list[dict], generation: bool) -> str:
        kwargs = {**(template_kwargs or {}), "tokenize": False, "add_generation_prompt": generation}
        try:
            return tokenizer.apply_chat_template([*prompt_messages, *messages], **kwargs)
        except Exception as error:  # templates raise whatever they like: Jinja's own errors, TypeError, KeyError
            raise Unusable("template", f"{type(error).__name__}: {error}"[:200]) from error

    whole = render(turns, False)
    at = len(render([], True))
    ids, mask = [], []
    for i, message in enumerate(turns):
        if message.get("role") != "assistant":
            continue
        before = render(turns[:i], True)
        if not whole.startswith(before):
            raise Unusable("template", f"the text before turn {i + 1} is not what a rollout is given there")
        end = whole.find(eos, len(before))
        if end < 0:
            raise Unusable("template", f"{eos!r} does not end turn {i + 1}")
        if i > 0:
            between = _tokens(whole[at : len(before)], tokenizer, max_length)
            ids, mask = ids + between, mask + [0] * len(between)
        for call in message.get("tool_calls") or []:
            if call["function"]["name"] not in whole[len(before) : end]:
                name = call["function"]["name"]
                raise Unusable("template", f"it leaves out the call of tool {name!r} in turn {i + 1}")
        said = finish(_tokens(whole[len(before) : end], tokenizer, max_length), eos_id, None)
        ids, mask = ids + said, mask + [1] * len(said)
        at = end + len(eos)
        if max_length is not None and len(ids) > max_length:
            raise Unusable("too_long", f"more than {max_length} tokens at turn {i + 1}")
    if any(end in whole[at:] for end in ends):
        raise Unusable("eos_inside", "the last turn has text after EOS")
    if len(ids) == sum(1 for t in turns if t.get("role") == "assistant"):
        raise Unusable("empty")
    return EncodedDemo(ids, mask)


def _for_template(message: dict) -> dict:
    """The message as templates want it: content never None, a tool call's arguments as a dict (stored as JSON text)."""
    message = {**message, "content": message.get("content") or ""}
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("not_text", "a tool call needs a function with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise Unusable("not_text", f"a tool call's arguments are no JSON: {arguments[:60]!r}") from None
        calls.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _kinds(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {', '.join(sorted({type(v).__name__ for v in value})) or 'nothing'}"
    return type(value).__name__
