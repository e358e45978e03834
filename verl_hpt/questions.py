"""From a batch's rows to the plan's questions: groups, identities, scores, and usable demonstrations."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from verl_hpt import demos, mixing
from verl_hpt.config import Demo
from verl_hpt.errors import UserError
from verl_hpt.lifecycle import UNKNOWN, Past
from verl_hpt.mixing import PlanSettings, Question

logger = logging.getLogger(__name__)


@dataclass
class Group:
    """The rollouts of one question in one batch.

    rows: positions in the batch, by session; key: identity, the same whenever the question is drawn; prompt: (tokens,);
    columns: the question's dataset columns that we read.
    """

    uid: str
    rows: list[int]
    key: str = ""
    source: str = ""
    prompt: Sequence[int] = ()
    columns: Mapping = field(default_factory=dict)

    def named(self) -> str:
        """How an error speaks of the question."""
        extra = demos.plain(self.columns.get("extra_info"))
        index = extra.get("index") if isinstance(extra, Mapping) else None
        return f"question {self.key} (data source {self.source or 'unknown'!r}, index {index})"


def group_rows(keys: Sequence[str], padding: Sequence[bool]) -> list[Group]:
    """Rows by question. Keys are verl's ``{uid}_{session}_{output}``.

    Raises:
        UserError: an agent session with several outputs, which this version cannot weigh.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    for row, (key, pads) in enumerate(zip(keys, padding, strict=True)):
        if pads:
            continue
        uid, session, output = key.rsplit("_", 2)
        if int(output) > 0:
            raise UserError(
                f"agent session {uid}_{session} has several outputs (row {key}); verl-hpt weighs one row a session. "
                "Use an agent loop that returns one output"
            )
        groups.setdefault(uid, []).append((int(session), row))
    return [Group(uid, [row for _, row in sorted(rows)]) for uid, rows in groups.items()]


def identity(source: str, prompt: Sequence[int]) -> str:
    """A question's identity: a hash of its data source and prompt tokens (verl's uid is fresh every draw)."""
    data = source.encode() + b"\0" + np.asarray(prompt, dtype=np.int64).tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def row_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each row of a jagged tensor; rows without tokens sum to 0. -> (rows,)"""
    running = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return running[offsets[1:]] - running[offsets[:-1]]


class Reader:
    """Usable demonstrations of a question, as tokens; what is unusable is counted and warned of once.

    eos: end token. max_length: tokens of a response, EOS included. success: what a demonstration counts as by default.
    """

    def __init__(self, tokenizer, eos: int, settings: Demo, max_length: int, seed: int = 0, template_kwargs=None):
        self.tokenizer, self.eos, self.settings = tokenizer, eos, settings
        self.max_length, self.seed, self.template_kwargs = max_length, seed, dict(template_kwargs or {})
        self.warned: set[str] = set()

    def read(
        self, group: Group, draw: int, success: float, counts: Counter, past: Past = UNKNOWN
    ) -> list[tuple[demos.EncodedDemo, dict]]:
        """The question's demonstrations for this draw, each with its reward and other columns.

        counts: gains ``unusable`` and ``unusable/<reason>``, one a question without any usable demonstration;
            ``history/cooling`` or ``history/retired`` for one whose demonstrations rest or are all retired.

        Raises:
            UserError: ``hpt.demo.on_unusable=error`` and there is none: names the question and why.
        """
        settings, why = self.settings, None
        raw = demos.demonstrations(group.columns.get(settings.key))
        usable, retired = [], False
        if raw and past.cooling:
            counts["history/cooling"] += 1
            return []
        for place, demo in enumerate(raw):
            if past.retired(place):
                retired = True
                continue
            try:
                encoded = demos.encode(
                    demo,
                    self.tokenizer,
                    self.eos,
                    prompt_ids=group.prompt,
                    max_length=self.max_length,
                    prompt_messages=demos.plain(group.columns.get("raw_prompt")),
                    template_kwargs=self.template_kwargs,
                )
                usable.append((encoded, self._columns(group, place, len(raw), success)))
            except demos.Unusable as error:
                why = why or error
        if not usable and retired:
            counts["history/retired"] += 1
            return []
        if not usable:
            self._tell(group, why or demos.Unusable("null"), counts)
            return []
        chosen = demos.select(
            [raw[columns["place"]] for _, columns in usable],
            settings.select,
            settings.per_question,
            seed=self.seed,
            draw=past.uses if settings.select == "round_robin" else draw,
            question_key=group.key,
            lengths=[len(encoded.ids) for encoded, _ in usable],
            log_likelihoods=[columns.get("log_likelihood") for _, columns in usable],
            seen={i: past.used(columns["place"]) for i, (_, columns) in enumerate(usable)},
        )
        return [usable[i] for i in chosen]

    def _columns(self, group: Group, place: int, n: int, success: float) -> dict:
        settings, row = self.settings, {"place": place, "reward": success}
        wanted = {"log_likelihood": settings.log_likelihood, "other_log_prob": settings.other_log_prob}
        if isinstance(settings.reward, str):
            wanted["reward"] = settings.reward
        elif settings.reward is not None:
            row["reward"] = settings.reward
        for name, column in wanted.items():
            if column is None:
                continue
            cell = demos.plain(group.columns.get(column))
            values = cell if isinstance(cell, list) else [cell]
            value = values[place] if len(values) == n else None
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise demos.Unusable("bad_column", f"{column}={cell!r} for demonstration {place + 1} of {n}")
            row[name] = float(value)
        return row

    def _tell(self, group: Group, why: demos.Unusable, counts: Counter) -> None:
        text = f"{group.named()}: its demonstration in column {self.settings.key!r} is unusable: {why}"
        if self.settings.on_unusable == "error":
            raise UserError(f"{text}. Mend the data, or set hpt.demo.on_unusable=keep to train it on its rollouts")
        counts["unusable"] += 1
        counts[f"unusable/{why.reason}"] += 1
        if why.reason not in self.warned:
            self.warned.add(why.reason)
            logger.warning("%s. It keeps its rollouts; further ones of this kind are counted, not named", text)


def questions_of(
    groups: Sequence[Group],
    scores: np.ndarray,
    returns: np.ndarray,
    lengths: np.ndarray,
    reader: Reader,
    settings: PlanSettings,
    draw: int,
    past: Sequence[Past] | None = None,
) -> tuple[list[Question], list[list[tuple[demos.EncodedDemo, dict]]], Counter]:
    """The plan's questions, and their demonstrations' tokens.

    Demonstrations are read (tokenised) only for questions that would train on one.

    Args:
        scores, returns, lengths: (rows of the batch,) verifier's score, what Â is made of, tokens that count.
        draw: the step. past: what is known of each group's question from earlier steps.

    Raises:
        UserError: a score or return that is not finite; names the question.
    """
    questions, read, counts = [], [], Counter()
    for number, group in enumerate(groups):
        rows = group.rows
        for name, values in (("reward", scores), ("return", returns)):
            if not np.isfinite(values[rows]).all():
                raise UserError(
                    f"{group.named()}: {name} {values[rows].tolist()} is not finite. Mend the reward function, or have "
                    "it return a number for this answer"
                )
        question = Question(
            key=group.key,
            rewards=scores[rows],
            lengths=lengths[rows].astype(int),
            returns=returns[rows],
            source=group.source,
            demo_lengths=np.ones(1, dtype=int),
            demo_rewards=np.array([settings.gate_of(group.source).success]),
        )
        decision = mixing.decide(question, settings)  # as if it had a demonstration
        found = []
        if settings.method.demos and (decision.off or decision.sft) and decision.zone != "own":
            known = UNKNOWN if past is None else past[number]
            found = reader.read(group, draw, settings.gate_of(group.source).success, counts, known)
        read.append(found)
        questions.append(
            Question(
                key=question.key,
                rewards=question.rewards,
                lengths=question.lengths,
                returns=question.returns,
                source=question.source,
                demo_lengths=np.array([sum(encoded.mask) for encoded, _ in found], dtype=int),
                demo_rewards=np.array([columns["reward"] for _, columns in found], dtype=np.float64),
            )
        )
    return questions, read, counts
