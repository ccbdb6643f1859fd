"""Fused attention for transformers' T5, which has none, so that PEFT is compared at its best.

Relative position biases and the mask become the additive mask of torch's
`scaled_dot_product_attention`. Only for training: no cache, no head masks, no dropout.
"""

from __future__ import annotations

import types
from typing import Any


def fuse_attention(model: Any) -> None:
    """Fuses the attention of every layer of a `T5ForConditionalGeneration`, in place."""
    from transformers.models.t5.modeling_t5 import T5Attention

    for module in model.modules():
        if isinstance(module, T5Attention):
            module.forward = types.MethodType(_attend, module)


def _attend(  # noqa: PLR0913 - the arguments of the method that it replaces
    self: Any,
    hidden_states: Any,
    mask: Any = None,
    key_value_states: Any = None,
    position_bias: Any = None,
    past_key_values: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **unused: Any,
) -> tuple[Any, Any]:
    import torch

    if use_cache or output_attentions or past_key_values is not None:
        raise ValueError(
            "Fused attention has no cache and no attention weights. Use it only for training."
        )
    source = hidden_states if key_value_states is None else key_value_states
    split = lambda x: x.unflatten(-1, (self.n_heads, self.key_value_proj_dim)).transpose(1, 2)  # noqa: E731
    queries, keys, values = (
        split(self.q(hidden_states)),
        split(self.k(source)),
        split(self.v(source)),
    )
    if position_bias is None:
        shape = queries.shape[-2], keys.shape[-2]
        if self.has_relative_attention_bias:
            cache_position = torch.arange(shape[0], device=queries.device)
            position_bias = self.compute_bias(
                *shape, device=queries.device, cache_position=cache_position
            )
        else:
            position_bias = queries.new_zeros((1, self.n_heads, *shape))
        if mask is not None:
            position_bias = position_bias + mask[..., : shape[1]]
    # T5's weights include the division by the square root of the head width.
    attended = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=position_bias.to(queries.dtype), scale=1.0
    )
    return self.o(attended.transpose(1, 2).flatten(-2)), position_bias
