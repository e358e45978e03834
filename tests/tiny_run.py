"""A run over verl's composed config with a few overrides, without a trainer."""

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.core_algos import kl_penalty
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl_config import compose

from verl_hpt.host.run import Run


def changed(*overrides: str) -> DictConfig:
    """verl's composed config with overrides of values, read by Hydra's own parser; composed once."""
    config = compose("critic.enable=False")  # as verl decides where nothing is said, without its warning
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=override.is_force_add())
    return config


def make_run(*overrides: str) -> Run:
    """The run that our trainer would build of verl's ``ppo_trainer`` with these overrides."""
    config = changed(*overrides)
    has = {"has_reference": need_reference_policy(config), "has_critic": need_critic(config)}
    return Run(config, verl="0.9", kl_penalty=kl_penalty, **has)
