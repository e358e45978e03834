"""Switching on, tested in subprocesses against the installed wheel, outside the source tree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl_hpt.errors import UserError

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


GRADIENT = """
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn, compute_grpo_outcome_advantage
from verl.workers.config import FSDPActorConfig
import numpy as np
g = torch.Generator().manual_seed(0)
lp = -torch.rand(6, 9, generator=g); lp.requires_grad_()
old = lp.detach() + 0.6 * (torch.rand(6, 9, generator=g) - 0.5)
mask = torch.ones(6, 9); mask[2, 4:] = 0
adv, _ = compute_grpo_outcome_advantage(torch.eye(6, 9) * torch.arange(6)[:, None], mask, np.array([0, 0, 0, 1, 1, 1]))
actor = FSDPActorConfig(strategy="fsdp2", rollout_n=3, ppo_micro_batch_size_per_gpu=6, optim=None)
loss, _ = get_policy_loss_fn("vanilla")(old, lp, adv, mask, "token-mean", actor)
loss.backward()
gradient = [loss.item(), lp.grad.flatten().tolist()]
"""

# One process for all that is asked of an installation, since importing verl takes long; what breaks verl on purpose
# comes last.
PROBE = (
    """
import json, sys
import verl, verl_hpt, hydra
from pathlib import Path
from types import SimpleNamespace
from omegaconf import OmegaConf
loaded = "verl_hpt.plugin" in sys.modules
import verl.trainer.ppo.core_algos as algos
from verl.trainer.ppo.v1 import get_trainer_cls, register_trainer
from verl.trainer.ppo.v1 import PPOTrainerSync, PPOTrainerColocateAsync, PPOTrainerSeparateAsync
import verl.trainer.ppo.v1.trainer_base as trainer_base

@register_trainer("mine")
class Mine(trainer_base.PPOTrainer):
    def __init__(self, config): self.config = config
    def on_step_end(self): pass
    def on_sample_end(self): pass

modes = {"sync": PPOTrainerSync, "colocate_async": PPOTrainerColocateAsync, "separate_async": PPOTrainerSeparateAsync}
stock = OmegaConf.create({"algorithm": {"adv_estimator": "grpo"}})
"""
    + GRADIENT
    + """
try:
    algos.get_adv_estimator_fn("hpt")(torch.ones(2, 3), torch.ones(2, 3), ["a", "a"]); refused = ""
except RuntimeError as error:
    refused = str(error)

from verl_hpt.host.trainer import hybrid
ours = {}
for mode, base in modes.items():
    cls = hybrid(base)
    door = cls._update_actor is not base._update_actor
    seen = lambda self, metrics, timing: self.asked.append((metrics, timing)) or "verl's batch"
    trainer, given = object.__new__(hybrid(type("Seen", (base,), {"step": seen}))), ({"a": 1}, {"b": 2})
    trainer.asked, trainer.hpt = [], SimpleNamespace()
    verls_step = trainer.step(*given) == "verl's batch" and trainer.asked == [given] == [({"a": 1}, {"b": 2})]
    ours[mode] = [cls.__name__, issubclass(cls, base), verls_step, door]

with hydra.initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
    a = hydra.compose("hpt_trainer", overrides=["hpt.gate.threshold=0.25", "++hpt.demo_coef=0.3"])
    b = hydra.compose("ppo_trainer", overrides=["algorithm.adv_estimator=hpt", "++hpt.gate.threshold=0.25"])
    try:
        hydra.compose("hpt_trainer", overrides=["hpt.gate.treshold=0.25"]); wrong = "composes"
    except Exception as error:
        wrong = type(error).__name__
composed = [a.algorithm.adv_estimator, a.hpt.gate.threshold, a.hpt.demo_coef, b.hpt.gate.threshold, wrong]

from verl_hpt.host import contract
from verl_hpt.errors import UserError
missing = contract.missing()
del trainer_base.PPOTrainer._update_actor
gone = contract.missing()
contract.version = lambda name: "0.8.2"
try:
    contract.check(); unsupported = ""
except UserError as error:
    unsupported = str(error)
print(json.dumps(dict(
    file=verl_hpt.__file__, loaded=loaded, estimator="hpt" in algos.ADV_ESTIMATOR_REGISTRY,
    bases=[get_trainer_cls(mode).base is base for mode, base in modes.items()],
    registry=[trainer_base.TRAINER_REGISTRY[mode] is base for mode, base in modes.items()],
    stock=type(get_trainer_cls("mine")(config=stock)) is Mine, gradient=gradient, refused=refused, ours=ours,
    composed=composed, missing=missing, gone=gone, unsupported=unsupported,
)))
"""
)


@pytest.fixture(scope="session")
def found(site) -> dict:
    return run(site, PROBE)


def test_verl_loads_the_installed_wheels_plugin(site, found):
    assert found["file"].startswith(str(site))
    assert found["loaded"] and found["estimator"]


def test_the_plugin_alone_imports_nothing_heavy(site):
    code = "import sys, json, verl_hpt.plugin; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    heavy = {"torch", "verl", "ray", "numpy", "hydra", "transformers", "omegaconf", "pydantic"}
    assert not heavy & set(run(site, code))


def test_the_defaults_that_hydra_is_offered_do_not_import_pydantic(site):
    code = "import sys, json, verl_hpt.config as c; c.defaults(); print(json.dumps('pydantic' in sys.modules))"
    assert run(site, code) is False


def test_a_stock_run_gets_the_very_class_it_always_got(found):
    assert found["stock"] and all(found["bases"]) and all(found["registry"])


def test_a_stock_runs_gradient_is_the_same_with_and_without_the_plugin(site, found):
    without = run(site, GRADIENT + "import json; print(json.dumps(gradient))", VERL_USE_EXTERNAL_PLUGINS="none")
    assert found["gradient"] == without and any(without[1])


def test_all_three_trainer_modes_become_ours_with_adv_estimator_hpt(found):
    for name, subclass, verls_step, door_opened in found["ours"].values():
        assert name.startswith("Hybrid") and subclass and verls_step and door_opened


def test_the_estimator_raises_without_our_trainer(found):
    assert "trainer.use_v1=True" in found["refused"] and "doctor" in found["refused"]


def test_config_name_hpt_trainer_composes_over_verls_own_and_a_misspelt_key_does_not(found):
    assert found["composed"] == ["hpt", 0.25, 0.3, 0.25, "ConfigCompositionException"]


def test_every_name_that_we_lean_on_is_there_and_one_that_is_gone_is_told(found):
    assert found["missing"] == []
    assert any("PPOTrainer._update_actor" in line and "door" in line for line in found["gone"])


def test_an_unsupported_verl_is_told(found):
    assert "verl 0.8.2" in found["unsupported"] and ">=0.9,<0.10" in found["unsupported"]


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
