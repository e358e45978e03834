"""`verl-hpt check-run` looks into the run's own files, with its tokenizer, its limits and its reward."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launches import HPT, LAUNCH, script, usual

REWARD = """
def score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0, **kwargs):
    return {"score": float(ground_truth in solution_str) - bonus, "acc": float(ground_truth in solution_str)}
"""


@pytest.fixture
def run_of(check_run, tokenizers, tmp_path):
    """Check a run on a training file of these columns, with the tiny tokenizer and the reward function above."""
    (tmp_path / "reward.py").write_text(REWARD)

    def run(*overrides: str, drop: str | None = None, **columns) -> tuple[int, str]:
        rows = {
            "data_source": ["sums"] * 4,
            "prompt": [[{"role": "user", "content": f"What is {i} + {i}?"}] for i in range(4)],
            "reward_model": [{"style": "rule", "ground_truth": str(2 * i)} for i in range(4)],
            "extra_info": [{"index": i} for i in range(4)],
            "target": [f"It is {2 * i}." for i in range(4)],
            **columns,
        }
        pq.write_table(pa.table({name: column for name, column in rows.items() if name != drop}), "train.parquet")
        return check_run(
            *usual(HPT, "data.train_files=train.parquet", "data.val_files=[train.parquet,other.parquet]",
                   f"actor_rollout_ref.model.path={tokenizers / 'qwen2.5'}", "data.max_response_length=64",
                   "reward.custom_reward_function.path=reward.py", "reward.custom_reward_function.name=score",
                   *overrides), data=True
        )  # fmt: skip

    return run


def test_the_runs_own_files_are_checked_with_its_tokenizer_limits_and_reward(run_of):
    status, printed = run_of("data.val_files=null")
    assert status == 0, printed
    for text in (
        "train.parquet: 4 rows",
        "4 usable",
        "Row 1, as it is trained",
        "longer than a response may be (64 tokens)",
        "Reward of the demonstrations under reward.py:score",
        "sums: mean 1.0000 over 4, not solved 0",
    ):
        assert text in printed


def test_what_is_wrong_with_the_files_is_harm(run_of):
    status, printed = run_of()
    assert status == 1 and "rows of validation whose question is in this file: 4" in printed
    assert "note: data.val_files: other.parquet is not on this machine" in printed
    status, printed = run_of("data.val_files=null", target=["It is wrong."] * 4)
    assert status == 1 and "not solved 4" in printed
    status, printed = run_of("data.val_files=null", drop="target")
    assert status == 1 and "hpt.demo.key='target': the training data has no such column" in printed
    status, printed = run_of("data.val_files=null", "data.train_files=other.parquet")
    assert status == 1 and "HARM: data.train_files: other.parquet: no such file on this machine" in printed
    Path("train.jsonl").write_text("no json\n")
    status, printed = run_of("data.val_files=null", "data.train_files=train.jsonl")
    assert status == 1 and "train.jsonl" in printed


def test_training_files_of_json_lines_are_looked_into_too(run_of):
    run_of("data.val_files=null")
    rows = pq.read_table("train.parquet").to_pylist()
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, printed = run_of("data.val_files=null", "data.train_files=train.jsonl", "++hpt.demo.source=author")
    assert (
        status == 1 and "hpt.demo.source='author': the training data has no such column; it has data_source" in printed
    )
    per_source = "++hpt.per_source={maths:{gate:{threshold:0.5}}}"
    status, printed = run_of("data.val_files=null", "data.train_files=train.jsonl", per_source)
    assert status == 1 and "no row of the training data has this data_source; it has sums" in printed


def test_without_a_reward_of_its_own_a_run_is_graded_as_verl_would(run_of):
    """verl's default scorer knows GSM8K's source, and raises for one that it does not know."""
    own = ("data.val_files=null", "reward.custom_reward_function.path=null")
    worked = {"data_source": ["openai/gsm8k"] * 4, "target": [f"Adding.\n#### {2 * i}" for i in range(4)]}
    status, printed = run_of(*own, **worked)
    assert status == 0 and "openai/gsm8k: mean 1.0000 over 4, not solved 0" in printed, printed
    status, printed = run_of(*own)
    assert status == 1 and "HARM: the reward function fails" in printed and "sums" in printed, printed


def test_the_settings_of_the_run_reach_the_check_of_its_files(run_of):
    status, printed = run_of(
        "data.val_files=null", "++hpt.demo.key=answer", answer=["It is 0. 2 4 6"] * 4, drop="target"
    )
    assert status == 0 and "4 usable" in printed
    bonus = "+reward.custom_reward_function.reward_kwargs.bonus=0.5"
    assert "mean 0.5000 over 4, not solved 4" in run_of("data.val_files=null", bonus)[1]
    assert run_of("data.val_files=null", bonus, "++hpt.gate.success=0.5")[0] == 0
    status, printed = run_of("data.val_files=null", bonus, "++hpt.gate.metric=acc")
    assert status == 0 and "note: the gate reads acc: scores are shown here, and none is judged" in printed
    status, printed = run_of("data.val_files=null", "data.max_response_length=3")
    assert status == 1 and "limit 3" in printed
    status, printed = run_of("data.val_files=null", "++hpt.method=grpo", drop="target")
    assert status == 0 and "method grpo reads no demonstrations" in printed


def test_the_files_of_a_stream_are_looked_into_and_missed(run_of, tmp_path):
    stream = tmp_path / "experts.parquet"
    overrides = ("data.val_files=null", "++hpt.method=chord_mu", f"++hpt.stream.files={stream}")
    status, printed = run_of(*overrides, drop="target")
    assert status == 1 and f"hpt.stream.files: {stream}: no such file on this machine" in printed
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "data_source": "openai/gsm8k", "target": "x" * 9,
             "reward_model": {"ground_truth": "1"}} for i in range(3)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), stream)
    status, printed = run_of(*overrides, drop="target")
    assert "method chord_mu reads no demonstrations there" in printed and "3 rows with 3 different questions" in printed
    status, printed = run_of(*overrides, "data.max_response_length=3", drop="target")
    assert status == 1 and "limit 3" in printed


def test_images_are_refused_before_any_model_loads(run_of):
    status, printed = run_of("data.val_files=null", images=[[], [], ["a.png"], []])
    assert status == 1
    assert "data.image_key='images': row 3 of the training data has something there; multi-modal prompts are" in printed
    assert run_of("data.val_files=null", images=[[], None, [], []])[0] == 0
    parts = [[{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]}]] * 4
    status, printed = run_of("data.val_files=null", prompt=parts)
    assert status == 1 and "data.prompt_key='prompt': row 1 of the training data has an image" in printed


def test_what_is_not_on_this_machine_is_noted_and_nothing_is_downloaded(run_of, check_run, tmp_path):
    status, printed = run_of("data.val_files=null", "actor_rollout_ref.model.path=owner/no-such-model")
    assert (
        status == 0
        and "note: actor_rollout_ref.model.path=owner/no-such-model: its tokenizer is not on this" in printed
    )
    made = script(tmp_path, f"python prepare.py\n{LAUNCH} {HPT} data.train_files=made.parquet\n")
    status, printed = check_run("bash", made, data=True)
    assert status == 0 and "not checked: data.train_files: made.parquet is not on this machine" in printed
