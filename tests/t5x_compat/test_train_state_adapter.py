"""The train state for T5X, tested without T5X; test_real_t5x.py tests it with T5X."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load

from mpt_jax.artifacts import artifacts
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.prompts.sites import IMAGE, TEXT
from mpt_jax.t5x_compat import train_state_adapter
from mpt_jax.training import initialization
from tests.fixtures import tiny, tiny_clip

APART = Runs(tiny.RUNS.task_names, groups="independent")


@pytest.fixture(scope="module")
def host() -> train_state_adapter.Host:
    model = tiny.model(APART)
    return train_state_adapter.Host(
        model, initialization.Origins(scratch=True), model.optimizer_def, partitioner=None
    )


def first_state(host: train_state_adapter.Host) -> train_state_adapter.HostState:
    params = tiny.params(host.model)
    opt_state = host.optimizer.init(host.split(params)[0])
    return train_state_adapter.HostState(jnp.zeros((), jnp.int32), params, opt_state, host)


def gradients(state: train_state_adapter.HostState, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state.params)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_host_state_non_finite_update_only_counts_step(host, bad):
    step = jax.jit(lambda state, grads: state.apply_gradient(grads, None))
    state = step(first_state(host), gradients(first_state(host)))
    grads = gradients(state, 1)
    grads["prompt"]["task_right"] = grads["prompt"]["task_right"].at[1, 0, 2].set(bad)
    after = step(state, grads)
    assert (int(state.step), int(after.step)) == (1, 2)
    tiny.close(after.params, state.params, 0)
    tiny.close(after.param_states, state.param_states, 0)
    again = step(after, gradients(state, 1))
    assert np.any(again.params["prompt"]["shared"] != after.params["prompt"]["shared"])
    # The skipped update does not count in schedules or bias correction.
    tiny.close(again.params, step(state, gradients(state, 1)).params, 0)


def test_host_state_ignores_gradients_of_frozen_parameters(host):
    state = first_state(host)
    grads = gradients(state)
    grads["encoder"] = jax.tree.map(lambda x: x * np.nan, grads["encoder"])
    after = state.apply_gradient(grads, None)
    tiny.close(after.params["encoder"], state.params["encoder"], 0)
    assert np.any(after.params["prompt"]["shared"] != state.params["prompt"]["shared"])


def test_artifact_hook_non_finite_prompts_keep_earlier_artifact(
    host, tmp_path, monkeypatch, caplog
):
    state = first_state(host)
    host._loaded = initialization.InitialParams(state.params, "0" * 64, "0" * 64, None)
    monkeypatch.setattr(train_state_adapter, "_HOSTS", [host])
    (hook,) = train_state_adapter.save_hooks(str(tmp_path))
    good = {"target": {"prompt": state.params["prompt"]}, "state": {"step": 3}}
    assert hook(good, "infos") == (good, "infos")
    written = artifacts.load_artifact(tmp_path / "artifact")
    assert written.config["step"] == 3
    card = (tmp_path / "artifact" / "README.md").read_text()
    assert "| step | 3 |" in card and "Nothing was measured" in card
    trained = sum(leaf.size for leaf in flatten(state.params["prompt"]).values())
    assert f"| trainable parameters | {trained} |" in card
    tiny.close(written.params, state.params["prompt"], 0)
    prompt = dict(state.params["prompt"])
    prompt["task_left"] = prompt["task_left"].at[0, 0, 0].set(np.nan)
    with caplog.at_level("ERROR"):
        hook({"target": {"prompt": prompt}, "state": {"step": 6}}, "infos")
    assert "step 6 are not finite (task_left)" in caplog.text
    kept = artifacts.load_artifact(tmp_path / "artifact")
    assert kept.config["step"] == 3
    assert all(np.isfinite(leaf).all() for leaf in flatten(kept.params).values())


@pytest.mark.parametrize(
    ("model", "prompts"),
    [
        (tiny.model(APART), set(APART.run_names)),
        (
            tiny_clip.model(),
            {f"{run}/{site}" for run in tiny_clip.RUNS.run_names for site in (TEXT, IMAGE)},
        ),
    ],
    ids=["texts", "images"],
)
def test_artifact_hook_writes_the_plain_prompts_that_the_card_promises(
    model, prompts, tmp_path, monkeypatch
):
    host = train_state_adapter.Host(
        model, initialization.Origins(scratch=True), model.optimizer_def, partitioner=None
    )
    params = (tiny if model.decode_fn else tiny_clip).params(model)
    host._loaded = initialization.InitialParams(params, "0" * 64, "0" * 64, None)
    monkeypatch.setattr(train_state_adapter, "_HOSTS", [host])
    (hook,) = train_state_adapter.save_hooks(str(tmp_path))
    hook({"target": {"prompt": params["prompt"]}, "state": {"step": 3}}, "infos")
    tensors = load((tmp_path / "artifact" / artifacts.TENSORS).read_bytes())
    assert {name for name in tensors if name.startswith("folded/")} == {
        f"folded/{name}" for name in prompts
    }
    if not model.decode_fn:
        assert "below `folded/`" in (tmp_path / "artifact" / "README.md").read_text()
        for row, run in enumerate(tiny_clip.RUNS.run_names):
            expected = params["prompt"][TEXT]["table"][row]
            np.testing.assert_array_equal(tensors[f"folded/{run}/{TEXT}"], expected)
