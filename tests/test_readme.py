"""The README says what is there: its example is the tested file, its tree has every module, its methods are all.

Its settings are checked in test_settings.py, against ``verl-hpt settings``.
"""

import json
import re
from pathlib import Path

import numpy as np

from verl_hpt import gate
from verl_hpt.cli import COMMANDS
from verl_hpt.host.alarms import ALARMS
from verl_hpt.methods import METHODS
from verl_hpt.tools.explain import explain

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_a_method_is_the_file_that_the_tests_run():
    code = (ROOT / "tests" / "example_method.py").read_text(encoding="utf-8").split('"""\n\n', 1)[1].strip()
    assert f"```python\n{code}\n```" in README


def test_the_example_of_a_gate_decides():
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "register_gate" in code)
    exec(code, {"__name__": "readme"})
    try:
        histories = {uses: gate.Remembered({**gate.NEVER_DRAWN, "uses": uses}) for uses in (2, 3)}
        outcomes = [
            gate.Outcome(np.array(rewards), gate.GateSettings(function="seldom_solved"), history=history)
            for rewards in ([1.0, 0.0], [1.0, 1.0])
            for history in histories.values()
        ]
        assert [gate.decide("gate", outcome).zone for outcome in outcomes] == ["demo", "rl", "rl", "rl"]
    finally:
        del gate.GATES["seldom_solved"]


def test_every_module_is_in_the_file_tree():
    tree = README.split("```text\nverl_hpt/")[1].split("```")[0]
    rooms = dict(re.findall(r"(?m)^  (\w+)/ +((?:.*\n)(?: {15,}.*\n)*)", tree))
    for path in (ROOT / "verl_hpt").rglob("*.py"):
        if path.stem == "__init__" or path.parent.name == "cpu":
            continue
        if path.parent.name == "verl_hpt":
            assert re.search(rf"\b{path.name}\b", tree), path.name
        else:
            assert re.search(rf"\b{path.stem}\b", rooms[path.parent.name]), path
    assert README[: README.index("verl_hpt/\n  gate.py")].count("\n") < 60


def test_every_method_is_named():
    for name in METHODS:
        assert f"`{name}`" in README or name == "squared", name


def test_no_placeholder_is_left():
    assert not re.findall(r"\b[A-Z]{4,}_[A-Z_]{4,}\b", re.sub(r"VERL_[A-Z_]+|OMP_[A-Z_]+", "", README))


def test_every_command_that_is_written_down_exists():
    files = [ROOT / "README.md", *(ROOT / "recipes").glob("*.sh"), *(ROOT / "verl_hpt").rglob("*.py")]
    written = {
        (command, file.name)
        for file in files
        for command in re.findall(r"(?m)(?:^|`|\$ )verl-hpt ([a-z][\w-]*\w)", file.read_text(encoding="utf-8"))
    }
    assert {command for command, _ in written} == set(COMMANDS), written


def test_what_explain_is_said_to_print_is_what_it_prints():
    case, printed = re.search(
        r"```json\n(.*?)```\n\n```text\n\$ verl-hpt explain[^\n]*\n(.*?)```", README, re.DOTALL
    ).groups()
    told = explain(json.loads(case))
    rows = [{k: v for k, v in row.items() if k != "coefficient"} for row in told["rows"]]
    assert [json.loads(line) for line in printed.splitlines()] == [*rows, *told["dropped"], told["loss"]]


def test_every_alarm_is_in_the_table_of_what_goes_wrong():
    table = README.split("## When it goes wrong")[1].split("\n## ")[0]
    rows = dict(re.findall(r"\| `(\w+)` \| [^|]*, (\d+) \|", table))
    assert {name: int(steps) for name, steps in rows.items()} == {n: alarm.steps for n, alarm in ALARMS.items()}
