"""What a run makes of verl's composed config, by value: plan settings, loss spec, columns, end token, template."""

import json

import numpy as np
import pytest
import torch
from quickstart_task import byte_tokenizer
from tiny_run import make_run
from verl.trainer.ppo.core_algos import kl_penalty

from verl_hpt.demos.encode import stop_ids
from verl_hpt.errors import UserError
from verl_hpt.gate import GateSettings
from verl_hpt.host.rows import columns_of_tokens, row_columns
from verl_hpt.loss import ROW_COLUMNS, ROW_FIELD, TEACHER, WEIGHTS
from verl_hpt.plan import DEMO, PADDING, ROLLOUT, PlanSettings, Question, plan

ACTOR, ROLL, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
TEACHER_METHOD = "++hpt.compose={demos: [{kind: R, estimator: {reference: teacher, advantage: reward}}]}"
TEACHER_COLUMN = "++hpt.demo.teacher_log_prob=t"


# --- the plan's settings ----------------------------------------------------------------------------------------------


def test_the_plan_gets_the_runs_own_numbers():
    run = make_run(
        f"{ACTOR}.ppo_mini_batch_size=48",
        f"{ACTOR}.ppo_micro_batch_size_per_gpu=3",
        "++hpt.method=hpt_mix_on",
        "++hpt.normalization=sequence",
        "++hpt.demo_coef=0.35",
        "++hpt.rl_length_scale=77",
        "++hpt.seed=1000",
    )
    made = run.plan_settings(step=7, ranks=5)
    assert (made.method.name, made.normalization, made.length_scale) == ("hpt_mix_on", "sequence", 77.0)
    assert (made.questions_per_step, made.ranks, made.rows_multiple, made.seed) == (48, 5, 3, 1007)
    assert made.demo_coef == 0.35
    assert run.plan_settings(step=8, ranks=2).seed == 1008 and run.plan_settings(step=8, ranks=2).ranks == 2


def test_without_settings_of_its_own_the_length_scale_is_verls_and_the_normalization_the_methods():
    made = make_run("data.max_response_length=384", "++hpt.method=sft").plan_settings(1, 1)
    assert (made.length_scale, made.normalization, made.demo_coef, made.seed) == (384.0, "token", 0.1, 1)
    made = make_run("data.max_response_length=384").plan_settings(1, 1)
    assert (made.length_scale, made.normalization) == (384.0, "question")


def test_rows_of_a_rank_are_a_multiple_of_the_micro_batch_only_where_it_is_fixed():
    fixed = [f"{ACTOR}.ppo_micro_batch_size_per_gpu=6"]
    assert make_run(*fixed).plan_settings(1, 1).rows_multiple == 6
    assert make_run(*fixed, f"{ACTOR}.use_dynamic_bsz=True").plan_settings(1, 1).rows_multiple == 1


def test_gates_are_those_of_the_step_and_of_the_source():
    run = make_run(
        "++hpt.gate={threshold: {start: 0.8, end: 0.2, steps: 10}, success: 0.5}",
        "++hpt.per_source={a/b: {gate: {count: 3}}, c: {gate: {off: {start: 1.0, end: 0.5, steps: 4}}}}",
    )
    made = run.plan_settings(5, 1)
    assert made.gate.threshold == pytest.approx(0.5) and made.gate.success == 0.5
    assert made.gate_of("elsewhere") == made.gate
    assert (made.gate_of("a/b").count, made.gate_of("a/b").threshold, made.gate_of("a/b").success) == (3, 0.0, 0.5)
    assert made.gate_of("c").threshold == pytest.approx(0.5) and made.gate_of("c").off == 0.5
    assert [run.plan_settings(step, 1).gate.threshold for step in (0, 10, 99)] == pytest.approx([0.8, 0.2, 0.2])
    assert run.plan_settings(1, 1).gates["c"].off == pytest.approx(0.875)


def test_a_table_of_the_soft_gate_arrives_as_tuples():
    gate = make_run("++hpt.method=hpt_soft", "++hpt.gate.soft=[[0, 0, 1], [1, 0, 0]]").plan_settings(1, 1).gate
    assert gate.soft == ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0))


# --- the loss spec ----------------------------------------------------------------------------------------------------


def test_constants_come_from_verls_clip_range_and_from_options():
    made = make_run(
        f"{ACTOR}.clip_ratio_low=0.11",
        f"{ACTOR}.clip_ratio_high=0.33",
        f"{ACTOR}.clip_ratio_c=7",
        "++hpt.options={shaping: 0.4, trust: 0.05}",
    ).loss_spec()
    constants = made.constants
    assert (constants.clip_low, constants.clip_high, constants.clip_c) == (0.11, 0.33, 7.0)
    assert (constants.shaping, constants.trust, constants.psft_clip) == (0.4, 0.05, 0.28)
    assert made.method.name == "hpt" and made.kl_penalty is kl_penalty


def test_a_plain_run_asks_for_three_fields_and_has_no_entropy_and_no_kl():
    made = make_run().loss_spec()
    assert made.fields == ("response_mask", "old_log_probs", ROW_FIELD)
    assert (made.entropy_coeff, made.kl_coef) == (0.0, 0.0)


def test_entropy_and_kl_are_verls():
    settings = [
        f"{ACTOR}.{x}" for x in ("entropy_coeff=0.02", "use_kl_loss=True", "kl_loss_coef=0.3", "kl_loss_type=mse")
    ]
    made = make_run(*settings).loss_spec()
    assert (made.entropy_coeff, made.kl_coef, made.kl_type) == (0.02, 0.3, "mse")
    assert made.fields == ("response_mask", "old_log_probs", ROW_FIELD, "ref_log_prob")


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        (["use_kl_loss=False", "kl_loss_coef=0.3"], []),
        (["use_kl_loss=True", "kl_loss_coef=0"], []),
    ],
)
def test_a_kl_that_is_off_asks_for_no_reference(settings, fields):
    made = make_run(*(f"{ACTOR}.{x}" for x in settings)).loss_spec()
    assert made.kl_coef == 0.0 and "ref_log_prob" not in made.fields


def test_a_method_without_rollouts_has_neither_entropy_nor_kl_nor_rollout_correction():
    on = [f"{ACTOR}.{x}" for x in ("entropy_coeff=0.02", "use_kl_loss=True", "kl_loss_coef=0.3")]
    made = make_run(*on, "algorithm.rollout_correction.rollout_is=token", "++hpt.method=sft").loss_spec()
    assert (made.entropy_coeff, made.kl_coef) == (0.0, 0.0)
    assert made.fields == ("response_mask", "old_log_probs", ROW_FIELD)


def test_a_method_that_reads_the_reference_gets_it_without_a_kl_loss():
    made = make_run(f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=0", "++hpt.method=asft").loss_spec()
    assert "ref_log_prob" in made.fields and made.kl_coef == 0.0


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_rollout_correction_asks_for_its_weights(mode):
    assert "rollout_is_weights" in make_run(f"algorithm.rollout_correction.rollout_is={mode}").loss_spec().fields


def test_a_critic_asks_for_its_advantages():
    assert "advantages" in make_run("++hpt.method=ppo", "critic.enable=True").loss_spec().fields
    assert "advantages" not in make_run("critic.enable=True").loss_spec().fields


def test_columns_of_tokens_are_asked_for_where_a_setting_or_the_method_names_them():
    run = make_run("++hpt.demo.token_weights=w")
    assert run.token_columns == ("token_weights",) and run.own_fields == (ROW_FIELD, WEIGHTS)
    assert run.loss_spec().fields == ("response_mask", "old_log_probs", ROW_FIELD, WEIGHTS)
    run = make_run("++hpt.demo.token_weights=w", TEACHER_METHOD, TEACHER_COLUMN)
    assert run.token_columns == ("token_weights", "teacher_log_prob") and run.own_fields == (
        ROW_FIELD,
        WEIGHTS,
        TEACHER,
    )
    assert run.loss_spec().fields[-2:] == (WEIGHTS, TEACHER)
    assert make_run("++hpt.method=grpo", "++hpt.demo.token_weights=w").token_columns == ()


# --- verl's update, and the passes before it --------------------------------------------------------------------------


def small_plan(method="hpt", coefficient=0.1, micro_batch=4):
    """Two questions, one taught by a demonstration; 4 rows, one of them padding."""
    questions = [
        Question("a", np.zeros(2), np.array([3, 4]), demo_lengths=np.array([5]), demo_rewards=np.array([0.75])),
        Question("b", np.array([1.0, 0.25]), np.array([3, 4]), demo_lengths=np.zeros(0, int)),
    ]
    settings = PlanSettings(
        make_run(f"++hpt.method={method}").method, "question", 10.0, coefficient, GateSettings(),
        questions_per_step=2, rows_multiple=micro_batch,
    )  # fmt: skip
    return plan(questions, settings)


def test_verl_is_told_the_plans_rows_a_step():
    made = small_plan(micro_batch=6)
    assert made.rows_per_step == 6
    assert make_run(f"{ROLL}.n=8").update_settings(made) == {
        f"{ACTOR}.ppo_mini_batch_size": 6,
        f"{ROLL}.n": 1,
    }


def test_verl_computes_the_entropy_for_methods_that_read_it():
    assert make_run("++hpt.method=srft").update_settings(small_plan())[f"{ACTOR}.calculate_entropy"] is True


@pytest.mark.parametrize(
    ("rollout", "ref", "old_rows", "ref_rows"),
    [
        ({"log_prob_micro_batch_size_per_gpu": 4}, {"log_prob_micro_batch_size_per_gpu": 6}, 12, 36),
        ({"log_prob_micro_batch_size_per_gpu": 4}, {"log_prob_use_dynamic_bsz": True}, 12, 12),
        ({"log_prob_use_dynamic_bsz": True}, {"log_prob_micro_batch_size_per_gpu": 6}, 3, 18),
        ({"log_prob_use_dynamic_bsz": True, "log_prob_micro_batch_size_per_gpu": 4}, {}, 3, 3),
        ({}, {}, 3, 3),
    ],
)
def test_rows_of_a_pass_divide_by_ranks_and_micro_batches(rollout, ref, old_rows, ref_rows):
    settings = [f"{part}.{k}={v}" for part, own in ((ROLL, rollout), (REF, ref)) for k, v in own.items()]
    run = make_run(*settings)
    assert run.log_prob_multiple(3, "old_log_prob") == old_rows
    assert run.log_prob_multiple(3, "ref_log_prob") == ref_rows


@pytest.mark.parametrize(
    ("settings", "choosing", "fields"),
    [
        ([], None, ()),
        (["++hpt.method=psft"], None, ("rollout_log_probs",)),
        (["++hpt.method=psft", f"{ROLL}.calculate_log_probs=False"], None, ()),
        (["++hpt.demo.select=likelihood", "++hpt.demo.likelihood_of=policy"], "old_log_prob", ("rollout_log_probs",)),
        (
            ["++hpt.demo.select=likelihood", "++hpt.demo.likelihood_of=reference", f"{ACTOR}.use_kl_loss=True"],
            "ref_log_prob",
            (),
        ),
        (["++hpt.demo.select=likelihood", "++hpt.demo.log_likelihood=l"], None, ()),
        (["++hpt.method=grpo", "++hpt.demo.select=likelihood", "++hpt.demo.likelihood_of=policy"], None, ()),
    ],
)
def test_a_pass_over_demonstrations_is_made_where_something_reads_it(settings, choosing, fields):
    run = make_run(*settings)
    assert (run.choosing_pass, run.pass_fields) == (choosing, fields)


# --- columns ----------------------------------------------------------------------------------------------------------


def test_every_column_of_a_row_by_value_and_padding_counts_as_a_demonstration_of_nothing():
    made = small_plan()
    assert list(made.kind) == [DEMO, ROLLOUT, ROLLOUT] and sorted(made.layout) == [PADDING, 0, 1, 2]
    marks = row_columns(made, np.array([2, PADDING, 0, 1]), np.array([-1.5, 0.0, 0.0]))
    assert list(marks) == [ROW_FIELD] and marks[ROW_FIELD].dtype == torch.float32 and marks[ROW_FIELD].is_nested
    rows = [dict(zip(ROW_COLUMNS, row.tolist(), strict=False)) for row in marks[ROW_FIELD].unbind()]
    named = ("is_demo", "w_rl", "w_demo", "w_entropy", "advantage", "reward", "correct", "other_log_prob")
    # Q = 2, n = 2, L = 10, λ = 0.1, five tokens: w_rl = 1/(2·2·10), w_demo = 0.1/(2·5); Â = R − 0.625.
    expected = [
        (0, 0.025, 0, 0.025, -0.375, 0.25, 0, 0),
        (1, 0, 0, 0, 0, 0, 0, 0),
        (1, 0, 0.01, 0, 0, 0.75, 0, -1.5),
        (0, 0.025, 0, 0.025, 0.375, 1.0, 1, 0),
    ]
    for row, values in zip(rows, expected, strict=True):
        assert [row[name] for name in named] == pytest.approx(values, abs=1e-7)
    assert made.layout.dtype.kind == "i" and row_columns(made, np.array([], dtype=int), np.zeros(3)) == {}


def test_each_row_brings_its_temperature_where_the_rollouts_were_sampled_at_another_than_one():
    made, run = small_plan(), make_run(f"{ROLL}.temperature=0.6")
    assert run.row_temperature == 0.6 and run.own_fields == (ROW_FIELD, "temperature")
    column = row_columns(made, np.array([2, PADDING, 0, 1]), np.zeros(3), run.row_temperature)["temperature"]
    assert column.dtype == torch.float32 and column.tolist() == pytest.approx([0.6, 1.0, 1.0, 0.6])


@pytest.mark.parametrize(
    "settings",
    [
        [f"{ROLL}.temperature=1.0"],
        [f"{ROLL}.temperature=0.6", "actor_rollout_ref.model.use_fused_kernels=True"],
        [f"{ROLL}.temperature=0.6", "++hpt.method=grpo"],
    ],
    ids=["at one", "fused kernels", "no demonstrations"],
)
def test_no_row_brings_a_temperature_where_all_have_the_same_or_the_engine_takes_one(settings):
    run = make_run(*settings)
    assert run.row_temperature is None and run.own_fields == (ROW_FIELD,)
    assert list(row_columns(small_plan(), np.array([0, 1]), np.zeros(3), run.row_temperature)) == [ROW_FIELD]


def test_fused_kernels_at_another_temperature_are_told_of(capsys):
    make_run(f"{ROLL}.temperature=0.6", "actor_rollout_ref.model.use_fused_kernels=True")
    assert "demonstrations are scored at T = 0.6" in capsys.readouterr().out


def test_numbers_of_tokens_by_value():
    run = make_run("++hpt.demo.token_weights=w", TEACHER_METHOD, TEACHER_COLUMN)
    told = {"token_weights": np.array([0.5, 1.5]), "teacher_log_prob": [-1.0, -2.0]}
    marks = columns_of_tokens(run.token_columns, [3, 2, 1], [None, told, {"teacher_log_prob": [-4.0]}])
    assert list(marks) == [WEIGHTS, TEACHER]
    assert all(column.dtype == torch.float32 and column.layout == torch.jagged for column in marks.values())
    assert [row.tolist() for row in marks[WEIGHTS].unbind()] == [[1, 1, 1], [0.5, 1.5], [1]]
    assert [row.tolist() for row in marks[TEACHER].unbind()] == [[0, 0, 0], [-1, -2], [-4]]
    assert (
        columns_of_tokens(run.token_columns, [], []) == columns_of_tokens(make_run().token_columns, [3], [None]) == {}
    )


# --- what is read of a question ---------------------------------------------------------------------------------------


def test_the_columns_that_the_settings_name_are_read_once_a_question():
    named = [f"++hpt.demo.{name}={name[:3]}" for name in ("key", "reward", "token_weights", "source")]
    fields = make_run(*named, "++hpt.question_key=id").question_fields()
    assert set(fields) >= {
        "prompts",
        "data_source",
        "extra_info",
        "raw_prompt",
        "multi_modal_inputs",
        "hpt_skipped_rollouts",
    }
    assert {"key", "rew", "tok", "sou", "id"} <= set(fields) and len(set(fields)) == len(fields)
    fields = make_run("++hpt.method=grpo", "++hpt.demo.key=key").question_fields()
    assert "key" not in fields, "no demonstration is read"


def test_a_column_that_the_data_lacks_is_refused_with_the_setting_that_names_it():
    class Data:
        class dataframe:
            column_names = ("prompt", "target")

    run = make_run("++hpt.question_key=id")
    with pytest.raises(UserError, match=r"hpt\.question_key='id': the training data has no such column; .*prompt, tar"):
        run.check_columns(Data)
    make_run().check_columns(Data)
    make_run("++hpt.demo.key=nowhere").check_columns(object())  # a dataset class of the user's own


# --- the end token and the template -----------------------------------------------------------------------------------


def model_folder(path, eos):
    """A model's folder whose generation config stops at ``eos``; none where it is "absent"."""
    if eos != "absent":
        (path / "generation_config.json").write_text(json.dumps({} if eos is None else {"eos_token_id": eos}))
    return str(path)


@pytest.mark.parametrize(
    ("eos", "stops"),
    [([5, 258], {5, 258}), (7, {7}), (None, set()), ("absent", set())],
    ids=["list", "int", "none", "absent"],
)
def test_stop_ids_are_those_of_the_models_generation_config(tmp_path, eos, stops):
    assert stop_ids(model_folder(tmp_path, eos)) == stops


def met(folder, *settings):
    run = make_run(f"actor_rollout_ref.model.path={folder}", *settings)
    run.bind_tokenizer(byte_tokenizer())
    return run


def test_a_demonstration_ends_with_the_tokenizers_eos_unless_the_settings_say_otherwise(tmp_path):
    folder = model_folder(tmp_path, [256, 77])
    own = byte_tokenizer().eos_token_id
    assert met(folder).eos == own == met(folder).reader.eos
    assert met(folder, "++hpt.demo.eos=77").eos == 77
    reader = met(folder, "++hpt.demo.eos=77", "data.max_response_length=9", "++hpt.seed=4").reader
    assert (reader.eos, reader.max_length, reader.seed) == (77, 9, 4)


def test_an_end_at_which_generation_does_not_stop_is_refused_with_what_it_stops_at(tmp_path):
    folder = model_folder(tmp_path, [256, 77])
    with pytest.raises(UserError, match=r"end with token 78 \(hpt\.demo\.eos\), but .* stops at \[77, 256, 258\]"):
        met(folder, "++hpt.demo.eos=78")
    assert met(folder, "++hpt.demo.eos=78", "++hpt.method=grpo").eos == 78, "no demonstration, nothing to refuse"


def test_a_tokenizer_without_eos_needs_the_setting(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    run = make_run(f"actor_rollout_ref.model.path={model_folder(tmp_path, 77)}")
    with pytest.raises(UserError, match=r"no EOS token; set hpt\.demo\.eos"):
        run.bind_tokenizer(tokenizer)
    run = make_run(f"actor_rollout_ref.model.path={tmp_path}", "++hpt.demo.eos=77")
    run.bind_tokenizer(tokenizer)
    assert run.eos == 77


def test_template_arguments_reach_the_reader_as_plain_values(tmp_path):
    kwargs = "++data.apply_chat_template_kwargs={enable_thinking: false, opening: 'calmly '}"
    run = met(model_folder(tmp_path, None), kwargs)
    assert run.reader.template_kwargs == {"enable_thinking": False, "opening": "calmly "}
    assert met(model_folder(tmp_path, None)).reader.template_kwargs == {}


# --- refusals that verl's own config can meet -------------------------------------------------------------------------


def test_rollout_correction_without_the_rollouts_log_probs_is_refused():
    """verl would skip it without a word; our update would ask for weights that nothing computed."""
    settings = ["algorithm.rollout_correction.rollout_is=sequence", f"{ROLL}.calculate_log_probs=False"]
    with pytest.raises(UserError, match=r"rollout_is=sequence needs .*; set .*rollout\.calculate_log_probs=True"):
        make_run(*settings)
    assert make_run(*settings, "++hpt.method=sft").method.rollouts is None, "no rollouts to correct"


# --- what the alarms are told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["++hpt.method=sft"], {1: True, 99: True}),
        (["++hpt.method=grpo"], {1: False}),
        ([], {1: False}),
        (["++hpt.gate.threshold=1.0"], {1: True}),
        (["++hpt.gate.count=4"], {1: True}),
        (["++hpt.gate.threshold={start: 1.0, end: 0.0, steps: 3, shape: step}"], {3: True, 4: False}),
        (["++hpt.gate.threshold=1.0", "++hpt.per_source={a: {gate: {threshold: 0.5}}}"], {1: False}),
        (["++hpt.per_source={a: {gate: {threshold: 1.0}}}"], {1: False}),
        (["++hpt.gate.threshold=1.0", "++hpt.per_source={a: {gate: {count: 4}}}"], {1: True}),
    ],
)
def test_a_step_on_demonstrations_alone_is_scheduled_where_every_gate_says_so(settings, steps):
    run = make_run(f"{ROLL}.n=4", *settings)
    assert {step: run.alarms.scheduled(step) for step in steps} == steps


def test_the_number_that_a_gate_reads_is_its_sources_own_else_the_general_one():
    run = make_run("++hpt.gate.metric=acc", "++hpt.per_source={a: {gate: {metric: shape}}, b: {gate: {count: 1}}}")
    assert [run.metric_of(source) for source in ("a", "b", "elsewhere")] == ["shape", "acc", "acc"]
    assert make_run("++hpt.per_source={a: {gate: {metric: shape}}}").metric_of("elsewhere") is None
