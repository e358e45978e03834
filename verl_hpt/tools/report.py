"""What a run did, from verl's own metrics: `verl-hpt report RUN_DIR…` writes a picture, a summary and a short table.

A run directory holds `metrics.jsonl`, verl's logger `file`. Every number here is taken from there unchanged, or is a
mean that the table names. Several runs stand side by side: that compares methods as fairly as their settings were.
"""

import argparse
import itertools
import json
import math
import os
import re
from typing import NamedTuple

from verl_hpt.errors import UserError
from verl_hpt.host.alarms import ALARMS, PREFIX
from verl_hpt.tools import answers, show

METRICS = "metrics.jsonl"
LAST = 5  # validations whose mean the table gives


class Curve(NamedTuple):
    """A curve of the summary. metrics: verl's, the first that a step has; colour, line: where one run stands alone."""

    title: str
    metrics: tuple[str, ...]
    colour: str
    line: str


VALIDATION = "validation_accuracy"
CURVES = {
    VALIDATION: Curve("Validation accuracy (greedy)", (), show.COLOURS[0], "-"),
    # The mean score of the rollouts is the solve rate of a stock run where rewards are 0 or 1.
    "solve_rate": Curve("Solve rate of all rollouts", ("hpt/solve_rate", "critic/score/mean"), show.COLOURS[2], "-"),
    "rl_solve_rate": Curve("Solve rate of questions on RL", ("hpt/rl_solve_rate",), show.COLOURS[4], ":"),
    "demo_share": Curve("Share of questions on demonstrations", ("hpt/demo_share",), show.COLOURS[1], "--"),
}
_VALIDATION = re.compile(r"^val-core/(.+)/(acc|reward|score)/mean@(\d+)$")


def read(path: str) -> list[tuple[int, dict]]:
    """`(step, metrics)` of every complete line of verl's file logger, in order of steps.

    Numbers alone are kept: a step without such rollouts logs nothing, null or NaN. A last line without its newline is
    being written, or was cut off when the run was killed: it is left out. Any other line that is not
    `{"step": …, "data": {…}}` is an error, named by file and number.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")[:-1]
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist. `verl-hpt report` reads verl's file logger: run with "
            f"trainer.logger=[console,file] and VERL_FILE_LOGGER_PATH=RUN_DIR/{METRICS}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    rows: dict[int, dict] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step, data = int(entry["step"]), dict(entry["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}, line {number}: not a line of verl\'s file logger, {{"step": …, "data": {{…}}}} ({error!r}).'
            ) from None
        rows.setdefault(step, {}).update({name: float(x) for name, x in data.items() if _is_number(x)})
    return sorted(rows.items())


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def validation(data: dict) -> dict[str, float]:
    """Accuracy by data source from one line's `val-core/SOURCE/acc/mean@N`, or of the reward where no accuracy is.

    `mean@N` is avg@N, the mean over N answers a question; with several N the largest counts.
    """
    matches = [(match.groups(), value) for key, value in data.items() if (match := _VALIDATION.match(key))]
    ranked = sorted((source, kind == "acc", int(n), value) for (source, kind, n), value in matches)
    return {source: value for source, *_, value in ranked}  # the last of a source counts


def curves(rows: list[tuple[int, dict]]) -> dict[str, list[list[float]]]:
    """The summary's curves, each a list of [step, value]; validation accuracy is the mean over data sources."""
    found: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    for step, data in rows:
        if by_source := validation(data):
            found[VALIDATION].append([step, sum(by_source.values()) / len(by_source)])
        for name, curve in CURVES.items():
            if key := next(filter(data.__contains__, curve.metrics), None):
                found[name].append([step, data[key]])
    return found


def summarize(run_dir: str) -> dict:
    """Everything `summary.json` holds of one run: the curves, validation by data source, seconds of the steps."""
    rows = read(os.path.join(run_dir, METRICS))
    found = curves(rows)
    if not any(found.values()):
        raise UserError(
            f"{os.path.join(run_dir, METRICS)} holds no validation, solve rate or reward (lines: {len(rows)}). "
            "Did the run end before its first step, or is this another logger's file?"
        )
    by_source: dict[str, list[list[float]]] = {}
    fired: dict[str, list[int]] = {}
    for step, data in rows:
        for source, value in validation(data).items():
            by_source.setdefault(source, []).append([step, value])
        for name in ALARMS:
            if data.get(PREFIX + name):
                fired.setdefault(name, []).append(step)
    return {
        **found,
        "validation_by_source": by_source,
        "alarms": {name: {"first_step": steps[0], "steps": len(steps)} for name, steps in fired.items()},
        "steps": max(step for step, _ in rows),
        "seconds_of_steps": round(sum(data.get("timing_s/step", 0.0) for _, data in rows), 1),
    }


def names(run_dirs: list[str]) -> list[str]:
    """A short name a run: the last part of its path, or the whole path where two runs share that."""
    short = [os.path.basename(os.path.normpath(d)) or d for d in run_dirs]
    return [d if short.count(s) > 1 else s for d, s in zip(run_dirs, short, strict=True)]


def table(summaries: dict[str, dict]) -> str:
    """One row a run: validation at the start and over the last ones, solve rates and demonstrations, first → last."""
    rows = [["run", "validation first", f"last {LAST}, mean", "solve rate", "on RL", "on demonstrations", "steps"]]
    for name, summary in summaries.items():
        values = [value for _, value in summary[VALIDATION]]
        last = values[-LAST:]
        validations = [f"{values[0]:.3f}", f"{sum(last) / len(last):.3f}"] if values else ["–", "–"]
        ends = [_ends(summary[curve]) for curve in CURVES if curve != VALIDATION]
        rows.append([name, *validations, *ends, str(summary["steps"])])
    return show.table(rows)


def _ends(points: list[list[float]]) -> str:
    return f"{points[0][1]:.2f} → {points[-1][1]:.2f}" if points else "–"


def benchmarks(summaries: dict[str, dict]) -> str:
    """One row a run, one column a validation set: the last avg@N in percent, and their mean over sets.

    The form of the table in HPT's paper (arXiv 2509.04419, table 2). "–" where a run was not validated on a set; such a
    run has no mean, since means over different sets cannot be compared. "" where no run has several sets.
    """
    sets = sorted({source for summary in summaries.values() for source in summary["validation_by_source"]})
    if len(sets) < 2:
        return ""
    rows = [["run", *sets, "mean"]]
    for name, summary in summaries.items():
        last = {source: 100 * points[-1][1] for source, points in summary["validation_by_source"].items()}
        cells = [f"{last[source]:.1f}" if source in last else "–" for source in sets]
        rows.append([name, *cells, f"{sum(last.values()) / len(sets):.1f}" if len(last) == len(sets) else "–"])
    return show.table(rows)


def alarms(summaries: dict[str, dict]) -> str:
    """The alarms of each run: since when, at how many steps, what it means and what to set; "" where there is none."""
    return "\n".join(
        f"{name}: alarm {alarm} since step {found['first_step']} ({found['steps']} steps): {ALARMS[alarm].says}. "
        f"To mend it, {ALARMS[alarm].remedy}"
        for name, summary in summaries.items()
        for alarm, found in summary["alarms"].items()
    )


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Centred running mean over `width` points, over fewer at the ends."""
    half = width // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot(summaries: dict[str, dict], path: str) -> None:
    """One run: its curves in one picture. Several: a panel a curve, the runs in one colour each."""
    if len(summaries) == 1:
        ((run, summary),) = summaries.items()
        looks = {name: {"color": curve.colour, "linestyle": curve.line} for name, curve in CURVES.items()}
        panels = {run: [(name, CURVES[name].title, summary[name], looks[name]) for name in CURVES if summary[name]]}
    else:
        panels = {
            curve.title: [(name, run, s[name], show.look(i)) for i, (run, s) in enumerate(summaries.items()) if s[name]]
            for name, curve in CURVES.items()
            if any(summary[name] for summary in summaries.values())
        }
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (9.0, 5.0) if len(panels) == 1 else (5.6 * columns, 3.6 * rows)
    with show.picture(path, "--out", rows, columns, size, dpi=150) as (figure, grid):
        handles: dict[str, object] = {}
        for axes, (title, lines) in itertools.zip_longest(grid.flat, panels.items(), fillvalue=(None, None)):
            if title is None:
                axes.set_visible(False)
                continue
            axes.set(ylim=(-0.03, 1.03), xlabel="training step", title=title)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            for name, label, points, look in lines:
                steps, values = zip(*points, strict=True)
                if name == VALIDATION:  # measured on purpose: drawn as it is
                    (handle,) = axes.plot(steps, values, marker="o", markersize=4.5, linewidth=2, **look)
                else:
                    axes.plot(steps, values, alpha=0.25, linewidth=1, **look)
                    (handle,) = axes.plot(steps, smooth(list(values)), linewidth=2, **look)
                handles.setdefault(label, handle)
        entries = min(2 * columns, len(handles))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=entries)


def main(argv: list[str]) -> int:
    """Writes summary.json and report.png, prints the tables."""
    parser = argparse.ArgumentParser(
        prog="verl-hpt report",
        description="Picture, summary and table of one run, or of several side by side, from verl's file logger.",
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help=f"directory with {METRICS}")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: the run's directory; several runs: .)")
    args = parser.parse_args(argv)
    runs = dict(zip(names(args.run_dirs), args.run_dirs, strict=True))
    summaries = {name: summarize(run_dir) for name, run_dir in runs.items()}
    out = args.out or (args.run_dirs[0] if len(args.run_dirs) == 1 else ".")
    try:
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, "summary.json"), "w", encoding="utf-8") as file:
            json.dump(next(iter(summaries.values())) if len(summaries) == 1 else summaries, file, indent=1)
            file.write("\n")
        plot(summaries, os.path.join(out, "report.png"))
    except OSError as error:
        raise UserError(f"cannot write the report into {out}: {error}. Choose another place with --out DIR.") from None
    print(table(summaries))
    if sets := benchmarks(summaries):
        print(f"\nlast avg@N of each validation set, in percent\n{sets}")
    if fired := alarms(summaries):
        print(f"\n{fired}")
    for name, run_dir in runs.items():
        if found := answers.answers(run_dir):
            print(f"\n{name}: answers of the last validation, in percent\n{show.table(answers.table(found))}")
    print(f"\n{os.path.join(out, 'report.png')} · {os.path.join(out, 'summary.json')}")
    return 0
