"""The banner says what is trained; the clip range is verl's."""

import pytest
from verl_config import ACTOR, refused, start

from verl_hpt.gate import DEMO, GATES, RL

# --- the clip range, as verl reads it --------------------------------------------------------------------------------


def test_a_null_bound_of_the_clip_is_verls_clip_ratio(capsys):
    run = start(f"{ACTOR}.clip_ratio_low=null", f"{ACTOR}.clip_ratio_high=null", f"{ACTOR}.clip_ratio=0.3")
    clip = run.loss_spec().constants
    assert (clip.clip_low, clip.clip_high, clip.clip_c) == (0.3, 0.3, 3.0)
    assert "clip 0.3/0.3/c=3.0" in capsys.readouterr().out


def test_a_bound_of_the_clip_that_is_set_wins_over_clip_ratio():
    run = start(f"{ACTOR}.clip_ratio_low=0.1", f"{ACTOR}.clip_ratio_high=0.28", f"{ACTOR}.clip_ratio=0.3")
    clip = run.loss_spec().constants
    assert (clip.clip_low, clip.clip_high) == (0.1, 0.28)


def test_a_bound_of_the_clip_that_nothing_says_is_refused_with_both_keys():
    text = refused(f"{ACTOR}.clip_ratio_low=null", f"{ACTOR}.clip_ratio=null")
    assert f"{ACTOR}.clip_ratio_low=null, and clip_ratio=null: must be a number at least 0" in text
    assert "clip_ratio_high" not in text


# --- the banner ------------------------------------------------------------------------------------------------------


def banner(capsys, *overrides: str, **has) -> str:
    start(*overrides, **has)
    return capsys.readouterr().out


def test_the_banner_of_a_method_without_rollouts_says_that_kl_and_entropy_are_off(capsys):
    on = (f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=0.02", f"{ACTOR}.entropy_coeff=0.01")
    text = banner(capsys, *on, "++hpt.method=sft", reference=True)
    assert "entropy_coeff=off (no rollouts), KL loss off (no rollouts)," in text
    text = banner(capsys, *on, reference=True)
    assert "entropy_coeff=0.01, KL loss 0.02," in text and "off" not in text
    assert "entropy_coeff=0, KL loss off," in banner(capsys)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "verl-hpt 0.1.0 on verl 0.9.1: method hpt, 1_clip·r·(R−mean) / S: 1 where solved ≤ γ·n"),
        ([], "demonstrations: column 'target', where solved ≤ 0·n (score ≥ 1.0 and not cut at the "
         "length limit), λ = 0.1"),
        (["++hpt.gate={count:2,success:0.5}"], "where solved ≤ 2 (score ≥ 0.5 and not cut at"),
        (["++hpt.gate.function=linear"], "where linear (score ≥ 1.0 and not cut at"),
        (["++hpt.method=grpo"], "demonstrations: column 'target', never, "),
        (["++hpt.method=sft"], "demonstrations: column 'target', always, "),
        ([], "normalization: question (L = 512); actor.loss_agg_mode=token-mean and norm_adv_by_std_in_grpo=True are"),
        (["++hpt.normalization=official", "++hpt.rl_length_scale=64"], "normalization: official (L = 64)"),
        (["data.max_response_length=100"], "(L = 100)"),
        ([f"{ACTOR}.ppo_epochs=2"], "256 questions an optimizer step, ppo_epochs=2"),
        (["++hpt.method=hpt_soft"], "unverified: what each share of the published table multiplies is inferred"),
        (["++hpt.method=otr"], "approximate: expectation over the sampled token"),
        (["++hpt.method=gspo"], "note: GSPO's paper clips at 3e-4/4e-4; set actor.clip_ratio_low/high"),
        (["actor_rollout_ref.model.use_fused_kernels=True", "actor_rollout_ref.rollout.temperature=0.7"],
         "note: fused kernels take one temperature a batch, so demonstrations are scored at T = 0.7"),
    ],
)  # fmt: skip
def test_the_banner_says_what_is_trained(capsys, overrides, line):
    assert line in banner(capsys, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["++hpt.method=gspo", f"{ACTOR}.clip_ratio_high=4e-4"],
        ["++hpt.method=grpo"],
        ["actor_rollout_ref.model.use_fused_kernels=True"],
        ["actor_rollout_ref.rollout.temperature=0.7"],
        ["++hpt.method=grpo", "actor_rollout_ref.model.use_fused_kernels=True",
         "actor_rollout_ref.rollout.temperature=0.7"],
    ],
)  # fmt: skip
def test_the_banner_has_no_note_where_none_is_due(capsys, overrides):
    text = banner(capsys, *overrides)
    assert not any(word in text for word in ("note:", "unverified:", "approximate:")) and len(text.splitlines()) == 4


def test_the_banner_says_what_a_solved_rollout_is_and_what_a_demonstration_counts_as(capsys):
    plain = banner(capsys)
    assert "(score ≥ 1.0 and not cut at the length limit)" in plain and "rollouts cut at" not in plain
    assert "demonstration's reward in its group" not in plain
    asked = banner(capsys, "++hpt.gate={finished: false, metric: acc}", "++hpt.rollouts.truncated=mask")
    assert "(acc ≥ 1.0)" in asked and "rollouts cut at the length limit: mask" in asked
    in_group = banner(capsys, "++hpt.method=luffy")
    assert "a demonstration's reward in its group: the largest of hpt.gate.success and the group's best" in in_group
    assert "reward in its group" not in banner(capsys, "++hpt.method=luffy", "++hpt.demo.reward=1.0")


def test_the_banner_shows_schedules(capsys):
    shown = banner(
        capsys,
        "++hpt.demo_coef={start: 0.9, end: 0.05, steps: 200, shape: cosine, warmup: 10}",
        "++hpt.gate.threshold={start: 1.0, end: 0.0, steps: 30, shape: step}",
    )
    assert "λ = 0.9 → 0.05 (cosine, 200 steps after 10 of warm-up)" in shown
    assert "solved ≤ 1 → 0 (step, 30 steps)·n" in shown


def test_the_banner_names_the_arguments_of_a_users_gate(capsys, monkeypatch):
    monkeypatch.setitem(GATES, "rarely", lambda outcome, at_most=0, share=1.0: RL if outcome.solved > at_most else DEMO)
    text = banner(capsys, "++hpt.gate.function=rarely", "++hpt.gate.kwargs={at_most: 1, share: 0.5}")
    assert "where rarely(at_most=1, share=0.5) (score ≥ 1.0" in text


# --- demonstrations elsewhere than beside their question's rollouts --------------------------------------------------

ROLL, FILES = "actor_rollout_ref.rollout", "++hpt.stream.files=experts.parquet"
COUNTED = ". The gate and solve rates count others"


@pytest.mark.parametrize(
    ("method", "overrides", "line"),
    [
        ("prefix_rft", [f"{ROLL}.n=8"],
         f"starts: 1 of 8 rollouts from U(0.95 → 0, 0.95) of the demonstration; its tokens: R{COUNTED}"),
        ("uft", [f"{ROLL}.n=4"], "starts: all of 4 rollouts from 5 parts, each with probability 0.95 → 0.05, of the "
         f"demonstration; its tokens: S{COUNTED}"),
        ("stephint", [f"{ROLL}.n=2", "++hpt.start.share=[0, 0.5]"],
         f"starts: rollouts start from the shares 0, 0.5 of the demonstration; its tokens: frozen{COUNTED}"),
        ("g2rpo_a", [f"{ROLL}.n=12"], "starts: 2 of 12 rollouts from 3072 tokens, adapted every 3 steps, of the "
         f"demonstration; its tokens: R{COUNTED}"),
        ("questa", [], "hints: all of 1 rollouts from 0.5 of the demonstration in the prompt; trained with it"),
        ("pope", [f"{ROLL}.n=4"],
         "hints: 3 of 4 rollouts from 0.5 of the demonstration in the prompt; trained with it"),
        ("guide", [f"{ROLL}.n=8"],
         "hints: 4 of 8 rollouts from 1 of the demonstration in the prompt; trained on the prompt without it"),
        ("chord_mu", [FILES], "stream: 64 demonstrations a step beside the questions, rollouts weigh 1 − λ"),
        ("chord_mu", [FILES], "demonstrations: column 'target' of experts.parquet, always, λ = 0.9 → 0.05 (cosine, 200 "
         "steps)"),
        ("chord_phi", [FILES, "++hpt.stream.batch=3", "++hpt.demo.key=solution"], "stream: 3 demonstrations a step"),
        ("chord_phi", [FILES, "++hpt.demo.key=solution"], "column 'solution' of experts.parquet, always, λ = 0.1"),
        ("amft_style", [FILES], "always, λ = 0.5, steered towards an entropy of 0.3 nats"),
        ("relift", [], "buffer: demonstrations; 128 make an optimizer step of their own. Adam scales each step's "
         "gradient, so λ does next to nothing there"),
        ("relift", ["++hpt.buffer={size: 5, content: successes}"], "buffer: successes; 5 make an optimizer step"),
        ("relift", ["++hpt.buffer={size: 5, content: successes}"],
         "demonstrations: own solved rollouts, the first of each question that is partly solved, λ = 1"),
        ("relift", [], "demonstrations: column 'target', where solved ≤ 0·n (score ≥ 1.0 and not cut at the length "
         "limit), λ = 1"),
    ],
)  # fmt: skip
def test_the_banner_says_where_demonstrations_stand(capsys, method, overrides, line):
    (found,) = [one for one in banner(capsys, f"++hpt.method={method}", *overrides).splitlines() if line in one]
    assert found.startswith("  ")


def test_a_stream_that_is_not_convex_leaves_the_rollouts_weight_alone(capsys):
    compose = "++hpt.compose={rollouts: grpo, demos: [{kind: S}], place: stream, when: always}"
    assert "  stream: 64 demonstrations a step beside the questions\n" in banner(capsys, compose, FILES)


def test_prefixes_that_are_imitated_at_another_temperature_are_told_of(capsys):
    note = "  note: tokens of a prefix are scored at the rollouts' temperature, T = 0.7\n"
    hot = f"{ROLL}.temperature=0.7"
    assert note in banner(capsys, "++hpt.method=uft", f"{ROLL}.n=4", hot)
    assert note not in banner(capsys, "++hpt.method=uft", f"{ROLL}.n=4")
    assert "note:" not in banner(capsys, "++hpt.method=prefix_rft", f"{ROLL}.n=4", hot)


def test_the_banner_has_no_line_of_places_where_demonstrations_stand_beside_their_rollouts(capsys):
    text = banner(capsys) + banner(capsys, "++hpt.method=luffy") + banner(capsys, "++hpt.method=grpo")
    assert not any(f"  {place}: " in text for place in ("starts", "hints", "stream", "buffer"))


@pytest.mark.parametrize("mode", ["colocate_async", "separate_async"])
def test_a_trainer_that_samples_ahead_is_told_of_rollout_correction_and_of_old_histories(capsys, mode):
    ahead = f"trainer.v1.trainer_mode={mode}"
    advice = (
        f"  note: trainer_mode={mode} trains on rollouts of older weights; algorithm.rollout_correction.rollout_is="
    )
    gate = ["++hpt.history.early_gate={after_failures: 2, rollouts: 1}", f"{ROLL}.n=4"]
    old = f"  note: the early gate decides as a question is drawn; in trainer_mode={mode} its history is steps old"
    assert advice in banner(capsys, ahead) and old not in banner(capsys, ahead)
    assert advice not in banner(capsys) and advice not in banner(capsys, ahead, "++hpt.method=sft")
    corrected = ["algorithm.rollout_correction.rollout_is=token", f"{ROLL}.calculate_log_probs=True"]
    assert advice not in banner(capsys, ahead, *corrected)
    assert old in banner(capsys, ahead, *gate) and old not in banner(capsys, *gate)
