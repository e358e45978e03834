"""What the history decides: which demonstrations rest or are retired, and how many rollouts a question is worth.

Settings in ``hpt.history``; the numbers themselves in ``verl_hpt.history``. No verl imports.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from verl_hpt import history
from verl_hpt.config import Settings
from verl_hpt.demos import encode as demos
from verl_hpt.errors import UserError
from verl_hpt.history import Draw, History
from verl_hpt.history_file import FILE, OtherVersion
from verl_hpt.plan import DEMO, Plan, Question

logger = logging.getLogger(__name__)
SPARED = "hpt_spared"  # column of a drawn question: rollouts that the early gate did not sample
KEY = "hpt.question_key"
TOKENS = "the tokens of a prompt (tokenizer, chat template, data.apply_chat_template_kwargs)"

# Rendered and tokenised to tell whether prompts become the same tokens as before.
SAMPLE = 'What is 12 + 3,456.7?\nÇa vaut √2 ≈ 1.41; 请回答。 def f(x):\n    return x**2  # {"a": [1]}'
CONVERSATIONS = (
    [{"role": "user", "content": SAMPLE}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SAMPLE}],
    [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2."}, {"role": "user", "content": SAMPLE}],
)


@dataclass(frozen=True)
class Past:
    """What is known of a question before a step. uses: draws at which it trained on demonstrations; cooling: these rest
    at this step; demo_uses: uses of each demonstration by place; retire_after: uses after which one is retired;
    shown_now: places of the demonstrations that an earlier draw of the same batch is shown."""

    uses: int = 0
    cooling: bool = False
    demo_uses: Sequence[int] = ()
    retire_after: int | None = None
    shown_now: Sequence[int] = ()

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


def fingerprint(tokenizer, template_kwargs: Mapping[str, Any]) -> str:
    """A short hash of the tokens that fixed conversations become, rendered as verl renders a prompt."""
    tokens: list = [tokenizer.encode(SAMPLE, add_special_tokens=False)]
    for messages in CONVERSATIONS:
        try:
            text = tokenizer.apply_chat_template(
                messages, **{**template_kwargs, "tokenize": False, "add_generation_prompt": True}
            )
            tokens.append(tokenizer.encode(text, add_special_tokens=False))
        except Exception as error:  # a template may refuse a role, in whatever way it likes
            tokens.append(type(error).__name__)
    return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=8).hexdigest()


def depends(settings: Settings, tokens: str) -> dict[str, dict]:
    """What a history depends on: ``identity``, by which its questions are found, and ``flags``, what counts as solved.

    tokens: the tokenizer's fingerprint; it matters where no column names the questions.
    """
    gates = {"hpt.gate": settings.gate} | {f"hpt.per_source.{s}.gate": o.gate for s, o in settings.per_source.items()}
    counted = ("success", "finished", "metric")
    return {
        "identity": {KEY: settings.question_key, TOKENS: tokens if settings.question_key is None else None},
        "flags": {place: {name: getattr(gate, name) for name in counted} for place, gate in gates.items()},
    }


def _identity_changes(then: dict, now: dict) -> list[str]:
    name = KEY if then.get(KEY) != now.get(KEY) else TOKENS
    return [] if then.get(name) == now.get(name) else [_change(name, then.get(name), now.get(name))]


def _flag_changes(then: dict, now: dict) -> list[str]:
    """Differences of the gates; a data source without a gate of its own has the general one."""
    changes = []
    for place in dict.fromkeys([*now, *then]):
        old, new = (gates.get(place, gates.get("hpt.gate", {})) for gates in (then, now))
        changes += [
            _change(f"{place}.{name}", old.get(name), new.get(name))
            for name in dict.fromkeys([*new, *old])
            if old.get(name) != new.get(name)
        ]
    return changes


def _change(name: str, then: Any, now: Any) -> str:
    return f"{name} was {json.dumps(then)}, is {json.dumps(now)} now"


class Lifecycle:
    """The history of a run, and the rules of ``hpt.history``."""

    def __init__(self, settings: Settings, rollouts: int):
        self.settings, self.rollouts, self.history = settings, rollouts, History()
        gate = settings.history.early_gate
        if gate is not None and gate.rollouts >= rollouts:
            raise UserError(
                f"hpt.history.early_gate.rollouts={gate.rollouts} spares nothing: actor_rollout_ref.rollout.n is "
                f"{rollouts}"
            )

    def bind_tokenizer(self, tokenizer, template_kwargs: Mapping[str, Any]) -> None:
        """Once the tokenizer is there: what the history depends on is known."""
        self.history.depends = depends(self.settings, fingerprint(tokenizer, template_kwargs))

    @property
    def matters(self) -> list[str]:
        """Settings whose effect depends on the history."""
        own, select = self.settings.history, self.settings.demo.select
        named = {
            "hpt.history.retire_after": own.retire_after,
            "hpt.history.cooldown": own.cooldown,
            "hpt.history.early_gate": own.early_gate,
            f"hpt.demo.select={select}": select in ("round_robin", "unseen_first"),
        }
        return [name for name, on in named.items() if on]

    def spared(self, sources: Sequence, prompts: Sequence, rollouts: Sequence[int] | None = None) -> list[int] | None:
        """How many of its rollouts the early gate spares each question that is about to be sampled; None without it.

        Args:
            sources, prompts: data source and chat messages of each. rollouts: of each, where they differ.
        """
        gate = self.settings.history.early_gate
        if gate is None:
            return None
        numbers = [
            history.prompt_number(str(source or ""), messages)
            for source, messages in zip(demos.plain(sources), demos.plain(prompts), strict=True)
        ]
        (failures,) = self.history.look_up_prompts(np.array(numbers, dtype=np.uint64), "failures")
        full = np.full(len(numbers), self.rollouts) if rollouts is None else np.array(rollouts)
        return np.where(failures >= gate.after_failures, np.maximum(full - gate.rollouts, 0), 0).tolist()

    def past(self, groups: Sequence, step: int) -> list[Past]:
        """What is known of a batch's questions before this step; (groups,)"""
        keys = history.numbers([group.key for group in groups])
        uses, taught_at = self.history.look_up(keys, "uses", "taught_at")
        cooldown = self.settings.history.cooldown
        # Several updates share a step where weights are synced less often: without a cool-down nothing rests in it.
        rests = (cooldown > 0) & (taught_at > 0) & (step - taught_at <= cooldown)
        counts = [len(demos.demonstrations(group.columns.get(self.settings.demo.key))) for group in groups]
        single = self.history.demo_uses(keys, np.array(counts, dtype=int)) if max(counts, default=0) > 1 else []
        return [
            Past(
                uses=int(uses[i]),
                cooling=bool(rests[i]),
                demo_uses=single[i] if counts[i] > 1 else [int(uses[i])],
                retire_after=self.settings.history.retire_after,
            )
            for i in range(len(groups))
        ]

    def remember(
        self,
        step: int,
        groups: Sequence,
        questions: Sequence[Question],
        read: Sequence[Sequence[tuple]],
        plan: Plan,
        counts: Counter,
    ) -> dict[str, float]:
        """Take in what a step did; the metrics ``hpt/history/*``.

        Args:
            read: (questions, demonstrations) tokens and columns of each demonstration, as the plan's rows index them.
        """
        taught = np.zeros(len(questions), dtype=bool)
        taught[plan.question[plan.kind == DEMO]] = True
        keys = history.numbers([group.key for group in groups])
        prompts = [
            history.prompt_number(group.source, messages) if (messages := _messages(group)) is not None else 0
            for group in groups
        ]
        draw = Draw(
            keys=keys,
            prompts=np.array(prompts, dtype=np.uint64),
            solved=np.array([each.sum() for each in plan.solved], dtype=int),
            rollouts=np.array([len(q.rewards) for q in questions], dtype=int),
            taught=taught,
            on_rl=np.array([decision.on > 0 for decision in plan.decisions], dtype=bool),
        )
        self.history.observe(step, draw)
        several = [len(demos.demonstrations(group.columns.get(self.settings.demo.key))) > 1 for group in groups]
        rows = [row for row in np.flatnonzero(plan.kind == DEMO) if several[plan.question[row]]]
        places = [read[plan.question[row]][plan.index[row]][1]["place"] for row in rows]
        self.history.observe_demos(keys[plan.question[rows]], np.array(places, dtype=int))

        spared = np.array([question.skipped_rollouts for question in questions], dtype=int)
        lengths = np.array([question.lengths.mean() if len(question.lengths) else 0.0 for question in questions])
        saved = float(np.dot(spared, lengths))  # a rollout more of a question is taken to be as long as those it has
        self.history.tokens_saved += saved
        return {
            **{f"hpt/history/{name}": float(n) for name, n in self.history.totals().items()},
            "hpt/history/retired": float(counts["history/retired"]),
            "hpt/history/cooling": float(counts["history/cooling"]),
            "hpt/history/early_gated": float((spared > 0).sum()),
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
        path, now = os.path.join(folder, FILE), self.history.depends
        if not os.path.exists(path):
            text = f"the checkpoint has no history of its questions ({path} does not exist)"
            self._start_empty(text, "Resume from a checkpoint that has it")
            return
        try:
            found = History.read(path)
        except OtherVersion as error:
            self._start_empty(str(error), "Resume with the verl-hpt that wrote it")
            return
        except UserError as error:
            raise UserError(f"{error}. Resume from another checkpoint, or delete this file") from None
        if changes := _identity_changes(found.depends["identity"], now["identity"]):
            text = f"{path}: {'; '.join(changes)}, so its questions cannot be found again"
            self._start_empty(text, "Set the old value back")
            return
        for change in _flag_changes(found.depends["flags"], now["flags"]):
            logger.warning("%s: %s; what it counts as solved till here is the old gate's", path, change)
        self.history, self.history.depends = found, now

    def _start_empty(self, why: str, remedy: str) -> None:
        """Warn and begin without a history; raise where settings depend on it and the user has not said so."""
        if self.matters and self.settings.history.on_missing == "error":
            raise UserError(
                f"{why}, and {', '.join(self.matters)} would act as if no question had been drawn before. {remedy}, or "
                "set hpt.history.on_missing=empty"
            )
        logger.warning("%s; it starts empty", why)


def _messages(group) -> list | None:
    return demos.plain(group.columns.get("raw_prompt"))
