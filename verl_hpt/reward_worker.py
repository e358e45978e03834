"""The process that runs math-verify, one request a line; started by `verl_hpt.reward`, never imported by it.

A request is a JSON line `{"solution": str, "truth": str, "limit": seconds}`, the answer a JSON line
`{"score": 0.0 | 1.0}` or `{"score": 0.0, "error": str}`. The process bounds itself: it dies even when its parent
is gone or busy: an alarm with the system's default action ends it in the middle of C code, where a Python handler would
never run, and an address-space limit turns a memory blow-up into a MemoryError of this process alone.
"""

import contextlib
import re
import sys

_REASONS = {MemoryError: "out of memory", RecursionError: "nested too deeply"}
_PERCENT = re.compile(r"(?<=[\d}])\s*\\?%")


def _limit_memory(megabytes: int) -> None:
    """Bound the address space; platforms without the limit keep the time limit only."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        size = megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def grade(solution: str, truth: str) -> float:
    """1.0 where math-verify finds the solution's answer equal to the expected one, else 0.0.

    The timeouts of math-verify itself are off: this process has its own, harder one.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    boxed_first = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    gold = parse("\\boxed{" + truth + "}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
    if not gold or all(isinstance(g, str) for g in gold):
        gold = parse(truth, boxed_first, parsing_timeout=None) or gold
    answer = parse(solution, boxed_first, parsing_timeout=None)
    if gold and answer and verify(gold, answer, timeout_seconds=None):
        return 1.0
    bare = [_PERCENT.sub("", text) for text in (solution, truth)]
    # math-verify reads no percent sign inside a box: 62.5\\% equals 62.5 and 62.5% there.
    return grade(*bare) if bare != [solution, truth] else 0.0


def serve(memory_mb: int) -> None:
    """Answer requests from standard input until it closes."""
    import json
    import logging
    import os
    import signal

    requests = os.fdopen(os.dup(0), "r", encoding="utf-8", newline="\n")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    # What the libraries print must not mix with the answers.
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 0)
    os.dup2(quiet, 1)
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    grade("\\boxed{1}", "1")
    _limit_memory(memory_mb)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["limit"])
        last = False
        try:
            reply = {"score": grade(request["solution"], request["truth"])}
        except Exception as error:
            # math-verify and SymPy raise whatever a hostile expression provokes; the name goes back to the caller.
            why = next((text for kind, text in _REASONS.items() if isinstance(error, kind)), type(error).__name__)
            reply, last = {"score": 0.0, "error": why}, isinstance(error, MemoryError)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)
        if last:  # what is left of this process is too tight to trust: make room for a new one
            return


if __name__ == "__main__":
    # Started by path, so this folder stands first on the search path, where its `config.py` would shadow others'.
    sys.path.pop(0)
    serve(int(sys.argv[1]))
