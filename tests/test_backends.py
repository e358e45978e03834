"""What verl's other engines and trainers need: groups of micro-batches, attention, metrics of several updates."""

import numpy as np
import pytest
from verl.trainer.ppo.v1.utils import MetricsAggregator
from verl_config import ACTOR, refused, start

from verl_hpt.metrics import of_step
from verl_hpt.plan import PADDING, PlanSettings, Question, plan

REF, MODEL = "actor_rollout_ref.ref", "actor_rollout_ref.model"
SPLIT = [f"{ACTOR}.megatron.pipeline_model_parallel_size=2",
         f"{ACTOR}.megatron.virtual_pipeline_model_parallel_size=2"]  # fmt: skip


# --- Megatron with virtual pipeline stages ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "rows", "passes"),
    [
        ([], 3, (5, 35)),
        (SPLIT[:1], 3, (5, 35)),
        ([SPLIT[0], f"{ACTOR}.megatron.virtual_pipeline_model_parallel_size=1"], 3, (5, 35)),
        (SPLIT, 6, (10, 70)),
        ([*SPLIT, f"{ACTOR}.use_dynamic_bsz=True"], 2, (2, 2)),
        (
            [*SPLIT, f"+{ACTOR}.megatron.override_transformer_config.microbatch_group_size_per_vp_stage=4"],
            12,
            (20, 140),
        ),
    ],
)
def test_rows_of_a_rank_fill_groups_of_micro_batches_where_pipeline_stages_are_virtual(overrides, rows, passes):
    """verl asserts it at a random step otherwise: ``len(micro_batches) % microbatch_group_size_per_vp_stage == 0``."""
    run = start(
        "model_engine=megatron", f"{ACTOR}.ppo_micro_batch_size_per_gpu=3", f"{ACTOR}.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=5", f"{REF}.log_prob_micro_batch_size_per_gpu=7",
        *overrides,
    )  # fmt: skip
    assert run.plan_settings(1, 2).rows_multiple == rows
    assert run.log_prob_multiple(1, "old_log_prob") == passes[0]
    assert run.log_prob_multiple(1, "ref_log_prob") == passes[1]
    assert run.log_prob_multiple(4, "old_log_prob") == 4 * passes[0]


def test_every_step_of_every_rank_is_a_multiple_of_the_group():
    run = start("model_engine=megatron", f"{ACTOR}.ppo_micro_batch_size_per_gpu=3", *SPLIT)
    draw = np.random.default_rng(0)
    for count in (1, 2, 7):
        questions = [Question(f"q{i}", draw.integers(0, 2, 4).astype(float), np.full(4, 5)) for i in range(count)]
        settings = run.plan_settings(1, 2)
        made = plan(questions, PlanSettings(**{**vars(settings), "questions_per_step": 3}))
        assert made.rows_per_step % (2 * 6) == 0 and (made.layout != PADDING).sum() == 4 * count


# --- Ulysses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model", "has"),
    [
        (f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size", MODEL, {}),
        (f"{ACTOR}.ulysses_sequence_parallel_size", MODEL, {}),
        (f"{REF}.fsdp_config.ulysses_sequence_parallel_size", MODEL, {}),
        ("critic.fsdp.ulysses_sequence_parallel_size", "critic.model", {"critic": True}),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sequence_parallelism_without_flash_attention_is_refused(path, model, has, attention):
    overrides = [f"{path}=2", f"++{model}.override_config.attn_implementation={attention}"]
    overrides += ["critic.enable=True", "++hpt.method=ppo"] if has else []
    text = refused(*overrides, **has)
    assert f"{path}=2 with {model}.override_config.attn_implementation={attention}: each rank would attend" in text
    for flash in ("flash_attention_2", "flash_attention_3"):
        start(*overrides, f"++{model}.override_config.attn_implementation={flash}", **has)
    start(*overrides, f"{path}=1", **has)
    start(*overrides[:1], *overrides[2:], **has)  # flash attention is what verl takes where nothing is said


def test_a_critic_that_is_not_built_is_not_judged():
    start("critic.fsdp.ulysses_sequence_parallel_size=2", "++critic.model.override_config.attn_implementation=sdpa",
          "critic.enable=False")  # fmt: skip


# --- several updates a step -------------------------------------------------------------------------------------------

UPDATES = [
    {
        "hpt/questions": 4.0, "hpt/solve_rate": 0.25, "hpt/source/minerva/solve_rate": 0.5,
        "hpt/source/summarize/solve_rate": 0.75, "hpt/demo_source/gemini": 3.0, "hpt/rows/rollouts": 16.0,
        "hpt/unusable/too_long": 1.0, "hpt/history/questions": 10.0, "hpt/history/tokens_saved": 5.0,
        "hpt/history/tokens_saved_total": 5.0, "hpt/history/early_gated": 1.0, "hpt/alarm/length": 1.0,
        "hpt/demo_coef": 0.5, "hpt/buffer/entries": 7.0, "hpt/start/tokens": 40.0, "hpt/demo_nll": 2.0,
        "actor/lr": 1.0,
    },
    {
        "hpt/questions": 12.0, "hpt/solve_rate": 0.75, "hpt/source/minerva/solve_rate": 0.1,
        "hpt/source/summarize/solve_rate": 0.75, "hpt/demo_source/gemini": 1.0, "hpt/rows/rollouts": 48.0,
        "hpt/history/questions": 14.0, "hpt/history/tokens_saved": 1.0, "hpt/history/tokens_saved_total": 6.0,
        "hpt/history/early_gated": 2.0, "hpt/alarm/length": 0.0, "hpt/demo_coef": 0.4, "hpt/buffer/entries": 3.0,
        "hpt/start/tokens": 10.0,
    },
]  # fmt: skip
STEP = {
    "hpt/questions": 16.0, "hpt/solve_rate": 0.625, "hpt/source/minerva/solve_rate": 0.2,
    "hpt/source/summarize/solve_rate": 0.75, "hpt/demo_source/gemini": 4.0, "hpt/rows/rollouts": 64.0,
    "hpt/unusable/too_long": 1.0, "hpt/history/questions": 14.0, "hpt/history/tokens_saved": 6.0,
    "hpt/history/tokens_saved_total": 6.0, "hpt/history/early_gated": 3.0, "hpt/alarm/length": 0.0,
    "hpt/demo_coef": 0.4, "hpt/buffer/entries": 3.0, "hpt/start/tokens": 50.0, "hpt/demo_nll": 2.0,
}  # fmt: skip


def test_metrics_of_a_step_with_several_updates_by_hand():
    assert of_step(UPDATES) == pytest.approx(STEP)
    assert of_step([]) == {} and of_step([{"hpt/x": 2.0}]) == {"hpt/x": 2.0}


@pytest.mark.parametrize("update", UPDATES)
def test_a_step_of_one_update_has_that_ones_metrics(update):
    assert of_step([update]) == {name: value for name, value in update.items() if name.startswith("hpt/")}


def test_verls_own_aggregation_goes_by_words_in_a_name():
    """Why ours are final before it is asked; once verl takes another way, ``HybridMixin.step`` can go."""
    theirs = MetricsAggregator()
    for update in UPDATES:
        theirs.add_step_metrics(update, sample_count=1)
    found = theirs.get_aggregated_metrics()
    assert found["hpt/source/minerva/solve_rate"] == 0.1, "a minimum"
    assert found["hpt/source/summarize/solve_rate"] == 1.5, "a rate above 1"
    assert found["hpt/history/tokens_saved_total"] == 11.0, "a running total, summed"
