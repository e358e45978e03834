"""Real CPU trainings of what the history and the sources' gates do, with rewards on record. Prints the figures.

    python tests/bench/lifecycle.py early FOLDER     # early gate, half of the questions hopeless: two runs
    python tests/bench/lifecycle.py sources FOLDER   # gates by source, three demonstrations a question: one run

A run takes about a minute to start and 2 to 4 s a step on two cores. ``--prefix`` stands before its command.
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))

from cpu_run import Training, question

from verl_hpt.history import History


def early(folder: Path, prefix: tuple[str, ...], steps: int = 40) -> None:
    """32 questions, 8 rollouts; even ones are solved more and more often from some step on, odd ones never."""
    rows = [
        question(i, {"rule": "never"} if i % 2 else {"rule": "rising", "step": i // 4}, "reverse", 1) for i in range(32)
    ]
    common = [
        "data.train_batch_size=16",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.rollout.n=8",
        f"trainer.total_training_steps={steps}",
        f"trainer.save_freq={steps}",
    ]
    graduated, sampled = {}, {}
    gate = "++hpt.history.early_gate={after_failures: 2, rollouts: 1}"
    for name, more in (("full", []), ("gated", [gate])):
        training = Training(folder / name, rows, [*common, *more], prefix)
        training.run(limit=1500)
        metrics = list(training.metrics().values())
        sampled[name] = sum(step["hpt/history/tokens_sampled"] for step in metrics)
        graduated[name] = set(History.read(str(training.history(steps))).listing("graduated")["key"].tolist())
        print(
            f"{name}: {sampled[name]:.0f} rollout tokens, estimated saved "
            f"{metrics[-1]['hpt/history/tokens_saved_total']:.0f}, {len(graduated[name])} questions graduated, "
            f"validation none, last solve rate {metrics[-1]['hpt/solve_rate']:.2f}"
        )
    print(f"saved: {1 - sampled['gated'] / sampled['full']:.1%}; same graduated: {len(set.union(*graduated.values()))}"
          f" in either, {graduated['full'] == graduated['gated']}")  # fmt: skip


def sources(folder: Path, prefix: tuple[str, ...], steps: int = 24) -> None:
    """Three sources with the same mix of chances and gates 0, 0.25 and 0.5; two of three demonstrations at a time."""
    names, gates = ("openai/gsm8k", "math", "code"), (0.0, 0.25, 0.5)
    rows = [question(i, {"rule": "random", "chance": (i // 3) % 8 / 8}, names[i % 3], 3) for i in range(48)]
    own = ",".join(f"{name}:{{gate:{{threshold:{gate}}}}}" for name, gate in zip(names, gates, strict=True))
    training = Training(
        folder / "sources",
        rows,
        [
            "data.train_batch_size=24",
            "actor_rollout_ref.actor.ppo_mini_batch_size=12",
            "actor_rollout_ref.rollout.n=8",
            f"++hpt.per_source={{{own}}}",
            "++hpt.demo={per_question: 2, select: unseen_first}",
            f"trainer.total_training_steps={steps}",
            f"trainer.save_freq={steps}",
        ],
        prefix,
    )
    training.run(limit=1500)
    metrics = training.metrics()
    from recorded_rewards import score

    expected = {name: [] for name in names}
    history = np.load(training.history(steps))
    print(f"{int(history['drawn'].sum())} draws of {len(history['keys'])} questions")
    for name, gate in zip(names, gates, strict=True):
        for row in rows:
            if row["data_source"] == name:
                extra = row["extra_info"]
                solved = [sum(score(extra, extra["index"], s, i) for i in range(8)) for s in range(1, steps + 1)]
                expected[name].append(np.mean([k <= gate * 8 for k in solved]))
        got = [
            step[f"hpt/source/{name}/demo_share"]
            for step in metrics.values()
            if f"hpt/source/{name}/demo_share" in step
        ]
        print(f"{name}: gate {gate}, on demonstrations {np.mean(got):.3f}, by the record over all steps "
              f"{np.mean(expected[name]):.3f}")  # fmt: skip
    taught = [round(step["hpt/taught_share"] * 24) for step in metrics.values()]
    rows_of_demos = [step["hpt/rows/demos"] for step in metrics.values()]
    exact = all(rows == 2 * questions for rows, questions in zip(rows_of_demos, taught, strict=True))
    print(f"two rows a demo question at every step: {exact} ({sum(taught)} questions, {sum(rows_of_demos):.0f} rows)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("early", "sources"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prefix", default="")
    options = parser.parse_args()
    {"early": early, "sources": sources}[options.what](options.folder, tuple(shlex.split(options.prefix)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
