"""SeqIO source of the images of a prepared TFDS data set.

Classes are matched by name: the label of an image is the position of its class in `classes`,
whatever the order of the data set on this machine. Images of other classes are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from mpt_jax.data.classes import normalized
from mpt_jax.data.preprocessors import map_dataset
from mpt_jax.tasks.image_sources import ImageSource, Index, only
from mpt_jax.tasks.splits import Part, PartsSource

TFDS_ID = "tfds_id"  # TFDS's feature with the shard and position of a row
NOWHERE = "/nonexistent"  # a data folder without data sets, to read only what TFDS's code declares

Derive = Callable[[Mapping[str, Any]], tf.Tensor]


class TfdsImages(ImageSource):
    """Source of the images of a prepared TFDS data set, which it never downloads.

    Args:
        data: TFDS's name of the data set with config and version, such as 'dtd:3.0.1'.
        splits: Our split -> TFDS's split.
        sizes: TFDS split -> number of rows in the published data set. A mismatch logs a warning.
        classes: The class names in the data set, in label order, or a function that returns them;
            None for all classes in the order that TFDS's code declares.
        label: The feature with the class, or with a list of classes.
        derive: A function from the features `reads` of a row to its class ids, int32 [n], for data
            sets without such a feature. `classes` then only says how many there are.
        reads: The features that `derive` reads.
        ids: The features that identify an image within the data set, joined by '/'; () for TFDS's
            own id, which depends on how the data set was prepared.
        multi_label: Whether an image may have any number of classes.
    """

    def __init__(  # noqa: PLR0913 - one keyword for each property of a data set
        self,
        data: str,
        splits: Mapping[str, str],
        sizes: Mapping[str, int],
        classes: Sequence[str] | Callable[[], Sequence[str]] | None = None,
        *,
        label: str = "label",
        derive: Derive | None = None,
        reads: Sequence[str] = (),
        ids: Sequence[str] = (),
        multi_label: bool = False,
    ):
        super().__init__(tuple(splits), multi_label)
        self.data, self.tfds_splits, self.sizes = data, dict(splits), dict(sizes)
        self._classes, self.label, self.derive = classes, label, derive
        self.reads, self.ids = tuple(reads), tuple(ids)
        parts = {split: Part(name) for split, name in splits.items()}
        self._prepared = PartsSource(data, parts, sizes)

    def __str__(self) -> str:
        return f"TensorFlow Datasets, {self.data}"

    @property
    def class_ids(self) -> Sequence[str]:
        """The class names in the data set, in label order. Needs no prepared data."""
        if self._classes is None:
            return declared_names(self.data, self.label)
        return self._classes() if callable(self._classes) else self._classes

    def is_prepared(self) -> bool:
        """Whether the data set is prepared on this machine."""
        return self._prepared.is_prepared()

    def num_input_examples(self, split: str) -> int:  # type: ignore[override]
        """Returns the number of rows of a split of the published data set, without reading it."""
        return self.sizes[self.tfds_splits[split]]

    def num_prepared_rows(self, split: str) -> int:
        """Returns the number of rows of a split of the data set on this machine, without reading
        them.

        Raises:
            FileNotFoundError: the data set is not prepared on this machine.
        """
        return self._prepared._size(self._prepared._builder(), self.tfds_splits[split])

    def other_sizes(self) -> dict[str, tuple[int, int]]:
        """Returns TFDS split -> (rows on this machine, rows published), for splits that differ."""
        return self._prepared.other_sizes()

    def read_index(self, split: str) -> Index:
        """Reads the ids and labels of a split in one pass over its rows, without the images."""
        ids: list[str] = []
        labels: list[tuple[int, ...]] = []
        for row in self._kept(split, with_image=False).as_numpy_iterator():
            ids.append(row["id"].decode())
            labels.append(tuple(sorted(row["labels"].tolist())))
        return Index(tuple(ids), tuple(labels))

    def stream(self, split: str, rows: np.ndarray | None) -> tf.data.Dataset:
        """Returns the examples of a split in TFDS's order; only ascending `rows` [n] unless None.

        Raises:
            FileNotFoundError: the data set is not prepared on this machine.
            ValueError: its classes differ from those expected.
        """
        size = 0 if rows is None else len(self.index(split))
        return only(self._kept(split, with_image=True), rows, size)

    def _kept(self, split: str, with_image: bool) -> tf.data.Dataset:
        """Returns the examples with one of the classes."""
        builder: Any = self._prepared._builder()
        tfds_split = self.tfds_splits[split]
        self._prepared._size(builder, tfds_split)  # checks the split and logs another size
        features = builder.info.features
        reads = self.reads if self.derive else (self.label,)
        wanted = dict.fromkeys([*reads, *self.ids, *(["image"] if with_image else [])], True)
        decoders: dict[str, Any] = {"image": tfds.decode.SkipDecoding()} if with_image else {}
        dataset = builder.as_dataset(
            split=tfds_split,
            shuffle_files=False,
            decoders=tfds.decode.PartialDecoding(wanted, decoders=decoders),
            read_config=tfds.ReadConfig(
                interleave_cycle_length=1,
                try_autocache=False,
                skip_prefetch=True,
                add_tfds_id=not self.ids,
            ),
        )
        table = None if self.derive else self._label_of(_names(features, self.label))

        def example(row: Mapping[str, Any]) -> dict[str, tf.Tensor]:
            if table is None:
                labels = self.derive(row)  # type: ignore[misc]
            else:
                labels = tf.gather(table, tf.reshape(row[self.label], [-1]))
                labels = tf.boolean_mask(labels, labels >= 0)
            parts = [_text(features[name], row[name]) for name in self.ids] or [row[TFDS_ID]]
            image = {"image": row["image"]} if with_image else {}
            return {**image, "labels": labels, "id": tf.strings.join(parts, "/")}

        examples = map_dataset(dataset, example)
        if self.multi_label:
            return examples
        return examples.filter(
            tf.autograph.experimental.do_not_convert(lambda x: tf.size(x["labels"]) > 0)
        )

    def _label_of(self, names: Sequence[str]) -> tf.Tensor:
        """Returns the label of each class number of the data set on this machine, int32 [m]; -1 for
        classes that are left out.

        Raises:
            ValueError: one of the classes is not in the data set.
        """
        wanted = list(self.class_ids)
        if list(names) == [str(i) for i in range(len(names))] and len(names) == len(wanted):
            return tf.range(len(names), dtype=tf.int32)  # prepared without names
        number = {normalized(name): i for i, name in enumerate(names)}
        if missing := [name for name in wanted if normalized(name) not in number]:
            raise ValueError(
                f"The data set {self.data} on this machine has no class {missing[0]!r}; it has "
                f"{len(names):,} classes, such as {', '.join(map(repr, names[:3]))}. Rebuild it "
                f"with `tfds build {self.data} --data_dir DIR --overwrite`, with DIR as in "
                "--tfds_data_dir or TFDS_DATA_DIR."
            )
        table = np.full(len(names), -1, np.int32)
        for label, name in enumerate(wanted):
            table[number[normalized(name)]] = label
        return tf.constant(table)


def declared_names(data: str, label: str = "label") -> tuple[str, ...]:
    """Returns the class names that TFDS's code declares for a data set, in its order."""
    builder: Any = tfds.builder(data, data_dir=NOWHERE)
    return tuple(_names(builder.info.features, label))


def _names(features: Any, label: str) -> Sequence[str]:
    feature = features[label]
    return getattr(feature, "feature", feature).names


def _text(feature: Any, value: tf.Tensor) -> tf.Tensor:
    """Returns a feature as text; a class is its name in the data set."""
    if isinstance(feature, tfds.features.ClassLabel):
        return tf.gather(tf.constant(feature.names), value)
    return value if value.dtype == tf.string else tf.strings.as_string(value)
