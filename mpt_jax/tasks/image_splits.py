"""Splits of image data sets that lack them, and replay of published splits.

`DividedImages` divides images by a stable hash of their ids within each class, so that each split
has the same share of every class. Its splits depend only on the ids, the labels and the seed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from mpt_jax.tasks.image_sources import SHOWN, ImageSource, Index, in_order, index_sha256

SHARES = (0.5, 0.2, 0.3)
SPLITS = ("train", "validation", "test")
SEED = 42


@dataclasses.dataclass(frozen=True)
class Share:
    """A part of each class of some splits of a source.

    Attributes:
        splits: The splits of the source that are pooled.
        start, stop: The part, as fractions of the images of a class in the order of their hashes.
    """

    splits: tuple[str, ...]
    start: float = 0.0
    stop: float = 1.0


def pooled(*splits: str, shares: Sequence[float] = SHARES) -> dict[str, Share]:
    """Returns train, validation and test as `shares` of each class of the pooled `splits`. Shares
    that sum to less than 1 leave images out."""
    if len(shares) != 3 or min(shares) < 0 or not 0 < sum(shares) <= 1 + 1e-6:
        raise ValueError(
            f"shares={tuple(shares)} are not three numbers of at least 0 that sum to at most 1. "
            "Pass one share for each of train, validation and test, such as (0.5, 0.2, 0.3)."
        )
    ends = np.cumsum(shares).tolist()
    starts = [0.0, *ends[:-1]]
    parts = zip(SPLITS, starts, ends, strict=True)
    return {name: Share(splits, start, end) for name, start, end in parts if end > start}


def held_out(share: float = 0.2, train: str = "train", test: str = "test") -> dict[str, Share]:
    """Returns train without `share` of each class, validation with it, and test unchanged."""
    return {
        "train": Share((train,), share, 1.0),
        "validation": Share((train,), 0.0, share),
        "test": Share((test,)),
    }


def digest(*words: str | int) -> bytes:
    """Returns the stable hash that orders images, 16 bytes: BLAKE2b of the words joined by '/'."""
    return hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=16).digest()


class DividedImages(ImageSource):
    """Source whose splits are parts of the splits of another source.

    Args:
        source: The source to divide.
        parts: Split -> its part; see `pooled` and `held_out`.
        name: The name of the data set, which is part of the hash.
        seed: The number that is part of the hash.
        published: Split -> its published number of images, if the log should show it without
            reading the data.
    """

    def __init__(
        self,
        source: ImageSource,
        parts: Mapping[str, Share],
        name: str,
        seed: int = SEED,
        published: Mapping[str, int] | None = None,
    ):
        super().__init__(tuple(parts), source.multi_label)
        self.source, self.parts, self.name, self.seed = source, dict(parts), name, seed
        self.published = dict(published or {})
        self._rows: dict[str, list[tuple[str, int]]] = {}

    def __str__(self) -> str:
        return f"{self.source}, divided by a hash of {self.name} and {self.seed}"

    @property
    def data(self) -> str:
        """The name of the data set or its place, for `mpt-jax tasks list`."""
        return str(getattr(self.source, "data", self.source))

    @property
    def class_ids(self) -> Sequence[str] | None:
        """The class ids of the source that is divided."""
        return self.source.class_ids

    def is_prepared(self) -> bool:
        """Whether the data is on this machine."""
        return getattr(self.source, "is_prepared", lambda: True)()

    def num_input_examples(self, split: str) -> int | None:  # type: ignore[override]
        """Returns the published number of images of a split; that on this machine if unknown."""
        return self.published[split] if split in self.published else self.num_rows(split)

    def sha256(self, split: str) -> str | None:
        """Returns the SHA-256 of the split's ids and labels and of the source's splits that it is a
        part of; None if these have none."""
        pool = [self.source.sha256(name) for name in self.parts[split].splits]
        return None if None in pool else _sha256(self.index(split), pool)

    def rows(self, split: str) -> list[tuple[str, int]]:
        """Returns the (split of the source, row) of each image of a split, ascending.

        Raises:
            ValueError: the split would be empty.
        """
        if split not in self._rows:
            self._rows[split] = self._divided(split)
        return self._rows[split]

    def read_index(self, split: str) -> Index:
        """Returns the ids and labels of a split."""
        return index_places(self.source, self.rows(split))

    def stream(self, split: str, rows: np.ndarray | None) -> tf.data.Dataset:
        """Returns the examples of a split in order; only ascending `rows` [n] unless None."""
        located = self.rows(split)
        return select_places(
            self.source, located if rows is None else [located[row] for row in rows.tolist()]
        )

    def _divided(self, split: str) -> list[tuple[str, int]]:
        part = self.parts[split]
        places = [(name, row) for name in part.splits for row in range(self.source.num_rows(name))]
        if (part.start, part.stop) == (0.0, 1.0):
            return places
        pool = [self.source.index(name) for name in part.splits]
        ids = [x for index in pool for x in index.ids]
        # An image with several classes has no single class to be divided within.
        labels = [0 if self.multi_label else x[0] for index in pool for x in index.labels]
        classes: dict[int, list[int]] = {}
        for place in sorted(range(len(ids)), key=lambda i: digest(self.name, self.seed, ids[i])):
            classes.setdefault(labels[place], []).append(place)
        kept: list[int] = []
        for members in classes.values():
            start, stop = (int(x * len(members) + 0.5) for x in (part.start, part.stop))
            kept += members[start:stop]
        if not kept:
            raise ValueError(
                f"The {split} split of {self.name} would be empty: {self.source} has only "
                f"{len(ids):,} images. Add images, or change shares=."
            )
        return [places[i] for i in sorted(kept)]


class ChosenImages(ImageSource):
    """Source whose splits are lists of image ids, such as a published split.

    Args:
        source: The source of the images.
        ids: Split -> the ids of its images, in order. Published ids may have more or fewer folders
            before the file name than those of the source, and another case, if that leaves one
            image. Splits of the source that are not named stay as they are, so no other split may
            take images from them.
        where: The file with the ids, for errors.
    """

    def __init__(self, source: ImageSource, ids: Mapping[str, Sequence[str]], where: str):
        super().__init__((), source.multi_label)
        self.source, self.ids, self.where = source, dict(ids), where

    def __str__(self) -> str:
        return f"{self.source}, split by {self.where}"

    @property
    def splits(self) -> Sequence[str]:
        """The splits of the file and of the source."""
        return tuple(dict.fromkeys([*self.ids, *self.source.splits]))

    @property
    def class_ids(self) -> Sequence[str] | None:
        """The class ids of the source."""
        return self.source.class_ids

    def num_input_examples(self, split: str) -> int | None:  # type: ignore[override]
        """Returns the number of images of a split."""
        return len(self.ids[split]) if split in self.ids else self.source.num_input_examples(split)

    def sha256(self, split: str) -> str | None:
        """Returns the SHA-256 of a split's ids and labels and of the source's splits that it
        selects from; that of the source for a split that the file does not name."""
        if split not in self.ids:
            return self.source.sha256(split)
        pool = sorted({name for name, _ in self.places(split)})
        return _sha256(self.index(split), [self.source.sha256(name) for name in pool])

    def few_shot_indices(self, split: str) -> list[int] | None:
        """Returns the rows of the source's split of the same name that a split of the file uses;
        None if the file does not name the split or takes images of another one."""
        if split not in self.ids:
            return None
        places = self.places(split)
        return [row for _, row in places] if {name for name, _ in places} == {split} else None

    def places(self, split: str) -> list[tuple[str, int]]:
        """Returns the (split of the source, row) of each image of a split of the file, in order.

        Raises:
            ValueError: an id of the file is unknown or ambiguous, or an image of the file would be
                in two splits.
        """
        return self._located[split]

    @functools.cached_property
    def _located(self) -> dict[str, list[tuple[str, int]]]:
        """What `places` returns of each split of the file. All are checked at the first use of any
        split, so that training does not start on images of the test split."""
        located = {split: self._find(split) for split in self.ids}
        train = set(located.get("train", ()))
        for split, places in located.items():
            origins = collections.Counter(name for name, _ in places if name != split)
            for origin in [name for name in origins if name not in self.ids]:
                raise ValueError(
                    f"{self.where}, {split}: {origins[origin]:,} of {len(places):,} images are in "
                    f"the {origin} split of {self.source}, which the file does not name, so they "
                    f"would be in both splits. Name {origin} in the file too, without these images."
                )
            shared = [] if split == "train" else [place for place in places if place in train]
            if shared:
                name, row = shared[0]
                raise ValueError(
                    f"{self.where}, {split}: {len(shared):,} of {len(places):,} images are also in "
                    f"its train split, such as {self.source.index(name).ids[row]}. Remove them "
                    "from one of the splits."
                )
        return located

    def _find(self, split: str) -> list[tuple[str, int]]:
        others = [name for name in self.source.splits if name != split]
        own = [split] if split in self.source.splits else []
        found = _Places({name: self.source.index(name) for name in [*own, *others]})
        places = {name: found.find(name) for name in self.ids[split]}
        if absent := [name for name, place in places.items() if place is None]:
            raise ValueError(
                f"{self.where}, {split}: {len(absent):,} of {len(self.ids[split]):,} images "
                f"are not in {self.source}, or several have this name: "
                f"{', '.join(absent[:SHOWN])}. Use a file for this data set."
            )
        return [place for place in places.values() if place is not None]

    def read_index(self, split: str) -> Index:
        """Returns the ids and labels of a split, in the order of the file."""
        located = self._located
        if split not in located:
            return self.source.index(split)
        return index_places(self.source, located[split])

    def stream(self, split: str, rows: np.ndarray | None) -> tf.data.Dataset:
        """Returns the examples of a split in order; only ascending `rows` [n] unless None."""
        located = self._located
        if split not in located:
            return self.source.stream(split, rows)
        places = located[split]
        chosen = places if rows is None else [places[row] for row in rows.tolist()]
        return select_places(self.source, chosen)


def _sha256(index: Index, pool: Sequence[str | None]) -> str:
    """Returns the SHA-256 of an index and of the digests of what it is a part of."""
    return hashlib.sha256(" ".join([index_sha256(index), *map(str, pool)]).encode()).hexdigest()


def index_places(source: ImageSource, places: Sequence[tuple[str, int]]) -> Index:
    """Returns the ids and labels at (split, row) of a source, in the order given."""
    indices = {name: source.index(name) for name, _ in places}
    return Index(
        tuple(indices[name].ids[row] for name, row in places),
        tuple(indices[name].labels[row] for name, row in places),
    )


def select_places(source: ImageSource, places: Sequence[tuple[str, int]]) -> tf.data.Dataset:
    """Returns the examples at (split, row) of a source, in the order given."""
    names = list(dict.fromkeys(name for name, _ in places))
    if len(names) == 1:
        return source.select(names[0], [row for _, row in places])
    whole: tf.data.Dataset | None = None
    order: list[int] = []  # the number in `places` of each example of `whole`
    for name in names:
        numbers = sorted((i for i, x in enumerate(places) if x[0] == name), key=lambda i: places[i])
        part = source.select(name, [places[i][1] for i in numbers])
        whole, order = part if whole is None else whole.concatenate(part), order + numbers
    assert whole is not None
    return in_order(whole, np.arange(len(order)), np.argsort(order).tolist())


class _Places:
    """The (split, row) of each image id. An id of several splits is found in the first."""

    def __init__(self, indices: Mapping[str, Index]):
        self.exact: dict[str, tuple[str, int]] = {}
        # In lower case, whole and after a '/'; None if of several ids.
        self.folded: dict[str, tuple[str, int] | None] = {}
        self.ends: dict[str, tuple[str, int] | None] = {}
        for split, index in indices.items():
            for row, name in enumerate(index.ids):
                if name in self.exact:
                    continue
                self.exact[name] = place = (split, row)
                key = name.casefold()
                self.folded[key] = None if key in self.folded else place
                for end in _ends(name):
                    self.ends[end] = None if end in self.ends else place

    def find(self, name: str) -> tuple[str, int] | None:
        """Returns the place of a published id; None if it is unknown or ambiguous."""
        if name in self.exact:
            return self.exact[name]
        key = name.casefold()
        if key in self.folded:
            return self.folded[key]
        if key in self.ends:
            return self.ends[key]
        return next((self.folded[end] for end in _ends(name) if end in self.folded), None)


def _ends(name: str) -> list[str]:
    """Returns what follows each '/' of a name, in lower case, the longest first."""
    parts = name.casefold().split("/")
    return ["/".join(parts[i:]) for i in range(1, len(parts))]
