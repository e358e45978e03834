"""One stored batch of every method: what the plan and the loss make of it, to be compared bit by bit across a change.

    python tests/stored_batch.py write FILE.npz      # on the code before
    python tests/stored_batch.py compare FILE.npz    # on the code after, on the same machine

Each method gets the same questions (solved, unsolved, cut at the length limit, with none, one and several
demonstrations; prefixes, a stream or a buffer where the method has them), log-probs, old and reference log-probs,
entropies and advantages, in float32, with and without entropy bonus and KL loss. Stored are the plan's rows and
weights, the loss, and its gradients on log-probs and entropies.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine.batches import announce, contents, jagged, model_output, random_case, row_batch, whole
from verl.trainer.ppo.core_algos import kl_penalty

from verl_hpt.gate import GateSettings
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.loss import ROW_FIELD, LossSpec
from verl_hpt.methods import METHODS
from verl_hpt.plan import PlanSettings

GROUPS = [([1, 0, 0, 1], 1), ([0, 0, 0, 0], 2), ([1, 1, 1, 1], 1), ([0, 0], 1), ([0, 0, 0], 0), ([0, 1, 0], 3), ([], 1)]
PREFIXES = [(0, 0, 2, 5), (3, 3, 0, 0), (1, 1, 4, 4), (0, 0), (2, 0, 7), (0, 3, 3), ()]  # where the method reads them
FIELDS = ("response_mask", "old_log_probs", "ref_log_prob", ROW_FIELD)


def made_of(name: str) -> dict[str, np.ndarray]:
    """Every number that the plan and the loss make of the stored questions, by name."""
    method, found = METHODS[name], {}
    groups = [(*group, own) for group, own in zip(GROUPS, PREFIXES, strict=True)]
    beside = {name: 3 for name in ("stream", "buffer") if method.place == name}
    case = random_case(11, groups if method.place == "prefix" else GROUPS, **beside)
    cut = np.array([False, True, False])
    case.questions[5] = dataclasses.replace(case.questions[5], truncated=cut)
    for off, truncated in ((None, "keep"), (0.4, "mask")):
        if truncated == "mask" and (method.rollouts is None or method.uses_critic):
            continue
        gate = GateSettings(off=off if method.when == "gate" else None)
        of_method = dataclasses.replace(method, off_zone=method.term("R")) if gate.off is not None else method
        settings = PlanSettings(
            of_method, method.normalization, 24.0, 0.3, gate, questions_per_step=4, ranks=2, truncated=truncated, seed=5
        )
        result, mark = case.planned(settings), f"{name}/{truncated}"
        for column in ("question", "kind", "index", "advantage", "reward", "correct", "tokens", "demo_tokens", "prefix",
                       "demo_advantage", "w_rl", "w_demo", "w_entropy", "step", "layout"):  # fmt: skip
            found[f"{mark}/{column}"] = getattr(result, column)
        draw = np.random.default_rng(3)
        rows = contents(case, result, result.layout)
        new = [[min(x + draw.normal(0, 0.5), -0.01) for x in row.old] for row in rows]
        batch = row_batch(case, result, result.layout, ref=True)
        batch["advantages"] = jagged(
            [torch.tensor(draw.normal(0, 1, len(r.answer)), dtype=torch.float32) for r in rows]
        )
        log_probs = whole(rows, new, torch.float32)
        entropies = torch.tensor(draw.uniform(0, 2, len(log_probs)), dtype=torch.float32)
        for added in ({}, {"entropy_coeff": 0.01, "kl_coef": 0.1}):
            if added and method.rollouts is None:
                continue
            leaves = [x.clone().requires_grad_() for x in (log_probs, entropies)]
            fields = (*FIELDS, "advantages") if method.uses_critic else FIELDS
            spec = LossSpec(of_method, fields=fields, kl_penalty=kl_penalty, **added)
            loss, _ = hpt_loss(model_output(batch, *leaves), announce(batch), spec=spec)
            loss.backward()
            of = f"{mark}/{'plain' if not added else 'with bonus and KL'}"
            found[f"{of}/loss"] = loss.detach().numpy()
            for leaf, what in zip(leaves, ("log_probs", "entropies"), strict=True):
                found[f"{of}/gradient on {what}"] = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).numpy()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "compare"))
    parser.add_argument("file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: numbers for method in METHODS for name, numbers in made_of(method).items()}
    if options.what == "write":
        np.savez(options.file, **found)
        print(f"{options.file}: {len(found)} arrays of {len(METHODS)} methods")
        return 0
    stored = np.load(options.file)
    differing = [name for name in stored.files if name not in found or stored[name].tobytes() != found[name].tobytes()]
    for name in differing:
        print(f"differs: {name}")
    print(f"{len(stored.files) - len(differing)} of {len(stored.files)} arrays of {len(METHODS)} methods are bit-equal")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
