"""What a run remembers of each question, and what follows from it: retirement, rest and the early gate.

``identity`` names a question, ``History`` keeps a record of each and its file in the checkpoint, ``Lifecycle`` applies
the rules of ``hpt.history``. A run draws tens of thousands of questions (500 steps of 128 are 64,000), so the records
are plain objects in a dict. No verl imports.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, get_type_hints

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from verl_hpt.config import Settings, gates
from verl_hpt.demos.demonstration import Demonstration, plain
from verl_hpt.errors import UserError
from verl_hpt.gate import NEVER_DRAWN, Remembered
from verl_hpt.places.starts import Start
from verl_hpt.plan import DEMO, Plan, Question

logger = logging.getLogger(__name__)
KEY = "hpt.question_key"
FILE, VERSION = "hpt_history.jsonl", 3
EARLIER_FILE = "hpt_history.npz"  # of versions 1 and 2

# --- which question it is ---------------------------------------------------------------------------------------------


def identity(row: Mapping, question_key: str | None = None, prompt_key: str = "raw_prompt") -> str:
    """A question's identity, the same at every draw: before its rollouts are sampled, after it, and in the dataset.

    It is what the column ``hpt.question_key`` says, or 16 hexadecimal digits, a hash of data source and prompt. Tokens
    take no part: another tokenizer, another chat template, or one that writes the date change nothing.

    Args:
        row: cells by column. prompt_key: the column with the prompt's chat messages, images among their parts.

    Raises:
        UserError: the column names no question.
    """
    column = prompt_key if question_key is None else question_key
    value = plain(row.get(column))
    if not names_question(value):
        column, remedy = f"{column!r} ({KEY})", f"fill it in, or drop {KEY}"
        if question_key is None:
            column, remedy = repr(prompt_key), f"set {KEY} to a column that does"
        raise UserError(f"its column {column} names no question; {remedy}")
    if question_key is not None:
        return str(value).encode(errors="backslashreplace").decode()
    source = str(plain(row.get("data_source")) or "")
    text = json.dumps([source, value], sort_keys=True, ensure_ascii=False, default=_content)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def names_question(value: Any) -> bool:
    """Whether a column's value, in plain Python, names anything."""
    return value is not None and value == value and str(value).strip() != ""


def _content(value: Any) -> list[str] | str:
    """What the identity takes of a value that JSON cannot hold: an image's mode, size and pixels, a file's bytes."""
    content = value.tobytes() if hasattr(value, "tobytes") else value
    if not isinstance(content, bytes):
        return str(value)
    return [*(str(getattr(value, name, "")) for name in ("mode", "size")), hashlib.blake2b(content).hexdigest()]


# --- what is remembered -----------------------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=0, le=2**53)]


@dataclass(slots=True)
class Record:
    """What is remembered of one question."""

    solved: Count = 0  # rollouts of the last draw that were solved
    rollouts: Count = 0  # rollouts of the last draw that came back
    drawn: Count = 0  # draws that the update saw, of which a rollout started from nothing
    failures: Count = 0  # draws in a row, the last one included, of which no rollout was solved
    uses: Count = 0  # draws at which it trained on demonstrations
    drawn_at: Count = 0  # step of the last draw
    taught_at: Count = 0  # step at which it last trained on a demonstration; 0: never
    graduated: bool = False  # trained on a demonstration and, at a later draw, on its rollouts instead, one solved
    demo_uses: list[Count] = field(default_factory=list)  # uses of each demonstration, by place

    def numbers(self) -> Remembered:
        """Those of them that are one number, by name."""
        return Remembered((name, int(getattr(self, name))) for name in NEVER_DRAWN)


FIELDS = ("key", *(one.name for one in fields(Record)))
FIRST_LINE = json.dumps({"verl_hpt_history": VERSION, "columns": FIELDS}).encode() + b"\n"
LISTINGS = {
    "graduated": lambda record: record.graduated,
    "forgotten": lambda record: 0 < record.failures < record.drawn,  # a draw before the last was solved, the last not
    "never_solved": lambda record: record.failures == record.drawn,
    "all": lambda record: True,
}


@dataclass(frozen=True, order=True)
class Draw:
    """One draw of a question, by its rollouts that started from nothing. places: those of the demonstrations that it
    trained on, in order; on_rl: whether it trained on its rollouts."""

    key: str
    solved: int
    rollouts: int
    places: tuple[int, ...]
    on_rl: bool


class OtherVersion(UserError):
    """The history was written by a verl-hpt with another form of this file."""


@dataclass
class History:
    """Records by identity, in the order in which the questions came.

    settings: see ``meaning``; tokens_saved: by the early gate since the run began.
    """

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    settings: dict[str, str | bool | float | None]
    tokens_saved: Annotated[float, Field(ge=0)]
    records: dict[str, Record] = field(default_factory=dict, init=False)

    def observe(self, step: int, draws: Iterable[Draw]) -> None:
        """Remember one step; the order of the draws leaves no trace."""
        for draw in sorted(draws):  # of a question that comes twice, the unsolved draw first
            record = self.records.setdefault(draw.key, Record())
            record.graduated |= bool(record.uses and not draw.places and draw.solved and draw.on_rl)
            record.solved, record.rollouts, record.drawn_at = draw.solved, draw.rollouts, step
            record.drawn += 1
            record.failures = 0 if draw.solved else record.failures + 1
            if draw.places:
                record.uses, record.taught_at = record.uses + 1, step
                record.demo_uses += [0] * (draw.places[-1] + 1 - len(record.demo_uses))
            for place in draw.places:
                record.demo_uses[place] += 1

    def of(self, key: str) -> Record:
        """What is remembered of a question; of an unknown one zeros."""
        return self.records.get(key) or Record()

    def totals(self) -> dict[str, int]:
        """How many questions are known, graduated, forgotten and never solved."""
        counts = {name: sum(map(rule, self.records.values())) for name, rule in LISTINGS.items() if name != "all"}
        return {"questions": len(self.records), **counts}

    def listing(self, which: str) -> dict[str, Record]:
        """The questions of one of ``LISTINGS``."""
        return {key: record for key, record in self.records.items() if LISTINGS[which](record)}

    def save(self, path: str) -> None:
        """Write lines of JSON to ``path``, whole or not at all: version, header, a question each, checksum."""
        rows = ([key, *(getattr(record, name) for name in FIELDS[1:])] for key, record in self.records.items())
        lines = ({"settings": self.settings, "tokens_saved": self.tokens_saved}, *rows)
        body = FIRST_LINE + "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        partial = f"{path}.partial"
        with open(partial, "wb") as file:
            file.write(body + checksum(body))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    @classmethod
    def read(cls, path: str) -> History:
        """The history that ``save`` wrote to a file, or into the folder of a checkpoint.

        Raises:
            UserError: no such file, or not such a file; names it. ``OtherVersion`` where that is what is wrong.
        """
        path = file_in(path) if os.path.isdir(path) else path
        try:
            with open(path, "rb") as file:
                return _parsed(file.read())
        except OSError as error:
            problem = f"no history of verl-hpt can be read from it ({type(error).__name__}: {error})"
            raise UserError(f"{path}: {problem}") from error
        except UserError as error:
            raise type(error)(f"{path}: {error}") from None


_HEADER = TypeAdapter(History)
_ROW = TypeAdapter(tuple[(str, *get_type_hints(Record, include_extras=True).values())], config=ConfigDict(strict=True))


def file_in(folder: str) -> str:
    """The file of the history in a checkpoint's folder; one of an earlier form where it has none but that."""
    path, earlier = (os.path.join(folder, name) for name in (FILE, EARLIER_FILE))
    return earlier if os.path.exists(earlier) and not os.path.exists(path) else path


def checksum(body: bytes) -> bytes:
    """The last line of a history's file."""
    return b'{"blake2b": "%s"}\n' % hashlib.blake2b(body, digest_size=16).hexdigest().encode()


def _parsed(content: bytes) -> History:
    """The history that a file's bytes hold; raises UserError for what ``save`` does not write."""
    lines = content.splitlines(keepends=True)
    version = re.match(rb'\{"verl_hpt_history": (-?\d{1,9})[,}]', content)
    written = "1 or 2" if content.startswith(b"PK") else version and int(version[1])
    if written not in (None, VERSION):
        raise OtherVersion(f"a history of version {written}; this verl-hpt reads version {VERSION}")
    if not lines or lines[0] != FIRST_LINE:
        raise UserError("no history of verl-hpt can be read from it (its first line is not a history's)")
    if len(lines) < 3 or lines[-1] != checksum(b"".join(lines[:-1])):
        raise UserError("a history that was cut off or changed (its last line is not the checksum of the others)")
    history = _checked(_HEADER, lines, 1)
    for at in range(2, len(lines) - 1):
        key, *values = _checked(_ROW, lines, at)
        record, line = Record(*values), f"a history whose line {at + 1}"
        if key in history.records:
            raise UserError(f"{line} has the key {key!r} again")
        if record.solved > record.rollouts or max(record.failures, record.uses) > record.drawn:
            raise UserError(f"{line} has more solved than rollouts, or more uses or failures than draws")
        history.records[key] = record
    return history


def _checked(kind: TypeAdapter, lines: Sequence[bytes], at: int) -> Any:
    """A line of the file, parsed and checked; raises UserError with line, field and what was got."""
    try:
        return kind.validate_json(lines[at])
    except ValidationError as error:
        first = error.errors()[0]
        place = [FIELDS[part] if kind is _ROW and i == 0 else part for i, part in enumerate(first["loc"])]
        name, problem = "".join(f" {part}" for part in place), f"{first['msg']}, got {str(first['input'])[:80]}"
        raise UserError(f"a history whose line {at + 1}{name} is not what it must be: {problem}") from None


# --- what follows from it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Past:
    """What is known of a question before a step. uses: draws at which it trained on demonstrations; cooling: these rest
    at this step; demo_uses: uses of each demonstration by place; retire_after: uses after which one is retired;
    shown_now: places of the demonstrations that an earlier draw of the same batch is shown; numbers: those of the
    question's ``Record`` by name, for a gate."""

    uses: int = 0
    cooling: bool = False
    demo_uses: Sequence[int] = ()
    retire_after: int | None = None
    shown_now: Sequence[int] = ()
    numbers: Mapping[str, float] = field(default_factory=lambda: Record().numbers())

    def after(self, places: Sequence[int]) -> Past:
        """What is known once a draw of the same batch is shown the demonstrations at these places."""
        last = max([*places, len(self.demo_uses) - 1])
        uses = [self.used(place) + (place in places) for place in range(last + 1)]
        return replace(self, uses=self.uses + 1, demo_uses=uses, shown_now=[*self.shown_now, *places])

    def used(self, place: int) -> int:
        return self.demo_uses[place] if place < len(self.demo_uses) else 0

    def retired(self, place: int) -> bool:
        return self.retire_after is not None and self.used(place) >= self.retire_after


UNKNOWN = Past()


def meaning(settings: Settings) -> dict[str, Any]:
    """The settings that say what a history's questions and numbers are: by what a question is named, and what counts as
    solved under each gate."""
    names = ("success", "finished", "metric")
    solved = {f"{place}.{name}": getattr(gate, name) for place, gate in gates(settings).items() for name in names}
    return {KEY: settings.question_key, **solved}


class Lifecycle:
    """The history of a run, and the rules of ``hpt.history``."""

    def __init__(self, settings: Settings, rollouts: int, start: Start | None = None):
        self.settings, self.history, self.start = settings, History(meaning(settings), 0.0), start
        gate = settings.history.early_gate
        if gate is not None and gate.rollouts >= rollouts:
            raise UserError(
                f"hpt.history.early_gate.rollouts={gate.rollouts} spares nothing: actor_rollout_ref.rollout.n is "
                f"{rollouts}"
            )

    @property
    def matters(self) -> list[str]:
        """Settings whose effect depends on the history."""
        rules, select = self.settings.history, self.settings.demo.select
        names = {f"hpt.history.{name}": getattr(rules, name) for name in ("retire_after", "cooldown", "early_gate")}
        names[f"hpt.demo.select={select}"] = select in ("round_robin", "unseen_first")
        names["hpt.start.after_failures"] = self.start is not None and self.start.after_failures
        return [name for name, on in names.items() if on]

    def skipped_rollouts(self, keys: Sequence[str], rollouts: Sequence[int]) -> list[int] | None:
        """How many of its rollouts the early gate leaves out of each question that is about to be sampled; None
        without it. (questions,) each."""
        gate = self.settings.history.early_gate
        if gate is None:
            return None
        often = (self.history.of(key).failures >= gate.after_failures for key in keys)
        return [max(n - gate.rollouts, 0) if failed else 0 for failed, n in zip(often, rollouts, strict=True)]

    def past(self, groups: Sequence, step: int) -> list[Past]:
        """What is known of a batch's questions before this step; (groups,)"""
        rules = self.settings.history
        # Several updates share a step where weights are synced less often: without a cool-down nothing rests in it.
        return [
            Past(
                uses=record.uses,
                cooling=rules.cooldown > 0 and record.taught_at > 0 and step - record.taught_at <= rules.cooldown,
                demo_uses=tuple(record.demo_uses),
                retire_after=rules.retire_after,
                numbers=record.numbers(),
            )
            for record in (self.history.of(group.key) for group in groups)
        ]

    def remember(
        self,
        step: int,
        groups: Sequence,
        questions: Sequence[Question],
        demos: Sequence[Sequence[Demonstration]],
        plan: Plan,
        counts: Counter,
    ) -> dict[str, float]:
        """Take in what a step did; the metrics ``hpt/history/*``.

        Args:
            demos: those that each question is shown, as the plan's rows index them.
        """
        places: list[list[int]] = [[] for _ in questions]
        for row in np.flatnonzero((plan.kind == DEMO) & (plan.question < len(questions))):
            places[plan.question[row]].append(demos[plan.question[row]][plan.index[row]].index)
        started_from_nothing = [question.started_at == 0 for question in questions]
        draws = [
            Draw(group.key, int(solved[plain_].sum()), int(plain_.sum()), tuple(sorted(shown)), bool(decision.on > 0))
            for group, solved, plain_, shown, decision in zip(
                groups, plan.solved, started_from_nothing, places, plan.decisions, strict=True
            )
            if plain_.any() or not len(plain_)  # rollouts that all started from a demonstration say nothing
        ]
        self.history.observe(step, draws)
        skipped = np.array([question.skipped_rollouts for question in questions], dtype=int)
        lengths = np.array([question.lengths.mean() if len(question.lengths) else 0.0 for question in questions])
        saved = float(np.dot(skipped, lengths))  # a rollout more of a question is taken to be as long as those it has
        self.history.tokens_saved += saved
        return {
            **{f"hpt/history/{name}": float(n) for name, n in self.history.totals().items()},
            **{f"hpt/history/{name}": float(counts[f"history/{name}"]) for name in ("retired", "cooling")},
            "hpt/history/early_gated": float((skipped > 0).sum()),
            "hpt/history/tokens_sampled": float(sum(question.lengths.sum() for question in questions)),
            "hpt/history/tokens_saved": saved,
            "hpt/history/tokens_saved_total": self.history.tokens_saved,
        }

    def save(self, folder: str) -> None:
        """Write the history into a checkpoint's folder."""
        self.history.save(os.path.join(folder, FILE))

    def load(self, folder: str) -> None:
        """Take the history from a checkpoint's folder.

        Raises:
            UserError: it cannot be read; or it has none, one of another version, or one whose questions cannot be
                found again, although settings depend on it.
        """
        path, now = file_in(folder), self.history.settings
        if not os.path.exists(path):
            missing = f"the checkpoint has no history of its questions ({path} does not exist)"
            return self._start_empty(missing, "Resume from a checkpoint that has it")
        try:
            found = History.read(path)
        except OtherVersion as error:
            return self._start_empty(str(error), "Resume with the verl-hpt that wrote it")
        except UserError as error:
            raise UserError(f"{error}. Resume from another checkpoint, or delete this file") from None
        changes = {}
        for name in dict.fromkeys([*now, *found.settings]):  # a data source without a gate of its own has the general
            general = f"hpt.gate.{name.rpartition('.')[2]}"
            old, new = (settings.get(name, settings.get(general)) for settings in (found.settings, now))
            if old != new:
                changes[name] = f"{path}: {name} was {json.dumps(old)}, is {json.dumps(new)} now"
        if KEY in changes:
            lost = f"{changes[KEY]}, so its questions cannot be found again"
            return self._start_empty(lost, "Set the old value back")
        for change in changes.values():
            logger.warning("%s; what it counts as solved till here is the old gate's", change)
        found.settings, self.history = now, found

    def _start_empty(self, why: str, remedy: str) -> None:
        """Warn and begin without a history; raise where settings depend on it and the user has not said so."""
        if self.matters and self.settings.history.on_missing == "error":
            raise UserError(
                f"{why}, and {', '.join(self.matters)} would act as if no question had been drawn before. {remedy}, or "
                "set hpt.history.on_missing=empty"
            )
        logger.warning("%s; it starts empty", why)
