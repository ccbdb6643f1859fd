"""What a prompt method is, the registry of methods, and how a prompt meets the text.

A method owns its parameters: their shapes, initial values, labels, how a prompt is composed from
them, and how a new task starts from a trained artifact. It never sees tokens or the backbone; of a
text it may ask for one pooled vector. A prompt is not concatenated to the text: it is written into
positions that the batch reserves for it (`encoder_prompt_slots`), so mixing tasks in a batch, and
packing, cost nothing extra.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from mpt_jax.core.runs import Runs, data_name, look_up
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
        vocabulary: turns words into ids; only the text and class-label initializers need it.
    """

    embedding: Array
    vocabulary: Vocabulary | None = None


class PromptContext(NamedTuple):
    """What a prompt is composed for, beside its task.

    Attributes:
        pooled: [..., H] the largest value of each feature over the embeddings of the input's
            tokens, without padding and prompt; for methods with `reads_text`.
        key: of the training step, for methods with `is_random`; None composes the prompt that is
            evaluated and served.
    """

    pooled: Float[Array, "... H"] | None = None
    key: Key | None = None


NO_CONTEXT = PromptContext()


@runtime_checkable
class PromptMethod(Protocol):
    """A prompt method. Configuration lives in the object, parameters in a tree of float32.

    Attributes:
        name: the name in the registry and in artifacts.
        prompt_length: P, in positions; of prompts of several lengths the longest.
        labels: (path below `prompt/`, label) rules that cover every parameter of the method.
        axes: parameter name -> logical axis names. They say how a parameter is sharded, and the
            first one what its rows are: `'groups'`, `'tasks'`, or anything else for none.
        reads_text: whether a prompt depends on the text it stands before.
        is_random: whether training composes prompts at random.
        needs_artifact: whether prompts cannot start without an initial artifact.
        depends_on_run_names: whether prompts depend on runs' names, beside rows and groups.
        schedule_steps: training steps that a schedule of the method's own takes; 0 without one.
        candidates: names of the J prompts that each prompt is mixed from, if it is.
    """

    name: str
    prompt_length: int
    labels: Rules
    axes: dict[str, tuple[str, ...]]
    reads_text: bool = False
    is_random: bool = False
    needs_artifact: bool = False
    depends_on_run_names: bool = False
    schedule_steps: int = 0
    candidates: tuple[str, ...] = ()

    def init(self, key: Key, runs: Runs, context: InitContext) -> dict[str, Array]:
        """Initial parameters. A run's values depend on the key and its name, not on its row."""
        ...

    def compose(
        self,
        params: Params,
        runs: Runs,
        task_ids: Int[Array, "..."],
        given: PromptContext = NO_CONTEXT,
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
        """Parameters for `runs`, started from a trained artifact of `source_runs`; `initial` makes
        those of `init`, for what an artifact cannot give."""
        ...

    def config(self) -> dict[str, Any]:
        """What an artifact must record to build the method again, JSON values only."""
        ...

    # --- What few methods do otherwise -----------------------------------------------------------

    def prompt_lengths(self, runs: Runs) -> tuple[int, ...]:
        """The positions [K] that the prompt of each row takes, at most P; what `compose` gives
        behind them is not read."""
        return (self.prompt_length,) * runs.num_rows

    def has_variable_lengths(self, runs: Runs) -> bool:
        """Whether the prompts of some rows take fewer than P positions."""
        return min(self.prompt_lengths(runs)) < self.prompt_length

    def source_prompt_length(self, source_method: PromptMethod, source_runs: Runs) -> int:
        """The P of an artifact that prompts can start from."""
        del source_method, source_runs
        return self.prompt_length

    def mixture(
        self,
        params: Params,
        runs: Runs,
        task_ids: Int[Array, "..."],
        given: PromptContext = NO_CONTEXT,
    ) -> Array:
        """The weight [..., J] of each candidate in the prompts that `compose` makes."""
        raise NotImplementedError(f"{self.name!r} mixes no candidates.")

    def for_inference(self, params: Params) -> tuple[PromptMethod, Params]:
        """The method and the parameters that an artifact keeps: without what only training needs,
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
    return look_up("prompt method", name, _METHODS)


def method_names() -> tuple[str, ...]:
    """Every registered method, sorted."""
    return tuple(sorted(_METHODS))


def row_axes(method: PromptMethod) -> dict[str, str]:
    """What the rows of each parameter count, `'groups'` or `'tasks'`, by path name (`prompt/...`);
    parameters without rows are left out."""
    first = {f"prompt/{name}": axes[0] for name, axes in method.axes.items() if axes}
    return {name: axis for name, axis in first.items() if axis in ("groups", "tasks")}


def prompt_length_of(method: PromptMethod) -> int:
    """P of a method, for gin."""
    return method.prompt_length


def name_key(key: Key, name: str) -> Key:
    """A key for a run's name: the same wherever the name stands in a bank, so that a run starts
    from the same values alone and among others, and whatever its learning rate is."""
    return jax.random.fold_in(key, name_hash(name))


def name_hash(name: str) -> int:
    """The 32 bits by which a run's name enters a key."""
    return zlib.crc32(data_name(name).encode())


def source_rows(source_runs: Runs, start_from: str, named_only: bool = False) -> list[int]:
    """Bank rows of a source artifact that a new task starts from.

    Args:
        source_runs: the rows of the artifact.
        start_from: `'average'` for all rows, else the name of one run.
        named_only: refuses `'average'` over several rows (a method that cannot average).
    """
    if start_from != "average":
        return [source_runs.row(start_from)]
    if named_only and source_runs.num_rows > 1:
        raise ValueError(
            "This method starts from one source prompt, and the artifact holds "
            f"{source_runs.num_rows}: {', '.join(source_runs.run_names)}. Set start_from to one."
        )
    return list(range(source_runs.num_rows))
