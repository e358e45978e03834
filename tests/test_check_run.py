"""`verl-hpt check-run`: commands and launch scripts as users have them, composed with verl's real config, never run."""

import json
import os
import shlex
import sys
import time
from pathlib import Path

import hydra
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from recipe_bench import METHODS, MODELS, OFFICIAL, Bench

from verl_hpt import cli
from verl_hpt.errors import UserError
from verl_hpt.tools import command

MAIN = "verl.trainer.main_ppo"
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
# A launch line as verl's documentation has them.
USUAL = [
    "data.train_batch_size=64", "data.max_prompt_length=512", "data.max_response_length=1024",
    "actor_rollout_ref.model.path=Qwen/Qwen3-0.6B", f"{ACTOR}.optim.lr=1e-6", f"{ACTOR}.ppo_mini_batch_size=32",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=4", f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.n=8",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4", "trainer.n_gpus_per_node=1", "trainer.logger=console",
]  # fmt: skip
HPT, REF = "algorithm.adv_estimator=hpt", "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=1"


@pytest.fixture
def check(capfd, monkeypatch, tmp_path):
    """Run the command in an empty folder. -> (exit status, all that it printed)"""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, data: bool = False, options: tuple = ()) -> tuple[int, str]:
        before = dict(os.environ)
        status = cli.main(["check-run", *options, *([] if data else ["--no-data"]), "--", *words])
        assert dict(os.environ) == before and Path.cwd() == tmp_path
        printed = "".join(capfd.readouterr())
        assert "Traceback" not in printed
        return status, printed

    return run


def usual(*overrides: str) -> list[str]:
    return ["python3", "-m", MAIN, *USUAL, *overrides]


def script(folder: Path, text: str, name: str = "run.sh") -> str:
    (folder / name).write_text(text)
    return name


LAUNCH = f"python3 -m {MAIN} {shlex.join(USUAL)} "


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
def test_every_recipe_is_accepted(recipe, env, check, tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?", "answer": "2\\n#### 2"}\n')
    for name, value in {"MODEL_PATH": str(bench.model), "PYTHON": sys.executable, **env}.items():
        monkeypatch.setenv(name, value)
    words = {"gsm8k_cpu": ["train.jsonl"], "evaluate": [str(bench.model)]}.get(recipe, [])
    status, printed = check("bash", f"recipes/{recipe}.sh", *words)
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


def test_a_usual_command_is_accepted_with_the_banner_of_training(check):
    status, printed = check(*usual(HPT, "++hpt.demo_coef=0.3"))
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


def test_a_command_without_hpt_is_checked_as_if_it_had_it(check):
    status, printed = check(*usual("algorithm.adv_estimator=grpo"))
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
def test_what_verl_or_hpt_refuses_is_said_in_a_sentence(wrong, message, check):
    status, printed = check(*usual(HPT, wrong))
    assert status == 2 and message in printed
    assert "provider=" not in printed and "https://" not in printed


def test_all_refusals_come_at_once_and_their_remedies_are_accepted(check):
    status, printed = check(
        *usual(
            HPT, f"{ACTOR}.policy_loss.loss_mode=gspo", "algorithm.filter_groups.enable=True", "data.train_batch_size=3"
        )
    )
    assert status == 2 and printed.count("\n  - ") == 3
    for text in ("would be refused before any model loads", "evicts the questions", "train_batch_size (3)"):
        assert text in printed
    remedy = "++hpt.compose={rollouts: gspo, demos: [{kind: S}], normalization: sequence}"
    assert f"'{remedy}'" in printed
    assert check(*usual(HPT, f"{ACTOR}.policy_loss.loss_mode=vanilla", remedy))[0] == 0


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
def test_other_entry_points_are_refused_by_name(entry, why, check):
    status, printed = check("python3", "-m", entry, *USUAL)
    assert (
        status == 2 and f"{entry}: hpt trains in `python -m verl.trainer.main_ppo` alone" in printed and why in printed
    )
    status, printed = check("torchrun", "train/main.py", *USUAL)
    assert status == 2 and "train/main.py: hpt trains in" in printed


@pytest.mark.parametrize("words", [[], ["ls"], ["python", "-m", "pytest"], ["bash", "no_such.sh"], ["python", "x.py"]])
def test_what_starts_no_training_is_refused(words, check):
    status, printed = check(*words)
    assert status == 2 and "verl-hpt check-run: " in printed


def test_help_and_wrong_options_have_no_traceback(check, capfd):
    assert cli.main(["check-run", "--help"]) == 0 and cli.main(["check-run", "--no-such"]) == 2
    assert check(*usual(HPT), options=("--limit", "0"))[0] == 2


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
        ([HPT, "actor_rollout_ref.model.lora_rank=8"], ["actor_rollout_ref.model.lora_rank=8", "LoRA has been read"]),
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
def test_what_is_dead_or_means_something_else_is_told_with_its_value(overrides, texts, check):
    status, printed = check(*usual(*overrides))
    assert status == 0, printed
    for text in texts:
        assert text in " ".join(printed.split()), printed


def test_verls_defaults_are_not_listed(check):
    assert "Under hpt:" not in check(*usual(HPT))[1]


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
def test_what_would_hurt_training_is_harm_and_its_remedy_is_none(override, message, remedy, check):
    status, printed = check(*usual(HPT, override))
    assert status == 1 and f"HARM: {message}" in printed.replace("  ", " ") and "1 thing(s) here would hurt" in printed
    assert check(*usual(HPT, remedy))[0] == 0


def test_a_reward_with_dapos_overlong_penalty_is_refused_and_its_remedies_are_accepted(check):
    dapo = ["reward.reward_manager.name=dapo", "+reward.reward_kwargs.max_resp_len=1024",
            *(f"+reward.reward_kwargs.overlong_buffer_cfg.{setting}" for setting in
              ("enable=True", "len=256", "penalty_factor=1.0", "log=False"))]  # fmt: skip
    status, printed = check(*usual(HPT, *dapo))
    assert status == 2 and "a right answer loses up to 1.0 where it is long" in printed
    assert "set ++hpt.gate.metric=acc (the reward function's own verdict)" in printed
    for remedy in ("++hpt.gate.metric=acc", "++hpt.gate.success=0.5", "++hpt.method=luffy"):
        status, printed = check(*usual(HPT, *dapo, remedy))
        assert status == 0, printed
        assert ("overlong_buffer_cfg.enable=True: a right answer" in printed) == ("luffy" not in remedy)


# --- launch scripts --------------------------------------------------------------------------------------------------


def test_a_script_that_hands_its_arguments_on_is_checked_with_them(check, tmp_path):
    run = script(tmp_path, f'set -e\n{LAUNCH} "$@"\n')
    status, printed = check("bash", run, HPT, "++hpt.demo_coef=0.7")
    assert status == 0 and "λ = 0.7" in printed and "reach" not in printed


def test_a_script_that_loses_its_arguments_is_harm_and_says_where_to_edit(check, tmp_path):
    run = script(tmp_path, f"{LAUNCH}\n")
    status, printed = check("bash", run, HPT, "++hpt.demo_coef=0.7")
    assert status == 1
    assert f'HARM: {HPT} ++hpt.demo_coef=0.7 are lost: not in the command that is run. run.sh: add "$@" at' in printed
    assert "it is checked as if" in printed.lower()
    status, printed = check("bash", run)
    assert status == 0 and "note: arguments of the script do not reach verl. To add overrides, edit run.sh" in printed
    assert "do not reach" not in check("bash", script(tmp_path, f'{LAUNCH} "${{@:1}}"\n'))[1]


def test_a_scripts_own_python_and_path_do_not_get_round_the_stand_ins(check, tmp_path):
    """Neither an environment's folder first on PATH, nor an absolute path, nor a PYTHONPATH of its own."""
    own = tmp_path / "venv" / "bin"
    own.mkdir(parents=True)
    for name in ("python", "python3", "torchrun"):
        (own / name).symlink_to(sys.executable)
    marker = tmp_path / "ran"
    module = tmp_path / "verl_like.py"
    module.write_text(f"open({str(marker)!r}, 'w')\n")
    console = own / "ray"
    console.write_text(f"#!{sys.executable}\nopen({str(marker)!r}, 'w')\n")
    console.chmod(0o755)
    ways = [
        "export PATH=$PWD/venv/bin:$PATH PYTHONPATH=$PWD; python3",
        "exec $PWD/venv/bin/python",
        "unset PYTHONPATH; timeout 9 python3",
        "export PYTHONPATH=$PWD; $PWD/venv/bin/python3",
        "unset PYTHONPATH; $PWD/venv/bin/python3",
        "export PATH=$PWD/venv/bin:$PATH PYTHONPATH=$PWD; nohup python3",
        "export PATH=$PWD/venv/bin:$PATH; env -u PYTHONPATH python3",
        "export PATH=$PWD/venv/bin:$PATH; python3 -E",
        'set -euo pipefail; unset PYTHONPATH; f() { $PWD/venv/bin/python3 "$@"; }; f',
    ]
    for way in ways:
        run = script(tmp_path, f"{way} -m {MAIN} {shlex.join(USUAL)} {HPT}\n")
        assert check("bash", run)[0] == 0, way
    run = script(tmp_path, f"venv/bin/ray job submit -- python -m {MAIN} {shlex.join(USUAL)} {HPT}\n"
                 f"$PWD/venv/bin/python verl_like.py\n")  # fmt: skip
    status, printed = check("bash", run)
    assert status == 0 and "not run:" in printed and "verl_like.py" in printed
    assert not marker.exists()


def test_an_environment_before_the_command_reaches_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = script(tmp_path, f"{LAUNCH} {HPT}\n")
    for start in ((), ("env",)):
        for launch in (["bash", run], shlex.split(f"{LAUNCH} {HPT}")):
            (call,) = command.read([*start, f"PYTHONPATH={tmp_path}/own", "FOO=1", *launch]).calls
            assert (call.env["PYTHONPATH"], call.env["FOO"]) == (f"{tmp_path}/own", "1")


def test_nothing_that_a_script_left_in_the_background_goes_on(check, tmp_path):
    run = script(tmp_path, f"(while true; do date > alive; /bin/sleep 0.1; done) &\n{LAUNCH} {HPT}\n")
    assert check("bash", run)[0] == 0
    (tmp_path / "alive").unlink(missing_ok=True)
    time.sleep(0.5)
    assert not (tmp_path / "alive").exists()


def test_inline_python_runs_and_other_programs_do_not(check, tmp_path):
    marker = tmp_path / "ran"
    text = f"""set -euo pipefail
ulimit -n 999999999
n=$(python3 -c 'print(2 ** 3)')
m=$(python - <<END
print(32)
END
)
pip install everything; git clone somewhere; sleep 99; ray stop
python3 prepare.py --out {marker}
python3 -m {MAIN} {shlex.join(USUAL)} {HPT} {ROLLOUT}.n=$n {ACTOR}.ppo_mini_batch_size=$m
"""
    status, printed = check("bash", script(tmp_path, text))
    assert status == 0, printed
    assert "32 questions an optimizer step" in printed and not marker.exists()
    for other in ("pip install everything", "git clone somewhere", "sleep 99", "ray stop", "python3 prepare.py"):
        assert f"not run: {other}" in printed


def test_a_script_removes_moves_and_ends_nothing(check, tmp_path):
    kept = tmp_path / "checkpoints" / "kept"
    kept.parent.mkdir()
    kept.write_text("x")
    text = f"rm -rf {kept.parent}\nmv {kept} {tmp_path}\nkill $$\n{LAUNCH} {HPT} | tee {kept}\n"
    status, printed = check("bash", script(tmp_path, text))
    assert status == 0 and kept.read_text() == "x", printed
    assert (
        f"not run: rm -rf {kept.parent}" in printed and f"not run: mv {kept}" in printed and "not run: kill" in printed
    )


def test_every_training_of_a_script_is_checked_in_its_folder_and_environment(check, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\ndata: {max_response_length: 77}\n")
    own = [word for word in USUAL if "response_length" not in word]
    text = (
        f"cd inner; export COLUMN=mine\npython -m {MAIN} --config-dir=. --config-name=mine {shlex.join(own)} {HPT}\n"
        f"{LAUNCH} {HPT} '++hpt.demo.key=${{oc.env:COLUMN}}'\ncp no_such_file elsewhere\nexit 3\n"
    )
    status, printed = check("bash", script(tmp_path, text))
    assert status == 0, printed
    assert "=== training 2 of 2 ===" in printed and "L = 77" in printed and "column 'mine'" in printed
    assert "note: run.sh ended with status 3, after the training that is checked here" in printed


def test_the_worst_of_several_trainings_is_the_status(check, tmp_path):
    text = f"{LAUNCH} {HPT} trainer.critic_warmup=20\n{LAUNCH} {HPT} data.train_batch_size=3\n{LAUNCH} {HPT}\n"
    assert check("bash", script(tmp_path, text))[0] == 2


def test_a_script_that_starts_no_training_says_how_it_ended(check, tmp_path):
    text = f"set -eu\npip install x\necho $NO_SUCH_VARIABLE\n{LAUNCH}\n"
    status, printed = check("bash", script(tmp_path, text))
    assert status == 2
    for part in (
        "run.sh starts no training of verl's",
        "ended with status 1",
        "not run: pip install x",
        "NO_SUCH_VARIABLE",
    ):
        assert part in printed


def test_a_script_that_does_not_end_is_stopped(check, tmp_path):
    run = script(tmp_path, f"{LAUNCH} {HPT}\nwhile true; do /bin/sleep 0.1; done\n")
    status, printed = check("bash", run, options=("--timeout", "3"))
    assert status == 0 and "run.sh did not end within 3 s and was stopped" in printed


def test_a_script_may_be_run_by_its_name_or_given_as_text(check, tmp_path):
    run = Path(script(tmp_path, f'#!/bin/sh\n{LAUNCH} "$@"\n'))
    assert check("./run.sh", HPT)[0] == 0
    run.chmod(0o755)
    assert check("./run.sh", HPT)[0] == 0
    assert check("bash", "-c", f"{LAUNCH} {HPT}")[0] == 0


# --- the run's own data ----------------------------------------------------------------------------------------------

REWARD = """
def score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0, **kwargs):
    return {"score": float(ground_truth in solution_str) - bonus, "acc": float(ground_truth in solution_str)}
"""


@pytest.fixture
def run_of(check, tokenizers, tmp_path):
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
        return check(
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


def test_images_are_refused_before_any_model_loads(run_of):
    status, printed = run_of("data.val_files=null", images=[[], [], ["a.png"], []])
    assert status == 1
    assert "data.image_key='images': row 3 of the training data has something there; multi-modal prompts are" in printed
    assert run_of("data.val_files=null", images=[[], None, [], []])[0] == 0
    parts = [[{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]}]] * 4
    status, printed = run_of("data.val_files=null", prompt=parts)
    assert status == 1 and "data.prompt_key='prompt': row 1 of the training data has an image" in printed


def test_what_is_not_on_this_machine_is_noted_and_nothing_is_downloaded(run_of, check, tmp_path):
    status, printed = run_of("data.val_files=null", "actor_rollout_ref.model.path=owner/no-such-model")
    assert (
        status == 0
        and "note: actor_rollout_ref.model.path=owner/no-such-model: its tokenizer is not on this" in printed
    )
    made = script(tmp_path, f"python prepare.py\n{LAUNCH} {HPT} data.train_files=made.parquet\n")
    status, printed = check("bash", made, data=True)
    assert status == 0 and "not checked: data.train_files: made.parquet is not on this machine" in printed


# --- where another trainer runs --------------------------------------------------------------------------------------


def test_verls_legacy_trainer_and_those_of_recipes_refuse_hpt_when_they_are_built():
    from verl.trainer.ppo import ray_trainer
    from verl_config import compose

    class OfARecipe(ray_trainer.RayPPOTrainer):
        def __init__(self, config):
            raise AssertionError("built")

    for trainer in (ray_trainer.RayPPOTrainer, OfARecipe):
        for arguments, names in (((compose(),), {}), ((), {"config": compose()})):
            with pytest.raises(UserError, match=rf"{trainer.__name__}: .* Set trainer\.use_v1=True and run"):
                trainer(*arguments, **names)
    with pytest.raises(AssertionError, match="built"):
        OfARecipe(compose("algorithm.adv_estimator=grpo"))
