"""Conversion of a CLIP to another format. The output is read back and compared before it is moved
to the target folder."""

from __future__ import annotations

import os
from collections.abc import Callable

from etils import epath

from mpt_jax.convert import backbones, clip_fingerprint, clip_parity, detect, parity
from mpt_jax.convert.clip import load_clip, read_clip_config, write_clip, write_open_clip
from mpt_jax.core import schema
from mpt_jax.runtime.files import is_local, new_folder

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def convert(
    source: epath.Path,
    target: epath.Path,
    to: str,
    *,
    dtype: str | None = None,
    outputs: bool = True,
    say: Callable[[str], None] = print,
) -> epath.Path:
    """Converts a CLIP to another format, and copies its tokenizer. The target is created only if
    its configuration and every leaf that is read back are identical to what was written.

    Args:
        source: a Hugging Face or open_clip folder.
        target: the folder to create.
        to: `'hf'` or `'open-clip'`.
        dtype: the dtype to write, `'float32'` or `'bfloat16'`; None keeps the dtype of each leaf.
        outputs: whether to also compare the features of source and target on a fixed batch, and to
            write the fingerprint of the target's.
        say: called with the line to show to the user, the result of the comparison.

    Returns:
        The target.

    Raises:
        FileExistsError: the target already exists.
        FileNotFoundError, ValueError: the source or its tokenizer cannot be read, the model cannot
            be written in this format, or the target differs from the source.
    """
    if target.exists():  # before the weights are read
        raise FileExistsError(
            f"{target} already exists. Choose another target, or remove the existing one."
        )
    config, params = read_clip_config(source), load_clip(source)
    before = clip_parity.forward(config, params) if outputs else {}
    if dtype is not None:
        params = backbones.cast(params, dtype)  # frees the parameters of full precision
    write = {detect.HF: write_clip, detect.OPEN_CLIP: write_open_clip}[to]
    with new_folder(target) as folder:
        write(folder, params, config)
        _copy_tokenizer(source, folder)
        restored = load_clip(folder, config)
        line = parity.identical(params, restored, str(target)) + ": identical"
        if dtype is not None:
            line += f" after rounding to {dtype}"
        if outputs:
            after = clip_parity.forward(config, restored)
            difference = max(parity.largest_difference(x, after[k]) for k, x in before.items())
            clip_fingerprint.write(folder, config, restored)
            line += f"; features of a fixed batch differ by at most {difference:.3g}"
    say(line)
    return target


def _copy_tokenizer(source: epath.Path, folder: epath.Path) -> None:
    """Copies the files of a tokenizer that the source has.

    Raises:
        ValueError: one is not a regular file, or is too large.
    """
    for name in TOKENIZER_FILES:
        path = source / name
        if not path.exists():
            continue
        regular = os.path.isfile(path) if is_local(path) else path.is_file()
        if not regular or path.stat().length > schema.MOST_BYTES:
            raise ValueError(
                f"{path} is not a regular file of at most {schema.MOST_BYTES:,} bytes, so it is no "
                "file of a tokenizer. Copy it again from an intact copy, or remove it."
            )
        (folder / name).write_bytes(path.read_bytes())
