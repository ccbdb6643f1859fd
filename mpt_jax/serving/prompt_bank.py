"""Prompt bank of a server: prompts from many artifacts, passed as arguments to one program.

Training compiles its bank rows into the program, since they are few and never change. A server has
many rows, and more may be added. So a bank keeps arrays that a compiled function takes as
arguments. The sizes of the arrays are powers of two: adding a task changes their values but not
their shapes, until the arrays are full. A batch gathers only the rows of its requests, so its cost
does not depend on the number of other rows. K tasks in G groups take

    4 (K' (n + 1) + G' m) bytes        K', G': the smallest powers of two that hold K and G

with n parameters per task (MPT of rank R: R (P + H), which is 868 for P = 100, H = 768, R = 1), m
per group (MPT: P H), and one group number per task. Groups whose values are equal bit for bit are
stored once, for example if many artifacts were trained with one frozen P*. Parameters that all
tasks share (ATTEMPT's frozen sources) must be the same in all artifacts, and are stored once.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mpt_jax.artifacts import artifacts, compatibility
from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Float, Int, Params
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.prompts.base import PromptContext, PromptMethod, row_axes
from mpt_jax.prompts.prompt_tuning import PromptTuning

GROUPS = "group_of_row"
LENGTHS = "prompt_lengths"
PROMPT = "prompt"
# Characters of a name that an error shows; the largest bank that is searched for similar names,
# since the search is slow.
MOST_SHOWN, MOST_COMPARED = 80, 1000


class Rows(NamedTuple):
    """The fields of `Runs` that `PromptMethod.compose` reads, for rows that are unknown when the
    program is compiled.

    Attributes:
        group_of_row: the group of every bank row, [K'].
        num_groups: G', the number of groups that the arrays have space for.
    """

    group_of_row: Int[Array, " K"]
    num_groups: int


class Named(NamedTuple):
    """An artifact's folder, and the names of its rows in a bank.

    Attributes:
        folder: the artifact's folder.
        name: '' to keep the artifact's run names. Otherwise the new name of its only row, or the
            prefix of the names of its rows, `name/run`.
    """

    folder: str
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Named:
        """Parses `FOLDER` or `NAME=FOLDER`."""
        name, equals, folder = text.partition("=")
        if not equals or "/" in name or os.path.exists(text):
            return cls(text)
        if not name or not folder:
            raise ValueError(
                f"{text!r} is neither a folder nor NAME=FOLDER. Set --prompts to artifact folders, "
                "each as FOLDER or NAME=FOLDER."
            )
        return cls(folder, name)


def compose(
    method: PromptMethod,
    arrays: Params,
    rows: Int[Array, " B"],
    pooled: Float[Array, "B H"] | None = None,
) -> Float[Array, "B P H"]:
    """Composes the prompts of some rows of a bank; for use in a compiled function.

    Args:
        method: the bank's method.
        arrays: the bank's arrays.
        rows: the bank rows whose prompts to compose.
        pooled: the max-pooled embeddings of the texts, for a method whose prompts depend on the
            text.
    """
    leaves, axes = flatten(arrays), row_axes(method)
    by_group = [leaf for name, leaf in leaves.items() if axes.get(name) == "groups"]
    # Composing reads nothing else of `Runs`.
    known: Any = Rows(arrays[GROUPS], len(by_group[0]) if by_group else 1)
    return method.compose(arrays[PROMPT], known, rows, PromptContext(pooled))


def params_of_rows(arrays: Params, rows: Int[Array, " B"]) -> Params:
    """Returns the parameters of an adapter for some rows of a bank, as those of a bank with one row
    for each of them; for use in a compiled function."""
    return jax.tree.map(lambda leaf: leaf[rows], arrays[PROMPT])


class Bank:
    """Prompts of many tasks, by name.

    Args:
        found: the artifacts. They must have the same backbone and vocabulary and, unless `folded`,
            the same prompt length and method.
        names: the name of each artifact, as in `Named`. By default, rows keep their run names.
        folded: whether to keep plain prompts [P, H] instead of the method's factors. This takes
            more memory, and allows artifacts of several methods and prompt lengths.

    Attributes:
        method: the prompt method; prompt tuning if the bank is folded.
        folded: whether the bank keeps plain prompts.
        lengths_differ: whether some rows have prompts that are shorter than the method's
            `prompt_length`. If so, `arrays` has their lengths.

    Raises:
        ValueError: there are no artifacts, the artifacts disagree, or two rows have the same name.
    """

    def __init__(
        self, found: Sequence[Artifact], names: Sequence[str] | None = None, folded: bool = False
    ):
        if not found:
            raise ValueError("A bank needs at least one prompt artifact. Set --prompts.")
        self.folded = folded
        self._check(found)
        self._reference = compatibility.representative(found)
        self._lacking = compatibility.lacking(found)
        self._served_backbone: str | None = None  # the digest of its weights
        self._served_config: Mapping[str, Any] | None = None  # its configuration
        self._served_vocabulary: str | None = None  # the vocabulary of requests
        own, longest = self._reference.method, max(x.prompt_length for x in found)
        self.method = PromptTuning(longest) if folded else own
        lengths = [n for x in found for n in x.method.prompt_lengths(x.runs)]
        self.lengths_differ = min(lengths) < self.method.prompt_length
        self._axes = row_axes(self.method) | {GROUPS: "tasks", LENGTHS: "tasks"}
        self._folders: dict[str, str] = {}  # name -> folder, in the order of rows
        self._rows: dict[str, int] = {}
        self._groups: dict[bytes, int] = {}  # digest of a group's values -> group
        self._leaves: dict[str, Array] = {}
        self._append(list(zip(found, names or [""] * len(found), strict=True)))

    @classmethod
    def load(cls, sources: Iterable[Named], folded: bool = False) -> Bank:
        """Loads a bank from artifact folders. Raises as `load_artifact` and `Bank` do."""
        sources = list(sources)
        loaded = [artifacts.load_artifact(source.folder) for source in sources]
        return cls(loaded, [source.name for source in sources], folded)

    def add(self, artifact: Artifact, name: str = "") -> None:
        """Adds the rows of an artifact, under `name` if it is not '' (see `Named`).

        Raises:
            ValueError: the artifact disagrees with the bank, or the bank already has a row with the
                name of one of the artifact's rows.
        """
        self._check([self._reference, artifact])
        lacking = compatibility.lacking([artifact])
        if self._served_config is not None:
            embedding, weights = artifact.config["embedding_sha256"], self._served_backbone
            compatibility.check_backbone(artifact, embedding, weights, self._served_config)
            for warning in compatibility.not_compared(*lacking, weights is not None):
                logging.warning("%s", warning)
        compatibility.check_vocabulary(artifact, self._served_vocabulary)
        length, longest = artifact.prompt_length, self.method.prompt_length
        if length > longest or not self.lengths_differ and length < longest:
            raise ValueError(
                f"{artifact.path} has prompts of {length} positions, but the bank was built for "
                f"{longest}. Create a new bank from all artifacts instead of adding to this bank."
            )
        self._append([(artifact, name)])
        for folders, more in zip(self._lacking, lacking, strict=True):
            folders += more
        # The first digests that are recorded; later artifacts must agree.
        self._reference = compatibility.representative([self._reference, artifact])

    def row(self, name: str) -> int:
        """Returns the bank row of a task.

        Raises:
            ValueError: the task is unknown; the message suggests similar names.
        """
        if name not in self._rows:
            raise ValueError(_unknown(name, self.names))
        return self._rows[name]

    def check_backbone(
        self,
        embedding_sha256: str,
        backbone_sha256: str | None,
        backbone_config: Mapping[str, Any],
        warn: Callable[[str], None] = logging.warning,
    ) -> None:
        """Checks that the bank's artifacts were trained with this backbone, as
        `compatibility.check_backbone` does. Remembers it, to check artifacts that are added later.

        Args:
            embedding_sha256: the digest of the backbone's embedding.
            backbone_sha256: the digest of all its weights; None if it was switched off.
            backbone_config: its configuration, from `backbone_digest.backbone_config`.
            warn: called with a line if artifacts do not record the digest of all weights or the
                configuration.

        Raises:
            ValueError: the backbone differs; the message shows both values.
        """
        compatibility.check_backbone(
            self._reference, embedding_sha256, backbone_sha256, backbone_config
        )
        for warning in compatibility.not_compared(*self._lacking, backbone_sha256 is not None):
            warn(warning)
        self._served_backbone = backbone_sha256 or self._served_backbone
        self._served_config = backbone_config

    def check_vocabulary(self, vocabulary_sha256: str | None) -> None:
        """Checks that the bank's artifacts were trained with this vocabulary. Remembers it, to
        check artifacts that are added later.

        Raises:
            ValueError: the vocabulary differs; the message shows both values.
        """
        compatibility.check_vocabulary(self._reference, vocabulary_sha256)
        self._served_vocabulary = vocabulary_sha256 or self._served_vocabulary

    @property
    def config(self) -> dict[str, Any]:
        """The `config.json` of one artifact. Only use fields in which all artifacts agree."""
        return self._reference.config

    @property
    def arrays(self) -> dict[str, Any]:
        """The bank's arrays on the device: 'prompt', the method's parameters; 'group_of_row' [K'];
        and 'prompt_lengths' [K'] if lengths differ. Arrays that were returned earlier do not change
        when the bank grows."""
        return unflatten(self._leaves)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all rows, in the order of the rows."""
        return tuple(self._rows)

    @property
    def nbytes(self) -> int:
        """The size of the arrays in bytes."""
        return sum(leaf.nbytes for leaf in self._leaves.values())

    def digest(self) -> str:
        """Returns the sha256 of the names and values of all rows."""
        counts = {"tasks": len(self._rows), "groups": len(self._groups)}
        kept = {
            name: x[: counts[self._axes[name]]] if name in self._axes else x
            for name, x in self._leaves.items()
        }
        record = json.dumps([list(self._rows), artifacts.digest(kept)])
        return hashlib.sha256(record.encode()).hexdigest()

    # --- Rows ------------------------------------------------------------------------------------

    def _check(self, candidates: Sequence[Artifact]) -> None:
        compatibility.check_mutually_compatible(candidates, self.folded)
        if self.folded:
            return
        first, rows = flatten(candidates[0].params), row_axes(candidates[0].method)
        for name in (name for name in first if f"{PROMPT}/{name}" not in rows):
            for artifact in candidates[1:]:
                if not np.array_equal(first[name], flatten(artifact.params)[name]):
                    raise ValueError(
                        f"{candidates[0].path} and {artifact.path} differ in {name!r}, which the "
                        f"method {artifact.method.name!r} shares between all tasks of a bank. "
                        "Serve these artifacts separately."
                    )

    def _append(self, additions: Sequence[tuple[Artifact, str]]) -> None:
        """Adds the rows of artifacts. Prepares all parts before it writes, so an error leaves the
        bank unchanged."""
        folders, groups = dict(self._folders), dict(self._groups)
        blocks: dict[str, list[np.ndarray]] = {}
        for artifact, name in additions:
            for row in row_names(artifact.runs, name):
                if row in folders:
                    raise ValueError(taken(row, folders[row], artifact.path))
                folders[row] = artifact.path
            for leaf, values in self._blocks(artifact, groups).items():
                blocks.setdefault(leaf, []).append(values)
        first = {"tasks": len(self._folders), "groups": len(self._groups)}
        for leaf, parts in blocks.items():
            if leaf in self._axes:
                self._write(leaf, np.concatenate(parts), first[self._axes[leaf]])
            else:
                self._leaves[leaf] = jnp.asarray(parts[0])
        self._folders, self._groups = folders, groups
        self._rows = {name: row for row, name in enumerate(folders)}

    def _blocks(self, artifact: Artifact, groups: dict[bytes, int]) -> dict[str, np.ndarray]:
        """Returns the values that an artifact adds to every leaf, by name of the leaf. Adds the
        artifact's new groups to `groups`."""
        params = {"table": self._table(artifact)} if self.folded else artifact.params
        leaves = {f"{PROMPT}/{k}": np.asarray(v, np.float32) for k, v in flatten(params).items()}
        shared = [leaf for name, leaf in sorted(leaves.items()) if self._axes.get(name) == "groups"]
        numbers, new = [], []
        for group in range(artifact.runs.num_groups):
            values = b"".join(leaf[group].tobytes() for leaf in shared)
            digest = hashlib.sha256(values).digest()
            if digest not in groups:
                groups[digest] = len(groups)
                new.append(group)
            numbers.append(groups[digest])
        blocks: dict[str, np.ndarray] = {
            name: leaf[new] if self._axes.get(name) == "groups" else leaf
            for name, leaf in leaves.items()
        }
        rows = [numbers[group] for group in artifact.runs.group_of_row]
        blocks[GROUPS] = np.asarray(rows, np.int32)
        if self.lengths_differ:
            lengths = artifact.method.prompt_lengths(artifact.runs)
            blocks[LENGTHS] = np.asarray(lengths, np.int32)
        return blocks

    def _table(self, artifact: Artifact) -> np.ndarray:
        """Returns an artifact's plain prompts [K, P, H]. Shorter prompts are padded with zeros."""
        plain = artifact.plain()
        table = np.zeros((len(plain), self.method.prompt_length, plain[0].shape[1]), np.float32)
        for row, prompt in enumerate(plain):
            table[row, : len(prompt)] = prompt
        return table

    def _write(self, name: str, block: np.ndarray, first: int) -> None:
        leaf, needed = self._leaves.get(name), first + len(block)
        room = 0 if leaf is None else len(leaf)
        if needed > room:
            grown = np.zeros((_capacity(needed), *block.shape[1:]), block.dtype)
            if leaf is not None:
                grown[:first] = np.asarray(leaf)[:first]
            grown[first:needed] = block
            self._leaves[name] = jnp.asarray(grown)
        elif leaf is not None and len(block):
            self._leaves[name] = _written(leaf, block, first)


def row_names(runs: Runs, name: str) -> list[str]:
    """Returns the names of an artifact's rows in a bank; see `Named`."""
    if not name:
        return list(runs.run_names)
    return [name] if runs.num_rows == 1 else [f"{name}/{run}" for run in runs.run_names]


def _capacity(needed: int) -> int:
    """Returns the smallest power of two that is at least `needed`."""
    return 1 << max(needed - 1, 0).bit_length()


@jax.jit
def _written(leaf: Array, block: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(leaf, block, first, axis=0)


def taken(name: str, first: str, second: str) -> str:
    """Returns the message for a name of two rows, from artifacts at the paths `first` and
    `second`."""
    where = f"both from {first}" if first == second else f"one from {first}, one from {second}"
    return (
        f"Two rows of the bank would have the name {name!r}, {where}. Rename the rows of one "
        f"artifact, for example with --prompts NEW_NAME={second}."
    )


def _unknown(name: str, known: tuple[str, ...]) -> str:
    shown = name if len(name) <= MOST_SHOWN else f"{name[: MOST_SHOWN - 3]}..."
    close = _close(shown, known) if len(known) <= MOST_COMPARED else []
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"Unknown task {shown!r}.{hint} The bank has prompts for {abbreviate(known)}."


@functools.lru_cache(maxsize=1024)
def _close(name: str, known: tuple[str, ...]) -> list[str]:
    return difflib.get_close_matches(name, known, n=3)
