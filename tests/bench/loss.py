"""Our loss against verl's ``ppo_loss`` on the same tensors, and every method against hpt.

    python tests/bench/loss.py [--runs 30] [--sizes 8x1024 32x4096] [--methods]

One micro-batch of mixed rows as the actor's worker gets it (jagged fields, log-probs of whole sequences), forward and
backward down to the gradient on the log-probs. The model's own forward and backward, far longer than either, are not in
it. Time is the median of interleaved runs; memory the most bytes of tensors alive at once (see measure.py).
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.batches import announce, jagged, model_output
from measure import medians, peak_bytes, table
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import kl_penalty
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.loss import ROW_COLUMNS, ROW_FIELD, LossSpec
from verl_hpt.methods import METHODS

PROMPT = 64
PREFIX = 64  # tokens of a demonstration that a rollout begins with, under the methods that read it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def micro_batch(rows: int, length: int, demos: float, seed: int = 0) -> tuple[TensorDict, torch.Tensor, torch.Tensor]:
    """Rows of 60 to 100% of ``length`` tokens, a share of them demonstrations; log-probs (a leaf) and entropies."""
    draw, random_rows = np.random.default_rng(seed), random.Random(seed)
    lengths = [int(length * random_rows.uniform(0.6, 1.0)) for _ in range(rows - 1)] + [length]
    is_demo = (np.arange(rows) < round(rows * demos)).astype(float)
    random_rows.shuffle(is_demo)
    advantage = draw.choice([-0.5, 0.5], rows) * (1 - is_demo)
    values = {
        "is_demo": is_demo,
        "w_rl": 1e-4 * (1 - is_demo),
        "w_demo": 1e-4 * is_demo,
        "w_entropy": 1e-4 * (1 - is_demo),
        "advantage": advantage,
        "reward": np.ones(rows),
        "correct": np.ones(rows),
        "other_log_prob": -np.ones(rows),
        "prefix": PREFIX * (1 - is_demo),
        "demo_advantage": 0.5 * np.ones(rows),
    }
    old = [torch.tensor(-draw.exponential(0.6, n), dtype=torch.float32) for n in lengths]
    near = [x + 0.15 * torch.randn(len(x)) for x in old]
    whole = [torch.ones(PROMPT + n, dtype=torch.int64) for n in lengths]
    masks = [torch.ones(n, dtype=torch.int64) for n in lengths]
    fields = {
        "prompts": [torch.ones(PROMPT, dtype=torch.int64) for _ in lengths],
        "responses": masks,
        "input_ids": whole,
        "response_mask": masks,
        "loss_mask": masks,
        "old_log_probs": old,
        "ref_log_prob": near,
        "advantages": [torch.full((n,), a, dtype=torch.float32) for n, a in zip(lengths, advantage, strict=True)],
        ROW_FIELD: [torch.tensor([values[c][i] for c in ROW_COLUMNS], dtype=torch.float32) for i in range(rows)],
    }
    batch = TensorDict({name: jagged(column) for name, column in fields.items()}, batch_size=rows).to(DEVICE)
    leaf = torch.cat([torch.cat([torch.full((PROMPT - 1,), -1.0), x, torch.tensor([-1.0])]) for x in near])
    entropy = torch.rand(len(leaf), device=DEVICE)
    return announce(batch), leaf.to(DEVICE).requires_grad_(), entropy


def ours(method: str, batch, leaf, entropy, **settings):
    """Forward and backward of our loss."""
    spec_of = METHODS[method]
    fields = ["response_mask", "old_log_probs", ROW_FIELD]
    if spec_of.uses_critic:
        fields.append("advantages")
    if "ref_log_prob" in spec_of.needs or settings.get("kl_coef"):
        fields.append("ref_log_prob")
    spec = LossSpec(spec_of, fields=tuple(fields), kl_penalty=kl_penalty, **settings)
    wanted = "entropy" in spec_of.needs or spec.entropy_coeff

    def step():
        leaf.grad = None
        loss, _ = hpt_loss(model_output(batch, leaf, entropy if wanted else None), batch, spec=spec)
        loss.backward()

    return step


def verls(batch, leaf, entropy, entropy_coeff: float = 0.0, kl: float = 0.0):
    """Forward and backward of verl's loss."""
    config = ActorConfig(
        strategy="fsdp2", rollout_n=8, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="seq-mean-token-sum-norm",
        loss_scale_factor=8192, entropy_coeff=entropy_coeff, use_kl_loss=bool(kl), kl_loss_coef=kl,
    )  # fmt: skip
    data = batch if kl else batch.exclude("ref_log_prob")

    def step():
        leaf.grad = None
        loss, _ = ppo_loss(config, model_output(batch, leaf, entropy if entropy_coeff else None), data)
        loss.backward()

    return step


def against_verl(sizes: list[tuple[int, int]], runs: int) -> str:
    """hpt next to verl's loss: plain, and with entropy bonus and KL loss."""
    rows = []
    for n, length in sizes:
        tensors = micro_batch(n, length, demos=0.25)
        for name, our_settings, verl_settings in (
            ("", {}, {}),
            (" entropy, KL", {"entropy_coeff": 0.001, "kl_coef": 0.001}, {"entropy_coeff": 0.001, "kl": 0.001}),
        ):
            ways = {"hpt": ours("hpt", *tensors, **our_settings), "verl": verls(*tensors, **verl_settings)}
            seconds = medians(ways, runs)
            memory = {way: peak_bytes(step) for way, step in ways.items()}
            rows.append([
                f"{n} rows x {length}{name}", *(f"{1e3 * seconds[way]:.2f}" for way in ways),
                f"{seconds['hpt'] / seconds['verl']:.2f}", *(f"{memory[way] / 2**20:.2f}" for way in ways),
                f"{memory['hpt'] / memory['verl']:.2f}",
            ])  # fmt: skip
    return table(["micro-batch", "hpt ms", "verl ms", "ratio", "hpt MiB", "verl MiB", "ratio"], rows)


def every_method(size: tuple[int, int], runs: int) -> str:
    """The loss of every method next to hpt's."""
    tensors = micro_batch(*size, demos=0.25)
    ways = {name: ours(name, *tensors) for name in METHODS}
    seconds = medians(ways, runs)
    memory = {way: peak_bytes(step) for way, step in ways.items()}
    rows = [
        [
            name,
            f"{1e3 * seconds[name]:.2f}",
            f"{seconds[name] / seconds['hpt']:.2f}",
            f"{memory[name] / memory['hpt']:.2f}",
        ]
        for name in METHODS
    ]
    return table([f"loss at {size[0]} rows x {size[1]}", "ms", "time / hpt", "memory / hpt"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--sizes", nargs="+", default=["8x1024", "32x1024", "8x4096", "32x4096"], help="ROWSxTOKENS")
    parser.add_argument("--methods", action="store_true", help="every method against hpt too")
    args = parser.parse_args()
    torch.set_num_threads(1)  # CPU time counts every thread's
    sizes = [tuple(int(part) for part in size.split("x")) for size in args.sizes]
    print(f"{DEVICE}, medians of {args.runs} runs, forward and backward of the loss\n")
    print(against_verl(sizes, args.runs))
    if args.methods:
        print("\n" + every_method(sizes[-1], args.runs))


if __name__ == "__main__":
    main()
