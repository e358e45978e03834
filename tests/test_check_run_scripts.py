"""`verl-hpt check-run` of launch scripts: every training of theirs is found, and nothing of them is done."""

import shlex
import sys
import time
from pathlib import Path

from launches import ACTOR, HPT, LAUNCH, MAIN, ROLLOUT, USUAL, script

from verl_hpt.tools import command


def test_a_script_that_hands_its_arguments_on_is_checked_with_them(check_run, tmp_path):
    run = script(tmp_path, f'set -e\n{LAUNCH} "$@"\n')
    status, printed = check_run("bash", run, HPT, "++hpt.demo_coef=0.7")
    assert status == 0 and "λ = 0.7" in printed and "reach" not in printed


def test_a_script_that_loses_its_arguments_is_harm_and_says_where_to_edit(check_run, tmp_path):
    run = script(tmp_path, f"{LAUNCH}\n")
    status, printed = check_run("bash", run, HPT, "++hpt.demo_coef=0.7")
    assert status == 1
    assert f'HARM: {HPT} ++hpt.demo_coef=0.7 are lost: not in the command that is run. run.sh: add "$@" at' in printed
    assert "it is checked as if" in printed.lower()
    status, printed = check_run("bash", run)
    assert status == 0 and "note: arguments of the script do not reach verl. To add overrides, edit run.sh" in printed
    assert "do not reach" not in check_run("bash", script(tmp_path, f'{LAUNCH} "${{@:1}}"\n'))[1]


def test_a_scripts_own_python_and_path_do_not_get_round_the_stand_ins(check_run, tmp_path):
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
        assert check_run("bash", run)[0] == 0, way
    run = script(tmp_path, f"venv/bin/ray job submit -- python -m {MAIN} {shlex.join(USUAL)} {HPT}\n"
                 f"$PWD/venv/bin/python verl_like.py\n")  # fmt: skip
    status, printed = check_run("bash", run)
    assert status == 0 and "not run:" in printed and "verl_like.py" in printed
    assert not marker.exists()


def test_an_environment_before_the_command_reaches_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = script(tmp_path, f"{LAUNCH} {HPT}\n")
    for start in ((), ("env",)):
        for launch in (["bash", run], shlex.split(f"{LAUNCH} {HPT}")):
            (call,) = command.read([*start, f"PYTHONPATH={tmp_path}/own", "FOO=1", *launch]).calls
            assert (call.env["PYTHONPATH"], call.env["FOO"]) == (f"{tmp_path}/own", "1")


def test_nothing_that_a_script_left_in_the_background_goes_on(check_run, tmp_path):
    run = script(tmp_path, f"(while true; do date > alive; /bin/sleep 0.1; done) &\n{LAUNCH} {HPT}\n")
    assert check_run("bash", run)[0] == 0
    (tmp_path / "alive").unlink(missing_ok=True)
    time.sleep(0.5)
    assert not (tmp_path / "alive").exists()


def test_inline_python_runs_and_other_programs_do_not(check_run, tmp_path):
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
    status, printed = check_run("bash", script(tmp_path, text))
    assert status == 0, printed
    assert "32 questions an optimizer step" in printed and not marker.exists()
    for other in ("pip install everything", "git clone somewhere", "sleep 99", "ray stop", "python3 prepare.py"):
        assert f"not run: {other}" in printed


def test_a_script_removes_moves_and_ends_nothing(check_run, tmp_path):
    kept = tmp_path / "checkpoints" / "kept"
    kept.parent.mkdir()
    kept.write_text("x")
    text = f"rm -rf {kept.parent}\nmv {kept} {tmp_path}\nkill $$\n{LAUNCH} {HPT} | tee {kept}\n"
    status, printed = check_run("bash", script(tmp_path, text))
    assert status == 0 and kept.read_text() == "x", printed
    assert (
        f"not run: rm -rf {kept.parent}" in printed and f"not run: mv {kept}" in printed and "not run: kill" in printed
    )


def test_every_training_of_a_script_is_checked_in_its_folder_and_environment(check_run, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\ndata: {max_response_length: 77}\n")
    own = [word for word in USUAL if "response_length" not in word]
    text = (
        f"cd inner; export COLUMN=mine\npython -m {MAIN} --config-dir=. --config-name=mine {shlex.join(own)} {HPT}\n"
        f"{LAUNCH} {HPT} '++hpt.demo.key=${{oc.env:COLUMN}}'\ncp no_such_file elsewhere\nexit 3\n"
    )
    status, printed = check_run("bash", script(tmp_path, text))
    assert status == 0, printed
    assert "=== training 2 of 2 ===" in printed and "L = 77" in printed and "column 'mine'" in printed
    assert "note: run.sh ended with status 3, after the training that is checked here" in printed


def test_the_worst_of_several_trainings_is_the_status(check_run, tmp_path):
    text = f"{LAUNCH} {HPT} trainer.critic_warmup=20\n{LAUNCH} {HPT} data.train_batch_size=3\n{LAUNCH} {HPT}\n"
    assert check_run("bash", script(tmp_path, text))[0] == 2


def test_a_script_that_starts_no_training_says_how_it_ended(check_run, tmp_path):
    text = f"set -eu\npip install x\necho $NO_SUCH_VARIABLE\n{LAUNCH}\n"
    status, printed = check_run("bash", script(tmp_path, text))
    assert status == 2
    for part in (
        "run.sh starts no training of verl's",
        "ended with status 1",
        "not run: pip install x",
        "NO_SUCH_VARIABLE",
    ):
        assert part in printed


def test_a_script_that_does_not_end_is_stopped(check_run, tmp_path):
    run = script(tmp_path, f"{LAUNCH} {HPT}\nwhile true; do /bin/sleep 0.1; done\n")
    status, printed = check_run("bash", run, options=("--timeout", "3"))
    assert status == 0 and "run.sh did not end within 3 s and was stopped" in printed


def test_a_script_may_be_run_by_its_name_or_given_as_text(check_run, tmp_path):
    run = Path(script(tmp_path, f'#!/bin/sh\n{LAUNCH} "$@"\n'))
    assert check_run("./run.sh", HPT)[0] == 0
    run.chmod(0o755)
    assert check_run("./run.sh", HPT)[0] == 0
    assert check_run("bash", "-c", f"{LAUNCH} {HPT}")[0] == 0
