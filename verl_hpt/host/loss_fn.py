"""verl's protocol around the loss: ``actor_rollout_wg.set_loss_fn(partial(hpt_loss, spec=...))``.

The worker scales by ``dp_size`` on every engine: FSDP averages gradients over ranks, Megatron's engine applies its own
micro-batch scaling.
"""

from __future__ import annotations

import torch
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from verl_hpt.loss import ROW_COLUMNS, ROW_FIELD, LossSpec, loss_of
from verl_hpt.metrics import sums_of


def hpt_loss(model_output, data, dp_group=None, *, spec: LossSpec):
    """verl's loss function protocol. Returns the loss, a scalar on the graph, and metrics as sums.

    Raises:
        KeyError: a promised field is absent; names it.
    """
    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    entropy = model_output.get("entropy")
    wanted = "entropy" in spec.method.needs or spec.entropy_coeff != 0
    present = set(data.keys())
    missing = [name for name in spec.fields if name not in present]
    if missing or (wanted and entropy is None):
        missing += ["entropy"] if wanted and entropy is None else []
        raise KeyError(f"the actor update lacks the field(s) {', '.join(missing)}; it has {', '.join(sorted(present))}")
    log_prob = log_prob if log_prob.dtype == torch.float64 else log_prob.float()
    entropy = None if entropy is None or not wanted else no_padding_2_padding(entropy, data).to(log_prob.dtype)

    of_row = data[ROW_FIELD]
    of_row = (of_row.values() if of_row.is_nested else of_row).reshape(len(data), len(ROW_COLUMNS), 1)
    column = dict(zip(ROW_COLUMNS, of_row.to(log_prob.dtype).unbind(1), strict=True))
    rows = data.select(*(name for name in spec.fields if name != ROW_FIELD)).to_padded_tensor()
    mask, scale = rows.pop("response_mask").bool(), float(data["dp_size"])
    loss, sums = loss_of(log_prob, entropy, mask, column, rows, spec, sums_of)
    return loss * scale, {f"hpt/{n}": Metric(AggregationType.SUM, scale * x) for n, x in sums.items()}
