"""Kill a real CPU training at random moments, resume it each time, and compare with one that was left alone.

    python tests/bench/kills.py FOLDER --kills 20 [--place stream | buffer] [--prefix "COMMAND BEFORE EACH TRAINING"]

Two starts more than kills, about a minute and a half each on two cores. Prints a line a kill: the moment, the step, and
whether each checkpoint since the last kill has the history (with --place also the stream or the buffer) that the
uninterrupted run had at that step.
"""

import argparse
import random
import shlex
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))

from cpu_run import Training, kill
from test_resume import BESIDE, OVERRIDES, rows, same_history

from verl_hpt.host.beside import FILE


def same(one: Training, other: Training, step: int) -> bool:
    """Whether two checkpoints remember the same."""
    stored = [(training.checkpoints / f"global_step_{step}" / FILE) for training in (one, other)]
    texts = [path.read_bytes() if path.exists() else b"" for path in stored]
    return same_history(one.history(step), other.history(step)) and texts[0] == texts[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150, help="of the uninterrupted run")
    parser.add_argument("--longest", type=float, default=15, help="seconds from a new start's first step to its kill")
    parser.add_argument("--place", choices=BESIDE, help="demonstrations beside the questions, in place of HPT's")
    parser.add_argument("--prefix", default="")
    options = parser.parse_args()
    prefix, draw = tuple(shlex.split(options.prefix)), random.Random()
    placed = OVERRIDES if options.place is None else BESIDE[options.place]
    overrides = [*placed, f"trainer.total_training_steps={options.steps}", "trainer.save_freq=2"]
    whole = Training(options.folder / "whole", rows(), overrides, prefix)
    if whole.checkpoint() < options.steps:
        whole.run(limit=3000)
    killed = Training(options.folder / "killed", rows(), overrides, prefix)
    good, compared = 0, 0
    for turn in range(options.kills):
        if killed.checkpoint() > options.steps / 2:  # from the beginning again, so that there is always more to compare
            shutil.rmtree(killed.checkpoints)
        resumed_from = killed.checkpoint()
        killed.metrics_file.unlink(missing_ok=True)  # verl's logger empties it at each start
        process = killed.start()
        start = time.monotonic()
        try:
            killed.wait_for(process, lambda: killed.logged() > 0, 1500)
            time.sleep(draw.uniform(0, options.longest))
        finally:
            kill(process)
        reached = killed.checkpoint()
        alike = [same(whole, killed, step) for step in range(resumed_from + 2, reached + 1, 2)]
        compared, good = compared + len(alike), good + all(alike)
        print(
            f"kill {turn + 1}: resumed from {resumed_from}, at {time.monotonic() - start:.1f} s after its start, "
            f"checkpoint {reached}: {sum(alike)} of {len(alike)} checkpoints identical",
            flush=True,
        )
    killed.run(f"trainer.total_training_steps={killed.checkpoint() + 4}", limit=2000)
    last = killed.checkpoint()
    print(f"last resume: step {last} identical: {same(whole, killed, last)}")
    print(f"{good} of {options.kills} kills; {compared} checkpoints compared")
    return 0 if good == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
