"""T5X's run files without T5X: a user's gin file that includes them trains, evaluates, infers."""

from __future__ import annotations

import json

import gin
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.config import gin_utils

# What a user adds to T5X's finetune.gin, eval.gin and infer.gin: the model and its settings.
COMMON = """
from __gin__ import dynamic_registration
import __main__ as script
from mpt_jax.t5x_compat import bindings as initializer
from mpt_jax.runtime import paths
from mpt_jax.training import initialization as train_state
from mpt_jax.data import vocabularies
from mpt_jax.backbones.t5 import config
from t5x import utils

include 't5x/configs/runs/{run}.gin'
include 'gin/models/prompted_t5.gin'
include 'gin/methods/prompt_tuning.gin'

MIXTURE_OR_TASK_NAME = 'toy_boolq'
MIXTURE_OR_TASK_MODULE = 'mpt_jax.tasks.toy'
TASK_FEATURE_LENGTHS = {{'inputs': 48, 'targets': 12}}
TASK_NAMES = ['toy_boolq']
TRAIN_STEPS = 4
WARMUP_STEPS = 1
PROMPT_LENGTH = 4
START_FROM = 'average'

script.{entry}.train_state_initializer_cls = @initializer.TrainStateInitializer
initializer.TrainStateInitializer.origins = @train_state.Origins()
train_state.Origins:
  backbone = %INITIAL_CHECKPOINT_PATH
  backbone_name = 'tiny_t5'
INITIAL_CHECKPOINT_PATH = @backbone/paths.shipped()
backbone/paths.shipped.name = 'tiny_t5/checkpoint_10000'
VOCABULARY = @vocabulary/paths.shipped()
vocabulary/paths.shipped.name = 'toy.model'
vocabularies.load.extra_ids = 16
T5_CONFIG = @config.T5Config()
config.T5Config:
  vocab_size = 512
  dtype = 'float32'
  emb_dim = 128
  num_heads = 8
  head_dim = 16
  mlp_dim = 256
  num_encoder_layers = 3
  num_decoder_layers = 2
  mlp_activations = ('relu',)
  logits_via_embedding = True
  dropout_rate = 0.0
"""
FINETUNE = """
BATCH_SIZE = 16
EVAL_STEPS = 1
EVAL_PERIOD = 4
EVALUATOR_NUM_EXAMPLES = 8
"""
# Settings that must differ from T5X's finetune.gin, and the errors if they do not. All others,
# such as packed rows, work unchanged.
REFUSED = {
    "utils.CheckpointConfig.restore = None": "CheckpointConfig.restore would have no effect",
    "USE_CACHED_TASKS = False": "no offline cache of task",
    "train/utils.DatasetConfig.seed = 0": "seed",
}


@pytest.fixture(autouse=True)
def no_configuration():
    yield
    gin.clear_config()


def write(folder, name: str, *texts: str) -> str:
    path = folder / f"{name}.gin"
    path.write_text("\n".join(texts))
    return str(path)


def common(run: str) -> str:
    entry = {"finetune": "train", "eval": "evaluate", "infer": "infer"}[run]
    return COMMON.format(run=run, entry=entry)


@pytest.mark.slow
def test_t5x_run_files_without_t5x_train_eval_infer(tmp_path):
    finetune = write(tmp_path, "my_finetune", common("finetune"), FINETUNE, *REFUSED)
    model_dir = tmp_path / "model"
    scores = gin_utils.run_stage([finetune], [f"MODEL_DIR = '{model_dir}'"])
    assert set(scores) == {"toy_boolq"}
    artifact = artifacts.load_artifact(model_dir / "artifact")
    assert artifact.config["step"] == 4 and artifact.method.prompt_length == 4
    assert (model_dir / "checkpoint_4").is_dir() and (model_dir / "config.gin").is_file()
    lines = (model_dir / "inference_eval" / "toy_boolq-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4]

    checkpoint = f"CHECKPOINT_PATH = '{model_dir / 'checkpoint_4'}'"
    out = tmp_path / "eval"
    scores = gin_utils.run_stage(
        [write(tmp_path, "my_eval", common("eval"))],
        [checkpoint, f"EVAL_OUTPUT_DIR = '{out}'", "seqio.Evaluator.num_examples = 8"],
        "eval",
    )
    assert list(scores) == [4] and "accuracy" in scores[4]["toy_boolq"]
    assert (out / "inference_eval" / "toy_boolq-metrics.jsonl").is_file()

    out = tmp_path / "infer"
    gin_utils.run_stage(
        [write(tmp_path, "my_infer", common("infer"))],
        [checkpoint, f"INFER_OUTPUT_DIR = '{out}'", "utils.RestoreCheckpointConfig.dtype = None"],
        "infer",
    )
    (written,) = out.glob("toy_boolq-predict.jsonl-00000-of-00001")
    assert len(written.read_text().splitlines()) == 200


@pytest.mark.parametrize("left_out", REFUSED)
def test_t5x_run_files_unsupported_setting_is_named(left_out, tmp_path):
    kept = [setting for setting in REFUSED if setting != left_out]
    finetune = write(tmp_path, "my_finetune", common("finetune"), FINETUNE, *kept)
    with pytest.raises((ValueError, AssertionError), match=REFUSED[left_out]):
        gin_utils.run_stage([finetune], [f"MODEL_DIR = '{tmp_path / 'model'}'"])
    assert not list((tmp_path / "model").glob("checkpoint_*"))
