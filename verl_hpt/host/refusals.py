"""Refusals: what would silently become something else is said, all at once, before any model loads. No verl imports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from verl_hpt.config import Demo, Settings, clips
from verl_hpt.errors import UserError
from verl_hpt.estimator import Method
from verl_hpt.parts import RANGES


def refuse(config, settings: Settings, method: Method, *, has_reference: bool, has_critic: bool) -> None:
    """Raise one UserError with every reason why this run would not be what its config says.

    Args:
        config: verl's whole config. has_reference, has_critic: whether verl will build those workers.
    """
    problems = [*_host(config), *_method(config, settings, method, has_reference, has_critic)]
    if problems:
        raise UserError("verl-hpt refuses this config:\n  - " + "\n  - ".join(problems))


def _host(config) -> Iterable[str]:
    """Options of verl that contradict mixing at the door of the update."""

    def on(path: str):
        node = config
        for key in path.split("."):
            node = node.get(key) if node is not None else None
        return node

    if on("algorithm.filter_groups.enable"):
        yield (
            "algorithm.filter_groups.enable=True evicts the questions that no rollout solves before the gate sees "
            "them; set it to False (the gate is what handles them)"
        )
    if on("distillation.enabled"):
        yield "distillation.enabled=True replaces the actor's loss; set it to False"
    actor = "actor_rollout_ref.actor"
    if on(f"{actor}.shuffle"):
        yield f"{actor}.shuffle=True tears questions apart over optimizer steps; set it to False (ours are shuffled)"
    nodes = on(actor)
    for path in (actor, *(f"{actor}.{name}" for name in nodes if isinstance(nodes.get(name), Mapping))):
        mode = on(f"{path}.router_replay.mode")  # of the actor's engine: actor.megatron, actor.veomni
        if mode not in (None, "disabled"):
            yield f"{path}.router_replay.mode={mode}: demonstrations have no recorded routes; set it to disabled"
    replay = "actor_rollout_ref.rollout.enable_rollout_routing_replay"
    if on(replay):
        yield f"{replay}=True: demonstrations have no recorded routes; set it to False"
    if on("algorithm.rollout_correction.bypass_mode"):
        yield "algorithm.rollout_correction.bypass_mode=True brings a loss of its own; set it to False"
    loss_mode = on(f"{actor}.policy_loss.loss_mode")
    if loss_mode not in (None, "vanilla"):
        yield f"{actor}.policy_loss.loss_mode={loss_mode}: the loss is ours; leave it at vanilla and choose hpt.method"
    for name, value in clips(nodes).items():
        ok, what = RANGES[name]
        key = name.replace("clip_", "clip_ratio_")
        if not _number(value) or not ok(value):
            read = "" if nodes.get(key) is not None or name == "clip_c" else f", and clip_ratio={_shown(value)}"
            yield f"{actor}.{key}={_shown(nodes.get(key))}{read}: must be a number {what}"
    for key in ("entropy_coeff", *(["kl_loss_coef"] if nodes.get("use_kl_loss") else [])):
        if not _number(nodes.get(key)):
            yield f"{actor}.{key}={_shown(nodes.get(key))}: must be a finite number; 0 switches it off"


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value) -> str:
    return "null" if value is None else str(value)


def _method(config, settings: Settings, method: Method, has_reference: bool, has_critic: bool) -> Iterable[str]:
    """Combinations of method and settings that make no sense."""
    gates = {"hpt.gate": settings.gate} | {f"hpt.per_source.{s}.gate": o.gate for s, o in settings.per_source.items()}
    for where, gate in gates.items():
        switched = gate.threshold != 0.0 or gate.count is not None or gate.function is not None
        if switched and method.when != "gate":
            yield (
                f"{where} is set, but method {method.name} has no gate; drop it, or choose a method with one (hpt, "
                "hpt_off_on, hpt_mix_on)"
            )
    if settings.history.early_gate is not None and method.when in ("never", "always"):
        yield (
            f"hpt.history.early_gate is set, but method {method.name} has no gate (when: {method.when}) and trains on "
            "every rollout that it gets; drop it, or choose a method with a gate (hpt, hpt_off_on, hpt_mix_on)"
        )
    if (truncated := settings.rollouts.truncated) != "keep":
        if method.rollouts is None:
            yield f"hpt.rollouts.truncated={truncated}: method {method.name} has no term on rollouts; drop it"
        elif method.uses_critic:
            yield (
                f"hpt.rollouts.truncated={truncated}: method {method.name} takes Â from verl's critic, which is given "
                "the rewards as they are; set it to keep"
            )
    if "ref_log_prob" in method.needs and not has_reference:
        yield (
            f"method {method.name} needs reference log-probs on demonstrations; set "
            "actor_rollout_ref.actor.use_kl_loss=True (kl_loss_coef=0 keeps the rollouts' KL out)"
        )
    if method.uses_critic and not has_critic:
        yield f"method {method.name} needs a critic; set critic.enable=True"
    if method.uses_critic and method.place == "group":
        yield f"method {method.name} takes Â from a critic, and a demonstration in the group has no value estimate"
    if "other_log_prob" in method.needs and settings.demo.other_log_prob is None:
        yield (
            f"method {method.name} needs each demonstration's mean log-prob under other models; name its column in "
            "hpt.demo.other_log_prob"
        )
    if method.demos:
        yield from _columns(settings.demo, method, has_reference)
    if method.rollouts is not None and "teacher_log_prob" in method.rollouts.needs:
        yield f"method {method.name} takes the teacher as reference on rollouts, which have none; use old or current"
    own_rollouts = method.s_estimator.needs if method.when == "own" else frozenset()
    for name in sorted(own_rollouts & {"teacher_log_prob", "other_log_prob"}):
        yield f"method {method.name} imitates its own rollouts too (when: own), and these have no {name}"
    correction = (config.algorithm.get("rollout_correction") or {}).get("rollout_is")
    if correction and method.rollouts is not None and not config.actor_rollout_ref.rollout.get("calculate_log_probs"):
        yield (
            f"algorithm.rollout_correction.rollout_is={correction} needs the rollout engine's log-probs, and verl "
            "skips it without a word; set actor_rollout_ref.rollout.calculate_log_probs=True, or rollout_is=null"
        )
    if config.algorithm.get("use_kl_in_reward"):
        if method.rollouts is None:
            yield f"method {method.name} trains on demonstrations only: algorithm.use_kl_in_reward=True has no effect"
        elif method.place == "group":
            yield (
                f"method {method.name} compares rollouts with demonstrations, and algorithm.use_kl_in_reward=True "
                "lowers the rollouts' rewards alone"
            )


def _columns(demo: Demo, method: Method, has_reference: bool) -> Iterable[str]:
    """Columns of demonstrations that a method lacks, or that nothing reads."""
    needs, by_likelihood = method.needs_of_demos, demo.select == "likelihood"
    if "teacher_log_prob" in needs and demo.teacher_log_prob is None:
        yield (
            f"method {method.name} needs the log-probs of the model that wrote a demonstration; name their column in "
            "hpt.demo.teacher_log_prob"
        )
    for name, hint in (
        ("teacher_log_prob", "compose one with reference: teacher, or drop it"),
        ("other_log_prob", "poft does; drop it"),
    ):
        if getattr(demo, name) is not None and name not in needs:
            yield f"hpt.demo.{name} is set, but nothing in method {method.name} reads it; {hint}"
    if demo.log_likelihood is not None and not (by_likelihood and demo.likelihood_of == "column"):
        yield (
            f"hpt.demo.log_likelihood is set, but select={demo.select} and likelihood_of={demo.likelihood_of} does "
            "not read it; set select=likelihood and likelihood_of=column, or drop it"
        )
    if demo.likelihood_of != "column" and not by_likelihood:
        yield f"hpt.demo.likelihood_of={demo.likelihood_of} has no effect: set hpt.demo.select=likelihood, or drop it"
    if by_likelihood and demo.likelihood_of == "reference" and not has_reference:
        yield (
            "hpt.demo.likelihood_of=reference needs verl's reference model; set "
            "actor_rollout_ref.actor.use_kl_loss=True (kl_loss_coef=0 keeps the KL out), or use policy, or a column"
        )
