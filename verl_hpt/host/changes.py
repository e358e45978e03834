"""What of a user's verl config becomes dead, or comes to mean something else, once algorithm.adv_estimator is hpt.

What cannot work is refused (``refusals``); what stands here trains, and is told by ``verl-hpt check-run``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from verl_hpt.host.launch import ESTIMATOR, wants
from verl_hpt.host.refusals import ACTOR, compose_with
from verl_hpt.host.run import Run

# verl's estimator -> the rollouts of ours that take the same Â
ESTIMATORS = {
    "gae": "ppo", "grpo": "grpo", "grpo_vectorized": "grpo", "rloo": "rloo", "rloo_vectorized": "rloo",
}  # fmt: skip
NORMALIZATIONS = {
    "token-mean": "token", "seq-mean-token-mean": "sequence", "seq-mean-token-sum": "question",
    "seq-mean-token-sum-norm": "question",
}  # fmt: skip
# verl 0.9's main_ppo composes these and reads none of them.
LEGACY = {
    "custom_reward_function": "reward.custom_reward_function",
    "reward_model": "reward.reward_model",
    "sandbox_fusion": "reward.sandbox_fusion",
}
LEGACY_KEYS = {
    "reward_model.reward_manager": "reward.reward_manager.name",
    "reward_model.num_workers": "reward.num_workers",
    "reward_model.model.path": "reward.reward_model.model_path",
    "reward_model.reward_kwargs": "reward.reward_kwargs",
}


@dataclass(frozen=True)
class Change:
    """An option with the value got, and what becomes of it. harm: training would be hurt."""

    option: str
    meaning: str
    harm: bool = False


def changes(config: DictConfig, base: DictConfig, run: Run, estimator: str) -> Iterator[Change]:
    """What becomes of options under hpt.

    Args:
        config: what would train. base: the same without overrides. estimator: what the user's command has in place of
            hpt, or hpt.
    """
    absent = object()

    def on(path: str):
        return OmegaConf.select(config, path, throw_on_missing=False)

    def chosen(path: str) -> bool:
        """The value is not verl's own default."""
        return on(path) != OmegaConf.select(base, path, default=absent, throw_on_missing=False)

    method, uses_critic = run.method, run.method.uses_critic
    trains_rollouts = method.rollouts is not None
    yield from _estimator(config, run, estimator)
    table = (
        (chosen("algorithm.gamma") or chosen("algorithm.lam"), not uses_critic, "algorithm.gamma", "algorithm.lam",
         "dead: only GAE reads them"),
        (on("algorithm.gdpo_reward_keys"), True, "algorithm.gdpo_reward_keys",
         "dead: only gdpo weighs several rewards; Â and the gate read the one score"),
        (on("algorithm.gdpo_reward_weights"), True, "algorithm.gdpo_reward_weights", "dead, as gdpo_reward_keys"),
        (on("algorithm.use_pf_ppo"), True, "algorithm.use_pf_ppo", "dead: only GAE's rows are resampled"),
        (chosen("algorithm.norm_adv_by_std_in_grpo"), True, "algorithm.norm_adv_by_std_in_grpo",
         "dead: the method says whether Â is divided by the standard deviation (grpo does, dr_grpo and hpt do not)"),
        (chosen(f"{ACTOR}.loss_agg_mode"), True, f"{ACTOR}.loss_agg_mode",
         f"dead: hpt.normalization={run.normalization} takes its place; nearest to it is ++hpt.normalization="
         f"{NORMALIZATIONS.get(on(f'{ACTOR}.loss_agg_mode'), 'question')}"),
        (on(f"{ACTOR}.loss_scale_factor") is not None, True, f"{ACTOR}.loss_scale_factor",
         f"dead: L = {run.length_scale:g} takes its place; ++hpt.rl_length_scale={on(f'{ACTOR}.loss_scale_factor')}"),
        (on(f"{ACTOR}.use_kl_loss"), trains_rollouts, f"{ACTOR}.use_kl_loss",
         "on the rollouts' tokens alone; demonstrations have no KL term"),
        (on(f"{ACTOR}.entropy_coeff"), trains_rollouts, f"{ACTOR}.entropy_coeff", "on the rollouts' tokens alone"),
        (on("algorithm.use_kl_in_reward"), True, "algorithm.use_kl_in_reward",
         "lowers what Â is made of; the gate reads the score without it"),
        (on("algorithm.rollout_correction.rollout_is"), trains_rollouts, "algorithm.rollout_correction.rollout_is",
         "weighs the rollouts' terms; demonstrations were sampled by nobody and have no such weight"),
        (on("algorithm.rollout_correction.rollout_rs"), trains_rollouts, "algorithm.rollout_correction.rollout_rs",
         "masks rollouts as in verl; the gate still counts a masked one that is solved"),
        (on("actor_rollout_ref.model.lora_rank"), True, "actor_rollout_ref.model.lora_rank",
         "demonstrations train the adapter too; its gradients are compared on FSDP2, no whole training was run"),
        (on("actor_rollout_ref.model.lora.rank"), True, "actor_rollout_ref.model.lora.rank",
         "demonstrations train the adapter too; its gradients are compared on FSDP2, no whole training was run"),
        (chosen("trainer.v1.trainer_mode"), True, "trainer.v1.trainer_mode",
         "the gate decides when a question is trained, on rollouts of an older model; not run by us"),
        (on("actor_rollout_ref.rollout.multi_turn.enable"), method.demos, "actor_rollout_ref.rollout.multi_turn.enable",
         "a demonstration of several turns is a list of chat messages; a text is one turn"),
    )  # fmt: skip
    for is_set, matters, *options, meaning in table:
        if is_set and matters:
            yield Change(", ".join(f"{option}={on(option)}" for option in options), meaning)
    warmup = on("trainer.critic_warmup")
    if warmup and not wants(config)["has_critic"]:
        waits = "there is no critic, and for so many steps the actor is not trained: set it to 0"
        yield Change(f"trainer.critic_warmup={warmup}", waits, True)
    compared = trains_rollouts and method.rollouts.advantage.over_group is not None
    if on("actor_rollout_ref.rollout.n") == 1 and compared:
        meaning = f"Â of {method.name} compares a question's rollouts: one alone has its raw reward for Â, as in verl"
        yield Change("actor_rollout_ref.rollout.n=1", meaning)
    yield from _legacy(config)


def _estimator(config: DictConfig, run: Run, estimator: str) -> Iterator[Change]:
    """What took the place of the estimator, and of its critic."""
    method, stock = run.method, config.copy()
    OmegaConf.update(stock, ESTIMATOR, estimator)
    if estimator != "hpt":
        same = ESTIMATORS.get(estimator)
        critic = " with critic.enable=True" if same == "ppo" else ""
        more = f"; rollouts as before: {compose_with(same)}{critic}" if same and method.name == "hpt" else ""
        yield Change(f"{ESTIMATOR}={estimator}", f"replaced: method {method.name}, {method.formula}{more}")
    had, has = (wants(each)["has_critic"] for each in (stock, config))
    if had and not has:
        yield Change("critic.*", "dead: no critic is built")
    elif has and not method.uses_critic:
        yield Change(
            f"critic.enable={config.critic.enable}",
            f"a critic is trained and method {method.name} does not read it; drop it, or take {compose_with('ppo')}",
        )


def _legacy(config: DictConfig) -> Iterator[Change]:
    """Options of before verl 0.9 that its main_ppo takes without a word and never reads."""
    for node, now in LEGACY.items():
        leaves = _leaves(config.get(node), node)
        for path, value in leaves:
            new = next((to + path[len(of) :] for of, to in LEGACY_KEYS.items() if path.startswith(of)), None)
            new = new or now + path[len(node) :]
            yield Change(f"{path}={value}", f"verl 0.9 reads {new} and not this, without a word: write it there", True)


def _leaves(node: object, path: str) -> Iterator[tuple[str, object]]:
    """Every value below a node that is set."""
    if OmegaConf.is_dict(node):
        for name in node:
            yield from _leaves(node[name], f"{path}.{name}")
    elif node is not None:
        yield path, node
