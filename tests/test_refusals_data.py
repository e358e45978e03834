"""What training's data and tokenizer are refused for, before a model loads: row, column and remedy are named."""

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_questions import Letters
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl_config import start

from verl_hpt.demos.encode import stop_ids
from verl_hpt.errors import UserError
from verl_hpt.host.batch import Group
from verl_hpt.host.contract import FIELDS
from verl_hpt.host.run import Run


def ends_with(token: int | None) -> Letters:
    """A tokenizer whose EOS has this id."""
    tokenizer = Letters()
    tokenizer.eos_token_id = token
    return tokenizer


# --- the training data -----------------------------------------------------------------------------------------------


def check(run: Run, **columns) -> str:
    """What is wrong with a training set of these columns; nothing where all is well."""
    try:
        run.check_columns(SimpleNamespace(dataframe=Dataset.from_dict(columns)))
    except UserError as error:
        return str(error)
    return ""


ROWS = {"prompt": ["a", "b", "c"], "data_source": ["math", "code", "math"], "target": ["x", "y", "z"]}


def test_columns_that_are_not_there_are_named_with_those_that_are():
    run = start("++hpt.question_key=id", "++hpt.demo.source=author")
    text = check(run, **ROWS)
    for key in ("hpt.question_key='id'", "hpt.demo.source='author'"):
        assert f"{key}: the training data has no such column; it has prompt, data_source, target" in text
    assert "hpt.demo.key" not in text
    assert check(run, **ROWS, id=["1", "2", "3"], author=["a"] * 3) == ""


def test_a_run_without_settings_of_sources_needs_no_column_of_them():
    table = SimpleNamespace(column_names=["target", "data_source"])  # whose rows nobody reads
    start().check_columns(SimpleNamespace(dataframe=table))


def test_a_method_without_demonstrations_needs_no_column_of_them():
    assert check(start("++hpt.method=grpo"), prompt=["a"]) == ""
    assert "hpt.demo.key='target': the training data has no such column" in check(start(), prompt=["a"])


NAMES = ["responses", "rm_scores", "advantages", "extra_fields", "output", "validate", "hpt_row", "hpt_of_mine"]


@pytest.mark.parametrize("name", NAMES)
def test_a_column_that_would_overwrite_a_field_of_the_rollouts_is_refused(name):
    """verl's agent loop writes a question's columns over what it sampled (``field.update(kwargs)``)."""
    text = check(start(), **ROWS, **{name: [1, 2, 3]})
    assert text.startswith(f"the training data's column {name!r} has the name of a field of verl's rows")
    assert "rename it, or leave it out (`verl-hpt data convert --drop NAME`)" in text


def test_every_field_that_an_agent_loop_writes_is_kept_for_it():
    output = AgentLoopOutput(
        prompt_ids=[1], response_ids=[2], response_mask=[1], response_logprobs=[-1.0], reward_score=1.0, num_turns=2,
        metrics={}, routed_experts=[[0]], extra_fields={"a": 1},
    )  # fmt: skip
    assert output.as_dict().keys() <= set(FIELDS)


def test_every_argument_of_an_agent_loop_is_kept_for_it():
    """verl hands a row's columns on as keyword arguments; one of the same name fails every rollout."""
    for function in (AgentLoopWorkerTQ._run_agent_loop, AgentLoopWorkerTQ._agent_loop_postprocess):
        parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
        names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name[0] != "_"}
        assert names - {"self", "agent_name"} <= set(FIELDS), "agent_name is a column of verl's own"


def test_settings_of_a_source_that_no_row_has_are_refused_with_those_that_there_are():
    run = start("++hpt.per_source={math:{gate:{threshold:0.5}},maths:{gate:{threshold:0.5}}}")
    assert check(run, **ROWS) == (
        "hpt.per_source.maths: no row of the training data has this data_source; it has code, math"
    )
    many = {**ROWS, "data_source": ["math", "a", "b"]} | {"prompt": ["p"] * 14, "target": ["t"] * 14}
    many["data_source"] = ["math", *(f"s{i:02}" for i in range(13))]
    assert check(run, **many).endswith("it has math, s00, s01, s02, s03, s04, s05, s06, s07, s08 and 4 more")
    ten = {name: column[:10] for name, column in many.items()}
    assert check(run, **ten).endswith("it has math, s00, s01, s02, s03, s04, s05, s06, s07, s08")
    assert check(run, prompt=["a"], target=["x"]).count("this data_source; it has none") == 2
    assert check(start("++hpt.per_source={math:{gate:{threshold:0.5}}}"), **ROWS) == ""


@pytest.mark.parametrize("nothing", [None, "", "  ", float("nan")])
def test_a_question_key_without_a_value_is_refused_with_row_and_count(nothing):
    run, some = start("++hpt.question_key=id"), 7.5 if isinstance(nothing, float) else "q"
    text = check(run, **ROWS, id=[some, nothing, nothing])
    assert "hpt.question_key='id': 2 of 3 rows of the training data have no value there, the first is row 2" in text
    assert check(run, **ROWS, id=[some] * 3) == ""
    assert check(run, **ROWS, id=[0, 1, 2]) == ""


def test_a_dataset_of_the_users_own_is_not_looked_into():
    start("++hpt.question_key=id").check_columns(SimpleNamespace(rows=[1]))
    start("++hpt.question_key=id").check_columns(SimpleNamespace(dataframe=[1]))


@pytest.mark.parametrize("nothing", [None, "", float("nan"), np.float64("nan")])
def test_no_question_is_ever_called_none(nothing):
    run, group = start("++hpt.question_key=id"), Group("u", [0])
    cells = {"data_source": "math", "extra_info": {"index": 7}}
    with pytest.raises(UserError, match=r"data source 'math', index 7\): its column 'id' \(hpt\.question_key\) names"):
        run.read_question(group, cells | {"id": nothing})
    with pytest.raises(UserError, match=r"question None .* its column 'id'"):
        run.read_question(group, cells)
    for name, key in (("q", "q"), (0, "0"), (np.int64(3), "3")):
        run.read_question(group, {"id": name})
        assert group.key == key


PROMPTS = {"raw_prompt": [[{"role": "user", "content": text}] for text in ("one", "two")]}


def batch_of(monkeypatch, columns: dict, *overrides: str):
    """Our trainer at ``_read_questions``, with two questions of these columns in the queue."""
    from verl_hpt.host import trainer

    prompts = torch.nested.as_nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged)
    fields = {"prompts": prompts, **columns}
    monkeypatch.setattr(
        trainer.queue, "kv_batch_meta2batch_meta", lambda meta: SimpleNamespace(field_names=list(fields))
    )
    monkeypatch.setattr(trainer.queue.tq, "kv_batch_get", lambda *args, **_: fields)
    ours = object.__new__(trainer.hybrid(object))
    ours.hpt = start(*overrides)
    groups = [Group("a", [0]), Group("b", [1])]
    ours._read_questions(SimpleNamespace(keys=["a_0_0", "b_0_0"], partition_id="train"), groups)
    return groups


def test_the_trainer_names_questions_by_the_column_and_stops_at_one_without_a_name(monkeypatch):
    named = batch_of(monkeypatch, {"id": ["x", 5]}, "++hpt.question_key=id")
    assert [group.key for group in named] == ["x", "5"]
    with pytest.raises(UserError, match=r"question None .*'id' \(hpt\.question_key\) names no question"):
        batch_of(monkeypatch, {"id": ["x", None]}, "++hpt.question_key=id")
    hashed = [group.key for group in batch_of(monkeypatch, {"data_source": ["math", "math"], **PROMPTS})]
    assert len(set(hashed)) == 2 and all(len(key) == 16 for key in hashed)


IMAGE = {"role": "user", "content": [{"type": "image", "text": ""}, {"type": "text", "text": "?"}]}


@pytest.mark.parametrize(
    ("columns", "place"),
    [
        ({"images": [[], ["a.png"], None]}, "data.image_key='images': row 2"),
        ({"videos": [None, None, [{"video": "a.mp4"}]]}, "data.video_key='videos': row 3"),
        ({"audios": [["a.wav"], [], []]}, "data.audio_key='audios': row 1"),
        ({"prompt": [[IMAGE]] * 3}, "data.prompt_key='prompt': row 1 of the training data has an image"),
    ],
)
def test_prompts_with_images_are_refused_by_the_data_before_a_model_loads(columns, place):
    text = check(start(), **{**ROWS, **columns})
    assert text.startswith(place) and text.endswith(
        "multi-modal prompts are not supported yet. Leave such rows out, or train them with another adv_estimator"
    )


def test_columns_of_images_without_an_image_are_no_obstacle():
    empty = {"images": [[], [], []], "videos": [None, None, None]}
    assert check(start(), **ROWS, **empty) == ""
    assert check(start("data.image_key=pictures"), **ROWS, pictures=[["a.png"]] * 3).startswith(
        "data.image_key='pictures'"
    )


def test_the_trainer_refuses_prompts_with_images(monkeypatch):
    with pytest.raises(UserError, match="multi-modal prompts are not supported yet"):
        batch_of(monkeypatch, {"multi_modal_inputs": [{}, {"pixel_values": [1]}], **PROMPTS})


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def model_that_stops_at(folder, ids) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return str(folder)


def test_where_a_model_stops_is_what_its_generation_config_says(tmp_path):
    for ids, stops in ((5, {5}), ([5, 6], {5, 6}), (None, set())):
        assert stop_ids(model_that_stops_at(tmp_path / "model", ids)) == stops
    (tmp_path / "bare").mkdir()
    assert stop_ids(str(tmp_path / "bare")) == set()


@pytest.mark.parametrize(("overrides", "eos"), [([], 2), (["++hpt.demo.eos=5"], 5), (["++hpt.demo.eos=6"], 6)])
def test_demonstrations_end_where_generation_stops(tmp_path, overrides, eos):
    path = f"actor_rollout_ref.model.path={model_that_stops_at(tmp_path / 'model', [5, 6])}"
    run = start(path, *overrides, "data.max_response_length=9", "++hpt.seed=4")
    run.bind_tokenizer(ends_with(2))
    reader = run.reader
    assert (run.eos, reader.eos, reader.max_length, reader.seed, reader.template_kwargs) == (eos, eos, 9, 4, {})


def test_an_end_token_at_which_generation_does_not_stop_is_refused(tmp_path):
    path = f"actor_rollout_ref.model.path={model_that_stops_at(tmp_path / 'model', [5, 6])}"
    with pytest.raises(UserError, match=r"token 3 \(hpt\.demo\.eos\), but generation stops at \[2, 5, 6\]"):
        start(path, "++hpt.demo.eos=3").bind_tokenizer(ends_with(2))
    start(path, "++hpt.demo.eos=3", "++hpt.method=grpo").bind_tokenizer(ends_with(2))
    with pytest.raises(UserError, match=r"the tokenizer has no EOS token; set hpt\.demo\.eos"):
        start(path).bind_tokenizer(ends_with(None))
    start(path, "++hpt.demo.eos=6").bind_tokenizer(ends_with(None))


def test_the_reader_renders_with_the_runs_own_template_arguments(tmp_path):
    path = f"actor_rollout_ref.model.path={model_that_stops_at(tmp_path / 'model', 2)}"
    run = start(path, "++data.apply_chat_template_kwargs={enable_thinking: false}")
    run.bind_tokenizer(ends_with(2))
    assert run.reader.template_kwargs == {"enable_thinking": False}
