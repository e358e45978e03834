"""What a run remembers of every question: how often it was drawn, solved, taught, and when. NumPy only.

Ten million questions must fit beside a trainer, and a step's questions must be found in a moment, so a question is a
row of a few short columns and its identity a 64-bit number in a hash index; nothing here is a Python object a question.
What is done with the numbers stands in ``verl_hpt.lifecycle``, how they are kept in ``verl_hpt.history_file``.

Identities: ``number(key)`` of the plan's key (a hash of data source and prompt tokens, or the user's
``hpt.question_key``). A second index leads from the prompt as the dataset has it (``prompt_number``) to the same row:
before a question's rollouts are sampled its tokens are not known yet.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_hpt import history_file
from verl_hpt.errors import UserError
from verl_hpt.history_file import COLUMNS

SOLVED, TAUGHT, GRADUATED, FORGOTTEN = 1, 2, 4, 8
LISTINGS = ("graduated", "forgotten", "hopeless", "all")
_MOST = {name: np.iinfo(kind).max for name, kind in COLUMNS.items()}
_MOST_USES = np.iinfo(np.uint16).max  # of one demonstration
_GROWTH = 1.25  # of a full column: a quarter at most lies idle
_FULL = 0.7  # share of the index's table that may be taken
_HEX = re.compile(r"[0-9a-f]{16}")


def number(key: str) -> int:
    """A key as 64 bits: sixteen hexadecimal digits are the number that they write, any other text is hashed."""
    if _HEX.fullmatch(key):
        return int(key, 16)
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def numbers(keys: Sequence[str]) -> np.ndarray:
    """``number`` of each key. -> (keys,) uint64"""
    return np.fromiter((number(key) for key in keys), dtype=np.uint64, count=len(keys))


def prompt_number(source: str, messages: Any) -> int:
    """A prompt as the dataset has it (chat messages in plain Python) and its data source, as 64 bits."""
    text = json.dumps([source, messages], sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _mix(x: np.ndarray) -> np.ndarray:
    """Spread 64-bit numbers evenly (the finaliser of splitmix64), so that nearby ones do not cluster in a table."""
    x = x.astype(np.uint64, copy=True)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _grown(array: np.ndarray, used: int, wanted: int) -> np.ndarray:
    """The array with room for ``wanted`` entries, zeros after the first ``used``."""
    if wanted <= len(array):
        return array
    larger = np.zeros(max(wanted, int(len(array) * _GROWTH), 1024), dtype=array.dtype)
    larger[:used] = array[:used]
    return larger


class Index:
    """Numbers 0, 1, 2 … for 64-bit keys in the order in which they came: a hash table with linear probing.

    Look-ups and insertions take arrays of keys and go round by round over those that are not settled.
    """

    def __init__(self, keys: np.ndarray | None = None):
        self._keys, self._used = np.zeros(0, dtype=np.uint64), 0
        self._table = np.full(1024, -1, dtype=np.int32)
        if keys is not None and len(keys):
            self.add(np.asarray(keys, dtype=np.uint64))

    def __len__(self) -> int:
        return self._used

    @property
    def keys(self) -> np.ndarray:
        return self._keys[: self._used]

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._table.nbytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(keys,) -> (keys,) number of each, −1 where it is unknown."""
        found, mask = np.full(len(keys), -1, dtype=np.int64), np.uint64(len(self._table) - 1)
        open_, at = np.arange(len(keys)), _mix(keys) & mask
        while len(open_):
            there = self._table[at].astype(np.int64)
            hit = there >= 0
            hit[hit] = self._keys[there[hit]] == keys[open_[hit]]
            found[open_[hit]] = there[hit]
            going = (there >= 0) & ~hit
            open_, at = open_[going], (at[going] + np.uint64(1)) & mask
        return found

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Take in keys that are unknown and differ from each other; their numbers. (keys,) -> (keys,)"""
        new = np.arange(self._used, self._used + len(keys))
        self._keys = _grown(self._keys, self._used, self._used + len(keys))
        self._keys[new] = keys
        self._used += len(keys)
        if self._used > _FULL * len(self._table):
            size = len(self._table)
            while self._used > _FULL * size:
                size *= 2
            self._table = np.full(size, -1, dtype=np.int32)
            for start in range(0, self._used, 1 << 20):  # in parts: the work space stays small
                self._place(np.arange(start, min(start + (1 << 20), self._used)))
        else:
            self._place(new)
        return new

    def _place(self, entries: np.ndarray) -> None:
        mask = np.uint64(len(self._table) - 1)
        at = _mix(self._keys[entries]) & mask
        while len(entries):
            free = self._table[at] < 0
            self._table[at[free]] = entries[free]  # of several that want one place the last stays
            going = self._table[at] != entries
            entries, at = entries[going], (at[going] + np.uint64(1)) & mask


@dataclass(frozen=True)
class Draw:
    """What one step did with its questions; arrays of shape (questions,).

    keys, prompts: ``number`` and ``prompt_number`` (prompts 0: not known); solved, rollouts: counts; taught: trained on
    a demonstration; on_rl: trained on its rollouts.
    """

    keys: np.ndarray
    prompts: np.ndarray
    solved: np.ndarray
    rollouts: np.ndarray
    taught: np.ndarray
    on_rl: np.ndarray


class History:
    """Columns by question, see ``COLUMNS``; ``uses`` of single demonstrations where a question has several.

    A question is *graduated* once it trained on a demonstration and, at a later draw, on its rollouts instead, one of
    them solved; it is *forgotten* while a draw before the last was solved and the last was not; *hopeless* while no
    draw was solved.
    """

    def __init__(self):
        self._index, self._prompts, self._demos = Index(), Index(), Index()
        self._rows = {name: np.zeros(0, dtype=kind) for name, kind in COLUMNS.items()}
        self._prompt_rows = np.zeros(0, dtype=np.int32)
        self._demo_uses = np.zeros(0, dtype=np.uint16)
        self.tokens_saved = 0.0  # by the early gate since the run began
        self.depends: dict[str, dict] = {"identity": {}, "flags": {}}  # see ``lifecycle.depends``

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        arrays = (*self._rows.values(), self._prompt_rows, self._demo_uses, self._index, self._prompts, self._demos)
        return sum(array.nbytes for array in arrays)

    def column(self, name: str) -> np.ndarray:
        """(all questions,) one of ``COLUMNS``, in the order in which the questions came."""
        return self._rows[name][: len(self)]

    def look_up(self, keys: np.ndarray, *names: str) -> tuple[np.ndarray, ...]:
        """Columns of some questions, 0 where one is unknown. (keys,) -> a (keys,) array a name"""
        return self._read(self._index.find(keys), names)

    def look_up_prompts(self, prompts: np.ndarray, *names: str) -> tuple[np.ndarray, ...]:
        """As ``look_up``, by prompt."""
        at = self._prompts.find(prompts)
        known = at >= 0
        at[known] = self._prompt_rows[at[known]]
        return self._read(at, names)

    def _read(self, rows: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, ...]:
        known, out = rows >= 0, []
        for name in names:
            values = np.zeros(len(rows), dtype=np.int64)
            values[known] = self._rows[name][rows[known]]
            out.append(values)
        return tuple(out)

    def observe(self, step: int, draw: Draw) -> None:
        """Remember one step. The result does not depend on the order of the questions, nor do the rows' places."""
        order = np.lexsort((draw.on_rl, draw.taught, draw.rollouts, draw.solved, draw.keys))
        keys = draw.keys[order]
        first = np.append(True, keys[1:] != keys[:-1]) if len(keys) else np.zeros(0, bool)
        rows = self._index.find(keys)
        new = first & (rows < 0)
        self._index.add(keys[new])
        for name in COLUMNS:
            self._rows[name] = _grown(self._rows[name], len(self) - int(new.sum()), len(self))
        rows = self._index.find(keys)
        self._link(draw.prompts[order], rows)
        place = np.arange(len(keys))
        nth = place - np.maximum.accumulate(np.where(first, place, 0))
        for turn in range(int(nth.max(initial=-1)) + 1):  # a question twice in a batch: one draw, then the other
            here = nth == turn
            self._draw_once(step, rows[here], order[here], draw)

    def _draw_once(self, step: int, rows: np.ndarray, which: np.ndarray, draw: Draw) -> None:
        columns = self._rows
        taught, now = draw.taught[which].astype(bool), draw.solved[which] > 0
        flags = columns["flags"][rows]
        before = (flags & SOLVED) > 0
        graduates = ((flags & TAUGHT) > 0) & ~taught & now & draw.on_rl[which].astype(bool)
        flags = flags & ~np.uint8(FORGOTTEN)
        for flag, where in ((FORGOTTEN, before & ~now), (SOLVED, now), (TAUGHT, taught), (GRADUATED, graduates)):
            flags[where] |= np.uint8(flag)
        columns["flags"][rows] = flags
        for name, values, which_rows in (
            ("failures", np.where(now, 0, columns["failures"][rows].astype(np.int64) + 1), rows),
            ("solved", draw.solved[which], rows),
            ("rollouts", draw.rollouts[which], rows),
            ("drawn", columns["drawn"][rows].astype(np.int64) + 1, rows),
            ("uses", columns["uses"][rows].astype(np.int64) + taught, rows),
            ("drawn_at", step, rows),
            ("taught_at", step, rows[taught]),
        ):
            columns[name][which_rows] = np.minimum(values, _MOST[name])

    def _link(self, prompts: np.ndarray, rows: np.ndarray) -> None:
        """Let each prompt lead to the row of its latest draw; to the first by key where a batch has several.

        A run resumed under other identities draws its questions into new rows, and the old rows go stale.
        """
        prompts, first = np.unique(prompts, return_index=True)
        rows = rows[first[prompts != 0]]
        prompts = prompts[prompts != 0]
        at = self._prompts.find(prompts)
        new = at < 0
        at[new] = self._prompts.add(prompts[new])
        self._prompt_rows = _grown(self._prompt_rows, len(self._prompts) - int(new.sum()), len(self._prompts))
        self._prompt_rows[at] = rows

    # --- single demonstrations -----------------------------------------------------------------------------------

    def observe_demos(self, keys: np.ndarray, places: np.ndarray) -> None:
        """Count a use of demonstration ``places[i]`` of question ``keys[i]``."""
        pairs, uses = np.unique(_pairs(keys, places), return_counts=True)
        at = self._demos.find(pairs)
        unknown = at < 0
        at[unknown] = self._demos.add(pairs[unknown])
        self._demo_uses = _grown(self._demo_uses, len(self._demos) - int(unknown.sum()), len(self._demos))
        self._demo_uses[at] = np.minimum(self._demo_uses[at].astype(np.int64) + uses, _MOST_USES)

    def demo_uses(self, keys: np.ndarray, counts: np.ndarray) -> list[list[int]]:
        """How often each of a question's ``counts[i]`` demonstrations was used; one list a question."""
        whose = np.repeat(np.arange(len(keys)), counts)
        ends = np.cumsum(counts)
        places = np.arange(len(whose)) - np.repeat(ends - counts, counts)
        at = self._demos.find(_pairs(keys[whose], places))
        uses = np.zeros(len(whose), dtype=np.int64)
        uses[at >= 0] = self._demo_uses[at[at >= 0]]
        return [part.tolist() for part in np.split(uses, ends[:-1])] if len(keys) else []

    # --- for people and for checkpoints --------------------------------------------------------------------------

    def totals(self) -> dict[str, int]:
        """How many questions are known, graduated, forgotten and hopeless."""
        flags = self.column("flags")
        return {"questions": len(self)} | {
            name: int(np.count_nonzero(_is(flags, name))) for name in LISTINGS if name != "all"
        }

    def listing(self, which: str) -> dict[str, np.ndarray]:
        """The questions that are graduated, forgotten, hopeless, or all of them: columns, and ``key`` as uint64.

        Raises:
            UserError: another word.
        """
        if which not in LISTINGS:
            raise UserError(f"{which!r}: choose one of {', '.join(LISTINGS)}")
        here = np.flatnonzero(_is(self.column("flags"), which))
        return {"key": self._index.keys[here]} | {name: self.column(name)[here] for name in COLUMNS if name != "flags"}

    def keys_of_prompts(self, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which prompts are known, and their questions' keys. (prompts,) -> (prompts,) bool, (prompts,) uint64"""
        at = self._prompts.find(prompts)
        known, keys = at >= 0, np.zeros(len(prompts), dtype=np.uint64)
        keys[known] = self._index.keys[self._prompt_rows[at[known]]]
        return known, keys

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything, as arrays without idle room."""
        return {
            "version": np.array(history_file.VERSION, dtype=np.int64),
            "tokens_saved": np.array(self.tokens_saved, dtype=np.float64),
            "depends": np.array(json.dumps(self.depends)),
            "keys": self._index.keys,
            "prompts": self._prompts.keys,
            "prompt_rows": self._prompt_rows[: len(self._prompts)],
            "demos": self._demos.keys,
            "demo_uses": self._demo_uses[: len(self._demos)],
        } | {name: self.column(name) for name in COLUMNS}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Become what ``state_dict`` gave.

        Raises:
            UserError: not what it gave, see ``history_file.check``.
        """
        history_file.check(state)
        self._index, self._prompts, self._demos = (Index(state[name]) for name in ("keys", "prompts", "demos"))
        self._rows = {name: state[name].copy() for name in COLUMNS}
        self._prompt_rows, self._demo_uses = state["prompt_rows"].copy(), state["demo_uses"].copy()
        self.tokens_saved, self.depends = float(state["tokens_saved"]), history_file.description(state["depends"])

    def save(self, path: str) -> None:
        """Write to ``path`` whole or not at all."""
        history_file.write(path, self.state_dict())

    @classmethod
    def read(cls, path: str) -> History:
        """The history that ``save`` wrote.

        Raises:
            UserError: no such file, or not such a file; names it. ``OtherVersion`` where that is what is wrong.
        """
        history, arrays = cls(), history_file.read(path)
        try:
            history.load_state_dict(arrays)
        except UserError as error:
            raise type(error)(f"{path}: {error}") from None
        return history


def _pairs(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    return keys ^ _mix(np.asarray(places, dtype=np.uint64) + np.uint64(1))


def _is(flags: np.ndarray, which: str) -> np.ndarray:
    if which == "all":
        return np.ones(len(flags), dtype=bool)
    if which == "hopeless":
        return (flags & SOLVED) == 0
    return (flags & {"graduated": GRADUATED, "forgotten": FORGOTTEN}[which]) > 0
