"""One row in the form that verl reads, from any of the forms that datasets come in.

verl's row: `data_source`, `prompt` (chat messages), `ability`, `reward_model` {style, ground_truth}, `extra_info`
{index, split}; and ours: `target`, the demonstrations. A row that cannot be brought to that form raises `BadRow`, which
names the field.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from verl_hpt.data.keep import OURS, carried
from verl_hpt.data.read import BadRow, unwrap_hint
from verl_hpt.demos.encode import demonstrations, plain, stable_hash
from verl_hpt.reward import last_boxed, unboxed

PROMPT_KEYS = ("prompt", "question", "problem", "query", "instruction", "input")
DEMO_KEYS = ("target", "demonstrations", "demonstration", "response", "solution", "completion", "output", "generations")
DEMO_KEYS += ("solutions", "responses", "completions", "outputs", "answers")
TRUTH_KEYS = ("reward_model.ground_truth", "ground_truth", "expected_answer", "final_answer", "answer")
CHAT_KEYS = ("messages", "conversations")
FORMATS = ("luffy", "messages", "gsm8k", "qa", "plain", "questions")
_MESSAGE_KEYS = {"role", "content", "from", "value", "name", "tool_calls", "tool_call_id", "reasoning_content"}
_NEEDED = "the reward needs one: --answer-key names its field, `data convert --skip-bad` leaves such rows out"
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_MARKS = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True)
class Layout:
    """Which field holds what; `format` is a name in `FORMATS`. A None key means: not there.

    `context` is Alpaca's `input`, which belongs to the question; `system` holds the system message of all messages.
    """

    format: str
    prompt: str | None
    demo: str | None
    truth: str | None
    context: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Options:
    """What the user asked of the conversion; see `verl-hpt data convert --help`."""

    data_source: str | None = None
    system: str | None = None
    drop_system: bool = False
    suffix: str = ""
    strip_calculator: bool = False
    ability: str | None = None
    keep: dict[str, Any] | None = None  # name → Arrow type, see `data_keep.parse_keep`
    seen: set[str] = dataclass_field(default_factory=set)  # names to keep that a row had


def field(row: dict, path: str | None) -> Any:
    """The value at `a` or `a.b`, None where a part is missing."""
    for part in (path or "").split("."):
        if not isinstance(row, dict) or part not in row:
            return None
        row = row[part]
    return row


def detect(
    file: str, row: dict, prompt: str | None = None, demo: str | None = None, truth: str | None = None
) -> Layout:
    """The layout of a file by its first row; keys that the user named are taken as they are, and must be there."""
    for option, key in (("--prompt-key", prompt), ("--demo-key", demo), ("--answer-key", truth)):
        if key is not None and key.split(".")[0] not in row:
            raise BadRow(file, 1, key, f"no such field ({option}); the row has {_names(row)}{_wrapped(file, row)}")
    chat = next((k for k in (_present(row, key) for key in CHAT_KEYS) if isinstance(row.get(k), list)), None)
    if prompt is None and chat is not None and _present(row, "prompt") is None:
        system = _present(row, "system") or "system"  # the first row may lack it
        return Layout("messages", chat, demo, truth or _first(row, TRUTH_KEYS), system=system)
    prompt = prompt or _first(row, PROMPT_KEYS)
    if prompt is None:
        known = ", ".join((*PROMPT_KEYS, *CHAT_KEYS))
        problem = f"no question found; known names: {known}; the row has {_names(row)}: --prompt-key"
        raise BadRow(file, 1, "prompt", problem + _wrapped(file, row))
    named = demo is not None
    if demo is None:
        answers = _present(row, "answers")  # a list of them is of demonstrations, unless it was named as the truth
        taken = (prompt, answers if answers == truth or not isinstance(row.get(answers), list) else None)
        demo = _first(row, DEMO_KEYS, taken)
    answer = _present(row, "answer")
    if demo is None and truth is None and isinstance(row.get(answer), str) and "####" in row[answer]:
        return Layout("gsm8k", prompt, answer, answer)
    truth = truth or _first(row, TRUTH_KEYS, (prompt, demo))
    context = None
    if prompt.lower() == "instruction":
        context = _present(row, "input") or "input"  # the first row may lack it
        context = None if context in (demo, truth) else context
    if demo is None:
        return Layout("questions", prompt, None, truth, context)
    if isinstance(row.get("reward_model"), dict) and not named:
        return Layout("luffy", prompt, demo, truth, context)
    return Layout("qa" if truth else "plain", prompt, demo, truth, context)


def _present(row: dict, key: str) -> str | None:
    """The row's name for a known field: the same, else the same in other letter case."""
    if key in row:
        return key
    return next((name for name in row if name.lower() == key), None)


def _first(row: dict, keys, taken=()) -> str | None:
    there = [k if "." in k else _present(row, k) for k in keys]
    there = [k for k in there if k is not None and k not in taken]
    return next((k for k in there if field(row, k) is not None), None) or next((k for k in there if k in row), None)


def _wrapped(file: str, row: dict) -> str:
    keys = [k for k, v in row.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v[:100])]
    return unwrap_hint(file, keys[0]) if keys else ""


def _names(row: dict) -> str:
    return ", ".join(f"`{k}`" for k in row) or "no fields"


def to_verl(
    file: str, number: int, row: dict, layout: Layout, options: Options, split: str | None = "train"
) -> dict[str, Any]:
    """The row in verl's form; `extra_info.index`, and a split of None, are left to who writes it. Raises `BadRow`."""
    prompt, demos = _prompt_and_demos(file, number, row, layout)
    if not any(m["content"].strip() for m in prompt if m["role"] != "system"):
        raise BadRow(file, number, layout.prompt, "asks nothing: no text but the system's")
    if options.drop_system or options.system is not None:
        prompt = [m for m in prompt if m["role"] != "system"]
    if options.system is not None:
        prompt = [{"role": "system", "content": options.system}, *prompt]
    if options.suffix:
        prompt = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + options.suffix}]
    truth = _truth(file, number, row, layout, demos)
    if options.strip_calculator:
        demos = [_without_marks(d) for d in demos]
    # The four-hash answer is GSM8K's own form, and its name is what chooses the grader for it.
    fallback = (
        "openai/gsm8k" if layout.format == "gsm8k" else re.sub(r"\..*$", "", file.replace("\\", "/").split("/")[-1])
    )
    source = options.data_source or plain(row.get("data_source"))
    if source is not None and (isinstance(source, bool) or not isinstance(source, str | int)):
        raise BadRow(file, number, "data_source", f"must be text, got {type(source).__name__}")
    ability = options.ability or (row["ability"] if isinstance(row.get("ability"), str) else "math")
    kept, info, reward_model = carried(file, number, row, options.keep or {}, options.seen)
    style = field(row, "reward_model.style")
    ours = {"index": None, "split": split, "file": file.replace("\\", "/").split("/")[-1], "row": number}
    return {
        "data_source": str(source or fallback),
        "prompt": prompt,
        "ability": ability,
        "reward_model": {
            "style": style if style and isinstance(style, str) else "rule",
            "ground_truth": truth,
            **reward_model,
        },
        "extra_info": {**ours, **info},
        "target": demos,
        **kept,
    }


def _prompt_and_demos(file: str, number: int, row: dict, layout: Layout) -> tuple[list[dict], list[Any]]:
    value = plain(field(row, layout.prompt))
    if layout.format == "messages":
        messages = _messages(file, number, layout.prompt, value)
        asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        if asked < 0:
            raise BadRow(file, number, layout.prompt, "no message of the user")
        system = row.get(layout.system)
        if isinstance(system, str) and system.strip() and all(m["role"] != "system" for m in messages[: asked + 1]):
            _encodable(file, number, layout.system, system)
            messages, asked = [{"role": "system", "content": system}, *messages], asked + 1
        demo = messages[asked + 1 :]
        own = demonstrations(field(row, layout.demo)) if layout.demo else []
        own = [_demo(file, number, layout.demo, d) for d in own]
        return messages[: asked + 1], own or ([demo] if demo else [])
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(file, number, layout.prompt, "is empty")
        value += _context(file, number, row, layout)
        _encodable(file, number, layout.prompt, value)
        prompt = [{"role": "user", "content": value}]
    else:
        prompt = _messages(file, number, layout.prompt, value)
        if prompt[-1]["role"] == "assistant":
            raise BadRow(
                file, number, layout.prompt, "ends with the assistant's message: that belongs to the demonstration"
            )
        if not any(m["role"] == "user" for m in prompt):
            raise BadRow(file, number, layout.prompt, "no message of the user")
    if layout.demo is None:
        return prompt, []
    if layout.demo.split(".")[0] not in row:
        raise BadRow(file, number, layout.demo, f"missing; earlier rows had it, this one has {_names(row)}")
    return prompt, [_demo(file, number, layout.demo, d) for d in demonstrations(field(row, layout.demo))]


def _context(file: str, number: int, row: dict, layout: Layout) -> str:
    value = row.get(layout.context)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    if not isinstance(value, str):
        raise BadRow(file, number, layout.context, f"must be text, got {type(value).__name__}")
    return f"\n\n{value}"


def _messages(file: str, number: int, key: str, value: Any) -> list[dict]:
    if value is None:
        raise BadRow(file, number, key, "is missing or null")
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        got = type(value).__name__ if not isinstance(value, list) else "a list without messages"
        raise BadRow(file, number, key, f"must be text or a list of chat messages, got {got}")
    messages = []
    for i, message in enumerate(value):
        if "from" in message and "role" not in message:
            role = message["from"]
            message = {"role": _SHAREGPT_ROLES.get(role, role), "content": message.get("value")}
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise BadRow(file, number, f"{key}[{i}].role", f"must be text, got {role!r}"[:200])
        if not _are_calls(message.get("tool_calls")):
            problem = "must be a list of calls, each with a function and its name"
            raise BadRow(file, number, f"{key}[{i}].tool_calls", problem)
        if content is None and message.get("tool_calls"):
            content = ""
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(p["text"] for p in content)
        if not isinstance(content, str):
            raise BadRow(file, number, f"{key}[{i}].content", f"must be text, got {type(content).__name__}")
        _encodable(file, number, f"{key}[{i}].content", content)
        extras = {k: message[k] for k in ("name", "tool_calls", "tool_call_id", "reasoning_content") if k in message}
        messages.append({"role": role, "content": content, **extras})
    return messages


def _are_calls(calls: Any) -> bool:
    if not isinstance(calls, list):
        return calls is None
    functions = [c.get("function", c) if isinstance(c, dict) else None for c in calls]
    return all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions)


def _demo(file: str, number: int, key: str, demo: Any) -> Any:
    if demo is None or isinstance(demo, str):
        _encodable(file, number, key, demo or "")
        return demo
    if isinstance(demo, list) and demo and all(isinstance(m, dict) for m in demo):
        return _messages(file, number, key, [{"role": "assistant", **m} if "from" not in m else m for m in demo])
    kind = "a list in a list" if isinstance(demo, list) else type(demo).__name__
    raise BadRow(file, number, key, f"a demonstration must be text or chat messages, got {kind}")


def _encodable(file: str, number: int, key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(file, number, key, f"character {error.start} is half of a surrogate pair") from None


def _truth(file: str, number: int, row: dict, layout: Layout, demos: list) -> str:
    """The expected answer: the field's, or what the field or the demonstration has after `####` or in its last box."""
    if layout.format == "gsm8k":
        text = row.get(layout.truth)
        answer = text.rpartition("####")[2].strip() if isinstance(text, str) and "####" in text else ""
        if not answer:
            raise BadRow(file, number, layout.truth, f"has no `#### answer` at its end; {_NEEDED}")
        return answer.splitlines()[0].strip()
    if layout.truth is not None:
        value = plain(field(row, layout.truth))
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        finite = not isinstance(value, float) or abs(value) < float("inf")
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not finite:
            shown = "missing or null" if value is None else f"{value!r}"[:80]
            problem = f"must be the expected answer as text or a number, got {shown}; {_NEEDED}"
            raise BadRow(file, number, layout.truth, problem)
        text = unboxed(str(value)) or str(value).strip()
        if not text:
            raise BadRow(file, number, layout.truth, f"is empty, where the expected answer should be; {_NEEDED}")
        _encodable(file, number, layout.truth, text)
        return text
    for demo in demos:
        text = demo if isinstance(demo, str) else demo[-1]["content"] if demo else ""
        answer = text.rpartition("####")[2].strip() if "####" in text else last_boxed(text)
        if answer and answer.strip():
            return answer.strip().splitlines()[0].strip()
    problem = "no expected answer"
    if layout.demo or layout.format == "messages":
        problem += ", neither in a field nor, after `####` or in \\boxed{}, at the end of a demonstration"
    raise BadRow(file, number, layout.demo or layout.prompt, f"{problem}; {_NEEDED}")


def opened(row: dict, keys: set[str]) -> tuple[dict, list[str]]:
    """The row with chats (and a reward_model) that stand in it as JSON text parsed, and the names of those fields."""
    found = {}
    for name, value in row.items():
        if not isinstance(value, str | list) or not (name in keys or name.lower() in keys):
            continue
        asks = name.lower() in (*PROMPT_KEYS, *CHAT_KEYS)
        new = _chat(value, asks)
        if name == "reward_model":
            new = _loaded(value)
            new = new if isinstance(new, dict) and "ground_truth" in new else None
        elif isinstance(value, list) and any(_chat(v, asks) for v in value):
            new = [_chat(v, asks) or v for v in value]
            new = [m for v in new for m in (v if isinstance(v, list) else [v])] if asks else new
        if new is not None:
            found[name] = new
    return ({**row, **found}, list(found)) if found else (row, [])


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
    if all(isinstance(v, list) for v in value):  # several demonstrations
        return all(_is_chat(v, asks) for v in value)
    wanted = ({"role", "content"}, {"from", "value"}, *(() if asks else ({"content"},)))
    return all(isinstance(m, dict) and any(w <= m.keys() for w in wanted) for m in value)


def used_fields(layout: Layout, keep: dict[str, Any]) -> set[str]:
    """Names of a file's fields, `a.b` for nested ones, that a conversion reads or carries over."""
    used = {".".join(key.split(".")[:2]) for key in (layout.prompt, layout.demo, layout.truth, layout.context) if key}
    return used | {"data_source", "reward_model.style", *keep, *(f"extra_info.{key}" for key in OURS["extra_info"])}


def not_carried(row: dict, made: dict, layout: Layout, options: Options, used: set[str]) -> Iterator[str]:
    """Names of what a row has and its converted form lacks; `a.b` for nested fields, `a[].b` for those of messages."""
    partly = {name.partition(".")[0] for name in used if "." in name}
    for name, value in row.items():
        if value is None or (isinstance(value, str | list | dict) and not value):
            continue
        unsaid = options.drop_system or options.system is not None
        if name == layout.system and (unsaid or {"role": "system", "content": value} in made["prompt"]):
            continue
        if name == "ability" and isinstance(value, str):
            continue
        if name in used:
            chats = value if isinstance(value, list) and name in (layout.prompt, layout.demo) else []
            for message in (m for chat in chats for m in (chat if isinstance(chat, list) else [chat])):
                if isinstance(message, dict) and not message.keys() <= _MESSAGE_KEYS:
                    lost = (k for k, v in message.items() if k not in _MESSAGE_KEYS and v is not None)
                    yield from (f"{name}[].{k}" for k in lost)
        elif name in partly and isinstance(value, dict):
            yield from (f"{name}.{k}" for k, v in value.items() if v is not None and f"{name}.{k}" not in used)
            if name == "reward_model" and (value.get("style") or "rule") != made[name]["style"]:
                yield "reward_model.style"
        else:
            yield name


def _without_marks(demo: Any) -> Any:
    if isinstance(demo, str):
        return _MARKS.sub("", demo)
    return [{**m, "content": _MARKS.sub("", m["content"])} for m in demo] if isinstance(demo, list) else demo


def as_messages(demo: Any) -> list[dict] | None:
    """A demonstration as chat messages, None as None."""
    return [{"role": "assistant", "content": demo}] if isinstance(demo, str) else demo


def question_text(prompt: Any) -> str:
    """What is asked, in one line: the users' messages, letter case and spacing apart; the same in every format."""
    prompt = plain(prompt)
    if isinstance(prompt, list):
        said = [m.get("content") for m in prompt if isinstance(m, dict) and m.get("role") != "system"]
        prompt = "\n".join(str(s) for s in said)
    return " ".join(str(prompt).casefold().split())


def in_validation(prompt: Any, share: float, seed: int) -> bool:
    """Whether a question goes to validation: by its text alone, so that its duplicates go with it."""
    return stable_hash("validation", seed, question_text(prompt)) < share * 2**64
