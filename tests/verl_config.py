"""verl's own composed config, as a run of ours gets it: Hydra over verl's `ppo_trainer`, with `adv_estimator=hpt`."""

from functools import cache
from pathlib import Path

import hydra
import verl
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

FOLDER = Path(verl.__file__).parent / "trainer" / "config"


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(FOLDER), version_base=None):
        return hydra.compose("ppo_trainer", overrides=["algorithm.adv_estimator=hpt", *overrides])


def compose(*overrides: str) -> DictConfig:
    """A config of one's own; what is composed once is copied, since composing takes half a second."""
    return _composed(overrides).copy()
