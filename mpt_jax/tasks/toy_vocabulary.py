"""The toy suite's SentencePiece vocabulary: every word of the world is one piece.

`python -m mpt_jax.tasks.toy_vocabulary` regenerates data/toy.model, byte for byte with the same
version of SentencePiece. A unigram model is trained on sentences of the world. Then its pieces are
replaced: every word becomes one piece, scored by its frequency. Letters are pieces as well, so that
words from outside the world have an encoding and never become <unk>.
"""

from __future__ import annotations

import collections
import functools
import io
import math
import pathlib
import random
import string

from mpt_jax.tasks import toy_pretrain, toy_tasks

VOCABULARY_PATH = pathlib.Path(__file__).parent / "data" / "toy.model"
EXTRA_IDS = 16
# Rows of the backbone's embedding: pieces and sentinels, rounded up to a multiple of 128.
EMBEDDING_ROWS = 512
_NUM_WORDS = 354  # the first pieces after pad, eos and unk
_TARGET_WORDS = frozenset({116, 202, 203, 206, 208, 210})  # only in prefixes of target tasks


def _sentences(per_task: int = 1500) -> list[str]:
    """Returns texts of all tasks and of the pretraining mixture, without sentinels."""
    rng = random.Random(0)
    pairs = [
        task.make(rng, "train")
        for task in toy_tasks.SOURCE_TASKS + toy_tasks.TARGET_TASKS
        for _ in range(per_task)
    ]
    pairs += [make(rng) for make, _ in toy_pretrain.MIXTURE for _ in range(per_task)]
    joined = (" ".join(pair).split() for pair in pairs)
    return [" ".join(word for word in words if not word.startswith("<")) for words in joined]


def train_vocabulary() -> bytes:
    """Returns the serialized SentencePiece model: pad 0, eos 1, unk 2, then words, then letters."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    sentences = _sentences()
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=trained,
        model_type="unigram",
        vocab_size=400,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    model = proto.ModelProto.FromString(trained.getvalue())
    counts = collections.Counter(word for sentence in sentences for word in sentence.split())
    control, total = list(model.pieces[:3]), sum(counts.values())
    del model.pieces[:]
    model.pieces.extend(control)
    # Most frequent first, as T5's vocabulary is, so that "the first n ids" are common words.
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        model.pieces.add(piece="▁" + word, score=math.log(count / total))
    for letter in "▁" + string.ascii_lowercase + "".join(sorted(set("".join(counts)))):
        if letter not in {piece.piece for piece in model.pieces}:
            model.pieces.add(piece=letter, score=-20.0)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def pretrained_ids() -> tuple[int, ...]:
    """Returns the ids of the words that occur in pretraining, from which prompts start. The other
    rows of the embedding are letters, words of target tasks, and rows without a piece."""
    return tuple(i for i in range(3, _NUM_WORDS + 3) if i not in _TARGET_WORDS)


@functools.lru_cache(maxsize=1)
def word_ids() -> dict[str, int]:
    """Returns {word: id}, including sentinels `<0>`, `<1>`, ... (as in T5, `<0>` has the last id).

    Text of the world's words has the same encoding with this table as with SentencePiece. The table
    is faster, for generating pretraining examples.
    """
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY_PATH))
    table = {
        pieces.id_to_piece(i)[1:]: i
        for i in range(3, pieces.vocab_size())
        if pieces.id_to_piece(i).startswith("▁") and len(pieces.id_to_piece(i)) > 1
    }
    size = pieces.vocab_size() + EXTRA_IDS
    table.update({f"<{i}>": size - 1 - i for i in range(EXTRA_IDS)})
    return table


if __name__ == "__main__":
    VOCABULARY_PATH.parent.mkdir(exist_ok=True)
    VOCABULARY_PATH.write_bytes(train_vocabulary())
    print(f"Wrote {VOCABULARY_PATH}: {len(word_ids())} words and sentinels")
