"""What is wrong with rows as questions: not verl's form, asked twice, asked in validation too."""

import itertools
import os
from dataclasses import replace
from typing import Any

from verl_hpt.data.chats import encodable, opened
from verl_hpt.data.formats import Layout, detect, read
from verl_hpt.data.read import read_rows
from verl_hpt.data.report import Result
from verl_hpt.data.rows import Row
from verl_hpt.demos.demonstration import plain
from verl_hpt.demos.select import stable_hash


def question_text(prompt: Any) -> str:
    """What is asked, in one line: the users' messages, letter case and spacing apart; the same in every format."""
    prompt = plain(prompt)
    if isinstance(prompt, list):
        texts = [m.get("content") for m in prompt if isinstance(m, dict) and m.get("role") != "system"]
        prompt = "\n".join(map(str, texts))
    return " ".join(str(prompt).casefold().split())


def check_form(row: Row, prompt_key: str, needs_answer: bool = True) -> list[dict]:
    """The prompt; raises `BadRow` for a row that is not what verl's dataset and reward loop read.

    needs_answer: the reward compares with an expected answer, so an empty one is of no use.
    """
    prompt, values = plain(row.values.get(prompt_key)), row.values
    if not isinstance(prompt, list) or not prompt:
        raise row.bad(
            prompt_key, f"must be a list of chat messages, got {type(prompt).__name__ if prompt else 'nothing'}"
        )
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise row.bad(f"{prompt_key}[{i}].role", "every message needs a role")
        if not isinstance(message.get("content"), str):
            kind = type(message.get("content")).__name__
            raise row.bad(f"{prompt_key}[{i}].content", f"must be text, got {kind}")
        encodable(row, f"{prompt_key}[{i}].content", message["content"])
    if prompt[-1]["role"] == "assistant":
        raise row.bad(prompt_key, "ends with the assistant's message, before which the rollout should start")
    if not any(message["content"].strip() for message in prompt if message["role"] != "system"):
        raise row.bad(prompt_key, "asks nothing: no text but the system's")
    for name, kind, what in (
        ("data_source", str, "must be text"),
        ("reward_model", dict, "must hold style and ground_truth"),
        ("extra_info", dict | None, "must be a struct"),
    ):
        value = values.get(name)
        if not isinstance(value, kind) or value == "":
            raise row.bad(name, f"{what}, got {type(value).__name__}")
    truth = plain(values["reward_model"].get("ground_truth"))
    if truth is None or truth != truth or (needs_answer and isinstance(truth, str | list) and not truth):
        problem = f"the expected answer is missing, got {truth!r}"
        raise row.bad("reward_model.ground_truth", f"{problem}: a reward of your own (--reward PATH) may do without")
    if isinstance(truth, str):
        encodable(row, "reward_model.ground_truth", truth)
    return prompt


class Questions:
    """The questions of the checked file, by their text without what all prompts of a file begin and end with.

    A file whose prompts all end in "put your answer in a box" asks the same as one whose prompts do not.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[int, str]] = {}  # hash of the text without its frame → (row, expected answer)
        self.whole: dict[int, int] = {}  # hash of the whole text → row
        self.frame: tuple[str, str] | None = None

    def check(self, result: Result, batch: list[Row]) -> None:
        """Count the batch's duplicates, and duplicates that expect another answer."""
        texts = [question_text(row.values["prompt"]) for row in batch]
        if self.frame is None:
            self.frame = shared_frame(texts)
        for row, text in zip(batch, texts, strict=True):
            key = stable_hash(unframed(text, self.frame))
            truth = str(plain(row.get("reward_model.ground_truth"))).strip()
            self.whole.setdefault(stable_hash(text), row.number)
            first, expected = self.known.setdefault(key, (row.number, truth))
            if first == row.number:
                continue
            result.found("duplicate", row.number, "prompt", f"same question as row {first}")
            if truth != expected:
                detail = f"expects {truth[:60]!r}, row {first} expects {expected[:60]!r}"
                result.found("contradiction", row.number, "reward_model.ground_truth", detail)

    def check_leak(self, result: Result, path: str, prompt_key: str) -> None:
        """Count questions of a validation file that are in the checked file too, whatever the form of either."""
        layout, frame, rows = None, None, read_rows(path)
        while batch := list(itertools.islice(rows, 1000)):
            if layout is None:
                is_chat = isinstance(plain(batch[0].values.get(prompt_key)), list)
                known = Layout(prompt_key, None, None, format="questions") if is_chat else detect(batch[0])
                layout = replace(known, demo=None, truth=None, label=None, no_answer=True)
            texts = []
            for row in batch:
                row = row._replace(values=opened(row.values, {layout.prompt})[0])
                texts.append(question_text(read(row, layout).prompt))
            frame = frame or shared_frame(texts)
            for row, text in zip(batch, texts, strict=True):
                if (trained := self._row_of(text, frame)) is not None:
                    result.found("leak", trained, "prompt", f"row {row.number} of {path} asks the same")

    def _row_of(self, text: str, frame: tuple[str, str]) -> int | None:
        """The row that asks the same, with or without what all prompts of either file begin and end with."""
        keys = [stable_hash(form) for form in (text, unframed(text, frame), unframed(text, self.frame or ("", "")))]
        rows = (self.whole.get(key) or self.known.get(key, (None,))[0] for key in keys)
        return next(filter(None, rows), None)


def shared_frame(texts: list[str]) -> tuple[str, str]:
    """What all of the texts begin and end with, cut at spaces; nothing where there are too few to tell."""
    if len(set(texts)) < 5:
        return "", ""
    common = os.path.commonprefix  # of characters
    start, end = common(texts), common([text[::-1] for text in texts])[::-1]
    start, end = start[: start.rfind(" ") + 1], end[end.find(" ") :] if " " in end else ""
    return (start, end) if len(start) + len(end) < min(map(len, texts)) else ("", "")


def unframed(text: str, frame: tuple[str, str]) -> str:
    """The text without the frame, where it has it."""
    return text.removeprefix(frame[0]).removesuffix(frame[1])
