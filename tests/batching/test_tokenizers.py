"""Tokenizers without SeqIO, compared with SeqIO's vocabularies."""

import pytest

from mpt_jax.artifacts.artifacts import vocabulary_digest
from mpt_jax.batching import tokenizers
from mpt_jax.data import vocabularies
from mpt_jax.runtime.paths import SHIPPED
from tests.fixtures.shared_data import shared

TOY = str(SHIPPED / "toy.model")
TEXTS = ("", "sst2 : a fine film", "  two  spaces ", "naïve 北京 \t\n 😀", "<extra_id_0> and </s>")


def paths() -> list[tuple[str, int | None]]:
    return [(TOY, 16), (TOY, None), ("byt5", None), ("byt5", 125)]


@pytest.mark.parametrize(("path", "extra_ids"), paths())
def test_tokenizers_ids_texts_and_digests_equal_seqio(path, extra_ids):
    ours, theirs = tokenizers.load(path, extra_ids), vocabularies.load(path, extra_ids)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.eos_id == theirs.eos_id
    assert vocabulary_digest(ours) == vocabulary_digest(theirs)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == list(theirs.encode(text))
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode([*ids, 1, *ids, 0]) == theirs.decode([*ids, 1, *ids, 0])
    beyond = [3, ours.vocab_size, ours.vocab_size + 9, 4]
    assert ours.decode(beyond) == theirs.decode(beyond)


def test_tokenizers_t5_model_has_sentinels_and_seqio_digest():
    path = str(shared("t5_vocab/sentencepiece.model"))
    ours = tokenizers.load(path)
    assert ours.vocab_size == 32100
    assert ours.encode("translate English to German: ") == [13959, 1566, 12, 2968, 10]
    assert ours.encode("<extra_id_0>") == [32099]
    assert vocabulary_digest(ours) == vocabulary_digest(vocabularies.load(path))


@pytest.mark.parametrize("load", [tokenizers.load, vocabularies.load])
def test_load_model_saved_with_sentinels_adds_none(load, tmp_path):
    whole = tokenizers.load(TOY, 16)
    (tmp_path / "vocabulary.model").write_bytes(whole.sp_model)  # as `mpt-jax export` writes it
    again = load(str(tmp_path))
    assert again.vocab_size == whole.vocab_size
    assert vocabulary_digest(again) == vocabulary_digest(whole)
    assert list(again.encode("<extra_id_3> a")) == whole.encode("<extra_id_3> a")


def test_load_missing_or_invalid_model_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no vocabulary at .*nowhere"):
        tokenizers.load(str(tmp_path / "nowhere"))
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="spiece.model is not a SentencePiece model"):
        tokenizers.load(str(tmp_path))
