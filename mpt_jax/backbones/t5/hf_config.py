"""Schema of the `config.json` and `generation_config.json` of a Hugging Face T5.

Every field is either used, or must have the value that our network and decoding implement, or is
listed as irrelevant to both. Any other field is an error, because it might change what transformers
computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

import msgspec
from etils import epath

from mpt_jax.core.comparison import abbreviate
from mpt_jax.runtime.files import read_json

CONFIG = "config.json"
GENERATION = "generation_config.json"

# feed_forward_proj -> our mlp_activations. `gated-gelu` is the tanh form in both libraries.
ACTIVATIONS = {
    "relu": ("relu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}
# model_type -> (class, feed_forward_proj, tie_word_embeddings). The latter two are the defaults if
# config.json leaves them out.
MODEL_TYPES = {
    "t5": ("T5ForConditionalGeneration", "relu", True),
    "mt5": ("MT5ForConditionalGeneration", "gated-gelu", False),
    "umt5": ("UMT5ForConditionalGeneration", "gated-gelu", True),
}
# config.json's name -> T5Config's, of the fields without a default.
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "num_heads": "num_heads",
    "num_layers": "num_encoder_layers",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
}
# T5Config's name -> config.json's, of every field that describes the architecture.
ARCHITECTURE = {
    **{ours: theirs for theirs, ours in SIZES.items()},
    "num_decoder_layers": "num_decoder_layers",
    "mlp_activations": "feed_forward_proj",
    "logits_via_embedding": "tie_word_embeddings",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
    "relative_attention_max_distance": "relative_attention_max_distance",
    "relative_bias_per_layer": "model_type",
}

# Far above every published T5. The number of values in a product of three sizes fits in int64, and
# tracing this many layers ends.
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
_Layers = Annotated[int, msgspec.Meta(ge=1, le=1024)]
# With fewer buckets, a stack of the network has none for exact distances.
_Buckets = Annotated[int, msgspec.Meta(ge=4, le=2**20)]


class _Fields(msgspec.Struct, kw_only=True):
    """The fields of `config.json` that describe the architecture."""

    model_type: Literal["t5", "mt5", "umt5"]
    vocab_size: _Size
    d_model: _Size
    num_heads: _Size
    num_layers: _Layers
    d_kv: _Size
    d_ff: _Size
    num_decoder_layers: _Layers | None = None
    feed_forward_proj: str | None = None
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None
    tie_word_embeddings: bool | None = None
    scale_decoder_outputs: bool | None = None
    relative_attention_num_buckets: _Buckets = 32
    relative_attention_max_distance: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] = 128
    # transformers' other names of four sizes; it prefers them if a file has both.
    hidden_size: _Size | None = None
    num_attention_heads: _Size | None = None
    num_hidden_layers: _Size | None = None
    head_dim: _Size | None = None


_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
# Fields with the only values that the network implements. null is always the default.
_NETWORK: dict[str, tuple[Any, ...]] = {
    "layer_norm_epsilon": (1e-6,),
    "is_encoder_decoder": (True,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
}
# The same for the special tokens of either file.
_TOKENS: dict[str, tuple[Any, ...]] = {
    "decoder_start_token_id": (0,),
    "pad_token_id": (0,),
    "eos_token_id": (1, [1]),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "forced_decoder_ids": (None, []),
}
# The same for fields of either file that make transformers generate something else than what greedy
# decoding gives.
_GENERATION: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "do_sample": (False,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "sequence_bias": (None, [], {}),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (None,),
    "watermarking_config": (None,),
    "token_healing": (False,),
    "stop_strings": (None, []),
    "generation_kwargs": (None, {}),
}
# Fields that change neither logits nor greedy decoding: names and versions, dropout and initial
# values, which outputs to return, details of beam search and sampling (which `_GENERATION` requires
# to be off), other heads. Upper limits on lengths are those of the job or command, and only
# transformers' pipelines read task_specific_params and prefix. Names with a leading underscore are
# transformers' notes to itself.
_IRRELEVANT = frozenset(
    """
    architectures transformers_version torch_dtype dtype tokenizer_class finetuning_task
    task_specific_params prefix model_max_length language languages license n_positions
    max_position_embeddings scalable_attention attn_implementation use_bfloat16 torchscript
    gradient_checkpointing dropout_rate classifier_dropout initializer_factor tf_legacy_loss
    xla_device use_cache output_past output_attentions output_hidden_states output_scores
    output_logits return_dict use_return_dict return_dict_in_generate return_legacy_cache is_decoder
    add_cross_attention cross_attention_hidden_size chunk_size_feed_forward id2label label2id
    num_labels problem_type sep_token_id unk_token_id cls_token_id mask_token_id bos_token_id
    max_length max_new_tokens max_time diversity_penalty length_penalty early_stopping temperature
    top_k top_p min_p top_h
    typical_p epsilon_cutoff eta_cutoff renormalize_logits remove_invalid_values low_memory
    cache_implementation cache_config prefill_chunk_size disable_compile compile_config
    is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_early_exit assistant_lookbehind target_lookbehind prompt_lookup_num_tokens
    max_matching_ngram_size
    """.split()
)


def architecture(fields: Mapping[str, Any], what: str = CONFIG) -> dict[str, Any]:
    """Returns the arguments of `T5Config` that a `config.json` describes.

    Args:
        fields: the content of the file.
        what: its name in errors.

    Raises:
        ValueError: the model is not a T5; sizes are missing; or a field has the wrong type, is out
            of range, is unknown, contradicts another field, or describes something that the network
            or its decoding does not implement.
    """
    if fields.get("model_type") not in list(MODEL_TYPES):  # it may be unhashable
        raise ValueError(
            f"{what} has model_type {fields.get('model_type')!r}, which is not supported. Use a "
            f"model of type {', '.join(MODEL_TYPES)} (T5 1.0, T5 1.1, Flan, mT5, ByT5, umT5)."
        )
    if absent := [name for name in SIZES if name not in fields]:
        raise ValueError(
            f"{what} lacks {', '.join(absent)}, so the model's shape is unknown. Add what is "
            "missing, or download or copy the file again."
        )
    _check_known(fields, {*_Fields.__struct_fields__, *_NETWORK}, what)
    try:
        read = msgspec.convert(fields, _Fields)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("$.")[2].rstrip("`")
        raise ValueError(
            f"{what} has {name}={fields.get(name)!r}, which is not valid: {error}. Correct the "
            "file, or download or copy it again."
        ) from error
    _require(fields, _NETWORK, what, "Use a model with that value")
    check_decoding(fields, what)
    _check_consistent(read, what)
    _, usual_activation, usually_tied = MODEL_TYPES[read.model_type]
    # From version 5 on, transformers records it in scale_decoder_outputs; the other is always true.
    tied = usually_tied if read.tie_word_embeddings is None else read.tie_word_embeddings
    tied = tied if read.scale_decoder_outputs is None else read.scale_decoder_outputs
    return {
        **{ours: getattr(read, theirs) for theirs, ours in SIZES.items()},
        "num_decoder_layers": read.num_decoder_layers or read.num_layers,
        "mlp_activations": ACTIVATIONS[read.feed_forward_proj or usual_activation],
        "logits_via_embedding": tied,
        "relative_attention_num_buckets": read.relative_attention_num_buckets,
        "relative_attention_max_distance": read.relative_attention_max_distance,
        "relative_bias_per_layer": read.model_type == "umt5",
    }


def check_decoding(fields: Mapping[str, Any], what: str) -> None:
    """Checks that these fields describe the decoding that MPT-JAX implements: greedy, from token 0
    to token 1, with padding 0, and no token forced or suppressed.

    Args:
        fields: the content of a `config.json` or a `generation_config.json`.
        what: its name in errors.

    Raises:
        ValueError: a field has another value; the message shows it and the supported value.
    """
    _require(fields, _TOKENS, what, "Use a model with that value, or correct the file")
    _require(
        fields,
        _GENERATION,
        what,
        "To decode without this setting, as MPT-JAX trains and evaluates, remove it from the file",
    )
    if fields.get("decoder_start_token_id") is None and fields.get("bos_token_id"):
        raise ValueError(
            f"{what} has bos_token_id={fields['bos_token_id']!r} and no decoder_start_token_id, so "
            "transformers starts the decoder with the former, but MPT-JAX starts it with 0. If the "
            "model was trained to start with 0, set decoder_start_token_id to 0 in the file."
        )


def _check_known(fields: Mapping[str, Any], network: Collection[str], what: str) -> None:
    """Raises ValueError if a field is not in `network`, is not a decoding setting, and is not known
    to be irrelevant."""
    known = {*network, *_TOKENS, *_GENERATION, *_IRRELEVANT}
    unknown = sorted(name for name in fields if name not in known and not name.startswith("_"))
    if unknown:
        raise ValueError(
            f"{what} has unknown fields that may change what the model computes: "
            f"{abbreviate(unknown)}. If transformers' T5 does not read them, remove them from the "
            "file."
        )


def _require(
    fields: Mapping[str, Any], required: Mapping[str, tuple[Any, ...]], what: str, advice: str
) -> None:
    for name, values in required.items():
        value = fields.get(name)
        if value is not None and value not in values:
            raise ValueError(
                f"{what} has {name}={value!r}, which is not supported; MPT-JAX computes with "
                f"{values[0]!r}. {advice}."
            )


def _check_consistent(read: _Fields, what: str) -> None:
    """Checks fields that depend on each other.

    Raises:
        ValueError: two fields contradict each other, or an activation is not supported.
    """
    activation = read.feed_forward_proj or MODEL_TYPES[read.model_type][1]
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{what} has feed_forward_proj={activation!r}, which is not supported. Use a model "
            f"with one of {', '.join(ACTIVATIONS)}."
        )
    gated = activation.startswith("gated-")
    function = activation.removeprefix("gated-").replace("gelu", "gelu_new")
    # What transformers would use, and the field that has to agree with it.
    pairs: list[tuple[str, Any, str, Any]] = [
        ("dense_act_fn", function, "feed_forward_proj", activation),
        ("is_gated_act", gated, "feed_forward_proj", activation),
    ]
    for alias, name in _ALIASES.items():
        pairs.append((alias, getattr(read, name), name, getattr(read, name)))
    if read.scale_decoder_outputs:
        pairs.append(("tie_word_embeddings", True, "scale_decoder_outputs", True))
    for name, expected, other, because in pairs:
        found = getattr(read, name)
        if found is not None and found != expected:
            raise ValueError(
                f"{what} has {name}={found!r}, which contradicts {other}={because!r}. Correct the "
                "field that is wrong, or download or copy the file again."
            )
    # Otherwise the decoder's logarithmic buckets divide by log(1) or less, in transformers as well.
    if read.relative_attention_max_distance <= read.relative_attention_num_buckets // 2:
        raise ValueError(
            f"{what} has relative_attention_max_distance={read.relative_attention_max_distance}, "
            "but it must exceed half of relative_attention_num_buckets="
            f"{read.relative_attention_num_buckets}. Correct the file, or download or copy it "
            "again."
        )


def read_architecture(path: epath.Path) -> dict[str, Any]:
    """Reads a `config.json`, and checks the `generation_config.json` beside it if it exists.

    Returns:
        The arguments of `T5Config`, as in `architecture`.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: a file is not JSON or has unknown fields, or as in `architecture` and
            `check_decoding`.
    """
    fields = architecture(read_json(path), str(path))
    generation = path.parent / GENERATION
    if generation.exists():
        settings = read_json(generation)
        _check_known(settings, (), str(generation))
        check_decoding(settings, str(generation))
    return fields
