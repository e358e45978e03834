"""One row in the form that verl reads, from any of the forms that datasets come in.

verl's row: `data_source`, `prompt` (chat messages), `ability`, `reward_model` {style, ground_truth}, `extra_info`
{index, split}; and ours: `target`, the demonstrations. A row that cannot be brought to that form raises `BadRow`, which
names the field.
"""

import re
from dataclasses import dataclass
from typing import Any

from verl_hpt.data_read import BadRow
from verl_hpt.demos import demonstrations, plain, stable_hash
from verl_hpt.reward import last_boxed, unboxed

PROMPT_KEYS = ("prompt", "question", "problem", "query", "instruction", "input")
DEMO_KEYS = ("target", "demonstrations", "demonstration", "response", "solution", "completion", "output", "generations")
TRUTH_KEYS = ("reward_model.ground_truth", "ground_truth", "expected_answer", "final_answer", "answer")
CHAT_KEYS = ("messages", "conversations")
FORMATS = ("luffy", "messages", "gsm8k", "qa", "plain", "questions")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_MARKS = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True)
class Layout:
    """Which field holds what; `format` is a name in `FORMATS`. A None key means: not there."""

    format: str
    prompt: str | None
    demo: str | None
    truth: str | None


@dataclass(frozen=True)
class Options:
    """What the user asked of the conversion; see `verl-hpt data convert --help`."""

    data_source: str | None = None
    system: str | None = None
    drop_system: bool = False
    suffix: str = ""
    strip_calculator: bool = False
    ability: str = "math"
    keep: tuple[str, ...] = ()


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
            raise BadRow(file, 1, key, f"no such field ({option}); the row has {_names(row)}")
    chat = next((k for k in CHAT_KEYS if isinstance(row.get(k), list)), None)
    if prompt is None and chat is not None and "prompt" not in row:
        return Layout("messages", chat, demo, truth or _first(row, TRUTH_KEYS))
    prompt = prompt or _first(row, PROMPT_KEYS)
    if prompt is None:
        known = ", ".join((*PROMPT_KEYS, *CHAT_KEYS))
        raise BadRow(
            file, 1, "prompt", f"no question found; known names: {known}; the row has {_names(row)}: --prompt-key"
        )
    named, demo = demo is not None, demo or _first(row, [k for k in DEMO_KEYS if k != prompt])
    if demo is None and truth is None and isinstance(row.get("answer"), str) and "####" in row["answer"]:
        return Layout("gsm8k", prompt, "answer", "answer")
    truth = truth or _first(row, [k for k in TRUTH_KEYS if k not in (prompt, demo)])
    if demo is None:
        return Layout("questions", prompt, None, truth)
    if isinstance(row.get("reward_model"), dict) and not named:
        return Layout("luffy", prompt, demo, truth)
    return Layout("qa" if truth else "plain", prompt, demo, truth)


def _first(row: dict, keys) -> str | None:
    return next((k for k in keys if field(row, k) is not None), None) or next(
        (k for k in keys if "." not in k and k in row), None
    )


def _names(row: dict) -> str:
    return ", ".join(f"`{k}`" for k in row) or "no fields"


def to_verl(
    file: str, number: int, row: dict, layout: Layout, options: Options, split: str = "train"
) -> dict[str, Any]:
    """The row in verl's form; `extra_info.index` is left to the writer. Raises `BadRow`."""
    prompt, demos = _prompt_and_demos(file, number, row, layout)
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
    source = options.data_source or plain(row.get("data_source")) or fallback
    ability = row.get("ability") if isinstance(row.get("ability"), str) else options.ability
    kept = {}
    for name in options.keep:
        if name not in row:
            raise BadRow(file, number, name, f"no such field (--keep); the row has {_names(row)}")
        kept[name] = plain(row[name])
    return {
        "data_source": str(source),
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 0, "split": split, "file": file.replace("\\", "/").split("/")[-1], "row": number},
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
        demo = messages[asked + 1 :]
        own = demonstrations(field(row, layout.demo)) if layout.demo else []
        return messages[: asked + 1], own or ([demo] if demo else [])
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(file, number, layout.prompt, "is empty")
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
            raise BadRow(file, number, layout.truth, "has no `#### answer` at its end")
        return answer.splitlines()[0].strip()
    if layout.truth is not None:
        value = plain(field(row, layout.truth))
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
            shown = "missing or null" if value is None else f"{value!r}"[:80]
            raise BadRow(file, number, layout.truth, f"must be the expected answer as text or a number, got {shown}")
        text = unboxed(str(value)) or str(value).strip()
        if not text:
            raise BadRow(file, number, layout.truth, "is empty")
        _encodable(file, number, layout.truth, text)
        return text
    for demo in demos:
        text = demo if isinstance(demo, str) else demo[-1]["content"] if demo else ""
        answer = text.rpartition("####")[2].strip() if "####" in text else last_boxed(text)
        if answer and answer.strip():
            return answer.strip().splitlines()[0].strip()
    where = layout.demo or layout.prompt
    problem = (
        "no expected answer: neither `####` nor \\boxed{} at the end of the demonstration; name its field: --answer-key"
    )
    raise BadRow(file, number, where, problem)


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
