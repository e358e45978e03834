"""What we lean on in verl is there, and what is gone is named with why it matters."""

import pytest

from verl_hpt.errors import UserError
from verl_hpt.host import contract


def test_this_verl_has_everything_that_we_lean_on():
    assert contract.missing() == []


@pytest.mark.parametrize(
    ("kind", "entry", "says"),
    [
        ("LEANED_ON", ("verl.utils.metric", "Gone", (), "sums"), "verl.utils.metric.Gone (sums): "),
        ("LEANED_ON", ("verl.utils.metric", "Metric", ("gone",), "sums"), "Metric (sums): has no parameter gone"),
        ("LEANED_ON", ("verl.gone", "Metric", (), "sums"), "verl.gone.Metric (sums): No module named 'verl.gone'"),
        ("CONVENTIONS", ("verl.utils.metric", "Metric", "gone()", "sums"), "Metric (sums): its source has no gone()"),
        ("CONVENTIONS", ("verl.utils.metric", "Gone", "x", "sums"), "verl.utils.metric.Gone (sums): "),
    ],
)
def test_what_is_gone_is_named(monkeypatch, kind, entry, says):
    monkeypatch.setattr(contract, kind, (entry,))
    monkeypatch.setattr(contract, "CONVENTIONS" if kind == "LEANED_ON" else "LEANED_ON", ())
    (lacking,) = contract.missing()
    assert says in lacking
    with pytest.raises(UserError, match=r"verl 0\.9\.\d+ lacks what verl-hpt leans on"):
        contract.check()


@pytest.mark.parametrize(("version", "fine"), [("0.8.9", False), ("0.9.0", True), ("0.9.7", True), ("0.10.0", False)])
def test_versions_of_verl_outside_the_range_are_refused(monkeypatch, version, fine):
    monkeypatch.setattr(contract, "version", lambda name: version)
    if fine:
        assert contract.verl_version() == version
        return
    with pytest.raises(UserError, match=rf"verl {version} is installed; this verl-hpt supports verl>=0.9,<0.10"):
        contract.verl_version()


def test_no_verl_at_all_is_said(monkeypatch):
    def gone(name):
        raise contract.PackageNotFoundError(name)

    monkeypatch.setattr(contract, "version", gone)
    with pytest.raises(UserError, match=r"verl is not installed in this environment; pip install 'verl>=0.9,<0\.10'"):
        contract.verl_version()
