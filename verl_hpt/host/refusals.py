"""Refusals: what would silently become something else is said, all at once, before any model loads. No verl imports."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from verl_hpt.config import (
    CLIPS,
    Buffer,
    Clips,
    Gate,
    Settings,
    Stream,
    clips,
    demo_coef,
    find_method,
    gates,
    parse,
    start_of,
)  # fmt: skip
from verl_hpt.errors import raise_all, read, shown
from verl_hpt.estimator import STARTS, Method
from verl_hpt.methods import METHODS
from verl_hpt.places.starts import PLAIN, Adapted

ACTOR = "actor_rollout_ref.actor"
OVERLONG = "reward.reward_kwargs.overlong_buffer_cfg"
WITH_GATE = "a method with a gate (hpt, hpt_off_on, hpt_mix_on)"
FLASH = ("flash_attention_2", "flash_attention_3")  # attentions that Ulysses works in
# verl's policy losses -> the rollouts of ours that do the same
LOSSES = {"gspo": "gspo", "cispo": "cispo", "gpg": "reinforce"}
USE_REFERENCE = f"{ACTOR}.use_kl_loss=True (kl_loss_coef=0 keeps the rollouts' KL out)"


def settle(config, node: Mapping | None, *, has_reference: bool, has_critic: bool) -> tuple[Settings, Method]:
    """The settings of node ``hpt`` and their method, for a run that will be what its config says.

    Args:
        config: verl's whole config. has_reference, has_critic: whether verl will build those workers.

    Raises:
        UserError: every problem of the settings, of the method, and of verl's options with both.
    """
    settings, problems = parse(node)
    method, of_method = (None, []) if settings is None else find_method(settings)
    problems += [*of_method, *_host(config)]
    if method is not None:
        problems += [
            *_method(config, settings, method, has_reference, has_critic),
            *_demo(settings, method, has_reference),
            *_placed(config, settings, method),
            *_starts(config, settings, method),
            *_shaped(config, settings, method),
        ]
    raise_all(problems, "verl-hpt refuses this config:")
    return settings, method


def compose_with(rollouts: str) -> str:
    """The override that has HPT's demonstrations beside another method's rollouts."""
    how = METHODS[rollouts].normalization
    return f"'++hpt.compose={{rollouts: {rollouts}, demos: [{{kind: S}}], normalization: {how}}}'"


def _same(loss_mode: str) -> str:
    """What of ours does what a policy loss of verl's does on the rollouts."""
    same = LOSSES.get(loss_mode)
    if same is None:
        return "choose hpt.method (`verl-hpt methods`); none of ours has this loss"
    return f"set {compose_with(same)}, which takes it on the rollouts; ++hpt.method={same} has no demonstrations"


def shaped_rewards(config) -> Iterator[tuple[str, str]]:
    """Options by which a right answer can score something other than 1: (option=value, what it does)."""
    reward = config.get("reward") or {}
    manager = (reward.get("reward_manager") or {}).get("name")
    overlong = (reward.get("reward_kwargs") or {}).get("overlong_buffer_cfg") or {}
    yield from (
        (option, meaning)
        for condition, option, meaning in (
            (manager == "dapo" and overlong.get("enable"), f"{OVERLONG}.enable={overlong.get('enable')}",
             f"a right answer loses up to {overlong.get('penalty_factor')} where it is long"),
            (manager == "gdpo", "reward.reward_manager.name=gdpo", "the score adds up several rewards"),
            ((reward.get("reward_model") or {}).get("enable"), "reward.reward_model.enable=True",
             "a model's score says how good an answer is, not whether it is right"),
        )
        if condition
    )  # fmt: skip


def _shaped(config, settings: Settings, method: Method) -> Iterator[str]:
    """A gate that waits for a score which right answers lose."""
    for option, meaning in shaped_rewards(config):
        for where, gate in gates(settings).items():
            waits = gate.metric is None and gate.success == Gate().success and method.when not in ("never", "always")
            if waits and option.startswith(OVERLONG):
                yield (
                    f"{option}: {meaning}, and is then not solved by {where}.success={gate.success:g}; set ++{where}."
                    f"metric=acc (the reward function's own verdict), or ++{where}.success to the score that counts"
                )


def _of(*table: tuple) -> Iterator[str]:
    """The messages whose condition holds."""
    return (message for condition, message in table if condition)


def _host(config) -> Iterator[str]:
    """Options of verl that contradict adding demonstrations in the update."""

    def on(path: str):
        return _at(config, path)

    actor, replay = on(ACTOR), "actor_rollout_ref.rollout.enable_rollout_routing_replay"
    loss_mode = on(f"{ACTOR}.policy_loss.loss_mode")
    yield from _of(
        (on("algorithm.filter_groups.enable"),
         "algorithm.filter_groups.enable=True evicts the questions that no rollout solves before the gate sees them; "
         "set it to False (the gate is what handles them)"),
        (on("distillation.enabled"), "distillation.enabled=True replaces the actor's loss; set it to False"),
        (actor.get("shuffle"),
         f"{ACTOR}.shuffle=True tears questions apart over optimizer steps; set it to False (ours are shuffled)"),
        (on(replay), f"{replay}=True: demonstrations have no recorded routes; set it to False"),
        (on("algorithm.rollout_correction.bypass_mode"),
         "algorithm.rollout_correction.bypass_mode=True brings a loss of its own; set it to False"),
        (loss_mode not in (None, "vanilla"),
         f"{ACTOR}.policy_loss.loss_mode={loss_mode}: the loss is ours; leave it at vanilla and {_same(loss_mode)}"),
    )  # fmt: skip
    yield from _ulysses(config)
    for path in (ACTOR, *(f"{ACTOR}.{name}" for name in actor if isinstance(actor.get(name), Mapping))):
        mode = on(f"{path}.router_replay.mode")  # of the actor's engine: actor.megatron, actor.veomni
        if mode not in (None, "disabled"):
            yield f"{path}.router_replay.mode={mode}: demonstrations have no recorded routes; set it to disabled"
    found = clips(actor)
    for name, constant in CLIPS.items():
        stands_in = (
            f"{name}=null, and clip_ratio=" if actor.get(name) is None and name != "clip_ratio_c" else f"{name}="
        )
        for problem in read(Clips, {name: found[constant]}, ACTOR)[1]:
            yield problem.replace(f"{name}=", stands_in, 1)
    for name in ("entropy_coeff", *(["kl_loss_coef"] if actor.get("use_kl_loss") else [])):
        value = actor.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            yield f"{ACTOR}.{name}={shown(value)}: must be a finite number; 0 switches it off"


def _ulysses(config) -> Iterator[str]:
    """Sequence parallelism exchanges heads inside flash attention alone: with another attention each rank attends to
    its own slice, and verl says nothing (relative gradient errors up to 3.1 were measured)."""
    models = {ACTOR: "actor_rollout_ref.model", "actor_rollout_ref.ref": "actor_rollout_ref.model",
              "critic": "critic.model"}  # fmt: skip
    for path, model_path in models.items():
        node, model = _at(config, path), _at(config, model_path)
        attention = (_at(model, "override_config") or {}).get("attn_implementation", FLASH[0])
        engine = next((name for name in ("fsdp_config", "fsdp") if _at(node, name) is not None), "fsdp_config")
        for name in ("ulysses_sequence_parallel_size", f"{engine}.ulysses_sequence_parallel_size"):
            ranks, in_use = _at(node, name), path != "critic" or _at(node, "enable")
            if ranks is not None and ranks > 1 and in_use and attention not in FLASH:
                yield (
                    f"{path}.{name}={ranks} with {model_path}.override_config.attn_implementation={attention}: each "
                    f"rank would attend to its own part of a sequence only; set it to {FLASH[0]}, or the size to 1"
                )


def _at(node, path: str):
    """The value at a dotted path, None where a node on the way is absent."""
    for name in path.split("."):
        node = node.get(name) if node is not None else None
    return node


def _method(config, settings: Settings, method: Method, has_reference: bool, has_critic: bool) -> Iterator[str]:
    """Combinations of method, settings and verl's options that make no sense."""
    name, rollouts, truncated = f"method {method.name}", method.rollouts, settings.rollouts.truncated
    cut = f"hpt.rollouts.truncated={truncated}: {name}"
    correction = (config.algorithm.get("rollout_correction") or {}).get("rollout_is")
    has_log_probs = config.actor_rollout_ref.rollout.get("calculate_log_probs")
    kl_in_reward = config.algorithm.get("use_kl_in_reward")
    for where, gate in gates(settings).items():
        if method.when != "gate" and _is_set(gate):
            yield f"{where} is set, but {name} has no gate; drop it, or choose {WITH_GATE}"
    yield from _of(
        (settings.history.early_gate is not None and method.when in ("never", "always"),
         f"hpt.history.early_gate is set, but {name} has no gate (when: {method.when}) and trains on every rollout "
         f"that it gets; drop it, or choose {WITH_GATE}"),
        (truncated != "keep" and rollouts is None, f"{cut} has no term on rollouts; drop it"),
        (truncated != "keep" and method.uses_critic,
         f"{cut} takes Â from verl's critic, which is given the rewards as they are; set it to keep"),
        ("ref_log_prob" in method.needs and not has_reference,
         f"{name} needs reference log-probs on demonstrations; set {USE_REFERENCE}"),
        (method.uses_critic and not has_critic, f"{name} needs a critic; set critic.enable=True"),
        (method.uses_critic and method.place == "group",
         f"{name} takes Â from a critic, and a demonstration in the group has no value estimate"),
        ("other_log_prob" in method.needs and settings.demo.other_log_prob is None,
         f"{name} needs each demonstration's mean log-prob under other models; name its column in "
         "hpt.demo.other_log_prob"),
        (rollouts is not None and "teacher_log_prob" in rollouts.needs,
         f"{name} takes the teacher as reference on rollouts, which have none; use old or current"),
        (correction and rollouts is not None and not has_log_probs,
         f"algorithm.rollout_correction.rollout_is={correction} needs the rollout engine's log-probs, and verl skips "
         "it without a word; set actor_rollout_ref.rollout.calculate_log_probs=True, or rollout_is=null"),
        (kl_in_reward and rollouts is None,
         f"{name} trains on demonstrations only: algorithm.use_kl_in_reward=True has no effect"),
        (kl_in_reward and rollouts is not None and method.place == "group",
         f"{name} compares rollouts with demonstrations, and algorithm.use_kl_in_reward=True lowers the rollouts' "
         "rewards alone"),
    )  # fmt: skip
    imitated = method.s_estimator.needs if method.when == "own" else frozenset()
    for column in sorted(imitated & {"teacher_log_prob", "other_log_prob"}):
        yield f"{name} imitates its own rollouts too (when: own), and these have no {column}"


def _plain(value) -> object:
    """A setting as it is written."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def _is_set(gate: Gate) -> bool:
    """Whether it says when a question goes to its demonstration."""
    return gate.threshold != 0.0 or gate.count is not None or gate.function is not None


def _placed(config, settings: Settings, method: Method) -> Iterator[str]:
    """Demonstrations elsewhere than beside their question's rollouts or among them: what that place needs and ends."""
    name, place, demo = f"method {method.name}", method.place, settings.demo
    elsewhere, successes = place not in ("separate", "group"), settings.buffer.content == "successes"
    in_its_place = f"{name} has its demonstrations elsewhere (place: {place})"
    value, history = demo_coef(settings, method), settings.history
    epochs = config.actor_rollout_ref.actor.get("ppo_epochs")
    yield from _of(
        (settings.stream != Stream() and place != "stream",
         f"hpt.stream is set, but {name} has no stream; drop it, or choose chord_mu, chord_phi"),
        (settings.buffer != Buffer() and place != "buffer",
         f"hpt.buffer is set, but {name} has no buffer; drop it, or choose relift"),
        (place == "stream" and not settings.stream.files,
         f"{name} needs demonstrations beside the questions; set hpt.stream.files to parquet files in the form of the "
         "training data's"),
        (method.convex and not (value >= 0 and value <= 1),
         f"hpt.demo_coef={_plain(value)}: {name} weighs rollouts with 1 − λ, so λ must lie between 0 and 1"),
        (place == "buffer" and epochs != 1,
         f"{ACTOR}.ppo_epochs={epochs}: {name} would train its buffer so often too; set it to 1"),
        (place == "buffer" and successes and any(_is_set(gate) for gate in gates(settings).values()),
         f"hpt.gate is set, but with hpt.buffer.content=successes {name} collects of every question that is partly "
         "solved; drop it"),
        (place == "buffer" and successes and "other_log_prob" in method.needs_of_demos,
         f"hpt.buffer.content=successes: {name} needs log-probs of other models, which own rollouts do not "
         "have; set it to demonstrations"),
        (place == "buffer" and successes and "teacher_log_prob" in method.needs_of_demos,
         f"hpt.buffer.content=successes: {name} needs log-probs of a teacher, which own rollouts do not have; "
         "set it to demonstrations"),
        (elsewhere and history.retire_after is not None,
         f"hpt.history.retire_after={history.retire_after} has no effect: {in_its_place}; drop it"),
        (elsewhere and history.cooldown,
         f"hpt.history.cooldown={history.cooldown} has no effect: {in_its_place}; set it to 0"),
        (elsewhere and demo.select in ("round_robin", "unseen_first"),
         f"hpt.demo.select={demo.select} counts uses, and {in_its_place}, which has none; set first, random or "
         "shortest"),
        (elsewhere and demo.likelihood_of != "column",
         f"hpt.demo.likelihood_of={demo.likelihood_of} takes a pass in the update, and {in_its_place}; use a column"),
        (place in STARTS and demo.token_weights is not None,
         f"hpt.demo.token_weights has no effect: {in_its_place}, and its tokens have no weights of their own; drop it"),
        (elsewhere and demo.per_question > 1,
         f"hpt.demo.per_question={demo.per_question}: {in_its_place}, one a question; set it to 1"),
    )  # fmt: skip


def _starts(config, settings: Settings, method: Method) -> Iterator[str]:
    """Rollouts that start from demonstrations."""
    name, rollout = f"method {method.name}", config.actor_rollout_ref.rollout
    if method.place not in STARTS:
        if settings.start is not None:
            yield f"hpt.start is set, but {name} starts no rollout from a demonstration; drop it, or choose prefix_rft"
        return
    start, n, loop = start_of(settings, method), rollout.n, (rollout.get("agent") or {}).get("default_agent_loop")
    against_plain = method.r_estimator is not None and method.r_estimator.advantage.over_starts is not None
    if start.share is None:
        yield f"hpt.start.share=null: {name} has none of its own; set how much of a demonstration rollouts start from"
    if isinstance(start.share, list) and len(start.share) != n:
        yield (
            f"hpt.start.share={start.share}: must have a number for each rollout, actor_rollout_ref.rollout.n={n}; it "
            f"has {len(start.share)}"
        )
    elif isinstance(start.share, list) and settings.start is not None and settings.start.rollouts is not None:
        yield (
            f"hpt.start.rollouts={settings.start.rollouts} has no effect: hpt.start.share has a number for each "
            "rollout; drop it"
        )
    many = start.rollouts if not isinstance(start.share, list) else sum(share > 0 for share in start.share)
    yield from _of(
        (loop not in (None, "single_turn_agent"),
         f"actor_rollout_ref.rollout.agent.default_agent_loop={loop}: {name} brings an agent loop of its own, of one "
         "turn; set it to single_turn_agent"),
        (rollout.get("name") == "trtllm",
         "actor_rollout_ref.rollout.name=trtllm does not read how many tokens a rollout has left, and "
         f"{name} needs it; set vllm or sglang"),
        (against_plain and (many == "all" or many >= n),
         f"hpt.start.rollouts={many}: {name} compares started rollouts with others, and of actor_rollout_ref.rollout.n="
         f"{n} none is left; set fewer"),
        (many == "all" and isinstance(start.share, Adapted),
         f"hpt.start.rollouts=all: the length of {name} follows the solve rate of rollouts that start from nothing; "
         "set fewer"),
        (many != "all" and not against_plain and many > n,
         f"hpt.start.rollouts={many}: actor_rollout_ref.rollout.n is {n}; set fewer"),
        (many == "all" and start.after_failures,
         f"hpt.start.after_failures={start.after_failures} with hpt.start.rollouts=all: no rollout would say when the "
         "question is solved without help; leave one out"),
        (method.place == "prefix" and start.template != PLAIN.template,
         f"hpt.start.template is set, but {name} gives no hint in the prompt; drop it"),
        (method.place == "hint" and isinstance(start.share, Adapted),
         f"hpt.start.share={_plain(start.share)}: a hint is a share of a text, not a number of tokens; set a number"),
        (config.algorithm.get("use_kl_in_reward") and method.place == "prefix" and method.term("R") is not None,
         f"{name} rewards tokens of prefixes, and algorithm.use_kl_in_reward=True has their KL left out; set it to "
         "False"),
        (method.rescored and (config.algorithm.get("rollout_correction") or {}).get("rollout_is"),
         f"algorithm.rollout_correction.rollout_is: {name} trains hinted rollouts on another prompt than they were "
         "sampled with, and their weights are of that one; set it to null"),
        (method.rescored and method.uses_critic,
         f"{name} trains rollouts on another prompt than they had, and a critic valued them with it"),
    )  # fmt: skip


def _demo(settings: Settings, method: Method, has_reference: bool) -> Iterator[str]:
    """Columns of demonstrations that a method lacks, or that nothing reads."""
    demo, name, needs = settings.demo, f"method {method.name}", method.needs_of_demos
    of, by_likelihood = f"likelihood_of={demo.likelihood_of}", demo.select == "likelihood"
    unread = "is set, but nothing in " + name + " reads it"
    return _of(
        ("teacher_log_prob" in needs and demo.teacher_log_prob is None,
         f"{name} needs the log-probs of the model that wrote a demonstration; name their column in "
         "hpt.demo.teacher_log_prob"),
        (demo.teacher_log_prob is not None and "teacher_log_prob" not in needs,
         f"hpt.demo.teacher_log_prob {unread}; compose one with reference: teacher, or drop it"),
        (demo.other_log_prob is not None and "other_log_prob" not in needs,
         f"hpt.demo.other_log_prob {unread}; poft does; drop it"),
        (demo.log_likelihood is not None and not (by_likelihood and demo.likelihood_of == "column"),
         f"hpt.demo.log_likelihood is set, but select={demo.select} and {of} does not read it; set select=likelihood "
         "and likelihood_of=column, or drop it"),
        (demo.likelihood_of != "column" and not by_likelihood,
         f"hpt.demo.{of} has no effect: set hpt.demo.select=likelihood, or drop it"),
        (by_likelihood and demo.likelihood_of == "reference" and not has_reference,
         f"hpt.demo.{of} needs verl's reference model; set {USE_REFERENCE}, or use policy, or a column"),
    ) if method.demos else iter(())  # fmt: skip
