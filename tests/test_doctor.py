"""`verl-hpt doctor` names what keeps an installation from training, here and in a Ray worker."""

import sys

import pytest

from verl_hpt import __version__
from verl_hpt.host import contract
from verl_hpt.tools import doctor

FINE = {
    "verl_hpt": __version__,
    "python": "python",
    "plugin": True,
    "estimator": True,
    "trainer": True,
    "missing": [],
}


@pytest.fixture
def probed(monkeypatch):
    """Stands for the probe in a fresh process; what it finds can be changed."""
    found = dict(FINE)
    monkeypatch.setattr(doctor, "_prober", lambda: lambda code: found)
    return found


def test_a_sound_installation_is_told_what_to_add(probed, capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert f"verl-hpt {__version__}" in out and "algorithm.adv_estimator=hpt" in out and "problems" not in out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"plugin": False}, ": verl does not load the plugin; is verl-hpt installed there"),
        ({"estimator": False}, ": adv_estimator hpt is not registered"),
        ({"trainer": False}, ": get_trainer_cls is not ours"),
        ({"verl_hpt": "0.0.1"}, ": verl-hpt 0.0.1, here "),
        ({"missing": ["the setting data.x (run)"]}, ", verl lacks the setting data.x (run)"),
    ],
)
def test_what_is_wrong_is_named(change, says, probed, capsys):
    probed.update(change)
    assert doctor.main([]) == 1
    assert f"  - in this environment{says}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ValueError('why')", "ValueError: why"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("print('noise'); print('{\"a\": 1}')", {"a": 1}),
    ],
)
def test_the_probe_runs_in_a_fresh_process_and_says_why_it_failed(code, says):
    assert doctor._prober()(code) == says


def test_a_failed_probe_is_a_problem_with_its_place(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_prober", lambda: lambda code: "ModuleNotFoundError: No module named 'verl_hpt'")
    assert doctor.main([]) == 1
    assert "in this environment: ModuleNotFoundError: No module named 'verl_hpt'. Install" in capsys.readouterr().out


def test_versions_entry_point_and_switched_off_plugins_are_looked_at(probed, monkeypatch, capsys):
    monkeypatch.setattr(contract, "version", lambda name: "0.8.0")
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "verl 0.8.0 is installed" in out and "entry point verl.plugins:hpt is missing; reinstall" in out
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_prober", lambda: lambda code: FINE)
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other")
    assert doctor.main([]) == 1
    assert "VERL_USE_EXTERNAL_PLUGINS=other keeps the plugin out" in capsys.readouterr().out


def test_a_worker_is_sent_the_probe_by_value(probed, monkeypatch):
    """It must arrive where verl-hpt cannot be imported."""
    monkeypatch.undo()
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    assert b"_prober" in (sent := cloudpickle.dumps(doctor._prober()))
    monkeypatch.setitem(sys.modules, "verl_hpt.tools.doctor", None)
    assert cloudpickle.loads(sent)("print('{}')") == {}
