"""verl's own composed config, as a run of ours gets it: Hydra over verl's `ppo_trainer`, with `adv_estimator=hpt`."""

from functools import cache
from pathlib import Path

import hydra
import pytest
import verl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from verl_hpt.errors import UserError
from verl_hpt.host.run import Run

FOLDER = Path(verl.__file__).parent / "trainer" / "config"


@cache
def _composed(engine: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(FOLDER), version_base=None):
        return hydra.compose("ppo_trainer", overrides=["algorithm.adv_estimator=hpt", f"model_engine={engine}"])


def compose(*overrides: str) -> DictConfig:
    """A config of one's own. `model_engine=` (dp, megatron, veomni, torchtitan) composes anew; other overrides go by
    Hydra's own rules over what was composed, since composing takes a quarter of a second."""
    engines = [override.partition("=")[2] for override in overrides if override.startswith("model_engine=")]
    config = _composed(engines[-1] if engines else "dp").copy()
    others = [override for override in overrides if not override.startswith("model_engine=")]
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(others), config)
    return config


ACTOR = "actor_rollout_ref.actor"


def start(*overrides: str, reference: bool = False, critic: bool = False) -> Run:
    return Run(compose(*overrides), verl="0.9.1", kl_penalty=None, has_reference=reference, has_critic=critic)


def refused(*overrides: str, **has) -> str:
    with pytest.raises(UserError) as error:
        start(*overrides, **has)
    return str(error.value)
