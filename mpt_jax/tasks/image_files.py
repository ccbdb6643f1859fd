"""Sources of images in folders, and of images listed in tables.

`FolderImages` and `TableImages` list their images at first use, check every row, and report how
many cannot be used, with the first names. Files are opened only for the examples that are read,
except that local files are checked to start like an image.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow as tf
from etils import epath

from mpt_jax.runtime.files import is_local
from mpt_jax.tasks import file_formats
from mpt_jax.tasks.image_sources import SHOWN, BadRows, Index, ListedImages, check_classes

Path = str | os.PathLike[str]
Listing = tuple[Sequence[str] | None, dict[str, tuple[Index, Sequence[Any]]]]

WHOLE = "train"  # the only split of data without splits
# Names of folders, or values of the column `split` -> our names of splits.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
ORDER = ("train", "validation", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
OTHER_SUFFIXES = (".webp", ".tif", ".tiff", ".ppm", ".heic", ".avif")  # of images of other formats
STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")  # of files that can be decoded
NOT_AN_IMAGE = "not a JPEG, PNG, GIF or BMP file"
BETWEEN = "|"  # of several labels in a cell


class FileImages(ListedImages):
    """Source of images in files below `root`.

    Args:
        root: The folder below which the files are.
        skip_broken: The number of rows that may be unusable and are left out.
        multi_label: Whether an image may have any number of classes.
    """

    def __init__(self, root: Path, skip_broken: int = 0, multi_label: bool = False):
        super().__init__((), multi_label)
        self.root, self.skip_broken = epath.Path(root), skip_broken
        self.classes: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return str(self.root)

    @property
    def class_ids(self) -> Sequence[str] | None:
        """The names of the classes in label order; without data if the constructor has them."""
        return super().class_ids if self.classes is None else self.classes

    def load(self, item: tf.Tensor) -> tf.Tensor:
        """Returns the bytes of a file, string []."""
        return tf.io.read_file(item)


class FolderImages(FileImages):
    """Source of images in one folder per class, sorted by name.

    Without `with_splits`, classes are the folders `root/<class>` and the only split is train. With
    it, they are `root/<split>/<class>`, with the splits train, validation (or val) and test.

    Images of other formats (`OTHER_SUFFIXES`) cannot be used. Other files, such as .txt or .json,
    and folders below a class are ignored.

    Args:
        root: The folder.
        with_splits: Whether there is one folder per split above the classes.
        classes: The names of the folders in label order; None for those that exist, sorted, which
            must be the same in all splits.
        skip_broken: The number of files that may be unusable and are left out.
    """

    def __init__(
        self,
        root: Path,
        with_splits: bool = False,
        classes: Sequence[str] | None = None,
        skip_broken: int = 0,
    ):
        super().__init__(root, skip_broken)
        self.with_splits = with_splits
        self.classes = None if classes is None else tuple(classes)

    def read_listing(self) -> Listing:
        """Lists the files; see `ListedImages.read_listing`.

        Raises:
            FileNotFoundError: the folder does not exist.
            ValueError: folders are not splits, two are the same split, classes differ between
                splits and `classes` is None, a class has no image, or files cannot be used.
        """
        splits = self._split_folders()
        classes = {split: _subfolders(folder) for split, folder in splits.items()}
        present = sorted({name for found in classes.values() for name in found})
        for split, found in classes.items():
            if self.classes is None and (absent := [x for x in present if x not in found]):
                raise ValueError(
                    f"{self.root}: the {split} split lacks {len(absent):,} of {len(present):,} "
                    f"classes of the other splits: {', '.join(absent[:SHOWN])}. Rename or add the "
                    "folders, or pass the names of all classes as classes=."
                )
        names = present if self.classes is None else self.classes
        if unknown := [name for name in present if name not in names]:
            raise ValueError(
                f"{self.root}: {len(unknown):,} of {len(present):,} folders are not classes: "
                f"{', '.join(unknown[:SHOWN])}. Remove them, or correct classes=."
            )
        if len(names) < 2:
            raise ValueError(
                f"{self.root} has {len(names)} folders of classes, but classification needs at "
                f"least two. Use {'root/<split>/<class>' if self.with_splits else 'root/<class>'}, "
                f"or pass with_splits={not self.with_splits}."
            )
        bad, total = BadRows(self.root, self.skip_broken), 0
        listed: dict[str, tuple[Index, Sequence[Any]]] = {}
        for split, folder in splits.items():
            rows = [
                (f"{folder.name}/{name}/{file}" if self.with_splits else f"{name}/{file}", label)
                for label, name in enumerate(names)
                if name in classes[split]
                for file in _files(folder / name)
            ]
            total += len(rows)
            checked = check_files(self.root, [name for name, _ in rows], bad)
            kept = [(x, (label,)) for (x, label), good in zip(rows, checked, strict=True) if good]
            listed[split] = _rows(self.root, kept)
        bad.check(total)
        check_classes(self.root, names, [index for index, _ in listed.values()])
        return names, listed

    def _split_folders(self) -> dict[str, epath.Path]:
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"The folder {self.root} does not exist. Correct the path; relative paths start "
                "from the working directory."
            )
        if not self.with_splits:
            return {WHOLE: self.root}
        named: dict[str, list[str]] = {}
        for name in _subfolders(self.root):
            named.setdefault(SPLIT_NAMES.get(name.casefold(), ""), []).append(name)
        others = named.pop("", [])
        if not named:
            raise ValueError(
                f"{self.root} has no folder train, validation or test. Pass with_splits=False if "
                "its folders are classes."
            )
        if others:
            raise ValueError(
                f"{self.root}: {len(others):,} of its folders are not splits: "
                f"{', '.join(others[:SHOWN])}. Rename them to train, validation or test, or move "
                "them elsewhere."
            )
        for split, names in named.items():
            if len(names) > 1:
                raise ValueError(
                    f"{self.root}: the folders {' and '.join(names)} are both the {split} split. "
                    "Merge them, or move one elsewhere."
                )
        return {split: self.root / named[split][0] for split in ORDER if split in named}


class TableImages(FileImages):
    """Source of images listed in a CSV, TSV or JSONL file with the columns `file`, `label` and, if
    the images are split, `split`.

    A file is relative to `root`, and may be in one row only, so that splits share no image. A label
    is the name of a class; several are separated by `|` if `multi_label`, where an empty cell means
    none.

    Args:
        table: The file. Its extension selects the reader, see `file_formats`.
        root: The folder of the images; None for that of the table.
        classes: The labels in label order; None for those in the table, sorted.
        multi_label: Whether an image may have any number of classes.
        skip_broken: The number of rows that may be unusable and are left out.
    """

    def __init__(
        self,
        table: Path,
        root: Path | None = None,
        classes: Sequence[str] | None = None,
        multi_label: bool = False,
        skip_broken: int = 0,
    ):
        self.table = epath.Path(table)
        super().__init__(self.table.parent if root is None else root, skip_broken, multi_label)
        self.classes = None if classes is None else tuple(classes)

    def __str__(self) -> str:
        return str(self.table)

    def read_listing(self) -> Listing:
        """Reads the table; see `ListedImages.read_listing`.

        Raises:
            FileNotFoundError: the table does not exist.
            ValueError: the table has no rows, rows cannot be used, or a class has no image.
        """
        bad = BadRows(self.table, self.skip_broken)
        rows, total, seen = [], 0, set()
        for number, row in _table_rows(self.table):
            total += 1
            try:
                parsed = self._parsed(row)
                if (place := posixpath.normpath(parsed[0])) in seen:
                    raise file_formats.Unusable("listed in an earlier row")
                seen.add(place)
                rows.append(parsed)
            except file_formats.Unusable as error:
                name = row.get("file") if isinstance(row, Mapping) else None
                bad.add(str(name or f"line {number}"), error.reason)
        checked = check_files(self.root, [name for name, _, _ in rows], bad)
        rows = [row for row, good in zip(rows, checked, strict=True) if good]
        names = self.classes or sorted({label for _, labels, _ in rows for label in labels})
        bad.check(total)
        if len(names) < 2:
            raise ValueError(
                f"{self.table} has {len(names)} different labels in {total:,} rows, but "
                "classification needs at least two. Add rows, or pass classes=."
            )
        number_of = {name: label for label, name in enumerate(names)}
        splits: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for file, labels, split in rows:
            numbers = tuple(sorted(number_of[label] for label in labels))
            splits.setdefault(split, []).append((file, numbers))
        listed = {x: _rows(self.root, splits[x]) for x in ORDER if x in splits}
        check_classes(self.table, names, [index for index, _ in listed.values()])
        return names, listed

    def _parsed(self, row: Any) -> tuple[str, tuple[str, ...], str]:
        """Returns the file, the labels and the split of a row; raises Unusable."""
        if isinstance(row, file_formats.Unusable):
            raise row
        for field in ("file", "label"):
            if not isinstance(row.get(field), str):
                raise file_formats.Unusable(f"no column {field!r} with text")
        labels = [row["label"].strip()]
        if self.multi_label:
            labels = [label.strip() for label in row["label"].split(BETWEEN) if label.strip()]
        if not self.multi_label and not labels[0]:
            raise file_formats.Unusable("empty label")
        if len(set(labels)) < len(labels):
            raise file_formats.Unusable(f"label {row['label']!r} names a class twice")
        unknown = [x for x in labels if self.classes is not None and x not in self.classes]
        if unknown:
            raise file_formats.Unusable(f"unknown label {unknown[0]!r}")
        split = row.get("split", WHOLE)
        if not isinstance(split, str) or split.strip().casefold() not in SPLIT_NAMES:
            raise file_formats.Unusable(f"split {split!r} is not train, validation or test")
        return row["file"].strip(), tuple(labels), SPLIT_NAMES[split.strip().casefold()]


def check_files(root: epath.Path, names: Sequence[str], bad: BadRows) -> list[bool]:
    """Returns whether each file can be used, and adds the others to `bad`.

    A file must stay below `root`, exist and, if it is local, start like an image. Folders are
    listed once instead of asking for every file.
    """
    folders: dict[str, set[str]] = {}
    reasons: list[str | None] = []
    for name in names:
        folder, file = posixpath.split(name)
        if posixpath.isabs(name) or ".." in name.split("/") or "\0" in name or not file:
            reasons.append("path leaves the folder of the images")
            continue
        if file.lower().endswith(OTHER_SUFFIXES):
            reasons.append(NOT_AN_IMAGE)
            continue
        if folder not in folders:
            place = root / folder
            folders[folder] = {x.name for x in place.iterdir()} if place.is_dir() else set()
        reasons.append(None if file in folders[folder] else "no such file")
    if is_local(root):
        present = [i for i, reason in enumerate(reasons) if reason is None]
        with ThreadPoolExecutor(8) as pool:
            starts = pool.map(lambda i: _problem(root, names[i]), present)
            for i, reason in zip(present, starts, strict=True):
                reasons[i] = reason
    for name, reason in zip(names, reasons, strict=True):
        if reason is not None:
            bad.add(name, reason)
    return [reason is None for reason in reasons]


def _problem(root: epath.Path, name: str) -> str | None:
    path = os.path.join(os.fspath(root), name)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not start:
        return "empty file"
    return None if start.startswith(STARTS) else NOT_AN_IMAGE


def _table_rows(table: epath.Path) -> list[tuple[int, Any]]:
    extension = file_formats.extension(table)
    if extension not in file_formats.EXTENSIONS:
        raise ValueError(
            f"{table} has the unsupported extension {extension!r}. Use one of "
            f"{', '.join(file_formats.EXTENSIONS)}."
        )
    if not table.is_file():
        raise FileNotFoundError(
            f"The file {table} does not exist. Correct the path; relative paths start from the "
            "working directory."
        )
    return list(file_formats.rows(table))


def _rows(
    root: epath.Path, rows: Sequence[tuple[str, tuple[int, ...]]]
) -> tuple[Index, Sequence[str]]:
    """Returns the index of (file, labels), and the paths."""
    index = Index(tuple(name for name, _ in rows), tuple(labels for _, labels in rows))
    return index, [os.fspath(root / name) for name in index.ids]


def _subfolders(folder: epath.Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir() if not x.name.startswith(".") and x.is_dir())


def _files(folder: epath.Path) -> list[str]:
    names = (x.name for x in folder.iterdir())
    suffixes = SUFFIXES + OTHER_SUFFIXES
    return sorted(x for x in names if x.lower().endswith(suffixes) and not x.startswith("."))
