"""Commands and launch scripts as users have them, for the tests of `verl-hpt check-run`."""

import shlex
from pathlib import Path

MAIN = "verl.trainer.main_ppo"
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
# A launch line as verl's documentation has them.
USUAL = [
    "data.train_batch_size=64", "data.max_prompt_length=512", "data.max_response_length=1024",
    "actor_rollout_ref.model.path=Qwen/Qwen3-0.6B", f"{ACTOR}.optim.lr=1e-6", f"{ACTOR}.ppo_mini_batch_size=32",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=4", f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.n=8",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4", "trainer.n_gpus_per_node=1", "trainer.logger=console",
]  # fmt: skip
HPT, REF = "algorithm.adv_estimator=hpt", "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=1"


def usual(*overrides: str) -> list[str]:
    return ["python3", "-m", MAIN, *USUAL, *overrides]


def script(folder: Path, text: str, name: str = "run.sh") -> str:
    (folder / name).write_text(text)
    return name


LAUNCH = f"python3 -m {MAIN} {shlex.join(USUAL)} "
