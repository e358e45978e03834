"""Our loss against verl's own losses, on the same tensors, in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from engine.batches import (
    announce,
    contents,
    jagged,
    learning_tokens,
    model_output,
    random_case,
    row_batch,
    whole,
)
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, kl_penalty
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss, sft_loss

from verl_hpt.gate import GateSettings
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.loss import ROW_FIELD, LossSpec
from verl_hpt.methods import METHODS
from verl_hpt.parts import Constants
from verl_hpt.plan import DEMO, PADDING, PlanSettings

LENGTH_SCALE = 24.0
# Groups of one size: verl divides by rows, the table by questions and then by their rows.
GROUPS = [
    ([1, 0, 0, 0], 1),
    ([0, 0, 0, 0], 1),
    ([1, 1, 0, 1], 1),
    ([1, 1, 1, 1], 1),
    ([0, 0.5, 0, 1], 1),
    ([0, 1, 1, 0], 1),
]
# The same where a method's demonstrations stand elsewhere: tokens of a prefix; streams and buffers beside.
PREFIXES = [(0, 0, 2, 7), (3, 3, 0, 0), (5, 0, 5, 4), (1, 0, 0, 0), (0, 0, 0, 0), (2, 3, 4, 5)]
NEVER, ALWAYS = GateSettings(threshold=-1.0), GateSettings(threshold=1.0)


class Step:
    """One optimizer step: the plan's rows, the model's log-probs as a leaf, entropies."""

    def __init__(self, method, normalization, gate=NEVER, seed=0, spread=1.8):
        self.method = METHODS[method]
        place, demo_coef = self.method.place, 0.5 if self.method.convex else 1.0
        started = [(*group, own) for group, own in zip(GROUPS, PREFIXES, strict=True)]
        self.case = random_case(
            seed,
            started if place == "prefix" else GROUPS,
            stream=3 * (place == "stream"),
            buffer=3 * (place == "buffer"),
        )
        self.plan = self.case.planned(
            PlanSettings(
                self.method, normalization, LENGTH_SCALE, demo_coef, gate, questions_per_step=99, rows_multiple=11
            )
        )
        self.layout = self.plan.layout
        assert (self.layout == PADDING).any()
        self.rows = contents(self.case, self.plan, self.layout)
        self.batch = announce(row_batch(self.case, self.plan, self.layout, torch.float64, ref=True))
        draw = np.random.default_rng(seed)
        new = [[x + y for x, y in zip(row.old, draw.normal(0, spread, len(row.old)), strict=True)] for row in self.rows]
        self.leaf = whole(self.rows, new, torch.float64).requires_grad_()
        self.entropy = torch.tensor(draw.uniform(0, 2, len(self.leaf)), requires_grad=True)

    def __len__(self):
        return int((self.layout != PADDING).sum())

    def ours(self, dp_size=1, clip=(0.2, 0.2), entropy_coeff=0.0, **settings):
        """Loss, gradient on the log-probs, gradient on the entropies."""
        ref = "kl_coef" in settings or "ref_log_prob" in self.method.needs
        fields = ("response_mask", "old_log_probs", ROW_FIELD, *(["ref_log_prob"] if ref else []))
        constants = Constants(clip_low=clip[0], clip_high=clip[1])
        spec = LossSpec(self.method, constants, fields, entropy_coeff, kl_penalty=kl_penalty, **settings)
        return self._gradients(lambda output: hpt_loss(output, announce(self.batch, dp_size=dp_size), spec=spec))

    def verls(self, estimator_std, mode, loss_mode="vanilla", clip=(0.2, 0.2), dp_size=1, **settings):
        """The same of verl's ``ppo_loss``, with the advantages of verl's own estimator."""
        config = ActorConfig(
            strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode,
            policy_loss=PolicyLossConfig(loss_mode=loss_mode), clip_ratio_low=clip[0], clip_ratio_high=clip[1],
            loss_scale_factor=LENGTH_SCALE if mode.endswith("norm") else None, **settings,
        )  # fmt: skip
        data = announce(self.batch.clone(), dp_size=dp_size, rows=len(self))
        advantages = self.advantages(estimator_std)
        data["advantages"] = jagged(
            [
                torch.full((len(row.answer),), a, dtype=torch.float64)
                for row, a in zip(self.rows, advantages, strict=True)
            ]
        )
        if not config.use_kl_loss:
            del data["ref_log_prob"]
        return self._gradients(lambda output: ppo_loss(config, output, data))

    def advantages(self, std):
        rewards = np.append(self.plan.reward, 0.0)[self.layout]
        question = np.append(self.plan.question, -1)[self.layout]
        score = torch.tensor(rewards)[:, None]
        advantage, _ = get_adv_estimator_fn("grpo")(
            score, torch.ones_like(score), question.astype(str).astype(object), norm_adv_by_std_in_grpo=std
        )
        return np.where(self.layout == PADDING, 0.0, advantage[:, 0].numpy())

    def _gradients(self, loss_of):
        self.leaf.grad = self.entropy.grad = None
        loss, _ = loss_of(model_output(self.batch, self.leaf, self.entropy))
        loss.backward()
        entropy = torch.zeros_like(self.entropy) if self.entropy.grad is None else self.entropy.grad
        return loss.item(), self.leaf.grad.clone(), entropy.clone()

    def branches(self, clip):
        """Which clip branches fire on how many tokens: up, down, dual."""
        advantage = torch.tensor(np.repeat(self.advantages(False), [len(row.answer) for row in self.rows]))
        output = model_output(self.batch, self.leaf.detach())["log_probs"]
        new = torch.cat([x[len(r.prompt) - 1 : -1] for x, r in zip(output.unbind(), self.rows, strict=True)])
        ratio = (new - self.batch["old_log_probs"].values()).exp()
        mask = self.batch["response_mask"].values().bool()
        fired = (
            (advantage > 0) & (ratio > 1 + clip),
            (advantage < 0) & (ratio < 1 - clip),
            (advantage < 0) & (ratio > 3),
        )
        return [int((x & mask).sum()) for x in fired]


def close(ours, theirs, value=True, tolerance=1e-6):
    """Loss, and each gradient relative to its largest entry; the advantage travels in float32."""
    if value:
        assert ours[0] == pytest.approx(theirs[0], rel=tolerance, abs=tolerance)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        size = other.abs().max().item()
        assert (mine - other).abs().max().item() <= tolerance * size
    assert theirs[1].abs().max() > 0


# --- the gate never fires: verl's own losses ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["hpt", "dr_grpo"])
def test_gate_that_never_fires_equals_verls_ppo_loss(method, seed):
    """`question` is (1/Q)(1/n)(1/L), which over groups of one size is verl's seq-mean over Q·n rows over L."""
    step = Step(method, "question", seed=seed)
    assert min(step.branches(0.2)) > 0
    close(step.ours(), step.verls(False, "seq-mean-token-sum-norm"))


@pytest.mark.parametrize("kl_type", ["kl", "abs", "mse", "low_var_kl"])
def test_entropy_bonus_and_kl_loss_equal_verls(kl_type):
    step = Step("hpt", "question")
    ours = step.ours(entropy_coeff=0.3, kl_coef=0.2, kl_type=kl_type)
    theirs = step.verls(
        False, "seq-mean-token-sum-norm", entropy_coeff=0.3, use_kl_loss=True, kl_loss_coef=0.2, kl_loss_type=kl_type
    )
    close(ours, theirs)
    assert theirs[2].abs().max() > 0


def test_rank_scaling_equals_verls():
    step = Step("hpt", "question")
    close(step.ours(dp_size=4), step.verls(False, "seq-mean-token-sum-norm", dp_size=4))


@pytest.mark.parametrize(
    ("method", "loss_mode", "normalization", "mode", "clip"),
    [
        ("grpo", "vanilla", "sequence", "seq-mean-token-mean", (0.2, 0.2)),
        ("grpo", "vanilla", "token", "token-mean", (0.1, 0.28)),
        ("grpo", "vanilla", "question", "seq-mean-token-sum-norm", (0.2, 0.28)),
        ("cispo", "cispo", "token", "token-mean", (0.2, 0.28)),
        ("cispo", "cispo", "sequence", "seq-mean-token-mean", (0.2, 0.2)),
        ("gspo", "gspo", "sequence", "seq-mean-token-mean", (0.2, 0.2)),
        ("gspo", "gspo", "token", "token-mean", (3e-4, 4e-4)),
    ],
)
def test_rollout_methods_equal_verls_registered_losses(method, loss_mode, normalization, mode, clip):
    """The value too, but for CISPO: verl shows sg(clip(r))·Â·log π, we the surrogate clip(r)·Â, of one gradient."""
    step = Step(method, normalization)
    close(step.ours(clip=clip), step.verls(True, mode, loss_mode, clip), value=method != "cispo")


# --- the gate always fires: verl's SFT loss -------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "gate"), [("hpt", ALWAYS), ("sft", NEVER)])
def test_gate_that_always_fires_equals_verls_sft_loss(method, gate):
    step = Step(method, "token", gate)
    assert (step.plan.kind == DEMO).all()
    data = announce(step.batch.clone(), dp_size=2)
    data["loss_mask"] = jagged([torch.tensor([0] * len(row.prompt) + row.mask) for row in step.rows])  # as SFT has it
    theirs = step._gradients(lambda output: sft_loss(None, output, data))
    close(step.ours(dp_size=2), theirs)


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
def test_micro_batch_without_an_active_token_gives_a_zero_on_the_graph(method):
    step = Step(method, "question")
    padding = np.full(2, PADDING)
    batch = announce(row_batch(step.case, step.plan, padding, torch.float64, ref=True), dp_size=2)
    leaf = torch.full((4,), -0.5, dtype=torch.float64, requires_grad=True)
    entropy = torch.ones(4, dtype=torch.float64, requires_grad=True)
    fields = ("response_mask", "old_log_probs", ROW_FIELD, "ref_log_prob")
    spec = LossSpec(step.method, fields=fields, entropy_coeff=0.1, kl_coef=0.1, kl_penalty=kl_penalty)
    loss, metrics = hpt_loss(model_output(batch, leaf, entropy), batch, spec=spec)
    loss.backward()
    assert loss.item() == 0.0
    assert leaf.grad is not None and leaf.grad.abs().max() == 0.0
    assert all(metric.aggregate() == 0.0 for metric in metrics.values())


def test_every_micro_batch_sends_the_same_metrics():
    """verl cannot aggregate keys that some ranks do not have."""
    step = Step("hpt", "question", GateSettings(threshold=0.3))
    spec = LossSpec(step.method)
    sent = []
    for layout in (np.flatnonzero(step.plan.kind == DEMO), np.flatnonzero(step.plan.kind != DEMO), np.full(1, PADDING)):
        batch = announce(row_batch(step.case, step.plan, layout, torch.float64))
        tokens = batch["input_ids"].values().numel()
        leaf = torch.full((tokens,), -0.5, dtype=torch.float64, requires_grad=True)
        sent.append(set(hpt_loss(model_output(batch, leaf), batch, spec=spec)[1]))
    assert sent[0] == sent[1] == sent[2]


@pytest.mark.parametrize("name", ["response_mask", "old_log_probs", ROW_FIELD, "ref_log_prob"])
def test_a_missing_field_is_named(name):
    step = Step("hpt", "question")
    del step.batch[name]
    with pytest.raises(KeyError, match=name):
        step.ours(kl_coef=0.1)


def test_missing_entropies_are_named():
    step = Step("srft", "question")
    spec = LossSpec(step.method)
    with pytest.raises(KeyError, match="entropy"):
        hpt_loss(model_output(step.batch, step.leaf), step.batch, spec=spec)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -300.0])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_garbage_off_the_mask_cannot_leak(method, garbage):
    """Padding rows, prompts and masked tokens: whatever stands there, loss and gradient stay what they were."""
    step = Step(method, "question", GateSettings(threshold=0.3), spread=0.3)
    settings = {"entropy_coeff": 0.1, "kl_coef": 0.1} if step.method.rollouts is not None else {"kl_coef": 0.0}
    clean = step.ours(**settings)
    assert np.isfinite(clean[0]) and clean[1].isfinite().all() and clean[1].abs().max() > 1e-6
    learning = learning_tokens(step.case, step.plan, step.layout)
    off = ~torch.tensor([bool(x) for row in learning for x in row])
    assert off.any()
    keep = whole(step.rows, learning, torch.float64, blank=0.0) > 0
    with torch.no_grad():
        step.leaf[~keep] = garbage
        step.entropy[~keep] = garbage
    for name in ("old_log_probs", "ref_log_prob"):
        step.batch[name].values()[off] = garbage
    dirty = step.ours(**settings)
    assert dirty[0] == pytest.approx(clean[0], rel=1e-12, abs=1e-12)
    for mine, other in zip(dirty[1:], clean[1:], strict=True):
        assert mine[~keep].abs().max() == 0.0
        assert torch.allclose(mine[keep], other[keep], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("log_prob", [-30.0, -120.0, -1000.0])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_improbable_tokens_give_a_finite_gradient(method, log_prob):
    """Probabilities that are 0 in float32."""
    step = Step(method, "question", GateSettings(threshold=0.3))
    step.batch = announce(row_batch(step.case, step.plan, step.layout, torch.float32, ref=True))
    step.leaf = torch.full_like(step.leaf, log_prob, dtype=torch.float32).requires_grad_()
    step.entropy = step.entropy.detach().float().requires_grad_()
    loss, gradient, _ = step.ours()
    assert np.isfinite(loss) and gradient.isfinite().all()


def test_spec_holds_plain_values_that_reach_the_worker():
    """verl pickles the loss function to every worker."""
    import pickle

    spec = LossSpec(METHODS["hpt"], kl_penalty=kl_penalty)
    assert dataclasses.astuple(pickle.loads(pickle.dumps(spec)))[3:] == dataclasses.astuple(spec)[3:]
