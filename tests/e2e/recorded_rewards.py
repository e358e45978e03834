"""A reward manager for verl whose scores are on record: they depend on the question, the step and the session alone.

Rollouts differ from run to run; with these scores the gates of two runs can be compared. Chosen with
``reward.reward_manager.source=importlib``. The record is a rule in the question's ``extra_info``:

- ``{"rule": "random", "chance": p}``: solved with chance p, by a hash of question, step and session;
- ``{"rule": "from_step", "step": s}``: no rollout is solved before step s, every one from then on;
- ``{"rule": "never"}``.
"""

import hashlib

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase


def score(rule: dict, index: int, step: int, session: int) -> float:
    if rule["rule"] == "from_step":
        return float(step >= rule["step"])
    if rule["rule"] == "never":
        return 0.0
    digest = hashlib.blake2b(f"{index} {step} {session}".encode(), digest_size=8).digest()
    return float(int.from_bytes(digest, "big") < rule["chance"] * 2**64)


class RecordedRewards(RewardManagerBase):
    """Scores by the record; the answer is not looked at."""

    async def run_single(self, data):
        row = data[-1:].non_tensor_batch
        rule = row["extra_info"][0]
        reward = score(rule, int(rule["index"]), int(row["global_steps"][0]), int(row["session_id"][0]))
        return {"reward_score": reward, "reward_extra_info": {"acc": reward}}
