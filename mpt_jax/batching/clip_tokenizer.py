"""CLIP's tokenizer: a byte-level BPE of lower-case text, read from vocab.json and merges.txt.

Token ids are those of the published code (openai/CLIP) with one difference: texts are not repaired
by the package ftfy, which is optional in some implementations, so that ids would depend on what is
installed. The ids are equal for texts without mojibake, control characters, typographic quotes,
ligatures and full-width characters.
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import os
import re
import unicodedata
from collections.abc import Iterable

from etils import epath

from mpt_jax.batching import hf_token_files as token_files
from mpt_jax.core import schema

VOCAB, MERGES = "vocab.json", "merges.txt"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_MOST_TOKENS = 2**20
_COPY = f"Copy {VOCAB} and {MERGES} again from the folder of the backbone."
# White space as Unicode defines it. Python's \s has four control characters more.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACES = re.compile(f"[{_SPACE}]+")
# Pieces that are matched before letters, digits and other characters.
_FIXED = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d", re.IGNORECASE)


class ClipTokenizer:
    """A byte-level BPE whose words end with `</w>`.

    Attributes:
        files: {name: content} of vocab.json and merges.txt.
        vocab_size: number of ids.
        bos_id, eos_id: ids of `<|startoftext|>` and `<|endoftext|>`.
        pad_id: 0. This is also the id of a token ("!"), so padding must be found by the position of
            the end-of-sequence id.
        identity: bytes that differ between vocabularies, for digests.
    """

    pad_id = 0

    def __init__(self, files: dict[str, bytes], folder: str | os.PathLike[str]):
        """Reads the content of the files; `folder` names their folder in errors.

        Raises:
            ValueError: the files are not the vocabulary and merges of a CLIP tokenizer.
        """
        self.files = files
        self._ids = _read_vocabulary(files[VOCAB], f"{folder}/{VOCAB}")
        self._ranks = _read_merges(files[MERGES], f"{folder}/{MERGES}", self._ids)
        self._tokens = sorted(self._ids, key=self._ids.__getitem__)
        self.vocab_size: int = len(self._tokens)
        self.bos_id: int = self._ids[BOS]
        self.eos_id: int = self._ids[EOS]
        parts = {"tokens": self._tokens, "merges": [list(pair) for pair in self._ranks]}
        digests = {
            name: hashlib.sha256(json.dumps(x).encode()).hexdigest() for name, x in parts.items()
        }
        self.identity: bytes = json.dumps({"kind": "clip", **digests}, sort_keys=True).encode()
        self._ids_of = functools.lru_cache(maxsize=2**16)(self._encode_piece)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> ClipTokenizer:
        """Reads vocab.json and merges.txt of a backbone's folder.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: as in the constructor, or a file is too large.
        """
        folder = epath.Path(path)
        files = token_files.read_if_there(folder, (VOCAB, MERGES))
        if missing := [name for name in (VOCAB, MERGES) if name not in files]:
            raise FileNotFoundError(
                f"The folder {folder} lacks {' and '.join(missing)}, the tokenizer of CLIP. Copy "
                "the files of the backbone's tokenizer into the folder."
            )
        return cls(files, folder)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without start and end.

        HTML entities are resolved (twice, as texts of the web are often escaped twice), white space
        is reduced to single spaces, and the text becomes lower-case.

        Raises:
            ValueError: the text has half of a surrogate pair instead of a character.
        """
        ids: list[int] = []
        try:
            for piece in _pieces(_clean(text)):
                ids += self._ids_of(piece)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text {schema.short(ascii(text))} has half of a surrogate pair instead of a "
                "character. Correct the text."
            ) from error
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids up to the first end-of-sequence id, without start and end.

        Words and punctuation are separated by spaces, and bytes that are not UTF-8 are replaced.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        tokens = []
        for number in map(int, ids):
            if not 0 <= number < self.vocab_size:
                raise ValueError(
                    f"The token id {number} is not in CLIP's vocabulary, which has ids from 0 to "
                    f"{self.vocab_size - 1}. Decode with the tokenizer that the ids come from."
                )
            if number == self.eos_id:
                break
            if number != self.bos_id:
                tokens.append(self._tokens[number])
        byte_of = {character: byte for byte, character in byte_characters().items()}
        words = "".join(tokens).split(_WORD_END)
        decoded = (bytes(byte_of[c] for c in word).decode(errors="replace") for word in words)
        return " ".join(decoded).strip()

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        if piece in (BOS, EOS):
            return (self._ids[piece],)
        characters = byte_characters()
        parts = [characters[byte] for byte in piece.encode()]
        parts[-1] += _WORD_END
        never = len(self._ranks)
        while len(parts) > 1:
            pairs = zip(parts, parts[1:], strict=False)
            rank, pair = min((self._ranks.get(pair, never), pair) for pair in pairs)
            if rank == never:
                break
            parts = _merged(parts, pair)
        return tuple(self._ids[part] for part in parts)


@functools.cache
def load(path: str, command: str = "") -> ClipTokenizer:
    """Returns the tokenizer in a backbone's folder; see `ClipTokenizer.from_folder`.

    Args:
        path: the folder.
        command: the command that gets the backbone, shown in the error if it is missing.
    """
    try:
        return ClipTokenizer.from_folder(path)
    except FileNotFoundError as error:
        how = f" To get one: {command}." if command else ""
        raise FileNotFoundError(f"{error}{how}") from error


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Returns parts with all occurrences of a pair joined, from left to right."""
    joined, position = [], 0
    while position < len(parts):
        width = 2 if tuple(parts[position : position + 2]) == pair else 1
        joined.append("".join(parts[position : position + width]))
        position += width
    return joined


@functools.cache
def byte_characters() -> dict[int, str]:
    """Returns the printable character that represents each byte, in the order of token ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {byte: chr(byte) for byte in printable}
    return shown | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _clean(text: str) -> str:
    # All published tokenizers compose characters (NFC), the original one through ftfy.
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)))
    return _SPACES.sub(" ", text.strip()).strip().lower()


def _pieces(text: str) -> list[str]:
    """Splits a text: contractions, runs of letters, single digits, and runs of other characters."""
    pieces, start = [], 0
    while start < len(text):
        kind = _kind(text[start])
        if match := _FIXED.match(text, start):
            end = match.end()
        else:
            end = start + 1
            while kind != "N" and end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != " ":
            pieces.append(text[start:end])
        start = end
    return pieces


@functools.lru_cache(maxsize=2**16)
def _kind(character: str) -> str:
    """Returns the class of a character: letter (L), digit (N), white space (' ') or other (*)."""
    if _SPACES.match(character):
        return " "
    major = unicodedata.category(character)[0]
    return major if major in "LN" else "*"


def _read_vocabulary(content: bytes, file: str) -> dict[str, int]:
    """Returns {token: id}; checks that the ids are 0..n-1 and that all needed tokens exist."""
    ids: dict[str, int] = schema.load(content, dict, file, _COPY)
    if len(ids) > _MOST_TOKENS:
        raise ValueError(f"{file} has {len(ids):,} tokens, but the limit is 2**20. {_COPY}")
    seen: dict[int, str] = {}
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number < len(ids):
            raise ValueError(
                f"{file} has the token {schema.short(ascii(token))} with the id "
                f"{schema.short(json.dumps(number))}, but the ids of its {len(ids):,} tokens must "
                f"be 0 to {len(ids) - 1}. {_COPY}"
            )
        if number in seen:
            both = " and ".join(schema.short(ascii(x)) for x in (seen[number], token))
            raise ValueError(f"{file} gives the id {number} to two tokens, {both}. {_COPY}")
        seen[number] = token
    characters = byte_characters().values()
    needed = [BOS, EOS, *characters, *(c + _WORD_END for c in characters)]
    if missing := [token for token in needed if token not in ids]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{file} lacks tokens that every CLIP tokenizer has: "
            f"{', '.join(map(repr, missing[:5]))}{more}. {_COPY}"
        )
    allowed = {*"".join(characters)}
    for token in ids:
        if token not in (BOS, EOS) and not allowed.issuperset(token.removesuffix(_WORD_END)):
            raise ValueError(
                f"{file} has the token {schema.short(ascii(token))}, which is not made of the "
                f"characters of a byte-level BPE. {_COPY}"
            )
    return ids


def _read_merges(content: bytes, file: str, ids: dict[str, int]) -> dict[tuple[str, str], int]:
    """Returns {(left, right): rank} of the merges, the first of which is applied first."""
    try:
        header, *lines = content.decode().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}). {_COPY}") from error
    if "#version" not in header:  # without it, implementations differ in the first merge
        raise ValueError(
            f"{file} must start with a line '#version: 0.2', but it starts with "
            f"{schema.short(ascii(header))}. {_COPY}"
        )
    ranks: dict[tuple[str, str], int] = {}
    for rank, line in enumerate(lines):
        pair = tuple(line.removesuffix("\r").split(" "))
        where = f"{file} has the line {schema.short(ascii(line))} (line {rank + 2})"
        if len(pair) != 2:
            raise ValueError(f"{where}, but a line must have two tokens. {_COPY}")
        if unknown := [token for token in (*pair, "".join(pair)) if token not in ids]:
            raise ValueError(f"{where}, whose token {unknown[0]!r} is not in {VOCAB}. {_COPY}")
        if pair in ranks:
            raise ValueError(f"{where}, which repeats line {ranks[pair] + 2}. {_COPY}")
        ranks[pair] = rank
    return ranks
