"""T5 hyperparameters, and the sizes of the published models."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
from etils import epath

from mpt_jax.backbones.t5 import hf_config
from mpt_jax.backbones.t5.activations import ACTIVATIONS

# Fields that give sizes.
SIZES = (
    "vocab_size",
    "emb_dim",
    "num_heads",
    "num_encoder_layers",
    "num_decoder_layers",
    "head_dim",
    "mlp_dim",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
REMAT_POLICIES = ("none", "minimal", "full")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Hyperparameters of a T5 model; the field names are T5X's.

    Attributes:
        vocab_size: the number of rows V of the token embedding, including rows without a token.
        dtype: the dtype of activations, `float32` or `bfloat16`, given as a dtype or its name.
            Softmax, layer-norm statistics and logits are always float32.
        emb_dim: the model width H.
        num_heads: the number of attention heads N.
        num_encoder_layers: the number of encoder layers.
        num_decoder_layers: the number of decoder layers.
        head_dim: the width D of one head; N*D need not be H.
        mlp_dim: the feed-forward width F.
        mlp_activations: the activation of each input projection; their outputs are multiplied.
            `('relu',)` is T5 1.0, `('gelu', 'linear')` is T5 1.1.
        dropout_rate: the dropout rate, applied only in calls with `deterministic=False`.
        logits_via_embedding: whether the logits are computed with the token embedding, scaled by
            H^-0.5 (T5 1.0), or with a separate output projection (T5 1.1).
        float32_attention_logits: whether query-key products are returned in float32 rather than
            rounded to `dtype`.
        fused_attention: whether to use attention kernels that keep scores in on-chip memory (see
            `fused_attention.py`). None uses them only on TPUs. On other backends, True runs them in
            interpreted mode, for tests.
        fused_mlp: whether to use a kernel that keeps the inner products of a gated feed-forward
            block in on-chip memory (see `fused_mlp.py`). None uses it only on v5e and v6e. On other
            backends than TPUs, True runs it in interpreted mode, for tests.
        relative_attention_num_buckets: the number of buckets in the relative position table.
        relative_attention_max_distance: the distance from which on all positions share one bucket.
        relative_bias_per_layer: whether every layer has a separate relative position table (umT5,
            T5X's scalable T5) instead of one for the whole stack (T5).
        biases: whether to add a zero-initialized bias to every projection, every layer norm and the
            logits. T5 has no biases; BitFit trains these.
        remat: what the backward pass recomputes: `none`, `minimal` (everything except products with
            weights) or `full` (whole layers). On CPUs it saves memory only together with
            `scan_layers`; otherwise XLA merges the recomputation with the original computation.
        scan_layers: whether to run the layers as one loop over stacked weights (see
            `scanned_params.py`), so that compile time does not grow with depth.

    Raises:
        ValueError: a size is not a positive integer, or a dtype, activation, remat policy or
            dropout rate is not supported.
    """

    vocab_size: int
    dtype: Any = "float32"
    emb_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: tuple[str, ...] = ("relu",)
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False
    fused_attention: bool | None = None
    fused_mlp: bool | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_bias_per_layer: bool = False
    biases: bool = False
    remat: str = "none"
    scan_layers: bool = False

    def __post_init__(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**31:
                raise ValueError(
                    f"T5Config.{name} must be an integer of at least 1, got {size!r:.80}. Correct "
                    "the configuration of the model."
                )
        dtype = jnp.dtype(self.dtype)
        if dtype == jnp.float16:
            raise ValueError(
                "T5Config.dtype=float16 is not supported, because T5's activations overflow "
                "float16. Use 'bfloat16' or 'float32'."
            )
        if dtype not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
            raise ValueError(
                f"T5Config.dtype={self.dtype!r} is not supported. Use 'float32' or 'bfloat16'."
            )
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in self.mlp_activations:
            if name not in ACTIVATIONS:
                raise ValueError(
                    f"T5Config.mlp_activations has the unknown activation {name!r}. Use only "
                    f"{', '.join(map(repr, ACTIVATIONS))}."
                )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"T5Config.remat must be {', '.join(map(repr, REMAT_POLICIES[:-1]))} or "
                f"{REMAT_POLICIES[-1]!r}, got {self.remat!r}."
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"T5Config.dropout_rate must be in [0, 1), got {self.dropout_rate}.")


# Size -> (H, N, encoder layers, decoder layers, D, F), as published with each model.
_T5_1_0 = {
    "small": (512, 8, 6, 6, 64, 2048),
    "base": (768, 12, 12, 12, 64, 3072),
    "large": (1024, 16, 24, 24, 64, 4096),
    "3b": (1024, 32, 24, 24, 128, 16384),
    "11b": (1024, 128, 24, 24, 128, 65536),
}
_T5_1_1 = {
    "small": (512, 6, 8, 8, 64, 1024),
    "base": (768, 12, 12, 12, 64, 2048),
    "large": (1024, 16, 24, 24, 64, 2816),
    "xl": (2048, 32, 24, 24, 64, 5120),
    "xxl": (4096, 64, 24, 24, 64, 10240),
}
_BYT5 = {
    "small": (1472, 6, 12, 4, 64, 3584),
    "base": (1536, 12, 18, 6, 64, 3968),
    "large": (1536, 16, 36, 12, 64, 3840),
    "xl": (2560, 32, 36, 12, 64, 6720),
    "xxl": (4672, 64, 36, 12, 64, 12352),
}
_GATED: dict[str, Any] = {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False}
_PLAIN: dict[str, Any] = {"mlp_activations": ("relu",), "logits_via_embedding": True}
_FAMILIES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "t5_1_0": (_T5_1_0, {"vocab_size": 32128, **_PLAIN}),
    "t5_1_1": (_T5_1_1, {"vocab_size": 32128, **_GATED}),
    "flan_t5": (_T5_1_1, {"vocab_size": 32128, **_GATED}),
    "mt5": (_T5_1_1, {"vocab_size": 250112, **_GATED}),
    "byt5": (_BYT5, {"vocab_size": 384, **_GATED}),
}
NAMES = tuple(f"{family}_{size}" for family, (sizes, _) in _FAMILIES.items() for size in sizes)


# The model if neither a name nor a Hugging Face folder says which.
DEFAULT = "t5_1_0_base"


def t5_config(
    name: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> T5Config:
    """Returns the configuration of a published model, or of a Hugging Face folder.

    Args:
        name: a published model such as `'t5_1_1_base'`. None reads the `config.json` of
            `checkpoint`; if there is none, the model is `t5_1_0_base`.
        checkpoint: the path of the backbone; it need not exist.
        **overrides: fields of `T5Config` to replace, such as `dtype='bfloat16'`. A field of the
            architecture that differs from the folder's is an error when the weights are loaded.

    Raises:
        ValueError: the name is unknown, and the message lists the known names; or the folder's
            `config.json` does not describe a supported T5.
    """
    if name is None and checkpoint and (path := epath.Path(checkpoint) / hf_config.CONFIG).exists():
        return T5Config(**{**hf_config.read_architecture(path), **overrides})
    name = DEFAULT if name is None else name
    family, _, size = name.lower().rpartition("_")
    if name.lower() not in NAMES:
        raise ValueError(f"Unknown T5 model {name!r}. Set T5_NAME to one of {', '.join(NAMES)}.")
    sizes, fields = _FAMILIES[family]
    emb_dim, num_heads, encoder_layers, decoder_layers, head_dim, mlp_dim = sizes[size]
    shape = {
        "emb_dim": emb_dim,
        "num_heads": num_heads,
        "num_encoder_layers": encoder_layers,
        "num_decoder_layers": decoder_layers,
        "head_dim": head_dim,
        "mlp_dim": mlp_dim,
    }
    return T5Config(**{**fields, **shape, **overrides})
