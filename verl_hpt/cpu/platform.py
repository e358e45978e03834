"""verl's platform interface for a CPU: every accelerator call becomes a no-op or the CPU's own.

One CPU "device" is one slot of Ray's resource "GPU", which the run pretends with `ray_init.num_gpus=N`, so verl's
placement groups work unchanged.
"""

import types
from contextlib import nullcontext

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from verl_hpt.errors import UserError


def _memory(*_) -> tuple[int, int]:
    """(free, total) bytes of main memory, the two numbers `torch.cuda.mem_get_info` gives for a device."""
    import psutil

    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _device_module() -> types.ModuleType:
    """A `torch.cuda` look-alike: `torch.cpu` plus what verl calls on a device and torch.cpu does not have."""
    module = types.ModuleType("verl_hpt.cpu.device")
    vars(module).update({name: getattr(torch.cpu, name) for name in torch.cpu.__all__})
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *_: 0)
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device"):
        setattr(module, name, lambda *_: None)
    module.current_device = lambda: "cpu"
    module.get_device_name = lambda *_: "cpu"
    module.mem_get_info = _memory
    module.get_device_properties = lambda *_: types.SimpleNamespace(name="cpu", total_memory=_memory()[1])
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    module.manual_seed = module.manual_seed_all = torch.manual_seed
    return module


def _always(value=None):
    """A method that answers `value`, whatever it is asked."""
    return lambda self, *args, **kwargs: value


class PlatformCPU(PlatformBase):
    """The CPU as verl's device. `current_device()` is the string "cpu": the engines pass it to `.to()`."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    is_available = _always(True)
    is_platform_available = _always(False)  # never by verl's own detection: only VERL_PLATFORM=cpu chooses it
    current_device = _always("cpu")
    device_count = _always(1)
    get_device_capability = _always((None, None))
    communication_backend_name = _always("gloo")
    visible_devices_envvar = _always("CPU_VISIBLE_DEVICES")
    nvtx_range = _always(nullcontext())
    ray_resource_name = _always("GPU")
    is_ipc_supported = _always(False)  # weights go to vLLM through shared memory
    set_device = synchronize = empty_cache = set_allocator_settings = _always()
    profiler_start = profiler_stop = cudart = _always()

    def ray_noset_envvars(self):
        return []

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed


def register() -> None:
    """Register the platform "cpu". Once: verl logs every override."""
    if PlatformRegistry.get("cpu") is not PlatformCPU:
        PlatformRegistry.register("cpu")(PlatformCPU)


def register_refusal(device: str) -> None:
    """Register a platform "cpu" that raises UserError when verl creates it, naming the accelerator found."""

    class RefusedCPU(PlatformCPU):
        def __init__(self):
            raise UserError(
                f"VERL_PLATFORM=cpu, but this machine has an accelerator ({device}). Unset VERL_PLATFORM to use it, "
                "or hide it from the run (CUDA_VISIBLE_DEVICES=) to train on the CPU all the same."
            )

    PlatformRegistry.register("cpu")(RefusedCPU)
