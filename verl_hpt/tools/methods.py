"""`verl-hpt methods`: the table of methods, printed, as JSON, or drawn as what each does to a token of probability p.

Everything is read from ``METHODS``; the curves come from ``row_terms``, the code that trains. `--modules` imports your
own modules first, as ``hpt.modules`` does in a run, so that your methods stand in the table too.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import textwrap
import unicodedata
from dataclasses import dataclass

import numpy as np
import torch

from verl_hpt.errors import UserError
from verl_hpt.estimator import Estimator, Method, row_terms
from verl_hpt.methods import METHODS
from verl_hpt.parts import Tokens

WIDTH = 120
ON_ROLLOUTS = {"method": 10, "w": 74, "own": 8, "source (arXiv)": 22}
ON_DEMOS = {"method": 10, "stands": 13, "w on rollouts": 28, "w on demonstrations": 35, "own": 8, "source (arXiv)": 16}
WHEN = {"gate": "by the gate", "always": "always", "never": "", "soft": "by share", "unrewarded": "if max R ≤ 0",
        "own": "own or demo"}  # fmt: skip

# What the curves assume where a coefficient depends on more than p, said under the picture too.
GROUP = 8  # rows of a question's group; one of them is right
ENTROPY = 1.0  # nats, of every token
OTHER_P = 0.5  # probability of a demonstration's tokens under other models (POFT), under its author (`teacher`)
P = np.logspace(-3, 0, 121)
RATIO = np.linspace(0.01, 4, 400)


# --- the table -------------------------------------------------------------------------------------------------------


def formulas(method: Method) -> tuple[str, str]:
    """w on rollouts and on demonstrations, "–" where a method has none; from the names of its parts if it says none."""
    on_rollouts, separator, on_demos = method.formula.partition(" / ")
    if separator:
        return on_rollouts, on_demos
    if method.formula:
        return (method.formula, "–") if not method.demos else ("–", method.formula)
    named = [f"{term.kind}: {term.scale:g}·[{_parts(term.estimator)}]" for term in method.demos]
    return _parts(method.rollouts) if method.rollouts is not None else "–", " and ".join(named) or "–"


def _parts(estimator: Estimator) -> str:
    return ", ".join(f"{kind} {name}" for kind, name in estimator.names().items())


def stands(method: Method) -> str:
    """Where a demonstration stands, and when."""
    if not method.demos:
        return "–"
    return f"{'in the group' if method.place == 'group' else 'by itself'}, {WHEN[method.when]}"


def rows(methods: list[Method]) -> list[dict]:
    """The table as plain values, for `--json`."""
    return [
        {
            "name": method.name,
            "place": method.place if method.demos else None,
            "when": method.when,
            "rollouts": None if method.rollouts is None else method.rollouts.names(),
            "demos": [{"kind": t.kind, "scale": t.scale, **t.estimator.names()} for t in method.demos],
            "formula": {"rollouts": formulas(method)[0], "demos": formulas(method)[1]},
            "normalization": method.normalization,
            "needs": sorted(method.needs),
            "critic": method.uses_critic,
            "source": method.source,
            "unverified": method.unverified,
            "approximate": method.approximate,
        }
        for method in methods
    ]


def text(methods: list[Method]) -> str:
    """The table for a terminal of 120 columns."""
    lines = [
        "A token of probability p learns w · ∇ log p. own: normalisation when hpt.normalization is null.",
        "S: SFT-shaped, demonstrations' normaliser, times λ (hpt.demo_coef). R: RL-shaped, rollouts' normaliser, no λ.",
        "r = π_θ/π_old, 1_clip: PPO's clip, γ₀ = 0.1, H: token entropy, H̄: its mean over the row, sg: stop-gradient.",
    ]
    plain, with_demos = [m for m in methods if not m.demos], [m for m in methods if m.demos]
    if plain:
        cells = [[m.name, formulas(m)[0], m.normalization, m.source] for m in plain]
        lines += ["", "On rollouts", *_grid(ON_ROLLOUTS, cells)]
    if with_demos:
        cells = [[m.name, stands(m), *formulas(m), m.normalization, m.source] for m in with_demos]
        lines += ["", "With demonstrations (stands: where and when)", *_grid(ON_DEMOS, cells)]
    notes = [
        (label, m.name, note)
        for m in methods
        for label, note in (("unverified", m.unverified), ("approximate", m.approximate))
        if note
    ]
    if notes:
        lines.append("")
        for label, name, note in notes:
            lines += textwrap.wrap(f"{name}, {label}: {note}", WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def _grid(columns: dict[str, int], cells: list[list[str]]) -> list[str]:
    """Lines of a table with wrapped cells. columns: title to width."""
    widths = list(columns.values())
    lines = [list(columns), ["─" * width for width in widths]]
    for row in cells:
        wrapped = [textwrap.wrap(cell, w, break_on_hyphens=False) or [""] for cell, w in zip(row, widths, strict=True)]
        lines += map(list, itertools.zip_longest(*wrapped, fillvalue=""))
    return ["  ".join(c + " " * (w - _shown(c)) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def _shown(cell: str) -> int:
    """Columns of a terminal: combining marks (the bar of H̄) take none."""
    return sum(not unicodedata.combining(char) for char in cell)


# --- the curves ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """w over x, with the names of the methods that share it. x: p or ratio, (points,); w: (points,)."""

    names: tuple[str, ...]
    x: np.ndarray
    w: np.ndarray


def demo_curves(methods: list[Method], kind: str) -> list[Curve]:
    """w(p) of the methods' terms of one kind on a demonstration, at the first update (π_old = π_ref = π_θ).

    The demonstration is right; where it is a member of its group, the other rows of the group are wrong.
    """
    log_p = np.log(P)
    found = []
    for method in methods:
        term = method.term(kind)
        if term is not None:
            terms = row_terms(method, _tokens(term.estimator, log_p, log_p, True), torch.tensor(True))
            w = (terms.demo if kind == "S" else terms.rl)[:, 0].numpy()
            found.append((method.name, term.scale * w))
    return _together(found, P)


def rollout_curves(methods: list[Method], correct: bool) -> list[Curve]:
    """w(r) of the methods' rollouts, r = π_θ/π_old at p = 0.2: the one right row of its group, or a wrong one.

    Methods whose Â comes from a critic are left out: there is no number to take without one.
    """
    log_p = np.full(len(RATIO), np.log(0.2))
    found = []
    for method in methods:
        if method.rollouts is not None and not method.uses_critic:
            tokens = _tokens(method.rollouts, log_p, log_p - np.log(RATIO), correct)
            w = row_terms(method, tokens, torch.tensor(False)).rl[:, 0].numpy()
            found.append((method.name, w))
    return _together(found, RATIO)


def _tokens(estimator: Estimator, log_prob: np.ndarray, old_log_prob: np.ndarray, correct: bool) -> Tokens:
    """Each point of a grid is a row of one token."""
    over_group = estimator.advantage.over_group
    rewards = np.zeros(GROUP)
    rewards[0] = 1.0
    advantage = over_group(rewards)[0 if correct else 1] if over_group is not None else 0.0
    return Tokens.on_paper(
        log_prob[:, None],
        advantage=advantage,
        reward=float(correct),
        correct=correct,
        old_log_prob=old_log_prob[:, None],
        entropy=ENTROPY,
        other_log_prob=np.log(OTHER_P),
        teacher_log_prob=np.log(OTHER_P),
    )


def _together(found: list[tuple[str, np.ndarray]], x: np.ndarray) -> list[Curve]:
    """Methods that do the same share a curve."""
    curves: list[Curve] = []
    for name, w in found:
        same = next((i for i, curve in enumerate(curves) if np.allclose(curve.w, w, atol=1e-9)), None)
        if same is None:
            curves.append(Curve((name,), x, w))
        else:
            curves[same] = Curve((*curves[same].names, name), x, w)
    return curves


def plot(methods: list[Method], path: str) -> None:
    """Draw the curves into a file; its ending chooses the format.

    Raises:
        UserError: the file cannot be written, or matplotlib does not know its ending.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9.5), layout="constrained")
    demo_x, ratio_x = "p, probability of the demonstration's token", r"$r = \pi_\theta/\pi_{old}$"
    panels = (
        (axes[0, 0], demo_curves(methods, "S"), "Demonstrations, SFT-shaped terms (S)", demo_x),
        (axes[0, 1], demo_curves(methods, "R"), "Demonstrations, RL-shaped terms (R)", demo_x),
        (axes[1, 0], rollout_curves(methods, True), f"Rollouts: the one of {GROUP} that is right", ratio_x),
        (axes[1, 1], rollout_curves(methods, False), "Rollouts: one of the others", ratio_x),
    )
    for axis, curves, title, label in panels:
        _draw(axis, curves, title, label)
    for axis in axes[0]:
        axis.set_xscale("log")
    figure.supxlabel(
        f"A token learns w · ∇ log p, before λ and normalisation. Rows of one token, groups of {GROUP} with one right "
        "row; above, that is the demonstration,\nand π_old = π_ref = π_θ. Below, p = 0.2. "
        f"Token entropy {ENTROPY:g} nat; other models' and a teacher's p {OTHER_P:g}. "
        "Clip 0.2/0.2, dual clip 3 (GSPO's paper: 3e-4/4e-4).",
        fontsize=9,
    )
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise UserError(f"--plot {path}: {error}") from error
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written ({error.strerror})") from error
    finally:
        plt.close(figure)


# Okabe and Ito's palette, told apart with every kind of colour vision, and four line styles beside it.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


def _draw(axis, curves: list[Curve], title: str, label: str) -> None:
    for i, curve in enumerate(curves):
        axis.plot(
            curve.x,
            curve.w,
            color=COLOURS[i % len(COLOURS)],
            linestyle=STYLES[i % len(STYLES)],
            linewidth=max(3.4 - 0.3 * i, 1.3),  # so that what lies under another curve still shows
            label=textwrap.fill(", ".join(curve.names), 34),
        )
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axis.set(title=title, xlabel=label, ylabel="w")
    axis.spines[["top", "right"]].set_visible(False)
    if curves:
        axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="verl-hpt methods", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="METHOD", help="only these (default: all)")
    parser.add_argument("--plot", metavar="FILE", help="draw w(p) and w(r): png, svg or pdf")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--modules", default="", metavar="A,B", help="your own modules to import first")
    options = parser.parse_args(argv)
    for module in filter(None, options.modules.split(",")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"--modules: cannot import {module!r} ({error}); is it on PYTHONPATH?") from error
    for name in options.names:
        if name not in METHODS:
            raise UserError(f"no method {name!r}; one of {', '.join(METHODS)}")
    chosen = [METHODS[name] for name in options.names] or list(METHODS.values())
    if options.plot:
        plot(chosen, options.plot)
        print(f"wrote {options.plot}", file=sys.stderr)
    if options.json:
        print(json.dumps(rows(chosen), indent=2, ensure_ascii=False))
    elif not options.plot:
        print(text(chosen))
    return 0
