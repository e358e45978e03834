"""The loss on what models of lower precision say: computed in float32, its gradient finite and the same."""

import numpy as np
import pytest
import torch
from engine.batches import announce, contents, model_output, random_case, row_batch, whole
from verl.trainer.ppo.core_algos import kl_penalty

from verl_hpt.gate import GateSettings
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.loss import ROW_FIELD, LossSpec
from verl_hpt.methods import METHODS
from verl_hpt.plan import PlanSettings, plan

GROUPS = [([1, 0, 0], 1), ([0, 0, 0], 2), ([1, 1, 0], 1), ([0, 0], 1)]
ROUNDING = 2**-8  # of bfloat16: half of its last place, relative
FIELDS = ("response_mask", "old_log_probs", "ref_log_prob", ROW_FIELD)


class Step:
    """One optimizer step; what models said of it, rounded to bfloat16 and kept in ``dtype``."""

    def __init__(self, method: str, spread: float = 1.0):
        self.method = METHODS[method]
        case = random_case(3, GROUPS)
        settings = PlanSettings(
            self.method, self.method.normalization, 24.0, 0.3, GateSettings(), questions_per_step=9, rows_multiple=13
        )
        made = plan(case.questions, settings)
        draw = np.random.default_rng(3)
        rows = contents(case, made, made.layout)
        new = [[min(x + draw.normal(0, spread), -0.01) for x in row.old] for row in rows]
        self.batch = row_batch(case, made, made.layout, torch.bfloat16, ref=True)
        self.log_probs = whole(rows, new, torch.bfloat16)
        self.entropy = torch.tensor(draw.uniform(0, 2, len(self.log_probs)), dtype=torch.bfloat16)

    def loss(self, dtype: torch.dtype, **settings) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss; its gradients on log-probs and entropies."""
        batch = self.batch.clone()
        for name in ("old_log_probs", "ref_log_prob"):
            batch[name] = batch[name].to(dtype)
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (self.log_probs, self.entropy)]
        spec = LossSpec(self.method, fields=FIELDS, kl_penalty=kl_penalty, **settings)
        loss, sent = hpt_loss(model_output(batch, *leaves), announce(batch), spec=spec)
        loss.backward()
        assert all(np.isfinite(metric.aggregate()) for metric in sent.values())
        return loss, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"ppo"}))
def test_bfloat16_is_computed_in_float32_and_the_gradient_is_the_same(method):
    step = Step(method)
    settings = {"entropy_coeff": 0.01, "kl_coef": 0.1} if step.method.rollouts is not None else {}
    low, (of_low, entropy_low) = step.loss(torch.bfloat16, **settings)
    full, (of_full, entropy_full) = step.loss(torch.float32, **settings)
    assert low.dtype == full.dtype == torch.float32 and of_low.dtype == torch.bfloat16
    assert low.item() == pytest.approx(full.item(), rel=1e-6), "the same inputs, the same arithmetic"
    assert of_full.abs().max() > 0 and of_low.isfinite().all()
    assert of_low.float() == pytest.approx(of_full, rel=ROUNDING, abs=1e-12)
    assert entropy_low.float() == pytest.approx(entropy_full, rel=ROUNDING, abs=1e-12)
    assert bool(settings) == bool(entropy_full.abs().max() > 0)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"ppo"}))
def test_the_gradient_is_finite_where_models_disagree_beyond_reason(method):
    """Log-probs 40 nats apart, as where a model has collapsed: ratios overflow in bfloat16's place, not in the loss."""
    step = Step(method, spread=40.0)
    loss, (gradient, _) = step.loss(torch.bfloat16)
    assert loss.isfinite() and gradient.isfinite().all()


def test_float64_stays_float64():
    loss, (gradient, _) = Step("hpt").loss(torch.float64)
    assert loss.dtype == gradient.dtype == torch.float64
