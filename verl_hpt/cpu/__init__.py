"""verl on a machine without an accelerator: opt-in by verl's own switch `VERL_PLATFORM=cpu`.

`verl_hpt.plugin` calls `activate()` in every process that imports verl; vLLM calls `verl_hpt.cpu.vllm.register` in
every process of its own. Both do nothing unless `VERL_PLATFORM=cpu` is set, and refuse where an accelerator is.

What is set, registered or patched, why, and when it can go:

- a `PlatformBase` named "cpu" (`platform.py`): verl ships cuda, rocm and npu only. Until verl ships one.
- `VERL_ENGINE_DEVICE=cuda`, `VERL_ENGINE_VENDOR=nvidia` (here): FSDP engines are registered for cuda and npu only.
  Until verl registers them for the CPU.
- `VLLM_CPU_KVCACHE_SPACE=1`, GiB (here): vLLM would take a share of the machine's memory. The user's own value wins.
- `cpu:gloo,cpu:gloo` folded to one entry (`patches.py`): verl writes the device's backend beside the CPU's, and torch
  refuses a device named twice. Until verl folds it.
- the version of `vllm` read from `vllm-cpu` (`patches.py`): verl asks for a distribution called vllm. Until it asks the
  module.
- shared memory may close under live tensors (`patches.py`): on a CPU `.to(device)` does not copy. Until verl copies.
- the replay buffer polls every 0.1 s, not 2 s (`patches.py`): with a tiny model that poll is half of a step. Until verl
  has a setting for it.
- a critic loads with sdpa (`patches.py`): verl asks for flash attention 2 there, always. Until it reads its config.
- a reference model is not offloaded (`patches.py`): verl pins its memory, which needs an accelerator. Until verl asks
  the platform.
- a model that is saved to the CPU is copied (`patches.py`): `.cpu()` gives back the parameters themselves, and
  `separate_async` would compute π_old with the new weights. Until verl copies.
- a checkpoint engine over gloo (`checkpoint.py`): verl's others need an accelerator. Until verl ships one.
- `logger.info(…, flush=True)` without flush (`patches.py`): it raises in `separate_async`. Until verl 0.9.1 is gone.
- no weight packing in vLLM (`vllm.py`): packed layers lose their weight loader, so the second weight sync fails. Until
  vLLM can reload them.

Left to the recipe, as ordinary settings (`recipes/cpu_env.sh`): FSDP2, sdpa, no sleep mode, Ray's pretended slots.
"""

import os


def requested() -> bool:
    """Whether the user asked for the CPU backend, by verl's own `VERL_PLATFORM`."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def accelerator() -> str | None:
    """Name of an accelerator type that verl could use here ("cuda", "npu", "xpu"), or None.

    A device hidden from this process (`CUDA_VISIBLE_DEVICES=`) does not count: hiding it is how one insists on the CPU.
    """
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and found.type in ("cuda", "npu", "xpu") else None


def activate() -> None:
    """Make verl run on the CPU in this process. Idempotent; safe while verl itself is half imported.

    Where an accelerator is, nothing is patched: the platform "cpu" is registered as one that raises a readable error
    when verl asks for it, since verl swallows whatever its plugins raise.
    """
    if not requested():
        return
    from verl_hpt.cpu import platform

    device = accelerator()
    if device is not None:
        platform.register_refusal(device)
        return
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    os.environ.setdefault("VERL_ENGINE_VENDOR", "nvidia")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    platform.register()

    from verl_hpt.cpu import patches

    patches.apply()
