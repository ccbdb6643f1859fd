"""Unified prompt tuning (UPT, Zang et al. 2022, arXiv 2210.07225): one small transformer that the
text and image prompts of a task pass through.

The prompts of all sites are projected to one width, attend to each other as the tokens of one
sequence, and are projected back. Only training needs the transformer: its outputs are plain
prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from mpt_jax.core import schema
from mpt_jax.core.runs import unknown_name
from mpt_jax.core.shapes import Array, Float, Key, Params
from mpt_jax.core.tree import unflatten
from mpt_jax.prompts.base import FLOAT32, NO_CONTEXT, name_key, register_composite
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.row_ops import first_row_of_groups, gather_rows
from mpt_jax.prompts.sites import IMAGE, TEXT, SitePrompts
from mpt_jax.prompts.warm_start import group_weights, source_weights, weighted_mean

TOKENS, NONE = "tokens", "none"
PRE_LN, UPT_PAPER = "pre_ln", "upt_paper"
_EPSILON = 1e-5  # of torch's layer norm
_ATTENTION = ("query", "key", "value")


TRANSFORMER = "transformer"


@dataclasses.dataclass(frozen=True)
class PromptTransformer:
    """One transformer layer with one head and a QuickGELU MLP of four times its width.

    Attributes:
        width: D, the width of its tokens.
        mixing: `'tokens'` lets every token attend to all tokens; `'none'` only to itself. MVLPT's
            released code does the latter, because it swaps the axes of batch and tokens.
        block: `'pre_ln'`, `y = x + SA(LN(x))` then `y + MLP(LN(y))`, as in MVLPT's released code;
            or `'upt_paper'`, `y = SA(x) + LN(x)` then `MLP(LN(y)) + LN(y)`.

    Raises:
        ValueError: a setting is unknown or out of range.
    """

    width: int = 128
    mixing: str = TOKENS
    block: str = PRE_LN

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(
                f"PromptTransformer.width must be at least 1, got {self.width}. Raise MIXER_WIDTH."
            )
        if self.mixing not in (TOKENS, NONE):
            raise ValueError(unknown_name("MIXING", self.mixing, (TOKENS, NONE)))
        if self.block not in (PRE_LN, UPT_PAPER):
            raise ValueError(unknown_name("MIXER_BLOCK", self.block, (PRE_LN, UPT_PAPER)))

    def axes(self, sites: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
        """Returns the logical axes of the parameters, for prompts at these sites."""
        names = self._shapes(dict.fromkeys(sites, 1))
        return {name: ("groups", *("joint", "rank")[-len(x) :]) for name, x in names.items()}

    def init(self, keys: Sequence[Key], widths: Mapping[str, int]) -> dict[str, Array]:
        """Returns initial parameters [G, ...] by path name.

        As torch initializes linear layers and multi-head attention: uniform in ±1/sqrt(fan-in),
        queries, keys and values in ±sqrt(6 / (D + 3 D)), and biases of the attention 0.

        Args:
            keys: random key of each of the G groups.
            widths: H of the prompts of each site.
        """
        shapes = self._shapes(widths)
        params = {}
        for number, (name, shape) in enumerate(sorted(shapes.items())):
            layer, part = name.rsplit("/", 1)
            if part == "scale":
                values = jnp.ones((len(keys), *shape))
            elif layer.startswith("norm") or (
                part == "bias" and layer in (*_ATTENTION, "attention_out")
            ):
                values = jnp.zeros((len(keys), *shape))
            else:
                fan_in = shapes[f"{layer}/kernel"][0]
                bound = (1.5 if layer in _ATTENTION else 1.0) ** 0.5 * fan_in**-0.5
                drawn = [jax.random.fold_in(key, number) for key in keys]
                values = jnp.stack(
                    [jax.random.uniform(x, shape, minval=-bound, maxval=bound) for x in drawn]
                )
            params[name] = values
        return params

    def __call__(
        self, params: Params, prompts: Mapping[str, Float[Array, "_ _"]]
    ) -> dict[str, Float[Array, "_ _"]]:
        """Returns the prompts of all sites of one task, mixed.

        Args:
            params: the parameters of the task's group, as nested mappings.
            prompts: rows [P, H] by site; their order is that of the tokens.
        """
        tokens = jnp.concatenate([_dense(params[f"{site}_in"], x) for site, x in prompts.items()])
        tokens = self._block(params, tokens)
        mixed, first = {}, 0
        for site, rows in prompts.items():
            mixed[site] = _dense(params[f"{site}_out"], tokens[first : first + len(rows)])
            first += len(rows)
        return mixed

    def _block(self, params: Params, x: Float[Array, "n D"]) -> Float[Array, "n D"]:
        normalized = _layer_norm(params["norm_1"], x)
        if self.block == PRE_LN:
            x = x + self._attention(params, normalized)
            return x + _mlp(params, _layer_norm(params["norm_2"], x))
        x = self._attention(params, x) + normalized
        normalized = _layer_norm(params["norm_2"], x)
        return _mlp(params, normalized) + normalized

    def _attention(self, params: Params, x: Float[Array, "n D"]) -> Float[Array, "n D"]:
        query, key, value = (_dense(params[name], x) for name in _ATTENTION)
        if self.mixing == TOKENS:
            scores = jnp.matmul(query, key.T, precision=FLOAT32) * self.width**-0.5
            value = jnp.matmul(jax.nn.softmax(scores), value, precision=FLOAT32)
        return _dense(params["attention_out"], value)

    def _shapes(self, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each parameter of a group, by path name."""
        d = self.width
        layers = {f"{site}_in": (width, d) for site, width in widths.items()}
        layers |= {f"{site}_out": (d, width) for site, width in widths.items()}
        layers |= dict.fromkeys((*_ATTENTION, "attention_out"), (d, d))
        layers |= {"mlp_in": (d, 4 * d), "mlp_out": (4 * d, d)}
        norms = {f"norm_{i}/{part}": (d,) for i in (1, 2) for part in ("scale", "bias")}
        kernels = {f"{name}/kernel": shape for name, shape in layers.items()}
        return norms | kernels | {f"{name}/bias": shape[1:] for name, shape in layers.items()}


@register_composite
@dataclasses.dataclass(frozen=True)
class UPT(SitePrompts):
    """Prompts of both sites that pass through a transformer of their group.

    Parameters are those of `SitePrompts`, and those of the transformer below `transformer/`, one
    set for each group.

    Attributes:
        transformer: the transformer.

    Raises:
        ValueError: a site has no method, or one that draws prompts.
    """

    transformer: PromptTransformer = PromptTransformer()

    name = "upt"

    def __post_init__(self):
        super().__post_init__()
        if missing := [site for site in (TEXT, IMAGE) if site not in self.parts]:
            raise ValueError(
                f"UPT mixes prompts of both sites, but {missing[0]} has no method. Set "
                f"UPT.{missing[0]}, or use SitePrompts for one site."
            )
        if self.is_random:
            raise ValueError(
                "UPT mixes the prompts of a task once per step, so its methods cannot draw prompts "
                "for each example. Choose methods without random draws."
            )

    @property
    def labels(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The label rules of the sites, and 'shared' for the transformer."""
        return (*super().labels, (f"{TRANSFORMER}/.*", "shared"))

    @property
    def axes(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The logical axes of all parameters."""
        own = self.transformer.axes(self.parts)
        return {**super().axes, **{f"{TRANSFORMER}/{name}": axes for name, axes in own.items()}}

    def init(self, key, runs, context):
        sites = super().init(key, runs, context)
        widths = {TEXT: context.embedding.shape[1], IMAGE: context.image_width}
        own_key = jax.random.fold_in(key, len(self.parts))
        keys = [name_key(own_key, runs.run_names[row]) for row in first_row_of_groups(runs)]
        own = unflatten(self.transformer.init(keys, widths))
        return {**sites, TRANSFORMER: own}

    def compose_site(self, site, params, runs, task_ids, given=NO_CONTEXT):
        mixed = self._mixed(params, runs)[site]
        count = {TEXT: self.text_classes or 1, IMAGE: self.image_layers}[site]
        rows = gather_rows(mixed, task_ids)
        if site == TEXT and not self.text_classes:
            return rows
        return rows.reshape((*rows.shape[:-2], count, -1, rows.shape[-1]))

    def _mixed(self, params: Params, runs: Any) -> dict[str, Float[Array, "K _ _"]]:
        """Returns the rows of all sites for every bank row."""
        every = jnp.arange(len(runs.group_of_row))
        prompts = {
            site: part.compose(params[site], runs, every) for site, part in self.parts.items()
        }
        own, over = params[TRANSFORMER], 0
        if runs.num_groups == 1:
            own, over = jax.tree.map(lambda x: x[0], own), None
        else:
            own = jax.tree.map(lambda x: gather_rows(x, jnp.asarray(runs.group_of_row)), own)
        return jax.vmap(self.transformer, in_axes=(over, 0))(own, prompts)

    def separated(self, params, runs):
        """Returns plain prompts, which need no transformer."""
        params = jax.tree.map(jnp.asarray, dict(params))
        tables = {site: {"table": rows} for site, rows in self._mixed(params, runs).items()}
        methods: dict[str, Any] = {
            site: PromptTuning(part.prompt_length) for site, part in self.parts.items()
        }
        plain = SitePrompts(
            **methods, text_classes=self.text_classes, image_layers=self.image_layers
        )
        return plain, tables

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        """Starts each site from the same site of the artifact, before it is mixed, and the
        transformer from the mean of those of the groups that the text context starts from."""
        if not isinstance(source_method, UPT) or source_method.transformer != self.transformer:
            theirs = getattr(source_method, "transformer", None)
            raise ValueError(
                f"UPT starts only from an artifact with the same transformer ({self.transformer}), "
                f"but the initial artifact (method {source_method.name!r}) has {theirs}. Use the "
                "same MIXER_WIDTH, MIXING and MIXER_BLOCK in both jobs."
            )
        sites = SitePrompts(**{name: getattr(self, name) for name in _SITE_FIELDS})
        theirs = SitePrompts(**{name: getattr(source_method, name) for name in _SITE_FIELDS})
        started = sites.transfer(source, theirs, source_runs, runs, initial)
        weights = group_weights(source_weights(self.start_from[TEXT], source_runs, runs), runs)
        of_group = np.eye(source_runs.num_groups)[np.asarray(source_runs.group_of_row)]
        own = jax.tree.map(lambda x: weighted_mean(weights @ of_group, x), source[TRANSFORMER])
        return {**started, TRANSFORMER: own}

    def for_inference(self, params):
        method, sites = super().for_inference(params)
        return method, {**sites, TRANSFORMER: params[TRANSFORMER]}

    def config(self):
        return {**super().config(), TRANSFORMER: dataclasses.asdict(self.transformer)}

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], what: str) -> UPT:
        """Builds the method from the settings that `config` returned; see
        `prompts.base.method_from_config`."""
        rest = {name: value for name, value in settings.items() if name != TRANSFORMER}
        sites = SitePrompts.from_config(rest, what)
        own = schema.check(settings.get(TRANSFORMER), _Transformer, f"{what} ({TRANSFORMER})")
        fields = {name: getattr(sites, name) for name in _SITE_FIELDS}
        return cls(**fields, transformer=PromptTransformer(**msgspec.structs.asdict(own)))


_SITE_FIELDS = tuple(field.name for field in dataclasses.fields(SitePrompts))


class _Transformer(msgspec.Struct, forbid_unknown_fields=True):
    """The schema of an artifact's settings."""

    width: schema.Positive
    mixing: str
    block: str


def _dense(params: Params, x: Array) -> Array:
    return jnp.matmul(x, params["kernel"], precision=FLOAT32) + params["bias"][None]


def _layer_norm(params: Params, x: Array) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centered).mean(-1, keepdims=True)
    normalized = centered * jax.lax.rsqrt(variance + _EPSILON)
    return normalized * params["scale"][None] + params["bias"][None]


def _mlp(params: Params, x: Array) -> Array:
    hidden = _dense(params["mlp_in"], x)
    return _dense(params["mlp_out"], hidden * jax.nn.sigmoid(1.702 * hidden))
