"""Small folders of a run, data files and tokenizers, and their readers, for `benchmarks.fuzz`."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import tensorflow as tf
import tokenizers as library
from etils import epath

from benchmarks.fuzz_examples import RUNS, Format, H, P, arrays, fields, text
from mpt_jax.batching import arrangements, tokenizers
from mpt_jax.batching.example_order import ExampleOrder
from mpt_jax.batching.samplers import PerExample
from mpt_jax.batching.table_batches import Layout, TrainBatches
from mpt_jax.batching.task_texts import TaskTexts, TextTable
from mpt_jax.checkpointing import checkpoints, run_lock
from mpt_jax.data import token_cache
from mpt_jax.data.iterators import DatasetSource, HostShard, TableSource, TrainIterator
from mpt_jax.evaluation import finalize
from mpt_jax.experiments import results
from mpt_jax.experiments.paper import __main__ as paper
from mpt_jax.experiments.paper.chains import Cell
from mpt_jax.experiments.paper.variants import PT
from mpt_jax.experiments.report import run_reader
from mpt_jax.experiments.stages import Stage
from mpt_jax.runtime import paths
from mpt_jax.serving.predict.resumable_output import File
from mpt_jax.tasks import file_readers
from mpt_jax.training.best_steps import BestSteps, Record
from mpt_jax.training.state import TrainState

# --- Saved by a run ------------------------------------------------------------------------------


def _state() -> TrainState:
    leaves = {name: jnp.asarray(x) for name, x in arrays(shared=(2, P, H)).items()}
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
    return text(restored[0].trainable, fields(restored[1], checkpoints.Meta.__struct_fields__))


def _write_best(folder: Path) -> None:
    scores = {run: {"accuracy": 50.0} for run in RUNS.run_names}
    record = {"run_names": list(RUNS.run_names), "best_step": [3, 3], "scores": scores}
    record |= {"history": {"3": [50.0, 50.0]}}
    BestSteps(str(folder)).write(record, {"prompt": arrays(shared=(2, P, H))})


def _read_best(folder: Path) -> str:
    record, params = BestSteps(str(folder)).read()
    return text(params, fields(record, Record.__struct_fields__))


def _write_fleet(folder: Path) -> None:
    run = {"run": "rte_s1", "task": "rte", "state": "finished", "step": 3, "best_step": 3}
    (folder / "fleet.json").write_text(json.dumps({"runs": [run | {"score": 50.0}]}))


def _read_fleet(folder: Path) -> str:
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
    run_lock.Lock(str(folder), patience=0.0).release()
    return ""


def _write_records(folder: Path) -> None:
    steps = [{"folder": "train", "step": step, "loss/rte_s1": 0.5} for step in (1, 2)]
    lines = "".join(json.dumps(x | {"timing/seconds_per_step": 0.1}) + "\n" for x in steps)
    (folder / "metrics.jsonl").write_text(lines)
    record = {"parameters": 90, "trainable_parameters": 9, "method_config": {}, "prompt_length": 4}
    (folder / "run.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "inference_eval").mkdir()
    scores = folder / "inference_eval" / "rte_s1-metrics.jsonl"
    scores.write_text("".join(json.dumps({"step": n, "accuracy": 50.0}) + "\n" for n in (1, 2)))


def _read_records(folder: Path) -> str:
    found = [
        results.read_record(folder),
        results.training_seconds(folder),
        results.read_scores(folder, ["rte_s1"]),
        run_reader.records(folder),
        run_reader.curves(folder),
        run_reader.last(folder),
        run_reader.scores(folder),
    ]
    return repr(found)


_STAGE = Stage("mpt", ("gin/mpt_source.gin",), ("SEED = 1",), steps=10)


def _write_plan(folder: Path) -> None:
    (folder / "mpt").mkdir()
    paper.check_plan(folder, _cells())


def _cells() -> list[Cell]:
    return [Cell(PT, None, (), (_STAGE,), (), (_STAGE,))]


def _read_plan(folder: Path) -> str:
    paper.check_plan(folder, _cells())
    return (folder / "stages.json").read_text()


@functools.cache
def _iterator(of_tables: bool) -> TrainIterator:
    share = HostShard(2, 1, 0)
    if of_tables:
        table = TextTable(np.arange(1, 13, dtype=np.int32), np.arange(0, 13, 3))
        texts = TaskTexts([dict.fromkeys(("inputs", "targets"), table)])
        order = ExampleOrder(PerExample(2, 0), np.ones(1), texts.sizes, [0], shuffle=True)
        layout = Layout(np.zeros(1, np.int32), np.zeros(1, np.int64), (2, 4, 4))
        source: Any = TableSource(TrainBatches(texts, arrangements.unpacked(order, 2), layout))
    else:
        dataset = tf.data.Dataset.range(8).map(lambda x: {"x": x}).batch(2)
        source = DatasetSource(dataset, share)
    return TrainIterator(source, share, {"split": "train", "tasks": ["rte"]})


def _write_position(folder: Path, of_tables: bool) -> None:
    (folder / "position").write_bytes(_iterator(of_tables).state())


def _read_position(folder: Path, of_tables: bool) -> str:
    iterator = _iterator(of_tables)
    iterator.restore((folder / "position").read_bytes())
    return repr(next(iterator))


def _position(of_tables: bool) -> Format:
    functions = (_write_position, _read_position)
    return Format(*(functools.partial(each, of_tables=of_tables) for each in functions))


def _in_cache(folder: Path, read: Callable[[], Any]) -> Any:
    with mock.patch.dict(os.environ, {token_cache.VARIABLE: str(folder)}):
        return read()


def _write_tokens(folder: Path) -> None:
    values = {name: np.arange(12, dtype=np.int32) for name in ("inputs", "targets")}
    offsets = {name: np.arange(0, 13, 3) for name in values}
    counts = dict.fromkeys(values, token_cache.Counts(12, 1, 1))
    tokens = token_cache.Tokens(values, offsets, np.array([True, False, False, True]), counts)
    _in_cache(folder, lambda: token_cache.save("entry", [tokens]))


def _read_tokens(folder: Path) -> str:
    found = _in_cache(folder, lambda: token_cache.load("entry"))
    if found is None:
        raise ValueError("damaged, or not there")
    return repr(found)


_REQUESTS = [b"one\n", b"two\n", b"three\n"]


def _answers(folder: Path) -> File:
    return File(folder / "answers.jsonl", {"mode": "predict", "bank_sha256": "b" * 64})


def _write_answers(folder: Path) -> None:
    output = _answers(folder)
    output.begin(iter(_REQUESTS))
    output.write(_REQUESTS[:2], [{"output": "a"}, {"error": "b"}])
    output.close()


def _read_answers(folder: Path) -> str:
    output = _answers(folder)
    done = output.begin(iter(_REQUESTS))
    output.close()
    return repr((done, output.lines, output.failed))


# --- Data and tokenizers -------------------------------------------------------------------------

_ROWS = [{"text": f"film {n}", "label": "good" if n % 2 else "bad", "n": n} for n in range(4)]


def _table(separator: str) -> bytes:
    rows = [list(_ROWS[0]), *(list(map(str, row.values())) for row in _ROWS)]
    return "".join(separator.join(row) + "\n" for row in rows).encode()


def _write_data(folder: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
    (folder / "rows.jsonl").write_bytes(lines)
    (folder / "rows.csv").write_bytes(_table(","))
    (folder / "rows.tsv").write_bytes(_table("\t"))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))


def _write_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(_ROWS), folder / "rows.parquet")


def _read_data(folder: Path) -> str:
    inputs = file_readers.Template("inputs", "{text} of {n}")
    targets = file_readers.Template("targets", "{label}")
    labels = {"good": "good", "bad": "bad"}
    files = sorted(folder.iterdir())
    return repr([file_readers.read(epath.Path(x), inputs, targets, labels) for x in files])


def _bpe() -> Any:
    made = library.Tokenizer(library.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a good film", "a bad film"] * 4, trainer)
    return made


_NAMES = {"eos_token": "</s>", "pad_token": {"content": "<pad>"}, "cls_token": "<s>"}


def _write_tokenizer(folder: Path) -> None:
    _bpe().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_NAMES))
    (folder / "special_tokens_map.json").write_text(json.dumps(_NAMES))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))


def _write_bpe(folder: Path) -> None:
    made = _bpe()
    made.model.save(str(folder))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra_id_0>": made.get_vocab_size()}))
    config = {**_NAMES, "tokenizer_class": "RobertaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_sentencepiece(folder: Path) -> None:
    shutil.copy(paths.shipped(name="toy.model"), folder / "spiece.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra_id_0>": 1000}))


def _read_tokenizer(folder: Path) -> str:
    found = tokenizers.load.__wrapped__(str(folder))
    ids = found.encode("a good film")
    return repr((ids, found.decode(ids), found.vocab_size, found.eos_id, found.unk_id))


RUN_FORMATS: dict[str, Format] = {
    "checkpoint": Format(_write_checkpoint, _read_checkpoint, has_digest=True, share=1),
    "best_steps": Format(_write_best, _read_best, has_digest=True),
    "fleet": Format(_write_fleet, _read_fleet),
    "results": Format(_write_results, _read_results),
    "records": Format(_write_records, _read_records, changes_folder=True),
    "plan": Format(_write_plan, _read_plan, changes_folder=True),
    "run_lock": Format(_write_lock, _read_lock, changes_folder=True),
    "data_position": _position(of_tables=True),
    "data_position_tf": _position(of_tables=False),
    "tokens": Format(_write_tokens, _read_tokens, has_digest=True, changes_folder=True),
    "answers": Format(_write_answers, _read_answers, changes_folder=True),
    "data_text": Format(_write_data, _read_data),
    "data_parquet": Format(_write_parquet, _read_data),
    "tokenizer_json": Format(_write_tokenizer, _read_tokenizer),
    "tokenizer_bpe": Format(_write_bpe, _read_tokenizer),
    "sentencepiece": Format(_write_sentencepiece, _read_tokenizer),
}
