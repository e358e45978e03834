"""Refusals against verl's real config: each is said with the key and a remedy, and the remedy works."""

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
from verl_config import FOLDER, compose

from verl_hpt.demos.encode import stop_ids
from verl_hpt.errors import UserError
from verl_hpt.host.batch import Group
from verl_hpt.host.contract import FIELDS
from verl_hpt.host.run import Run
from verl_hpt.methods import METHODS

ACTOR = "actor_rollout_ref.actor"


def ends_with(token: int | None) -> Letters:
    """A tokenizer whose EOS has this id."""
    tokenizer = Letters()
    tokenizer.eos_token_id = token
    return tokenizer


def start(*overrides: str, reference: bool = False, critic: bool = False) -> Run:
    return Run(compose(*overrides), verl="0.9.1", kl_penalty=None, has_reference=reference, has_critic=critic)


def refused(*overrides: str, **has) -> str:
    with pytest.raises(UserError) as error:
        start(*overrides, **has)
    return str(error.value)


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


NAMES = ["responses", "rm_scores", "advantages", "extra_fields", "output", "validate", "hpt_row", "hpt_row_of_mine"]


@pytest.mark.parametrize("name", NAMES)
def test_a_column_that_would_overwrite_a_field_of_the_rollouts_is_refused(name):
    """verl's agent loop writes a question's columns over what it sampled (``field.update(kwargs)``)."""
    text = check(start(), **ROWS, **{name: [1, 2, 3]})
    if name == "hpt_row_of_mine":
        assert text == ""
        return
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
