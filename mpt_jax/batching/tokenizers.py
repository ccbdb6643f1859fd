"""Text into ids and back with SeqIO's vocabularies, but without SeqIO or TensorFlow.

A server has to know the ids that training saw and nothing else of a data pipeline. These classes
have SeqIO's names and give its ids and its digests (`artifacts.vocabulary_digest`), so that an
artifact can tell whether it gets the vocabulary that it was trained with.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

# Of Hugging Face's folders, and of ours (`mpt-jax export`).
SENTENCEPIECE_NAMES = ("spiece.model", "sentencepiece.model", "tokenizer.model", "vocabulary.model")
BYT5 = "byt5"
T5_EXTRA_IDS = 100
EOS = 1


class SentencePieceVocabulary:
    """A SentencePiece model with sentinels after its pieces, the first of them with the last id.

    Attributes:
        sp_model: the model with its sentinels, serialized.
        vocab_size: ids, sentinels included.
        eos_id: of the piece that ends a text.
    """

    def __init__(self, model: bytes, extra_ids: int = 0):
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        for number in reversed(range(extra_ids)):
            sentinel = proto.SentencePiece.USER_DEFINED
            proto.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=sentinel)
        self.sp_model: bytes = proto.SerializeToString()
        self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=self.sp_model)
        self.vocab_size: int = self._processor.GetPieceSize()
        self.eos_id: int = self._processor.eos_id()

    def encode(self, s: str) -> list[int]:
        """Token ids of a text, without an end-of-sequence id."""
        return self._processor.EncodeAsIds(s)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end of sequence; foreign ids are unknown pieces."""
        unknown = self._processor.unk_id()
        known = [unknown if i >= self.vocab_size else int(i) for i in _until(ids, self.eos_id)]
        return self._processor.DecodeIds(known)


class ByteVocabulary:
    """ByT5's bytes: a byte's id is its value plus three. Sentinels, if any, come after them.

    Attributes:
        vocab_size: ids, sentinels included.
        eos_id: of what ends a text.
    """

    first_byte = 3
    eos_id = EOS

    def __init__(self, extra_ids: int = 0):
        self.vocab_size: int = self.first_byte + 256 + extra_ids

    def encode(self, s: str) -> list[int]:
        """Token ids of a text, without an end-of-sequence id."""
        return [byte + self.first_byte for byte in s.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end of sequence; ids that are no byte's are left out."""
        found = (i - self.first_byte for i in _until(ids, self.eos_id))
        return bytes(i for i in found if 0 <= i < 256).decode(errors="ignore")


Tokenizer = SentencePieceVocabulary | ByteVocabulary


@functools.cache
def load(path: str, extra_ids: int | None = None) -> Tokenizer:
    """The vocabulary at `path`; the arguments are those of `vocabularies.load`.

    Raises:
        FileNotFoundError: there is nothing at `path`, or no SentencePiece model in it.
        ValueError: the file is not a SentencePiece model.
    """
    if path == BYT5:
        return ByteVocabulary(extra_ids or 0)
    model = model_file(path)
    found = processor(model)
    if extra_ids is None:
        extra_ids = usual_extra_ids(found)
    return SentencePieceVocabulary(model.read_bytes(), extra_ids)


def model_file(path: str | os.PathLike[str]) -> epath.Path:
    """The SentencePiece model at a path, which may be the folder it lies in.

    Raises:
        FileNotFoundError: there is none.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no vocabulary at {path}. Give a SentencePiece model, a folder with one of "
            f"{', '.join(SENTENCEPIECE_NAMES)}, or {BYT5!r}."
        )
    if not path.is_dir():
        return path
    found = sorted(child.name for child in path.iterdir())
    for name in SENTENCEPIECE_NAMES:
        if name in found:
            return path / name
    only_json = (
        " It has tokenizer.json, which SeqIO cannot read: download spiece.model from the same "
        "model's page."
        if "tokenizer.json" in found
        else ""
    )
    raise FileNotFoundError(
        f"The folder {path} holds none of {', '.join(SENTENCEPIECE_NAMES)}.{only_json} "
        f"Found: {', '.join(found) or 'nothing'}."
    )


def processor(path: epath.Path) -> Any:
    """SentencePiece's processor of a model file.

    Raises:
        ValueError: it is not a SentencePiece model.
    """
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error}).") from error


def usual_extra_ids(model: Any) -> int:
    """T5's sentinels, or none where the model's pieces hold them already, as umT5's do, and with a
    space before them those that were written with their sentinels."""
    spelled = ("<extra_id_0>", "▁<extra_id_0>")
    holds_them = any(model.PieceToId(piece) != model.unk_id() for piece in spelled)
    return 0 if holds_them else T5_EXTRA_IDS


def _until(ids: Iterable[int], eos_id: int) -> Sequence[int]:
    ids = list(ids)
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids
