"""Training, evaluation and serving with the vocabulary of a Hugging Face tokenizer."""

import json

import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.core.runs import Runs
from mpt_jax.data import vocabularies
from mpt_jax.data.sampling import EqualQuotas
from mpt_jax.evaluation.evaluator import with_labels
from mpt_jax.serving.predict import Server
from mpt_jax.tasks import text_metrics
from tests.fixtures import memory_tasks, training_runs
from tests.fixtures.hf_tokenizers import folder_of_bpe, trained, with_ends

LENGTHS = {"inputs": 16, "targets": 8}


@pytest.mark.slow
def test_train_and_serve_with_vocab_json_and_merges(tmp_path, monkeypatch):
    folder = folder_of_bpe(tmp_path / "tokenizer", with_ends(trained()))
    vocabulary = vocabularies.load(str(folder))
    texts = [("film good", "good"), ("film bad", "bad"), ("def f", "good")]
    source = memory_tasks.listed(texts, ["train", "validation"])
    metric = with_labels(text_metrics.accuracy, ["good", "bad"])
    memory_tasks.register("hfv", source, [metric], vocabulary=vocabulary)
    monkeypatch.setattr(training_runs, "VOCABULARY", vocabulary)
    backbone, runs = training_runs.save_backbone(tmp_path / "backbone"), Runs(["hfv"])
    sampler = EqualQuotas(training_runs.BATCH, 1)
    data = lambda split: training_runs.dataset(  # noqa: E731
        runs, sampler, split=split, task_feature_lengths=LENGTHS
    )
    scores = training_runs.run(
        backbone,
        tmp_path / "run",
        training_runs.build(runs=runs),
        steps=2,
        data=data("train"),
        infer_eval_dataset_cfg=data("validation"),
    )
    assert set(scores["hfv"]) >= {"accuracy", "rank_accuracy"}
    artifact = tmp_path / "run" / "artifact"
    recorded = artifacts.load_artifact(artifact).config["vocabulary_sha256"]
    assert recorded == artifacts.vocabulary_digest(vocabulary)

    server = Server.load([str(artifact)], path=backbone, vocabulary=str(folder))
    line = json.dumps({"task": "hfv", "inputs": "film good", "choices": ["good", "bad"]}).encode()
    (answer,) = server.answer([server.reader().read(line, 1)])
    assert answer["prediction"] in ("good", "bad") and len(set(answer["scores"])) == 2
    with pytest.raises(ValueError, match="vocabulary"):
        Server.load([str(artifact)], path=backbone, vocabulary="byt5")
