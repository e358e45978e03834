"""A checkpoint engine over gloo: it carries the actor's weights to rollout servers of their own (`separate_async`).

verl ships engines for NCCL, NIXL, HCCL and others, each for an accelerator. In verl's own registry this is "gloo":
`actor_rollout_ref.rollout.checkpoint_engine.backend=gloo`.
"""

from __future__ import annotations

import datetime
import pickle

import ray
import torch
import torch.distributed as dist
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.utils.net_utils import get_free_port
from verl.workers.rollout.utils import ensure_async_iterator

PATIENCE = datetime.timedelta(minutes=5)
OUTSIDE = -1  # rank of the actor's other processes: they take part in the export, and send nothing


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """The actor's first rank broadcasts one tensor after another; every rollout rank receives them."""

    def __init__(self, bucket_size: int, is_master: bool = False, **_):
        self.is_master, self.group, self.rank = is_master, None, OUTSIDE

    def prepare(self) -> tuple[str, int] | None:
        """Address of the rendezvous, from the master alone."""
        if not self.is_master:
            return None
        address = ray.util.get_node_ip_address().strip("[]")
        return address, get_free_port(address)[0]

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list):
        """Arguments of ``init_process_group`` for each actor and each rollout rank, as lists by name."""
        world = 1 + rollout_world_size

        def of(ranks: list[int]) -> dict[str, list]:
            return {"rank": ranks, "world_size": [world] * len(ranks), "master": [metadata[0]] * len(ranks)}

        return of([0] + [OUTSIDE] * (actor_wg_world_size - 1)), of(list(range(1, world)))

    def init_process_group(self, rank: int, world_size: int, master: tuple[str, int]) -> None:
        self.rank = rank
        if rank != OUTSIDE:
            store = dist.TCPStore(*master, world_size, is_master=rank == 0, timeout=PATIENCE)
            self.group = dist.ProcessGroupGloo(store, rank, world_size, PATIENCE)

    def finalize(self) -> None:
        self.group = None

    async def send_weights(self, weights, global_steps: int | None = None) -> dict:
        """Broadcast every (name, tensor), then an empty message. All actor ranks iterate: the export is collective."""
        async for name, weight in ensure_async_iterator(weights):
            if self.rank == 0:
                weight = weight.detach().contiguous().cpu()
                self._announce(pickle.dumps((name, weight.shape, weight.dtype)))
                self._broadcast(weight.view(-1).view(torch.uint8))
        if self.rank == 0:
            self._announce(b"")
        return {}

    async def receive_weights(self, global_steps: int | None = None):
        while size := int(self._broadcast(torch.zeros(1, dtype=torch.int64))):
            header = self._broadcast(torch.empty(size, dtype=torch.uint8))
            name, shape, dtype = pickle.loads(header.numpy().tobytes())
            flat = self._broadcast(torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8))
            yield name, flat.view(dtype).view(shape)

    def _announce(self, message: bytes) -> None:
        self._broadcast(torch.tensor([len(message)]))
        if message:
            self._broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8))

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self.group.broadcast([tensor], options).wait()
        return tensor
