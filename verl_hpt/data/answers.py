"""The expected answer of a row: a field's value, or what a worked text ends in."""

import json
import re
from typing import Any

from verl_hpt.data.chats import encodable
from verl_hpt.data.rows import Row
from verl_hpt.demos.demonstration import plain
from verl_hpt.reward import boxed_answer, unboxed

NEEDED = (
    "the reward needs one: --answer-key names its field, `data convert --skip-bad` leaves such rows out, "
    "`data convert --no-answer` writes an empty one (for a reward of your own)"
)
_SAID = re.compile(r"the (?:final )?answer is:\s*(\S.*?)\.?$", re.IGNORECASE)  # MetaMathQA's last line
_COMMAS = re.compile(r"[^\d,(\[{]*\d{1,3}(?:,\d{3})+(?:\.\d+)?[^\d,)\]}]*")  # one number with commas, no list
_LONGEST = 100  # characters of a solution that is nothing but its answer


def as_json(value: Any) -> str:
    """An expected answer that is no text as JSON text."""
    return json.dumps(plain(value), ensure_ascii=False, default=str)


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return text.rstrip().rpartition("\n")[2].strip()


def after_hashes(text: str) -> str:
    """GSM8K's form: what follows `####` on the last line; empty where nothing does. Elsewhere it is a heading.

    It is written without the commas in its numbers: verl's own scorer takes them out of what it reads.
    """
    _, hashes, answer = last_line(text).rpartition("####")
    if not hashes or not _COMMAS.fullmatch(answer.strip()):
        return answer.strip() if hashes else ""
    return answer.strip().replace(",", "")


def final_answer(text: str) -> str:
    """What a worked text ends in: its last box, else what its last line has behind `####` or `The answer is:`."""
    boxed = (boxed_answer(text) or "").strip()  # boxes side by side are one answer, as the grader has it
    if boxed:
        return boxed
    said = _SAID.search(last_line(text))
    return after_hashes(text) or (said[1].strip() if said else "")


def is_worked(text: Any) -> bool:
    """Whether a text is a solution that ends in its answer, and not the answer itself."""
    return isinstance(text, str) and final_answer(text) not in ("", unboxed(text), text.strip())


def from_field(row: Row, key: str) -> Any:
    """The expected answer that a field holds; raises `BadRow` where it holds none."""
    value = plain(row.get(key))
    of_verl = key.startswith("reward_model.")  # in the form that the run's own reward function reads
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    several = isinstance(value, list) and all(isinstance(v, str) for v in value)
    if value and (several or (of_verl and isinstance(value, dict | list))):  # several answers of which any will do
        return value
    finite = not isinstance(value, float) or abs(value) < float("inf")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not finite:
        shown = "missing or null" if value is None else f"{value!r}"[:80]
        raise row.bad(key, f"must be the expected answer as text or a number, got {shown}; {NEEDED}")
    text = unboxed(str(value)) or str(value).strip()
    if not text:
        raise row.bad(key, f"is empty, where the expected answer should be; {NEEDED}")
    if not of_verl and is_worked(text):
        text = final_answer(text)
    return encodable(row, key, text)


def from_solution(row: Row, key: str) -> str:
    """What a worked solution beside the demonstrations ends in, or all of it where it is short; else empty."""
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        return ""
    answer = final_answer(text) or (unboxed(text) if len(text) <= _LONGEST and "\n" not in text.strip() else "")
    return encodable(row, key, answer)


def from_demonstrations(row: Row, key: str, demos: list, where: str) -> str:
    """What the first demonstration that ends in an answer ends in; raises `BadRow` where none does."""
    for demo in demos:
        text = demo if isinstance(demo, str) else demo[-1]["content"] if demo else ""
        if answer := final_answer(text):
            return answer
    raise row.bad(key, f"no expected answer{where}; {NEEDED}")
