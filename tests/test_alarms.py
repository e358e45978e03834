"""Alarms: each goes off after its steps in a row, is said once, names what to set, and survives a resume."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from verl_hpt.errors import UserError
from verl_hpt.gate import GateSettings
from verl_hpt.host.alarms import ALARMS, FILE, PREFIX, Alarms
from verl_hpt.methods import METHODS
from verl_hpt.plan import PlanSettings, Question

QUIET = {
    "hpt/truncated_share": 0.1,
    "hpt/truncated_success_share": 0.0,
    "hpt/response_length": 100.0,
    "actor/entropy": 1.0,
    "hpt/clip_share/rollouts": 0.0,
    "hpt/demo_share": 0.5,
    "hpt/gradient_share/demos": 0.5,
    "hpt/rows/rollouts": 8.0,
    "hpt/rows/demos": 4.0,
}
# Alarm -> metrics that must set it off, and others that lie just on the other side.
CASES = {
    "truncated_success": ({"hpt/truncated_success_share": 0.26}, {"hpt/truncated_success_share": 0.25}),
    "all_truncated": ({"hpt/truncated_share": 1.0}, {"hpt/truncated_share": 0.99}),
    "length": (
        {"hpt/response_length": 201.0, "hpt/truncated_share": 0.51},
        {"hpt/response_length": 200.0, "hpt/truncated_share": 0.51},
        {"hpt/response_length": 201.0, "hpt/truncated_share": 0.5},
    ),
    "entropy": ({"actor/entropy": 2.01}, {"actor/entropy": 2.0}),
    "clipped": ({"hpt/clip_share/rollouts": 0.31}, {"hpt/clip_share/rollouts": 0.3}),
    "all_demos": ({"hpt/demo_share": 1.0}, {"hpt/demo_share": 0.99}),
    "one_signal": (
        {"hpt/gradient_share/demos": 0.995},
        {"hpt/gradient_share/demos": 0.99},
        {"hpt/gradient_share/demos": 0.995, "hpt/rows/rollouts": 0.0},
        {"hpt/gradient_share/demos": 0.0, "hpt/rows/demos": 0.0},
    ),
}


def run(metrics: dict, steps: int, alarms: Alarms | None = None) -> list[dict]:
    """Five quiet steps, which the later ones are compared with, then ``steps`` with the metrics given."""
    if alarms is None:
        alarms = Alarms()
        for step in range(1, 6):
            assert not any(v for k, v in alarms.watch(step, QUIET).items() if k.startswith(PREFIX))
    return [alarms.watch(6 + i, QUIET | metrics) for i in range(steps)]


@pytest.mark.parametrize("name", CASES)
def test_an_alarm_goes_off_after_its_steps_in_a_row_and_is_said_once_with_what_to_set(name, caplog):
    bad, *good = CASES[name]
    patience, says, remedy = ALARMS[name]
    with caplog.at_level(logging.WARNING):
        told = run(bad, patience + 3)
    assert [t[PREFIX + name] for t in told] == [0.0] * (patience - 1) + [1.0] * 4
    assert all(t[PREFIX + other] == 0 for t in told for other in ALARMS if other != name)
    (record,) = caplog.records
    assert (
        record.getMessage().startswith(f"alarm {name} at step {5 + patience}: {says}") and remedy in record.getMessage()
    )
    for metrics in good:
        assert not any(t[PREFIX + name] for t in run(metrics, 30))


@pytest.mark.parametrize("share", [0.0, 0.009])
def test_the_signal_that_vanishes_may_be_the_demonstrations(share):
    assert run({"hpt/gradient_share/demos": share}, 5)[-1][PREFIX + "one_signal"] == 1


def test_one_quiet_step_starts_the_count_again(caplog):
    alarms = Alarms()
    for step in range(40):
        cut = {"hpt/truncated_share": 0.5 if step % 5 == 4 else 1.0}
        assert alarms.watch(step, QUIET | cut)[PREFIX + "all_truncated"] == 0
    assert not caplog.records


def test_entropy_must_grow_by_a_nat_and_not_only_double():
    alarms = Alarms()
    told = [alarms.watch(i, QUIET | {"actor/entropy": 0.1 if i < 5 else 1.0}) for i in range(12)]
    assert not any(t[PREFIX + "entropy"] for t in told)


def test_the_streak_of_steps_on_demonstrations_is_a_metric_and_a_schedule_is_no_alarm():
    told = run({"hpt/demo_share": 1.0}, 25)
    assert [t["hpt/all_demo_streak"] for t in told] == [float(i + 1) for i in range(25)]
    by_schedule = Alarms(scheduled=lambda step: step <= 30)
    told = [by_schedule.watch(step, QUIET | {"hpt/demo_share": 1.0}) for step in range(1, 52)]
    assert [t[PREFIX + "all_demos"] for t in told] == [0.0] * 49 + [1.0] * 2


def questions(*scores: tuple[str, float]) -> list[Question]:
    return [Question("q", np.array([s, 0.0]), np.array([3, 3]), source=source) for source, s in scores]


def test_a_source_that_never_reaches_its_own_success_is_named_with_its_threshold(caplog):
    settings = PlanSettings(
        METHODS["hpt"], "question", 8.0, gate=GateSettings(success=1.0), gates={"b": GateSettings(success=0.9)}
    )
    alarms = Alarms()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 21):
            alarms.scored(questions(("a", 1.0), ("b", 0.8)), settings)
            told = alarms.watch(step, QUIET)
    assert told[PREFIX + "never_solved"] == 1
    assert "b: best 0.8, gate.success 0.9" in caplog.text and "a: best" not in caplog.text
    alarms.scored(questions(("b", np.float32(0.9))), settings)
    assert alarms.watch(21, QUIET)[PREFIX + "never_solved"] == 0, "a float32 score of 0.9 meets 0.9"


def test_alarms_go_on_after_a_resume_where_they_were(tmp_path, caplog):
    whole, first = Alarms(), Alarms()
    settings = PlanSettings(METHODS["hpt"], "question", 8.0)
    for alarms in (whole, first):
        alarms.scored(questions(("a", 0.5)), settings)
        run(QUIET, 0, alarms)
        for step in range(1, 6):
            alarms.watch(step, QUIET)
        run({"hpt/response_length": 300.0, "hpt/truncated_share": 0.9}, 2, alarms)
    first.save(str(tmp_path / "checkpoint"))
    second = Alarms()
    second.load(str(tmp_path / "checkpoint"))
    grown = {"hpt/response_length": 300.0, "hpt/truncated_share": 0.9}
    assert run(grown, 3, second) == run(grown, 3, whole)
    assert run(grown, 1, second)[0][PREFIX + "length"] == 1
    third = Alarms()
    third.load(str(tmp_path))  # a checkpoint of an earlier release has none
    assert third.held == Alarms().held


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"held": 1, "said": [], "first": {}, "best": {}}', "{"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=rf"{FILE} cannot be read .*delete it"):
        Alarms().load(str(tmp_path))


def test_a_file_that_cannot_be_opened_is_named_too(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(UserError, match=rf"{FILE} cannot be read \(IsADirectoryError.*delete it"):
        Alarms().load(str(tmp_path))


def test_how_many_steps_each_alarm_waits():
    assert {name: alarm.steps for name, alarm in ALARMS.items()} == {
        "truncated_success": 3, "all_truncated": 5, "length": 3, "entropy": 3, "clipped": 5, "all_demos": 20,
        "never_solved": 20, "one_signal": 5,
    }  # fmt: skip


def test_a_number_that_a_step_does_not_have_is_no_alarm_and_no_reference():
    """Entropy stands in the metrics only where it is computed; the first five values are the reference, not steps."""
    alarms = Alarms()
    without = {name: value for name, value in QUIET.items() if name != "actor/entropy"}
    for step in range(1, 9):
        assert alarms.watch(step, without)[PREFIX + "entropy"] == 0
    told = [alarms.watch(step, QUIET | {"actor/entropy": 1.0 if step < 14 else 2.5}) for step in range(9, 17)]
    assert [t[PREFIX + "entropy"] for t in told] == [0.0] * 7 + [1.0]
    assert Alarms().watch(1, {}).keys() == {"hpt/all_demo_streak", *(PREFIX + name for name in ALARMS)}


def test_the_report_reads_the_table_of_alarms_without_torch():
    code = "import sys, verl_hpt.host.alarms; sys.exit(bool({'torch', 'verl'} & set(sys.modules)))"
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
