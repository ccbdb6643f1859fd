"""Vocabularies from files, local or in a bucket of the user's; T5's own bucket is never needed."""

import functools

import seqio
from etils import epath
from seqio.vocabularies import Vocabulary

SENTENCEPIECE_NAMES = ("spiece.model", "sentencepiece.model", "tokenizer.model")
BYT5 = "byt5"
T5_EXTRA_IDS = 100


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
        model = _model_file(epath.Path(path))
    except FileNotFoundError as error:
        how = f" To get one: {command}." if command else ""
        raise FileNotFoundError(f"{error}{how}") from error
    processor = _processor(model)
    if extra_ids is None:
        extra_ids = 0 if _holds(processor, "<extra_id_0>") else T5_EXTRA_IDS
    return seqio.SentencePieceVocabulary(str(model), extra_ids=extra_ids)


def _model_file(path: epath.Path) -> epath.Path:
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


def _processor(path: epath.Path):
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error}).") from error


def _holds(processor, piece: str) -> bool:
    return processor.PieceToId(piece) != processor.unk_id()
