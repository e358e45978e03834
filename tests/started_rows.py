"""Rollouts that started from a demonstration, as their agent loop leaves them: with a prefix, or with a hint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from batches import EOS, TOKENIZER, Rollouts, likelihood, updated

from verl_hpt.host.started import STARTED

DEMO = "abcdefgh"  # eight tokens, and EOS
HINT = "|hint"  # five tokens more in a prompt


class Started(Rollouts):
    """A step's rollouts, some of which started from a demonstration."""

    def begun(self, uid: str, sessions: Sequence[tuple], *, target=DEMO, place=0, missed=(), **columns) -> Started:
        """One question's rollouts. sessions: (score, tokens of the demonstration, own text) each; place: of that
        demonstration in the cell; missed: sessions that could not start as they should have."""
        demo = target[place] if isinstance(target, list) else target or ""
        for session, (score, length, own) in enumerate(sessions):
            own_mask = [1] * (len(own) + 1)
            told = {"tokens": length, "place": place, "missed": session in missed, "longer": 0}
            told = told if length or session in missed else None
            self.session(
                uid, session, score, f"{uid}:", demo[:length] + own, [0] * length + own_mask, target, columns, told
            )
        return self

    def hinted(self, uid: str, sessions: Sequence[tuple], *, target=DEMO, end=(EOS,), **columns) -> Started:
        """The same with hints: (score, whether it has one, text) each."""
        prompt = f"{uid}:"
        for session, (score, has, text) in enumerate(sessions):
            mask, told = [1] * (len(text) + len(end)), with_hint(prompt) if has else None
            self.session(uid, session, score, prompt + HINT if has else prompt, text, mask, target, columns, told, end)
        return self

    def session(self, uid, session, score, prompt, answer, mask, target, columns, told, end=(EOS,)) -> None:
        """One rollout. mask: of its whole response; told: what its agent loop said of its start, None: nothing."""
        said = torch.tensor([*TOKENIZER.encode(answer), *end])
        own = {
            "response_mask": torch.tensor(mask),
            "loss_mask": torch.tensor(mask),
            "extra_fields": {} if told is None else {STARTED: told},
            "raw_prompt": [{"role": "user", "content": f"{uid}:"}],
            "old_log_probs": (likelihood(said) - 0.25 * session).to(self.dtype),
        }
        self.row(f"{uid}_{session}_0", uid, score, answer, target, prompt, "src", own | columns, end)


def with_hint(prompt: str) -> dict:
    """What the agent loop tells of a rollout whose prompt has a hint. prompt: without it."""
    told = {"tokens": 0, "place": 0, "missed": False, "longer": len(HINT), "hint": 7}
    return told | {"prompt": TOKENIZER.encode(prompt)}


def with_n(n: int) -> str:
    return f"actor_rollout_ref.rollout.n={n}"


def by_key(meta, ranks) -> dict[str, dict]:
    """The update's rows by verl's key, ours by the text of their answer; in the order of these."""
    rows = zip(meta.keys, updated(ranks), strict=True)
    named = {TOKENIZER.decode(row["responses"]) if key.startswith("hpt") else key: row for key, row in rows}
    return dict(sorted(named.items()))
