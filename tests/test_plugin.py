"""Switching on, tested in subprocesses against the installed wheel, outside the source tree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """A folder into which the wheel of this source tree is installed, alone."""
    work = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(work)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = work.glob("verl_hpt-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(work / "site"), str(wheel)], check=True, timeout=300)
    return work / "site"


def run(site: Path, code: str, **environment) -> dict:
    """What the code prints as its last line, as JSON."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")}
    env |= {"PYTHONPATH": str(site), **environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, cwd=site, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_verl_finds_the_wheels_plugin_and_a_stock_run_gets_the_class_it_always_got(site):
    found = run(
        site,
        """
import json, verl, verl_hpt
from omegaconf import OmegaConf
import verl.trainer.ppo.core_algos as algos
from verl.trainer.ppo.v1 import get_trainer_cls, register_trainer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, TRAINER_REGISTRY
from verl.trainer.ppo.v1 import PPOTrainerSync, PPOTrainerColocateAsync, PPOTrainerSeparateAsync

@register_trainer("mine")
class Mine(PPOTrainer):
    def __init__(self, config): self.config = config
    def on_step_end(self): pass
    def on_sample_end(self): pass

stock = OmegaConf.create({"algorithm": {"adv_estimator": "grpo"}})
print(json.dumps({
    "file": verl_hpt.__file__,
    "estimator": "hpt" in algos.ADV_ESTIMATOR_REGISTRY,
    "bases": [get_trainer_cls(m).base is c for m, c in (("sync", PPOTrainerSync),
        ("colocate_async", PPOTrainerColocateAsync), ("separate_async", PPOTrainerSeparateAsync))],
    "registry": [TRAINER_REGISTRY[m].__module__ for m in ("sync", "colocate_async", "separate_async")],
    "stock": type(get_trainer_cls("mine")(config=stock)) is Mine,
}))
""",
    )
    assert found["file"].startswith(str(site))
    assert found["estimator"] and found["stock"] and all(found["bases"])
    assert all(module.startswith("verl.trainer.ppo.v1") for module in found["registry"])


def test_all_three_trainer_modes_become_ours_with_adv_estimator_hpt(site):
    found = run(
        site,
        """
import json, verl
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl_hpt.trainer import hybrid
names = {}
for mode in ("sync", "colocate_async", "separate_async"):
    base = get_trainer_cls(mode).base
    ours = hybrid(base)
    door = ours._update_actor is not base._update_actor
    names[mode] = [ours.__name__, issubclass(ours, base), ours.step is base.step, door]
print(json.dumps(names))
""",
    )
    for name, subclass, step_untouched, door_opened in found.values():
        assert name.startswith("Hybrid") and subclass and step_untouched and door_opened


def test_a_stock_runs_gradient_is_the_same_with_and_without_the_plugin(site):
    code = """
import json, torch, verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn, compute_grpo_outcome_advantage
from verl.workers.config import FSDPActorConfig
import numpy as np
g = torch.Generator().manual_seed(0)
lp = -torch.rand(6, 9, generator=g); lp.requires_grad_()
old = lp.detach() + 0.6 * (torch.rand(6, 9, generator=g) - 0.5)
mask = torch.ones(6, 9); mask[2, 4:] = 0
adv, _ = compute_grpo_outcome_advantage(torch.eye(6, 9), mask, np.array([0, 0, 0, 1, 1, 1]))
config = FSDPActorConfig(strategy="fsdp2", rollout_n=3, ppo_micro_batch_size_per_gpu=6, optim=None)
loss, _ = get_policy_loss_fn("vanilla")(old, lp, adv, mask, "token-mean", config)
loss.backward()
print(json.dumps([loss.item(), lp.grad.flatten().tolist()]))
"""
    assert run(site, code) == run(site, code, VERL_USE_EXTERNAL_PLUGINS="none")


def test_the_estimator_raises_without_our_trainer(site):
    found = run(
        site,
        """
import json, torch, verl
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
try:
    get_adv_estimator_fn("hpt")(torch.ones(2, 3), torch.ones(2, 3), ["a", "a"])
    print(json.dumps(""))
except RuntimeError as error:
    print(json.dumps(str(error)))
""",
    )
    assert "trainer.use_v1=True" in found and "doctor" in found


def test_the_plugin_alone_imports_nothing_heavy(site):
    found = run(
        site,
        """
import json, sys
before = set(sys.modules)
import verl_hpt.plugin
print(json.dumps(sorted({m.split(".")[0] for m in set(sys.modules) - before})))
""",
    )
    assert not {"torch", "verl", "ray", "numpy", "hydra", "transformers", "omegaconf"} & set(found)


def test_config_name_hpt_trainer_composes_over_verls_own(site):
    found = run(
        site,
        """
import json, verl, hydra
from pathlib import Path
with hydra.initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
    a = hydra.compose("hpt_trainer", overrides=["hpt.gate.threshold=0.25", "++hpt.demo_coef=0.3"])
    b = hydra.compose("ppo_trainer", overrides=["algorithm.adv_estimator=hpt", "++hpt.gate.threshold=0.25"])
    try:
        hydra.compose("hpt_trainer", overrides=["hpt.gate.treshold=0.25"]); wrong = True
    except Exception:
        wrong = False
print(json.dumps([a.algorithm.adv_estimator, a.hpt.gate.threshold, a.hpt.demo_coef, b.hpt.gate.threshold, wrong]))
""",
    )
    assert found == ["hpt", 0.25, 0.3, 0.25, False]


def test_every_name_that_we_lean_on_is_there(site):
    assert run(site, "import json, verl; from verl_hpt import host; print(json.dumps(host.missing()))") == []


def test_a_name_that_is_gone_and_an_unsupported_verl_are_told(site):
    found = run(
        site,
        """
import json, verl
from verl_hpt import host
import verl.trainer.ppo.v1.trainer_base as base
from verl_hpt.errors import UserError
del base.PPOTrainer._update_actor
told = [host.missing()]
host.version = lambda name: "0.8.2"
try:
    host.check()
except UserError as error:
    told.append(str(error))
print(json.dumps(told))
""",
    )
    assert any("PPOTrainer._update_actor" in line and "door" in line for line in found[0])
    assert "verl 0.8.2" in found[1] and ">=0.9,<0.10" in found[1]
