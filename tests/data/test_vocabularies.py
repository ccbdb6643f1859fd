"""Vocabularies from files, folders and bytes."""

import shutil

import pytest
import tensorflow.compat.v2 as tf

from mpt_jax.data import vocabularies
from tests.fixtures import fake_gcs
from tests.fixtures.shared_data import shared


@pytest.fixture
def model():
    return shared("sentencepiece_test/sentencepiece.model")


def test_load_vocabulary_file_and_folders_same_ids(model, tmp_path):
    direct = vocabularies.load(str(model), extra_ids=0)
    assert direct.vocab_size == 26
    for name in vocabularies.SENTENCEPIECE_NAMES:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(model, folder / name)
        found = vocabularies.load(str(folder), extra_ids=0)
        assert found.encode("this is a test") == direct.encode("this is a test")


def test_load_vocabulary_from_storage_bucket_same_ids(model, tmp_path, monkeypatch):
    (tmp_path / "t5").mkdir()
    shutil.copy(model, tmp_path / "t5" / "spiece.model")
    name = fake_gcs.mount(tmp_path, monkeypatch)
    read = lambda path, mode: open(str(path).replace(name, str(tmp_path)), mode)  # noqa: E731
    monkeypatch.setattr(tf.io.gfile, "GFile", read)  # SeqIO's way into the bucket
    found = vocabularies.load(f"{name}/t5", extra_ids=0)
    direct = vocabularies.load(str(model), extra_ids=0)
    assert found.encode("this is a test") == direct.encode("this is a test")
    with pytest.raises(FileNotFoundError, match="no vocabulary at gs://bucket/t6"):
        vocabularies.load(f"{name}/t6")


def test_load_vocabulary_t5_has_sentinels_and_known_ids():
    path = str(shared("t5_vocab/sentencepiece.model"))
    vocabulary = vocabularies.load(path)
    assert vocabulary.vocab_size == 32100
    # Known ids: "translate English to German" in every T5 1.0 checkpoint's preprocessing.
    assert vocabulary.encode("translate English to German: ") == [13959, 1566, 12, 2968, 10]


def test_load_vocabulary_byt5_needs_no_file():
    assert vocabularies.load("byt5").encode("ab") == [100, 101]


def test_load_vocabulary_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no vocabulary at .*nowhere. Give the path"):
        vocabularies.load(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere. .* To get one: make it."):
        vocabularies.load(str(tmp_path / "nowhere"), command="make it")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="holds none of spiece.model, .*found: merges.txt"):
        vocabularies.load(str(tmp_path))


def test_load_vocabulary_invalid_model_raises(tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="spiece.model is not a SentencePiece model"):
        vocabularies.load(str(path))
