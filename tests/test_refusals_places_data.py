"""What training's data and a stream's files are refused for where demonstrations stand elsewhere."""

import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset
from test_refusals_data import ROWS, check
from verl_config import start

from verl_hpt.errors import UserError
from verl_hpt.host.run import Run

ROLL = "actor_rollout_ref.rollout"
STREAM = ["++hpt.method=chord_mu", "++hpt.stream.files=experts.parquet"]


# --- the training data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hpt_start", "hpt_started", "hpt_prompt", "hpt_row"])
@pytest.mark.parametrize("method", ["prefix_rft", "questa", "relift", "hpt"])
def test_columns_with_our_prefix_are_refused_whatever_the_method(method, name):
    text = check(start(f"++hpt.method={method}", f"{ROLL}.n=4"), **ROWS, **{name: [1, 2, 3]})
    assert text == (
        f"the training data's column {name!r} has the name of a field of verl's rows, or of an argument of its agent "
        "loop, and would take its place: rename it, or leave it out (`verl-hpt data convert --drop NAME`)"
    )
    assert check(start(f"++hpt.method={method}", f"{ROLL}.n=4"), **ROWS, my_start=[1, 2, 3]) == ""


@pytest.mark.parametrize(
    ("method", "fine"), [("prefix_rft", False), ("stephint", False), ("guide", False), ("relift", True), ("hpt", True)]
)
def test_an_agent_loop_of_the_datas_own_is_refused_where_ours_is_needed(method, fine):
    text = check(start(f"++hpt.method={method}", f"{ROLL}.n=8"), **ROWS, agent_name=["tool_agent"] * 3)
    refusal = "the training data's column 'agent_name' has the name of a field of verl's rows"
    assert text == "" if fine else text.startswith(refusal)


@pytest.mark.parametrize("method", ["prefix_rft", "stephint", "questa", "guide", "relift"])
def test_the_column_of_demonstrations_is_missed_where_something_reads_it(method):
    run = start(f"++hpt.method={method}", f"{ROLL}.n=8", "++hpt.demo.key=answer")
    assert check(run, **ROWS).startswith("hpt.demo.key='answer': the training data has no such column")


def test_training_data_needs_no_demonstrations_where_a_stream_or_the_policy_brings_them():
    assert check(start(*STREAM, "++hpt.demo.key=answer"), **ROWS) == ""
    assert check(start("++hpt.method=relift", "++hpt.buffer.content=successes", "++hpt.demo.key=answer"), **ROWS) == ""


# --- a stream's files -------------------------------------------------------------------------------------------------

EXPERTS = {"prompt": ["x", "y"], "data_source": ["expert"] * 2, "target": ["1", "2"]}


def data(**columns):
    return SimpleNamespace(dataframe=Dataset.from_dict(columns))


def check_stream(run: Run, validation=None, **columns) -> str:
    """What is wrong with a stream's files of these columns; nothing where all is well."""
    try:
        run.check_stream(data(**columns), validation)
    except UserError as error:
        return str(error)
    return ""


def test_columns_that_a_streams_files_lack_are_named_with_those_that_they_have():
    run = start(*STREAM, "++hpt.demo.key=answer", "++hpt.demo.token_weights=w")
    text = check_stream(run, **EXPERTS)
    has = "hpt.stream.files have no such column; they have prompt, data_source, target"
    assert text == (
        "the stream's files do not fit the settings:\n"
        f"  - hpt.demo.key='answer': {has}\n  - hpt.demo.token_weights='w': {has}"
    )
    assert check_stream(run, **EXPERTS, answer=["1", "2"], w=[[1.0], [1.0]]) == ""
    assert check_stream(start(*STREAM), **EXPERTS) == ""


def test_the_column_that_names_questions_must_be_in_a_streams_files_too():
    run = start(*STREAM, "++hpt.question_key=id")
    text = "hpt.question_key='id': hpt.stream.files have no such column; they have prompt, data_source, target"
    assert check_stream(run, **EXPERTS) == text and check_stream(run, **EXPERTS, id=[1, 2]) == ""


IMAGE = [{"role": "user", "content": [{"type": "image", "text": ""}, {"type": "text", "text": "?"}]}]


@pytest.mark.parametrize(
    ("columns", "place"),
    [
        ({"images": [[], ["a.png"]]}, "data.image_key='images': row 2 of hpt.stream.files has"),
        ({"videos": [["a.mp4"], None]}, "data.video_key='videos': row 1 of hpt.stream.files has"),
        ({"audios": [["a.wav"], []]}, "data.audio_key='audios': row 1 of hpt.stream.files has"),
        ({"prompt": [IMAGE] * 2}, "data.prompt_key='prompt': row 1 of hpt.stream.files has an image"),
    ],
)
def test_prompts_with_images_in_a_streams_files_are_refused(columns, place):
    text = check_stream(start(*STREAM), **{**EXPERTS, **columns})
    assert text.startswith(place) and "multi-modal prompts are not supported yet" in text
    assert check_stream(start(*STREAM), **EXPERTS, images=[[], None]) == ""


def test_prompts_of_a_stream_that_are_validation_prompts_too_are_counted_in_a_warning(caplog):
    messages = [[{"role": "user", "content": text}] for text in ("same", "other", "same")]
    rows = {"prompt": messages, "target": ["1", "2", "3"]}
    held_out = data(prompt=[messages[0], [{"role": "user", "content": "elsewhere"}]])
    with caplog.at_level(logging.WARNING):
        assert check_stream(start(*STREAM), held_out, **rows) == ""
    assert [record.message for record in caplog.records if record.name.startswith("verl_hpt")] == [
        "hpt.stream.files: 2 of 3 prompts are validation prompts too"
    ]
    caplog.clear()
    for nothing in (data(prompt=[messages[0]], more=[1]).dataframe, None, data(question=["same"]), data(prompt=["z"])):
        assert check_stream(start(*STREAM), nothing, **rows) == ""
    assert not [record for record in caplog.records if record.name.startswith("verl_hpt")]


def test_a_dataset_of_the_users_own_is_not_looked_into():
    start(*STREAM).check_stream(SimpleNamespace(rows=[1]), None)
    start(*STREAM).check_stream(SimpleNamespace(dataframe=[1]), None)
