"""Loaded by verl in every process (entry-point group ``verl.plugins``). Registers hooks and imports nothing else.

verl imports this module while it is itself half initialised, never calls it, and swallows its errors at DEBUG. So it
imports the standard library and wrapt only; all that can fail happens later, in the trainer's construction, where it
is seen. A stock run is untouched: the hooks add one advantage estimator, and a look-up that gives it the class it
always got.
"""

import os

import wrapt


class TrainerFactory:
    """What ``get_trainer_cls`` returns: builds the stock trainer, or ours over it where the config asks for hpt."""

    def __init__(self, base):
        self.base = base

    def __call__(self, *args, **kwargs):
        config = kwargs["config"] if "config" in kwargs else args[0]
        if config.algorithm.adv_estimator != "hpt":
            return self.base(*args, **kwargs)
        from verl_hpt.host.trainer import hybrid

        return hybrid(self.base)(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.base, name)


@wrapt.when_imported("verl.trainer.ppo.v1")
def _offer_trainer(v1):
    look_up = v1.get_trainer_cls

    def get_trainer_cls(name):
        return TrainerFactory(look_up(name))

    v1.get_trainer_cls = get_trainer_cls


@wrapt.when_imported("verl.trainer.ppo.core_algos")
def _offer_estimator(core_algos):
    from verl_hpt.host.advantage import hpt_advantage

    core_algos.register_adv_est("hpt")(hpt_advantage)


@wrapt.when_imported("verl.experimental.agent_loop.agent_loop")
def _offer_start_loop(agent_loop):
    """The agent loop of rollouts that start from a demonstration, by name: its own decorator would import it here."""
    agent_loop._agent_loop_registry["hpt_start"] = {"_target_": "verl_hpt.host.start_loop.StartedAgentLoop"}


@wrapt.when_imported("verl.trainer.ppo.ray_trainer")
def _refuse_other_trainers(ray_trainer):
    """verl's legacy trainer, and those of recipes and experiments, which are all of its class: hpt is refused at once,
    not at the first advantage."""
    base = ray_trainer.RayPPOTrainer

    def new(cls, *args, **kwargs):
        for config in (*args, *kwargs.values()):
            if getattr(getattr(config, "algorithm", None), "adv_estimator", None) == "hpt":
                from verl_hpt.errors import UserError
                from verl_hpt.host.advantage import OTHER_TRAINER

                raise UserError(f"{cls.__name__}: {OTHER_TRAINER}")
        make = super(base, cls).__new__
        return make(cls) if make is object.__new__ else make(cls, *args, **kwargs)

    base.__new__ = new


if os.environ.get("VERL_PLATFORM") == "cpu":
    import verl_hpt.cpu

    verl_hpt.cpu.activate()


@wrapt.when_imported("hydra.core.config_store")
def _offer_config(config_store):
    """``--config-name hpt_trainer``: verl's ppo_trainer with adv_estimator=hpt and every ``hpt`` key spelled out."""
    from verl_hpt.config import defaults

    node = {"defaults": ["ppo_trainer", "_self_"], "algorithm": {"adv_estimator": "hpt"}, "hpt": defaults()}
    config_store.ConfigStore.instance().store(name="hpt_trainer", node=node)
