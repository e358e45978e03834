"""`verl-hpt methods`: the table of methods, printed, as JSON, or drawn as what each does to a token of probability p.

Everything is read from ``METHODS``; the curves come from ``row_terms``, the code that trains. `--modules` imports your
own modules first, as ``hpt.modules`` does in a run, so that your methods stand in the table too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import textwrap
from typing import NamedTuple

import numpy as np
import torch

from verl_hpt.errors import UserError
from verl_hpt.estimator import STARTS, Estimator, Method, row_terms
from verl_hpt.methods import METHODS
from verl_hpt.tools import show
from verl_hpt.tools.explain import on_paper

WIDTH = 120
ON_ROLLOUTS = {"method": 10, "w": 74, "own": 8, "source (arXiv)": 22}
ON_DEMOS = {"method": 10, "stands": 13, "w on rollouts": 28, "w on demonstrations": 35, "own": 8, "source (arXiv)": 16}
WHEN = {"gate": "by the gate", "always": "always", "never": "", "soft": "by share", "unrewarded": "if max R ≤ 0",
        "own": "own or demo"}  # fmt: skip
PLACES = {"separate": "by itself", "group": "in the group", "prefix": "begins a rollout", "hint": "in the prompt",
          "stream": "in a stream", "buffer": "in a buffer"}  # fmt: skip

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
    terms = [f"{term.kind}: {term.scale:g}·[{_parts(term.estimator)}]" for term in method.demos]
    return _parts(method.rollouts) if method.rollouts is not None else "–", " and ".join(terms) or "–"


def _parts(estimator: Estimator) -> str:
    return ", ".join(f"{kind} {name}" for kind, name in estimator.names().items())


def stands(method: Method) -> str:
    """Where a demonstration stands, and when."""
    if not _has_demos(method):
        return "–"
    elsewhere = method.place not in ("separate", "group")
    return PLACES[method.place] if elsewhere else f"{PLACES[method.place]}, {WHEN[method.when]}"


def _has_demos(method: Method) -> bool:
    return bool(method.demos) or method.place in STARTS


def rows(methods: list[Method]) -> list[dict]:
    """The table as plain values, for `--json`."""
    return [
        {
            "name": method.name,
            "place": method.place if _has_demos(method) else None,
            "when": method.when,
            "rollouts": None if method.rollouts is None else method.rollouts.names(),
            "demos": [{"kind": t.kind, "scale": t.scale, **t.estimator.names()} for t in method.demos],
            "formula": {"rollouts": formulas(method)[0], "demos": formulas(method)[1]},
            "normalization": method.normalization,
            "demo_coef": _plain(method.demo_coef),
            "start": _plain(method.start),
            "needs": sorted(method.needs),
            "critic": method.uses_critic,
            "source": method.source,
            "unverified": method.unverified,
            "approximate": method.approximate,
        }
        for method in methods
    ]


def _plain(value) -> object:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def text(methods: list[Method]) -> str:
    """The table for a terminal of 120 columns."""
    lines = [
        "A token of probability p learns w · ∇ log p. own: normalisation when hpt.normalization is null.",
        "S: SFT-shaped, demonstrations' normaliser, times λ (hpt.demo_coef). R: RL-shaped, rollouts' normaliser, no λ.",
        "r = π_θ/π_old, 1_clip: PPO's clip, γ₀ = 0.1, H: token entropy, H̄: its mean over the row, sg: stop-gradient.",
    ]
    on_rollouts = [[m.name, formulas(m)[0], m.normalization, m.source] for m in methods if not _has_demos(m)]
    on_demos = [[m.name, stands(m), *formulas(m), m.normalization, m.source] for m in methods if _has_demos(m)]
    for title, columns, cells in (
        ("On rollouts", ON_ROLLOUTS, on_rollouts),
        ("With demonstrations (stands: where and when)", ON_DEMOS, on_demos),
    ):
        if cells:
            lines += ["", title, show.table([list(columns), *cells], list(columns.values()))]
    notes = [
        f"{m.name}, {label}: {note}"
        for m in methods
        for label, note in (("unverified", m.unverified), ("approximate", m.approximate))
        if note
    ]
    wrapped = [line for note in notes for line in textwrap.wrap(note, WIDTH, subsequent_indent="    ")]
    return "\n".join([*lines, *([""] if notes else []), *wrapped])


# --- the curves ------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """w over the panel's x, (points,), with the names of the methods that share it."""

    names: tuple[str, ...]
    w: np.ndarray


def demo_curves(methods: list[Method], kind: str) -> list[Curve]:
    """w(p) of the methods' terms of one kind on a demonstration, at the first update (π_old = π_ref = π_θ).

    The demonstration is right; where it is a member of its group, the other rows of the group are wrong.
    """
    log_p, found = np.log(P), []
    for method in methods:
        if (term := method.term(kind)) is not None:
            terms = _terms(method, term.estimator, log_p, log_p, is_demo=True, correct=True)
            found.append((method.name, term.scale * (terms.demo if kind == "S" else terms.rl)[:, 0].numpy()))
    return _together(found)


def rollout_curves(methods: list[Method], correct: bool) -> list[Curve]:
    """w(r) of the methods' rollouts, r = π_θ/π_old at p = 0.2: the one right row of its group, or a wrong one.

    Methods whose Â comes from a critic are left out: there is no number to take without one.
    """
    log_p, found = np.full(len(RATIO), np.log(0.2)), []
    for method in methods:
        if method.rollouts is not None and not method.uses_critic:
            terms = _terms(method, method.rollouts, log_p, log_p - np.log(RATIO), is_demo=False, correct=correct)
            found.append((method.name, terms.rl[:, 0].numpy()))
    return _together(found)


def _terms(method: Method, estimator: Estimator, log_prob, old_log_prob, *, is_demo: bool, correct: bool):
    """``row_terms`` of rows of one token, a row for each point of the grid. log_prob, old_log_prob: (points,)"""
    over_group, over_starts = estimator.advantage.over_group, estimator.advantage.over_starts
    one_right = np.eye(GROUP)[0]
    advantage = 0.0 if over_group is None else over_group(one_right)[0 if correct else 1]
    if over_starts is not None:
        advantage = over_starts(one_right, one_right)[0]
    tokens = on_paper(
        log_prob[:, None],
        advantage=advantage,
        reward=float(correct),
        correct=correct,
        old_log_prob=old_log_prob[:, None],
        entropy=ENTROPY,
        other_log_prob=np.log(OTHER_P),
        teacher_log_prob=np.log(OTHER_P),
    )
    return row_terms(method, tokens, torch.tensor(is_demo))


def _together(found: list[tuple[str, np.ndarray]]) -> list[Curve]:
    """Methods that do the same share a curve."""
    curves: list[Curve] = []
    for name, w in found:
        same = next((i for i, curve in enumerate(curves) if np.allclose(curve.w, w, atol=1e-9)), len(curves))
        names = curves[same].names if same < len(curves) else ()
        curves[same : same + 1] = [Curve((*names, name), w)]
    return curves


def plot(methods: list[Method], path: str) -> None:
    """Draw the curves into a file; its ending chooses the format. Raises UserError where it cannot be written."""
    of_p = {"xlabel": "p, probability of the demonstration's token", "xscale": "log"}
    of_ratio = {"xlabel": r"$r = \pi_\theta/\pi_{old}$"}
    panels = (
        ("Demonstrations, SFT-shaped terms (S)", P, demo_curves(methods, "S"), of_p),
        ("Demonstrations, RL-shaped terms (R)", P, demo_curves(methods, "R"), of_p),
        (f"Rollouts: the one of {GROUP} that is right", RATIO, rollout_curves(methods, True), of_ratio),
        ("Rollouts: one of the others", RATIO, rollout_curves(methods, False), of_ratio),
    )
    with show.picture(path, "--plot", 2, 2, (13, 9.5)) as (figure, axes):
        for axis, (title, x, curves, labels) in zip(axes.flat, panels, strict=True):
            for i, curve in enumerate(curves):
                width = max(3.4 - 0.3 * i, 1.3)  # so that what lies under another curve still shows
                names = textwrap.fill(", ".join(curve.names), 34)
                axis.plot(x, curve.w, linewidth=width, label=names, **show.look(i))
            axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            axis.set(title=title, ylabel="w", **labels)
            if curves:
                axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.supxlabel(
            f"A token learns w · ∇ log p, before λ and normalisation. Rows of one token, groups of {GROUP} with one "
            "right row; above, that is the demonstration,\nand π_old = π_ref = π_θ. Below, p = 0.2. "
            f"Token entropy {ENTROPY:g} nat; other models' and a teacher's p {OTHER_P:g}. "
            "Clip 0.2/0.2, dual clip 3 (GSPO's paper: 3e-4/4e-4).",
            fontsize=9,
        )


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
