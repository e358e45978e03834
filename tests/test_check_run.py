"""`verl-hpt check-run`: commands and launch scripts as users have them, composed with verl's real config, never run."""

import os
import shlex
import sys

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from launches import ACTOR, HPT, MAIN, REF, ROLLOUT, USUAL, usual
from omegaconf import OmegaConf
from recipe_bench import METHODS, MODELS, OFFICIAL, Bench

from verl_hpt import cli
from verl_hpt.tools import command

# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "env"),
    [(MODELS[0], {"METHOD": method}) for method in METHODS]
    + [(MODELS[0], {"METHOD": method, "OFFICIAL": "1"}) for method in OFFICIAL]
    + [(model, {}) for model in MODELS[1:]]
    + [("quickstart", {"METHOD": method}) for method in ("hpt", "grpo", "sft")]
    + [("gsm8k_cpu", {}), ("evaluate", {})],
    ids=lambda part: "-".join(part.values()) if isinstance(part, dict) else part,
)
def test_every_recipe_is_accepted(recipe, env, check_run, tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?", "answer": "2\\n#### 2"}\n')
    for name, value in {"MODEL_PATH": str(bench.model), "PYTHON": sys.executable, **env}.items():
        monkeypatch.setenv(name, value)
    words = {"gsm8k_cpu": ["train.jsonl"], "evaluate": [str(bench.model)]}.get(recipe, [])
    status, printed = check_run("bash", f"recipes/{recipe}.sh", *words)
    assert status == 0, printed
    assert not bench.calls_file.exists(), "something was run"
    method = env.get("METHOD", "hpt")
    stock = ["hpt takes no part"] * (method == "grpo" or recipe == "evaluate")
    for text in ["nothing here would hurt training", *stock]:
        assert text in printed
    assert printed.count("nothing here would hurt training") == 1
    if recipe != "evaluate":
        trained = {"grpo": "hpt", "sft_then_grpo": "sft", "srft": "srft_hpt" if "OFFICIAL" in env else "srft"}
        assert f": method {trained.get(method, method)}, " in printed and "do not reach verl" not in printed


# --- commands --------------------------------------------------------------------------------------------------------

WRAPPED = {
    "python": ["python", "-u", "-m", MAIN],
    "file": ["python3", "verl/trainer/main_ppo.py"],
    "environment": ["CUDA_VISIBLE_DEVICES=0", "env", "A=b", "python3", "-m", MAIN],
    "ray": ["ray", "job", "submit", "--working-dir", ".", "--", "python3", "-m", MAIN],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "-m", MAIN],
    "uv": ["uv", "run", "--frozen", "python", "-m", MAIN],
    "another program": ["python", "tools/watch.py", "trainer.x=1", "--", "python", "-m", MAIN],
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_command_is_found_however_it_is_wrapped(how):
    (call,) = command.read([*WRAPPED[how], *USUAL, HPT]).calls
    assert (call.entry, call.arguments) == (MAIN, [*USUAL, HPT])
    assert call.env.get("CUDA_VISIBLE_DEVICES") == (
        "0" if how == "environment" else os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    quoted = shlex.join([*WRAPPED["python"], *USUAL, HPT])
    assert command.training(["ssh", "node1", quoted]) == (MAIN, [*USUAL, HPT])


def test_a_usual_command_is_accepted_with_the_banner_of_training(check_run):
    status, printed = check_run(*usual(HPT, "++hpt.demo_coef=0.3"))
    assert status == 0
    assert "verl-hpt 0.1.0 on verl 0.9" in printed and "λ = 0.3" in printed and "L = 1024" in printed
    assert "nothing here would hurt training" in printed and "takes no part" not in printed


def test_the_config_is_the_one_that_hydra_composes(tmp_path, monkeypatch):
    from verl_hpt.host import launch

    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\ndata: {train_batch_size: 5}\n")
    config = launch.compose(["--config-dir", "own", "--config-name", "mine", HPT, "++hpt.seed=3"])
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(launch.MAIN.parent / "config"), version_base=None):
        stock = hydra.compose("ppo_trainer", overrides=[HPT, "++hpt.seed=3", "data.train_batch_size=5"])
        engine = hydra.compose("ppo_trainer", overrides=["model_engine=megatron"])
    assert OmegaConf.to_container(config) == OmegaConf.to_container(stock)
    assert OmegaConf.to_container(launch.compose(["model_engine=megatron"])) == OmegaConf.to_container(engine)
    whole = launch.compose(["--config-name=hpt_trainer", "hpt.demo_coef=0.2"])
    assert whole.hpt.demo_coef == 0.2 and whole.algorithm.adv_estimator == "hpt"


def test_a_command_without_hpt_is_checked_as_if_it_had_it(check_run):
    status, printed = check_run(*usual("algorithm.adv_estimator=grpo"))
    assert status == 0
    assert "algorithm.adv_estimator is grpo: hpt takes no part in this command. It is checked as if" in printed
    assert (
        "rollouts as before: '++hpt.compose={rollouts: grpo, demos: [{kind: S}], normalization: sequence}'" in printed
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (f"{ROLLOUT}.max_model_lenght=9", f"did you mean {ROLLOUT}.max_model_len?"),
        ("trainr.nnodes=1", "the config has no key 'trainr'; did you mean trainer?"),
        (f"+{ROLLOUT}.max_modl_len=9", f"verl refuses it: {ROLLOUT}.max_modl_len"),
        (f"++{ACTOR}.policy_loss.tau_pos=1", "verl refuses it: its PolicyLossConfig has no field 'tau_pos'"),
        (f"{ROLLOUT}.n=[1", f"Hydra cannot read `{ROLLOUT}.n=[1`"),
        ("model_engine=fdsp", "Could not find 'model_engine/fdsp' Available options in 'model_engine': dp"),
        ("+data.train_batch_size=3", "An item is already at 'data.train_batch_size'"),
        ("data.train_files=${oc.env:NO_SUCH_VARIABLE}", "does not resolve: KeyError"),
        ("--no-such-option", "unrecognized arguments: --no-such-option"),
        ("--config-name=nope", "Cannot find primary config 'nope'"),
        ("data.train_batch_size=3", "verl refuses it: train_batch_size (3) must be >= actor.ppo_mini_batch_size (32)"),
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu=null", "verl refuses it: [actor] Please set at least one of"),
        ("++hpt.demo_coeff=1", "hpt.demo_coeff: unknown key"),
        ("trainer.use_v1=False", "trainer.use_v1=False: algorithm.adv_estimator=hpt needs verl-hpt's trainer"),
    ],
)
def test_what_verl_or_hpt_refuses_is_said_in_a_sentence(wrong, message, check_run):
    status, printed = check_run(*usual(HPT, wrong))
    assert status == 2 and message in printed
    assert "provider=" not in printed and "https://" not in printed


def test_all_refusals_come_at_once_and_their_remedies_are_accepted(check_run):
    status, printed = check_run(
        *usual(
            HPT, f"{ACTOR}.policy_loss.loss_mode=gspo", "algorithm.filter_groups.enable=True", "data.train_batch_size=3"
        )
    )
    assert status == 2 and printed.count("\n  - ") == 3
    for text in ("would be refused before any model loads", "evicts the questions", "train_batch_size (3)"):
        assert text in printed
    remedy = "++hpt.compose={rollouts: gspo, demos: [{kind: S}], normalization: sequence}"
    assert f"'{remedy}'" in printed
    assert check_run(*usual(HPT, f"{ACTOR}.policy_loss.loss_mode=vanilla", remedy))[0] == 0


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("recipe.dapo.main_dapo", "its trainer is one of its own; the clip range"),
        ("verl.experimental.fully_async_policy.fully_async_main", "trainer.v1.trainer_mode=colocate_async"),
        ("verl.experimental.one_step_off_policy.main_ppo", "trainer.v1.trainer_mode=colocate_async"),
        ("verl.trainer.sft_trainer", "++hpt.method=sft"),
        ("my_project.train", "its trainer is one of its own"),
    ],
)
def test_other_entry_points_are_refused_by_name(entry, why, check_run):
    status, printed = check_run("python3", "-m", entry, *USUAL)
    assert (
        status == 2 and f"{entry}: hpt trains in `python -m verl.trainer.main_ppo` alone" in printed and why in printed
    )
    status, printed = check_run("torchrun", "train/main.py", *USUAL)
    assert status == 2 and "train/main.py: hpt trains in" in printed


@pytest.mark.parametrize("words", [[], ["ls"], ["python", "-m", "pytest"], ["bash", "no_such.sh"], ["python", "x.py"]])
def test_what_starts_no_training_is_refused(words, check_run):
    status, printed = check_run(*words)
    assert status == 2 and "verl-hpt check-run: " in printed


def test_help_and_wrong_options_have_no_traceback(check_run, capfd):
    assert cli.main(["check-run", "--help"]) == 0 and cli.main(["check-run", "--no-such"]) == 2
    assert check_run(*usual(HPT), options=("--limit", "0"))[0] == 2


# --- what becomes dead or means something else -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["algorithm.adv_estimator=gae"],
         ["critic.*", "dead: no critic is built", "rollouts: ppo", "critic.enable=True"]),
        ([HPT, "critic.enable=True", "critic.ppo_micro_batch_size_per_gpu=1", "critic.ppo_mini_batch_size=32"],
         ["a critic is trained and method hpt does not read it"]),
        ([HPT, "algorithm.lam=0.95"], ["algorithm.gamma=1.0, algorithm.lam=0.95", "only GAE reads them"]),
        (["algorithm.adv_estimator=gdpo", "+algorithm.gdpo_reward_keys=[a,b]"],
         ["algorithm.gdpo_reward_keys=['a', 'b']", "only gdpo weighs several rewards"]),
        ([HPT, "algorithm.use_pf_ppo=True"], ["algorithm.use_pf_ppo=True", "dead"]),
        ([HPT, "algorithm.norm_adv_by_std_in_grpo=False"], ["algorithm.norm_adv_by_std_in_grpo=False", "dead"]),
        ([HPT, f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm", f"{ACTOR}.loss_scale_factor=2048"],
         [f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm", "++hpt.normalization=question",
          "++hpt.rl_length_scale=2048"]),
        ([HPT, REF, "algorithm.use_kl_in_reward=True"],
         ["algorithm.use_kl_in_reward=True", "the gate reads the score without it"]),
        ([HPT, REF, f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.entropy_coeff=0.01"],
         ["demonstrations have no KL term", f"{ACTOR}.entropy_coeff=0.01", "on the rollouts' tokens alone"]),
        ([HPT, "algorithm.rollout_correction.rollout_is=token", f"{ROLLOUT}.calculate_log_probs=True",
          "algorithm.rollout_correction.rollout_rs=seq_mean_k1", "algorithm.rollout_correction.rollout_rs_threshold=2"],
         ["algorithm.rollout_correction.rollout_is=token", "weighs the rollouts' terms", "the gate still counts"]),
        ([HPT, "actor_rollout_ref.model.lora_rank=8"],
         ["actor_rollout_ref.model.lora_rank=8", "its gradients are compared on FSDP2"]),
        ([HPT, "trainer.v1.trainer_mode=colocate_async"], ["trainer.v1.trainer_mode=colocate_async", "not run by us"]),
        ([HPT, f"{ROLLOUT}.n=1"], [f"{ROLLOUT}.n=1", "one alone has its raw reward for Â, as in verl"]),
        ([HPT, f"{ROLLOUT}.multi_turn.enable=True"], [f"{ROLLOUT}.multi_turn.enable=True", "a text is one turn"]),
        ([HPT, "reward.reward_model.enable=True", "reward.reward_model.rollout.name=vllm"],
         ["WARNING: reward.reward_model.enable=True", "the gate compares score with 1"]),
        ([HPT, "reward.reward_manager.name=gdpo", "++hpt.gate.metric=acc"],
         ["note: reward.reward_manager.name=gdpo: the score adds up several rewards; the gate compares acc with 1"]),
    ],
    ids=lambda part: part[-1].partition("=")[0] if "=" in part[-1] else "",
)  # fmt: skip
def test_what_is_dead_or_means_something_else_is_told_with_its_value(overrides, texts, check_run):
    status, printed = check_run(*usual(*overrides))
    assert status == 0, printed
    for text in texts:
        assert text in " ".join(printed.split()), printed


def test_verls_defaults_are_not_listed(check_run):
    assert "Under hpt:" not in check_run(*usual(HPT))[1]


@pytest.mark.parametrize(
    ("override", "message", "remedy"),
    [
        ("trainer.critic_warmup=20", "trainer.critic_warmup=20: there is no critic", "trainer.critic_warmup=0"),
        ("custom_reward_function.path=r.py", "custom_reward_function.path=r.py: verl 0.9 reads "
         "reward.custom_reward_function.path and not this", "reward.custom_reward_function.path=r.py"),
        ("reward_model.reward_manager=dapo", "reward_model.reward_manager=dapo: verl 0.9 reads "
         "reward.reward_manager.name and not this",
         "reward.reward_manager.name=dapo"),
        ("+reward_model.reward_kwargs.max_resp_len=9", "reward_model.reward_kwargs.max_resp_len=9: verl 0.9 "
         "reads reward.reward_kwargs.max_resp_len",
         "+reward.reward_kwargs.max_resp_len=9"),
        ("++trainer.total_epoch=3", "trainer.total_epoch: trainer has no key 'total_epoch'; did you mean "
         "trainer.total_epochs?; nothing reads it", "trainer.total_epochs=3"),
    ],
)  # fmt: skip
def test_what_would_hurt_training_is_harm_and_its_remedy_is_none(override, message, remedy, check_run):
    status, printed = check_run(*usual(HPT, override))
    assert status == 1 and f"HARM: {message}" in printed.replace("  ", " ") and "1 thing(s) here would hurt" in printed
    assert check_run(*usual(HPT, remedy))[0] == 0


def test_a_reward_with_dapos_overlong_penalty_is_refused_and_its_remedies_are_accepted(check_run):
    dapo = ["reward.reward_manager.name=dapo", "+reward.reward_kwargs.max_resp_len=1024",
            *(f"+reward.reward_kwargs.overlong_buffer_cfg.{setting}" for setting in
              ("enable=True", "len=256", "penalty_factor=1.0", "log=False"))]  # fmt: skip
    status, printed = check_run(*usual(HPT, *dapo))
    assert status == 2 and "a right answer loses up to 1.0 where it is long" in printed
    assert "set ++hpt.gate.metric=acc (the reward function's own verdict)" in printed
    for remedy in ("++hpt.gate.metric=acc", "++hpt.gate.success=0.5", "++hpt.method=luffy"):
        status, printed = check_run(*usual(HPT, *dapo, remedy))
        assert status == 0, printed
        assert ("overlong_buffer_cfg.enable=True: a right answer" in printed) == ("luffy" not in remedy)
