"""Hugging Face folders whose weights do not fit their `config.json`, or cannot be computed with."""

import json
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpt_jax.convert import load_hf
from tests.fixtures.hf_checkpoints import GOLDEN, write_folder


def test_load_hf_missing_output_projection_error_names_it_and_the_field(tmp_path):
    folder = write_folder(tmp_path / "hf", dict(np.load(GOLDEN / "t5_hf_1_1.npz")))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="1 missing: lm_head.weight.*set tie_word_embeddings .*tr"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("dtype", "value", "reason"),
    [
        (np.int8, 1, r"dtype that is not supported: encoder.*layer_norm.weight \(I8\)"),
        (np.int64, 1, r"\(I64\)"),
        (np.float32, np.nan, "NaN or infinite values: encoder.final_layer_norm.weight"),
        (np.float16, np.inf, "NaN or infinite values: encoder.final_layer_norm.weight"),
        (np.float64, 1e300, "NaN or infinite values: encoder.final_layer_norm.weight"),
    ],
)
def test_load_hf_weights_without_finite_floats_error_names_them(dtype, value, reason, tmp_path):
    folder = write_folder(tmp_path / "hf", dict(np.load(GOLDEN / "t5_hf_1_1.npz")))
    weights, norm = load_file(folder / "model.safetensors"), "encoder.final_layer_norm.weight"
    weights[norm] = weights[norm].astype(dtype)
    weights[norm][3] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=reason):
        load_hf(folder)


def test_load_hf_float8_tensor_error_names_it(tmp_path):
    folder = write_folder(tmp_path / "hf", dict(np.load(GOLDEN / "t5_hf_1_1.npz")))
    table = {"q": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    header = json.dumps(table).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(2)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"not supported: q \(F8_E4M3\)"):
        load_hf(folder)


@pytest.mark.parametrize(
    "change",
    [{"num_layers": 1024}, dict.fromkeys(("d_model", "num_heads", "d_kv", "d_ff"), 2**20)],
)
def test_load_hf_sizes_that_weights_do_not_confirm_allocate_nothing(change, tmp_path):
    folder = write_folder(tmp_path / "hf", dict(np.load(GOLDEN / "t5_hf_1_1.npz")))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **change}))
    tracemalloc.start()
    with pytest.raises(ValueError, match="does not match its config.json"):
        load_hf(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # a projection of such a width would take 4e18 bytes
