"""From a demonstration's content to the tokens that are trained on.

Tokens are those that a rollout saying the same would have: the text after the generation prompt, tokenised without
special tokens, and exactly one EOS at the end. The trainer on the driver and `verl-hpt data check` use the same
functions, so that the check shows what training does.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from verl_hpt.demos.demonstration import Demonstration, Unusable, message_text, plain, single_text
from verl_hpt.errors import UserError

_CHARACTERS_A_TOKEN = 1024  # no vocabulary has longer tokens: a text above that many times the limit is not tokenised


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
    default = tokenizer.eos_token_id
    if default is None and eos is None:
        raise UserError("the tokenizer has no EOS token; set hpt.demo.eos (`data`: --eos) to the id of an answer's end")
    eos, stops = default if eos is None else eos, stop_ids(model_path) | ({default} - {None})
    problem = f"demonstrations would end with token {eos} (hpt.demo.eos), but generation stops at {sorted(stops)}"
    return int(eos), stops, None if eos in stops else f"{problem}; set it to one of these"


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


def encode(
    content: Any, tokenizer: Any, eos_id: int, *, prompt_ids=None, prompt_messages=None, **more
) -> Demonstration:
    """One raw demonstration with its tokens; raises `Unusable` with the reason. Arguments as of ``encode_all``."""
    demo = Demonstration(content)
    encode_all([(demo, prompt_ids, prompt_messages)], tokenizer, eos_id, **more)
    if demo.bad is not None:
        raise demo.bad
    return demo


def encode_all(
    demos: Sequence[tuple[Demonstration, Sequence[int] | None, list[dict] | None]],
    tokenizer: Any,
    eos_id: int | None,
    max_length: int | None = None,
    template_kwargs: dict | None = None,
    tokens: Callable[[list[str]], list[list[int]]] | None = None,
) -> None:
    """Give each demonstration its tokens, or the reason why it has none; without a tokenizer, its cleaned text.

    Args:
        demos: each with the rollouts' own prompt tokens (do they open a reasoning tag?) and the messages that the
            prompt was rendered from, as with ``template_kwargs`` (`tools`, `enable_thinking` …): for demonstrations of
            several turns or with tool calls.
        max_length: tokens that a response may have, EOS included. tokens: tokenises many texts; default: one by one.
    """
    ends = [] if tokenizer is None else eos_texts(tokenizer, eos_id)
    singles = []
    for demo, prompt_ids, messages in demos:
        try:
            content = plain(demo.content)
            text = single_text(content)
            if text is not None:
                tail = open_think(prompt_ids, tokenizer)
                demo.text = clean_text(text, ends, tail)
                demo.unclosed_think = tail is not None and "</think>" not in demo.text
                bound_characters(demo.text, max_length)
                singles.append(demo)
            elif tokenizer is not None:
                ids, mask = _encode_turns(content, tokenizer, eos_id, max_length, messages, template_kwargs, ends)
                demo.ids, demo.mask, demo.length = ids, mask, len(ids)
        except Unusable as bad:
            demo.bad = bad
    if tokenizer is None:
        return
    tokens = tokens or (lambda texts: [tokenizer.encode(text, add_special_tokens=False) for text in texts])
    for demo, ids in zip(singles, tokens([demo.text for demo in singles]), strict=True):
        demo.length = len(ids) + 1
        try:
            demo.ids = finish(ids, eos_id, max_length)
            demo.mask = [1] * len(demo.ids)
        except Unusable as bad:
            demo.bad = bad


def bound_characters(text: str, max_length: int | None) -> None:
    """Raise `Unusable` for a text that no vocabulary could bring under the limit, without tokenising it."""
    if max_length is not None and len(text) > max_length * _CHARACTERS_A_TOKEN:
        raise Unusable("too_long", f"{len(text)} characters, limit {max_length} tokens")


def _tokens(text: str, tokenizer: Any, max_length: int | None) -> list[int]:
    bound_characters(text, max_length)
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def _encode_turns(
    demo, tokenizer, eos_id, max_length, prompt_messages, template_kwargs, ends
) -> tuple[list[int], list[int]]:
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
        spoken = finish(_tokens(whole[len(before) : end], tokenizer, max_length), eos_id, None)
        ids, mask = ids + spoken, mask + [1] * len(spoken)
        at = end + len(eos)
        if max_length is not None and len(ids) > max_length:
            raise Unusable("too_long", f"more than {max_length} tokens at turn {i + 1}")
    if any(end in whole[at:] for end in ends):
        raise Unusable("eos_inside", "the last turn has text after EOS")
    if len(ids) == sum(1 for t in turns if t.get("role") == "assistant"):
        raise Unusable("empty")
    return ids, mask


def _for_template(message: dict) -> dict:
    """The message as templates want it: content never None, a tool call's arguments as a dict (stored as JSON text)."""
    message = {**message, "content": message.get("content") or ""}
    if not message.get("tool_calls"):
        return message
    if not isinstance(message["tool_calls"], list):
        raise Unusable("not_text", "tool calls must be a list")
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
