"""What a prompt method is, the registry of methods, and how a prompt meets the text.

A method owns its parameters: their shapes, initial values, labels, how a prompt is composed from
them, and how a new task starts from a trained artefact. It never sees tokens or the backbone; of a
text it may ask for one pooled vector. A prompt is not concatenated to the text: it is written into
positions that the batch reserves for it (`encoder_prompt_slots`), so mixing tasks in a batch, and
packing, cost nothing extra.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.runs import Runs, data_name, unknown_name
from mpt_jax.core.shapes import Array, Float, Int, Key, Params
from mpt_jax.core.tree import Rules

# Prompts are composed in float32; by default a TPU would multiply in bfloat16.
FLOAT32 = jax.lax.Precision.HIGHEST


@runtime_checkable
class Vocabulary(Protocol):
    """The part of a SeqIO vocabulary that initial values need."""

    def encode(self, s: str) -> Sequence[int]:
        """Token ids of a text, without an end-of-sequence id."""
        ...


@dataclasses.dataclass(frozen=True)
class InitContext:
    """What initial values may look at.

    Attributes:
        embedding: [V, H] the backbone's token embeddings.
        vocabulary: turns words into ids; only the text and class-label initialisers need it.
    """

    embedding: Array
    vocabulary: Vocabulary | None = None


@runtime_checkable
class Grouped(Protocol):
    """What composing a prompt reads of `Runs`; a bank whose rows the compiler does not know has
    only this."""

    @property
    def group_of_row(self) -> Any:
        """[K]."""
        ...

    @property
    def num_groups(self) -> int:
        """G."""
        ...


class Given(NamedTuple):
    """What a prompt is composed for, beside its task.

    Attributes:
        pooled: [..., H] the largest value of each feature over the embeddings of the input's
            tokens, without padding and prompt; for methods with `reads_text`.
        key: of the training step, for methods with `is_random`; None composes the prompt that is
            evaluated and served.
    """

    pooled: Float[Array, "... H"] | None = None
    key: Key | None = None


PLAIN = Given()


@runtime_checkable
class PromptMethod(Protocol):
    """A prompt method. Configuration lives in the object, parameters in a tree of float32.

    Attributes:
        name: the name in the registry and in artefacts.
        prompt_length: P, in positions; of prompts of several lengths the longest.
        labels: (path below `prompt/`, label) rules that cover every parameter of the method.
        axes: parameter name -> logical axis names. They say how a parameter is sharded, and the
            first one what its rows are: `'groups'`, `'tasks'`, or anything else for none.
        reads_text: whether a prompt depends on the text it stands before.
        is_random: whether training composes prompts at random.
        needs_artefact: whether prompts cannot start without an initial artefact.
        knows_runs: whether prompts depend on runs' names, beside rows and groups.
        own_steps: training steps that a schedule of the method's own takes; 0 without one.
        candidates: names of the C prompts that each prompt is mixed from, if it is.
    """

    name: str
    prompt_length: int
    labels: Rules
    axes: dict[str, tuple[str, ...]]
    reads_text: bool = False
    is_random: bool = False
    needs_artefact: bool = False
    knows_runs: bool = False
    own_steps: int = 0
    candidates: tuple[str, ...] = ()

    def init(self, key: Key, runs: Runs, context: InitContext) -> dict[str, Array]:
        """Initial parameters. A run's values depend on the key and its name, not on its row."""
        ...

    def compose(
        self, params: Params, runs: Runs, task_ids: Int[Array, "..."], given: Given = PLAIN
    ) -> Array:
        """The prompts [..., P, H] of the given bank rows [...]."""
        ...

    def transfer(
        self,
        source: Params,
        source_method: PromptMethod,
        source_runs: Runs,
        runs: Runs,
        initial: Callable[[], dict[str, Array]] = dict,
    ) -> dict[str, Array]:
        """Parameters for `runs`, started from a trained artefact of `source_runs`; `initial` makes
        those of `init`, for what an artefact cannot give."""
        ...

    def config(self) -> dict[str, Any]:
        """What an artefact must record to build the method again, JSON values only."""
        ...

    # --- What few methods do otherwise -----------------------------------------------------------

    def prompt_lengths(self, runs: Runs) -> tuple[int, ...]:
        """The positions [K] that the prompt of each row takes, at most P; what `compose` gives
        behind them is not read."""
        return (self.prompt_length,) * runs.num_rows

    def start_length(self, source_method: PromptMethod, source_runs: Runs) -> int:
        """The P of an artefact that prompts can start from."""
        del source_method, source_runs
        return self.prompt_length

    def mixture(
        self, params: Params, runs: Runs, task_ids: Int[Array, "..."], given: Given = PLAIN
    ) -> Array:
        """The weight [..., C] of each candidate in the prompts that `compose` makes."""
        raise NotImplementedError(f"{self.name!r} mixes no candidates.")

    def release(self, params: Params) -> tuple[PromptMethod, Params]:
        """The method and the parameters that an artefact keeps: without what only training needs,
        and the same prompts."""
        return self, params


_METHODS: dict[str, Callable[..., PromptMethod]] = {}


def register(cls: Any) -> Any:
    """Class decorator: makes a method known under its `name`."""
    if cls.name in _METHODS:
        raise ValueError(f"A prompt method named {cls.name!r} is already registered.")
    _METHODS[cls.name] = cls
    return cls


def get_method(name: str) -> Callable[..., PromptMethod]:
    """The class of a registered method.

    Raises:
        ValueError: no such method; lists the known ones.
    """
    if name not in _METHODS:
        raise ValueError(unknown_name("prompt method", name, method_names()))
    return _METHODS[name]


def method_names() -> tuple[str, ...]:
    """Every registered method, sorted."""
    return tuple(sorted(_METHODS))


def rows_of(method: PromptMethod) -> dict[str, str]:
    """What the rows of each parameter count, `'groups'` or `'tasks'`, by path name (`prompt/...`);
    parameters without rows are left out."""
    first = {f"prompt/{name}": axes[0] for name, axes in method.axes.items() if axes}
    return {name: axis for name, axis in first.items() if axis in ("groups", "tasks")}


def length_of(method: PromptMethod) -> int:
    """P of a method, for gin."""
    return method.prompt_length


def ends_early(method: PromptMethod, runs: Runs) -> bool:
    """Whether the prompts of some rows take fewer than P positions."""
    return min(method.prompt_lengths(runs)) < method.prompt_length


def fold(method: PromptMethod, params: Params, runs: Runs) -> Float[Array, "K P H"]:
    """One plain prompt per bank row: what a server needs and nothing more.

    Raises:
        ValueError: prompts depend on the text, so that no row has one, or differ in length.
    """
    lengths = set(method.prompt_lengths(runs))
    if len(lengths) > 1:
        raise ValueError(
            f"The prompts of {', '.join(runs.run_names)} have several lengths, {sorted(lengths)}, "
            "and are no one array; take the artefact of one run."
        )
    return _every_prompt(method, params, runs)[:, : max(lengths)]


def plain_prompts(method: PromptMethod, params: Params, runs: Runs) -> list[np.ndarray]:
    """The plain prompt [P, H] of each bank row, each of its own length.

    Raises:
        ValueError: prompts depend on the text.
    """
    prompts = np.asarray(_every_prompt(method, params, runs))
    lengths = method.prompt_lengths(runs)
    return [prompt[:length] for prompt, length in zip(prompts, lengths, strict=True)]


def plain_weights(method: PromptMethod, params: Params, runs: Runs) -> Float[np.ndarray, "K C"]:
    """The weight of each candidate in the plain prompt of each bank row.

    Raises:
        NotImplementedError: the method mixes no candidates.
        ValueError: prompts depend on the text.
    """
    params = _alone(method, params)
    return np.asarray(method.mixture(params, runs, jnp.arange(runs.num_rows)))


def _every_prompt(method: PromptMethod, params: Params, runs: Runs) -> Float[Array, "K P H"]:
    return method.compose(_alone(method, params), runs, jnp.arange(runs.num_rows))


def _alone(method: PromptMethod, params: Params) -> Params:
    """The parameters, if they make prompts without a text."""
    if method.reads_text:
        raise ValueError(
            f"The prompts of the method {method.name!r} depend on the text they stand before, so "
            "there is no one prompt of a task to fold, or to start another method from."
        )
    # Whoever kept the best step of a run kept it as NumPy arrays.
    return jax.tree.map(jnp.asarray, params)


def name_key(key: Key, name: str) -> Key:
    """A key for a run's name: the same wherever the name stands in a bank, so that a run starts
    from the same values alone and among others, and whatever its learning rate is."""
    return jax.random.fold_in(key, name_number(name))


def name_number(name: str) -> int:
    """The 32 bits by which a run's name enters a key."""
    return zlib.crc32(data_name(name).encode())


def group_leaders(runs: Runs) -> list[int]:
    """The row each group is initialised by: its first."""
    return [runs.group_of_row.index(group) for group in range(runs.num_groups)]


# The mesh's axes that both examples and the rows of runs are split over, while a step is traced
# whose examples lie on the shard of their run.
_SPLIT_OVER: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("axes", default=())


@contextlib.contextmanager
def rows_split_over(axes: tuple[str, ...]) -> Iterator[None]:
    """Inside, `take` reads rows of tables that are split over these axes of the mesh, for examples
    that are split over them too and lie on the shard of their row."""
    token = _SPLIT_OVER.set(axes)
    try:
        yield
    finally:
        _SPLIT_OVER.reset(token)


def take(table: Float[Array, "rows ..."], ids: Int[Array, "..."]) -> Array:
    """`table[ids]`: the rows of some examples. Inside `rows_split_over` every shard looks into its
    own rows, so nothing of the table, nor of its gradient, travels."""
    axes = _SPLIT_OVER.get()
    if not axes:
        return table[ids]

    def on_shard(rows: Array, ids: Array) -> Array:
        return rows[ids - jax.lax.axis_index(axes) * rows.shape[0]]

    split = jax.sharding.PartitionSpec(axes)
    return jax.shard_map(on_shard, in_specs=(split, split), out_specs=split)(table, ids)


def of_groups(table: Float[Array, "G ..."], runs: Grouped, task_ids: Int[Array, "..."]) -> Array:
    """What the group of each example has; of one group alone without the examples' axes, so that
    nothing is repeated."""
    if runs.num_groups == 1:
        return table[0]
    return take(table, jnp.asarray(runs.group_of_row)[task_ids])


def aligned(values: Array, axes: int) -> Array:
    """Values with axes of size one in front, until they have as many as given."""
    return values.reshape((1,) * (axes - values.ndim) + values.shape)


def source_rows(source_runs: Runs, start_from: str, named_only: bool = False) -> list[int]:
    """Bank rows of a source artefact that a new task starts from.

    Args:
        source_runs: the rows of the artefact.
        start_from: `'average'` for all rows, else the name of one run.
        named_only: refuses `'average'` over several rows (a method that cannot average).
    """
    if start_from != "average":
        return [source_runs.row(start_from)]
    if named_only and source_runs.num_rows > 1:
        raise ValueError(
            "This method starts from one source prompt, and the artefact holds "
            f"{source_runs.num_rows}: {', '.join(source_runs.run_names)}. Set start_from to one."
        )
    return list(range(source_runs.num_rows))


def place(prompts: Float[Array, "B P H"], embedded: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
    """Writes prompts into the first P positions, which the feature converter reserved for them.

    For unpacked batches only: there slot i+1 is position i of every example.
    """
    length = prompts.shape[1]
    if embedded.shape[1] < length:
        raise ValueError(
            f"A prompt of {length} positions does not fit a row of {embedded.shape[1]}: the "
            "feature converter must reserve prompt_length positions in front of the text."
        )
    if length == 0:
        return embedded
    return jnp.concatenate([prompts.astype(embedded.dtype), embedded[:, length:]], axis=1)


def place_rows(
    rows: Float[Array, "B T H"], embedded: Float[Array, "B T H"], slots: Int[Array, "B T"]
) -> Float[Array, "B T H"]:
    """Writes a prompt row into every position that is a prompt slot, wherever it lies."""
    return jnp.where(slots[..., None] > 0, rows.astype(embedded.dtype), embedded)
