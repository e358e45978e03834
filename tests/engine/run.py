"""Starts the ranks of ``engine.worker``, several worlds side by side, and reads what each wrote."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Hashable, Mapping
from pathlib import Path

import pytest
import torch

from engine.settings import VOCABULARY


def results_of(folder: Path, worlds: Mapping[Hashable, tuple[int, str]]) -> dict[Hashable, dict]:
    """worlds: name -> (ranks, layout of ``engine.worker.LAYOUTS``). -> name -> {(setting, cut): steps and metrics}"""
    _write_model(folder / "model")
    running = []
    for world, (ranks, layout) in worlds.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(ranks):
            log = open(folder / f"rank{rank} of {world}.log", "w+")  # noqa: SIM115 (read after the process ended)
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "VERL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [
                sys.executable,
                "-m",
                "engine.worker",
                str(folder / "model"),
                str(folder / f"{world}.pt"),
                layout,
            ]
            there = Path(__file__).parents[1]
            running.append((subprocess.Popen(command, cwd=there, env=environment, stdout=log, stderr=log), log))
    try:
        for process, log in running:
            if process.wait(timeout=600) != 0:
                log.seek(0)
                pytest.fail(f"{log.name} ended with {process.returncode}:\n" + "".join(log.readlines()[-30:]))
    finally:
        for process, log in running:
            process.kill()
            process.wait()
            log.close()
    return {world: torch.load(folder / f"{world}.pt", weights_only=False) for world in worlds}


def distance(gradient: torch.Tensor, reference: torch.Tensor) -> float:
    """‖Δg‖/‖g‖"""
    reference = reference.double()
    return ((gradient.double() - reference).norm() / reference.norm()).item()


def _write_model(path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
