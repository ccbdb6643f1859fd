"""Protocol and registry of prompt methods.

A method defines its parameters (shapes, initial values and labels), how a prompt is composed from
them, and how a new task starts from a trained artifact. Composing a prompt needs neither tokens
nor the backbone; at most, it reads one pooled vector of the text. A prompt is not
concatenated to the text: it is written into positions that the batch reserves for it
(`encoder_prompt_slots`), so mixing tasks in a batch and packing cost nothing extra.
"""

from __future__ import annotations

import dataclasses
import types
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from mpt_jax.core import schema
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs, data_name, look_up
from mpt_jax.core.shapes import Array, Float, Int, Key, Params
from mpt_jax.core.tree import Rules

# Prompts are composed in float32; a TPU multiplies in bfloat16 by default.
FLOAT32 = jax.lax.Precision.HIGHEST


# The weights [in, out] of each layer, by path without layer numbers; none for a backbone that
# adapters cannot change.
Kernels = Mapping[str, Sequence[Any]]
NO_KERNELS: Kernels = types.MappingProxyType({})


@runtime_checkable
class Vocabulary(Protocol):
    """The part of a SeqIO vocabulary that initializers need."""

    def encode(self, s: str) -> Sequence[int]:
        """Returns the token ids of a text, without an end-of-sequence id."""
        ...


@dataclasses.dataclass(frozen=True)
class InitContext:
    """Inputs to prompt initializers.

    Attributes:
        embedding: [V, H] the backbone's token embeddings.
        vocabulary: turns words into ids; only the text and class-label initializers need it.
        parts: the number of equal parts of a prompt that start alike, such as one for each class.
        kernels: the weights [in, out] of every layer that an adapter can change, as JAX or NumPy
            arrays, by path without layer numbers.
    """

    embedding: Array
    vocabulary: Vocabulary | None = None
    parts: int = dataclasses.field(default=1, kw_only=True)
    kernels: Kernels = dataclasses.field(default_factory=dict, kw_only=True)


class PromptContext(NamedTuple):
    """Inputs to `PromptMethod.compose` besides the parameters and the bank rows.

    Attributes:
        pooled: [..., H] elementwise maximum of the input's token embeddings, excluding padding and
            the prompt. Only methods with `reads_text` need it.
        key: random key of the training step, for methods with `is_random`; None composes the
            prompt used for evaluation and serving.
        numbers: [...] the number of each example among those of its run in the whole batch, from 0,
            for methods that draw for each example; None counts the given examples.
        image_features: [..., U] normalized features of the images, for methods with `reads_image`.
    """

    pooled: Float[Array, "... H"] | None = None
    key: Key | None = None
    numbers: Int[Array, "..."] | None = None
    image_features: Float[Array, "... U"] | None = None


NO_CONTEXT = PromptContext()


class BatchRows(NamedTuple):
    """The bank row of every position of a batch of texts.

    Attributes:
        encoder: [B, T].
        decoder: [B, L].
        packed: whether a row of the batch may hold examples of several bank rows.
    """

    encoder: Int[Array, "B T"]
    decoder: Int[Array, "B L"]
    packed: bool


@runtime_checkable
class PromptMethod(Protocol):
    """A prompt method. The object holds its configuration; parameters are passed to its methods.

    Parameters are a tree of float32 arrays.

    Attributes:
        name: the name in the registry and in artifacts.
        prompt_length: P, in positions; the length of the longest prompt if lengths differ.
        labels: (regular expression for the path below `prompt/`, label) rules that cover every
            parameter of the method.
        axes: the logical axis names of each parameter, which determine its sharding. A parameter
            has one entry per group if its first axis is `'groups'`, and one per bank row if it is
            `'tasks'`.
        reads_text: whether a prompt depends on the text that follows it.
        reads_image: whether a prompt depends on the image that is classified.
        adapts: whether the method changes layers of the backbone (`layer_updates`).
        is_random: whether prompts are composed with random draws in training.
        needs_artifact: whether training requires an initial artifact.
        depends_on_run_names: whether prompts depend on run names, not only on bank rows and
            groups.
        schedule_steps: the length of the method's schedule in training steps; 0 if it has none.
        candidates: the names of the J prompts that each prompt is mixed from; empty if the method
            does not mix prompts.
    """

    name: str
    prompt_length: int
    labels: Rules
    axes: dict[str, tuple[str, ...]]
    reads_text: bool = False
    reads_image: bool = False
    adapts: bool = False
    is_random: bool = False
    needs_artifact: bool = False
    depends_on_run_names: bool = False
    schedule_steps: int = 0
    candidates: tuple[str, ...] = ()

    @property
    def reads_input(self) -> bool:
        """Whether a prompt depends on the example, so that a run has no plain prompt."""
        return self.reads_text or self.reads_image

    def init(self, key: Key, runs: Runs, context: InitContext) -> dict[str, Array]:
        """Returns initial parameters, which depend on the key and run names, not on bank rows."""
        ...

    def compose(
        self,
        params: Params,
        runs: Runs,
        task_ids: Int[Array, "..."],
        given: PromptContext = NO_CONTEXT,
    ) -> Array:
        """Returns the prompts [..., P, H] of the bank rows `task_ids` [...]."""
        ...

    def transfer(
        self,
        source: Params,
        source_method: PromptMethod,
        source_runs: Runs,
        runs: Runs,
        initial: Callable[[], dict[str, Array]] = dict,
    ) -> dict[str, Array]:
        """Returns parameters for new runs that start from a trained artifact.

        Args:
            source: the artifact's parameters.
            source_method: the artifact's prompt method.
            source_runs: the artifact's runs.
            runs: the new runs.
            initial: returns newly initialized parameters (`init`), for those that the artifact
                cannot provide.
        """
        ...

    def config(self) -> dict[str, Any]:
        """Returns the settings an artifact records to rebuild the method, as JSON values."""
        ...

    # --- Defaults that few methods override ------------------------------------------------------

    @classmethod
    def read_config(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the settings that an artifact of any version records, as of this version."""
        return settings

    def prompt_lengths(self, runs: Runs) -> tuple[int, ...]:
        """Returns the prompt length of each of the K bank rows, at most P.

        `compose` always returns P positions; those beyond a prompt's length are ignored.
        """
        return (self.prompt_length,) * runs.num_rows

    def has_variable_lengths(self, runs: Runs) -> bool:
        """Whether the prompts of some bank rows are shorter than P."""
        return min(self.prompt_lengths(runs)) < self.prompt_length

    def source_prompt_length(self, source_method: PromptMethod, source_runs: Runs) -> int:
        """Returns the prompt length that an artifact must have for this method to start from it."""
        del source_method, source_runs
        return self.prompt_length

    def mixture(
        self,
        params: Params,
        runs: Runs,
        task_ids: Int[Array, "..."],
        given: PromptContext = NO_CONTEXT,
    ) -> Array:
        """Returns the weight [..., J] of each candidate in the prompts that `compose` returns."""
        raise NotImplementedError(
            f"The method {self.name!r} does not mix prompts, so it has no mixture weights. Call "
            "`mixture` only if the method has `candidates`."
        )

    def layer_updates(self, params: Params, rows: BatchRows) -> dict[str, Any]:
        """Returns the updates of the backbone's layers (`backbones.layer_updates`) for a batch, by
        path without layer numbers; axis 0 of every array is the layer. {} for prompts."""
        del params, rows
        return {}

    @property
    def parts(self) -> dict[str, PromptMethod]:
        """The methods of which this method consists, by the name below which their parameters are;
        itself, under the empty name, for a method that composes one prompt."""
        return {"": self}

    def separated(self, params: Params, runs: Runs) -> tuple[PromptMethod, Params]:
        """Returns a method and parameters that compose the same prompts, each of the `parts` by
        itself."""
        del runs
        return self, params

    def statistics(self, params: Params, runs: Runs) -> dict[str, float]:
        """Returns numbers that compare the prompts of runs in a group, for the log of an
        evaluation, given the parameters as NumPy arrays."""
        del params, runs
        return {}

    @property
    def inference_method(self) -> PromptMethod:
        """The method that an artifact saves, without settings that only training needs."""
        return self

    def for_inference(self, params: Params) -> tuple[PromptMethod, Params]:
        """Returns `inference_method`, and the parameters to save in an artifact.

        They compose the same prompts, but omit parameters that only training needs.
        """
        return self.inference_method, params


_METHODS: dict[str, Callable[..., PromptMethod]] = {}


def register(cls: Any) -> Any:
    """Class decorator that registers a method under its `name`."""
    if cls.name in _METHODS:
        raise ValueError(
            f"A prompt method named {cls.name!r} is already registered. Choose another `name` for "
            f"{cls.__name__}."
        )
    _METHODS[cls.name] = cls
    return cls


# Methods made of others, one per site (`sites.SitePrompts`), by name.
_COMPOSITES: dict[str, Any] = {}


def register_composite(cls: Any) -> Any:
    """Class decorator that registers a method made of other methods, which artifacts can name but
    `method_names` does not list."""
    _COMPOSITES[cls.name] = cls
    return cls


def get_method(name: str) -> Callable[..., PromptMethod]:
    """Returns the class of a registered method.

    Raises:
        ValueError: the method is unknown; the message lists the known methods.
    """
    return look_up("prompt method", name, _METHODS)


def method_from_config(name: str, settings: Mapping[str, Any], what: str) -> PromptMethod:
    """Builds a method from the settings that `PromptMethod.config` returned.

    Args:
        name: the method's name.
        settings: JSON values.
        what: the file that holds them; the subject of the error's first sentence.

    Raises:
        ValueError: the method or a setting is unknown, or a value has another type or is out of
            range.
    """
    if name in _COMPOSITES:
        return _COMPOSITES[name].from_config(settings, what)
    cls: Any = get_method(name)
    settings = cls.read_config(settings)
    hints = typing.get_type_hints(cls)
    fields = {field.name: _of_json(hints[field.name]) for field in dataclasses.fields(cls)}
    known = {setting: kind for setting, kind in fields.items() if kind is not None}
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(
            f"{what} has settings that the method {name!r} does not have: {abbreviate(unknown)}. "
            f"Its settings are {', '.join(known)}. Read it with the version of MPT-JAX that wrote "
            "it, or copy it again."
        )
    required = {x.name for x in dataclasses.fields(cls) if x.default is dataclasses.MISSING}
    if missing := sorted(required - set(settings)):
        raise ValueError(
            f"{what} lacks settings of the method {name!r}: {', '.join(missing)}. Copy it again, "
            "or repeat the command that wrote it."
        )
    for setting, value in settings.items():
        is_size = setting in ("prompt_length", "length", "rank")
        kind = schema.Positive if is_size else known[setting]
        schema.check(value, kind, f"{what} (setting {setting} of the method {name!r})")
    return cls(**settings)


def _of_json(kind: Any) -> Any:
    """Returns the type that a field's value has in JSON; None for unsaved initializers.

    For a field that takes either a settings object or a mapping (`Annealing | Mapping`), that is
    the type of the object.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if any(map(dataclasses.is_dataclass, arguments)):
            arguments = [x for x in arguments if typing.get_origin(x) is not Mapping]
        arguments = [_of_json(x) for x in arguments]
        return None if None in arguments else typing.Union[tuple(arguments)]  # noqa: UP007
    if origin in (Sequence, Mapping):
        return None if None in map(_of_json, arguments) else kind
    plain = kind in (int, float, str, bool, type(None)) or dataclasses.is_dataclass(kind)
    return kind if plain else None


def method_names() -> tuple[str, ...]:
    """Returns the names of all registered methods that compose one prompt, of a text or at a site
    of an image model, sorted. Those that need an image, and adapters, are left out."""
    classes: Any = _METHODS
    return tuple(sorted(x for x, cls in classes.items() if not cls.reads_image and not cls.adapts))


def params_of_parts(
    method: PromptMethod, params: Params, runs: Runs
) -> dict[str, tuple[PromptMethod, Params]]:
    """Returns each of a method's parts with its parameters, after separating them."""
    method, params = method.separated(params, runs)
    parts = method.parts.items()
    return {name: (part, params[name] if name else params) for name, part in parts}


def row_axes(method: PromptMethod) -> dict[str, str]:
    """Returns which parameters have one entry per group and which have one per bank row.

    Keys are path names (`prompt/...`); values are `'groups'` or `'tasks'`. Other parameters are
    omitted.
    """
    first = {f"prompt/{name}": axes[0] for name, axes in method.axes.items() if axes}
    return {name: axis for name, axis in first.items() if axis in ("groups", "tasks")}


def prompt_length_of(method: PromptMethod) -> int:
    """Returns the prompt length P of a method, for use in gin files."""
    return method.prompt_length


def name_key(key: Key, name: str) -> Key:
    """Returns a random key for a run's name.

    The key does not depend on the run's bank row, the other runs of the job or the learning rate,
    so a run has the same initial values in a job of one run and in a fleet.
    """
    return jax.random.fold_in(key, name_hash(name))


def name_hash(name: str) -> int:
    """Returns a 32-bit hash of a run's name without its settings, to fold into random keys."""
    return zlib.crc32(data_name(name).encode())


def source_rows(source_runs: Runs, start_from: str, named_only: bool = False) -> list[int]:
    """Returns the rows of a source artifact that a new task starts from.

    Args:
        source_runs: the runs of the artifact.
        start_from: `'average'` for all rows, otherwise the name of one run.
        named_only: whether to reject `'average'` over several rows, for methods that cannot
            average, such as the example in CONTRIBUTING.md.

    Raises:
        ValueError: the artifact has no such run, or `'average'` is rejected.
    """
    if start_from != "average":
        return [source_runs.row(start_from)]
    if named_only and source_runs.num_rows > 1:
        raise ValueError(
            "START_FROM = 'average' needs an artifact with a single run, because this method "
            f"cannot average prompts, but the artifact has {source_runs.num_rows} runs: "
            f"{', '.join(source_runs.run_names)}. Set START_FROM to one of these names."
        )
    return list(range(source_runs.num_rows))
