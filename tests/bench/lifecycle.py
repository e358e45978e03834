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
from recorded_rewards import score

from verl_hpt.history import History, prompt_number


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
        "++hpt.gate.finished=false",  # the rewards are on record, whatever is said and however it ends
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
            f"last solve rate {metrics[-1]['hpt/solve_rate']:.2f}"
        )
    print(f"saved: {1 - sampled['gated'] / sampled['full']:.1%}; same graduated: {len(set.union(*graduated.values()))}"
          f" in either, {graduated['full'] == graduated['gated']}")  # fmt: skip


def sources(folder: Path, prefix: tuple[str, ...], steps: int = 24) -> None:
    """Three sources with the same mix of chances and gates 0, 0.25 and 0.5; two of three demonstrations at a time."""
    gates = {"openai/gsm8k": 0.0, "math": 0.25, "code": 0.5}
    rows = [question(i, {"rule": "random", "chance": (i // 3) % 8 / 8}, list(gates)[i % 3], 3) for i in range(48)]
    own = ",".join(f"{name}:{{gate:{{threshold:{gate}}}}}" for name, gate in gates.items())
    overrides = [
        "data.train_batch_size=24",
        "actor_rollout_ref.actor.ppo_mini_batch_size=12",
        "actor_rollout_ref.rollout.n=8",
        f"++hpt.per_source={{{own}}}",
        "++hpt.demo={per_question: 2, select: unseen_first}",
        "++hpt.gate.finished=false",
        f"trainer.total_training_steps={steps}",
        "trainer.save_freq=1",
    ]
    training = Training(folder / "sources", rows, overrides, prefix)
    training.run(limit=1500)
    metrics, wrong = training.metrics(), 0
    draws, taught = dict.fromkeys(gates, 0), dict.fromkeys(gates, 0)
    numbers = np.array([prompt_number(row["data_source"], row["prompt"]) for row in rows], dtype=np.uint64)
    for step in range(1, steps + 1):
        history = History.read(str(training.history(step)))
        _, keys = history.keys_of_prompts(numbers)
        drawn_at, taught_at = history.look_up(keys, "drawn_at", "taught_at")
        for i in np.flatnonzero(drawn_at == step):
            record, source = rows[i]["extra_info"], rows[i]["data_source"]
            solved = sum(score(record, int(i), step, session) for session in range(8))
            wrong += int((taught_at[i] == step) != (solved <= gates[source] * 8))
            draws[source], taught[source] = draws[source] + 1, taught[source] + int(taught_at[i] == step)
        questions, of_demos = sum(taught_at == step), metrics[step]["hpt/rows/demos"]
        assert of_demos == 2 * questions, f"step {step}: {of_demos} rows of {questions} questions"
    for source, gate in gates.items():
        print(f"{source}: gate {gate}, {taught[source]} of {draws[source]} draws on demonstrations")
    print(f"{wrong} of {sum(draws.values())} decisions differ from the recorded rewards' under the source's own gate")
    print(f"two rows a demo question at every step ({2 * sum(taught.values())} rows)")


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
