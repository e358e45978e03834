"""What a run does, and what it takes from verl's config, in a few lines at its start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from verl_hpt import __version__, config
from verl_hpt.host import refusals
from verl_hpt.places.starts import in_words

if TYPE_CHECKING:
    from verl_hpt.host.run import Run


def banner(run: Run, verl: str, fused: bool) -> str:
    """What this run does, and what is taken from verl's config, in a few lines."""
    actor, gate = run.verl_config.actor_rollout_ref.actor, run.settings.gate
    switch = f"solved ≤ {gate.count}" if gate.count is not None else f"solved ≤ {_shown(gate.threshold)}·n"
    if gate.function is not None:
        arguments = ", ".join(f"{name}={value}" for name, value in gate.kwargs.items())
        switch = f"{gate.function}({arguments})" if arguments else gate.function
    algorithm = run.verl_config.algorithm
    reached = "score" if gate.metric is None else gate.metric
    finished = " and not cut at the length limit" if gate.finished else ""
    when = {"gate": f"where {switch} ({reached} ≥ {gate.success}{finished})", "never": "never"}.get(
        run.method.when, run.method.when
    )
    if run.method.place == "buffer" and not run.reads_demos:
        when = "the first of each question that is partly solved"
    clip = config.clips(actor)
    kl, off = actor.kl_loss_coef if actor.use_kl_loss else "off", "off (no rollouts)"
    entropy, kl = (actor.entropy_coeff, kl) if run.method.rollouts is not None else (off, off)
    lines = [
        f"verl-hpt {__version__} on verl {verl}: method {run.method.name}, {run.method.formula}",
        f"  demonstrations: {_where_from(run)}, {when}, λ = {_shown(run.beside.coef)}",
        f"  normalization: {run.normalization} (L = {run.length_scale:g}); actor.loss_agg_mode="
        f"{actor.get('loss_agg_mode')} and norm_adv_by_std_in_grpo={algorithm.get('norm_adv_by_std_in_grpo')} "
        "are not read",
        f"  from verl: clip {clip['clip_low']}/{clip['clip_high']}/c={clip['clip_c']}, entropy_coeff={entropy}, "
        f"KL loss {kl}, {actor.ppo_mini_batch_size} questions an optimizer step, ppo_epochs={actor.ppo_epochs}",
    ]
    lines += [f"  {line}" for line in _placed(run)]
    temperature = run.verl_config.actor_rollout_ref.rollout.temperature
    if temperature != 1.0 and fused and run.method.demos:
        lines.append(
            f"  note: fused kernels take one temperature a batch, so demonstrations are scored at T = {temperature}"
        )
    mode = run.verl_config.trainer.v1.trainer_mode
    corrected = (algorithm.get("rollout_correction") or {}).get("rollout_is")
    if mode != "sync" and run.method.rollouts is not None and not corrected:
        lines.append(
            f"  note: trainer_mode={mode} trains on rollouts of older weights; algorithm.rollout_correction.rollout_is="
            "token (with calculate_log_probs) weighs them, demonstrations have the weight 1"
        )
    if mode != "sync" and run.settings.history.early_gate is not None:
        lines.append(
            f"  note: the early gate decides as a question is drawn; in trainer_mode={mode} its history is steps old"
        )
    if run.settings.rollouts.truncated != "keep":
        lines.append(f"  rollouts cut at the length limit: {run.settings.rollouts.truncated}")
    if run.method.place == "group" and run.settings.demo.reward is None:
        lines.append(
            "  a demonstration's reward in its group: the largest of hpt.gate.success and the group's best (set "
            "hpt.demo.reward to a number or a column for another)"
        )
    compared = f"the gate compares {reached} with {gate.success:g}"
    shaped = [f"{option}: {meaning}; {compared}" for option, meaning in refusals.shaped_rewards(run.verl_config)]
    weight = "WARNING" if gate.metric is None else "note"
    lines += [f"  {weight}: {text}" for text in shaped if run.method.when not in ("never", "always")]
    if run.method.name == "gspo" and clip["clip_high"] > 0.01:
        lines.append("  note: GSPO's paper clips at 3e-4/4e-4; set actor.clip_ratio_low/high")
    for label, text in (("unverified", run.method.unverified), ("approximate", run.method.approximate)):
        if text:
            lines.append(f"  {label}: {text}")
    return "\n".join(lines)


def _where_from(run: Run) -> str:
    if run.method.place == "buffer" and not run.reads_demos:
        return "own solved rollouts"
    column = f"column {run.settings.demo.key!r}"
    return f"{column} of {run.settings.stream.files}" if run.method.place == "stream" else column


def _placed(run: Run) -> Iterator[str]:
    """For the banner: where demonstrations stand, if not beside the rollouts of their question or among them."""
    method, buffer, n = run.method, run.settings.buffer, run.verl_config.actor_rollout_ref.rollout.n
    kinds = " and ".join(sorted(term.kind for term in method.demos)) or "frozen"
    temperature = run.verl_config.actor_rollout_ref.rollout.temperature
    if method.place == "prefix":
        yield f"starts: {in_words(run.beside.start, n)}; its tokens: {kinds}. The gate and solve rates count others"
        if method.term("S") is not None and temperature != 1.0:
            yield f"note: tokens of a prefix are scored at the rollouts' temperature, T = {temperature}"
    if method.place == "hint":
        trained = "on the prompt without it" if method.rescored else "with it"
        yield f"hints: {in_words(run.beside.start, n)} in the prompt; trained {trained}"
    if method.place == "stream":
        weights = ", rollouts weigh 1 − λ" if method.convex else ""
        yield f"stream: {run.settings.stream.batch} demonstrations a step beside the questions{weights}"
    if method.place == "buffer":
        yield (
            f"buffer: {buffer.content}; {buffer.size} make an optimizer step of their own. Adam scales each step's "
            "gradient, so λ does next to nothing there"
        )


def _shown(value) -> str:
    """A number, or a schedule in a few words."""
    if isinstance(value, config.Steered):
        return f"{value.start:g}, steered towards an entropy of {value.target:g} nats"
    if not isinstance(value, config.Schedule):
        return f"{value:g}"
    warmup = f" after {value.warmup} of warm-up" if value.warmup else ""
    return f"{value.start:g} → {value.end:g} ({value.shape}, {value.steps} steps{warmup})"
