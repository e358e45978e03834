"""One rank of verl's own training worker (FSDP2, gloo) on a tiny model: the gradient of every case, nothing else.

    python -m engine.worker MODEL OUT LAYOUT   with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and VERL_PLATFORM=cpu

Rank 0 writes OUT: {(setting, cut): {steps: [{gradient: (parameters,), active: tokens of each micro-batch of each rank}
per optimizer step], metrics: verl's}}.
The optimizer's own step is left out, so that all steps start from the same parameters.
"""

from __future__ import annotations

import math
import os
import sys
from functools import partial

import numpy as np
import torch
import verl  # noqa: F401  (activates the plugin's CPU platform)
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.core_algos import kl_penalty
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from engine import ulysses
from engine.batches import Case, contents, random_case, row_batch
from engine.settings import CUTS, SETTINGS, VOCABULARY, Cut, Setting
from verl_hpt.gate import GateSettings
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.loss import ROW_FIELD, LossSpec
from verl_hpt.methods import METHODS
from verl_hpt.plan import Plan, PlanSettings

# How verl's engine holds a batch and a model: of its model and engine config; and the settings and cuts that are run
# beside those of one rank, where not all are.
LAYOUTS = {
    "padded": ({}, {}),
    "packed": ({"use_remove_padding": True}, {}),
    "ulysses": (
        {"use_remove_padding": True, "override_config": {"attn_implementation": ulysses.NAME}},
        {"ulysses_sequence_parallel_size": 2},
    ),
    "ulysses without its exchange": ({"use_remove_padding": True}, {"ulysses_sequence_parallel_size": 2}),
    "lora": ({"lora_rank": 8, "lora_alpha": 16, "target_modules": "all-linear"}, {}),
}


def worker_on(model: str, layout: str = "padded") -> TrainingWorker:
    """verl's training worker of this rank, its model in float32, its optimizer's step left out."""
    of_model, of_engine = LAYOUTS[layout]
    torch.manual_seed(0)  # adapters are made at random
    fp32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=model,
                load_tokenizer=False,
                enable_gradient_checkpointing=False,
                **{"use_remove_padding": False, "override_config": {"attn_implementation": "sdpa"}, **of_model},
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2", model_dtype="fp32", mixed_precision=fp32, use_torch_compile=False, **of_engine
            ),
            optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=1000),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    return worker


def whole_gradient(module: torch.nn.Module) -> torch.Tensor:
    """The gradient over all ranks' shards. -> (parameters,)"""
    parts = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, f"{name} has no gradient: the loss was not on the graph"
        grad = parameter.grad
        parts.append((grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().reshape(-1).clone())
    return torch.cat(parts)


def planned(setting: Setting, ranks: int) -> tuple[Case, Plan]:
    method = METHODS[setting.method]
    case = random_case(
        7, list(setting.groups), vocabulary=VOCABULARY, level=-math.log(VOCABULARY), stream=setting.stream,
        buffer=setting.buffer,
    )  # fmt: skip
    settings = PlanSettings(
        method, setting.normalization or method.normalization, 16.0, 0.3, GateSettings(), ranks=ranks,
        questions_per_step=setting.questions_per_step, rows_multiple=setting.rows // ranks,
    )  # fmt: skip
    result = case.planned(settings)
    assert result.rows_per_step == setting.rows, "the same rows a step on every number of ranks"
    return case, result


def rank_batch(setting: Setting, cut: Cut, rank: int, ranks: int) -> TensorDict:
    """The rows of one rank's whole update, as verl's dispatch cuts them: a contiguous chunk of the layout."""
    case, result = planned(setting, ranks)
    chunk = result.layout.reshape(ranks, -1)[rank]
    batch = row_batch(case, result, chunk, ref=bool(setting.kl_coef), temperature=setting.temperature)
    lengths = np.array([len(row.prompt) + len(row.answer) for row in contents(case, result, result.layout)])
    heaviest = lengths.reshape(ranks, result.steps, -1).sum(-1).max()
    info = {
        "mini_batch_size": result.rows_per_step,
        "epochs": 1,
        "dataloader_kwargs": {"shuffle": False},
        "calculate_entropy": "entropy" in METHODS[setting.method].needs or setting.entropy_coeff != 0,
        "use_dynamic_bsz": cut.dynamic,
        "micro_batch_size_per_gpu": result.rows_per_step // ranks // cut.count,
        # Rows cannot be split: a budget of exactly a part of the tokens would give more parts than wanted.
        "max_token_len_per_gpu": max(int(lengths.max()), -(-int(heaviest) // cut.count) + 3),
    }
    if setting.temperature == 1.0:
        info["temperature"] = 1.0
    tu.assign_non_tensor(batch, **info)
    return batch


def loss_of(setting: Setting):
    fields = ("response_mask", "old_log_probs", ROW_FIELD, *(["ref_log_prob"] if setting.kl_coef else []))
    return partial(
        hpt_loss,
        spec=LossSpec(
            METHODS[setting.method], fields=fields, entropy_coeff=setting.entropy_coeff, kl_coef=setting.kl_coef,
            kl_penalty=kl_penalty,
        ),
    )  # fmt: skip


def main(model: str, out: str, layout: str) -> None:
    torch.set_num_threads(1)
    ulysses.install()
    worker = worker_on(model, layout)
    world, rank, ranks = (
        int(os.environ["WORLD_SIZE"]), worker.engine.get_data_parallel_rank(), worker.engine.get_data_parallel_size(),
    )  # fmt: skip
    steps, seen = [], []

    def record():
        of_ranks = [None] * world
        torch.distributed.all_gather_object(of_ranks, seen)
        steps.append({"gradient": whole_gradient(worker.engine.module), "active": of_ranks})
        seen.clear()
        return 0.0

    worker.engine.optimizer_step = record
    forward = worker.engine.forward_step

    def count(micro_batch, **arguments):
        seen.append(int(micro_batch["loss_mask"].values().sum()))
        return forward(micro_batch, **arguments)

    worker.engine.forward_step = count
    results = {}
    for name, setting in SETTINGS.items():
        for cut_name, cut in CUTS.items():
            if cut.count > setting.rows // ranks or (layout != "padded" and cut.count not in (1, 4)):
                continue
            steps.clear()
            worker.set_loss_fn(loss_of(setting))
            output = worker.train_mini_batch(rank_batch(setting, cut, rank, ranks))
            metrics = None if output is None else dict(tu.get(output, "metrics"))
            results[name, cut_name] = {"steps": list(steps), "metrics": metrics}
    if int(os.environ["RANK"]) == 0:
        torch.save(results, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
