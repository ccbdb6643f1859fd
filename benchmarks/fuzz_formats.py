"""Small files of every format that MPT-JAX reads, and their readers, for `benchmarks.fuzz`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from flax import serialization
from jax import export
from safetensors.numpy import save

from mpt_jax.artifacts import artifacts
from mpt_jax.backbones.t5 import T5Config, parameter_shapes
from mpt_jax.batching.tokenizers import ByteVocabulary
from mpt_jax.checkpointing import checkpoints, run_lock
from mpt_jax.convert import architecture, load_hf, load_t5x, peft, save_hf, save_t5x
from mpt_jax.convert.prompts import read_prompts
from mpt_jax.convert.t5x import write_orbax
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.experiments import results
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from mpt_jax.prompts.mpt import MPT
from mpt_jax.serving.export import loading
from mpt_jax.serving.predict.requests import Reader, Request
from mpt_jax.serving.prompt_bank import Bank
from mpt_jax.training.best_steps import BestSteps
from mpt_jax.training.state import TrainState

P, H = 4, 6
RUNS = Runs(["rte", "rte", "cb"], ["rte_s1", "rte_s2", "cb_s1"], groups=[0, 1, 0])
T5 = T5Config(32, emb_dim=H, num_heads=2, num_encoder_layers=2, num_decoder_layers=1, head_dim=3,
              mlp_dim=8, logits_via_embedding=True)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Format:
    """A format that is read.

    Attributes:
        write: writes an example into an empty folder.
        read: reads the folder; returns what it holds, to compare, as a text.
        has_digest: whether the prompts that are read are compared with a recorded digest, so that
            they are those that were written.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], str]
    has_digest: bool = False


def _arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _text(tree: Any, *others: Any) -> str:
    leaves = flatten(tree)
    return artifacts.digest(leaves) + repr(others)


# --- Artifacts and adapters ----------------------------------------------------------------------


def _write_artifact(folder: Path, method: Any = None, params: Any = None) -> None:
    params = params or _arrays(shared=(2, P, H), task_left=(3, P, 2), task_right=(3, 2, H))
    artifacts.save_artifact(
        folder / "artifact",
        method or MPT(P, rank=2),
        params,
        RUNS,
        embedding_sha256="e" * 64,
        backbone_sha256="b" * 64,
        vocabulary_sha256=None,
        backbone="tiny",
        step=3,
        metrics={"scores": {"cb_s1": {"accuracy": 50.0}}, "best_step": [3, 3]},
    )


def _write_crosspt(folder: Path) -> None:
    method = CrossPT(
        2, ("a", "b"), "private_cat", private_length={run: 2 for run in RUNS.run_names}
    )
    params = _arrays(sources=(2, 2, 2, H), private=(3, 2, H), router=(3, 2))
    _write_artifact(folder, method, params | {"clock": np.zeros(2, np.float32)})


def _read_artifact(folder: Path) -> str:
    artifact = artifacts.load_artifact(folder / "artifact")
    artifact.plain()
    Bank([artifact])
    return _text(artifact.params, artifact.method.config(), artifact.runs, artifact.config)


def _write_peft(folder: Path) -> None:
    params = _arrays(shared=(1, P, H), task_left=(3, P, 2), task_right=(3, 2, H))
    notes = {"run_names": list(RUNS.run_names), "task_names": list(RUNS.task_names), "step": 3}
    peft.write_factors(epath.Path(folder), params, "tiny", notes)


def _read_adapter(folder: Path, name: str = "") -> str:
    adapter = read_prompts(epath.Path(folder / name))
    return _text(adapter.params, adapter.method.config(), adapter.notes)


def _write_npy(folder: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, _arrays(prompt=(P, H))["prompt"])
    (folder / "prompt.npy").write_bytes(buffer.getvalue())


# --- Backbones -----------------------------------------------------------------------------------


def _backbone() -> dict[str, Any]:
    return unflatten(_arrays(**parameter_shapes(T5)))


def _read_hf(folder: Path) -> str:
    config, params = load_hf(folder / "model")
    return _text(params, config)


def _read_t5x(folder: Path) -> str:
    params = load_t5x(folder / "checkpoint_3")
    return _text(params, architecture.config_of_tree(params))


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


# --- Folders of a run ----------------------------------------------------------------------------


def _state() -> TrainState:
    leaves = {name: jnp.asarray(x) for name, x in _arrays(shared=(2, P, H)).items()}
    return TrainState(
        step=jnp.asarray(3, jnp.int32),
        trainable={"prompt": leaves},
        frozen={},
        opt_state={"mu": leaves},
        ended=jnp.full(2, -1),
        failed=jnp.zeros(2, bool),
    )


def _write_checkpoint(folder: Path) -> None:
    saved = checkpoints.Checkpoints(str(folder))
    runs = {"ended": [-1, -1], "failed": [False, False], "placed": [True, True]}
    data = {"packed": "AAAA", "skip": 0}
    saved.save(_state(), {"identity": {"seed": 0}, "data": data, "runs": runs})
    saved.close()


def _read_checkpoint(folder: Path) -> str:
    saved = checkpoints.Checkpoints(str(folder), read_only=True)
    restored = saved.restore(_state())
    if restored is None:
        raise FileNotFoundError(folder)
    return _text(restored[0].trainable, restored[1])


def _write_best(folder: Path) -> None:
    scores = {run: {"accuracy": 50.0} for run in RUNS.run_names}
    record = {"run_names": list(RUNS.run_names), "best_step": [3, 3], "scores": scores}
    record |= {"history": {"3": [50.0, 50.0]}}
    BestSteps(str(folder)).write(record, {"prompt": _arrays(shared=(2, P, H))})


def _read_best(folder: Path) -> str:
    record, params = BestSteps(str(folder)).read()
    return _text(params, record)


def _write_fleet(folder: Path) -> None:
    run = {"run": "rte_s1", "task": "rte", "state": "finished", "step": 3, "best_step": 3}
    (folder / "fleet.json").write_text(json.dumps({"runs": [run | {"score": 50.0}]}))


def _read_fleet(folder: Path) -> str:
    from mpt_jax.evaluation import finalize  # imports TensorFlow

    return str(finalize.all_ended(folder))


def _write_results(folder: Path) -> None:
    result = results.Result("MPT", 4, {"rte": {"accuracy": [50.0]}}, 1e3, 2.0, ("run",))
    results.save(folder, [result], {"rte": 50.0})


def _read_results(folder: Path) -> str:
    found = results.load(folder)
    return repr(
        ([dataclasses.replace(x, model_dirs=()) for x in found], results.load_majority(folder))
    )


def _write_lock(folder: Path) -> None:
    record = {"host": "h", "pid": 1, "since": "today", "machine": "m", "token": "t", "count": 1}
    (folder / run_lock.FILE).write_text(json.dumps({**record, "process_start": 5}))


def _read_lock(folder: Path) -> str:
    run_lock.Lock(str(folder), patience=0.001).release()
    return ""


# --- Serving -------------------------------------------------------------------------------------


def _write_export(folder: Path) -> None:
    weights, prompts = (save(_arrays(w=(2, 3))) for _ in range(2))
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
    (folder / loading.CONFIG).write_text(json.dumps(config))


def _read_export(folder: Path) -> str:
    loaded = loading.load(folder)
    return _text(dict(loaded.prompts), loaded.names, loaded.config)


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
    "hf": Format(lambda folder: save_hf(folder / "model", T5, _backbone()), _read_hf),
    "hf_shards": Format(lambda folder: save_hf(folder / "model", T5, _backbone(), 900), _read_hf),
    "t5x": Format(lambda folder: save_t5x(folder, _backbone(), 3), _read_t5x),
    "t5x_zarr": Format(_write_zarr, _read_t5x),
    "t5x_orbax": Format(_write_orbax, _read_t5x),
    "checkpoint": Format(_write_checkpoint, _read_checkpoint, has_digest=True),
    "best_steps": Format(_write_best, _read_best, has_digest=True),
    "fleet": Format(_write_fleet, _read_fleet),
    "results": Format(_write_results, _read_results),
    "run_lock": Format(_write_lock, _read_lock),
    "export": Format(_write_export, _read_export, has_digest=True),
    "requests": Format(_write_requests, _read_requests),
}
