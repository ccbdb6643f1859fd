"""SeqIO's vocabularies without SeqIO or TensorFlow: text to token ids and back.

A server needs the token ids of training, but no other part of the data pipeline. These classes
have SeqIO's names and produce its ids and digests (`artifacts.vocabulary_digest`), so a vocabulary
can be checked against the one that an artifact was trained with.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any

import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from mpt_jax.batching import hf_token_files, hf_tokenizer
from mpt_jax.batching.hf_tokenizer import HuggingFaceVocabulary, until_eos

# File names in Hugging Face's folders and in exports (`mpt-jax export`).
SENTENCEPIECE_NAMES = ("spiece.model", "sentencepiece.model", "tokenizer.model", "vocabulary.model")
FILE_NAMES = (*SENTENCEPIECE_NAMES, hf_token_files.TOKENIZER, hf_tokenizer.VOCAB)
BYT5 = "byt5"
T5_EXTRA_IDS = 100
EOS = 1


class SentencePieceVocabulary:
    """A SentencePiece model with sentinels after its pieces; the first sentinel has the last id.

    Attributes:
        sp_model: the serialized model with its sentinels.
        tokenizer: its `SentencePieceProcessor`.
        vocab_size: number of ids, sentinels included.
        eos_id: end-of-sequence id.
        unk_id: id of the unknown token.
    """

    def __init__(self, model: bytes, extra_ids: int = 0):
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        for number in reversed(range(extra_ids)):
            sentinel = proto.SentencePiece.USER_DEFINED
            proto.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=sentinel)
        self.sp_model: bytes = proto.SerializeToString()
        self.tokenizer: Any = sentencepiece.SentencePieceProcessor(model_proto=self.sp_model)
        self.vocab_size: int = self.tokenizer.GetPieceSize()
        self.eos_id: int = self.tokenizer.eos_id()
        self.unk_id: int = self.tokenizer.unk_id()

    def encode(self, s: str) -> list[int]:
        """Returns the token ids of a text, without an end-of-sequence id."""
        return self.tokenizer.EncodeAsIds(s)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids up to the first end-of-sequence id.

        Ids that are not in the vocabulary are decoded as the unknown piece.
        """
        known = [
            self.unk_id if i >= self.vocab_size else int(i) for i in until_eos(ids, self.eos_id)
        ]
        return self.tokenizer.DecodeIds(known)


class ByteVocabulary:
    """ByT5's vocabulary: a byte's id is its value plus three; sentinels, if any, follow the bytes.

    Attributes:
        vocab_size: number of ids, sentinels included.
        eos_id: end-of-sequence id.
        unk_id: SeqIO's id of the unknown token; `encode` never returns it.
    """

    first_byte = 3
    eos_id = EOS
    unk_id = 2

    def __init__(self, extra_ids: int = 0):
        self.vocab_size: int = self.first_byte + 256 + extra_ids

    def encode(self, s: str) -> list[int]:
        """Returns the token ids of a text, without an end-of-sequence id."""
        return [byte + self.first_byte for byte in s.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids up to the first end-of-sequence id.

        Ids that are not bytes are skipped.
        """
        values = (i - self.first_byte for i in until_eos(ids, self.eos_id))
        return bytes(value for value in values if 0 <= value < 256).decode(errors="ignore")


Tokenizer = SentencePieceVocabulary | ByteVocabulary | HuggingFaceVocabulary


@functools.cache
def load(path: str, extra_ids: int | None = None) -> Tokenizer:
    """Loads the vocabulary at `path`; arguments and errors as for `vocabularies.load`."""
    if path == BYT5:
        return ByteVocabulary(extra_ids or 0)
    file = vocabulary_file(path)
    if file.suffix == ".json":
        return hf_tokenizer.load(file, extra_ids)
    model = processor(file)
    if extra_ids is None:
        extra_ids = usual_extra_ids(model)
    return SentencePieceVocabulary(file.read_bytes(), extra_ids)


def vocabulary_file(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the vocabulary file at a path. In a folder, this is a SentencePiece model if there is
    one, otherwise tokenizer.json, otherwise vocab.json.

    Raises:
        FileNotFoundError: the path does not exist, or is a folder without a vocabulary.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no vocabulary at {path}. Give the path of a SentencePiece model, the path "
            f"of a folder with one of {', '.join(FILE_NAMES)}, or {BYT5!r}."
        )
    if not path.is_dir():
        return path
    children = sorted(child.name for child in path.iterdir())
    for name in FILE_NAMES:
        if name in children:
            return path / name
    raise FileNotFoundError(
        f"The folder {path} has no vocabulary: it holds none of {', '.join(FILE_NAMES)} (found: "
        f"{', '.join(children) or 'no files'}). Copy the vocabulary of the backbone into the "
        "folder, or give the path of the file."
    )


def processor(path: epath.Path) -> Any:
    """Loads a SentencePiece model file; returns its `SentencePieceProcessor`.

    Raises:
        ValueError: the file is not a SentencePiece model, or lacks tokens that files beside it name
            (`hf_token_files.check_model_holds_all`).
    """
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a SentencePiece model ({str(error).rstrip('.')}). Download or copy it "
            "again, or give the path of another file."
        ) from error
    hf_token_files.check_model_holds_all(path, model)
    return model


def usual_extra_ids(model: Any) -> int:
    """Returns the number of sentinels to add: T5's 100, or 0 if the model's pieces include them.

    The pieces of umT5 include the sentinels. So do those of models that were saved with their
    sentinels, each after a word-start mark (`▁`).
    """
    spelled = ("<extra_id_0>", "▁<extra_id_0>")
    holds_them = any(model.PieceToId(piece) != model.unk_id() for piece in spelled)
    return 0 if holds_them else T5_EXTRA_IDS
