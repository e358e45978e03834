"""What a run keeps beside its batches: a stream of demonstrations, a buffer of collected ones, numbers that follow the
run (λ steered by the entropy, an adapted length of prefixes). All of it is in the checkpoint."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from verl_hpt import config
from verl_hpt.config import Settings
from verl_hpt.demos.demonstration import Demonstration, plain
from verl_hpt.demos.select import stable_hash
from verl_hpt.demos.stored import UNUSABLE, Buffer, Entry, Stream, entry_of
from verl_hpt.errors import UserError
from verl_hpt.estimator import Method
from verl_hpt.gate import Decision
from verl_hpt.history import identity
from verl_hpt.host.batch import Group, Reader
from verl_hpt.places.schedule import Steered, at
from verl_hpt.places.starts import Adapted, adapted, amounts
from verl_hpt.plan import PlanSettings, Question

logger = logging.getLogger(__name__)
FILE, VERSION = "hpt_beside.json", 1
KEPT = {"stream": "the stream", "buffer": "the buffer", "steered": "the steered λ", "length": "the adapted length"}
ENTROPY = "actor/entropy"  # verl's metric of the log-prob pass before the update


class Beside:
    """Built with the run; the stream is opened once verl's datasets and the tokenizer are there.

    most: tokens of a response that a prefix can have at most.
    """

    def __init__(self, settings: Settings, method: Method, rollouts: int, most: int):
        self.settings, self.method, self.rollouts, self.most = settings, method, rollouts, most
        self.start, self.coef = config.start_of(settings, method), config.demo_coef(settings, method)
        self.buffer = Buffer(settings.buffer.size) if method.place == "buffer" else None
        self.stream: Stream | None = None
        self.steered = self.coef.start if isinstance(self.coef, Steered) else None
        adapts = method.place == "prefix" and isinstance(self.start.share, Adapted)
        self.length = float(self.start.share.tokens) if adapts else None
        self.solve_rates: list[float] = []

    # --- what a step takes ---------------------------------------------------------------------------------------

    def demo_coef(self, step: int) -> float:
        """λ of a step."""
        return at(self.coef, step) if self.steered is None else self.steered

    def amounts(self, key: str, failures: int, n: int, step: int) -> list[float]:
        """How much of its demonstration each rollout of a question starts from. -> (n,)"""
        if failures < self.start.after_failures:
            return [0.0] * n
        return amounts(self.start, n, seed=self.settings.seed, key=key, step=step, tokens=self.length)

    def open_stream(self, dataset, prompt_of: Callable[[list[dict]], list[int]], reader: Reader) -> None:
        """dataset: of the stream's files, as verl makes one; prompt_of: tokens of a prompt's messages."""
        if not len(dataset):
            raise UserError("hpt.stream.files: no row is left; data.max_prompt_length filters prompts that are longer")
        reader.instead = "The stream goes on without it"
        spread = np.linspace(0, len(dataset) - 1, min(len(dataset), 16), dtype=int)
        files = stable_hash(*(plain(dataset[int(place)]["raw_prompt"]) for place in spread))
        self.stream = Stream(len(dataset), self.settings.stream.batch, self.settings.seed, f"{files:016x}")
        self.rows = lambda places, step, counts: [
            _entry(dataset[place], prompt_of, reader, self.settings, step, counts) for place in places
        ]
        if all(self.rows([place], 0, Counter()) == [None] for place in range(len(dataset))):  # mostly the first is not
            raise UserError(f"hpt.stream.files: {UNUSABLE}")

    def from_stream(self, step: int, counts: Counter) -> list[Entry]:
        """The stream's demonstrations of a step. counts: gains its unusable ones, by reason."""
        if self.stream is None:
            return []
        own: Counter = Counter()
        taken = self.stream.take(lambda places: self.rows(places, step, own))
        counts.update({f"stream/{name}": number for name, number in own.items()})
        counts.update(f"demo_source/{entry.values['source']}" for entry in taken if "source" in entry.values)
        return taken

    def from_buffer(self, collected: Sequence[Entry]) -> list[list[Entry]]:
        """What the buffer's optimizer steps of an update train on, once it has taken in what the update collects."""
        if self.buffer is None:
            return []
        self.buffer.collect(collected)
        return self.buffer.take()

    def after(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take in what a step's metrics say; what is kept, as metrics."""
        told = {}
        if self.coef is not None and not isinstance(self.coef, float):
            told["hpt/demo_coef"] = self.demo_coef(step)
        if self.steered is not None:
            if ENTROPY not in metrics:
                raise RuntimeError(f"hpt.demo_coef follows the entropy, and verl's step has no metric {ENTROPY}")
            self.steered = self.coef.after(self.steered, float(metrics[ENTROPY]))
        if self.length is not None:
            told["hpt/start/length"] = self.length
            self.solve_rates.append(float(metrics.get("hpt/solve_rate", 0.0)))
            self.length = adapted(self.length, self.solve_rates, self.start.share.every, self.most)
            self.solve_rates = self.solve_rates if len(self.solve_rates) % self.start.share.every else []
        if self.buffer is not None:
            told["hpt/buffer/entries"] = float(len(self.buffer.entries))
        if self.stream is not None:
            told["hpt/stream/epoch"] = self.stream.epoch + self.stream.position / self.stream.rows
        return told

    # --- the checkpoint ------------------------------------------------------------------------------------------

    @property
    def matters(self) -> list[str]:
        """What of a run depends on this state."""
        return [words for name, words in KEPT.items() if getattr(self, name) is not None]

    def save(self, folder: str) -> None:
        """Write the state into a checkpoint's folder, whole or not at all; nothing where there is none."""
        if not self.matters:
            return
        state = {
            "verl_hpt_beside": VERSION,
            "stream": self.stream and self.stream.state(),
            "buffer": self.buffer and self.buffer.state(),
            "steered": self.steered,
            "length": self.length,
            "solve_rates": self.solve_rates,
        }
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, FILE)
        with open(f"{path}.partial", "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.partial", path)

    def load(self, folder: str) -> None:
        """Go on from a checkpoint's folder.

        Raises:
            UserError: it cannot be read, or it has none although the run depends on it.
        """
        path = os.path.join(folder, FILE)
        if not self.matters:
            return
        if not os.path.exists(path):
            return self._start_anew(self.matters, f"{path} does not exist")
        try:
            with open(path, encoding="utf-8") as file:
                lost = self._take(json.load(file))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{path}: cannot be read ({type(error).__name__}: {error})"
            raise UserError(f"{problem}. Resume from another checkpoint, or delete this file") from None
        if lost:  # of a run with another method
            self._start_anew(lost, f"{path} has none")

    def _start_anew(self, names: Sequence[str], why: str) -> None:
        """Warn that the checkpoint lacks some of the state; raise where the user has not said that it may."""
        lost = f"the checkpoint has no state of {', '.join(names)} ({why})"
        if self.settings.history.on_missing == "error":
            raise UserError(
                f"{lost}, and would start anew. Resume from a checkpoint that has it, or set "
                "hpt.history.on_missing=empty"
            )
        logger.warning("%s; it starts anew", lost)

    def _take(self, state: Any) -> list[str]:
        """Go on from what a file holds. -> what of ``matters`` it has no state of"""
        if state["verl_hpt_beside"] != VERSION:
            raise ValueError(f"version {state['verl_hpt_beside']}; this verl-hpt reads version {VERSION}")
        if self.stream is not None and state["stream"] is not None:
            self.stream.load(state["stream"])
        if self.buffer is not None and state["buffer"] is not None:
            self.buffer.entries = [entry_of(one) for one in _list(state["buffer"])]
        if self.steered is not None and state["steered"] is not None:
            self.steered = _number(state["steered"])
        if self.length is not None and state["length"] is not None:
            self.length = _number(state["length"])
            self.solve_rates = [_number(rate) for rate in _list(state["solve_rates"])]
        return [words for name, words in KEPT.items() if getattr(self, name) is not None and state[name] is None]


def _list(value: Any) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{type(value).__name__} is no list")
    return value


def _number(value: Any) -> float:
    """A finite number of a file; raises ValueError for anything else."""
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _entry(row: Mapping, prompt_of, reader: Reader, settings: Settings, step: int, counts: Counter) -> Entry | None:
    """The demonstration of a row of the stream's files, None where it has no usable one."""
    columns = {name: plain(cell) for name, cell in row.items()}
    group = Group("", [], "", str(columns.get("data_source") or ""), columns=columns)
    try:
        group.key = identity(columns, settings.question_key)
    except UserError as error:
        raise UserError(f"hpt.stream.files: {group.named()}: {error}") from None
    group.prompt = prompt_of(columns["raw_prompt"])
    usable = reader.usable(group, counts)
    success = settings.per_source.get(group.source, settings).gate.success
    return entry(group, reader.choose(group, usable, step)[0], success, step) if usable else None


def entry(group: Group, demo: Demonstration, success: float, step: int) -> Entry:
    """A question's demonstration as it is kept."""
    reward = float(demo.values["reward"])
    values = {name: value for name, value in demo.values.items() if name != "reward"}
    return Entry(
        group.key, group.source, np.asarray(group.prompt).tolist(), list(demo.ids), list(demo.mask),
        success if np.isnan(reward) else reward, values, step=step,
    )  # fmt: skip


def question_of(entry: Entry) -> Question:
    """An entry as the plan takes it."""
    return Question(
        entry.key, np.zeros(0), np.zeros(0, dtype=int), source=entry.source,
        demo_lengths=np.array([entry.learns]), demo_rewards=np.array([entry.reward]),
    )  # fmt: skip


def collected(
    groups: Sequence[Group],
    decisions: Sequence[Decision],
    demos: Sequence[Sequence[Demonstration]],
    settings: PlanSettings,
    step: int,
) -> list[Entry]:
    """The demonstrations of those questions that the gate sends to the buffer."""
    return [
        entry(group, shown[0], settings.gate_of(group.source).success, step)
        for group, decision, shown in zip(groups, decisions, demos, strict=True)
        if decision.zone == "collect" and shown
    ]
