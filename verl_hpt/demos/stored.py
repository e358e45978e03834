"""Demonstrations that stand beside a batch's questions: a stream of a file's rows, and a buffer of collected ones.

Both keep what the next step depends on in plain values, for the checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from verl_hpt.demos.select import stable_hash
from verl_hpt.errors import UserError

UNUSABLE = "no row has a usable demonstration; `verl-hpt data check` says why"


@dataclass
class Entry:
    """A demonstration with its prompt, as tokens.

    Attributes:
        key, source: its question's identity and data source.
        prompt, ids, mask: tokens of the prompt, of the answer, and which of these learn.
        reward: what it counts as. values: of ``demonstration.COLUMNS``, by name.
        old_log_probs: log π_old of each token of the answer, where a rollout of the policy's own is stored.
        step: when it was collected.
    """

    key: str
    source: str
    prompt: list[int]
    ids: list[int]
    mask: list[int]
    reward: float
    values: dict[str, Any] = field(default_factory=dict)
    old_log_probs: list[float] | None = None
    step: int = 0

    @property
    def learns(self) -> int:
        return sum(self.mask)

    def state(self) -> dict[str, Any]:
        """Plain values, from which ``Entry(**state)`` is made again."""
        values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self.values.items()}
        return {**asdict(self), "values": values}


def entry_of(state: Any) -> Entry:
    """The entry that ``state`` gave; raises ValueError where it is none."""
    if not isinstance(state, dict) or state.keys() != {one.name for one in fields(Entry)}:
        raise ValueError("an entry of the buffer lacks a field, or has one more")
    entry = Entry(**state)
    tokens = len(entry.ids) if isinstance(entry.ids, list) else 0
    fits = {
        "key": isinstance(entry.key, str),
        "source": isinstance(entry.source, str),
        "prompt": _listed(entry.prompt, int),
        "ids": _listed(entry.ids, int),
        "mask": _listed(entry.mask, int, tokens) and set(entry.mask) <= {0, 1} and any(entry.mask),
        "reward": _listed([entry.reward], float),
        "values": isinstance(entry.values, dict),
        "old_log_probs": entry.old_log_probs is None or _listed(entry.old_log_probs, float, tokens),
        "step": _listed([entry.step], int),
    }
    wrong = [name for name, right in fits.items() if not right]
    if wrong:
        raise ValueError(f"an entry of the buffer has wrong values in {', '.join(wrong)}")
    return entry


def _listed(values: Any, kind: type, count: int | None = None) -> bool:
    """Whether it is a list of so many finite numbers, at least one; whole ones (kind int) are not negative."""
    if not isinstance(values, list) or not values or len(values) != (count or len(values)):
        return False
    if not set(map(type, values)) <= {int, kind}:  # a bool is no number here
        return False
    return all(0 <= v < 2**63 if kind is int else abs(v) <= sys.float_info.max for v in values)


class Buffer:
    """Entries that wait, the newest first, one a question. size: of an optimizer step."""

    def __init__(self, size: int):
        self.size, self.entries = size, []

    def collect(self, entries: Sequence[Entry]) -> None:
        """Put in those of a step, in an order in which their arrival has no part.

        Of a question that is there already the new one stays; ReLIFT's published code (arXiv 2506.07527) keeps both.
        """
        arranged = sorted(entries, key=lambda entry: (stable_hash(entry.step, entry.key), entry.ids))
        new = list({entry.key: entry for entry in arranged}.values())
        keys = {entry.key for entry in new}
        self.entries = new + [entry for entry in self.entries if entry.key not in keys]

    def take(self) -> list[list[Entry]]:
        """Take out what fills whole optimizer steps, a list for each."""
        whole = len(self.entries) // self.size * self.size
        taken, self.entries = self.entries[:whole], self.entries[whole:]
        return [taken[i : i + self.size] for i in range(0, whole, self.size)]

    def state(self) -> list[dict]:
        return [entry.state() for entry in self.entries]


class Stream:
    """The rows of a file in an order of its own, anew each epoch.

    rows: how many the file has. batch: demonstrations a step. seed: of the order. files: what tells these files from
    others.
    """

    def __init__(self, rows: int, batch: int, seed: int, files: str = ""):
        self.rows, self.batch, self.seed, self.files = rows, batch, seed, files
        self.epoch = self.position = 0

    def take(self, read: Callable[[Sequence[int]], Sequence[Entry | None]]) -> list[Entry]:
        """The next usable ones. read: rows -> each one's demonstration, None where it has no usable one.

        Raises:
            UserError: no row of the file is usable.
        """
        taken, seen = [], 0
        while len(taken) < self.batch:
            if self.position >= self.rows:
                self.epoch, self.position = self.epoch + 1, 0
            here = self.order()[self.position :][: self.batch - len(taken)]
            found = [entry for entry in read(here) if entry is not None]
            self.position, seen = self.position + len(here), 0 if found else seen + len(here)
            taken += found
            if seen >= 2 * self.rows:  # of two orders: fewer in a row need not be an epoch
                raise UserError(f"hpt.stream.files: {UNUSABLE}")
        return taken

    def order(self) -> list[int]:
        """Rows of this epoch in order: a permutation of the seed and the epoch alone."""
        # The legacy generator: NumPy promises that its numbers never change.
        return np.random.RandomState(stable_hash(self.seed, self.epoch) % 2**32).permutation(self.rows).tolist()

    def state(self) -> dict[str, int | str]:
        order = {"rows": self.rows, "files": self.files, "seed": self.seed}
        return {**order, "epoch": self.epoch, "position": self.position}

    def load(self, state: dict[str, int | str]) -> None:
        """Go on where ``state`` was.

        Raises:
            UserError: the files or the seed are others than then.
            ValueError: no stream has such a state.
        """
        rows, files, seed, epoch, position = (state[name] for name in ("rows", "files", "seed", "epoch", "position"))
        if {type(rows), type(seed), type(epoch), type(position)} != {int} or epoch < 0 or not 0 <= position <= rows:
            raise ValueError(f"a stream is never at {state}")
        lost = "when the checkpoint was written: the same demonstrations would not come again"
        if rows != self.rows:
            raise UserError(f"hpt.stream.files have {self.rows} rows, and had {rows} {lost}. Set the old files back")
        if files != self.files:
            raise UserError(f"hpt.stream.files have other prompts than {lost}. Set the old files back")
        if seed != self.seed:
            raise UserError(f"hpt.seed={self.seed}: it was {seed} {lost}. Set it back")
        self.epoch, self.position = epoch, position
