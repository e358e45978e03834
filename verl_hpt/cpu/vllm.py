"""vLLM's side of the CPU backend, reached through vLLM's own plugin group `vllm.general_plugins`.

vLLM packs linear layers for its CPU kernels after loading and drops the weight and its loader. That is right for
serving; in training the trainer's weights arrive again after every step and find no loader.
"""

from verl_hpt import cpu


def register() -> None:
    """Replace vLLM's packing by a plain linear. Nothing unless `VERL_PLATFORM=cpu` and no accelerator is here."""
    if not cpu.requested() or cpu.accelerator() is not None:
        return
    from vllm.model_executor.layers import utils

    # vLLM's layers look the name up in `utils` each time they are loaded, so replacing it here reaches all of them.
    utils.dispatch_cpu_unquantized_gemm = plain_linear


def plain_linear(layer, remove_weight: bool) -> None:
    """What vLLM falls back to itself without oneDNN; the weight stays where its loader finds it."""
    import torch

    layer.cpu_linear = torch.nn.functional.linear
