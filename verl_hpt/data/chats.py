"""Chat messages of many forms, and those that stand in a row as JSON text, to role, content and what else they have."""

import functools
import json
from typing import Any

from verl_hpt.data.fields import CHATS, PROMPTS
from verl_hpt.data.rows import Row
from verl_hpt.demos.demonstration import plain

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


def messages_of(row: Row, key: str, value: Any) -> list[dict]:
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
        if calls is None and content is None and _is_call(message.get("function_call")):  # OpenAI's older form
            calls = [message["function_call"]]
            message = {k: v for k, v in message.items() if k != "function_call"}
        if not isinstance(role, str) or not role:
            raise row.bad(f"{key}[{i}].role", f"must be text, got {role!r}"[:200])
        if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
            raise row.bad(f"{key}[{i}].tool_calls", "must be a list of calls, each with a function and its name")
        if content is None and calls:
            content = ""
        if isinstance(content, list) and all(map(_is_text_part, content)):
            content = "".join(part["text"] if "text" in part else part["value"] for part in content)
        if not isinstance(content, str):
            raise row.bad(f"{key}[{i}].content", f"must be text, got {type(content).__name__}")
        further = {k: v for k, v in message.items() if k not in ("role", "content", "tool_calls")}
        calls = {} if calls is None else {"tool_calls": [tool_call(call) for call in calls]}
        messages.append({"role": role, "content": encodable(row, f"{key}[{i}].content", content), **further, **calls})
    return messages


def _is_text_part(part: Any) -> bool:
    """Whether joining the texts of such parts loses nothing."""
    if not isinstance(part, dict) or part.get("type", "text") not in ("text", "input_text", "output_text"):
        return False
    texts = [value for key, value in part.items() if key != "type"]
    return len(texts) == 1 and part.keys() <= {"type", "text", "value"} and isinstance(texts[0], str)


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def calls_of(value: Any) -> list[dict] | None:
    """The tool calls that a list, or JSON text of one, holds; None: it holds something else."""
    calls = value if isinstance(value, list) else _loaded(value)
    return plain(calls) if isinstance(calls, list) and all(map(_is_call, calls)) else None


def tool_call(call: dict) -> dict:
    """A tool call with its arguments as JSON text, the one form that every row can share."""
    function = call.get("function") or {key: call[key] for key in ("name", "arguments") if key in call}
    around = {key: value for key, value in call.items() if key not in (function if "function" not in call else ())}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False, default=str)
    return {**around, "type": call.get("type") or "function", "function": {**function, "arguments": arguments}}


def encodable(row: Row, key: str | None, text: str) -> str:
    """The text; raises `BadRow` where UTF-8 cannot hold it."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise row.bad(key, f"character {error.start} is half of a surrogate pair") from None
    return text


def opened(values: dict, keys: set[str]) -> tuple[dict, list[str]]:
    """The row with chats (and a reward_model) that stand in it as JSON text parsed, and the names of those fields."""
    known = _named(tuple(values), frozenset(keys))
    parsed = {name: new for name in known if (new := _parsed(name.lower(), values[name])) is not None}
    return ({**values, **parsed} if parsed else values), list(parsed)


@functools.lru_cache(maxsize=256)
def _named(names: tuple[str, ...], keys: frozenset[str]) -> tuple[str, ...]:
    """Those of a row's names that are known; the same for nearly all rows of a file."""
    return tuple(name for name in names if name in keys or name.lower() in keys)


def _parsed(name: str, value: Any) -> Any:
    """The chat (or the reward_model) that a text, or the texts of a list, hold as JSON; None where they hold none."""
    asks = name in (*PROMPTS, *CHATS)
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
