"""Where every parameter's first value comes from, and what is wrong where it cannot."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax import convert
from mpt_jax.artifacts import artifacts
from mpt_jax.artifacts.backbone_digest import backbone_digest
from mpt_jax.backbones.t5.scanned_params import is_stacked
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.models import decoding, encoder_decoder
from mpt_jax.models.losses import Distillation, Objective
from mpt_jax.prompts import get_method
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.spot import NearestSource
from mpt_jax.training import initialization
from mpt_jax.training.initialization import Origins, initialize_params
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import create_train_state, num_params
from tests.fixtures import tiny
from tests.fixtures.saved_artifacts import save

KEY = jax.random.PRNGKey(0)
DISTILLED = Objective(distillation=Distillation())


class Vocabulary:
    """What the digest and the size check look at."""

    eos_id = 1

    def __init__(self, size: int = tiny.VOCABULARY, model: bytes = b"pieces"):
        self.vocab_size = size
        self.sp_model = model

    def encode(self, s: str) -> list[int]:
        return [2 + len(s)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> dict:
    """A checkpoint of random weights, with the weights."""
    tree = tiny.params(
        tiny.model(prompt=get_method("none")(), labels=encoder_decoder.FULL_FINETUNING)
    )
    tree = {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}
    path = convert.save_t5x(tmp_path_factory.mktemp("backbone"), unflatten(tree), step=7)
    return {"path": str(path), "leaves": tree}


def digest(backbone) -> str:
    return artifacts.embedding_digest(backbone["leaves"]["token_embedder/embedding"])


def weights_digest(backbone) -> str:
    return backbone_digest(unflatten(backbone["leaves"]))


def write(
    path, backbone, names, length=tiny.PROMPT, runs=None, **overrides
) -> tuple[str, np.ndarray]:
    """Writes an artifact of plain prompts; returns its path and the prompts."""
    rng = np.random.default_rng(len(names))
    table = rng.normal(size=(len(names), length, tiny.WIDTH)).astype(np.float32)
    digests = {
        "embedding_sha256": digest(backbone),
        "backbone_sha256": weights_digest(backbone),
        "vocabulary_sha256": artifacts.vocabulary_digest(Vocabulary()),
    }
    save(path, PromptTuning(length), {"table": table}, runs or Runs(names), **digests | overrides)
    return str(path), table


def vocabulary_model(**overrides) -> encoder_decoder.PromptedEncoderDecoder:
    overrides.setdefault("input_vocabulary", Vocabulary())
    overrides.setdefault("output_vocabulary", Vocabulary())
    return tiny.model(**overrides)


# --- Values by origin ----------------------------------------------------------------------------


def test_initialize_params_backbone_from_checkpoint_prompt_from_embedding(backbone):
    loaded = initialize_params(vocabulary_model(), Origins(backbone["path"]), KEY)
    leaves = flatten(loaded.params)
    prompt = {name for name in leaves if name.startswith("prompt/")}
    assert set(leaves) - prompt == set(backbone["leaves"])
    for name, value in backbone["leaves"].items():
        np.testing.assert_array_equal(leaves[name], value, err_msg=name)
    rows = {row.tobytes() for row in backbone["leaves"]["token_embedder/embedding"]}
    assert all(row.tobytes() in rows for row in np.asarray(leaves["prompt/shared"][0]))
    assert loaded.embedding_sha256 == digest(backbone)
    assert loaded.backbone_sha256 == weights_digest(backbone)
    assert loaded.vocabulary_sha256 == artifacts.vocabulary_digest(Vocabulary())
    again = initialize_params(vocabulary_model(), Origins(backbone["path"]), KEY)
    tiny.close(again.params, loaded.params, 0)
    other = initialize_params(vocabulary_model(), Origins(backbone["path"]), jax.random.PRNGKey(1))
    assert not np.array_equal(other.params["prompt"]["task_left"], leaves["prompt/task_left"])


def test_teachers_several_artifacts_matched_by_task(backbone, tmp_path):
    first, table = write(tmp_path / "a", backbone, ["gamma", "other", "alpha"])
    second, more = write(tmp_path / "b", backbone, ["beta"])
    model = vocabulary_model(objective=DISTILLED)
    loaded = initialize_params(model, Origins(backbone["path"], [first, second]), KEY)
    teachers = loaded.params["teacher"]["table"]
    np.testing.assert_array_equal(teachers, np.stack([table[2], more[0], table[0]]))


def test_teachers_named_runs_matched_by_task(backbone, tmp_path):
    runs = Runs(["alpha", "beta", "gamma"], ["alpha_s1", "beta_s1", "gamma_s1"])
    path, table = write(tmp_path / "a", backbone, list(runs.run_names), runs=runs)
    model = vocabulary_model(objective=DISTILLED)
    loaded = initialize_params(model, Origins(backbone["path"], path), KEY)
    np.testing.assert_array_equal(loaded.params["teacher"]["table"], table)


def test_teachers_same_run_name_preferred_over_same_task(backbone, tmp_path):
    runs = Runs(["alpha", "alpha", "beta", "gamma"], ["alpha_s1", "alpha", "beta_s1", "gamma_s1"])
    path, table = write(tmp_path / "a", backbone, list(runs.run_names), runs=runs)
    model = vocabulary_model(objective=DISTILLED)
    loaded = initialize_params(model, Origins(backbone["path"], path), KEY)
    np.testing.assert_array_equal(loaded.params["teacher"]["table"], table[1:])
    seeds = Runs(["alpha", "alpha"], ["alpha_s1", "alpha"])
    model = vocabulary_model(objective=DISTILLED, runs=seeds)
    loaded = initialize_params(model, Origins(backbone["path"], path), KEY)
    np.testing.assert_array_equal(loaded.params["teacher"]["table"], table[:2])


def test_teachers_several_candidates_error_lists_them(backbone, tmp_path):
    runs = Runs(["alpha", "alpha"], ["alpha_s1", "alpha_s2"])
    first, _ = write(tmp_path / "a", backbone, list(runs.run_names), runs=runs)
    model = vocabulary_model(objective=DISTILLED, runs=Runs(["alpha"]))
    with pytest.raises(ValueError, match=f"alpha_s1 in {first}, alpha_s2 in {first}"):
        initialize_params(model, Origins(backbone["path"], first), KEY)
    second, _ = write(tmp_path / "b", backbone, ["alpha_s2"], runs=Runs(["alpha"], ["alpha_s2"]))
    model = vocabulary_model(objective=DISTILLED, runs=Runs(["alpha"], ["alpha_s2"]))
    with pytest.raises(ValueError, match=f"alpha_s2 in {first}, alpha_s2 in {second}"):
        initialize_params(model, Origins(backbone["path"], [first, second]), KEY)


def test_initial_artifact_prompts_transferred_by_method(backbone, tmp_path):
    path, table = write(tmp_path / "a", backbone, ["mnli", "qqp"])
    method = PromptTuning(tiny.PROMPT, start_from="qqp")
    model = vocabulary_model(prompt=method, runs=Runs(["alpha"]))
    loaded = initialize_params(model, Origins(backbone["path"], artifact=path), KEY)
    np.testing.assert_array_equal(loaded.params["prompt"]["table"], table[1:])


def spot(backbone, tmp_path, targets=("alpha",), other: dict | None = None, **settings):
    """A model that starts by similarity, its origins, and the prompts of three sources."""
    sources, table = write(tmp_path / "sources", backbone, ["mnli", "qqp", "sst2"])
    early, _ = write(tmp_path / "early", backbone, ["sst2", "mnli", "qqp"])
    target, _ = write(tmp_path / "target", backbone, list(targets), **(other or {}))
    method = PromptTuning(tiny.PROMPT, start_from=NearestSource(early, target, **settings))
    model = vocabulary_model(prompt=method, runs=Runs(["alpha"]))
    return model, Origins(backbone["path"], artifact=sources), table


def test_nearest_source_prompts_start_from_most_similar(backbone, tmp_path):
    """`write` draws the same values for equally many names, so the target's early prompt, row 1 of
    three, is the early prompt of mnli."""
    model, origins, table = spot(backbone, tmp_path, ["x", "alpha", "y"])
    loaded = initialize_params(model, origins, KEY)
    np.testing.assert_array_equal(loaded.params["prompt"]["table"], table[:1])
    assert loaded.started_from == {
        "artifact_sha256": artifacts.digest({"table": table}),
        "start_from": {"alpha": {"mnli": 1.0}},
    }


def test_started_from_named_source_is_recorded(backbone, tmp_path):
    path, _ = write(tmp_path / "a", backbone, ["mnli", "qqp"])
    method = PromptTuning(tiny.PROMPT, start_from="qqp")
    model = vocabulary_model(prompt=method, runs=Runs(["alpha"]))
    loaded = initialize_params(model, Origins(backbone["path"], artifact=path), KEY)
    assert loaded.started_from is not None and loaded.started_from["start_from"] == "qqp"
    assert initialize_params(model, Origins(backbone["path"]), KEY).started_from is None


def test_nearest_source_embeddings_of_other_backbone_error(backbone, tmp_path):
    other = {"embedding_sha256": "0" * 64}
    model, origins, _ = spot(backbone, tmp_path, other=other)
    with pytest.raises(ValueError, match=f"{tmp_path / 'target'} was trained on another backbone"):
        initialize_params(model, origins, KEY)


def test_nearest_source_missing_target_or_too_many_sources_error(backbone, tmp_path):
    model, origins, _ = spot(backbone, tmp_path / "a", ["beta", "gamma"])
    with pytest.raises(ValueError, match="no task embedding of 'alpha', only of beta, gamma"):
        initialize_params(model, origins, KEY)
    model, origins, _ = spot(backbone, tmp_path / "b", top_k=4)
    with pytest.raises(ValueError, match="top_k is 4, but the initial artifact holds 3"):
        initialize_params(model, origins, KEY)


@pytest.mark.parametrize(
    ("absent", "stage"), [("early", "spot_source_embeddings"), ("target", "spot_embeddings")]
)
def test_nearest_source_missing_embeddings_error_names_stage(backbone, tmp_path, absent, stage):
    model, origins, _ = spot(backbone, tmp_path)
    shutil.rmtree(tmp_path / absent)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / absent}.*gin/{stage}.gin"):
        initialize_params(model, origins, KEY)


def test_nearest_source_without_initial_artifact_error(backbone, tmp_path):
    model, _, _ = spot(backbone, tmp_path)
    with pytest.raises(ValueError, match="INITIAL_ARTIFACT is not set. Set INITIAL_ARTIFACT"):
        initialize_params(model, Origins(backbone["path"]), KEY)


def test_full_finetuning_starts_from_pretrained_float32_weights(backbone):
    config = tiny.config(dtype="bfloat16")
    method = get_method("none")()
    tuned = tiny.model(Runs(["a"]), method, config, labels=encoder_decoder.FULL_FINETUNING)
    loaded = initialize_params(tuned, Origins(backbone["path"]), KEY)
    for name, leaf in flatten(loaded.params).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, backbone["leaves"][name], err_msg=name)


def test_initialize_params_frozen_in_compute_dtype_prompts_in_float32(backbone, tmp_path):
    path, _ = write(tmp_path / "a", backbone, ["alpha", "beta", "gamma"])
    model = vocabulary_model(config=tiny.config(dtype="bfloat16"), objective=DISTILLED)
    loaded = initialize_params(model, Origins(backbone["path"], path), KEY)
    for name, leaf in flatten(loaded.params).items():
        prompt = name.startswith(("prompt/", "teacher/"))
        assert leaf.dtype == (jnp.float32 if prompt else jnp.bfloat16), name
    assert loaded.embedding_sha256 == digest(backbone), "the digest should not depend on precision"
    assert loaded.backbone_sha256 == weights_digest(backbone)


def test_initial_params_host_arrays_survive_donated_steps(backbone, tmp_path):
    path, _ = write(tmp_path / "a", backbone, ["alpha", "beta", "gamma"])
    model = vocabulary_model(config=tiny.config(dtype="bfloat16"), objective=DISTILLED)
    loaded = initialize_params(model, Origins(backbone["path"], path), KEY)
    leaves = flatten(loaded.params)
    assert {type(leaf) for leaf in leaves.values()} == {np.ndarray}
    before = {name: leaf.copy() for name, leaf in leaves.items()}
    state = create_train_state(model, loaded.params, PjitPartitioner())
    halve = jax.jit(lambda tree: jax.tree.map(lambda x: x // 2, tree), donate_argnums=0)
    jax.block_until_ready(halve(state))
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)


def test_scanned_layers_same_checkpoint_same_predictions(backbone, tmp_path):
    # With smaller embeddings, beam search and greedy decoding give different answers.
    quiet = {k: v * (0.3 if "embed" in k else 1) for k, v in backbone["leaves"].items()}
    path = str(convert.save_t5x(tmp_path, unflatten(quiet)))
    batch, found = tiny.batch([2, 0, 1, 0]), {}
    for scan_layers in (False, True):
        config = tiny.config(scan_layers=scan_layers)
        greedy = vocabulary_model(config=config)
        beams = vocabulary_model(config=config, decode_fn=decoding.beam_search)
        params = initialize_params(greedy, Origins(path), KEY).params
        assert is_stacked(params) == scan_layers
        every = functools.partial(beams.predict_batch_with_aux, return_all_decodes=True)
        run = jax.jit(lambda *x, g=greedy, e=every: (g.logits(*x), g.predict_batch(*x), e(*x)))
        found[scan_layers] = run(params, batch)
    (logits, greedy, (tokens, scores)), (logits_again, again, beams) = found[False], found[True]
    np.testing.assert_allclose(logits_again, logits, atol=1e-5)
    np.testing.assert_array_equal(again, greedy)
    np.testing.assert_array_equal(beams[0], tokens)
    np.testing.assert_allclose(beams[1]["scores"], scores["scores"], atol=1e-5)
    assert np.any(tokens[:, -1] != greedy)


def test_bitfit_scanned_layers_biases_start_at_zero(backbone):
    config = tiny.config(biases=True, scan_layers=True)
    model = tiny.model(Runs(["a"]), get_method("none")(), config, labels=encoder_decoder.BITFIT)
    leaves = flatten(initialize_params(model, Origins(backbone["path"]), KEY).params)
    assert leaves["encoder/encoder/mlp/wi/bias"].shape == (24, 2)  # layers on axis 1
    assert not any(np.any(leaf) for name, leaf in leaves.items() if name.endswith("/bias"))


def test_bitfit_biases_start_at_zero_rest_from_checkpoint(backbone):
    config = tiny.config(biases=True)
    method = get_method("none")()
    model = tiny.model(Runs(["a"]), method, config, labels=encoder_decoder.BITFIT)
    leaves = flatten(initialize_params(model, Origins(backbone["path"]), KEY).params)
    biases = set(leaves) - set(backbone["leaves"])
    assert biases and all(name.endswith("/bias") for name in biases)
    assert not any(np.any(leaves[name]) for name in biases)
    for name, value in backbone["leaves"].items():
        np.testing.assert_array_equal(leaves[name], value)


def test_origins_random_weights_require_scratch(backbone):
    with pytest.raises(ValueError, match="Origins.scratch = True"):
        Origins()
    with pytest.raises(ValueError, match="Set only one of the two"):
        Origins(backbone["path"], scratch=True)
    method = get_method("none")()
    model = tiny.model(Runs(["a"]), method, labels=encoder_decoder.FULL_FINETUNING)
    leaves = flatten(initialize_params(model, Origins(scratch=True), KEY).params)
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        name: leaf.shape for name, leaf in backbone["leaves"].items()
    }
    embedding = leaves["token_embedder/embedding"]
    assert not np.array_equal(embedding, backbone["leaves"]["token_embedder/embedding"])


# --- Errors --------------------------------------------------------------------------------------


def test_missing_backbone_error_names_path_and_command(tmp_path):
    origins = Origins(str(tmp_path / "none"), backbone_command="make backbone")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'none'}.*make backbone"):
        initialize_params(tiny.model(), origins, KEY)


def test_backbone_shape_mismatch_error_names_each_parameter(backbone):
    wider = tiny.model(config=tiny.config(mlp_dim=25, num_decoder_layers=2))
    with pytest.raises(ValueError) as error:
        initialize_params(wider, Origins(backbone["path"]), KEY)
    message = str(error.value)
    assert backbone["path"] in message
    assert "encoder/layers_0/mlp/wi/kernel: expected (16, 25), found (16, 24)" in message
    assert "decoder/layers_1/mlp/wi/kernel" in message.split("of another shape")[0]
    with pytest.raises(ValueError, match=r"not expected: encoder/layers_1/"):
        initialize_params(
            tiny.model(config=tiny.config(num_encoder_layers=1)), Origins(backbone["path"]), KEY
        )
    assert "Set T5_NAME to the checkpoint's model" in message


def test_backbone_of_hugging_face_folder_must_have_the_model_of_its_config(backbone, tmp_path):
    folder = convert.save_hf(tmp_path / "hf", tiny.config(), unflatten(backbone["leaves"]))
    found = initialize_params(tiny.model(), Origins(str(folder)), KEY)
    embedding = found.params["token_embedder"]["embedding"]
    np.testing.assert_array_equal(embedding, backbone["leaves"]["token_embedder/embedding"])
    # The shapes agree, so nothing else would show the difference.
    other = tiny.model(config=tiny.config(relative_attention_max_distance=20))
    reason = "max_distance is 20 in the model and 128 in the file.*T5_NAME"
    with pytest.raises(ValueError, match=f"{folder}/config.json describes: relative.*{reason}"):
        initialize_params(other, Origins(str(folder)), KEY)


def test_backbone_unexpected_biases_error(backbone, tmp_path):
    extra = dict(backbone["leaves"])
    extra["encoder/layers_0/mlp/wi/bias"] = np.zeros(24, np.float32)
    path = convert.save_t5x(tmp_path, unflatten(extra))
    with pytest.raises(ValueError, match=r"1 not expected: encoder/layers_0/mlp/wi/bias"):
        initialize_params(tiny.model(), Origins(str(path)), KEY)


def test_vocabulary_larger_than_embedding_error(backbone):
    for side in ("input_vocabulary", "output_vocabulary"):
        model = vocabulary_model(**{side: Vocabulary(tiny.VOCABULARY + 1)})
        with pytest.raises(ValueError, match="41 ids, but the backbone embeds only 40"):
            initialize_params(model, Origins(backbone["path"]), KEY)


@pytest.mark.parametrize(
    ("ids", "rows"),
    [(32_100, 32_128), (32_000, 32_128), (250_100, 250_112), (259, 384), (384, 384), (405, 512)],
    ids=["T5", "T5 without sentinels", "mT5", "ByT5", "ByT5 with sentinels", "toy"],
)
def test_vocabulary_unused_padding_rows_accepted(ids, rows):
    model = vocabulary_model(input_vocabulary=Vocabulary(ids), output_vocabulary=Vocabulary(ids))
    initialization._check_vocabulary(model, rows)


@pytest.mark.parametrize(
    ("ids", "rows"),
    [(405, 32_128), (32_100, 250_112), (259, 32_128), (768, 1024)],
    ids=["toy on T5", "T5 on mT5", "ByT5 on T5", "256 spare rows"],
)
def test_vocabulary_far_smaller_than_embedding_error(ids, rows):
    model = vocabulary_model(output_vocabulary=Vocabulary(ids), input_vocabulary=Vocabulary(rows))
    with pytest.raises(ValueError, match=f"only {ids} ids.*embeds {rows}.*load.extra_ids"):
        initialization._check_vocabulary(model, rows)


@pytest.mark.parametrize("role", ["artifact", "teachers"])
@pytest.mark.parametrize("what", ["backbone", "weights", "vocabulary", "length"])
def test_artifacts_incompatible_error_shows_both_values(backbone, tmp_path, role, what):
    """For teachers, the last case is a prompt length other than the student's."""
    other = {
        "backbone": "embedding_sha256",
        "weights": "backbone_sha256",
        "vocabulary": "vocabulary_sha256",
    }.get(what)
    length = 2 if what == "length" else tiny.PROMPT
    names = ["alpha", "beta", "gamma"]
    changed = {other: "0" * 64} if other else {}
    path, _ = write(tmp_path / "a", backbone, names, length, **changed)
    objective = DISTILLED if role == "teachers" else Objective()
    method = PromptTuning(tiny.PROMPT, start_from="alpha")
    model = vocabulary_model(prompt=method, objective=objective)
    ours = {
        "backbone": digest(backbone),
        "weights": weights_digest(backbone),
        "vocabulary": artifacts.vocabulary_digest(Vocabulary()),
        "length": "positions, but this job needs 3",
    }[what]
    theirs = "prompts of 2" if what == "length" else "0" * 64
    with pytest.raises(ValueError) as error:
        initialize_params(model, Origins(backbone["path"], **{role: path}), KEY)
    assert ours in str(error.value) and theirs in str(error.value) and path in str(error.value)


def test_teachers_missing_task_error_lists_known_tasks(backbone, tmp_path):
    path, _ = write(tmp_path / "a", backbone, ["alpha", "delta"])
    model = vocabulary_model(objective=DISTILLED)
    with pytest.raises(ValueError, match="tasks beta, gamma.* only for alpha, delta"):
        initialize_params(model, Origins(backbone["path"], path), KEY)


def test_missing_teachers_error_names_command(backbone, tmp_path):
    model = vocabulary_model(objective=DISTILLED)
    with pytest.raises(ValueError, match="names no artifact.*make teachers"):
        initialize_params(model, Origins(backbone["path"], teachers_command="make teachers"), KEY)
    absent = str(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=f"{absent}.*make teachers"):
        initialize_params(
            model, Origins(backbone["path"], absent, teachers_command="make teachers"), KEY
        )


def test_missing_initial_artifact_error_names_command(backbone, tmp_path):
    absent = str(tmp_path / "absent")
    origins = Origins(backbone["path"], artifact=absent, artifact_command="make source")
    with pytest.raises(FileNotFoundError, match=f"{absent}.*missing artifact, run: make source"):
        initialize_params(vocabulary_model(), origins, KEY)
    with pytest.raises(FileNotFoundError, match="Set INITIAL_ARTIFACT to an existing artifact.$"):
        initialize_params(vocabulary_model(), Origins(backbone["path"], artifact=absent), KEY)


def test_initial_artifact_of_other_rank_error(backbone, tmp_path):
    params = {
        "shared": np.ones((1, tiny.PROMPT, tiny.WIDTH), np.float32),
        "task_left": np.ones((1, tiny.PROMPT, 2), np.float32),
        "task_right": np.ones((1, 2, tiny.WIDTH), np.float32),
    }
    path = artifacts.save_artifact(
        tmp_path / "a",
        MPT(tiny.PROMPT, rank=2),
        params,
        Runs(["mnli"]),
        digests={
            "embedding_sha256": digest(backbone),
            "backbone_sha256": weights_digest(backbone),
            "vocabulary_sha256": None,
        },
        backbone="tiny",
        step=1,
    )
    with pytest.raises(ValueError, match=r"task_left: expected \(3, 3, 1\), found \(3, 3, 2\)"):
        initialize_params(vocabulary_model(), Origins(backbone["path"], artifact=str(path)), KEY)


# --- The state -----------------------------------------------------------------------------------


def test_create_train_state_splits_trainable_and_frozen():
    model = tiny.model()
    params = tiny.params(model)
    state = create_train_state(model, params, PjitPartitioner())
    assert int(state.step) == 0
    assert set(flatten(state.trainable)) == {f"prompt/{n}" for n in params["prompt"]}
    tiny.close(state.params, params, 0)
    assert num_params(state.trainable) == 3 * 16 + 3 * (3 + 16)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
    assert sum(leaf.size for leaf in moments) == 2 * num_params(state.trainable)


def test_create_train_state_nothing_trainable_error():
    model = tiny.model(prompt=get_method("none")())
    with pytest.raises(ValueError, match="No parameter is trainable"):
        create_train_state(model, tiny.params(model), PjitPartitioner())
