"""Evaluation and inference of saved prompts, compared with decoding one example at a time."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from mpt_jax import eval, infer
from mpt_jax.artifacts import artifacts
from mpt_jax.checkpointing import checkpoint_config, checkpoints, fingerprint, restore_states
from mpt_jax.convert.t5x import save_t5x
from mpt_jax.core import schema
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.data import feature_converter
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.data.sampling import task_mixture
from mpt_jax.prompts.mpt import MPT
from mpt_jax.training import initialization
from mpt_jax.training.partitioning import PjitPartitioner
from tests.fixtures import memory_tasks, tiny

TASKS = ("judged_a", "judged_b")
BANK = (*TASKS, "judged_empty")
SIZE, BATCH = 7, 4
LENGTHS = {"inputs": 4, "targets": 3}
VOCABULARY = seqio.ByteVocabulary()


def register(name: str, offset: int) -> None:
    size = 0 if name == "judged_empty" else SIZE
    memory_tasks.register_numbers(
        name, lambda i: tf.strings.as_string(offset), {"test": size}, [accuracy]
    )


def accuracy(targets, predictions):
    return {"accuracy": float(np.mean(np.asarray(targets) == np.asarray(predictions)))}


def make_model(names=BANK, prompt_length=tiny.PROMPT):
    runs = Runs(names)
    converter = lambda **kwargs: feature_converter.PromptFeatureConverter(  # noqa: E731
        prompt_length=prompt_length, runs=runs, **kwargs
    )
    return tiny.model(
        runs,
        MPT(prompt_length),
        tiny.config(vocab_size=384),
        input_vocabulary=VOCABULARY,
        output_vocabulary=VOCABULARY,
        feature_converter_cls=converter,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, its parameters, and a MODEL_DIR with checkpoints of steps 0 and 3."""
    for offset, name in enumerate(BANK):
        register(name, offset)
    model = make_model()
    params = tiny.params(model)
    folder = tmp_path_factory.mktemp("saved")
    backbone = {name: tree for name, tree in params.items() if name != "prompt"}
    origins = {"backbone": str(save_t5x(folder, backbone, 0))}
    state = tiny.state(model, params)
    loaded = initialization.initialize_params(
        model, initialization.Origins(**origins), jax.random.PRNGKey(0)
    )
    meta = {"identity": fingerprint.model_fingerprint(model, loaded)}
    kept = checkpoints.Checkpoints(str(folder / "run"), keep=None)
    for step in (0, 3):
        kept.save(state.replace(step=jax.numpy.asarray(step, jax.numpy.int32)), meta)
    kept.close()
    return types.SimpleNamespace(
        model=model, params=params, folder=folder, origins=origins, run=folder / "run",
        predict=jax.jit(model.predict_batch), logits=jax.jit(model.logits), answers={},
    )  # fmt: skip


def config(names=TASKS, **overrides):
    arguments = dict(task_feature_lengths=LENGTHS, split="test", batch_size=BATCH, shuffle=False)
    return DatasetConfig(task_mixture(names), seed=0, **{**arguments, **overrides})


def arguments(saved, path="checkpoint_3", mode="specific", origins=None, **overrides):
    made = initialization.Origins(**{**saved.origins, **(origins or {})})
    return {
        "model": saved.model,
        "dataset_cfg": config(),
        "restore_checkpoint_cfg": checkpoint_config.RestoreCheckpointConfig(
            path and str(saved.run / path), mode
        ),
        "partitioner": PjitPartitioner(),
        "train_state_initializer_cls": lambda: types.SimpleNamespace(origins=made),
        "summarize_config_fn": lambda *_: None,
        **overrides,
    }


def one_by_one(saved, name):
    """(text, target, prediction, score) of every example, one example per batch."""
    if name not in saved.answers:
        saved.answers[name] = list(answered_one_by_one(saved, name))
    return saved.answers[name]


def answered_one_by_one(saved, name):
    dataset = seqio.TaskRegistry.get(name).get_dataset(LENGTHS, "test", shuffle=False)
    converted = saved.model.FEATURE_CONVERTER_CLS(pack=False)(dataset, LENGTHS)
    for text, batch in zip(dataset, converted.batch(1).as_numpy_iterator(), strict=True):
        tokens = saved.predict(saved.params, batch)[0]
        logits = saved.logits(saved.params, batch)[0]
        logged = np.asarray(jax.nn.log_softmax(logits))
        targets = batch["decoder_target_tokens"][0]
        score = sum(logged[i, token] for i, token in enumerate(targets) if token)
        strings = (text[f"{k}_pretokenized"].numpy().decode() for k in ("inputs", "targets"))
        yield *strings, VOCABULARY.decode(np.asarray(tokens).tolist()), float(score)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_evaluate_metrics_match_decoded_examples(saved, tmp_path):
    scores = eval.evaluate(output_dir=str(tmp_path), **arguments(saved))
    assert list(scores) == [3]
    for name in TASKS:
        rows = one_by_one(saved, name)
        expected = np.mean([target == prediction for _, target, prediction, _ in rows])
        assert scores[3][name]["accuracy"] == pytest.approx(expected)
        assert (tmp_path / "inference_eval" / f"{name}-metrics.jsonl").exists()


@pytest.mark.parametrize("mode", ["predict", "score", "predict_with_aux"])
def test_infer_files_hold_model_outputs(mode, saved, tmp_path):
    files = infer.infer(output_dir=str(tmp_path), mode=mode, **arguments(saved))
    assert [
        f"{name}-{mode}.jsonl-00000-of-00001" in f for name, f in zip(TASKS, files, strict=True)
    ]
    for name, path in zip(TASKS, files, strict=True):
        expected = one_by_one(saved, name)
        found = read(path)
        assert len(found) == SIZE
        for line, (text, target, prediction, score) in zip(found, expected, strict=True):
            assert line["inputs"] == {"inputs_pretokenized": text, "targets_pretokenized": target}
            if mode == "score":
                assert line["score"] == pytest.approx(score, abs=1e-4)
            else:
                assert line["prediction"] == prediction
            assert ("aux" in line) == (mode == "predict_with_aux")
        assert (tmp_path / f"{path}.COMPLETED").exists()


def test_infer_stopped_run_resumes_after_written_lines(saved, tmp_path):
    whole = infer.infer(output_dir=str(tmp_path / "a"), mode="score", **arguments(saved))[0]
    folder = tmp_path / "b"
    folder.mkdir()
    name = whole.rpartition("/")[2]
    # Three examples are finished, whose lines must be kept; the fourth line is incomplete.
    kept = [json.dumps({"mark": i}) for i in range(3)]
    text = "".join(f"{line}\n" for line in kept)
    record = json.loads(Path(f"{whole}.COMPLETED").read_text()) | {"lines": 3, "bytes": len(text)}
    record = schema.sealed(record, "record_sha256")
    (folder / f"{name}.partial_of").write_text(json.dumps(record))
    (folder / f"{name}.partial").write_text(text + '{"inputs": {"inp')
    infer.infer(
        output_dir=str(folder), mode="score", **arguments(saved, dataset_cfg=config(TASKS[:1]))
    )
    found, expected = read(folder / name), read(whole)
    assert found[:3] == [{"mark": 0}, {"mark": 1}, {"mark": 2}]
    for line, other in zip(found[3:], expected[3:], strict=True):
        assert line["inputs"] == other["inputs"]
        assert line["score"] == pytest.approx(other["score"], abs=1e-5)
    assert sorted(path.name for path in folder.iterdir()) == [name, f"{name}.COMPLETED"]


def test_infer_file_made_from_other_inputs_error(saved, tmp_path):
    configs = []
    again = lambda path="checkpoint_3", **overrides: infer.infer(  # noqa: E731
        output_dir=str(tmp_path),
        summarize_config_fn=lambda *_: configs.append(path),
        **{k: v for k, v in arguments(saved, path, **overrides).items() if "summarize" not in k},
    )
    files = again()
    texts = [Path(file).read_text() for file in files]
    longer = {"inputs": 5, "targets": 3}
    for message, settings in (
        (r"step: saved 3, current 0", {"path": "checkpoint_0"}),
        (
            r"saved {'inputs': 4.*, current {'inputs': 5",
            {"dataset_cfg": config(task_feature_lengths=longer)},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            again(**settings)
    assert configs == ["checkpoint_3"]
    assert again() == files and texts == [Path(file).read_text() for file in files]
    # The same holds for a partial file, and for a file with an empty record.
    Path(f"{files[0]}.COMPLETED").rename(f"{files[0]}.partial_of")
    Path(files[0]).rename(f"{files[0]}.partial")
    with pytest.raises(ValueError, match="step: saved 3, current 0"):
        again("checkpoint_0")
    Path(f"{files[0]}.partial_of").unlink()
    Path(f"{files[0]}.COMPLETED").write_text("")
    with pytest.raises(ValueError, match="step: saved nothing, current 3"):
        again()


def test_infer_shards_together_equal_whole(saved, tmp_path):
    settings = arguments(saved, dataset_cfg=config(TASKS[:1]))
    (whole,) = infer.infer(output_dir=str(tmp_path), **settings)
    parts = []
    for shard in range(2):
        (path,) = infer.infer(output_dir=str(tmp_path), shard_id=shard, num_shards=2, **settings)
        assert path.endswith(f"-{shard:05}-of-00002")
        parts += read(path)
    key = lambda line: line["inputs"]["inputs_pretokenized"]  # noqa: E731
    assert sorted(parts, key=key) == sorted(read(whole), key=key)


def test_infer_artifact_same_scores_as_checkpoint(saved, tmp_path):
    """Its prompts equal the checkpoint's, so its predictions do as well."""
    embedding = saved.params["token_embedder"]["embedding"]
    path = artifacts.save_artifact(
        tmp_path / "artifact",
        saved.model.prompt,
        saved.params["prompt"],
        saved.model.runs,
        digests={
            "embedding_sha256": artifacts.embedding_digest(embedding),
            "backbone_sha256": None,
            "vocabulary_sha256": None,
        },
        backbone="tiny",
        step=3,
    )
    same = MPT(tiny.PROMPT, start_from="same")
    model = tiny.model(
        saved.model.runs,
        same,
        saved.model.module.config,
        output_vocabulary=VOCABULARY,
        feature_converter_cls=saved.model.FEATURE_CONVERTER_CLS,
    )
    by_checkpoint = infer.infer(output_dir=str(tmp_path / "a"), mode="score", **arguments(saved))
    settings = arguments(saved, "", origins={"artifact": str(path)}, model=model)
    by_artifact = infer.infer(output_dir=str(tmp_path / "b"), mode="score", **settings)
    for first, second in zip(by_checkpoint, by_artifact, strict=True):
        assert read(first) == read(second)


def test_restore_states_each_mode_yields_its_steps(saved):
    def steps(path, mode):
        cfg = checkpoint_config.RestoreCheckpointConfig(path, mode)
        made = initialization.Origins(**saved.origins)
        found = restore_states.states(saved.model, made, PjitPartitioner(), cfg)
        return [int(state.step) for state in found]

    run = str(saved.run)
    assert steps(run, "all") == [0, 3]
    assert steps(run, "latest") == [3]
    assert steps([f"{run}/checkpoint_3", f"{run}/checkpoint_0"], "specific") == [3, 0]


def one_state(saved, model, **origins):
    made = initialization.Origins(**{**saved.origins, **origins})
    cfg = checkpoint_config.RestoreCheckpointConfig(str(saved.run), "latest")
    return next(iter(restore_states.states(model, made, PjitPartitioner(), cfg)))


def test_restore_states_other_tasks_or_method_error(saved):
    """Even if the shapes agree. The message must not advise a reader to remove anything."""
    for model, difference in (
        (
            make_model(BANK[::-1]),
            r"run_names: saved \['judged_a', .*\], current \['judged_empty', .*\]",
        ),
        (make_model(BANK[:2]), "run_names"),
        (make_model(prompt_length=5), "method_config: saved .*3.*, current .*5"),
    ):
        with pytest.raises(ValueError, match=difference) as caught:
            one_state(saved, model)
        assert "checkpoint_3" in str(caught.value) and "remove" not in str(caught.value)


def test_restore_states_checkpoint_without_meta_error(saved, tmp_path):
    """For example T5X's, or a corrupt one."""
    shutil.copytree(saved.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint_3" / "meta")
    cfg = checkpoint_config.RestoreCheckpointConfig(
        str(tmp_path / "run" / "checkpoint_3"), "specific"
    )
    made = initialization.Origins(**saved.origins)
    with pytest.raises(OSError, match="checkpoint_3 cannot be read"):
        list(restore_states.states(saved.model, made, PjitPartitioner(), cfg))


def test_restore_states_other_backbone_error(saved, tmp_path):
    other = tiny.params(saved.model, seed=1)
    del other["prompt"]
    with pytest.raises(
        ValueError, match="embedding_sha256: saved '[0-9a-f]+', current '[0-9a-f]+'"
    ):
        one_state(saved, saved.model, backbone=str(save_t5x(tmp_path, other, 0)))


def other_weights(saved, folder) -> str:
    """A backbone with the same embedding, as after merging a LoRA."""
    leaves = flatten({k: v for k, v in saved.params.items() if k != "prompt"})
    name = "decoder/layers_0/self_attention/query/kernel"
    return str(save_t5x(folder, unflatten({**leaves, name: leaves[name] * 1.1}), 0))


def test_restore_states_other_weights_same_embedding_error(saved, tmp_path):
    path = other_weights(saved, tmp_path)
    with pytest.raises(ValueError, match="backbone_sha256: saved '[0-9a-f]+', current '[0-9a-f]+'"):
        one_state(saved, saved.model, backbone=path)
    assert one_state(saved, saved.model, backbone=path, digest_backbone=False).step == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "tset"}, "Task 'judged_a' has no 'tset' split; it has test."),
        ({"names": BANK}, "The 'test' split of these tasks is empty: judged_empty."),
        (
            {"task_feature_lengths": {"inputs": 1, "targets": 3}},
            r"longer than .*judged_a: 7 of 7 \(100.00%\), judged_b: 7 of 7",
        ),
    ],
)
@pytest.mark.parametrize("entry", [eval.evaluate, infer.infer])
def test_evaluate_and_infer_invalid_data_error(entry, settings, message, saved, tmp_path):
    with pytest.raises(ValueError, match=message):
        entry(output_dir=str(tmp_path), **arguments(saved, dataset_cfg=config(**settings)))


@pytest.mark.parametrize(
    ("path", "mode"),
    [("checkpoint_7", "specific"), ("", "specific"), ("nothing", "latest"), ("nothing", "all")],
)
def test_evaluate_missing_checkpoint_error_lists_existing(path, mode, saved, tmp_path):
    settings = arguments(saved, path or ".", mode)
    with pytest.raises(FileNotFoundError, match="No training checkpoint at") as caught:
        eval.evaluate(output_dir=str(tmp_path), **settings)
    assert ("checkpoint_3" in str(caught.value)) == (path != "nothing")


def test_evaluate_without_checkpoint_or_artifact_error(saved, tmp_path):
    with pytest.raises(ValueError, match="CHECKPOINT_PATH"):
        eval.evaluate(output_dir=str(tmp_path), **arguments(saved, ""))


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        (
            "evaluate",
            {"fallback_init_rng": 0},
            "evaluate.fallback_init_rng = 0 would",
        ),
        ("evaluate", {"use_orbax": False}, "evaluate.use_orbax"),
        ("infer", {"merge_fn": print}, "infer.merge_fn"),
        ("infer", {"mode": "guess"}, "infer.mode must be one of"),
        ("infer", {"shard_id": 2, "num_shards": 2}, "infer.shard_id must be in 0 .. 1"),
    ],
)
def test_evaluate_and_infer_invalid_settings_error(function, settings, message, saved, tmp_path):
    call = {"evaluate": eval.evaluate, "infer": infer.infer}[function]
    with pytest.raises(ValueError, match=message):
        call(output_dir=str(tmp_path), **arguments(saved), **settings)
