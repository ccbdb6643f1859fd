"""`config.json` and `generation_config.json`: every field is used or an error with its value."""

import json
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from mpt_jax.backbones.t5 import T5Config, t5_config
from mpt_jax.backbones.t5.hf_config import architecture, read_architecture

SMALL = {
    "model_type": "t5",
    "vocab_size": 40,
    "d_model": 16,
    "num_heads": 2,
    "num_layers": 3,
    "d_kv": 5,
    "d_ff": 24,
}


def folder_of(path: Path, generation: dict[str, Any] | None = None, **fields: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**SMALL, **fields}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_architecture_reads_every_field_of_the_network():
    found = architecture(
        {
            **SMALL,
            "model_type": "umt5",
            "num_decoder_layers": 1,
            "feed_forward_proj": "gated-silu",
            "dense_act_fn": "silu",
            "is_gated_act": True,
            "tie_word_embeddings": False,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
        }
    )
    assert found == {
        "vocab_size": 40,
        "emb_dim": 16,
        "num_heads": 2,
        "num_encoder_layers": 3,
        "num_decoder_layers": 1,
        "head_dim": 5,
        "mlp_dim": 24,
        "mlp_activations": ("silu", "linear"),
        "logits_via_embedding": False,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "relative_bias_per_layer": True,
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"decoder_start_token_id": 5}, "decoder_start_token_id=5.*computes with 0"),
        ({"pad_token_id": 3}, "pad_token_id=3.*computes with 0"),
        ({"eos_token_id": 2}, "eos_token_id=2.*computes with 1"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]"),
        ({"bos_token_id": 1}, "bos_token_id=1 and no decoder_start_token_id"),
        ({"forced_bos_token_id": 7}, "forced_bos_token_id=7"),
        ({"suppress_tokens": [4]}, r"suppress_tokens=\[4\]"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3.*computes with 0.*remove it"),
        ({"num_beams": 4}, "num_beams=4.*computes with 1.*remove it from the file"),
        ({"num_beam_groups": 2}, "num_beam_groups=2.*computes with 1"),
        ({"num_return_sequences": 3}, "num_return_sequences=3.*computes with 1"),
        ({"do_sample": True}, "do_sample=True.*computes with False"),
        ({"min_new_tokens": 2}, "min_new_tokens=2.*computes with 0"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05.*computes with 1e-06"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder=True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj='gelu'"),
        ({"dense_act_fn": "silu"}, "dense_act_fn='silu'.*contradicts feed_forward_proj='relu'"),
        ({"is_gated_act": True}, "is_gated_act=True.*contradicts feed_forward_proj='relu'"),
        ({"hidden_size": 8}, "hidden_size=8.*contradicts d_model=16"),
        (
            {"tie_word_embeddings": False, "scale_decoder_outputs": True},
            "tie_word_embeddings=False.*contradicts scale_decoder_outputs=True",
        ),
        ({"rotary_base": 1e4, "auto_map": {}}, "unknown fields .*: auto_map, rotary_base"),
        ({"relative_attention_max_distance": 16}, "max_distance=16.*num_buckets=32"),
    ],
)
def test_architecture_field_we_do_not_compute_is_an_error_with_both_values(change, reason):
    with pytest.raises(ValueError, match=reason):
        architecture({**SMALL, **change})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vocab_size": "40"}, "vocab_size='40'.*Expected `int`"),
        ({"d_model": 16.5}, "d_model=16.5.*Expected `int`"),
        ({"d_ff": True}, "d_ff=True"),
        ({"num_heads": 0}, "num_heads=0.*>= 1"),
        ({"d_kv": -4}, "d_kv=-4"),
        ({"d_model": 10**30}, "d_model=1000.*<= 1048576"),
        ({"num_layers": 10**6}, "num_layers=1000000.*<= 1024"),
        ({"relative_attention_num_buckets": 2}, "num_buckets=2.*>= 4"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"feed_forward_proj": ["relu"]}, "feed_forward_proj"),
        ({"model_type": ["t5"]}, "model_type"),
    ],
)
def test_architecture_invalid_type_or_range_is_an_error_with_its_value(change, reason):
    with pytest.raises(ValueError, match=reason):
        architecture({**SMALL, **change})


def test_architecture_irrelevant_and_neutral_fields_change_nothing():
    plain = architecture(SMALL)
    more = {
        "_name_or_path": "x", "torch_dtype": "float16", "dropout_rate": 0.3, "n_positions": 512,
        "num_beams": 1, "do_sample": False, "length_penalty": 2.0, "max_length": 200,
        "task_specific_params": {"summarization": {}},
        "decoder_start_token_id": 0, "bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0,
        "no_repeat_ngram_size": 0, "suppress_tokens": None, "pruned_heads": {},
        "hidden_size": 16, "is_encoder_decoder": True, "dense_act_fn": "relu",
    }  # fmt: skip
    assert architecture({**SMALL, **more}) == plain


def test_read_architecture_checks_generation_config(tmp_path):
    usual = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "max_length": 20}
    folder = folder_of(tmp_path / "t5", generation=usual)
    path = epath.Path(folder / "config.json")
    assert read_architecture(path)["emb_dim"] == 16
    for change in (
        {"decoder_start_token_id": 5},
        {"forced_eos_token_id": 1},
        {"begin_suppress_tokens": [1]},
        {"min_length": 30},
        {"num_beams": 4},
        {"do_sample": True},
        {"repetition_allowance": 2},
        {"decoder_start_token_id": None, "bos_token_id": 2},
    ):
        folder_of(folder, generation={**usual, **change})
        with pytest.raises(ValueError, match=f"generation_config.json has .*{list(change)[-1]}"):
            read_architecture(path)


def test_t5_config_without_name_reads_config_of_folder(tmp_path):
    folder = folder_of(tmp_path / "t5", relative_attention_max_distance=64, d_kv=7)
    found = t5_config(None, folder, dtype="bfloat16", num_decoder_layers=1)
    assert found == T5Config(
        40, "bfloat16", 16, 2, 3, 1, 7, 24, logits_via_embedding=True,
        relative_attention_max_distance=64,
    )  # fmt: skip
    assert t5_config("t5_1_1_small", folder) == t5_config("t5_1_1_small")


@pytest.mark.parametrize("checkpoint", [None, "", "does/not/exist", "."])
def test_t5_config_without_name_or_folder_is_t5_base(checkpoint):
    assert t5_config(None, checkpoint) == t5_config("t5_1_0_base")


@pytest.mark.parity
def test_read_architecture_knows_every_generation_setting_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokens = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    settings = transformers.GenerationConfig(**tokens)
    folder = folder_of(tmp_path / "t5", generation=settings.to_dict())
    assert read_architecture(epath.Path(folder / "config.json"))["emb_dim"] == 16


@pytest.mark.parity
def test_architecture_knows_every_field_of_transformers():
    """A new field of transformers must be judged: used, required, or irrelevant."""
    transformers = pytest.importorskip("transformers")
    for name in ("T5Config", "MT5Config", "UMT5Config"):
        fields = getattr(transformers, name)(decoder_start_token_id=0).to_dict()
        found = architecture(fields)
        assert found["num_encoder_layers"] == fields["num_layers"]
