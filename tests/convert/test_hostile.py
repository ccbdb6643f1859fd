"""Checkpoints and adapters that name more than they hold, or values of other types."""

from __future__ import annotations

import json
import struct
from typing import Any

import msgpack
import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from flax import serialization
from safetensors.numpy import save_file

from mpt_jax.backbones.t5 import parameter_shapes
from mpt_jax.convert import (
    architecture,
    hf_weights,
    load_hf,
    load_t5x,
    msgpack_check,
    peft,
    save_hf,
)
from mpt_jax.core.tree import unflatten
from tests.fixtures import tiny

P, H = 5, 8


# --- PEFT ----------------------------------------------------------------------------------------


def adapter(folder: Any, rows: int = P, **fields: Any) -> epath.Path:
    config = {"peft_type": peft.SINGLE, "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": P}
    (folder / peft.CONFIG).write_text(json.dumps({**config, **fields}))
    prompt = np.arange(rows * H, dtype=np.float32).reshape(rows, H)
    save_file({"prompt_embeddings": prompt}, folder / peft.TENSORS)
    return epath.Path(folder)


@pytest.mark.parametrize("fields", [{}, {"num_transformer_submodules": None}])
@pytest.mark.parametrize("rows", [P, 2 * P])
def test_load_adapter_without_submodules_reads_the_rows_as_one_copy_or_two(tmp_path, fields, rows):
    found = peft.load_adapter(adapter(tmp_path, rows, **fields))
    assert found.method.prompt_length == P
    np.testing.assert_array_equal(found.params["table"][0].ravel(), np.arange(P * H))


def test_load_adapter_of_two_submodules_and_one_copy_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected \(10, 8\), found \(5, 8\)"):
        peft.load_adapter(adapter(tmp_path, num_transformer_submodules=2))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"num_virtual_tokens": 1e30}, "num_virtual_tokens = 1e\\+30, but an integer"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens = true, but an integer"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens = 0, but an integer >= 1"),
        ({"num_transformer_submodules": "2"}, 'num_transformer_submodules = "2", but an integer'),
        ({"token_dim": [8]}, r"token_dim = \[8\], but an integer"),
        ({"peft_type": {}}, r"peft_type = \{\}, but a string"),
    ],
)
def test_load_adapter_of_wrong_types_error_names_the_field(tmp_path, fields, problem):
    with pytest.raises(ValueError, match=problem):
        peft.load_adapter(adapter(tmp_path, **fields))


def test_load_adapter_of_notes_that_are_no_names_error(tmp_path):
    folder = adapter(tmp_path)
    (folder / peft.NOTES).write_text(json.dumps({"run_names": [1]}))
    with pytest.raises(ValueError, match=r"mpt_jax.json has run_names\[0\] = 1, but a string"):
        peft.load_adapter(folder)


# --- T5X -----------------------------------------------------------------------------------------


def array(shape: tuple[int, ...], dtype: str, size: int) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, bytes(size)), use_bin_type=True))


@pytest.mark.parametrize(
    "content",
    [
        serialization.msgpack_serialize({"a": np.ones((2, 3), np.float32), "b": [1, 2.5, "x"]}),
        msgpack.packb({"a": array((), "int32", 4), "n": None, "t": True, "big": 2**40, "neg": -5}),
        msgpack.packb({str(i): i for i in range(70_000)}),
    ],
)
def test_msgpack_check_of_whole_files_passes(content):
    msgpack_check.check(content)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xdd\xff\xff\xff\xff", "declares 4294967295 more bytes or entries, but only 0 bytes"),
        (b"\xdf\x00\x00\x00\x09" + bytes(17), "declares 18 more bytes or entries, but only 17"),
        (b"\xdb\x00\x00\x01\x00abc", "declares 256 more bytes or entries, but only 3"),
        (b"\x91" * 300 + b"\xc0", "nested more than 100 deep"),
        (b"\x81\xa1a", "ends early"),
        (b"\xc0\xc0", "1 bytes follow"),
        (b"\xc1", "invalid byte 0xc1"),
        (msgpack.packb(array((10**9, 10**9), "float32", 4)), "but 4 bytes of values"),
        (msgpack.packb(array((1,), "object", 8)), "unknown type 'object'"),
        (msgpack.packb(array((1,), "V2", 2)), "unknown type 'V2'"),
        (msgpack.packb(array((-1,), "float32", 4)), "not a list of sizes"),
        (msgpack.packb(msgpack.ExtType(7, b"")), "unknown type 7"),
    ],
)
def test_msgpack_check_of_hostile_files_error(content, problem):
    with pytest.raises(ValueError, match=problem):
        msgpack_check.check(content)


def test_msgpack_check_of_nested_large_lists_fails_at_the_depth(tmp_path):
    """Each of 1000 lists names as many entries as there are bytes: the decoder would allocate
    1000 times 8 times the file."""
    lists = b"".join(b"\xdd" + struct.pack(">I", 900_000) for _ in range(1000))
    (tmp_path / "checkpoint").write_bytes(lists + bytes(10**6))
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        load_t5x(tmp_path / "checkpoint")


@pytest.mark.parametrize("target", [[1], "text", None, {"a": "text"}, {"a": [[1], [1, 2]]}])
def test_load_t5x_of_a_target_that_is_no_tree_of_arrays_error(tmp_path, target):
    contents = {"optimizer": {"target": target}}
    (tmp_path / "checkpoint").write_bytes(msgpack.packb(contents))
    with pytest.raises(ValueError, match=r"download or copy the checkpoint again"):
        load_t5x(tmp_path / "checkpoint")


def zarr(folder: Any) -> Any:
    """Writes a checkpoint with one zarr array [4, 6] in chunks of [2, 6]; returns its header."""
    store = {"driver": "file", "path": f"{folder}/leaf"}
    spec = {"driver": "zarr", "kvstore": store, "metadata": {"chunks": [2, 6]}}
    opened = ts.open(spec, create=True, dtype=ts.float32, shape=[4, 6]).result()
    opened.write(np.ones((4, 6), np.float32)).result()
    leaf = {"driver": "zarr", "kvstore": {"driver": "file", "path": "leaf"}}
    contents = {"optimizer": {"target": {"leaf": leaf}}}
    (folder / "checkpoint").write_bytes(msgpack.packb(contents))
    return folder / "leaf" / ".zarray"


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**9, 6]},
        {"shape": [4, 6, 1]},
        {"chunks": [0, 6]},
        {"chunks": [10**9, 10**9]},
        {"shape": "text"},
        {"dtype": "|O"},
        {"dtype": 5},
        {"compressor": {"id": "none such"}},
        {"fill_value": {}},
    ],
)
def test_load_t5x_of_a_damaged_zarr_header_error(tmp_path, change):
    header = zarr(tmp_path)
    assert load_t5x(tmp_path)["leaf"].shape == (4, 6)
    header.write_text(json.dumps({**json.loads(header.read_text()), **change}))
    with pytest.raises(ValueError, match="again"):
        load_t5x(tmp_path)


@pytest.mark.parametrize("path", ["/etc", "../leaf", "", 5, None])
def test_load_t5x_of_an_array_outside_the_checkpoint_error(tmp_path, path):
    leaf = {"driver": "zarr", "kvstore": {"driver": "file", "path": path}}
    (tmp_path / "checkpoint").write_bytes(msgpack.packb({"optimizer": {"target": {"leaf": leaf}}}))
    with pytest.raises(ValueError, match="which is not inside it"):
        load_t5x(tmp_path)


# --- Trees and weights ---------------------------------------------------------------------------


def test_config_of_tree_of_a_layer_with_a_large_number_error():
    names = ("layers_0", "layers_99999999999")
    leaves = {f"encoder/{name}/attention/query/kernel": np.zeros((4, 4)) for name in names}
    leaves |= {"token_embedder/embedding": np.zeros((9, 4))}
    leaves |= {"encoder/layers_0/mlp/wi/kernel": np.zeros((4, 4))}
    leaves |= {"encoder/relpos_bias/rel_embedding": np.zeros((2, 32))}
    with pytest.raises(ValueError, match="Layer 1 of the encoder is missing, although 2 layers"):
        architecture.config_of_tree(unflatten(leaves))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", ["t5"]),
        ("feed_forward_proj", {}),
        ("tie_word_embeddings", []),
        ("num_layers", 10**12),
        ("num_heads", 0),
        ("vocab_size", 1e30),
        ("relative_attention_num_buckets", "32"),
    ],
)
def test_load_hf_of_a_wrong_type_or_size_error(tmp_path, field, value):
    config = tiny.config()
    weights = {n: np.zeros(s, np.float32) for n, s in parameter_shapes(config).items()}
    folder = save_hf(tmp_path / "model", config, unflatten(weights))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, field: value}))
    with pytest.raises(ValueError, match="config.json|T5Config"):
        load_hf(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", "a/b"])
def test_read_tensors_of_an_index_that_names_other_folders_error(tmp_path, name):
    (tmp_path / hf_weights.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="again"):
        hf_weights.read_tensors(epath.Path(tmp_path))


def test_read_file_of_a_pickled_view_without_end_error(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "model.bin")
    with pytest.raises(ValueError, match="declares 4,000,000,000 bytes of tensors"):
        hf_weights.read_file(epath.Path(tmp_path / "model.bin"))
