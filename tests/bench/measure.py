"""Measuring two ways of doing one thing, side by side on a machine that may be busy with other things."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch


def medians(ways: dict[str, Callable[[], object]], runs: int, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of each way. The ways take turns, so that what else the machine does falls on all of them.

    On a CPU it is the process's own CPU time, which waiting for a turn on a busy machine does not lengthen.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    taken: dict[str, list[float]] = {name: [] for name in ways}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warm_up + runs):
            for name, way in ways.items():
                _synchronize()
                start = clock()
                way()
                _synchronize()
                if turn >= warm_up:
                    taken[name].append(clock() - start)
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_bytes(way: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once while ``way`` runs, beside those alive before.

    On a CPU from the torch profiler's record of every allocation and release by torch's allocator (Python's own
    memory is not in it, and neither is what the C library keeps back); on a GPU from the caching allocator.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        way()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns of equal width, the first one to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
             for r in [head, *rows]]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
