"""A reward manager for verl whose scores are on record: they depend on the question, the step and the session alone.

Rollouts differ from run to run; with these scores the gates of two runs can be compared. Chosen with
``reward.reward_manager.source=importlib``. The record is a rule in the question's ``extra_info``:

- ``{"rule": "random", "chance": p}``: solved with chance p, by a hash of question, step and session;
- ``{"rule": "rising", "step": s}``: the same, with a chance that rises from 0 at step s by 0.05 a step, up to 0.9;
- ``{"rule": "never"}``.

With ``"lost": i`` beside it, session i of the question fails: its reward raises, and the group comes back without it.
"""

import hashlib

from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager


def score(rule: dict, index: int, step: int, session: int) -> float:
    if rule["rule"] == "never":
        return 0.0
    chance = rule["chance"] if rule["rule"] == "random" else min(max(0.05 * (step - rule["step"]), 0.0), 0.9)
    digest = hashlib.blake2b(f"{index} {step} {session}".encode(), digest_size=8).digest()
    return float(int.from_bytes(digest, "big") < chance * 2**64)


class RecordedRewards(NaiveRewardManager):
    """Scores by the record; the answer is not looked at."""

    async def run_single(self, data):
        row = data[-1:].non_tensor_batch
        rule = row["extra_info"][0]
        if int(row["session_id"][0]) == rule["lost"]:
            raise RuntimeError("this session is on record as lost")
        reward = score(rule, int(rule["index"]), int(row["global_steps"][0]), int(row["session_id"][0]))
        return {"reward_score": reward, "reward_extra_info": {"acc": reward}}
