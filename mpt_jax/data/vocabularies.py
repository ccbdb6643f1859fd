"""SeqIO vocabularies, loaded from a local path or a storage bucket."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from seqio.vocabularies import Vocabulary

from mpt_jax.batching import hf_tokenizer
from mpt_jax.batching.tokenizers import (
    BYT5,
    SENTENCEPIECE_NAMES,
    T5_EXTRA_IDS,
    processor,
    usual_extra_ids,
    vocabulary_file,
)

__all__ = ["BYT5", "SENTENCEPIECE_NAMES", "T5_EXTRA_IDS", "HuggingFaceVocabulary", "load"]


class HuggingFaceVocabulary(Vocabulary):
    """A Hugging Face tokenizer as a SeqIO vocabulary. It tokenizes in Python, text by text.

    Args:
        vocabulary: the tokenizer.
        path: its file, for messages.
    """

    def __init__(self, vocabulary: hf_tokenizer.HuggingFaceVocabulary, path: str):
        super().__init__()
        self.path, self.tokenizer, self.identity = path, vocabulary.tokenizer, vocabulary.identity
        self._vocabulary = vocabulary

    @property
    def bos_id(self) -> None:
        """None: a start token, if any, is part of the encoded text."""
        return None

    @property
    def eos_id(self) -> int:
        """The end-of-sequence id."""
        return self._vocabulary.eos_id

    @property
    def unk_id(self) -> int | None:
        """The id of unknown text; None if the tokenizer has none."""
        return self._vocabulary.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self._vocabulary.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Any) -> str:
        return self._vocabulary.decode([int(i) for i in ids])

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes) -> np.ndarray:
            return np.array(self._vocabulary.encode(text.decode()), np.int32)

        # Stateless, because tf.data cannot save the position of a stateful function.
        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> np.ndarray:
            texts = [self.decode(row.tolist()) for row in rows.reshape(-1, rows.shape[-1])]
            return np.array([text.encode() for text in texts], object).reshape(rows.shape[:-1])

        return tf.numpy_function(decode, [ids], tf.string, stateful=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceVocabulary) and self.identity == other.identity

    def __str__(self) -> str:
        return f"HuggingFaceVocabulary(path={self.path})"


@functools.cache
def load(path: str, extra_ids: int | None = None, command: str = "") -> Vocabulary:
    """Returns the vocabulary at `path`.

    Args:
        path: a SentencePiece model; a tokenizer.json, or a vocab.json with merges.txt beside it; a
            folder with one of these, such as a T5 from Hugging Face; or 'byt5' for ByT5's byte
            vocabulary, which needs no file.
        extra_ids: number of sentinels to append to the pieces. By default T5's 100, or none if the
            model already has sentinels (umT5) or `path` is 'byt5'. Not for a tokenizer.json or
            vocab.json, which has its own.
        command: the command that gets the vocabulary, shown in the error if it is missing.

    Raises:
        FileNotFoundError: `path` does not exist, or holds no vocabulary.
        ValueError: the file cannot be read as a vocabulary, or does not hold all added tokens that
            the files beside it name.
    """
    if path == BYT5:
        return seqio.ByteVocabulary(extra_ids=extra_ids or 0)
    try:
        file = vocabulary_file(path)
    except FileNotFoundError as error:
        how = f" To get one: {command}." if command else ""
        raise FileNotFoundError(f"{error}{how}") from error
    if file.suffix == ".json":
        return HuggingFaceVocabulary(hf_tokenizer.load(file, extra_ids), str(file))
    sentencepiece = processor(file)
    if extra_ids is None:
        extra_ids = usual_extra_ids(sentencepiece)
    return seqio.SentencePieceVocabulary(str(file), extra_ids=extra_ids)
