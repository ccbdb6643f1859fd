"""Small files of every format that MPT-JAX reads, and their readers, for `benchmarks.fuzz`."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from flax import serialization
from jax import export
from safetensors.numpy import load, save

from benchmarks.fuzz_examples import RUNS, Format, H, P, arrays, fields, text
from benchmarks.fuzz_run_formats import RUN_FORMATS
from mpt_jax.artifacts import artifacts
from mpt_jax.artifacts.backbone_digest import backbone_config
from mpt_jax.backbones.t5 import T5Config, parameter_shapes
from mpt_jax.batching.tokenizers import ByteVocabulary
from mpt_jax.convert import architecture, load_hf, load_t5x, peft, save_hf, save_t5x
from mpt_jax.convert.prompts import read_prompts
from mpt_jax.convert.t5x import write_orbax
from mpt_jax.core import schema
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from mpt_jax.prompts.mpt import MPT
from mpt_jax.serving.export import loading
from mpt_jax.serving.predict.requests import Reader, Request
from mpt_jax.serving.prompt_bank import Bank

T5 = T5Config(32, emb_dim=H, num_heads=2, num_encoder_layers=2, num_decoder_layers=1, head_dim=3,
              mlp_dim=8, logits_via_embedding=True)  # fmt: skip


# --- Artifacts and adapters ----------------------------------------------------------------------


def _write_artifact(folder: Path, method: Any = None, params: Any = None) -> None:
    params = params or arrays(shared=(2, P, H), task_left=(3, P, 2), task_right=(3, 2, H))
    artifacts.save_artifact(
        folder / "artifact",
        method or MPT(P, rank=2),
        params,
        RUNS,
        digests={
            "embedding_sha256": "e" * 64,
            "backbone_sha256": "b" * 64,
            "vocabulary_sha256": None,
        },
        backbone="tiny",
        step=3,
        backbone_config=backbone_config(T5),
        metrics={"scores": {"cb_s1": {"accuracy": 50.0}}, "best_step": [3, 3]},
    )


def _write_crosspt(folder: Path) -> None:
    method = CrossPT(
        2, ("a", "b"), "private_cat", private_length={run: 2 for run in RUNS.run_names}
    )
    params = arrays(sources=(2, 2, 2, H), private=(3, 2, H), router=(3, 2))
    _write_artifact(folder, method, params | {"clock": np.zeros(2, np.float32)})


def _read_artifact(folder: Path) -> str:
    artifact = artifacts.load_artifact(folder / "artifact")
    artifact.plain()
    Bank([artifact])
    names = (*artifacts.Config.__struct_fields__, "started_from", "mixture", "versions")
    config = fields(artifact.config, names)
    return text(artifact.params, artifact.method.config(), artifact.runs, config)


def _write_peft(folder: Path) -> None:
    params = arrays(shared=(1, P, H), task_left=(3, P, 2), task_right=(3, 2, H))
    notes = {"run_names": list(RUNS.run_names), "task_names": list(RUNS.task_names), "step": 3}
    peft.write_factors(epath.Path(folder), params, "tiny", notes)


def _read_adapter(folder: Path, name: str = "") -> str:
    adapter = read_prompts(epath.Path(folder / name))
    return text(adapter.params, adapter.method.config(), adapter.notes)


def _write_npy(folder: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, arrays(prompt=(P, H))["prompt"])
    (folder / "prompt.npy").write_bytes(buffer.getvalue())


def _write_prompts(folder: Path) -> None:
    (folder / "folded.safetensors").write_bytes(save(arrays(rte=(P, H), cb=(P, H))))


def _write_prompt_checkpoint(folder: Path) -> None:
    """Writes a prompt as google-research/prompt-tuning does."""
    save_t5x(folder, {"encoder": {"prompt": {"prompt": arrays(prompt=(P, H))}}}, 3)


# --- Backbones -----------------------------------------------------------------------------------


def _backbone() -> dict[str, Any]:
    return unflatten(arrays(**parameter_shapes(T5)))


def _write_hf(folder: Path) -> None:
    save_hf(folder / "model", T5, _backbone())
    generation = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "model" / "generation_config.json").write_text(json.dumps(generation))


def _write_bin(folder: Path) -> None:
    """Writes pickled weights, as older models of the hub have them."""
    import torch

    save_hf(folder / "model", T5, _backbone())
    weights = folder / "model" / "model.safetensors"
    tensors = {name: torch.from_numpy(x) for name, x in load(weights.read_bytes()).items()}
    torch.save(tensors, folder / "model" / "pytorch_model.bin")
    weights.unlink()


def _read_hf(folder: Path) -> str:
    config, params = load_hf(folder / "model")
    return text(params, config)


def _read_t5x(folder: Path) -> str:
    params = load_t5x(folder / "checkpoint_3")
    return text(params, architecture.config_of_tree(params))


def _write_zarr(folder: Path) -> None:
    """Writes a checkpoint of T5X's own format with one leaf in a zarr folder, as T5X does."""
    save_t5x(folder, unflatten({}), 3)
    checkpoint = folder / "checkpoint_3"
    params = flatten(_backbone())
    name = "token_embedder/embedding"
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(checkpoint / "embedding")},
        "metadata": {"compressor": {"id": "gzip"}, "chunks": [8, H]},
    }
    array = params[name]
    store = ts.open(spec, create=True, dtype=ts.float32, shape=array.shape).result()
    store.write(array).result()
    params[name] = {"driver": "zarr", "kvstore": {"driver": "file", "path": "embedding"}}
    tree = unflatten(params)
    content = {"version": 3, "optimizer": {"target": tree, "state": {"step": 3}}}
    (checkpoint / "checkpoint").write_bytes(serialization.msgpack_serialize(content))


def _write_orbax(folder: Path) -> None:
    (folder / "checkpoint_3").mkdir()
    write_orbax(epath.Path(folder / "checkpoint_3"), _backbone(), 3)


# --- Serving -------------------------------------------------------------------------------------


def _write_export(folder: Path) -> None:
    weights, prompts = (save(arrays(w=(2, 3))) for _ in range(2))
    shapes = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    lowered = export.export(jax.jit(lambda w, ids: w.sum() + ids.sum()))(*shapes)
    function = bytes(lowered.serialize())
    files = {"predict_4.jax": function, "score_4.jax": function, loading.PROMPTS: prompts}
    files[loading.BACKBONE] = weights
    for name, content in files.items():
        (folder / name).write_bytes(content)
    config = {
        "format": loading.FORMAT,
        "names": ["rte"],
        "target_length": 4,
        "functions": {"predict": {"4": "predict_4.jax"}, "score": {"4": "score_4.jax"}},
        "files_sha256": {name: hashlib.sha256(x).hexdigest() for name, x in files.items()},
    }
    (folder / loading.CONFIG).write_text(json.dumps(schema.sealed(config, loading.SEAL)))


def _read_export(folder: Path) -> str:
    loaded = loading.load(folder)
    config = fields(loaded.config, ("functions", "target_length", "files_sha256"))
    return text(dict(loaded.prompts), loaded.names, config)


def _write_requests(folder: Path) -> None:
    request = {"task": "cb_s1", "inputs": "a film", "choices": ["good", "bad"], "id": [1, {"a": 2}]}
    (folder / "requests.jsonl").write_text(json.dumps(request))


@functools.cache
def _bank() -> Bank:
    with tempfile.TemporaryDirectory() as folder:
        _write_artifact(Path(folder))
        return Bank([artifacts.load_artifact(Path(folder) / "artifact")])


def _read_requests(folder: Path) -> str:
    reader = Reader(_bank(), ByteVocabulary(), "predict", 24, 12)
    read = reader.read((folder / "requests.jsonl").read_bytes(), 1)
    json.dumps(read.label)
    if isinstance(read, Request):
        return repr(read)
    raise ValueError(read.error)


FORMATS: dict[str, Format] = {
    "artifact": Format(_write_artifact, _read_artifact, has_digest=True),
    "artifact_crosspt": Format(_write_crosspt, _read_artifact, has_digest=True),
    "peft": Format(_write_peft, _read_adapter),
    "npy": Format(_write_npy, lambda folder: _read_adapter(folder, "prompt.npy")),
    "prompts": Format(_write_prompts, lambda folder: _read_adapter(folder, "folded.safetensors")),
    "prompt_checkpoint": Format(
        _write_prompt_checkpoint, lambda folder: _read_adapter(folder, "checkpoint_3")
    ),
    "hf": Format(_write_hf, _read_hf),
    "hf_shards": Format(lambda folder: save_hf(folder / "model", T5, _backbone(), 900), _read_hf),
    "t5x": Format(lambda folder: save_t5x(folder, _backbone(), 3), _read_t5x),
    "t5x_zarr": Format(_write_zarr, _read_t5x),
    "t5x_orbax": Format(_write_orbax, _read_t5x, share=1),
    "export": Format(_write_export, _read_export, has_digest=True),
    "requests": Format(_write_requests, _read_requests),
    **RUN_FORMATS,
}
if importlib.util.find_spec("torch"):  # without it, pickled weights are an error
    FORMATS["hf_bin"] = Format(_write_bin, _read_hf)
