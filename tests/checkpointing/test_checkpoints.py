"""Checkpoints: round trips, size, corruption, transient read errors, and data positions."""

import logging as standard_logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from mpt_jax.checkpointing import checkpoint_config, checksums, data_position
from mpt_jax.checkpointing import corruption as damage_of_files
from mpt_jax.checkpointing.checkpoint_config import SaveCheckpointConfig
from mpt_jax.checkpointing.checkpoints import Checkpoints
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from tests.fixtures import tiny


@pytest.fixture(scope="module")
def state():
    """A state in which all saved values differ from each other."""
    model = tiny.model()
    made = tiny.state(model, tiny.params(model))
    rng = np.random.default_rng(0)

    def different(leaf):
        if leaf.ndim < 2:
            return leaf + 3
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return made.replace(
        trainable=jax.tree.map(different, made.trainable),
        opt_state=jax.tree.map(different, made.opt_state),
    )


def at(state, step: int):
    """The state after `step` steps: every saved value has changed."""
    move = lambda leaf: leaf + jnp.asarray(step, leaf.dtype)  # noqa: E731
    return state.replace(
        step=jnp.asarray(step, jnp.int32),
        trainable=jax.tree.map(move, state.trainable),
        opt_state=jax.tree.map(move, state.opt_state),
    )


def zeroed(state):
    """The same structure and frozen parameters, but none of the saved values."""
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)  # noqa: E731
    return state.replace(
        step=jnp.zeros((), jnp.int32),
        trainable=zeros(state.trainable),
        opt_state=zeros(state.opt_state),
    )


def write(path, state, steps, keep=None) -> None:
    made = Checkpoints(str(path), keep)
    for step in steps:
        made.save(at(state, step), {"position": f"after {step}", "digest": "d"})
    made.wait()
    made.close()


def read(path, state, **arguments):
    made = Checkpoints(str(path), None)
    try:
        return made.restore(zeroed(state), **arguments)
    finally:
        made.close()


def same(found, expected) -> None:
    assert int(found.step) == int(expected.step)
    for part in ("trainable", "opt_state", "frozen"):
        tiny.close(getattr(found, part), getattr(expected, part), 0, part + "/")


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def errors_in(caplog) -> str:
    records = [r for r in caplog.records if r.levelno >= standard_logging.ERROR]
    return "\n".join(record.getMessage() for record in records)


@pytest.fixture
def loud(caplog):
    """absl's log, captured by pytest."""
    logger = logging.get_absl_logger()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# --- Round trips ---------------------------------------------------------------------------------


def test_checkpoints_restore_returns_exact_state_and_meta(state, tmp_path):
    write(tmp_path, state, [5, 9])
    found, meta = read(tmp_path, state)
    same(found, at(state, 9))
    assert (meta["position"], meta["digest"]) == ("after 9", "d")
    earlier, meta = read(tmp_path, state, step=5)
    same(earlier, at(state, 5))
    assert meta["position"] == "after 5"


def test_checkpoints_restore_empty_folder_returns_none(state, tmp_path):
    assert read(tmp_path, state) is None


def test_checkpoints_save_keeps_latest_and_skips_saved_step(state, tmp_path):
    write(tmp_path, state, [1, 2, 3, 3, 4], keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_3", "checkpoint_4"]
    made = Checkpoints(str(tmp_path), None)
    assert made.steps == [3, 4]
    made.save(at(state, 4).replace(trainable=zeroed(state).trainable), {})
    made.close()
    same(read(tmp_path, state)[0], at(state, 4))


def test_checkpoint_size_excludes_backbone(tmp_path):
    """The backbone is large enough that file overhead does not matter."""
    config = tiny.config(vocab_size=2000, emb_dim=64, mlp_dim=512)
    model = tiny.model(Runs(["a"]), PromptTuning(tiny.PROMPT), config)
    state = tiny.state(model, tiny.params(model))
    write(tmp_path, state, [1])
    backbone = sum(leaf.nbytes for leaf in jax.tree.leaves(state.frozen))
    prompt = sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable))
    size = size_of(tmp_path / "checkpoint_1")
    assert size < 0.05 * backbone
    assert size < 3 * prompt + 20_000, "prompt, two moments, and names"
    names = {str(p) for p in tmp_path.rglob("*")}
    assert not any("embedder" in name or "encoder" in name for name in names)


def test_checkpoints_read_only_restore_writes_nothing(state, tmp_path):
    write(tmp_path, state, [1, 2])
    stray = tmp_path / "checkpoint_3.orbax-checkpoint-tmp"
    stray.mkdir()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    reader = Checkpoints(str(tmp_path), 1, read_only=True)
    assert reader.steps == [1, 2]
    same(reader.restore(zeroed(state))[0], at(state, 2))
    reader.close()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


# --- Corruption ----------------------------------------------------------------------------------


def files_of(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def test_checkpoints_restore_any_file_truncated_returns_intact_state(state, tmp_path, loud):
    """Either the file is not needed, or the previous checkpoint is used and both are logged."""
    write(tmp_path / "whole", state, [5, 9])
    names = files_of(tmp_path / "whole" / "checkpoint_9")
    fallen = 0
    for i, name in enumerate(names):
        path = tmp_path / f"damaged{i}"
        shutil.copytree(tmp_path / "whole", path)
        target = path / "checkpoint_9" / name
        content = target.read_bytes()
        target.write_bytes(content[: len(content) // 2])
        loud.clear()
        found, meta = read(path, state)
        step = int(found.step)
        same(found, at(state, step))
        assert meta["position"] == f"after {step}"
        if step == 5:
            fallen += 1
            message = errors_in(loud)
            assert f"{path}/checkpoint_9 cannot be read" in message, name
            assert f"Resuming from {path}/checkpoint_5" in message, name
    assert fallen >= 2, f"some of {names} are needed"


@pytest.mark.parametrize("gone", ["state", "meta"])
def test_checkpoints_restore_item_missing_uses_previous(state, tmp_path, loud, gone):
    write(tmp_path, state, [5, 9])
    shutil.rmtree(tmp_path / "checkpoint_9" / gone)
    same(read(tmp_path, state)[0], at(state, 5))
    assert "checkpoint_9 cannot be read" in errors_in(loud)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        TimeoutError("no answer"),
        OSError(5, "Input/output error"),
        ValueError('UNAVAILABLE: Error opening "zarr" driver: could not resolve host'),
        RuntimeError("whatever a store may say"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("item", ["meta", "state"])
def test_checkpoints_restore_transient_read_error_keeps_checkpoint(
    state, tmp_path, monkeypatch, item, error
):
    write(tmp_path, state, [5, 9])
    whole = Checkpoints._read

    def read_item(self, step, which, args):
        if which == item:
            raise error
        return whole(self, step, which, args)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_read", read_item)
        with pytest.raises(OSError, match="checkpoint_9 could not be read now.*rename") as caught:
            read(tmp_path, state)
    assert str(error).partition("\n")[0] in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_5", "checkpoint_9"]
    same(read(tmp_path, state)[0], at(state, 9))


def test_checkpoints_restore_file_cannot_open_not_corruption(state, tmp_path):
    """TensorStore's error for too many symbolic links, which stands for any system error."""
    write(tmp_path, state, [5, 9])
    manifest = tmp_path / "checkpoint_9" / "state" / "manifest.ocdbt"
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.symlink_to(manifest)
    with pytest.raises(OSError, match="checkpoint_9 could not be read now"):
        read(tmp_path, state)
    manifest.unlink()
    manifest.write_bytes(content)
    same(read(tmp_path, state)[0], at(state, 9))


def test_checkpoints_deeply_nested_metadata_of_orbax_error_names_the_file(state, tmp_path):
    write(tmp_path, state, [1])
    (tmp_path / "checkpoint_1" / "_CHECKPOINT_METADATA").write_text("[" * 100_000)
    with pytest.raises(OSError, match=f"_CHECKPOINT_METADATA file in {tmp_path} is damaged"):
        Checkpoints(str(tmp_path), read_only=True)


def test_checkpoints_set_aside_after_rename_fails_error(state, tmp_path, monkeypatch):
    write(tmp_path, state, [5, 9])

    def refuse(self, steps):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Checkpoints, "_set_aside", refuse)
    saved = Checkpoints(str(tmp_path), None)
    with pytest.raises(OSError, match="could not be renamed: .*checkpoint_9.*Permission denied"):
        saved.rename_unreadable_after(5)
    saved.close()


def damage(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_checkpoints_restore_all_corrupt_error_names_them(state, tmp_path):
    write(tmp_path, state, [5, 9])
    damage(tmp_path / "checkpoint_5")
    damage(tmp_path / "checkpoint_9")
    with pytest.raises(OSError, match="checkpoint_9 cannot.*checkpoint_5 cannot.*No readable") as e:
        read(tmp_path, state)
    assert str(tmp_path) in str(e.value)
    assert "Restore" in str(e.value) and "emove" not in str(e.value), "nothing is destroyed"


def test_checkpoints_restore_corrupt_step_error_lists_other_steps(state, tmp_path):
    """A requested checkpoint is not replaced by another one."""
    write(tmp_path / "several", state, [3, 5, 9])
    damage(tmp_path / "several" / "checkpoint_5")
    with pytest.raises(OSError, match="checkpoint_5 cannot be read") as caught:
        read(tmp_path / "several", state, step=5)
    message = str(caught.value)
    assert "(checkpoint_3, checkpoint_9)" in message and "checkpoint_5 from a copy" in message
    assert "No other checkpoint" not in message and "MODEL_DIR" not in message
    same(read(tmp_path / "several", state, step=9)[0], at(state, 9))
    write(tmp_path / "single", state, [5])
    damage(tmp_path / "single" / "checkpoint_5")
    with pytest.raises(OSError, match="No other checkpoint is in .*checkpoint_5 from a copy"):
        read(tmp_path / "single", state, step=5)


def test_checkpoints_meta_corrupt_error_lists_other_steps(state, tmp_path):
    write(tmp_path, state, [5, 9])
    damage(tmp_path / "checkpoint_9" / "meta")
    saved = Checkpoints(str(tmp_path), read_only=True)
    with pytest.raises(OSError, match=r"checkpoint_9 cannot be read.*\(checkpoint_5\)"):
        saved.meta(9)
    saved.close()


def test_checkpoints_set_aside_after_renames_and_step_saved_again(state, tmp_path, loud):
    write(tmp_path, state, [5, 9])
    damage(tmp_path / "checkpoint_9")
    made = Checkpoints(str(tmp_path), None)
    found, _ = made.restore(zeroed(state))
    made.rename_unreadable_after(int(found.step))
    assert made.steps == [5]
    assert (tmp_path / "unreadable_checkpoint_9").is_dir()
    made.save(at(state, 9), {"position": "again"})
    made.wait()
    made.close()
    found, meta = read(tmp_path, state)
    same(found, at(state, 9))
    assert meta["position"] == "again"
    assert "unreadable_checkpoint_9" in errors_in(loud)


def test_checkpoints_restore_any_bit_flipped_returns_intact_state(tmp_path):
    """The leaves are so large that the array store keeps them in blocks without checksums."""
    model = tiny.model(Runs(["a"]), PromptTuning(200), tiny.config(vocab_size=300, emb_dim=128))
    state = tiny.state(model, tiny.params(model))
    write(tmp_path / "whole", state, [5, 9])
    newest = tmp_path / "whole" / "checkpoint_9"
    files = files_of(newest)
    largest = max(files, key=lambda name: (newest / name).stat().st_size)
    rng, steps = np.random.default_rng(0), []
    for i, name in enumerate([*files, *[largest] * 6]):
        path = tmp_path / f"damaged{i}"
        shutil.copytree(tmp_path / "whole", path)
        content = bytearray((path / "checkpoint_9" / name).read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (path / "checkpoint_9" / name).write_bytes(content)
        found, meta = read(path, state)
        steps.append(int(found.step))
        same(found, at(state, steps[-1]))
        assert meta["position"] == f"after {steps[-1]}"
    assert steps[-6:] == [5] * 6, "a bit of the values was flipped"


def test_checkpoints_restore_changed_values_logs_leaves(tmp_path, state, loud):
    write(tmp_path, state, [5, 9])
    saved = Checkpoints(str(tmp_path))
    read_whole = saved._read

    def flipped(step, item, args):
        tree = read_whole(step, item, args)
        if item == "state" and step == 9:
            tree["trainable"] = jax.tree.map(lambda x: x.at[..., 0].add(1e-6), tree["trainable"])
        return tree

    saved._read = flipped
    found, _ = saved.restore(zeroed(state))
    saved.close()
    assert int(found.step) == 5
    assert "The values of trainable/prompt/shared" in errors_in(loud)


class Elsewhere:
    """Another process of the job: its statuses at the points where all processes agree."""

    def __init__(self, monkeypatch, *met: int):
        self.asked, self._met = [], iter(met)
        monkeypatch.setattr(damage_of_files, "_worst", self._worst)

    def _worst(self, mine: int) -> int:
        self.asked.append(mine)
        return max(mine, next(self._met, 0))


FINE, DAMAGED, UNREAD = range(3)


def test_checkpoints_restore_other_process_finds_corruption_skipped(
    state, tmp_path, monkeypatch, loud
):
    write(tmp_path, state, [5, 9])
    other = Elsewhere(monkeypatch, FINE, FINE, DAMAGED)  # metadata, arrays, checksums
    found, _ = read(tmp_path, state)
    assert int(found.step) == 5, "both resume from the same checkpoint"
    assert other.asked == [FINE] * 6
    assert "another process of this job failed; see its log" in errors_in(loud)


def test_checkpoints_restore_this_process_finds_corruption_reported(state, tmp_path, monkeypatch):
    write(tmp_path, state, [5, 9])
    check, other = checksums.check, Elsewhere(monkeypatch)

    def flipped(found, expected):
        check({**found, "step": found["step"] ^ (len(other.asked) == 2)}, expected)

    monkeypatch.setattr(checksums, "check", flipped)
    assert int(read(tmp_path, state)[0].step) == 5
    assert other.asked == [FINE, FINE, DAMAGED, FINE, FINE, FINE]


@pytest.mark.parametrize(
    ("met", "message"), [(DAMAGED, "cannot be read"), (UNREAD, "could not be read now")]
)
def test_checkpoints_meta_other_process_cannot_read_error(
    met, message, state, tmp_path, monkeypatch
):
    write(tmp_path, state, [5])
    saved = Checkpoints(str(tmp_path), read_only=True)
    assert saved.meta(5)["position"] == "after 5"
    Elsewhere(monkeypatch, met)
    with pytest.raises(OSError, match=f"checkpoint_5 {message}.*another process"):
        saved.meta(5)
    saved.close()


# --- Another configuration -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        tiny.model(prompt=PromptTuning(tiny.PROMPT)),
        tiny.model(prompt=MPT(tiny.PROMPT, rank=2)),
        tiny.model(Runs(["alpha", "beta"])),
        tiny.model(prompt=MPT(tiny.PROMPT + 1)),
    ],
    ids=["method", "rank", "tasks", "length"],
)
def test_checkpoints_restore_other_configuration_error(state, tmp_path, other):
    write(tmp_path, state, [5])
    with pytest.raises(ValueError) as error:
        read(tmp_path, tiny.state(other, tiny.params(other)))
    message = str(error.value)
    assert "another configuration" in message and "choose another MODEL_DIR" in message
    assert str(tmp_path / "checkpoint_5") in message
    assert "prompt/" in message, "parameters that differ are named"
    assert (tmp_path / "checkpoint_5").is_dir(), "nothing is lost"


# --- Settings and positions ----------------------------------------------------------------------


def test_checkpoint_config_ineffective_settings_error():
    with pytest.raises(ValueError, match="dtype='bfloat16' would have no effect"):
        SaveCheckpointConfig(dtype="bfloat16")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SaveCheckpointConfig(period=0)
    with pytest.raises(ValueError, match="got 'best'"):
        checkpoint_config.RestoreCheckpointConfig(mode="best")


def test_checkpoints_save_fails_error_names_last_complete(state, tmp_path, monkeypatch):
    saved = Checkpoints(str(tmp_path))
    saved.save(at(state, 3), {})
    saved.wait()

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved._manager, "save", full)
    with pytest.raises(OSError, match="No space left.*complete checkpoint is checkpoint_3"):
        saved.save(at(state, 12), {})
    monkeypatch.setattr(saved._manager, "wait_until_finished", full)
    with pytest.raises(OSError, match="No space left.*complete checkpoint is checkpoint_3"):
        saved.wait()


class Batches:
    """Training data whose position is the number of batches taken."""

    def __init__(self):
        self.taken = 0

    def __next__(self):
        self.taken += 1

    def state(self):
        return str(self.taken).encode()

    def restore(self, position):
        self.taken = int(position)


def test_data_position_behind_taken_batches_restores_step():
    batches = Batches()
    position = data_position.DataPosition(batches)
    early = position.at(2, taken=6)
    batches.taken = 6
    position.at(6, taken=6)
    batches.taken = 11
    late = position.at(8, taken=11)
    for saved, step in ((early, 2), (late, 8)):
        resumed = Batches()
        again = data_position.DataPosition(resumed)
        again.restore(saved, step)
        assert resumed.taken == step
        # A second failure, before anything was saved, counts from the same position.
        assert again.at(step + 1, taken=step + 4) == {**saved, "skip": saved["skip"] + 1}
    assert data_position.DataPosition(None).at(3, 3) is None
    # As earlier versions saved it: a list with the position of each process.
    listed = data_position.DataPosition(resumed)
    listed.restore({"packed": [late["packed"]], "skip": 0}, 6)
    assert resumed.taken == 6
    with pytest.raises(ValueError, match="2 data positions, one per process"):
        listed.restore({"packed": [late["packed"]] * 2, "skip": 0}, 6)


def test_state_fixture_saved_leaves_all_differ(state):
    """Otherwise a test above could pass with swapped leaves."""
    arrays = [leaf for leaf in flatten(state.opt_state).values() if leaf.ndim > 1]
    arrays += list(flatten(state.trainable).values())
    values = np.concatenate([np.ravel(leaf) for leaf in arrays])
    assert len(np.unique(values)) == len(values)
