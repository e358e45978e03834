"""What trainers with rollout servers of their own need on a CPU: a gloo checkpoint engine, and copies of weights."""

import asyncio
import logging
import multiprocessing
import socket
import types

import pytest
import torch
from test_cpu import python

WEIGHTS = [
    ("embed", torch.arange(12, dtype=torch.float32).reshape(3, 4)),
    ("norm", torch.tensor([1.5, -2.0], dtype=torch.bfloat16)),
    ("transposed", torch.arange(6, dtype=torch.float64).reshape(2, 3).T),  # not contiguous
    ("scalar", torch.tensor(7, dtype=torch.int64)),
    ("empty", torch.zeros(0, 5)),
]


def take_part(rank: int, world: int, port: int, answers) -> None:
    """One process: the actor's first rank sends twice, the others receive."""
    from verl_hpt.cpu.checkpoint import GlooCheckpointEngine

    engine = GlooCheckpointEngine(1 << 20, is_master=rank == 0)
    engine.init_process_group(rank, world, ("127.0.0.1", port))

    async def received():
        return [(name, tensor) async for name, tensor in engine.receive_weights(1)]

    for turn in range(2):
        if rank == 0:
            sent = [(name, tensor + turn) for name, tensor in WEIGHTS]
            asyncio.run(engine.send_weights(iter(sent), 1))
        else:
            answers.put((rank, turn, [(n, t.dtype, t.tolist(), tuple(t.shape)) for n, t in asyncio.run(received())]))
    engine.finalize()


def test_every_rollout_rank_gets_every_weight_bit_for_bit_again_and_again():
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = context.Queue()
    processes = [context.Process(target=take_part, args=(rank, 3, port, answers)) for rank in range(3)]
    for process in processes:
        process.start()
    got = [answers.get(timeout=120) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert {(rank, turn) for rank, turn, _ in got} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    for _, turn, weights in got:
        wanted = [(n, t.dtype, (t + turn).tolist(), tuple(t.shape)) for n, t in WEIGHTS]
        assert weights == wanted


def test_the_actors_other_ranks_take_part_in_the_export_and_send_nothing():
    from verl_hpt.cpu.checkpoint import OUTSIDE, GlooCheckpointEngine

    actor, rollout = GlooCheckpointEngine.build_topology(3, 2, [("host", 5), None, None])
    assert actor == {"rank": [0, OUTSIDE, OUTSIDE], "world_size": [3] * 3, "master": [("host", 5)] * 3}
    assert rollout == {"rank": [1, 2], "world_size": [3] * 2, "master": [("host", 5)] * 2}
    engine, seen = GlooCheckpointEngine(1), []
    engine.init_process_group(OUTSIDE, 3, ("nowhere", 1))
    asyncio.run(engine.send_weights(seen.append(pair) or pair for pair in WEIGHTS))
    assert len(seen) == len(WEIGHTS) and engine.prepare() is None


def test_gloo_is_in_verls_registry_on_the_cpu_alone():
    code = "from verl.checkpoint_engine import CheckpointEngineRegistry as r; print('gloo' in r._registry)"
    assert python(code, VERL_PLATFORM="cpu").stdout.strip() == "True"
    assert python(code, VERL_PLATFORM=None).stdout.strip() == "False"


def test_what_is_saved_to_the_cpu_does_not_change_with_the_model():
    code = """
import os, torch
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import verl
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from verl.utils import fsdp_utils
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = torch.nn.Linear(3, 2)
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
before = model.weight.full_tensor().clone()
state, spec = fsdp_utils.fsdp2_sharded_save_to_cpu(model)
with torch.no_grad():
    model.weight._local_tensor.add_(1.0)
fsdp_utils.fsdp2_sharded_load_from_cpu(model, state, spec)
print(torch.equal(model.weight.full_tensor(), before))
"""
    done = python(code, VERL_PLATFORM="cpu")
    assert done.stdout.strip() == "True", done.stderr
    # Without the patch what was saved is the parameters themselves: when this fails, verl copies and the patch can go.
    undone = (
        "import verl.utils.fsdp_utils as f; f.fsdp2_sharded_save_to_cpu = f.fsdp2_sharded_save_to_cpu.__wrapped__\n"
    )
    assert python(undone + code, VERL_PLATFORM="cpu").stdout.strip() == "False"


def test_a_logger_that_is_told_to_flush_logs(caplog):
    from verl_hpt.cpu import patches

    trainer = types.SimpleNamespace(logger=logging.getLogger("told_to_flush"))
    with caplog.at_level(logging.INFO):
        with pytest.raises(TypeError, match="flush"):
            trainer.logger.info("never", flush=True)
        patches.loggers_do_not_flush(trainer)
        trainer.logger.info("once", flush=True)
    assert caplog.messages == ["once"]
