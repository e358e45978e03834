"""A run resumed with other settings: a history whose questions cannot be found again is not taken for theirs."""

import logging

import pytest
from test_lifecycle import Trainer

from verl_hpt import config
from verl_hpt.errors import UserError
from verl_hpt.history import EARLIER_FILE, FILE, KEY, VERSION, History, Lifecycle, meaning

NEEDS = {"history": {"cooldown": 3}}
EMPTY = {"history": {"cooldown": 3, "on_missing": "empty"}}


def saved(folder, node=None) -> None:
    """A checkpoint of a run with these settings that has drawn one question."""
    trainer = Trainer(node)
    trainer.step({"q": [0] * 4})
    trainer.lifecycle.save(str(folder))


def resumed(folder, node=None) -> Lifecycle:
    found = Trainer(node).lifecycle
    found.load(str(folder))
    return found


# --- identity ---------------------------------------------------------------------------------------------------------

KEYED, OTHER = {"question_key": "id"}, {"question_key": "name"}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, KEYED, f'{KEY} was null, is "id" now'),
        (KEYED, {}, f'{KEY} was "id", is null now'),
        (KEYED, OTHER, f'{KEY} was "id", is "name" now'),
        (KEYED, OTHER | {"gate": {"success": 0.5}}, f'{KEY} was "id", is "name" now'),
    ],
)
def test_another_identity_is_named_and_stops_a_run_that_needs_its_history(tmp_path, caplog, before, after, message):
    saved(tmp_path, before)
    with pytest.raises(UserError) as raised:
        resumed(tmp_path, after | NEEDS)
    assert str(raised.value) == (
        f"{tmp_path / FILE}: {message}, so its questions cannot be found again, and hpt.history.cooldown would act as "
        "if no question had been drawn before. Set the old value back, or set hpt.history.on_missing=empty"
    )
    assert not caplog.records
    for node in (EMPTY, {}, {"history": {"on_missing": "empty"}}):
        caplog.clear()
        found = resumed(tmp_path, after | node)
        assert not found.history.records and found.history.settings == meaning(found.settings)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert caplog.messages == [
            f"{tmp_path / FILE}: {message}, so its questions cannot be found again; it starts empty"
        ]


def test_the_old_value_set_back_and_on_missing_empty_are_remedies_that_work(tmp_path):
    saved(tmp_path, KEYED)
    with pytest.raises(UserError, match=r"Set the old value back, or set hpt\.history\.on_missing=empty"):
        resumed(tmp_path, NEEDS)
    assert len(resumed(tmp_path, KEYED | NEEDS).history.records) == 1
    again = resumed(tmp_path, EMPTY)
    assert not again.history.records
    again.save(str(tmp_path))
    assert not resumed(tmp_path, NEEDS).history.records, "the next checkpoint has the new identity"


@pytest.mark.parametrize("node", [{}, KEYED])
def test_the_same_identity_is_resumed_without_a_word(tmp_path, caplog, node):
    saved(tmp_path, node)
    found = resumed(tmp_path, node | NEEDS)
    assert len(found.history.records) == 1 and found.history.of("q").failures == 1
    assert not caplog.records


# --- what counts as solved --------------------------------------------------------------------------------------------

HALF, OWN = {"gate": {"success": 0.5}}, {"per_source": {"math": {"gate": {"success": 0.5}}}}


@pytest.mark.parametrize(
    ("before", "after", "messages"),
    [
        ({}, HALF, ["hpt.gate.success was 1.0, is 0.5 now"]),
        (HALF, {}, ["hpt.gate.success was 0.5, is 1.0 now"]),
        ({}, OWN, ["hpt.per_source.math.gate.success was 1.0, is 0.5 now"]),
        (OWN, {}, ["hpt.per_source.math.gate.success was 0.5, is 1.0 now"]),
        (OWN, HALF, ["hpt.gate.success was 1.0, is 0.5 now"]),
        ({}, HALF | {"per_source": {"math": {"gate": {"success": 1.0}}}}, ["hpt.gate.success was 1.0, is 0.5 now"]),
        ({}, HALF | {"per_source": {"math": {"gate": {"success": 0.25}}}},
         ["hpt.gate.success was 1.0, is 0.5 now", "hpt.per_source.math.gate.success was 1.0, is 0.25 now"]),
        ({}, {"per_source": {"math": {"gate": {"threshold": 0.5}}}}, []),
        ({"gate": {"threshold": 0.0}}, {"gate": {"threshold": 0.5, "count": 2}}, []),
    ],
)  # fmt: skip
def test_another_success_is_warned_of_and_the_history_kept(tmp_path, caplog, before, after, messages):
    """A data source without a gate of its own has the general one."""
    saved(tmp_path, before)
    found = resumed(tmp_path, after | NEEDS)
    kept = "what it counts as solved till here is the old gate's"
    assert caplog.messages == [f"{tmp_path / FILE}: {message}; {kept}" for message in messages]
    assert len(found.history.records) == 1 and found.history.of("q").drawn == 1
    caplog.clear()
    found.save(str(tmp_path))
    resumed(tmp_path, after | NEEDS)
    assert not caplog.records, "told once"


def test_the_description_of_a_runs_settings(tmp_path):
    node = {"gate": {"success": 0.75, "metric": "acc"}} | OWN
    described = {
        "hpt.question_key": None,
        "hpt.gate.success": 0.75,
        "hpt.gate.finished": True,
        "hpt.gate.metric": "acc",
        "hpt.per_source.math.gate.success": 0.5,
        "hpt.per_source.math.gate.finished": True,
        "hpt.per_source.math.gate.metric": "acc",
    }
    assert meaning(config.load(node)) == described
    assert meaning(config.load(KEYED))["hpt.question_key"] == "id"
    saved(tmp_path, node)
    assert History.read(str(tmp_path)).settings == described


# --- files of other versions, and damaged ones ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "version"),
    [
        (FILE, f'{{"verl_hpt_history": {VERSION + 1}}}\n', str(VERSION + 1)),
        (FILE, f'{{"verl_hpt_history": {VERSION - 1}, "more": []}}\n', str(VERSION - 1)),
        (EARLIER_FILE, "PK\x03\x04 an archive of arrays", "1 or 2"),
    ],
)
def test_a_history_of_another_version_goes_the_way_of_a_missing_one(tmp_path, caplog, name, content, version):
    path = tmp_path / name
    path.write_text(content)
    text = f"{path}: a history of version {version}; this verl-hpt reads version {VERSION}"
    with pytest.raises(UserError) as raised:
        resumed(tmp_path, NEEDS)
    assert str(raised.value) == (
        f"{text}, and hpt.history.cooldown would act as if no question had been drawn before. Resume with the verl-hpt "
        "that wrote it, or set hpt.history.on_missing=empty"
    )
    for node in (EMPTY, {}):
        caplog.clear()
        assert not resumed(tmp_path, node).history.records
        assert caplog.messages == [f"{text}; it starts empty"]


@pytest.mark.parametrize("node", [NEEDS, EMPTY, {}])
def test_a_damaged_history_stops_every_run_and_deleting_it_is_a_remedy(tmp_path, caplog, node):
    """A file that is there and cannot be read is no choice of the user's, whatever on_missing says."""
    path = tmp_path / FILE
    path.write_bytes(b'{"verl_hpt_hist')
    with pytest.raises(
        UserError, match=rf"{path}: no history .*\. Resume from another checkpoint, or delete this file"
    ):
        resumed(tmp_path, node)
    path.unlink()
    if node != NEEDS:
        assert not resumed(tmp_path, node).history.records and "it starts empty" in caplog.text


def test_a_refused_file_leaves_the_history_as_it_was(tmp_path):
    saved(tmp_path, KEYED)
    lifecycle = Trainer(NEEDS).lifecycle
    before = lifecycle.history
    with pytest.raises(UserError, match="cannot be found again"):
        lifecycle.load(str(tmp_path))
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-9])
    with pytest.raises(UserError, match="cut off or changed"):
        lifecycle.load(str(tmp_path))
    assert lifecycle.history is before and not before.records and before.settings == meaning(lifecycle.settings)
