"""A run that collapses, for real: the reward pays answers that were cut at the length limit. Prints and draws it.

    python tests/bench/collapse.py FOLDER [--prefix 'COMMAND']

Three CPU trainings of the quickstart's task, alike but for what a cut rollout counts: SFT for the first steps (a gate
threshold of shape "step"), then HPT. ``finished``: the default; ``unfinished``: hpt.gate.finished=false, as in HPT's
published code; ``unsolved``: hpt.rollouts.truncated=unsolved. Each takes about a minute to start and 3 s a step.
Writes FOLDER/collapse.json and FOLDER/collapse.png.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import pyarrow
import pyarrow.parquet
import quickstart_task as quickstart
from cpu_run import Training

from verl_hpt.host.alarms import PREFIX

HERE = Path(__file__).parent
LIMIT = 36
VARIANTS = {
    "finished": [],
    "unfinished": ["++hpt.gate.finished=false"],
    "unsolved": ["++hpt.rollouts.truncated=unsolved"],
}
SHOWN = {
    "hpt/demo_share": "questions on demonstrations",
    "hpt/truncated_share": "rollouts cut at the length limit",
    "hpt/truncated_success_share": "of those paid, cut",
    "hpt/solve_rate": "rollouts that count as solved",
    "val": "validation: right and finished",
    "hpt/response_length": "tokens a rollout",
    "actor/entropy": "entropy, nats",
}


def train(folder: Path, name: str, prefix: tuple[str, ...], sft: int, steps: int) -> dict[str, list]:
    train_rows, val_rows = quickstart.questions()
    val = folder / "val.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(val_rows), val)
    overrides = [
        "data.train_batch_size=64",
        f"data.val_files={val}",
        f"data.max_response_length={LIMIT}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64",
        "actor_rollout_ref.rollout.n=4",
        f"reward.reward_manager.module.path={HERE / 'paid_truncation.py'}",
        "reward.reward_manager.name=PaidTruncation",
        f"++hpt.gate.threshold={{start: 1.0, end: 0.0, steps: {sft}, shape: step}}",
        "++hpt.demo_coef=0.5",
        "trainer.test_freq=5",
        "trainer.save_freq=-1",
        f"trainer.total_training_steps={steps}",
        *VARIANTS[name],
    ]
    os.environ["PAID_TRUNCATION_LIMIT"] = str(LIMIT)
    training = Training(folder / name, train_rows, overrides, prefix)
    if not (training.metrics_file.exists() and max(training.metrics(), default=0) >= steps):
        training.run(limit=1500)
    found = {key: [] for key in SHOWN}
    for step, metrics in sorted(training.metrics().items()):
        (accuracy,) = [v for k, v in metrics.items() if k.startswith("val-core/") and "/mean@" in k][:1] or [None]
        values = metrics | ({"val": accuracy} if accuracy is not None else {})
        for key in SHOWN:
            if key in values:
                found[key].append([step, values[key]])
    found["alarms"] = {
        key[len(PREFIX) :]: min(s for s, m in training.metrics().items() if m.get(key))
        for key in training.metrics()[steps]
        if key.startswith(PREFIX) and any(m.get(key) for m in training.metrics().values())
    }
    return found


def draw(results: dict, path: Path, sft: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 4, figsize=(15, 6), layout="constrained")
    for axes, (key, title) in zip(grid.flat, SHOWN.items(), strict=False):
        for name, colour in zip(VARIANTS, ("#0072B2", "#D55E00", "#009E73"), strict=True):
            if name in results and results[name][key]:
                axes.plot(*zip(*results[name][key], strict=True), color=colour, label=name)
        axes.axvline(sft + 0.5, color="0.7", linewidth=1)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylim(bottom=-0.03)
    grid.flat[-1].set_visible(False)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="lower right", ncols=1)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--sft", type=int, default=14)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", choices=VARIANTS, action="append")
    options = parser.parse_args()
    results = {}
    for name in options.only or VARIANTS:
        results[name] = train(options.folder, name, tuple(shlex.split(options.prefix)), options.sft, options.steps)
        (options.folder / "collapse.json").write_text(json.dumps(results, indent=1))
        draw(results, options.folder / "collapse.png", options.sft)
        last = {key: results[name][key][-1][1] for key in SHOWN if results[name][key]}
        print(
            name, {key: round(value, 3) for key, value in last.items()}, "alarms", results[name]["alarms"], flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
