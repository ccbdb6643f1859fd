"""A bank of prompts of any number of tasks, from many artefacts, as arguments of one program.

Training bakes its rows into what it compiles: there are few of them, and they never change. A
server has many, and new ones arrive. So a bank keeps arrays that a compiled function takes as
arguments, allocated to powers of two: a task that is added changes their values and not their
shapes, until there is no room left. A batch gathers the rows that it names, so its cost does not
depend on how many others there are. K tasks in G groups take

    4 (K' (n + 1) + G' m) bytes        K', G': the next powers of two from K and G on

with n numbers of a task's own (MPT of rank R: R (P + H), which is 868 for P = 100, H = 768, R = 1),
m of a group's (MPT: P H), and the number of its group. Groups whose values are the same, bit for
bit, are kept once, as where many artefacts were trained on one frozen P*.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax import artefacts
from mpt_jax.artefacts import Artefact
from mpt_jax.prompts.base import PromptMethod, rows_of
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.runs import Runs
from mpt_jax.shapes import Array, Float, Int, Params
from mpt_jax.tree import flatten, unflatten

GROUPS = "group_of_row"
PROMPT = "prompt"
# Names that an error lists, with the number of the others; characters of a name that it repeats;
# the size of a bank up to which it looks for names like that one, which takes time.
MOST_NAMED, MOST_SHOWN, MOST_COMPARED = 20, 80, 1000


class Rows(NamedTuple):
    """What a method reads of `Runs` to compose prompts, where rows are not known to the compiler.

    Attributes:
        group_of_row: [K'] the group of every row.
        num_groups: G'.
    """

    group_of_row: Int[Array, " K"]
    num_groups: int


class Named(NamedTuple):
    """An artefact's folder, and what its rows are to be called.

    Attributes:
        folder: of the artefact.
        name: '' for the rows' own names; else the name of its only row, or what goes before the
            names of several, `name/row`.
    """

    folder: str
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Named:
        """`FOLDER`, or `NAME=FOLDER`."""
        name, equals, folder = text.partition("=")
        if not equals or "/" in name or os.path.exists(text):
            return cls(text)
        if not name or not folder:
            raise ValueError(f"{text!r} is neither a folder nor NAME=FOLDER.")
        return cls(folder, name)


def compose(method: PromptMethod, arrays: Params, rows: Int[Array, " B"]) -> Float[Array, "B P H"]:
    """The prompts of some rows of a bank; for use in a compiled function.

    Args:
        method: the bank's.
        arrays: the bank's.
        rows: which.
    """
    leaves, axes = flatten(arrays), rows_of(method)
    by_group = [leaf for name, leaf in leaves.items() if axes.get(name) == "groups"]
    # Composing asks for nothing else of `Runs`.
    known: Any = Rows(arrays[GROUPS], len(by_group[0]) if by_group else 1)
    return method.compose(arrays[PROMPT], known, rows)


class Bank:
    """Prompts of many tasks, by name.

    Args:
        found: artefacts of one backbone, vocabulary, prompt length and method.
        names: what the rows of each are called, as in `Named`; default their own names.
        folded: keeps plain prompts [P, H] in place of the method's factors: more memory, and
            artefacts of several methods side by side.

    Attributes:
        method: the prompt method; of a folded bank prompt tuning.
        folded: as given.

    Raises:
        ValueError: no artefacts; artefacts that disagree; two rows of one name; parameters that
            are neither a task's nor a group's.
    """

    def __init__(
        self, found: Sequence[Artefact], names: Sequence[str] | None = None, folded: bool = False
    ):
        if not found:
            raise ValueError("A bank needs at least one prompt artefact.")
        self.folded = folded
        self._check(found)
        # Of those that agree, one that knows its vocabulary.
        known = [each for each in found if each.config["vocabulary_sha256"] is not None]
        self._reference = (known or found)[0]
        self._served_vocabulary: str | None = None  # that requests are read by
        own = self._reference.method
        self.method = PromptTuning(own.prompt_length) if folded else own
        self._axes = rows_of(self.method) | {GROUPS: "tasks"}
        self._folders: dict[str, str] = {}  # name -> folder, in the order of rows
        self._rows: dict[str, int] = {}
        self._groups: dict[bytes, int] = {}  # digest of a group's values -> group
        self._leaves: dict[str, Array] = {}
        self._append(list(zip(found, names or [""] * len(found), strict=True)))

    @classmethod
    def load(cls, sources: Iterable[Named], folded: bool = False) -> Bank:
        """A bank of the artefacts in some folders; raises what `load_artefact` and `Bank` do."""
        sources = list(sources)
        found = [artefacts.load_artefact(source.folder) for source in sources]
        return cls(found, [source.name for source in sources], folded)

    def add(self, artefact: Artefact, name: str = "") -> None:
        """Adds the rows of an artefact, which may be called otherwise (see `Named`).

        Raises:
            ValueError: the artefact disagrees with the bank's, or a name is taken.
        """
        self._check([self._reference, artefact])
        known, length = artefact.config["vocabulary_sha256"], artefact.method.prompt_length
        embedding = artefact.config["embedding_sha256"]
        artefacts.check_belongs(artefact, embedding, self._served_vocabulary, length)
        self._append([(artefact, name)])
        if self._reference.config["vocabulary_sha256"] is None and known is not None:
            self._reference = artefact  # the first that knows its vocabulary; others must agree

    def row(self, name: str) -> int:
        """The row of a task.

        Raises:
            ValueError: there is no such task; names the closest.
        """
        if name not in self._rows:
            raise ValueError(_unknown(name, self.names))
        return self._rows[name]

    def check_belongs(self, embedding_sha256: str, vocabulary_sha256: str | None) -> None:
        """Checks that the bank's artefacts were trained on this backbone and vocabulary, and
        remembers the vocabulary for those that are added later.

        Raises:
            ValueError: shows both values of what differs.
        """
        length = self.method.prompt_length
        artefacts.check_belongs(self._reference, embedding_sha256, vocabulary_sha256, length)
        self._served_vocabulary = vocabulary_sha256 or self._served_vocabulary

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` of one of the artefacts, for what all of them agree on."""
        return self._reference.config

    @property
    def arrays(self) -> dict[str, Any]:
        """{'prompt': the method's parameters, 'group_of_row': [K']}, on the device. What was taken
        from here stays as it is when the bank grows."""
        return unflatten(self._leaves)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all rows, in their order."""
        return tuple(self._rows)

    @property
    def nbytes(self) -> int:
        """What the arrays occupy."""
        return sum(leaf.nbytes for leaf in self._leaves.values())

    def digest(self) -> str:
        """sha256 of the rows' names and values."""
        counts = {"tasks": len(self._rows), "groups": len(self._groups)}
        kept = {name: x[: counts[self._axes[name]]] for name, x in self._leaves.items()}
        record = json.dumps([list(self._rows), artefacts.digest(kept)])
        return hashlib.sha256(record.encode()).hexdigest()

    # --- Rows ------------------------------------------------------------------------------------

    def _check(self, found: Sequence[Artefact]) -> None:
        check_agree(found, self.folded)
        without_rows = set(flatten(found[0].params)) - {
            name.removeprefix(f"{PROMPT}/") for name in rows_of(found[0].method)
        }
        if without_rows and not self.folded:
            raise ValueError(
                f"The method {found[0].method.name!r} has parameters that belong to no row, "
                f"{sorted(without_rows)}, so artefacts cannot be joined; fold the bank."
            )

    def _append(self, found: Sequence[tuple[Artefact, str]]) -> None:
        """Joins all parts first, then writes; so an error leaves the bank as it was."""
        folders, groups = dict(self._folders), dict(self._groups)
        blocks: dict[str, list[np.ndarray]] = {}
        for artefact, name in found:
            for row in _called(artefact.runs, name):
                if row in folders:
                    raise ValueError(_taken(row, folders[row], artefact.path))
                folders[row] = artefact.path
            for leaf, values in self._blocks(artefact, groups).items():
                blocks.setdefault(leaf, []).append(values)
        first = {"tasks": len(self._folders), "groups": len(self._groups)}
        for leaf, parts in blocks.items():
            self._write(leaf, np.concatenate(parts), first[self._axes[leaf]])
        self._folders, self._groups = folders, groups
        self._rows = {name: row for row, name in enumerate(folders)}

    def _blocks(self, artefact: Artefact, groups: dict[bytes, int]) -> dict[str, np.ndarray]:
        """What an artefact adds to every leaf; enters its groups."""
        params = {"table": artefact.folded()} if self.folded else artefact.params
        leaves = {f"{PROMPT}/{k}": np.asarray(v, np.float32) for k, v in flatten(params).items()}
        shared = [leaf for name, leaf in sorted(leaves.items()) if self._axes[name] == "groups"]
        numbers, new = [], []
        for group in range(artefact.runs.num_groups):
            values = b"".join(leaf[group].tobytes() for leaf in shared)
            digest = hashlib.sha256(values).digest()
            if digest not in groups:
                groups[digest] = len(groups)
                new.append(group)
            numbers.append(groups[digest])
        blocks = {
            name: leaf[new] if self._axes[name] == "groups" else leaf
            for name, leaf in leaves.items()
        }
        rows = [numbers[group] for group in artefact.runs.group_of_row]
        return blocks | {GROUPS: np.asarray(rows, np.int32)}

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


def check_agree(found: Sequence[Artefact], folded: bool = False) -> None:
    """Checks that artefacts fit one bank.

    Args:
        found: at least one.
        folded: whether their methods may differ.

    Raises:
        ValueError: names the artefacts by the value of what they disagree on.
    """
    facts = {
        "backbone (sha256 of its embedding)": lambda x: x.config["embedding_sha256"],
        "vocabulary (sha256)": lambda x: x.config["vocabulary_sha256"],
        "prompt length": lambda x: x.method.prompt_length,
    }
    if not folded:
        facts["method"] = lambda x: f"{x.method.name} {json.dumps(x.method.config())}"
    for what, value_of in facts.items():
        folders: dict[Any, list[str]] = {}
        for artefact in found:
            value = value_of(artefact)
            if value is not None:  # artefacts of a vocabulary that nobody recorded
                folders.setdefault(value, []).append(artefact.path)
        if len(folders) > 1:
            values = "; ".join(f"{value} in {_few(paths)}" for value, paths in folders.items())
            hint = " Plain prompts of several methods go together: fold them." * (what == "method")
            raise ValueError(
                f"These artefacts do not fit one bank, their {what} differs: {values}.{hint}"
            )


def _called(runs: Runs, name: str) -> list[str]:
    if not name:
        return list(runs.run_names)
    return [name] if runs.num_rows == 1 else [f"{name}/{run}" for run in runs.run_names]


def _capacity(needed: int) -> int:
    """The next power of two."""
    return 1 << max(needed - 1, 0).bit_length()


@jax.jit
def _written(leaf: Array, block: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(leaf, block, first, axis=0)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _taken(name: str, first: str, second: str) -> str:
    where = f"twice in {first}" if first == second else f"in {first} and in {second}"
    return (
        f"Two rows of the bank would be called {name!r}, {where}. Give one folder another name: "
        f"NAME={second}."
    )


def _unknown(name: str, known: tuple[str, ...]) -> str:
    shown = name if len(name) <= MOST_SHOWN else f"{name[: MOST_SHOWN - 3]}..."
    close = _close(shown, known) if len(known) <= MOST_COMPARED else []
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"Unknown task {shown!r}.{hint} The bank has {_few(known)}."


@functools.lru_cache(maxsize=1024)
def _close(name: str, known: tuple[str, ...]) -> list[str]:
    return difflib.get_close_matches(name, known, n=3)
