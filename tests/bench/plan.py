"""Gate, plan and writing rows against verl's own ``_compute_advantage``, on one batch in a real TransferQueue.

    python tests/bench/plan.py [--questions 1024] [--rollouts 8] [--tokens 4096] [--runs 5] [--method hpt] [--profile]

Rollouts stand in TransferQueue as verl's agent loop leaves them (SimpleStorage, verl's settings). In turns, verl's
``PPOTrainer._compute_advantage`` reads, computes and writes back, and our ``_plan_step`` and ``_write`` read, decide,
plan, write demonstrations, padding and our column, and clear what they wrote. Both run as methods of one trainer that
has everything they touch and no workers. Seconds are wall time, medians over the turns, with the driver's own CPU time
beside them; memory is by how much the driver's resident set grows at most during the call. The default takes about
6 GiB. The last line is the share of real tokens in an update at 1024-token responses, from the plan alone.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import gc
import logging
import os
import pstats
import statistics
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TQ_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import numpy as np
import ray
import torch
import transfer_queue as tq
from hydra import compose, initialize_config_module
from measure import table
from omegaconf import OmegaConf, open_dict
from quickstart_task import byte_tokenizer
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import kl_penalty
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_hpt.host import contract
from verl_hpt.host.run import Run
from verl_hpt.host.started import STARTED
from verl_hpt.host.trainer import hybrid
from verl_hpt.methods import METHODS
from verl_hpt.plan import PADDING, PlanSettings, Question, plan

PARTITION, RANKS, PROMPT = "train", 8, 128


def verl_config(args, method: str):
    """verl's own config, composed as ``main_ppo`` composes it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                "algorithm.adv_estimator=hpt",
                f"data.max_response_length={args.tokens}",
                f"actor_rollout_ref.rollout.n={args.rollouts}",
                f"actor_rollout_ref.actor.ppo_mini_batch_size={max(args.questions // 2, 1)}",
                "actor_rollout_ref.actor.use_dynamic_bsz=True",
                "transfer_queue.backend.SimpleStorage.num_data_storage_units=2",
                f"++hpt.method={method}",
                *(["++hpt.stream={files: made, batch: 256}"] if METHODS[method].place == "stream" else []),
            ],
        )
    return config


def trainer_without_workers(config):
    """Our trainer over verl's, with what the measured methods touch and nothing else."""
    trainer = object.__new__(hybrid(PPOTrainerSync))
    trainer.config, trainer.global_steps = config, 1
    trainer.hpt = Run(config, verl=contract.check(), kl_penalty=kl_penalty, has_reference=False, has_critic=False)
    trainer.hpt.bind_tokenizer(byte_tokenizer())
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": list(range(RANKS))})
    if trainer.hpt.method.place == "stream":
        tokenizer, most = trainer.hpt.reader.tokenizer, trainer.hpt.reader.max_length
        made = [columns_of(number, most) for number in range(4096)]
        prompt_of = lambda messages: tokenizer.encode(messages[0]["content"])  # noqa: E731
        trainer.hpt.beside.open_stream(made, prompt_of, trainer.hpt.reader)
    return trainer


def columns_of(number: int, tokens: int) -> dict:
    """A question's dataset columns; its demonstration has about half as many tokens as a rollout."""
    return {
        "data_source": "bench",
        "extra_info": {"index": number, "split": "train"},
        "raw_prompt": [{"role": "user", "content": f"question {number}"}],
        "target": f"{number} " * (tokens // 10),
    }


def fill(args, hpt: Run) -> KVBatchMeta:
    """Rollouts of every question in TransferQueue; half of the questions are solved by some rollout.

    Where the method has prefixes, as many sessions as it says begin with 60% of their demonstration.
    """
    draw, keys, tags = np.random.default_rng(0), [], []
    prefixes, begun = hpt.method.place == "prefix", hpt.beside.start.rollouts
    for number in range(args.questions):
        uid, prompt = str(uuid.uuid4()), torch.tensor(draw.integers(0, 250, PROMPT))
        columns = {"uid": uid, **columns_of(number, args.tokens), "multi_modal_inputs": {}, "extra_fields": {}}
        demo = hpt.reader.tokenizer.encode(columns["target"].strip(), add_special_tokens=False) if prefixes else []
        rows = []
        for session in range(args.rollouts):
            answer = torch.tensor(draw.integers(0, 250, args.tokens))
            ones, length = torch.ones_like(answer), 0
            if prefixes and (begun == "all" or session < begun):
                length = int(0.6 * len(demo))
                answer[:length], ones[:length] = torch.tensor(demo[:length]), 0
                columns = {**columns, "extra_fields": {STARTED: {"tokens": length, "place": 0, "missed": False}}}
            else:
                columns = {**columns, "extra_fields": {}}
            whole = torch.cat([prompt, answer])
            scores = torch.zeros(args.tokens)
            scores[-1] = float(number % 2 and draw.random() < 0.5)
            log_probs = torch.full((args.tokens,), -0.5)
            rows.append(
                columns
                | {"prompts": prompt, "responses": answer, "input_ids": whole, "position_ids": torch.arange(len(whole))}
                | {"response_mask": ones, "loss_mask": ones, "rm_scores": scores}
                | {"rollout_log_probs": log_probs, "old_log_probs": log_probs + 0.01}
            )
            keys.append(f"{uid}_{session}_0")
            tags.append({"status": "success", "seq_len": len(whole), "response_len": args.tokens, "global_steps": 1})
        tq.kv_batch_put(
            keys[-args.rollouts :], PARTITION, fields=list_of_dict_to_tensordict(rows), tags=tags[-args.rollouts :]
        )
    return KVBatchMeta(partition_id=PARTITION, keys=keys, tags=tags, extra_info={})


def verls(trainer, batch) -> dict[str, float]:
    """verl's own method, with GRPO's estimator."""
    with open_dict(trainer.config):
        trainer.config.algorithm.adv_estimator = "grpo"
    start = time.perf_counter()
    PPOTrainer._compute_advantage(trainer, batch, {})
    return {"all": time.perf_counter() - start}


def ours(trainer, batch) -> dict[str, float]:
    """Everything that we add to a step before and after verl's update."""
    marks, written = [time.perf_counter()], []
    step = trainer._plan_step(batch, trainer.hpt.plan_settings(1, RANKS))
    marks.append(time.perf_counter())
    trainer._write(batch, step, written)
    marks.append(time.perf_counter())
    if written:
        tq.kv_clear(keys=written, partition_id=PARTITION)
    marks.append(time.perf_counter())
    parts = dict(zip(("read, gate, plan", "write", "clear"), np.diff(marks), strict=True))
    return parts | {"all": marks[-1] - marks[0]}


def peak_of(way, trainer, batch) -> float:
    """Bytes that the driver's resident set grows by at most (Linux: the kernel's own high-water mark, reset before)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = _status("VmRSS")
    way(trainer, batch)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def measure(trainer, batch, runs: int) -> str:
    """A table of both ways, taking turns."""
    ways = {"verl: _compute_advantage": verls, "hpt: gate, plan, write, clear": ours}
    seconds: dict[str, list[dict]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(runs + 1):
        for name, way in ways.items():
            gc.collect()
            start = time.process_time()
            taken = way(trainer, batch)
            if turn:  # the first turn opens connections
                cpu[name].append(time.process_time() - start)
                seconds[name].append(taken)
    memory = {name: peak_of(way, trainer, batch) for name, way in ways.items()}
    first, second = ways
    rows = []
    for name in ways:
        middle = {part: statistics.median(t[part] for t in seconds[name]) for part in seconds[name][0]}
        rows.append(
            [name, f"{middle.pop('all'):.2f}", f"{statistics.median(cpu[name]):.2f}", f"{memory[name] / 2**20:.0f}"]
        )
        rows.extend([f"    {part}", f"{value:.2f}", "", ""] for part, value in middle.items())
    ratio = [statistics.median(t["all"] for t in seconds[name]) for name in (second, first)]
    spent = [statistics.median(cpu[name]) for name in (second, first)]
    rows.append(
        ["ratio", f"{ratio[0] / ratio[1]:.2f}", f"{spent[0] / spent[1]:.2f}", f"{memory[second] / memory[first]:.2f}"]
    )
    return table(["", "seconds", "driver's CPU seconds", "peak MiB"], rows)


def real_tokens(method: str = "hpt") -> float:
    """Share of tokens in an update that are not padding rows'.

    128 questions x 8 rollouts of about 1024 tokens, half of the questions on demonstrations, 8 ranks, 2 steps;
    the worst of three micro-batch sizes.
    """
    draw = np.random.default_rng(0)
    questions = [
        Question(
            f"q{i}", np.array([float(i % 2), *[0.0] * 7]), draw.integers(512, 1536, 8),
            demo_lengths=draw.integers(512, 1536, 1), demo_rewards=np.ones(1),
        )
        for i in range(128)
    ]  # fmt: skip
    worst = 1.0
    for micro_batch in (1, 4, 8):
        settings = PlanSettings(
            METHODS[method], "question", 8192.0, questions_per_step=64, ranks=RANKS, rows_multiple=micro_batch
        )
        result = plan(questions, settings)
        padding = 2 * int((result.layout == PADDING).sum())
        real = int(result.tokens.sum()) + PROMPT * len(result)
        worst = min(worst, real / (real + padding))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1024)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each response")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--method", default="hpt")
    parser.add_argument("--profile", action="store_true", help="where our own time goes, function by function")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    config = verl_config(args, args.method)
    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="error")
    tq.init(OmegaConf.create(OmegaConf.to_container(config.transfer_queue, resolve=True)))
    try:
        trainer = trainer_without_workers(config)
        batch = fill(args, trainer.hpt)
        print(f"\n{args.questions} questions x {args.rollouts} rollouts x {args.tokens} tokens, medians of {args.runs}")
        print(measure(trainer, batch, args.runs))
        if args.profile:
            profile = cProfile.Profile()
            profile.runcall(ours, trainer, batch)
            pstats.Stats(profile).sort_stats("cumtime").print_stats(45)
    finally:
        tq.close()
        ray.shutdown()
    print(f"\nreal tokens in an update at 1024-token responses: {100 * real_tokens(args.method):.2f}% (at worst)")


if __name__ == "__main__":
    main()
