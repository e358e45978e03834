"""From a batch's rows to the plan's questions: groups, identities, scores, and usable demonstrations."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from verl_hpt import config, demos, mixing
from verl_hpt.demo_columns import Demo, check_values, row_demos
from verl_hpt.errors import UserError
from verl_hpt.lifecycle import UNKNOWN, Past
from verl_hpt.mixing import PlanSettings, Question
from verl_hpt.normalize import relative

logger = logging.getLogger(__name__)

# A demonstration that can be trained on, with what is known of it: its place in the row, its content, its reward, and
# the values of the columns that the settings name (``demo_columns.DemoColumns``).
Candidate = tuple[demos.EncodedDemo, dict]


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

    def __init__(
        self, tokenizer, eos: int, settings: config.Demo, max_length: int, seed: int = 0, template_kwargs=None
    ):
        self.tokenizer, self.eos, self.settings = tokenizer, eos, settings
        self.max_length, self.seed, self.template_kwargs = max_length, seed, dict(template_kwargs or {})
        self.columns = settings.columns()
        self.warned: set[str] = set()

    def candidates(self, group: Group, success: float, counts: Counter, past: Past = UNKNOWN) -> list[Candidate]:
        """The question's demonstrations that it could be shown at this draw.

        counts: gains ``unusable`` and ``unusable/<reason>``, one a question without any usable demonstration;
            ``history/cooling`` or ``history/retired`` for one whose demonstrations rest or are all retired.

        Raises:
            UserError: ``hpt.demo.on_unusable=error`` and there is none: names the question and why.
        """
        try:
            raw, why = row_demos(group.columns, self.settings.key, self.columns), None
        except demos.Unusable as error:
            self._tell(group, error, counts)
            return []
        usable, retired = [], False
        if raw and past.cooling:
            counts["history/cooling"] += 1
            return []
        for demo in raw:
            if past.retired(demo.index):
                retired = True
                continue
            try:
                encoded = demos.encode(
                    demo.content,
                    self.tokenizer,
                    self.eos,
                    prompt_ids=group.prompt,
                    max_length=self.max_length,
                    prompt_messages=demos.plain(group.columns.get("raw_prompt")),
                    template_kwargs=self.template_kwargs,
                )
                usable.append((encoded, self._values(demo, encoded, success)))
            except demos.Unusable as error:
                why = why or error
        if not usable and retired:
            counts["history/retired"] += 1
        elif not usable:
            self._tell(group, why or demos.Unusable("null"), counts)
        return usable

    def choose(self, group: Group, usable: Sequence[Candidate], draw: int, past: Past = UNKNOWN) -> list[Candidate]:
        """Those of the candidates that the question is shown at this draw, by ``demo.select``."""
        settings = self.settings
        chosen = demos.select(
            [values["content"] for _, values in usable],
            settings.select,
            settings.per_question,
            seed=self.seed,
            draw=past.uses if settings.select == "round_robin" else draw,
            question_key=group.key,
            lengths=[len(encoded.ids) for encoded, _ in usable],
            log_likelihoods=[values.get("log_likelihood") for _, values in usable],
            seen={i: past.used(values["place"]) for i, (_, values) in enumerate(usable)},
        )
        return [usable[i] for i in chosen]

    def _values(self, demo: Demo, encoded: demos.EncodedDemo, success: float) -> dict:
        """What the columns say of a demonstration, checked; raises `Unusable` for what does not fit or is missing."""
        settings = self.settings
        values = {**demo.values, **check_values(demo, self.columns, encoded)}
        reward = success if settings.reward is None else settings.reward
        given = {"place": demo.index, "content": demo.content, "reward": reward} | values
        if "teacher_log_prob" in given:
            given["teacher_log_prob"] = np.minimum(given["teacher_log_prob"], 0.0)
        if "token_weights" in given:
            given["token_weights"] = relative(given["token_weights"], encoded.mask)
        return given

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
    likelihoods: Callable[[Sequence[tuple[Group, Candidate]]], Sequence[float]] | None = None,
) -> tuple[list[Question], list[list[Candidate]], Counter]:
    """The plan's questions, and their demonstrations' tokens.

    Demonstrations are read (tokenised) only for questions that would train on one.

    Args:
        scores, returns, lengths: (rows of the batch,) verifier's score, what Â is made of, tokens that count.
        draw: the step. past: what is known of each group's question from earlier steps.
        likelihoods: mean log-likelihoods a token of (group, candidate) pairs, where a model is asked for them; called
            once, for the questions that have more candidates than they are shown.

    Raises:
        UserError: a score or return that is not finite; names the question.
    """
    questions, read, counts = [], [], Counter()
    past = [UNKNOWN] * len(groups) if past is None else past
    for group, known in zip(groups, past, strict=True):
        for name, values in (("reward", scores), ("return", returns)):
            if not np.isfinite(values[group.rows]).all():
                raise UserError(
                    f"{group.named()}: {name} {values[group.rows].tolist()} is not finite. Mend the reward function, "
                    "or have it return a number for this answer"
                )
        success = settings.gate_of(group.source).success
        question = Question(
            key=group.key,
            rewards=scores[group.rows],
            lengths=lengths[group.rows].astype(int),
            returns=returns[group.rows],
            source=group.source,
            demo_lengths=np.ones(1, dtype=int),
            demo_rewards=np.array([success]),
        )
        questions.append(question)
        decision = mixing.decide(question, settings)  # as if it had a demonstration
        teaches = settings.method.demos and (decision.off or decision.sft) and decision.zone != "own"
        read.append(reader.candidates(group, success, counts, known) if teaches else [])
    if likelihoods is not None:
        several = [i for i, found in enumerate(read) if len(found) > reader.settings.per_question]
        pairs = [(groups[i], candidate) for i in several for candidate in read[i]]
        for (_, (_, values)), number in zip(pairs, likelihoods(pairs) if pairs else [], strict=True):
            values["log_likelihood"] = number
    for i, (group, known) in enumerate(zip(groups, past, strict=True)):
        read[i] = reader.choose(group, read[i], draw, known) if read[i] else []
        counts.update(f"demo_source/{values['source']}" for _, values in read[i] if "source" in values)
        questions[i] = dataclasses.replace(
            questions[i],
            demo_lengths=np.array([sum(encoded.mask) for encoded, _ in read[i]], dtype=int),
            demo_rewards=np.array([values["reward"] for _, values in read[i]], dtype=np.float64),
        )
    return questions, read, counts
