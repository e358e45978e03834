"""Attention for verl's Ulysses on a CPU: verl's own exchange of heads, torch's SDPA where flash attention would be."""

from __future__ import annotations

from torch.nn.functional import scaled_dot_product_attention

NAME = "ulysses_sdpa"


def install() -> None:
    """Register it with transformers; verl's exchange then finds an attention behind its own name for flash's."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from verl.models.transformers import monkey_patch

    def packed(q, k, v, attention_mask, query_length, *args, position_ids=None, softmax_scale=None, **kwargs):
        """(1, tokens, heads, size); a sequence begins where its position is 0, and a token sees its own alone."""
        sequence = (position_ids[0] == 0).cumsum(0)
        seen = (sequence[:, None] == sequence[None, :]).tril()[None, None]
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    def attention(module, q, k, v, attention_mask, scaling=None, dropout=0.0, position_ids=None, **kwargs):
        tokens_first = (x.transpose(1, 2) for x in (q, k, v))
        exchange = monkey_patch._ulysses_flash_attention_forward
        return exchange(*tokens_first, None, q.shape[2], position_ids=position_ids, softmax_scale=scaling), None

    monkey_patch._flash_attention_forward = packed
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
