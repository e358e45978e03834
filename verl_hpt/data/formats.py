"""The forms that datasets come in. Each is one entry of `FORMATS`: how its first row is recognised, how a row is read.

A row that cannot be read raises `BadRow`, which names the field.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from verl_hpt.data.read import Row, unwrap_hint
from verl_hpt.demos.demonstration import demonstrations, plain
from verl_hpt.reward import last_boxed, unboxed

PROMPT_KEYS = ("prompt", "question", "problem", "query", "instruction", "input")
DEMO_KEYS = ("target", "demonstrations", "demonstration", "response", "solution", "completion", "output", "generations")
DEMO_KEYS += ("solutions", "responses", "completions", "outputs", "answers")
TRUTH_KEYS = ("reward_model.ground_truth", "ground_truth", "expected_answer", "final_answer", "answer")
CHAT_KEYS = ("messages", "conversations")
JSON_FIELDS = {*CHAT_KEYS, *PROMPT_KEYS, *DEMO_KEYS, "reward_model"}  # read where they hold JSON text
_NEEDED = "the reward needs one: --answer-key names its field, `data convert --skip-bad` leaves such rows out"
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


@dataclass(frozen=True)
class Layout:
    """The fields that hold the question, the demonstrations and the expected answer; None: there is no such field.

    `context` is Alpaca's `input`, which belongs to the question; `system` holds the system message of all messages.
    `format` is a key of `FORMATS`.
    """

    prompt: str | None
    demo: str | None
    truth: str | None
    context: str | None = None
    system: str | None = None
    format: str = ""

    def __str__(self) -> str:
        words = FORMATS[self.format]
        demo = f"`{self.demo}`" if self.demo else words.demo
        by_field = self.truth is not None and "{" not in words.truth
        truth = f"`{self.truth}`" if by_field else words.truth.format(self.truth)
        context = f" and, where it is not empty, `{self.context}`" if self.context else ""
        question = f"question `{self.prompt}`{context}"
        return f"format {self.format}: {question}, demonstrations {demo}, expected answer {truth}"


class Question(NamedTuple):
    """What a row holds: messages up to the question, raw demonstrations (text, messages or None), expected answer."""

    prompt: list[dict]
    demos: list[Any]
    truth: str


@dataclass(frozen=True)
class Format:
    """One form of a dataset.

    detect: from the first row and the fields that the user named (a Layout) to where everything is; None: not this form
    read: a row's question; raises `BadRow`. data_source: for rows without one, in place of the file's name.
    demo, truth: words for where they are when no field holds them; `truth` may name the field as {}.
    """

    detect: Callable[[dict, Layout], Layout | None]
    read: Callable[[Row, Layout], Question]
    data_source: str | None = None
    demo: str = "none"
    truth: str = "from the demonstration (#### or the last box)"


def detect(row: Row, prompt: str | None = None, demo: str | None = None, truth: str | None = None) -> Layout:
    """The layout of a file by its first row; keys that the user named are taken as they are, and must be there."""
    chats = (key for key, value in row.values.items() if isinstance(value, list) and value)
    wrapped = [key for key in chats if all(isinstance(item, dict) for item in row.values[key][:100])]
    hint = unwrap_hint(row.file, wrapped[0]) if wrapped else ""
    for option, key in (("--prompt-key", prompt), ("--demo-key", demo), ("--answer-key", truth)):
        if key is not None and key.split(".")[0] not in row.values:
            raise row.bad(key, f"no such field ({option}); the row has {row.fields()}{hint}")
    for name, form in FORMATS.items():
        layout = form.detect(row.values, Layout(prompt, demo, truth))
        if layout is not None:
            return replace(layout, format=name)
    known = ", ".join((*PROMPT_KEYS, *CHAT_KEYS))
    raise row.bad("prompt", f"no question found; known names: {known}; the row has {row.fields()}: --prompt-key{hint}")


def read(row: Row, layout: Layout) -> Question:
    """The row's question, whatever its format; raises `BadRow`."""
    question = FORMATS[layout.format].read(row, layout)
    if not any(message["content"].strip() for message in question.prompt if message["role"] != "system"):
        raise row.bad(layout.prompt, "asks nothing: no text but the system's")
    return question


def by_name(values: dict, keys: Layout, *needed: str) -> Layout | None:
    """The fields under known names, where the user named no others; None without a question or a `needed` one."""
    names, prompt, demo = _any_case(values), keys.prompt or _first(values, PROMPT_KEYS), keys.demo
    if prompt is None:
        return None
    if demo is None:
        answers = names.get("answers")  # a list of them is of demonstrations, unless it was named as the truth
        listed = answers != keys.truth and isinstance(values.get(answers), list)
        demo = _first(values, DEMO_KEYS, (prompt, None if listed else answers))
    truth = keys.truth or _first(values, TRUTH_KEYS, (prompt, demo))
    context = names.get("input", "input") if prompt.lower() == "instruction" else None  # the first row may lack it
    layout = Layout(prompt, demo, truth, None if context in (demo, truth) else context)
    return layout if all(getattr(layout, name) for name in needed) else None


def _any_case(values: dict) -> dict[str, str]:
    """The row's names for fields known in lower case: the same, else the first in other letter case."""
    return {**{name.lower(): name for name in reversed(values)}, **{name: name for name in values}}


def _first(values: dict, keys: tuple, taken: tuple = ()) -> str | None:
    """The first of the fields that has a value, else the first that there is."""
    names = _any_case(values)
    found = [key if "." in key else names.get(key) for key in keys]
    found = [key for key in found if key is not None and key not in taken]
    filled = (key for key in found if Row("", 0, values).get(key) is not None)
    return next(filled, None) or next((key for key in found if key in values), None)


def _prompt_and_demos(row: Row, layout: Layout) -> tuple[list[dict], list[Any]]:
    value = plain(row.get(layout.prompt))
    if isinstance(value, str):
        if not value.strip():
            raise row.bad(layout.prompt, "is empty")
        context = row.values.get(layout.context)
        if not isinstance(context, str | None):
            raise row.bad(layout.context, f"must be text, got {type(context).__name__}")
        value += f"\n\n{context}" if context and context.strip() else ""
        prompt = [{"role": "user", "content": encodable(row, layout.prompt, value)}]
    else:
        prompt = _messages(row, layout.prompt, value)
        if prompt[-1]["role"] == "assistant":
            raise row.bad(layout.prompt, "ends with the assistant's message: that belongs to the demonstration")
        if not any(message["role"] == "user" for message in prompt):
            raise row.bad(layout.prompt, "no message of the user")
    if layout.demo is not None and layout.demo.split(".")[0] not in row.values:
        raise row.bad(layout.demo, f"missing; earlier rows had it, this one has {row.fields()}")
    return prompt, _demos(row, layout)


def _read_fields(row: Row, layout: Layout) -> Question:
    """A question, its demonstrations and the expected answer in fields of their own."""
    prompt, demos = _prompt_and_demos(row, layout)
    return Question(prompt, demos, _expected_answer(row, layout, demos))


def _detect_chat(values: dict, keys: Layout) -> Layout | None:
    names = _any_case(values)
    chat = next((names[key] for key in CHAT_KEYS if key in names and isinstance(values[names[key]], list)), None)
    if chat is None or keys.prompt is not None or "prompt" in names:
        return None
    truth = keys.truth or _first(values, TRUTH_KEYS)
    return Layout(chat, keys.demo, truth, system=names.get("system", "system"))  # the first row may lack it


def _read_chat(row: Row, layout: Layout) -> Question:
    """A conversation: up to the user's last message it is the prompt, what follows is the demonstration."""
    messages = _messages(row, layout.prompt, plain(row.get(layout.prompt)))
    end = 1 + max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if not end:
        raise row.bad(layout.prompt, "no message of the user")
    prompt, demo = messages[:end], messages[end:]
    system = row.values.get(layout.system)
    if isinstance(system, str) and system.strip() and all(message["role"] != "system" for message in prompt):
        prompt = [{"role": "system", "content": encodable(row, layout.system, system)}, *prompt]
    demos = _demos(row, layout) or ([demo] if demo else [])
    return Question(prompt, demos, _expected_answer(row, layout, demos))


def _detect_four_hash(values: dict, keys: Layout) -> Layout | None:
    layout, answer = by_name(values, keys), _any_case(values).get("answer")
    text = values.get(answer)
    if layout is None or layout.demo or keys.truth or not isinstance(text, str) or "####" not in text:
        return None
    return Layout(layout.prompt, answer, answer)


def _detect_luffy(values: dict, keys: Layout) -> Layout | None:
    is_verls = isinstance(values.get("reward_model"), dict) and not keys.demo
    return by_name(values, keys, "demo") if is_verls else None


def _read_four_hash(row: Row, layout: Layout) -> Question:
    """GSM8K's form: one field has the worked solution and, after ####, the expected answer."""
    prompt, demos = _prompt_and_demos(row, layout)
    text = row.values.get(layout.truth)
    answer = _after_hashes(text) if isinstance(text, str) else ""
    if not answer:
        raise row.bad(layout.truth, f"has no `#### answer` at its end; {_NEEDED}")
    return Question(prompt, demos, answer)


def _after_hashes(text: str) -> str:
    """The line behind the last `####`, without the commas in its numbers: verl's scorer takes them out of answers."""
    line = (text.rpartition("####")[2].strip().splitlines() or [""])[0] if "####" in text else ""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", line.strip())


def _demos(row: Row, layout: Layout) -> list[Any]:
    return [_demo(row, layout.demo, demo) for demo in demonstrations(row.get(layout.demo))] if layout.demo else []


def _demo(row: Row, key: str, demo: Any) -> Any:
    if demo is None or isinstance(demo, str):
        return demo and encodable(row, key, demo)
    if isinstance(demo, list) and demo and all(isinstance(message, dict) for message in demo):
        return _messages(row, key, [m if "from" in m else {"role": "assistant", **m} for m in demo])
    kind = "a list in a list" if isinstance(demo, list) else type(demo).__name__
    raise row.bad(key, f"a demonstration must be text or chat messages, got {kind}")


def _messages(row: Row, key: str, value: Any) -> list[dict]:
    """Chat messages with role, content as text, and all further keys of theirs."""
    if value is None:
        raise row.bad(key, "is missing or null")
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        got = type(value).__name__ if not isinstance(value, list) else "a list without messages"
        raise row.bad(key, f"must be text or a list of chat messages, got {got}")
    messages = []
    for i, message in enumerate(value):
        if "from" in message and "role" not in message:
            role = message["from"]
            further = {k: v for k, v in message.items() if k not in ("from", "value")}
            message = {**further, "role": _SHAREGPT_ROLES.get(role, role), "content": message.get("value")}
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if not isinstance(role, str) or not role:
            raise row.bad(f"{key}[{i}].role", f"must be text, got {role!r}"[:200])
        if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
            raise row.bad(f"{key}[{i}].tool_calls", "must be a list of calls, each with a function and its name")
        if content is None and calls:
            content = ""
        if isinstance(content, list) and all(map(_is_text_part, content)):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise row.bad(f"{key}[{i}].content", f"must be text, got {type(content).__name__}")
        further = {k: v for k, v in message.items() if k not in ("role", "content", "tool_calls")}
        calls = {} if calls is None else {"tool_calls": [_call(call) for call in calls]}
        messages.append({"role": role, "content": encodable(row, f"{key}[{i}].content", content), **further, **calls})
    return messages


def _is_text_part(part: Any) -> bool:
    """Whether joining the texts of such parts loses nothing."""
    return isinstance(part, dict) and isinstance(part.get("text"), str) and part.keys() <= {"type", "text"}


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _call(call: dict) -> dict:
    """A tool call with its arguments as JSON text, the one form that every row can share."""
    function = call.get("function") or {key: call[key] for key in ("name", "arguments") if key in call}
    around = {key: value for key, value in call.items() if key not in (function if "function" not in call else ())}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False, default=str)
    return {**around, "type": call.get("type") or "function", "function": {**function, "arguments": arguments}}


def encodable(row: Row, key: str | None, text: str) -> str:
    """The text; raises `BadRow` where UTF-8 cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise row.bad(key, f"character {error.start} is half of a surrogate pair") from None
    return text


def _expected_answer(row: Row, layout: Layout, demos: list) -> str:
    """The expected answer: the field's, or what the field or the demonstration has after `####` or in its last box."""
    if layout.truth is not None:
        value = plain(row.get(layout.truth))
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        finite = not isinstance(value, float) or abs(value) < float("inf")
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not finite:
            shown = "missing or null" if value is None else f"{value!r}"[:80]
            raise row.bad(layout.truth, f"must be the expected answer as text or a number, got {shown}; {_NEEDED}")
        text = unboxed(str(value)) or str(value).strip()
        if not text:
            raise row.bad(layout.truth, f"is empty, where the expected answer should be; {_NEEDED}")
        return encodable(row, layout.truth, text)
    for demo in demos:
        text = demo if isinstance(demo, str) else demo[-1]["content"] if demo else ""
        answer = _after_hashes(text) if "####" in text else (last_boxed(text) or "").strip()
        if answer:
            return answer
    problem = "no expected answer"
    if layout.demo or FORMATS[layout.format].demo != "none":
        problem += ", neither in a field nor, after `####` or in \\boxed{}, at the end of a demonstration"
    raise row.bad(layout.demo or layout.prompt, f"{problem}; {_NEEDED}")


FORMATS: dict[str, Format] = {  # the first that recognises a row reads its file
    "messages": Format(_detect_chat, _read_chat, demo="the messages after the last question"),
    "gsm8k": Format(
        _detect_four_hash,
        _read_four_hash,
        data_source="openai/gsm8k",  # the name that chooses the grader for this form
        truth="what follows #### in `{}`",
    ),
    "luffy": Format(_detect_luffy, _read_fields),
    "qa": Format(lambda values, keys: by_name(values, keys, "demo", "truth"), _read_fields),
    "plain": Format(lambda values, keys: by_name(values, keys, "demo"), _read_fields),
    "questions": Format(by_name, _read_fields, truth="none"),
}


def opened(values: dict, keys: set[str]) -> tuple[dict, list[str]]:
    """The row with chats (and a reward_model) that stand in it as JSON text parsed, and the names of those fields."""
    known = [name for name in values if name in keys or name.lower() in keys]
    parsed = {name: new for name in known if (new := _parsed(name.lower(), values[name])) is not None}
    return {**values, **parsed}, list(parsed)


def _parsed(name: str, value: Any) -> Any:
    """The chat (or the reward_model) that a text, or the texts of a list, hold as JSON; None where they hold none."""
    asks = name in (*PROMPT_KEYS, *CHAT_KEYS)
    if name == "reward_model":
        new = _loaded(value)
        return new if isinstance(new, dict) and "ground_truth" in new else None
    if not isinstance(value, list):
        return _chat(value, asks)
    new = [_chat(item, asks) or item for item in value]
    if all(before is after for before, after in zip(value, new, strict=True)):
        return None
    return [m for item in new for m in (item if isinstance(item, list) else [item])] if asks else new


def _loaded(text: Any) -> Any:
    """What a text that may be JSON of a list or an object holds, else None."""
    if not isinstance(text, str) or text[:64].lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _chat(text: Any, asks: bool) -> list | None:
    """The chat, or the list of them, that a text holds as JSON, else None."""
    value = _loaded(text)
    value = [value] if isinstance(value, dict) else value
    return value if _is_chat(value, asks) else None


def _is_chat(value: Any, asks: bool) -> bool:
    """Whether these are messages; in a question they need roles, where it could be JSON that is asked about."""
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(item, list) for item in value):  # several demonstrations
        return all(_is_chat(item, asks) for item in value)
    wanted = ({"role", "content"}, {"from", "value"}, *(() if asks else ({"content"},)))
    return all(isinstance(m, dict) and any(keys <= m.keys() for keys in wanted) for m in value)
