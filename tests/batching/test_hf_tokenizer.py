"""Hugging Face tokenizers as vocabularies: a small byte-level BPE, trained here."""

import json
import sys

import pytest
import seqio

from mpt_jax.artifacts.artifacts import vocabulary_digest
from mpt_jax.batching import spelling, tokenizers
from mpt_jax.data import preprocessors, vocabularies
from mpt_jax.runtime.paths import SHIPPED
from tests.fixtures import memory_tasks
from tests.fixtures.hf_tokenizers import (
    SPECIAL,
    folder_of_bpe,
    folder_of_json,
    trained,
    with_ends,
)

TEXTS = ("def f ( x ) : return x", "naïve 北京 👍", "  two  spaces ", "", "<extra_id_0> f")
LOADERS = [tokenizers.load, vocabularies.load]


@pytest.mark.parametrize("load", LOADERS)
def test_json_without_ends_gives_ids_of_the_library(load, tmp_path):
    made = trained()
    vocabulary = load(str(folder_of_json(tmp_path / "a", made)))
    assert (vocabulary.eos_id, vocabulary.unk_id) == (2, 3)
    assert vocabulary.vocab_size == made.get_vocab_size()
    for text in TEXTS:
        assert list(vocabulary.encode(text)) == made.encode(text).ids
        assert vocabulary.decode([*vocabulary.encode(text), 2, 9, 0]) == text
    assert vocabulary.decode([260, 5000]) == made.decode([260]) + "<unk>"  # no such id
    assert spelling.pieces(vocabulary, vocabulary.encode("def f")) == "'def', 'Ġf'"


@pytest.mark.parametrize("write", [folder_of_json, folder_of_bpe])
@pytest.mark.parametrize("load", LOADERS)
def test_json_and_bpe_files_with_ends_give_ids_of_the_library(load, write, tmp_path):
    made = with_ends(trained())
    vocabulary = load(str(write(tmp_path / "a", made)))
    for text in TEXTS:
        ids = made.encode(text).ids
        assert ids[0] == 1 and ids[-1] == 2
        assert [*vocabulary.encode(text), vocabulary.eos_id] == ids
        assert vocabulary.decode(ids) == text


def test_seqio_vocabulary_equals_that_of_serving_in_a_task(tmp_path):
    path = str(folder_of_json(tmp_path / "a", with_ends(trained())))
    ours, theirs = tokenizers.load(path), vocabularies.load(path)
    assert vocabulary_digest(ours) == vocabulary_digest(theirs)
    source = memory_tasks.listed([("def f", "film good")])
    task = memory_tasks.register("hft", source, vocabulary=theirs)
    dataset = task.get_dataset({"inputs": 9, "targets": 9}, "train", shuffle=False)
    (example,) = dataset.as_numpy_iterator()
    assert example["inputs"].tolist() == [*ours.encode("def f"), 2]
    assert example["targets"].tolist() == [*ours.encode("film good"), 2]
    assert theirs.decode_tf(example["targets"]).numpy() == b"film good"
    assert preprocessors.output_features(theirs)["inputs"] == task.output_features["inputs"]
    assert theirs != seqio.ByteVocabulary()


def test_digest_covers_files_and_special_ids(tmp_path):
    made = trained()
    digests = [
        vocabulary_digest(tokenizers.load(str(folder)))
        for folder in (
            folder_of_json(tmp_path / "a", made),
            folder_of_json(tmp_path / "same", made),
            folder_of_json(tmp_path / "ends", with_ends(trained())),
            folder_of_json(tmp_path / "eos", made, {"eos_token": "<s>"}),
            folder_of_bpe(tmp_path / "bpe", made),
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_files_of_vocabulary_read_back_with_the_same_digest(tmp_path):
    """As `mpt-jax export` writes them."""
    for number, write in enumerate((folder_of_json, folder_of_bpe)):
        whole = tokenizers.load(str(write(tmp_path / f"a{number}", with_ends(trained()))))
        copy = tmp_path / f"copy{number}"
        copy.mkdir()
        for name, content in whole.files.items():
            (copy / name).write_bytes(content)
        assert vocabulary_digest(tokenizers.load(str(copy))) == vocabulary_digest(whole)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("special", "config", "model", "message"),
    [
        (SPECIAL, {"eos_token": "<end>"}, {}, "lacks its eos_token, '<end>'. Set eos_token in"),
        (("<s>", *SPECIAL), None, {}, "'<pad>' .* has the id 1, but batches are padded with 0"),
        (SPECIAL, None, {"eos_token_id": 1}, "config.json has eos_token_id 1, .* has 2"),
        (SPECIAL, None, {"pad_token_id": 3}, "config.json has pad_token_id 3, .* has 0"),
    ],
)
def test_special_ids_that_cannot_be_used_raise(load, special, config, model, message, tmp_path):
    folder = folder_of_json(tmp_path / "a", trained(special), config)
    (folder / "config.json").write_text(json.dumps(model))
    with pytest.raises(ValueError, match=message):
        load(str(folder))


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"nope", b"\xff", b"[" * 100_000, b'{"model": 1}']
)
def test_damaged_json_raises_naming_the_file(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json (is not|cannot be read as|must hold)"):
        tokenizers.load(str(tmp_path))


def test_bpe_of_unknown_class_or_without_merges_raises(tmp_path):
    folder = folder_of_bpe(tmp_path / "a", trained())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(ValueError, match="'CLIPTokenizer', but vocab.json and merges.txt can"):
        tokenizers.load(str(folder))
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match="vocab.json cannot be used without merges.txt"):
        tokenizers.load(str(folder))


def test_extra_ids_and_missing_library_raise(tmp_path, monkeypatch):
    folder = folder_of_json(tmp_path / "a", trained())
    with pytest.raises(ValueError, match="already contains its sentinels, but extra_ids is 16"):
        tokenizers.load(str(folder), 16)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'mpt-jax\[tokenizers\]'"):
        tokenizers.load(str(folder), 0)


# --- Added tokens beside a SentencePiece model ------------------------------------------------

BRACES = {"{": 405, "}": 406}
SENTINELS = {f"<extra_id_{n}>": 404 - n for n in range(16)}
DECODER = {"405": {"content": "{"}, "406": {"content": "}"}, "404": {"content": "<extra_id_0>"}}


def sp_folder(folder, name, content):
    (folder / "spiece.model").write_bytes((SHIPPED / "toy.model").read_bytes())
    if name:
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {**SENTINELS, **BRACES}),
        ("tokenizer_config.json", {"added_tokens_decoder": DECODER}),
        (
            "tokenizer.json",
            {"added_tokens": [{"id": 405, "content": "{"}, {"id": 406, "content": "}"}]},
        ),
        ("special_tokens_map.json", {"additional_special_tokens": ["{", {"content": "}"}]}),
        ("special_tokens_map.json", {"mask_token": {"content": "{"}, "sep_token": "}"}),
    ],
)
def test_added_tokens_that_the_model_lacks_raise_with_their_list(load, name, content, tmp_path):
    folder = sp_folder(tmp_path, name, content)
    for path in (folder, folder / "spiece.model"):
        with pytest.raises(ValueError, match=r"that spiece.model lacks: '\{', '\}'\. Set the voc"):
            load(str(path), 16)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", SENTINELS),
        ("added_tokens.json", {"▁film": 9}),  # a piece of the model
        (
            "tokenizer_config.json",
            {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        ),
        ("special_tokens_map.json", {"additional_special_tokens": [*SENTINELS]}),
        ("", {}),
    ],
)
def test_sentinels_and_pieces_of_the_model_are_no_added_tokens(name, content, tmp_path):
    folder = sp_folder(tmp_path, name, content)
    toy = tokenizers.load(str(SHIPPED / "toy.model"), 16)
    assert vocabulary_digest(tokenizers.load(str(folder), 16)) == vocabulary_digest(toy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", {"{": "many"}, "the added token '{' with the id 'many'"),
        ("added_tokens.json", {"{": True}, "the added token '{' with the id True"),
        ("added_tokens.json", [1], "must hold a JSON object, got list"),
        ("special_tokens_map.json", {"eos_token": 5}, "sets eos_token to 5, which is not a string"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "{"}}, "with the id 'x'"),
        ("tokenizer.json", {"added_tokens": [{"id": 1, "content": [2]}]}, r"added token \[2\]"),
        ("tokenizer_config.json", {"eos_token": "\ud800"}, r"token '\\ud800', which has half of a"),
        ("added_tokens.json", {"a\udc00": 7}, r"token 'a\\udc00', which has half of a"),
    ],
)
def test_added_tokens_of_another_structure_raise(name, content, message, tmp_path):
    folder = sp_folder(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        tokenizers.load(str(folder), 16)
