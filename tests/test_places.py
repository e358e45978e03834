"""How many places a new gate, method, column, data format or metric touches: each example is a small commit.

An example inserts its text into a copy of the package before a line that is there today; what is then asserted runs in
a process of its own on that copy, through what users touch: settings, command line, ``explain``, the loss.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Example(NamedTuple):
    """places: (file, the line before which it is inserted, the text); works: code that must run through."""

    places: list[tuple[str, str, str]]
    works: str


GATE = Example(
    [
        (
            "gate.py",
            "def solved(",
            '''
@register_gate
def rarely_solved(outcome: Outcome, at_most: int = 1) -> Decision:
    """Imitate where at most so many rollouts are solved and the question was not taught before."""
    return DEMO if outcome.solved <= at_most and not outcome.history["uses"] else RL


''',
        )
    ],
    """
from verl_hpt.tools.explain import explain
row = {"length": 2, "log_prob": -1.0}
question = {"rollouts": [{**row, "reward": r} for r in (1, 0, 0)], "demos": [row]}
hpt = {"gate": {"function": "rarely_solved", "kwargs": {"at_most": 1}}}
assert {r["zone"] for r in explain({"hpt": hpt, "questions": [question]})["rows"]} == {"demo"}
hpt["gate"]["kwargs"]["at_most"] = 0
assert {r["zone"] for r in explain({"hpt": hpt, "questions": [question]})["rows"]} == {"rl"}
""",
)

METHOD = Example(
    [
        (
            "parts.py",
            "def _sequence_log_ratio(",
            '''@part("likelihood")
def squared(tokens: Tokens):
    """f(p) = p²/2."""
    p = tokens.log_prob.exp()
    return p / 2, p


''',
        ),
        (
            "methods.py",
            '    Method("dft", None',
            """    Method("squared", _DR_GRPO,
           (Term("S", Estimator(parts.everywhere, parts.one, parts.unit, parts.squared)),),
           when="gate", source="this test", formula="1_clip·r·(R−mean) / S: p²"),
""",
        ),
    ],
    """
import math
from verl_hpt.tools.explain import explain
row = {"length": 1, "log_prob": math.log(0.5)}
case = {"hpt": {"method": "squared"}, "questions": [{"rollouts": [{**row, "reward": 0}], "demos": [row]}]}
(trained,) = explain(case)["rows"]
assert abs(trained["coefficient"]["demo"][0] - 0.25) < 1e-12
""",
)

COLUMN = Example(
    [
        (
            "demos/demonstration.py",
            '    "source": Column(',
            '    "difficulty": Column("how hard it is, a number", required=True),\n',
        )
    ],
    """
import contextlib, io, json
from verl_hpt import cli, config
from verl_hpt.demos.read import read
columns = config.load({"demo": {"difficulty": "hardness"}}).demo.columns()
(good, bad), = read([({"target": ["a", "b"], "hardness": [2.5, None]}, None, None)], "target", columns, None, None)
assert good.values == {"difficulty": 2.5} and bad.bad.reason == "bad_column"
with contextlib.redirect_stdout(io.StringIO()) as out:
    cli.main(["settings", "--json"])
meanings = {key["key"]: key["meaning"] for key in json.loads(out.getvalue())}
assert "how hard it is" in meanings["hpt.demo.difficulty"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    cli.main(["data", "check", "--help"])
assert "--demo-difficulty-key" in out.getvalue()
""",
)

FORMAT = Example(
    [
        (
            "data/formats.py",
            '    "qa": Format(',
            """    "quiz": Format(
        lambda values, named: named if "quiz" in values else None,
        lambda row, layout: Question(
            [{"role": "user", "content": row.values["quiz"]["ask"]}],
            [row.values["quiz"]["worked"]],
            row.values["quiz"]["key"],
        ),
    ),
""",
        )
    ],
    """
import json, pathlib
import pyarrow.parquet as pq
from verl_hpt import cli
pathlib.Path("in.jsonl").write_text(json.dumps({"quiz": {"ask": "1 + 1?", "worked": "It is 2.", "key": "2"}}) + "\\n")
assert cli.main(["data", "convert", "in.jsonl", "out.parquet"]) == 0
(row,) = pq.read_table("out.parquet").to_pylist()
assert row["prompt"][-1]["content"].startswith("1 + 1?") and row["reward_model"]["ground_truth"] == "2"
""",
)

METRIC = Example(
    [
        (
            "metrics.py",
            '    "gradient_share/demos":',
            '    "nll/rollouts": Ratio(nll, "rollouts", tokens),\n',
        )
    ],
    """
import torch
from verl_hpt import metrics
from verl_hpt.estimator import row_terms
from verl_hpt.loss import ROW_COLUMNS, LossSpec, loss_of
from verl_hpt.methods import METHODS
log_prob = torch.full((1, 4), -0.5, requires_grad=True)
column = {name: torch.full((1, 1), float(name == "w_rl")) for name in ROW_COLUMNS}
spec = LossSpec(METHODS["hpt"], fields=("old_log_probs",))
mask = torch.ones(1, 4, dtype=torch.bool)
_, sums = loss_of(log_prob, None, mask, column, {"old_log_probs": log_prob.detach()}, spec, metrics.sums_of)
sent = {metrics.SENT + name: value for name, value in sums.items()}
metrics.of_update(sent)
assert sent["hpt/nll/rollouts"] == 0.5
""",
)


@pytest.mark.parametrize(
    ("example", "places"),
    [(GATE, 1), (METHOD, 2), (COLUMN, 1), (FORMAT, 1), (METRIC, 1)],
    ids=["gate", "method", "column", "format", "metric"],
)
def test_what_is_new_touches_so_many_places_and_works_everywhere(example, places, tmp_path):
    assert len(example.places) == places
    package = shutil.copytree(ROOT / "verl_hpt", tmp_path / "verl_hpt", ignore=shutil.ignore_patterns("__pycache__"))
    for name, line, text in example.places:
        source = (package / name).read_text(encoding="utf-8")
        assert source.count(f"\n{line}") == 1, f"{name} has no such line, or several: {line}"
        (package / name).write_text(source.replace(f"\n{line}", f"\n{text}{line}"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = f"import verl_hpt; assert verl_hpt.__file__.startswith({str(tmp_path)!r})\n{example.works}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
