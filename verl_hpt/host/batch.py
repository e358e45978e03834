"""From a batch's rows to the plan's questions: groups, identities, scores, and usable demonstrations."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from verl_hpt import config
from verl_hpt.demos import encode as demos
from verl_hpt.demos.columns import read_demos
from verl_hpt.errors import UserError
from verl_hpt.history import UNKNOWN, Past
from verl_hpt.normalize import relative
from verl_hpt.plan import PlanSettings, Question, decide

logger = logging.getLogger(__name__)
SKIPPED = "hpt_skipped_rollouts"  # column of a drawn question: rollouts that were not sampled

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
    value = demos.plain(info.get(name))
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
        self.tokenizer, self.eos, self.settings = tokenizer, eos, settings
        self.max_length, self.seed, self.template_kwargs = max_length, seed, dict(template_kwargs or {})
        self.columns = settings.columns()
        self.warned: set[str] = set()

    def candidates(self, group: Group, counts: Counter, past: Past = UNKNOWN) -> list[Candidate]:
        """The question's demonstrations that it could be shown at this draw.

        counts: gains ``unusable`` and ``unusable/<reason>``, one a question without any usable demonstration;
            ``history/cooling`` or ``history/retired`` for one whose demonstrations rest or are all retired.

        Raises:
            UserError: ``hpt.demo.on_unusable=error`` and there is none: names the question and why.
        """
        key = self.settings.key
        if past.cooling and demos.demonstrations(group.columns.get(key)):
            counts["history/cooling"] += 1
            return []
        row = (group.columns, group.prompt, demos.plain(group.columns.get("raw_prompt")))
        encoding = (self.tokenizer, self.eos, self.max_length, self.template_kwargs)
        (found,) = read_demos([row], key, self.columns, *encoding, skip=past.retired)
        asked = [demo for demo in found if not past.retired(demo.index)]
        usable = [(demo.encoded, self._values(demo)) for demo in asked if demo.bad is None]
        if not usable and len(asked) < len(found):
            counts["history/retired"] += 1
        elif not usable:
            self._tell(group, asked[0].bad if asked else demos.Unusable("null"), counts)
        return usable

    def choose(self, group: Group, usable: Sequence[Candidate], draw: int, past: Past = UNKNOWN) -> list[Candidate]:
        """Those of the candidates that the question is shown at this draw, by ``demo.select``."""
        settings = self.settings
        if settings.select == "random":  # an earlier draw of this batch leaves the others to this one
            usable = [one for one in usable if one[1]["place"] not in past.shown_now] or usable
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

    def _values(self, demo: demos.Demo) -> dict:
        """What the columns and the settings say of a demonstration."""
        reward = math.nan if self.settings.reward is None else self.settings.reward  # nan: `plan.demo_scores` says
        given = {"place": demo.index, "content": demo.content, "reward": reward, **demo.values}
        if "teacher_log_prob" in given:
            given["teacher_log_prob"] = np.minimum(given["teacher_log_prob"], 0.0)
        if "token_weights" in given:
            given["token_weights"] = relative(given["token_weights"], demo.encoded.mask)
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


@dataclass
class Scored:
    """What is known of the rows of a batch once they are scored; (rows of the batch,) each.

    scores, returns: verifier's score, and what Â is made of; counted: tokens that learn; lengths: tokens of the
    response; truncated: bool, cut at the length limit; metric: what the gate reads in place of the score, or None.
    """

    scores: np.ndarray
    returns: np.ndarray
    counted: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    metric: np.ndarray | None = None


def questions_of(
    groups: Sequence[Group],
    scored: Scored,
    reader: Reader,
    settings: PlanSettings,
    draw: int,
    past: Sequence[Past] | None = None,
    likelihoods: Callable[[Sequence[tuple[Group, Candidate]]], Sequence[float]] | None = None,
) -> tuple[list[Question], list[list[Candidate]], Counter]:
    """The plan's questions, and their demonstrations' tokens.

    Demonstrations are read (tokenised) only for questions that would train on one.

    Args:
        draw: the step. past: what is known of each group's question from earlier steps.
        likelihoods: mean log-likelihoods a token of (group, candidate) pairs, where a model is asked for them; called
            once, for the questions that have more candidates than they are shown.

    Raises:
        UserError: a score or return that is not finite; names the question.
    """
    questions, read, counts = [], [], Counter()
    past = [UNKNOWN] * len(groups) if past is None else list(past)
    for group, known in zip(groups, past, strict=True):
        for name, values in (("reward", scored.scores), ("return", scored.returns)):
            if not np.isfinite(values[group.rows]).all():
                raise UserError(
                    f"{group.named()}: {name} {values[group.rows].tolist()} is not finite. Mend the reward function, "
                    "or have it return a number for this answer"
                )
        question = Question(
            key=group.key,
            rewards=scored.scores[group.rows],
            lengths=scored.counted[group.rows].astype(int),
            returns=scored.returns[group.rows],
            metric=None if scored.metric is None else scored.metric[group.rows],
            truncated=scored.truncated[group.rows],
            skipped_rollouts=int(demos.plain(group.columns.get(SKIPPED)) or 0),
            source=group.source,
            demo_lengths=np.ones(1, dtype=int),
            demo_rewards=np.array([math.nan]),
        )
        questions.append(question)
        decision = decide(question, settings)  # as if it had a demonstration
        # A soft gate asks whether the demonstration is right, so that one must be there whatever the shares are.
        shares = decision.off or decision.sft or settings.method.when == "soft"
        teaches = settings.method.demos and shares and decision.zone != "own"
        read.append(reader.candidates(group, counts, known) if teaches else [])
    if likelihoods is not None:
        several = [i for i, found in enumerate(read) if len(found) > reader.settings.per_question]
        pairs = [(groups[i], candidate) for i in several for candidate in read[i]]
        for (_, (_, values)), number in zip(pairs, likelihoods(pairs) if pairs else [], strict=True):
            values["log_likelihood"] = number
    latest: dict[str, Past] = {}  # a question twice in a batch: what the second draw is shown depends on the first's
    for i in sorted(range(len(questions)), key=lambda i: _order(questions[i])):
        group, known = groups[i], latest.get(groups[i].key, past[i])
        usable = [(encoded, values) for encoded, values in read[i] if not known.retired(values["place"])]
        if read[i] and not usable:
            counts["history/retired"] += 1
        read[i] = reader.choose(group, usable, draw, known) if usable else []
        latest[group.key] = known.after([values["place"] for _, values in read[i]]) if read[i] else known
        counts.update(f"demo_source/{values['source']}" for _, values in read[i] if "source" in values)
        questions[i] = dataclasses.replace(
            questions[i],
            demo_lengths=np.array([sum(encoded.mask) for encoded, _ in read[i]], dtype=int),
            demo_rewards=np.array([values["reward"] for _, values in read[i]], dtype=np.float64),
        )
    return questions, read, counts


def _order(question: Question) -> tuple:
    """Draws of one question in one batch, in an order that does not depend on which rollouts arrived first."""
    return question.key, tuple(question.rewards), tuple(question.lengths)
