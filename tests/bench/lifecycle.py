"""Real CPU trainings of what the history and the sources' gates do, with rewards on record. Prints the figures.

    python tests/bench/lifecycle.py early FOLDER     # early gate, half of the questions never solved: two runs
    python tests/bench/lifecycle.py sources FOLDER   # gates by source, three demonstrations a question: one run
    python tests/bench/lifecycle.py size FOLDER      # memory and times of a large history: no training, half a minute

A run takes about a minute to start and 2 to 4 s a step on two cores. ``--prefix`` stands before its command.
"""

import argparse
import shlex
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))

from cpu_run import Training, question
from recorded_rewards import score

from verl_hpt.history import FILE, Draw, History, identity


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
        graduated[name] = set(History.read(str(training.history(steps))).listing("graduated"))
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
    keys = [identity(row, prompt_key="prompt") for row in rows]
    for step in range(1, steps + 1):
        history = History.read(str(training.history(step)))
        records = [history.of(key) for key in keys]
        for i, record in enumerate(records):
            if record.drawn_at == step:
                rule, source, on_demo = rows[i]["extra_info"], rows[i]["data_source"], record.taught_at == step
                solved = sum(score(rule, i, step, session) for session in range(8))
                wrong += int(on_demo != (solved <= gates[source] * 8))
                draws[source], taught[source] = draws[source] + 1, taught[source] + on_demo
        questions, of_demos = sum(record.taught_at == step for record in records), metrics[step]["hpt/rows/demos"]
        assert of_demos == 2 * questions, f"step {step}: {of_demos} rows of {questions} questions"
    for source, gate in gates.items():
        print(f"{source}: gate {gate}, {taught[source]} of {draws[source]} draws on demonstrations")
    print(f"{wrong} of {sum(draws.values())} decisions differ from the recorded rewards' under the source's own gate")
    print(f"two rows a demo question at every step ({2 * sum(taught.values())} rows)")


def size(folder: Path, prefix: tuple[str, ...]) -> None:
    """Memory, file and times of a history of the questions that 500 steps of 128 draw, and of a million."""
    for questions in (64_000, 1_000_000):
        tracemalloc.start()
        keys, history = [f"{i:016x}" for i in range(questions)], History({}, 0.0)
        for start in range(0, questions, 1000):
            history.observe(1000, [Draw(key, 0, 8, (0,), False) for key in keys[start : start + 1000]])
        memory, path = tracemalloc.get_traced_memory()[0], folder / FILE
        tracemalloc.stop()
        steps = [
            ("save", lambda h=history, p=path: h.save(str(p))),
            ("read", lambda p=path: History.read(str(p))),
            ("totals", history.totals),
            ("128 questions", lambda h=history, k=keys: h.observe(1, [Draw(key, 0, 8, (), True) for key in k[:128]])),
        ]
        times = []
        for name, run in steps:
            begin = time.perf_counter()
            run()
            times.append(f"{name} {time.perf_counter() - begin:.4f} s")
        sizes = [f"memory {memory / 2**20:.0f} MiB", f"file {path.stat().st_size / 2**20:.0f} MiB"]
        print(f"{questions:,} questions: {', '.join([*sizes, *times])}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("early", "sources", "size"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prefix", default="")
    options = parser.parse_args()
    {"early": early, "sources": sources, "size": size}[options.what](options.folder, tuple(shlex.split(options.prefix)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
