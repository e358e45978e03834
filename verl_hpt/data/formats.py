"""The forms that datasets come in. Each is one entry of `FORMATS`: how its first row is recognised, how a row is read.

A row that cannot be read raises `BadRow`, which names the field. The names of fields stand in `fields`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from verl_hpt.data import answers, fields
from verl_hpt.data.chats import calls_of, encodable, messages_of, tool_call
from verl_hpt.data.fields import any_case, first
from verl_hpt.data.json_rows import is_chat, unwrap_hint
from verl_hpt.data.rows import Row
from verl_hpt.demos.demonstration import demonstrations, plain


@dataclass(frozen=True)
class Layout:
    """The fields that hold the question, the demonstrations and the expected answer; None: there is no such field.

    `context` is Alpaca's `input`, which follows the question; `before` are texts in front of it, `options` those of a
    multiple choice, `history` earlier turns; rows may lack them. `system` holds the system message of all messages,
    `label` whether the answer is a good one. `no_answer`: the expected answer may be empty. `format` is a key of
    `FORMATS`.
    """

    prompt: str | None
    demo: str | None
    truth: str | None
    context: str | None = None
    system: str | None = None
    format: str = ""
    before: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    history: str | None = None
    label: str | None = None
    solution: str | None = None  # a worked solution beside the demonstrations, which ends in the expected answer
    no_answer: bool = False

    def __str__(self) -> str:
        words = FORMATS[self.format]
        demo = f"`{self.demo}`" if self.demo else words.demo
        demo += f" where `{self.label}` is true" if self.label else ""
        by_field = self.truth is not None and "{" not in words.truth
        truth = f"`{self.truth}`" if by_field else words.truth.format(self.truth)
        if self.truth is None and self.no_answer:
            truth = "empty"
        elif self.truth is None and self.solution:
            truth = f"from `{self.solution}`, else {truth}"
        context = f" and, where it is not empty, `{self.context}`" if self.context else ""
        question = f"question `{self.prompt}`{context}"
        return f"format {self.format}: {question}, demonstrations {demo}, expected answer {truth}"


class Question(NamedTuple):
    """What a row holds: messages up to the question, raw demonstrations (text, messages or None), expected answer.

    `used` are the names of further fields that the messages have in them.
    """

    prompt: list[dict]
    demos: list[Any]
    truth: Any
    used: frozenset[str] = frozenset()


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
    truth: str = "from the demonstration (its last box, or what follows #### at its end)"


def detect(
    row: Row, prompt: str | None = None, demo: str | None = None, truth: str | None = None, no_answer: bool = False
) -> Layout:
    """The layout of a file by its first row; keys that the user named are taken as they are, and must be there."""
    chats = (key for key, value in row.values.items() if isinstance(value, list) and value)
    wrapped = [key for key in chats if all(isinstance(item, dict) for item in row.values[key][:100])]
    hint = unwrap_hint(row.file, wrapped[0]) if wrapped else ""
    for option, key in (("--prompt-key", prompt), ("--demo-key", demo), ("--answer-key", truth)):
        if key is not None and key not in row.values and key.split(".")[0] not in row.values:
            raise row.bad(key, f"no such field ({option}); the row has {row.fields()}{hint}")
    for name, form in FORMATS.items():
        layout = form.detect(row.values, Layout(prompt, demo, truth, no_answer=no_answer))
        if layout is not None:
            return replace(layout, format=name, no_answer=no_answer)
    known = ", ".join((*fields.PROMPTS, *fields.CHATS))
    raise row.bad("prompt", f"no question found; known names: {known}; the row has {row.fields()}: --prompt-key{hint}")


def read(row: Row, layout: Layout) -> Question:
    """The row's question, whatever its format; raises `BadRow`."""
    question = FORMATS[layout.format].read(row, layout)
    if not any(message["content"].strip() for message in question.prompt if message["role"] != "system"):
        raise row.bad(layout.prompt, "asks nothing: no text but the system's")
    return question._replace(demos=[None if _is_blank(demo) else demo for demo in question.demos])


def left_out(row: Row, used: frozenset[str]) -> list[str]:
    """Fields with something that the question may need and that no prompt has."""
    names = [name for name in row.values if name.lower() in fields.NEEDED and name not in used]
    return [name for name in names if row.values[name] not in (None, "", "[]", [], {})]


def by_name(values: dict, keys: Layout, *needed: str) -> Layout | None:
    """The fields under known names, where the user named no others; None without a question or a `needed` one."""
    names, prompt, demo = any_case(values), keys.prompt or first(values, fields.PROMPTS), keys.demo
    if prompt is None:
        return None
    if isinstance(values.get(prompt), dict) and is_chat(plain(values[prompt]).get("messages")):
        prompt = f"{prompt}.messages"  # OpenAI's preferences
    if demo is None:
        answers_name = names.get("answers")  # a list of them is of demonstrations, unless it was named as the truth
        listed = answers_name != keys.truth and isinstance(values.get(answers_name), list)
        demo = first(values, fields.DEMOS, (prompt, None if listed else answers_name)) or _chat_after(values, prompt)
    truth = keys.truth or fields.truth_name(values, (prompt, demo))
    if demo is None and keys.truth is None and _is_demonstration(values, truth, keys.no_answer):
        demo, truth = truth, None
    if demo is None and truth and _is_apart(values, fields.WORKED, truth):
        demo = fields.WORKED
    context = names.get("input", "input") if prompt.lower() == "instruction" else None  # the first row may lack it
    solution = first(values, fields.WORKED_TRUTHS, (prompt, demo)) if truth is None and demo else None
    layout = Layout(prompt, demo, truth, None if context in (demo, truth) else context, solution=solution)
    return replace(layout, **_beside(values, layout)) if all(getattr(layout, name) for name in needed) else None


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | int) and value in (0, 1)


def _beside(values: dict, layout: Layout) -> dict[str, Any]:
    """Where the rows have what a question needs beside its field."""
    names, taken = any_case(values), (layout.prompt, layout.demo, layout.truth)
    label = next((names[name] for name in fields.LABELS if _is_flag(values.get(names.get(name)))), None)
    if str(layout.demo).lower() not in fields.LABELLED and str(layout.prompt).lower() not in fields.CHATS:
        label = None
    return {
        "before": tuple(name for key in fields.BEFORE if (name := names.get(key, key)) not in taken),
        "options": tuple(name for key in fields.OPTIONS if (name := names.get(key, key)) not in taken),
        "history": names.get(fields.HISTORY, fields.HISTORY),
        "system": names.get("system", names.get("system_prompt", "system")),
        "label": label,
    }


def _chat_after(values: dict, prompt: str) -> str | None:
    """The chat that goes on with the prompt's messages."""
    start = plain(values.get(prompt))
    chats = (name for name in values if name.lower() in fields.CHATS and is_chat(plain(values[name])))
    starts = isinstance(start, list) and start
    return next((name for name in chats if starts and plain(values[name])[: len(start)] == start), None)


def _is_demonstration(values: dict, truth: str | None, no_answer: bool) -> bool:
    """Whether the field with the answer has a worked solution in it."""
    value = values.get(truth)
    return answers.is_worked(value) or (no_answer and isinstance(value, str) and "\n" in value.strip())


def _is_apart(values: dict, key: str, truth: str) -> bool:
    """Whether the field has a text that is more than the expected answer."""
    row = Row("", 0, values)
    text = row.get(key)
    return isinstance(text, str) and text.strip() not in ("", str(row.get(truth)).strip())


def _is_blank(demo: Any) -> bool:
    """Whether a demonstration has neither text nor calls."""
    if isinstance(demo, str):
        return not demo.strip()
    return demo is None or not any(m["content"].strip() or m.get("tool_calls") or len(m) > 2 for m in demo)


def _prompt_of(row: Row, layout: Layout) -> tuple[list[dict], set[str]]:
    """The messages that ask, and the names of the further fields that are in them."""
    value, used = plain(row.get(layout.prompt)), set()
    if not isinstance(value, str):
        prompt = messages_of(row, layout.prompt, value)
        if prompt[-1]["role"] == "assistant":
            raise row.bad(layout.prompt, "ends with the assistant's message: that belongs to the demonstration")
        if not any(message["role"] == "user" for message in prompt):
            raise row.bad(layout.prompt, "no message of the user")
        return _with_system(row, layout, prompt, used), used
    if not value.strip():
        raise row.bad(layout.prompt, "is empty")
    context = row.values.get(layout.context)
    if not isinstance(context, str | None):
        raise row.bad(layout.context, f"must be text, got {type(context).__name__}")
    question = f"{value}\n\n{context}" if context and context.strip() else value
    for name in layout.before:
        text = row.values.get(name)
        if isinstance(text, str) and text.strip():
            used.add(name)
            if text.strip() not in value:
                question = f"{text.rstrip()}{fields.BEFORE[name.lower()]}{question}"
    name, options = _options(row, layout)
    if options is not None:
        used.add(name)
        if options.listed not in value:
            question = f"{question}\n\n{options.listed}"
    prompt = [{"role": "user", "content": encodable(row, layout.prompt, question)}]
    if earlier := fields.turns(plain(row.values.get(layout.history))):
        used.add(layout.history)
        prompt = [*earlier, *prompt]
    return _with_system(row, layout, prompt, used), used


def _with_system(row: Row, layout: Layout, prompt: list[dict], used: set[str]) -> list[dict]:
    """The prompt after the system message that the row has in a field of its own, where it has none itself."""
    system = row.values.get(layout.system)
    if not isinstance(system, str) or not system.strip() or any(message["role"] == "system" for message in prompt):
        return prompt
    used.add(layout.system)
    return [{"role": "system", "content": encodable(row, layout.system, system)}, *prompt]


def _options(row: Row, layout: Layout) -> tuple[str, fields.Choices | None]:
    names = (name for name in layout.options if row.values.get(name) is not None)
    return next(((name, found) for name in names if (found := fields.choices(plain(row.values[name])))), ("", None))


def _read_fields(row: Row, layout: Layout) -> Question:
    """A question, its demonstrations and the expected answer in fields of their own."""
    prompt, used = _prompt_of(row, layout)
    if layout.demo is not None and layout.demo.split(".")[0] not in row.values:
        raise row.bad(layout.demo, f"missing; earlier rows had it, this one has {row.fields()}")
    demos = _demos(row, layout, prompt)
    truth = _truth(row, layout, demos)
    options = _options(row, layout)[1] if used and layout.truth else None
    if options is not None:
        value = plain(row.get(layout.truth))
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        truth = [fields.letter(options, v) for v in value] if isinstance(value, list) else fields.letter(options, value)
    return Question(prompt, demos, truth, frozenset(used))


def _truth(row: Row, layout: Layout, demos: list) -> Any:
    """The expected answer; raises `BadRow` where there is none, but for `no_answer`."""
    if layout.no_answer and (layout.truth is None or plain(row.get(layout.truth)) in (None, "", [], {})):
        return ""
    if layout.truth is not None:
        return answers.from_field(row, layout.truth)
    if layout.solution and (answer := answers.from_solution(row, layout.solution)):
        return answer
    has_demos = layout.demo or FORMATS[layout.format].demo != "none"
    where = ", neither in a field nor, in \\boxed{} or after `####`, at the end of a demonstration" if has_demos else ""
    return answers.from_demonstrations(row, layout.demo or layout.prompt, demos, where)


def _detect_chat(values: dict, keys: Layout) -> Layout | None:
    names = any_case(values)
    found = [names[key] for key in fields.CHATS if key in names and isinstance(values[names[key]], list)]
    chat = next((name for name in found if name.lower() in fields.CHATS[:2] or is_chat(values[name])), None)
    preferred = names.get("chosen")
    if chat is None and is_chat(values.get(preferred)) and not first(values, fields.PROMPTS):
        chat = preferred  # the question is what both answers begin with
    if chat is None or keys.prompt is not None or ("prompt" in names and not _asks_first(values, names, chat)):
        return None
    ends = plain(values[chat])
    open_end = bool(ends) and isinstance(ends[-1], dict) and (ends[-1].get("role") or ends[-1].get("from"))
    demo = first(values, fields.DEMOS, (chat,)) if open_end in ("user", "human") else None
    truth = keys.truth or fields.truth_name(values, (demo,))
    layout = Layout(chat, keys.demo or demo, truth)
    return replace(layout, **{k: v for k, v in _beside(values, layout).items() if k in ("system", "label")})


def _asks_first(values: dict, names: dict, chat: str) -> bool:
    """Whether `prompt` is only what the chat's user asks, so that the chat has it all."""
    prompt, messages = values[names["prompt"]], plain(values[chat])
    texts = (message.get("content", message.get("value")) for message in messages if isinstance(message, dict))
    return isinstance(prompt, str) and any(isinstance(t, str) and t.strip() == prompt.strip() for t in texts)


def _read_chat(row: Row, layout: Layout) -> Question:
    """A conversation: up to the user's last message it is the prompt, what follows is the demonstration."""
    messages, used = messages_of(row, layout.prompt, plain(row.get(layout.prompt))), set()
    end = 1 + max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if not end:
        raise row.bad(layout.prompt, "no message of the user")
    prompt, demo = _with_system(row, layout, messages[:end], used), messages[end:]
    asked = row.values.get("prompt")
    if isinstance(asked, str) and any(asked.strip() == message["content"].strip() for message in prompt):
        used.add("prompt")
    weights = [message.get("weight") != 0 for message in demo if message["role"] == "assistant"]
    if any(weights) and not all(weights):
        raise row.bad(layout.prompt, "some replies after the last question have weight 0; hpt imitates all or none")
    demos = _demos(row, layout, prompt)
    if not demos and all(weights) and demo and _is_good(row, layout):
        demos = [demo]
    return Question(prompt, demos, _truth(row, layout, demos), frozenset(used))


def _detect_four_hash(values: dict, keys: Layout) -> Layout | None:
    answer = any_case(values).get("answer")
    text = values.get(answer)
    if keys.truth or keys.demo or not isinstance(text, str) or not answers.after_hashes(text):
        return None
    layout = by_name(values, replace(keys, no_answer=False))
    if layout is None or layout.demo != answer or answers.final_answer(text) != answers.after_hashes(text):
        return None
    return replace(layout, truth=answer)


def _read_four_hash(row: Row, layout: Layout) -> Question:
    """GSM8K's form: one field has the worked solution and, after ####, the expected answer."""
    prompt, used = _prompt_of(row, layout)
    text = row.values.get(layout.truth)
    answer = answers.final_answer(text) if isinstance(text, str) else ""
    if not answer and not layout.no_answer:
        raise row.bad(layout.truth, f"has no `#### answer` at its end; {answers.NEEDED}")
    return Question(prompt, _demos(row, layout, prompt), answer, frozenset(used))


def _detect_luffy(values: dict, keys: Layout) -> Layout | None:
    is_verls = isinstance(values.get("reward_model"), dict) and not keys.demo
    return by_name(values, keys, "demo") if is_verls else None


def _detect_calls(values: dict, keys: Layout) -> Layout | None:
    names, prompt = any_case(values), keys.prompt or first(values, fields.PROMPTS)
    demo = keys.demo or names.get("answers")
    if prompt is None or "tools" not in names or calls_of(values.get(demo)) is None:
        return None
    return Layout(prompt, demo, keys.truth or demo, system=names.get("system", "system"))


def _read_calls(row: Row, layout: Layout) -> Question:
    """xLAM's form: the tool calls to make, which are the demonstration and, as JSON text, the expected answer."""
    prompt, used = _prompt_of(row, layout)
    calls = calls_of(row.values.get(layout.demo)) if layout.demo else []
    if calls is None:
        raise row.bad(layout.demo, "must be a list of tool calls, each with its name")
    demo = [{"role": "assistant", "content": "", "tool_calls": [tool_call(call) for call in calls]}]
    truth = row.values.get(layout.truth) if layout.truth == layout.demo else _truth(row, layout, [])
    truth = truth if isinstance(truth, str) else answers.as_json(truth)
    return Question(prompt, [demo] if calls else [], truth, frozenset(used))


def _demos(row: Row, layout: Layout, prompt: list[dict]) -> list[Any]:
    """The row's demonstrations, without the prompt where they begin with it."""
    if layout.demo is None or not _is_good(row, layout):
        return []
    return [_demo(row, layout.demo, demo, prompt) for demo in demonstrations(row.get(layout.demo))]


def _is_good(row: Row, layout: Layout) -> bool:
    value = row.values.get(layout.label)
    return not _is_flag(value) or bool(value)


def _demo(row: Row, key: str, demo: Any, prompt: list[dict]) -> Any:
    if demo is None or isinstance(demo, str):
        return demo and encodable(row, key, demo)
    if not isinstance(demo, list) or not demo or not all(isinstance(message, dict) for message in demo):
        kind = "a list in a list" if isinstance(demo, list) else type(demo).__name__
        raise row.bad(key, f"a demonstration must be text or chat messages, got {kind}")
    messages = messages_of(row, key, [m if "from" in m else {"role": "assistant", **m} for m in demo])
    start = 0
    while messages[start : start + 1] and messages[start]["role"] == "system":
        start += 1
    if messages[start:] and messages[start]["role"] != "user":
        return messages
    systems = {m["content"].strip() for m in prompt if m["role"] == "system"}
    if any(m["content"].strip() not in systems for m in messages[:start]):
        raise row.bad(
            key, "begins with a system message that the prompt has not: put it into the prompt, or leave it out"
        )
    asked = [(m["role"], m["content"].strip()) for m in prompt if m["role"] != "system"]
    after = messages[start + len(asked) :]
    if [(m["role"], m["content"].strip()) for m in messages[start : start + len(asked)]] != asked or not after:
        raise row.bad(key, "begins with the user's turn, but not with this row's question")
    return after


FORMATS: dict[str, Format] = {  # the first that recognises a row reads its file
    "messages": Format(_detect_chat, _read_chat, demo="the messages after the last question"),
    "gsm8k": Format(
        _detect_four_hash,
        _read_four_hash,
        data_source="openai/gsm8k",  # the name that chooses the grader for this form
        truth="what follows #### in `{}`",
    ),
    "calls": Format(_detect_calls, _read_calls, truth="the calls in `{}` as JSON text"),
    "luffy": Format(_detect_luffy, _read_fields),
    "qa": Format(lambda values, keys: by_name(values, keys, "demo", "truth"), _read_fields),
    "plain": Format(lambda values, keys: by_name(values, keys, "demo"), _read_fields),
    "questions": Format(by_name, _read_fields, truth="none"),
}
