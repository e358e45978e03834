"""Every recipe, run as the shell script it is, gives arguments that verl's own config takes and its own checks pass.

A stand-in for `python` comes first on PATH and writes down what verl would have been started with. Those overrides are
composed with Hydra against verl's real `ppo_trainer`; then verl's `validate_config`, its dataclasses and our own
checks have their say. No model, no Ray.
"""

import dataclasses
import inspect
import itertools
import json
import shutil
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
import verl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from recipe_bench import METHODS, MODELS, OFFICIAL, PLACED, RECIPES, Bench

from verl_hpt import config
from verl_hpt.errors import UserError
from verl_hpt.gate import Outcome, decide
from verl_hpt.host import refusals
from verl_hpt.methods import METHODS as METHODS_TABLE
from verl_hpt.parts import Tokens, ppo_clip

VERL = Path(verl.__file__).parent


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def compose(overrides: list[str]):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(VERL / "trainer" / "config"), version_base=None):
        return hydra.compose("ppo_trainer", overrides=overrides)


# --- what a key must be ----------------------------------------------------------------------------------------------

# Dictionaries of verl's config that have no fields of their own: a key must be one that their reader names.
READERS = {
    "actor_rollout_ref.model.override_config": VERL / "workers" / "config" / "model.py",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision": VERL / "workers" / "engine" / "fsdp" / "transformer_impl.py",
    "actor_rollout_ref.rollout.engine_kwargs.vllm": None,  # vLLM's own arguments
}


def why_unknown(path: str, base) -> str | None:
    """Hydra adds any `+` key without a word; here it must be a key, a field of the node's dataclass, or one read."""
    if path.split(".")[0] == "hpt":
        return None  # checked by verl_hpt.config
    node, done = base, []
    for part in path.split("."):
        prefix = ".".join(done)
        done.append(part)
        if OmegaConf.is_dict(node) and part in node:
            node = node[part]
            continue
        if prefix == "ray_kwargs.ray_init":
            import ray

            return None if part in inspect.signature(ray.init).parameters else f"ray.init has no {part!r}"
        if prefix in READERS:
            text = READERS[prefix].read_text() if READERS[prefix] else ""
            return None if f'"{part}"' in text else f"nothing reads {path}"
        if not (OmegaConf.is_dict(node) and "_target_" in node):
            return f"{prefix or 'the config'} has no key {part!r}"
        fields = {f.name for f in dataclasses.fields(hydra.utils.get_class(node["_target_"]))}
        if part not in fields:
            return f"{node['_target_']} has no field {part!r}"
        node = None
    return None


@pytest.fixture(scope="session")
def base():
    return compose([])


def check(overrides: list[str], base):
    """The composed config, when verl and we would start with it; raises otherwise."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_add() or override.is_force_add():
            problem = why_unknown(override.key_or_group, base)
            assert problem is None, f"{override.input_line}: {problem}"
    composed = compose(overrides)
    OmegaConf.to_container(composed, resolve=True)
    has_reference, has_critic = need_reference_policy(composed), need_critic(composed)
    validate_config(composed, has_reference, has_critic)
    for node in (composed.actor_rollout_ref.rollout, composed.algorithm):
        omega_conf_to_dataclass(node)
    if composed.algorithm.adv_estimator == "hpt":
        refusals.settle(composed, node_of(composed), has_reference=has_reference, has_critic=has_critic)
    else:
        assert "hpt" not in composed, "settings of ours in a run that is not ours"
    return composed


def node_of(composed):
    return OmegaConf.to_container(composed.hpt, resolve=True) if "hpt" in composed else None


def settings_of(composed):
    return config.load(node_of(composed))


# --- the paper's models ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Disabled critic")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_a_recipe_composes_and_passes_every_check(model, method, bench, base):
    bench.run(model, METHOD=method)
    runs = [check(call, base) for call in bench.calls("train")]
    stages = ["sft", "grpo"] if method == "sft_then_grpo" else [method]
    assert [r.algorithm.adv_estimator for r in runs] == ["grpo" if s == "grpo" else "hpt" for s in stages]
    for stage, run in zip(stages, runs, strict=True):
        actor, rollout = run.actor_rollout_ref.actor, run.actor_rollout_ref.rollout
        assert rollout.n == {"luffy": 7, "srft": 7, "sft": 1}.get(stage, 8)
        assert actor.optim.lr == (1e-6 if stage in ("luffy", "srft", *PLACED.values()) else 5e-6)
        assert (run.data.train_batch_size, actor.ppo_mini_batch_size) == (128, 64)
        assert run.trainer.total_training_steps == 500
        assert (run.data.max_prompt_length, run.data.max_response_length, rollout.temperature) == (1024, 8192, 1.0)
        assert (actor.optim.lr_scheduler_type, actor.optim.weight_decay, actor.grad_clip) == ("constant", 0.01, 1.0)
        assert (actor.entropy_coeff, actor.use_kl_loss, actor.clip_ratio_low, actor.clip_ratio_high) == (
            0.001, False, 0.2, 0.28)  # fmt: skip
        assert rollout.max_model_len >= run.data.max_prompt_length + run.data.max_response_length
        if stage != "grpo":
            assert settings_of(run).method == stage and settings_of(run).gate.finished


@pytest.mark.parametrize(("recipe", "method"), PLACED.items())
def test_a_recipe_of_one_method_trains_that_on_the_papers_model(recipe, method, bench, base):
    bench.run(recipe, METHOD="sft", STREAM_FILE="experts.parquet")
    (call,) = bench.calls("train")
    run = check(call, base)
    settings = settings_of(run)
    assert settings.method == method and run.actor_rollout_ref.rollout.n == 8
    assert settings.stream == (config.Stream("experts.parquet", 256) if method == "chord_mu" else config.Stream())
    assert config.start_of(settings, METHODS_TABLE[method]).rollouts == (1 if method == "prefix_rft" else "all")
    bench.run("qwen2.5_math_7b", METHOD=method)
    (same,) = bench.calls("train")
    assert [arg for arg in call if "stream.files" not in arg] == [arg for arg in same if "stream.files" not in arg]


@pytest.mark.filterwarnings("ignore:Disabled critic")
@pytest.mark.parametrize("method", OFFICIAL)
@pytest.mark.parametrize("model", MODELS)
def test_the_published_codes_behaviour_by_one_switch(model, method, bench, base):
    bench.run(model, METHOD=method, OFFICIAL="1")
    (call,) = bench.calls("train")
    run = check(call, base)
    settings, actor = settings_of(run), run.actor_rollout_ref.actor
    assert settings.normalization == "official" and actor.entropy_coeff == 0.001
    assert settings.gate.finished is False and settings.rollouts.truncated == "keep"
    if method == "hpt":
        assert settings.demo_coef == (4.8 if "1.5b" in model else 16)
    log_prob = torch.tensor([[-60.0, -30.0, -1.0, -0.1, 0.0]])
    for old in (-60.0, -1.0, 0.0):
        for advantage in (-1.0, 1.0):
            tokens = Tokens(
                log_prob, torch.ones(1, 5, dtype=torch.bool), torch.tensor([[advantage]]), torch.ones(1, 1),
                torch.ones(1, 1, dtype=torch.bool), old_log_prob=torch.full((1, 5), old),
                constants=config.constants(settings, **config.clips(actor)),
            )  # fmt: skip
            assert ppo_clip(tokens)[0].all(), "the clip fired"


def test_the_gate_of_llama_is_two_of_eight(bench, base):
    for model, limit in (("llama3.1_8b", 2), ("qwen2.5_math_7b", 0)):
        bench.run(model)
        gate = settings_of(compose(bench.calls("train")[0])).gate.at(0)
        outcomes = [Outcome(np.array([1.0] * k + [0.0] * (8 - k)), gate) for k in (limit, limit + 1)]
        assert [decide("gate", outcome).zone for outcome in outcomes] == ["demo", "rl"]


def test_demonstrations_of_the_small_model_weigh_three_tenths(bench):
    weights = {}
    for model in MODELS[:2]:
        for official in ("0", "1"):
            bench.run(model, OFFICIAL=official)
            given = [a for a in bench.calls("train")[0] if a.startswith("++hpt.demo_coef=")]
            weights[model, official] = float(given[-1].partition("=")[2])  # Hydra takes the last
    for official in ("0", "1"):
        assert weights[MODELS[1], official] == pytest.approx(0.3 * weights[MODELS[0], official])


def test_two_stages_hand_the_model_on_and_a_restart_skips_the_first(bench, monkeypatch):
    bench.run("qwen2.5_math_7b", METHOD="sft_then_grpo", SFT_STEPS="40")
    first, second = bench.calls("train")
    (merge,) = bench.calls("merge")
    assert "trainer.total_training_steps=40" in first and "trainer.total_training_steps=500" in second
    from verl.model_merger.base_model_merger import parse_args

    monkeypatch.setattr(sys, "argv", ["verl.model_merger", *merge])
    args = parse_args()
    folder = next(a.partition("=")[2] for a in first if a.startswith("trainer.default_local_dir="))
    assert args.local_dir == f"{folder}/global_step_500/actor"
    (start,) = [a.partition("=")[2] for a in second if a.startswith("actor_rollout_ref.model.path=")]
    assert Path(start).is_dir() and f"{start}.part" == args.target_dir
    bench.run("qwen2.5_math_7b", METHOD="sft_then_grpo")
    assert bench.calls("train") == [second] and not bench.calls("merge")


def test_missing_training_data_is_converted_by_a_command_that_exists(bench):
    import argparse

    from verl_hpt.data.commands import add_convert

    bench.run("qwen2.5_math_7b")
    ((*command, source, out, option),) = bench.calls("verl-hpt")
    parser = argparse.ArgumentParser()
    add_convert(parser)
    args = parser.parse_args([source, out, option])
    assert command == ["data", "convert"] and args.inputs == ["Elliott/Openr1-Math-46k-8192"] and args.drop_system
    assert f"data.train_files={out}" in bench.calls("train")[0]
    bench.run("qwen2.5_math_7b")
    assert not bench.calls("verl-hpt"), "converted twice"


def test_arguments_override_the_recipe(bench):
    bench.run("llama3.1_8b", "trainer.n_gpus_per_node=4", "++hpt.demo_coef=0.5", "actor_rollout_ref.rollout.n=4")
    run = compose(bench.calls("train")[0])
    assert (run.trainer.n_gpus_per_node, run.hpt.demo_coef, run.actor_rollout_ref.rollout.n) == (4, 0.5, 4)


@pytest.mark.parametrize(
    "env, says",
    [
        ({"METHOD": "dpo"}, "choose hpt, luffy, srft, prefix_rft, chord_mu, relift, grpo, sft or sft_then_grpo"),
        ({"METHOD": "grpo", "OFFICIAL": "1"}, "published code for hpt, luffy and srft only"),
    ],
)
def test_what_a_recipe_cannot_do_is_said_before_anything_runs(bench, env, says):
    assert says in bench.run("qwen2.5_math_7b", code=2, **env)
    assert not bench.calls_file.read_text()


def test_missing_validation_files_are_said_with_the_command_that_makes_them(bench):
    shutil.rmtree(bench.root / "outputs" / "eval")
    assert "verl-hpt data eval-set" in bench.run("qwen2.5_math_7b", code=2)
    assert "verl-hpt data eval-set" in bench.run("evaluate", str(bench.model), code=2)
    assert not bench.calls_file.read_text()


# --- the model's copy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_by", ["transformers 4", "transformers 5"])
def test_the_copy_has_the_longer_positions_where_transformers_and_vllm_read_them(bench, saved_by):
    from transformers import AutoConfig

    if saved_by == "transformers 5":
        AutoConfig.from_pretrained(bench.model).save_pretrained(bench.model)
    bench.run("qwen2.5_math_7b")
    (path,) = [a.partition("=")[2] for a in bench.calls("train")[0] if a.startswith("actor_rollout_ref.model.path=")]
    copy = AutoConfig.from_pretrained(path)
    assert copy.rope_parameters["rope_theta"] == 40000 and copy.max_position_embeddings == 16384
    assert json.loads((bench.model / "config.json").read_text())["max_position_embeddings"] == 4096, "source changed"
    assert (Path(path) / "model.safetensors").read_text() == "weights"


def test_why_the_copy_is_needed_verls_override_leaves_the_rotary_base(bench):
    """When this fails, recipes/local_model.py can lose half of its reason."""
    from transformers import AutoConfig
    from verl.utils.model import update_model_config

    overridden = AutoConfig.from_pretrained(bench.model)
    update_model_config(overridden, {"rope_theta": 40000})
    assert overridden.rope_parameters["rope_theta"] == 10000


def test_llamas_template_is_the_published_prompt_and_ends_where_the_answer_begins():
    from quickstart_task import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (RECIPES / "llama_question_answer.jinja").read_text()
    question, answer = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    assert prompt == (
        "Question:\n1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
        "Answer:\nLet's think step by step."
    )
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert whole == prompt + "2" + tokenizer.eos_token


# --- evaluation and the recipes for a CPU ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Disabled critic")
def test_evaluation_composes_and_takes_every_set(bench, base):
    bench.run("evaluate", str(bench.model), K="32")
    (call,) = bench.calls("train")
    run = check(call, base)
    assert run.trainer.val_only and run.trainer.val_before_train and run.actor_rollout_ref.rollout.val_kwargs.n == 32
    assert [Path(f).stem for f in run.data.val_files] == ["aime24", "amc23", "math-500"]
    assert run.actor_rollout_ref.model.path == str(bench.model)


def test_evaluation_merges_a_checkpoint_once(bench):
    checkpoint = bench.root / "run" / "checkpoints" / "global_step_500"
    (checkpoint / "actor").mkdir(parents=True)
    for merges in (1, 0):
        bench.run("evaluate", str(checkpoint))
        assert len(bench.calls("merge")) == merges
        assert f"actor_rollout_ref.model.path={checkpoint / 'merged'}" in bench.calls("train")[0]


@pytest.mark.filterwarnings("ignore:Disabled critic")
@pytest.mark.parametrize("recipe, method", [("quickstart", m) for m in ("hpt", "grpo", "sft")] + [("gsm8k_cpu", "hpt")])
def test_a_cpu_recipe_composes_and_passes_every_check(recipe, method, bench, base):
    data = bench.root / "train.jsonl"
    data.write_text('{"question": "1+1?", "answer": "2\\n#### 2"}\n')
    bench.run(recipe, *([str(data)] if recipe == "gsm8k_cpu" else []), METHOD=method)
    (call,) = bench.calls("train")
    run = check(call, base)
    assert run.algorithm.adv_estimator == ("grpo" if method == "grpo" else "hpt")


# --- these tests can fail --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Disabled critic")
@pytest.mark.parametrize(
    "wrong, error",
    [
        ("actor_rollout_ref.actor.no_such_key=1", "no_such_key"),
        ("actor_rollout_ref.rollout.max_model_lenght=9216", "max_model_lenght"),
        ("+actor_rollout_ref.rollout.no_such_key=1", "RolloutConfig has no field 'no_such_key'"),
        ("++actor_rollout_ref.model.no_such_key=1", "HFModelConfig has no field 'no_such_key'"),
        ("++actor_rollout_ref.model.override_config.no_such_key=1", "nothing reads"),
        ("++trainer.no_such_key=1", "trainer has no key 'no_such_key'"),
        ("+ray_kwargs.ray_init.no_such_key=1", "ray.init has no 'no_such_key'"),
        ("++hpt.no_such_key=1", "hpt.no_such_key: unknown key"),
        ("++hpt.method=no_such_method", "'no_such_method' is unknown"),
        ("++hpt.demo_coef=-1", "at least 0: λ"),
        ("algorithm.filter_groups.enable=True", "evicts the questions"),
        ("actor_rollout_ref.actor.use_dynamic_bsz=False", "micro_batch_size"),
    ],
)
def test_a_wrong_key_or_value_fails(wrong, error, bench, base):
    bench.run("qwen2.5_math_7b", wrong)
    (call,) = bench.calls("train")
    with pytest.raises(Exception, match=error.replace(".", r"\.")) as raised:
        check(call, base)
    assert isinstance(raised.value, (hydra.errors.HydraException, UserError, AssertionError, ValueError))


def test_every_recipe_has_a_header_and_is_named_here():
    tested = {*MODELS, *PLACED, "evaluate", "quickstart", "gsm8k_cpu"}
    sourced = {"math", "cpu_env"}
    assert {p.stem for p in RECIPES.glob("*.sh")} == tested | sourced
    for name in tested:
        header = (RECIPES / f"{name}.sh").read_text().split("set -euo pipefail")[0]
        for word in ("Hardware", "Time", "Versions", "Expect", f"bash recipes/{name}.sh"):
            assert word in header, f"recipes/{name}.sh: no {word!r} in its header"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.stem)
def test_a_header_is_short(recipe):
    header = list(itertools.takewhile(lambda line: line.startswith("#"), recipe.read_text().splitlines()))
    assert len(header) <= 15 and max(map(len, header)) <= 120
