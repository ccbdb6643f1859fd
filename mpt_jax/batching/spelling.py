"""How a vocabulary spells texts: their pieces, unknown tokens, and texts with equal tokens.

The functions take vocabularies of SeqIO and of `batching.tokenizers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST_PIECES = 20  # pieces of a text that an error shows


def as_decoded(vocabulary: Any, text: str) -> str:
    """Returns a text encoded and decoded, the closest form of it that a model can output."""
    return vocabulary.decode(vocabulary.encode(text))


def pieces(vocabulary: Any, ids: Sequence[int]) -> str:
    """Returns the pieces of token ids as text, such as `'▁', '<unk>'`; at most `MOST_PIECES`."""
    model = getattr(vocabulary, "tokenizer", None)
    # The names of SentencePiece and of Hugging Face's tokenizers.
    piece_of = getattr(model, "IdToPiece", None) or getattr(model, "id_to_token", None)
    if piece_of is None:
        piece_of = lambda token: vocabulary.decode([token])  # noqa: E731
    shown = ", ".join(repr(piece_of(int(token))) for token in ids[:MOST_PIECES])
    return shown + ", ..." * (len(ids) > MOST_PIECES)


def check_told_apart(
    texts: Sequence[str], ids: Sequence[Sequence[int]], vocabulary: Any, kind: str, owner: str = ""
) -> None:
    """Checks that a model can choose between texts: their tokens differ, and none is unknown.

    Args:
        texts: the texts.
        ids: the token ids of each text.
        vocabulary: the vocabulary of the ids.
        kind: the noun for a text in errors, such as 'label'.
        owner: the owner of the texts in errors, such as "task 'rte'"; '' for none.

    Raises:
        ValueError: two texts have the same tokens, or a text has an unknown token.
    """
    of_owner = f" of {owner}" if owner else ""
    first: dict[tuple[int, ...], str] = {}
    for text, tokens in zip(texts, ids, strict=True):
        if tuple(tokens) in first:
            raise ValueError(
                f"The {kind}s {first[tuple(tokens)]!r} and {text!r}{of_owner} have the same tokens "
                f"({pieces(vocabulary, tokens)}), so the model cannot tell them apart. "
                f"{_advice(vocabulary, kind)}"
            )
        first[tuple(tokens)] = text
    for text, tokens in zip(texts, ids, strict=True):
        if vocabulary.unk_id is not None and vocabulary.unk_id in tokens:
            raise ValueError(
                f"The {kind} {text!r}{of_owner} has characters that the vocabulary lacks: its "
                f"tokens are {pieces(vocabulary, tokens)}. {_advice(vocabulary, kind)}"
            )


def _advice(vocabulary: Any, kind: str) -> str:
    has_digits = vocabulary.unk_id is None or vocabulary.unk_id not in vocabulary.encode("0 1 2 3")
    return f"Use other words for the {kind}s{', or digits' if has_digits else ''}."
