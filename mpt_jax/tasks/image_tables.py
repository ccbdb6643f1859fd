"""Converters from published lists of images to the tables that `image_files.TableImages` reads.

Each writes a CSV file with the columns file, label and split. They check the structure of what they
read; the files themselves are checked when the table is used.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec
import numpy as np
import tensorflow as tf
from etils import epath

from mpt_jax.core import schema
from mpt_jax.runtime.files import write_atomic
from mpt_jax.tasks import file_formats
from mpt_jax.tasks.image_few_shot import seal_index
from mpt_jax.tasks.image_files import BETWEEN, SPLIT_NAMES

Path = str | os.PathLike[str]
Row = tuple[str, str, str]  # file, label, split

_COOP = dict[str, list[tuple[schema.Name, Annotated[int, msgspec.Meta(ge=0)], schema.Name]]]
_ELEVATER_LINE = re.compile(
    r"(?:(?P<archive>[^@]+)@)?(?P<file>\S+)\s+(?P<labels>\d{1,6}(?:,\d{1,6})*)", re.ASCII
)
_USAGES = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}
_SIDE = 48  # pixels of a FER-2013 image


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes (file, label, split) to a CSV file that `TableImages` reads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "label", "split"))
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def from_coop(split_file: Path, table: Path) -> None:
    """Converts a split file of CoOp (`split_zhou_<Set>.json`) to a table with its class names.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read.
    """
    rows = _coop(split_file)
    write(table, [(x, name, split) for split in rows for x, _, name in rows[split]])


def index_from_coop(split_file: Path, task: str, index: Path) -> None:
    """Converts a split file of CoOp to an index file for `images.register_selection`, to replay it
    with the images of `task`.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read.
    """
    rows = _coop(split_file)
    seal_index(index, task, {split: [file for file, _, _ in rows[split]] for split in rows})


def from_elevater(
    lists: Mapping[str, Path], table: Path, classes: Sequence[str], first_label: int = 0
) -> None:
    """Converts index files of ELEVATER to a table. Their lines are `<archive>.zip@<path> <labels>`;
    the files in the table are `<archive>/<path>`, so unpack each archive into a folder of its name.

    Args:
        lists: Split -> index file.
        table: The CSV file to write.
        classes: The name of each label number.
        first_label: The number of the first class.

    Raises:
        FileNotFoundError: an index file does not exist.
        ValueError: a line cannot be read.
    """
    rows: list[Row] = []
    for split, path in lists.items():
        for number, line in enumerate(_lines(path), start=1):
            match = _ELEVATER_LINE.fullmatch(line.strip())
            labels = [int(x) - first_label for x in match["labels"].split(",")] if match else [-1]
            if match is None or not all(0 <= label < len(classes) for label in labels):
                raise ValueError(
                    f"{path}, line {number}: {line[:80]!r} is not a path and labels from "
                    f"{first_label} to {len(classes) - 1 + first_label}. Pass the classes of this "
                    "data set, or first_label=1 if its labels count from 1."
                )
            folder = (match["archive"] or "").removesuffix(".zip")
            file = f"{folder}/{match['file']}" if folder else match["file"]
            rows.append((file, BETWEEN.join(classes[label] for label in labels), split))
    write(table, rows)


def from_aircraft(folder: Path, table: Path, images: str = "images") -> None:
    """Converts the variant lists of FGVC-Aircraft, `images_variant_{train,val,test}.txt` in
    `folder`, to a table. Their lines are `<number> <variant>`.

    Args:
        folder: The folder `data` of the data set.
        table: The CSV file to write.
        images: The folder of the images, relative to that of the table.
    """
    rows: list[Row] = []
    for name in ("train", "val", "test"):
        for line in _lines(epath.Path(folder) / f"images_variant_{name}.txt"):
            number, _, variant = line.partition(" ")
            rows.append((f"{images}/{number}.jpg", variant.strip(), SPLIT_NAMES[name]))
    write(table, rows)


def from_hateful_memes(lists: Mapping[str, Path], table: Path) -> None:
    """Converts the JSONL files of Hateful Memes to a table.

    Args:
        lists: Split -> JSONL file with `img` and `label` in each line, such as {"train":
            "train.jsonl", "test": "dev_seen.jsonl"}, as ELEVATER uses them.
        table: The CSV file to write.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a line lacks a field.
    """
    rows: list[Row] = []
    for split, path in lists.items():
        for number, row in _rows(path, (".jsonl",)):
            image, label = _fields(row, ("img", "label"), path, number)
            rows.append((image, label, split))
    write(table, rows)


def from_fer2013(source: Path, folder: Path) -> None:
    """Converts FER-2013's CSV file of pixels to PNG files and `list.csv` in `folder`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a row lacks a column, or is not an image of 48 x 48 pixels.
    """
    rows: list[Row] = []
    for number, row in _rows(source, (".csv",)):
        label, pixels, usage = _fields(row, ("emotion", "pixels", "Usage"), source, number)
        values = pixels.split()
        good = all(x.isascii() and x.isdigit() and int(x) < 256 for x in values)
        if usage not in _USAGES or len(values) != _SIDE**2 or not good:
            raise ValueError(
                f"{source}, line {number}: {len(values):,} pixels of usage {usage!r} are not a "
                f"FER-2013 image of {_SIDE}x{_SIDE} gray pixels. Use the file fer2013.csv."
            )
        split = _USAGES[usage]
        place = epath.Path(folder) / split
        place.mkdir(parents=True, exist_ok=True)
        image = np.array(values, np.uint8).reshape(_SIDE, _SIDE, 1)
        (place / f"{number:05}.png").write_bytes(tf.io.encode_png(image).numpy())
        rows.append((f"{split}/{number:05}.png", label, split))
    write(epath.Path(folder) / "list.csv", rows)


def _coop(path: Path) -> dict[str, list[tuple[str, int, str]]]:
    """Returns our split -> (file, label, class name) of a split file of CoOp."""
    if not epath.Path(path).is_file():
        raise FileNotFoundError(f"The split file {path} does not exist. Correct the path.")
    what, advice = f"The split file {path}", "Use a split_zhou_<Set>.json of CoOp."
    rows = schema.load(epath.Path(path).read_bytes(), _COOP, what, advice)
    if unknown := [split for split in rows if split not in SPLIT_NAMES]:
        raise ValueError(f"{what} has the unknown split {unknown[0]!r}. {advice}")
    return {SPLIT_NAMES[split]: rows[split] for split in rows}


def _lines(path: Path) -> list[str]:
    file = epath.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"The list {path} does not exist. Correct the path.")
    try:
        return [line for line in file.read_bytes().decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text. Save the file as UTF-8.") from error


def _rows(path: Path, extensions: Sequence[str]) -> Iterable[tuple[int, Mapping[str, object]]]:
    file = epath.Path(path)
    if file_formats.extension(file) not in extensions:
        raise ValueError(f"{path} is not a {' or '.join(extensions)} file. Correct the path.")
    if not file.is_file():
        raise FileNotFoundError(f"The file {path} does not exist. Correct the path.")
    for number, row in file_formats.rows(file):
        if isinstance(row, file_formats.Unusable):
            raise ValueError(f"{path}, line {number} cannot be read: {row.reason}.")
        yield number, row


def _fields(row: Mapping[str, object], names: Sequence[str], path: Path, number: int) -> list[str]:
    values = [row.get(name) for name in names]
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(names):
        raise ValueError(
            f"{path}, line {number} lacks one of the fields {', '.join(names)} with text or a "
            "number. Use the file of the published data set."
        )
    return texts
