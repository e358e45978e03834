"""From a batch's rows to the plan's questions: groups, identities, scores, decisions and usable demonstrations."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from verl_hpt import config
from verl_hpt.demos.demonstration import Demonstration, Unusable, demonstrations, plain
from verl_hpt.demos.read import read
from verl_hpt.demos.select import select
from verl_hpt.errors import UserError
from verl_hpt.estimator import STARTS
from verl_hpt.gate import Decision
from verl_hpt.history import UNKNOWN, Past
from verl_hpt.plan import PlanSettings, Question, decide

logger = logging.getLogger(__name__)
SKIPPED = "hpt_skipped_rollouts"  # column of a drawn question: rollouts that were not sampled


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
        extra = plain(self.columns.get("extra_info"))
        index = extra.get("index") if isinstance(extra, Mapping) else None
        return f"question {self.key or None} (data source {self.source or 'unknown'!r}, index {index})"


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


def row_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each row of a jagged tensor, each by itself; rows without tokens sum to 0. -> (rows,)

    Differences of one running sum would do it in one pass, and lose a score of 1 in a row beside one of 1e17.
    """
    sums, filled = np.zeros(len(offsets) - 1), offsets[1:] > offsets[:-1]
    if filled.any():
        sums[filled] = np.add.reduceat(values, offsets[:-1][filled], dtype=np.float64)
    return sums


def gate_metric(group: Group, name: str, info: Mapping) -> float:
    """The number that ``hpt.gate.metric`` names in what a reward function said of a rollout.

    Raises:
        UserError: the reward function said no such thing, or no finite number.
    """
    value = plain(info.get(name))
    if isinstance(value, int | float) and math.isfinite(value):  # True and False are 1 and 0
        return float(value)
    if name in info:
        raise UserError(f"{group.named()}: hpt.gate.metric={name!r} is {value!r} on a rollout; it must be a number")
    raise UserError(
        f"{group.named()}: hpt.gate.metric={name!r} is not in the reward function's extra info; it has "
        f"{', '.join(sorted(map(str, info))) or 'nothing'}"
    )


class Reader:
    """Usable demonstrations of a question, as tokens; what is unusable is counted and warned of once.

    eos: end token. max_length: tokens of a response, EOS included.
    """

    def __init__(
        self, tokenizer, eos: int, settings: config.Demo, max_length: int, seed: int = 0, template_kwargs=None
    ):
        self.tokenizer, self.eos, self.max_length = tokenizer, eos, max_length
        self.template_kwargs = dict(template_kwargs or {})
        self.settings, self.seed, self.columns = settings, seed, settings.columns()
        self.warned: set[str] = set()
        self.instead = "It keeps its rollouts"  # what becomes of a question without a usable one

    def usable(self, group: Group, counts: Counter, past: Past = UNKNOWN) -> list[Demonstration]:
        """The question's demonstrations that it could be shown at this draw.

        counts: gains ``unusable`` and ``unusable/<reason>``, one a question without any usable demonstration;
            ``history/cooling`` or ``history/retired`` for one whose demonstrations rest or are all retired.

        Raises:
            UserError: ``hpt.demo.on_unusable=error`` and there is none: names the question and why.
        """
        key = self.settings.key
        if past.cooling and demonstrations(group.columns.get(key)):
            counts["history/cooling"] += 1
            return []
        row = (group.columns, group.prompt, plain(group.columns.get("raw_prompt")))
        encoding = (self.tokenizer, self.eos, self.max_length, self.template_kwargs)
        (found,) = read([row], key, self.columns, *encoding, skip=past.retired)
        active = [demo for demo in found if not past.retired(demo.index)]
        usable = [demo for demo in active if demo.bad is None]
        if not usable and len(active) < len(found):
            counts["history/retired"] += 1
        elif not usable:
            self._unusable(group, active[0].bad if active else Unusable("null"), counts)
        reward = math.nan if self.settings.reward is None else self.settings.reward  # nan: `plan.demo_scores` says
        for demo in usable:
            demo.values = {"reward": reward, **demo.values}
        return usable

    def choose(self, group: Group, usable: Sequence[Demonstration], draw: int, past: Past = UNKNOWN):
        """Those of the demonstrations that the question is shown at this draw, by ``demo.select``."""
        settings = self.settings
        if settings.select == "random":  # an earlier draw of this batch leaves the others to this one
            usable = [demo for demo in usable if demo.index not in past.shown_now] or usable
        chosen = select(
            [demo.content for demo in usable],
            settings.select,
            settings.per_question,
            seed=self.seed,
            draw=past.uses if settings.select == "round_robin" else draw,
            question_key=group.key,
            lengths=[len(demo.ids) for demo in usable],
            log_likelihoods=[demo.values.get("log_likelihood") for demo in usable],
            seen={i: past.used(demo.index) for i, demo in enumerate(usable)},
        )
        return [usable[i] for i in chosen]

    def _unusable(self, group: Group, why: Unusable, counts: Counter) -> None:
        text = f"{group.named()}: its demonstration in column {self.settings.key!r} is unusable: {why}"
        if self.settings.on_unusable == "error":
            raise UserError(f"{text}. Mend the data, or set hpt.demo.on_unusable=keep to train it on its rollouts")
        counts["unusable"] += 1
        counts[f"unusable/{why.reason}"] += 1
        if why.reason not in self.warned:
            self.warned.add(why.reason)
            logger.warning("%s. %s; further ones of this kind are counted, not named", text, self.instead)


@dataclass
class Scored:
    """What is known of the rows of a batch once they are scored; (rows of the batch,) each.

    scores, returns: verifier's score, and what Â is made of; counted: tokens that learn; lengths: tokens of the
    response; truncated: bool, cut at the length limit; metric: what the gate reads in place of the score, or None;
    prefixes: tokens of a demonstration that the response begins with; starts: 0 where it started from nothing, equal
    where two of a question started alike.
    """

    scores: np.ndarray
    returns: np.ndarray
    counted: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    metric: np.ndarray | None = None
    prefixes: np.ndarray | None = None
    starts: np.ndarray | None = None


def _questions(
    groups: Sequence[Group], scored: Scored, past: Sequence[Past], settings: PlanSettings
) -> Iterator[tuple[Question, Decision]]:
    """Each question without its demonstrations, and what the gate decides of it."""
    for group, known in zip(groups, past, strict=True):
        rows = group.rows
        for name, values in (("reward", scored.scores[rows]), ("return", scored.returns[rows])):
            if not np.isfinite(values).all():
                raise UserError(
                    f"{group.named()}: {name} {values.tolist()} is not finite. Mend the reward function, or have it "
                    "return a number for this answer"
                )
        question = Question(
            key=group.key,
            rewards=scored.scores[rows],
            lengths=scored.counted[rows].astype(int),
            returns=scored.returns[rows],
            metric=None if scored.metric is None else scored.metric[rows],
            truncated=scored.truncated[rows],
            prefixes=None if scored.prefixes is None else scored.prefixes[rows],
            starts=None if scored.starts is None else scored.starts[rows],
            skipped_rollouts=int(plain(group.columns.get(SKIPPED)) or 0),
            source=group.source,
            history=known.numbers,
        )
        yield question, decide(question, settings)


def questions_of(
    groups: Sequence[Group],
    scored: Scored,
    reader: Reader,
    settings: PlanSettings,
    draw: int,
    past: Sequence[Past] | None = None,
    likelihoods: Callable[[Sequence[tuple[Group, Demonstration]]], Sequence[float]] | None = None,
) -> tuple[list[Question], list[list[Demonstration]], Counter, list[Decision]]:
    """The plan's questions, the demonstrations that each is shown, counts, and what the gate decided of each question.

    The gate decides first; demonstrations are read (tokenised) only where its decision asks for one.

    Args:
        draw: the step. past: what is known of each group's question from earlier steps.
        likelihoods: mean log-likelihoods a token of (group, demonstration) pairs, where a model is asked for them;
            called once, for the questions that have more demonstrations than they are shown.

    Raises:
        UserError: a score or return that is not finite; names the question.
    """
    past, counts = [UNKNOWN] * len(groups) if past is None else list(past), Counter()
    pairs = list(_questions(groups, scored, past, settings))
    questions, decisions = [question for question, _ in pairs], [decision for _, decision in pairs]
    shown = [
        reader.usable(group, counts, known) if settings.method.place not in STARTS and decision.asks_for_demo else []
        for group, known, decision in zip(groups, past, decisions, strict=True)
    ]
    if likelihoods is not None:
        several = [
            (group, demo)
            for group, usable in zip(groups, shown, strict=True)
            for demo in usable
            if len(usable) > reader.settings.per_question
        ]
        for (_, demo), number in zip(several, likelihoods(several) if several else [], strict=True):
            demo.values["log_likelihood"] = number
    latest: dict[str, Past] = {}  # a question twice in a batch: what the second draw is shown depends on the first's
    for i in sorted(range(len(questions)), key=lambda i: questions[i].order):
        group, known = groups[i], latest.get(groups[i].key, past[i])
        usable = [demo for demo in shown[i] if not known.retired(demo.index)]
        if shown[i] and not usable:
            counts["history/retired"] += 1
        shown[i] = reader.choose(group, usable, draw, known) if usable else []
        latest[group.key] = known.after([demo.index for demo in shown[i]]) if shown[i] else known
        counts.update(f"demo_source/{demo.values['source']}" for demo in shown[i] if "source" in demo.values)
        questions[i] = dataclasses.replace(
            questions[i],
            demo_lengths=np.array([sum(demo.mask) for demo in shown[i]], dtype=int),
            demo_rewards=np.array([demo.values["reward"] for demo in shown[i]], dtype=np.float64),
        )
    return questions, shown, counts, decisions
