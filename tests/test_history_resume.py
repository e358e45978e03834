"""A run resumed with other settings: a history whose questions cannot be found again is not taken for theirs."""

import copy
import logging

import numpy as np
import pytest
from test_lifecycle import Trainer
from test_questions import Letters
from tiny_tokenizers import byte_pairs, tiny
from verl_config import compose

from verl_hpt import config, lifecycle
from verl_hpt.errors import UserError
from verl_hpt.history import History
from verl_hpt.history_file import FILE, VERSION
from verl_hpt.host.run import Run
from verl_hpt.lifecycle import KEY, TOKENS, Lifecycle, depends, fingerprint

NEEDS = {"history": {"cooldown": 3}}
EMPTY = {"history": {"cooldown": 3, "on_missing": "empty"}}


def saved(folder, node=None, tokens="aa") -> None:
    """A checkpoint of a run with these settings that has drawn one question."""
    trainer = Trainer(node)
    trainer.lifecycle.history.depends = depends(trainer.settings, tokens)
    trainer.step({"q": [0] * 4})
    trainer.lifecycle.save(str(folder))


def resumed(folder, node=None, tokens="aa") -> Lifecycle:
    found = Trainer(node).lifecycle
    found.history.depends = depends(found.settings, tokens)
    found.load(str(folder))
    return found


# --- identity ---------------------------------------------------------------------------------------------------------

KEYED, OTHER = {"question_key": "id"}, {"question_key": "name"}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (({}, "aa"), ({}, "bb"), f'{TOKENS} was "aa", is "bb" now'),
        (({}, "aa"), (KEYED, "aa"), f'{KEY} was null, is "id" now'),
        ((KEYED, "aa"), ({}, "bb"), f'{KEY} was "id", is null now'),
        ((KEYED, "aa"), (OTHER, "bb"), f'{KEY} was "id", is "name" now'),
    ],
)
def test_another_identity_is_named_and_stops_a_run_that_needs_its_history(tmp_path, caplog, before, after, message):
    saved(tmp_path, *before)
    with pytest.raises(UserError) as raised:
        resumed(tmp_path, after[0] | NEEDS, after[1])
    assert str(raised.value) == (
        f"{tmp_path / FILE}: {message}, so its questions cannot be found again, and hpt.history.cooldown would act as "
        "if no question had been drawn before. Set the old value back, or set hpt.history.on_missing=empty"
    )
    assert not caplog.records
    for node in (EMPTY, {}, {"history": {"on_missing": "empty"}}):
        caplog.clear()
        found = resumed(tmp_path, after[0] | node, after[1])
        assert len(found.history) == 0 and found.history.depends == depends(found.settings, after[1])
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert caplog.messages == [
            f"{tmp_path / FILE}: {message}, so its questions cannot be found again; it starts empty"
        ]


def test_the_old_value_set_back_and_on_missing_empty_are_remedies_that_work(tmp_path):
    saved(tmp_path, KEYED)
    with pytest.raises(UserError, match=r"Set the old value back, or set hpt\.history\.on_missing=empty"):
        resumed(tmp_path, NEEDS)
    assert len(resumed(tmp_path, KEYED | NEEDS).history) == 1
    again = resumed(tmp_path, EMPTY)
    assert len(again.history) == 0
    again.save(str(tmp_path))
    assert len(resumed(tmp_path, NEEDS).history) == 0, "the next checkpoint has the new identity"


@pytest.mark.parametrize(("node", "tokens"), [(None, "aa"), (KEYED, "bb")])
def test_the_same_identity_is_resumed_without_a_word(tmp_path, caplog, node, tokens):
    """With a column that names the questions the tokenizer does not matter."""
    saved(tmp_path, node, "aa")
    found = resumed(tmp_path, (node or {}) | NEEDS, tokens)
    assert len(found.history) == 1 and found.history.column("failures").tolist() == [1]
    assert not caplog.records


def test_a_question_that_failed_under_another_identity_gets_its_rollouts_back():
    """The early gate reads the row of the latest draw, not the first row that the prompt led to."""
    trainer = Trainer({"history": {"early_gate": {"after_failures": 2}}})
    ask = (["src"], [trainer.prompt("q")])
    for _ in range(2):
        trainer.step({"q": [0] * 4})
    assert trainer.lifecycle.spared(*ask) == [3]
    history = trainer.lifecycle.history
    old, prompts = history._index.keys[:1], history._prompts.keys
    one, none = np.array([1]), np.array([False])
    history.observe(3, lifecycle.Draw(old ^ np.uint64(1), prompts, one, one * 4, none, ~none))
    assert trainer.lifecycle.spared(*ask) == [0]


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
    assert len(found.history) == 1 and found.history.column("drawn").tolist() == [1]
    caplog.clear()
    found.save(str(tmp_path))
    resumed(tmp_path, after | NEEDS)
    assert not caplog.records, "told once"


def test_the_description_of_a_runs_settings():
    settings = config.load({"gate": {"success": 0.75}} | OWN)
    assert depends(settings, "aa") == {
        "identity": {"hpt.question_key": None, TOKENS: "aa"},
        "flags": {
            "hpt.gate": {"success": 0.75, "finished": True, "metric": None},
            "hpt.per_source.math.gate": {"success": 0.5, "finished": True, "metric": None},
        },
    }
    assert depends(config.load(KEYED), "aa")["identity"] == {"hpt.question_key": "id", TOKENS: None}


# --- files of other versions, and damaged ones ------------------------------------------------------------------------


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
def test_a_history_of_another_version_goes_the_way_of_a_missing_one(tmp_path, caplog, version):
    saved(tmp_path)
    path = tmp_path / FILE
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "depends"} | {"version": np.array(version)}
    np.savez(path, **arrays)
    text = f"{path}: a history of version {version}; this verl-hpt reads version {VERSION}"
    with pytest.raises(UserError) as raised:
        resumed(tmp_path, NEEDS)
    assert str(raised.value) == (
        f"{text}, and hpt.history.cooldown would act as if no question had been drawn before. Resume with the verl-hpt "
        "that wrote it, or set hpt.history.on_missing=empty"
    )
    for node in (EMPTY, {}):
        caplog.clear()
        assert len(resumed(tmp_path, node).history) == 0
        assert caplog.messages == [f"{text}; it starts empty"]


@pytest.mark.parametrize("node", [NEEDS, EMPTY, {}])
def test_a_damaged_history_stops_every_run_and_deleting_it_is_a_remedy(tmp_path, caplog, node):
    """A file that is there and cannot be read is no choice of the user's, whatever on_missing says."""
    path = tmp_path / FILE
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(
        UserError, match=rf"{path}: no history .*\. Resume from another checkpoint, or delete this file"
    ):
        resumed(tmp_path, node)
    path.unlink()
    if node != NEEDS:
        assert len(resumed(tmp_path, node).history) == 0 and "it starts empty" in caplog.text


# --- how prompts become tokens ----------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_again_and_another_for_each_change_that_reaches_the_tokens():
    qwen3 = tiny("qwen3")
    other_template, other_default, smaller = copy.deepcopy(qwen3), copy.deepcopy(qwen3), byte_pairs("qwen3", 1900)
    other_template.chat_template = qwen3.chat_template.replace("'<|im_start|>' +", "'<|im_start|> ' +")
    other_default.chat_template = "{%- if messages[0].role != 'system' -%}Be kind.{%- endif -%}" + qwen3.chat_template
    fingerprints = [
        fingerprint(qwen3, {}),
        fingerprint(qwen3, {"enable_thinking": False}),
        *(fingerprint(changed, {}) for changed in (other_template, other_default, smaller)),
        *(fingerprint(tiny(style), {}) for style in ("qwen2.5", "llama3")),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(short) == 16 for short in fingerprints)
    assert fingerprint(copy.deepcopy(qwen3), {"unread": 1, "tokenize": True}) == fingerprints[0]


def test_a_template_that_changes_only_what_stands_before_an_answer_or_after_a_system_message_is_told_apart():
    class Template(Letters):
        def __init__(self, system="S", assistant="A", generation="G"):
            self.marks = {"system": system, "assistant": assistant, "user": "U", "generation": generation}

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            text = "".join(self.marks[message["role"]] + message["content"] for message in messages)
            return text + self.marks["generation"] * add_generation_prompt

    changed = [Template(), Template(system="s"), Template(assistant="a"), Template(generation="g")]
    assert len({fingerprint(tokenizer, {}) for tokenizer in changed}) == len(changed)


def test_a_template_that_refuses_a_role_and_a_tokenizer_without_one_have_a_fingerprint():
    strict = copy.deepcopy(tiny("llama3"))
    strict.chat_template = (
        "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
        + strict.chat_template
    )
    assert fingerprint(strict, {}) == fingerprint(strict, {}) != fingerprint(tiny("llama3"), {})

    class Upper(Letters):
        def encode(self, text, add_special_tokens=False):
            return super().encode(text.upper())

    assert fingerprint(Letters(), {}) == fingerprint(Letters(), {}) != fingerprint(Upper(), {})


def test_a_run_describes_its_tokenizer_and_template_settings_once_it_has_them(tmp_path):
    """``Run.meet`` comes before verl loads a checkpoint."""
    thinking = {"enable_thinking": False}
    run, trainer = Run.__new__(Run), Trainer()
    run.settings, run.method, run.lifecycle = trainer.settings, trainer.method, trainer.lifecycle
    run.verl_config = compose(
        "data.max_response_length=8",
        "++data.apply_chat_template_kwargs={enable_thinking: false}",
        f"actor_rollout_ref.model.path={tmp_path / 'nothing'}",
    )
    run.meet(tiny("qwen3"))
    assert run.lifecycle.history.depends == depends(trainer.settings, fingerprint(tiny("qwen3"), thinking))


def test_the_tokenizer_of_a_run_is_described_in_its_checkpoint(tmp_path):
    trainer = Trainer()
    trainer.lifecycle.bind_tokenizer(tiny("qwen3"), {"enable_thinking": False})
    trainer.lifecycle.save(str(tmp_path))
    identity = {KEY: None, TOKENS: fingerprint(tiny("qwen3"), {"enable_thinking": False})}
    assert History.read(str(tmp_path / FILE)).depends == {
        "identity": identity,
        "flags": {"hpt.gate": {"success": 1.0, "finished": True, "metric": None}},
    }


def test_tokens_that_a_tokenizer_puts_around_every_text_are_not_in_its_fingerprint():
    """Prompts and answers are tokenised without them."""

    class Begins(Letters):
        def encode(self, text, add_special_tokens=True):
            return [1] * add_special_tokens + super().encode(text)

    assert fingerprint(Begins(), {}) == fingerprint(Letters(), {})
