"""Exported folders: outputs in a fresh process compared with the training model."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

from mpt_jax.artifacts import artifacts
from mpt_jax.artifacts.backbone_digest import backbone_digest
from mpt_jax.batching import tokenizers
from mpt_jax.convert import load_backbone, save_t5x
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.plan import chips
from mpt_jax.runtime.paths import SHIPPED
from mpt_jax.serving import export
from mpt_jax.serving.export import __main__ as command
from mpt_jax.serving.export.writing import Settings, write
from mpt_jax.serving.prompt_bank import Bank
from tests.fixtures import serving_fixtures
from tests.fixtures.hf_tokenizers import folder_of_json, trained, with_ends
from tests.fixtures.processes import run_script

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = Settings(("cpu", "tpu", "cuda"), (8, 24), serving_fixtures.LIMITS.target_length)
TEXTS = ("ok", "fine film", "a text of more tokens", "b", "cc")
TARGETS = ("yes", "no", "perhaps", "?", "y")
TASKS = ("alpha", "gamma", "beta", "beta", "alpha")
# JAX, NumPy and safetensors are enough; Flax is not needed.
BLOCKED = (
    "import sys\nfor name in ('flax', 'tensorflow', 'torch', 'orbax'): sys.modules[name] = None\n"
)


def make(folder, kind):
    bank = Bank(
        [serving_fixtures.of_kind(folder / "artifact", kind)],
        folded=serving_fixtures.KINDS[kind][1],
    )
    write(folder / "exported", bank, serving_fixtures.backbone(), SETTINGS)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Makes an exported folder of each kind once; tests change only copies of it."""
    return functools.cache(lambda kind: make(tmp_path_factory.mktemp("export"), kind))


@pytest.fixture(scope="module")
def folder(exports):
    return exports("factors")


@pytest.fixture(scope="module", params=["factors", "folded"])
def either(request, exports):
    return exports(request.param)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=() if kind in ("factors", "folded") else pytest.mark.slow)
        for kind in serving_fixtures.KINDS
    ],
)
def any_kind(request, exports):
    return exports(request.param)


def run(script, cwd, *arguments):
    """Runs a script in a fresh process; returns its last printed line, parsed as JSON."""
    variables = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    printed = run_script(script, *arguments, cwd=cwd, fresh=True, **variables)
    return json.loads(printed.splitlines()[-1])


def ids(text):
    return [*serving_fixtures.VOCABULARY.encode(text), 1]


def test_export_in_fresh_process_matches_training_model(any_kind):
    script = BLOCKED + (
        "import json\n"
        "from mpt_jax.serving.export import load\n"
        "found = load(sys.argv[1])\n"
        "texts, targets, tasks = json.loads(sys.argv[2])\n"
        "rows = [found.row(task) for task in tasks]\n"
        "tokens, scores = found.predict(texts, rows)\n"
        "scored = found.score(texts, targets, rows)\n"
        "alone = found.score(texts[2:3], targets[2:3], rows[2:3])\n"
        "print(json.dumps([x.tolist() for x in (tokens, scores, scored, alone)]))\n"
    )
    asked = [[ids(x) for x in TEXTS], [ids(x) for x in TARGETS], TASKS]
    exported = any_kind / "exported"
    tokens, scores, scored, alone = run(script, any_kind, exported, json.dumps(asked))
    found = artifacts.load_artifact(any_kind / "artifact")
    for i, (task, text, target) in enumerate(zip(TASKS, TEXTS, TARGETS, strict=True)):
        prediction, score = serving_fixtures.expected(found, task, text)
        assert serving_fixtures.VOCABULARY.decode(tokens[i]) == prediction
        assert scores[i] == pytest.approx(score, rel=1e-4)
        assert scored[i] == pytest.approx(
            serving_fixtures.expected(found, task, text, target), rel=1e-4
        )
    assert alone == [pytest.approx(scored[2], rel=1e-4)]


def test_export_readme_code_runs_without_this_library(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "exported/README.md").read_text(), re.S)
    script = (
        f"{BLOCKED}sys.modules['mpt_jax'] = None\n{code}\n"
        "print(json.dumps([ids.tolist(), scores.tolist()]))"
    )
    tokens, scores = run(script, folder / "exported")
    assert np.shape(tokens) == (2, serving_fixtures.LIMITS.target_length) and len(scores) == 2
    loaded = export.load(folder / "exported")
    again = loaded.predict([[5, 6, 1], [7, 1]], [0, 2])
    np.testing.assert_array_equal(tokens, again[0])
    np.testing.assert_allclose(scores, again[1], rtol=1e-5)


def test_export_functions_have_all_platforms_and_no_weights(folder):
    exported = folder / "exported"
    for path in exported.glob("*.jax"):
        found = jax_export.deserialize(bytearray(path.read_bytes()))
        assert found.platforms == ("cpu", "tpu", "cuda")
        assert "tpu_custom_call" not in found.mlir_module(), "plain operations everywhere"
        # Constants are small tables such as T5's relative positions. The embedding, the smallest
        # weight matrix that is used many times, is larger.
        embedding = serving_fixtures.backbone().params["token_embedder"]["embedding"]
        constants = re.findall(r"dense<\"0x([0-9A-F]+)\"", found.mlir_module())
        assert all(len(constant) / 2 < embedding.nbytes / 4 for constant in constants)
    assert sorted(path.name for path in exported.iterdir()) == [
        *("README.md", "backbone.safetensors", "config.json", "predict_24.jax", "predict_8.jax"),
        *("prompts.safetensors", "score_24.jax", "score_8.jax"),
    ]


@contextlib.contextmanager
def uncached():
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, least)
    jax.config.update(least, math.inf)
    try:
        yield
    finally:
        jax.config.update(least, before)


def test_export_functions_compile_for_tpu(folder):
    pytest.importorskip("libtpu")
    device = chips.devices("v5e:2x2")[0]
    on_chip = jax.sharding.SingleDeviceSharding(device)
    found = jax_export.deserialize(bytearray((folder / "exported/predict_8.jax").read_bytes()))
    rows = {"b": 4}
    size = lambda n: n if isinstance(n, int) else rows[str(n)]  # noqa: E731
    shapes = [
        jax.ShapeDtypeStruct(tuple(map(size, x.shape)), x.dtype, sharding=on_chip)
        for x in found.in_avals
    ]
    arguments, named = jax.tree.unflatten(found.in_tree, shapes)
    with uncached():  # programs compiled for an absent chip cannot be read from the cache
        compiled = jax.jit(found.call).lower(*arguments, **named).compile()
    assert compiled.memory_analysis().argument_size_in_bytes > 0


def test_export_exchanged_prompts_match_training_model(either, tmp_path):
    other = serving_fixtures.artifact(tmp_path / "other", seed=5)
    loaded = export.load(either / "exported")
    arrays = Bank([other], folded=loaded.config["folded"]).arrays
    loaded.prompts = {f"prompt/{name}": value for name, value in arrays["prompt"].items()} | {
        "group_of_row": arrays["group_of_row"]
    }
    tokens, scores = loaded.predict([ids("ok")], [loaded.row("beta")])
    prediction, score = serving_fixtures.expected(other, "beta", "ok")
    assert serving_fixtures.VOCABULARY.decode(np.asarray(tokens)[0].tolist()) == prediction
    assert float(scores[0]) == pytest.approx(score, rel=1e-4)


def test_export_bfloat16_weights_stay_bfloat16(tmp_path):
    backbone = serving_fixtures.backbone()
    half = backbone._replace(
        config=backbone.config.__class__(**{**vars(backbone.config), "dtype": "bfloat16"}),
        params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), backbone.params),
    )
    bank = Bank([serving_fixtures.artifact(tmp_path / "artifact")])
    write(tmp_path / "out", bank, half, Settings(("cpu",), (8,), 4))
    loaded = export.load(tmp_path / "out")
    assert {str(x.dtype) for x in loaded.backbone.values()} == {"bfloat16"}
    assert np.isfinite(loaded.score([ids("ok")], [ids("yes")], [0])).all()


# --- Errors --------------------------------------------------------------------------------------


def test_export_hugging_face_tokenizer_is_read_back(tmp_path):
    vocabulary = tokenizers.load(str(folder_of_json(tmp_path / "t5", with_ends(trained()))))
    digest = artifacts.vocabulary_digest(vocabulary)
    backbone = serving_fixtures.backbone()._replace(vocabulary=vocabulary, vocabulary_sha256=digest)
    bank = Bank([serving_fixtures.of_kind(tmp_path / "artifact", "folded")], folded=True)
    record = write(tmp_path / "out", bank, backbone, Settings(("cpu",), (8,), 4))
    again = tokenizers.load(str(tmp_path / "out"))
    assert artifacts.vocabulary_digest(again) == record["vocabulary_sha256"] == digest
    assert again.encode("def f") == vocabulary.encode("def f")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "| `tokenizer_config.json`, `tokenizer.json` | the Hugging Face tokenizer |" in readme
    assert export.load(tmp_path / "out").config["eos_id"] == 2


def test_export_changed_or_missing_file_fails(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder / "exported", copy)
    weights = copy / "backbone.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match="backbone.safetensors differs from the file.*sha256"):
        export.load(copy)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="--without-weights"):
        export.load(copy)
    loaded = export.load(copy, folder / "exported" / "backbone.safetensors")
    with pytest.raises(ValueError, match="'delta'.*alpha, beta, gamma"):
        loaded.row("delta")
    with pytest.raises(ValueError, match="texts has 25 tokens; the limit is 24"):
        loaded.predict([[3] * 25], [0])
    with pytest.raises(FileNotFoundError, match="no config.json"):
        export.load(tmp_path)


def test_export_changed_config_fails_and_config_of_earlier_version_is_read(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder / "exported", copy)
    config = json.loads((copy / "config.json").read_text())
    swapped = config | {"names": config["names"][::-1]}
    (copy / "config.json").write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match="config.json was changed .* its config_sha256 is"):
        export.load(copy)
    del swapped["config_sha256"]
    (copy / "config.json").write_text(json.dumps(swapped))
    assert export.load(copy).names == swapped["names"]


def test_export_function_that_calls_other_code_fails(folder, tmp_path):
    """XLA's callback, for example, uses a number of the file as a pointer, and crashes Python."""
    target = "xla_ffi_python_cpu_callback"
    result = jax.ShapeDtypeStruct((2,), jnp.float32)
    call = jax.jit(lambda x: jax.ffi.ffi_call(target, result)(x, index=np.uint64(0)))
    allowed = [jax_export.DisabledSafetyCheck.custom_call(target)]
    hostile = jax_export.export(call, disabled_checks=allowed)(jnp.zeros(2))
    copy = tmp_path / "copy"
    shutil.copytree(folder / "exported", copy)
    content = bytes(hostile.serialize())
    (copy / "score_24.jax").write_bytes(content)
    config = json.loads((copy / "config.json").read_text())
    config["files_sha256"]["score_24.jax"] = hashlib.sha256(content).hexdigest()
    del config["config_sha256"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"score_24.jax calls code outside.*@{target}"):
        export.load(copy)


@pytest.mark.parametrize("row", [-1, 3, 1000])
def test_export_unknown_row_fails(row, folder):
    loaded = export.load(folder / "exported")  # of three tasks, in a bank with room for four
    with pytest.raises(ValueError, match=f"no row {row}: the 3 tasks have rows 0 to 2"):
        loaded.predict([ids("ok"), ids("ok")], [2, row])
    with pytest.raises(ValueError, match=f"no row {row}"):
        loaded.score([ids("ok")], [ids("a")], [row])
    readme = (folder / "exported" / "README.md").read_text()
    assert "0 to 2" in readme and "a prompt of zeros" in readme


def test_export_unknown_task_lists_few_names(folder):
    loaded = export.load(folder / "exported")
    loaded.names = [f"task_{i:05}" for i in range(10_000)]
    with pytest.raises(ValueError, match="task_00019 and 9980 more") as error:
        loaded.row("delta")
    assert len(str(error.value)) < 400


def test_export_checked_bytes_are_loaded_bytes(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(folder / "exported", copy)
    whole = Path.read_bytes

    def changed_afterwards(path):
        found = whole(path)
        path.write_bytes(found[:-4] + b"\xff\xff\xff\x7f")
        return found

    before = export.load(folder / "exported")
    monkeypatch.setattr(Path, "read_bytes", changed_afterwards)
    after = export.load(copy)
    for mine, theirs in ((after.backbone, before.backbone), (after.prompts, before.prompts)):
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def test_export_existing_folder_fails_before_work(folder, tmp_path, monkeypatch, capsys):
    bank = Bank([serving_fixtures.artifact(tmp_path / "artifact")])
    monkeypatch.setattr("mpt_jax.serving.export.writing.Functions", None)
    with pytest.raises(FileExistsError, match="exported already exists"):
        write(folder / "exported", bank, serving_fixtures.backbone(), SETTINGS)
    monkeypatch.setattr(Bank, "load", None)
    with pytest.raises(SystemExit) as ended:
        command.main(["--prompts", "none", "--out", str(folder / "exported")])
    assert ended.value.code == 2 and "already exists" in capsys.readouterr().err


def test_export_settings_invalid_values_fail(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"Unknown platforms: 'gpu'. Set --platforms to names from cpu, tpu, cuda",
    ):
        Settings(("gpu",))
    with pytest.raises(ValueError, match="positive lengths"):
        Settings(input_lengths=())


def test_export_command_other_weights_refused_digest_recorded(tmp_path, capsys):
    checkpoint = SHIPPED / "tiny_t5" / "checkpoint_10000"
    leaves = flatten(load_backbone(checkpoint))
    name = "encoder/layers_0/attention/query/kernel"
    other = save_t5x(tmp_path, unflatten({**leaves, name: leaves[name] * 1.1}), 0)

    def write(out, *arguments):
        sizes = ["--input-lengths", "8", "--target-length", "4", "--platforms", "cpu"]
        given = ["--prompts", str(SHIPPED / "tiny_t5" / "mpt_source"), "--out", str(tmp_path / out)]
        command.main([*given, *sizes, "--without-weights", *arguments])
        return json.loads((tmp_path / out / "config.json").read_text())["backbone_sha256"]

    vocabulary = ["--vocabulary", str(SHIPPED / "toy.model"), "--extra-ids", "16"]
    with pytest.raises(SystemExit) as ended:
        write("refused", "--backbone", str(other), *vocabulary)
    assert ended.value.code == 2 and "sha256 of its weights" in capsys.readouterr().err
    assert write("right") == backbone_digest(unflatten(leaves))
    assert write("off", "--backbone", str(other), *vocabulary, "--no-backbone-digest") is None
    assert "Only the backbone's embedding was checked" in capsys.readouterr().err


def test_export_command_writes_shipped_prompts(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--prompts", str(SHIPPED / "tiny_t5" / "mpt_source"), "--out", str(out)]
    sizes = ["--input-lengths", "8", "--target-length", "4", "--platforms", "cpu"]
    command.main([*arguments, *sizes, "--without-weights"])
    said = capsys.readouterr().out
    assert "predict and score for cpu, 6 tasks, inputs of 8 tokens" in said
    assert not (out / "backbone.safetensors").exists() and (out / "vocabulary.model").exists()
    assert "without the backbone's weights" in (out / "README.md").read_text()
    with pytest.raises(SystemExit) as ended:
        command.main([*arguments, *sizes])
    assert ended.value.code == 2 and "already exists" in capsys.readouterr().err
