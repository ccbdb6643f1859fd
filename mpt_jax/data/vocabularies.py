"""SeqIO vocabularies, loaded from a local path or a storage bucket."""

import functools

import seqio
from seqio.vocabularies import Vocabulary

from mpt_jax.batching.tokenizers import (
    BYT5,
    SENTENCEPIECE_NAMES,
    T5_EXTRA_IDS,
    model_file,
    processor,
    usual_extra_ids,
)

__all__ = ["BYT5", "SENTENCEPIECE_NAMES", "T5_EXTRA_IDS", "load"]


@functools.cache
def load(path: str, extra_ids: int | None = None, command: str = "") -> Vocabulary:
    """Returns the vocabulary at `path`.

    Args:
        path: a SentencePiece model; a folder with one, such as a T5 from Hugging Face; or 'byt5'
            for ByT5's byte vocabulary, which needs no file.
        extra_ids: number of sentinels to append to the pieces. By default T5's 100, or none if the
            model already has sentinels (umT5) or `path` is 'byt5'.
        command: the command that gets the vocabulary, shown in the error if it is missing.

    Raises:
        FileNotFoundError: `path` does not exist, or holds no SentencePiece model.
        ValueError: the file is not a SentencePiece model.
    """
    if path == BYT5:
        return seqio.ByteVocabulary(extra_ids=extra_ids or 0)
    try:
        model = model_file(path)
    except FileNotFoundError as error:
        how = f" To get one: {command}." if command else ""
        raise FileNotFoundError(f"{error}{how}") from error
    sentencepiece = processor(model)
    if extra_ids is None:
        extra_ids = usual_extra_ids(sentencepiece)
    return seqio.SentencePieceVocabulary(str(model), extra_ids=extra_ids)
