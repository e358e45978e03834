"""Refusals against verl's real config: each is said with the key and a remedy, and the remedy works."""

import pytest
from verl_config import ACTOR, FOLDER, refused, start

from verl_hpt.methods import METHODS

# --- verl's options --------------------------------------------------------------------------------------------------


ENGINES = ("dp", "megatron", "veomni", "torchtitan")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("override", "message", "remedy"),
    [
        ("algorithm.filter_groups.enable=True", "evicts the questions that no rollout solves",
         "algorithm.filter_groups.enable=False"),
        ("distillation.enabled=True", "distillation.enabled=True replaces the actor's loss",
         "distillation.enabled=False"),
        (f"{ACTOR}.shuffle=True", f"{ACTOR}.shuffle=True tears questions apart", f"{ACTOR}.shuffle=False"),
        ("actor_rollout_ref.rollout.enable_rollout_routing_replay=True",
         "rollout.enable_rollout_routing_replay=True: demonstrations have no recorded routes; set it to False",
         "actor_rollout_ref.rollout.enable_rollout_routing_replay=False"),
        ("algorithm.rollout_correction.bypass_mode=True", "bypass_mode=True brings a loss of its own",
         "algorithm.rollout_correction.bypass_mode=False"),
        (f"{ACTOR}.policy_loss.loss_mode=gspo", f"{ACTOR}.policy_loss.loss_mode=gspo: the loss is ours",
         f"{ACTOR}.policy_loss.loss_mode=vanilla"),
        (f"{ACTOR}.clip_ratio_low=-0.1", f"{ACTOR}.clip_ratio_low=-0.1: must be a number at least 0",
         f"{ACTOR}.clip_ratio_low=0"),
        (f"{ACTOR}.clip_ratio_high=nan", f"{ACTOR}.clip_ratio_high=nan: must be a number at least 0",
         f"{ACTOR}.clip_ratio_high=0"),
        (f"{ACTOR}.clip_ratio_high=much", f"{ACTOR}.clip_ratio_high='much': must be a number at least 0",
         f"{ACTOR}.clip_ratio_high=1e9"),
        (f"{ACTOR}.clip_ratio_high=inf", f"{ACTOR}.clip_ratio_high=inf: must be a number at least 0",
         f"{ACTOR}.clip_ratio_high=1e9"),
        (f"{ACTOR}.clip_ratio_high=True", f"{ACTOR}.clip_ratio_high=True: must be a number at least 0",
         f"{ACTOR}.clip_ratio_high=1"),
        (f"{ACTOR}.clip_ratio_c=1.0", f"{ACTOR}.clip_ratio_c=1.0: must be a number above 1: verl asserts it",
         f"{ACTOR}.clip_ratio_c=1.1"),
        (f"{ACTOR}.clip_ratio_c=null", f"{ACTOR}.clip_ratio_c=null: must be a number above 1",
         f"{ACTOR}.clip_ratio_c=1e9"),
        (f"{ACTOR}.entropy_coeff=null", f"{ACTOR}.entropy_coeff=null: must be a finite number; 0 switches it off",
         f"{ACTOR}.entropy_coeff=0"),
    ],
)  # fmt: skip
def test_options_of_verl_that_would_become_something_else_are_refused(override, message, remedy, engine):
    chosen = f"model_engine={engine}"
    assert message in refused(chosen, override)
    start(chosen, override, remedy)


def test_every_engine_of_verl_is_among_those_that_refusals_are_tested_with():
    assert {path.stem for path in (FOLDER / "model_engine").glob("*.yaml")} == set(ENGINES)


@pytest.mark.parametrize(
    ("loss_mode", "rollouts", "how"),
    [("gspo", "gspo", "sequence"), ("cispo", "cispo", "token"), ("gpg", "reinforce", "sequence")],
)
def test_a_policy_loss_of_verls_is_refused_with_the_setting_of_ours_that_does_the_same(loss_mode, rollouts, how):
    text = refused(f"{ACTOR}.policy_loss.loss_mode={loss_mode}")
    remedy = f"++hpt.compose={{rollouts: {rollouts}, demos: [{{kind: S}}], normalization: {how}}}"
    assert f"leave it at vanilla and set '{remedy}', which takes it on the rollouts" in text
    run = start(remedy)
    assert run.method.rollouts == METHODS[rollouts].rollouts and run.normalization == METHODS[rollouts].normalization
    assert [term.kind for term in run.method.demos] == ["S"] and run.method.when == "gate"
    assert run.method.demos == METHODS["hpt"].demos
    assert start(f"++hpt.method={rollouts}").method.demos == ()


@pytest.mark.parametrize("loss_mode", ["sapo", "geo_mean", "clip_cov", "kl_cov", "dppo_tv", "dro"])
def test_a_policy_loss_that_none_of_ours_has_is_refused_without_a_false_remedy(loss_mode):
    text = refused(f"{ACTOR}.policy_loss.loss_mode={loss_mode}")
    assert "choose hpt.method (`verl-hpt methods`); none of ours has this loss" in text and "compose" not in text


def test_policy_losses_that_are_named_are_verls():
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    from verl_hpt.host.refusals import LOSSES

    assert set(LOSSES) <= set(POLICY_LOSS_REGISTRY) and set(LOSSES.values()) <= set(METHODS)


DAPO = [
    "reward.reward_manager.name=dapo",
    "++reward.reward_kwargs.overlong_buffer_cfg={enable: true, penalty_factor: 1}",
]


def test_an_overlong_penalty_under_a_gate_that_reads_the_score_is_refused():
    text = refused(*DAPO, "++hpt.per_source={math:{gate:{metric:acc}},code:{gate:{count:1}}}")
    for gate in ("hpt.gate", "hpt.per_source.code.gate"):
        assert f"a right answer loses up to 1 where it is long, and is then not solved by {gate}.success=1" in text
        assert f"set ++{gate}.metric=acc" in text
    assert "per_source.math" not in text
    start(*DAPO, "++hpt.gate.metric=acc")
    start(*DAPO, "++hpt.gate.success=0.5")
    start(*DAPO, "++hpt.method=grpo")
    start(*DAPO, "reward.reward_kwargs.overlong_buffer_cfg.enable=false")
    start(DAPO[1])


@pytest.mark.parametrize(
    ("overrides", "meaning"),
    [
        ([*DAPO, "++hpt.gate.success=0.5"], "loses up to 1 where it is long; the gate compares score with 0.5"),
        (["reward.reward_manager.name=gdpo"], "the score adds up several rewards; the gate compares score with 1"),
        (["reward.reward_model.enable=True"], "not whether it is right; the gate compares score with 1"),
    ],
)
def test_a_shaped_reward_is_in_the_banner_with_what_the_gate_compares(overrides, meaning, capsys):
    start(*overrides)
    assert "  WARNING: reward." in (banner := capsys.readouterr().out) and meaning in banner
    start(*overrides, "++hpt.gate.metric=acc")
    assert "  note: reward." in (banner := capsys.readouterr().out) and "the gate compares acc with" in banner
    start(*overrides, "++hpt.method=luffy")
    assert "the gate compares" not in capsys.readouterr().out


def test_a_kl_coefficient_matters_where_the_kl_loss_is_on():
    start(f"{ACTOR}.kl_loss_coef=null")
    on = (f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=null")
    assert f"{ACTOR}.kl_loss_coef=null: must be a finite number" in refused(*on, reference=True)
    start(*on, f"{ACTOR}.kl_loss_coef=0", reference=True)


@pytest.mark.parametrize("engine", ["megatron", "veomni"])
def test_router_replay_is_refused_where_the_engine_keeps_it(engine):
    chosen, key = f"model_engine={engine}", f"{ACTOR}.{engine}.router_replay.mode"
    assert f"{key}=R3: demonstrations have no recorded routes; set it to disabled" in refused(chosen, f"{key}=R3")
    start(chosen, f"{key}=disabled")


@pytest.mark.parametrize("engine", ["dp", "torchtitan"])
def test_every_other_engine_of_verl_starts_with_its_own_defaults(engine):
    start(f"model_engine={engine}")
    replay = "actor_rollout_ref.rollout.enable_rollout_routing_replay"
    assert f"{replay}=True" in refused(f"model_engine={engine}", f"{replay}=True")


def test_all_refusals_come_at_once():
    text = refused("distillation.enabled=True", f"{ACTOR}.shuffle=True", "++hpt.method=poft")
    assert text.startswith("verl-hpt refuses this config:\n  - ") and text.count("\n  - ") == 3
    assert "distillation.enabled" in text and "actor.shuffle" in text and "hpt.demo.other_log_prob" in text


def test_problems_of_settings_method_and_verls_config_are_one_list():
    text = refused(f"{ACTOR}.shuffle=True", "++hpt.method=hptt", "++hpt.gate.kwargs={k:1}", "++hpt.modules=[no_module]")
    for problem in (f"{ACTOR}.shuffle=True", "hpt.method='hptt' is unknown", "hpt.gate.kwargs is set", "'no_module'"):
        assert problem in text
    assert text.count("\n  - ") == 4
    text = refused(f"{ACTOR}.shuffle=True", "++hpt.method=sft", "++hpt.gate.threshold=0.5", "++hpt.gate.soft=linear")
    assert "hpt.gate is set, but method sft" in text and "hpt.gate.soft is set" in text and "shuffle=True" in text
    text = refused(f"{ACTOR}.shuffle=True", "++hpt.seed=x")
    assert "hpt.seed='x': must be a whole number" in text and "shuffle=True" in text


# --- methods and settings --------------------------------------------------------------------------------------------

COMPOSED = {
    "critic in the group": "{rollouts: ppo, demos: [{kind: R}], place: group, when: always}",
    "teacher": "{demos: [{kind: R, estimator: {reference: teacher, advantage: reward}}]}",
    "teacher on rollouts": "{rollouts: {reference: teacher}, when: never}",
    "own, teacher": "{rollouts: null, demos: [{kind: S, estimator: {reference: teacher}}], when: own}",
    "own, other": "{rollouts: null, demos: [{kind: S, estimator: {advantage: preference}}], when: own}",
}


def of(name: str) -> str:
    return f"++hpt.compose={COMPOSED[name]}"


@pytest.mark.parametrize(
    ("overrides", "message", "remedy"),
    [
        (["++hpt.method=sft", "++hpt.gate.threshold=0.5"], "hpt.gate is set, but method sft has no gate",
         ["++hpt.method=hpt"]),
        (["++hpt.method=sft", "++hpt.gate.count=2"], "hpt.gate is set, but method sft has no gate",
         ["++hpt.method=hpt_off_on"]),
        (["++hpt.method=sft", "++hpt.gate.function=linear"], "hpt.gate is set, but method sft has no gate",
         ["++hpt.method=hpt_mix_on"]),
        (["++hpt.method=luffy", "++hpt.per_source={a/b:{gate:{threshold:0.5}}}"],
         "hpt.per_source.a/b.gate is set, but method luffy has no gate", ["++hpt.method=hpt"]),
        (["++hpt.method=sft", "++hpt.history.early_gate={after_failures:3}"],
         "hpt.history.early_gate is set, but method sft has no gate (when: always)",
         ["++hpt.method=hpt", "actor_rollout_ref.rollout.n=8"]),
        (["++hpt.method=grpo", "++hpt.history.early_gate={after_failures:3}"],
         "hpt.history.early_gate is set, but method grpo has no gate (when: never)", ["++hpt.history.early_gate=null"]),
        (["++hpt.method=poft"], "name its column in hpt.demo.other_log_prob", ["++hpt.demo.other_log_prob=m"]),
        ([of("teacher")], "name their column in hpt.demo.teacher_log_prob", ["++hpt.demo.teacher_log_prob=t"]),
        ([of("teacher on rollouts")], "takes the teacher as reference on rollouts, which have none; use old or current",
         ["++hpt.compose.rollouts.reference=old"]),
        ([of("own, teacher"), "++hpt.demo.teacher_log_prob=t"],
         "imitates its own rollouts too (when: own), and these have no teacher_log_prob",
         ["++hpt.compose.when=always"]),
        ([of("own, other"), "++hpt.demo.other_log_prob=o"],
         "imitates its own rollouts too (when: own), and these have no other_log_prob", ["++hpt.compose.when=always"]),
        (["++hpt.method=sft", "algorithm.use_kl_in_reward=True"],
         "trains on demonstrations only: algorithm.use_kl_in_reward=True has no effect",
         ["algorithm.use_kl_in_reward=False"]),
        (["++hpt.method=luffy", "algorithm.use_kl_in_reward=True"],
         "algorithm.use_kl_in_reward=True lowers the rollouts' rewards alone", ["++hpt.method=hpt"]),
        (["++hpt.demo.teacher_log_prob=t"],
         "hpt.demo.teacher_log_prob is set, but nothing in method hpt reads it; compose one with reference: teacher",
         [of("teacher")]),
        (["++hpt.demo.other_log_prob=o"],
         "hpt.demo.other_log_prob is set, but nothing in method hpt reads it; poft does", ["++hpt.method=poft"]),
        (["++hpt.demo.log_likelihood=l"],
         "hpt.demo.log_likelihood is set, but select=first and likelihood_of=column does not read it",
         ["++hpt.demo.select=likelihood"]),
        (["++hpt.demo.log_likelihood=l", "++hpt.demo.select=likelihood", "++hpt.demo.likelihood_of=policy"],
         "select=likelihood and likelihood_of=policy does not read it", ["++hpt.demo.likelihood_of=column"]),
        (["++hpt.demo.likelihood_of=policy"], "hpt.demo.likelihood_of=policy has no effect",
         ["++hpt.demo.select=likelihood"]),
        (["++hpt.demo.select=likelihood", "++hpt.demo.likelihood_of=reference"],
         "hpt.demo.likelihood_of=reference needs verl's reference model", ["++hpt.demo.likelihood_of=policy"]),
        (["++hpt.history.early_gate={after_failures:3,rollouts:1}"],
         "hpt.history.early_gate.rollouts=1 spares nothing: actor_rollout_ref.rollout.n is 1",
         ["actor_rollout_ref.rollout.n=8"]),
    ],
)  # fmt: skip
def test_methods_and_settings_that_do_not_fit_are_refused(overrides, message, remedy):
    assert message in refused(*overrides)
    start(*overrides, *remedy)


@pytest.mark.parametrize(
    ("overrides", "message", "has"),
    [
        (["++hpt.method=asft"], "needs reference log-probs on demonstrations; set actor_rollout_ref.actor.use_kl_loss",
         {"reference": True}),
        (["++hpt.demo.select=likelihood", "++hpt.demo.likelihood_of=reference"], "needs verl's reference model",
         {"reference": True}),
        (["++hpt.method=ppo"], "method ppo needs a critic; set critic.enable=True", {"critic": True}),
    ],
)  # fmt: skip
def test_a_worker_that_a_method_needs_is_asked_for(overrides, message, has):
    assert message in refused(*overrides)
    start(*overrides, **has)


def test_a_critic_has_no_value_of_a_demonstration_in_the_group():
    text = refused(of("critic in the group"), critic=True)
    assert "takes Â from a critic, and a demonstration in the group has no value estimate" in text
    start(of("critic in the group"), "++hpt.compose.rollouts=grpo")


def test_a_model_that_is_not_asked_for_likelihoods_is_not_needed_for_them():
    assert "needs verl's reference model" not in refused("++hpt.demo.likelihood_of=reference")


def test_a_method_without_demonstrations_leaves_their_columns_unread():
    start("++hpt.method=grpo", "++hpt.demo.likelihood_of=policy", "++hpt.demo.log_likelihood=l")


@pytest.mark.parametrize("node", ["5", "[1]", "text"])
def test_a_node_that_is_no_mapping_is_refused(node):
    assert "must be a mapping with keys method" in refused(f"++hpt={node}")


def test_without_a_node_the_defaults_train():
    assert start().settings == start("++hpt=null").settings == start("++hpt={}").settings


@pytest.mark.parametrize("how", ["token", "sequence"])
def test_rollout_correction_needs_the_log_probs_of_the_rollout_engine(how):
    on = f"algorithm.rollout_correction.rollout_is={how}"
    without, with_ = (f"actor_rollout_ref.rollout.calculate_log_probs={x}" for x in (False, True))
    text = refused(on, without)
    assert f"{on} needs the rollout engine's log-probs, and verl skips it without a word" in text
    start(on, with_)
    start(without)
    start(on, without, "++hpt.method=sft")


@pytest.mark.parametrize("truncated", ["unsolved", "mask"])
def test_what_becomes_of_cut_rollouts_is_refused_where_nothing_reads_it(truncated):
    own = f"++hpt.rollouts.truncated={truncated}"
    assert f"hpt.rollouts.truncated={truncated}: method sft has no term on rollouts; drop it" in refused(
        own, "++hpt.method=sft"
    )
    assert f"hpt.rollouts.truncated={truncated}: method ppo takes Â from verl's critic" in refused(
        own, "++hpt.method=ppo", critic=True
    )
    start(own)
