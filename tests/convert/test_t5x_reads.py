"""The real T5X restores our checkpoints in both formats, with its own checkpoint manager."""

import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mpt_jax.backbones.t5 import T5Config, Transformer
from mpt_jax.convert.t5x import write_orbax, write_t5x
from mpt_jax.core.tree import flatten
from tests.fixtures import real_t5x

pytestmark = [
    *real_t5x.NEEDED,
    # T5X leaves sockets and event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def real_modules():
    """Removes the fallback, which other tests of this process may have imported as `t5x`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "t5x"]:
            patch.delitem(sys.modules, name)
        yield


@pytest.mark.parametrize("write", [write_t5x, write_orbax])
def test_write_t5x_checkpoint_is_restored_by_t5x(write, tmp_path):
    from t5x import checkpoints, partitioning, train_state

    assert getattr(sys.modules["t5x"], "__embedded__", False) is False
    config = T5Config(vocab_size=20, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=12)
    tokens = jnp.ones((1, 2), jnp.int32)
    variables = Transformer(config).init(jax.random.key(0), tokens, tokens > 0, tokens)
    expected = jax.tree.map(np.asarray, flax.core.unfreeze(variables["params"]))
    folder = tmp_path / "checkpoint_5"
    folder.mkdir()
    write(epath.Path(folder), expected, 5)

    zeros = {**variables, "params": jax.tree.map(jnp.zeros_like, variables["params"])}
    state = train_state.InferenceState.create(flax.core.freeze(zeros))
    manager = checkpoints.OrbaxCheckpointManagerInterface(
        str(tmp_path), state, partitioning.PjitPartitioner(num_partitions=1)
    )
    restored = manager.restore(path=str(folder))
    assert int(restored.step) == 5
    found = flatten(flax.core.unfreeze(restored.params))
    for name, leaf in flatten(expected).items():
        np.testing.assert_array_equal(found.pop(name), leaf, err_msg=name)
    assert not found
