"""SeqIO's vocabularies from files, local or in a bucket of the user's; T5's own bucket is never
needed."""

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
        path: a SentencePiece model; a folder that holds one, such as a Hugging Face T5's; or
            'byt5' for ByT5's bytes, which need no file.
        extra_ids: sentinels after the pieces. Default: T5's 100, or none where the model already
            holds them (umT5) or counts bytes.
        command: how to get the vocabulary, said where it is missing.

    Raises:
        FileNotFoundError: there is nothing at `path`, or no SentencePiece model in it.
        ValueError: the file is not a SentencePiece model.
    """
    if path == BYT5:
        return seqio.ByteVocabulary(extra_ids=extra_ids or 0)
    try:
        model = model_file(path)
    except FileNotFoundError as error:
        how = f" To get one: {command}." if command else ""
        raise FileNotFoundError(f"{error}{how}") from error
    found = processor(model)
    if extra_ids is None:
        extra_ids = usual_extra_ids(found)
    return seqio.SentencePieceVocabulary(str(model), extra_ids=extra_ids)
