"""Vocabulary of a Hugging Face tokenizer without a SentencePiece model (CodeT5, for example).

It is read from tokenizer.json, or from vocab.json and merges.txt. Token ids are those of
transformers, with its start token if it adds one. The package `tokenizers` is imported only here.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from mpt_jax.batching import hf_token_files as token_files
from mpt_jax.batching.hf_token_files import ADDED, CONFIG, SPECIAL, TOKENIZER

VOCAB, MERGES = "vocab.json", "merges.txt"
# Classes whose vocab.json and merges.txt are a byte-level BPE -> whether start and end are added.
CLASSES = {"RobertaTokenizer": True, "GPT2Tokenizer": False}
# Names of special tokens in folders that record none: those of every T5.
USUAL = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


class HuggingFaceVocabulary:
    """A Hugging Face tokenizer.

    Args:
        files: {name: content} of tokenizer.json, or of vocab.json and merges.txt, and of the files
            beside them that name special tokens.
        folder: where the files are, for errors.

    Attributes:
        files: the argument.
        tokenizer: the `tokenizers.Tokenizer`.
        vocab_size: number of ids, including those of added tokens.
        eos_id, unk_id: ids of the end of sequence and of unknown text; `unk_id` is None if the
            tokenizer has no unknown token.
        identity: bytes that differ between vocabularies, for digests.

    Raises:
        ValueError: the package `tokenizers` is missing, a file cannot be used, the tokenizer has no
            end-of-sequence or padding token, or its padding does not have the id 0.
    """

    def __init__(self, files: dict[str, bytes], folder: Any):
        self.files = files
        special = {**USUAL, **token_files.special_tokens(files, folder)}
        library = _library(folder)
        if TOKENIZER in files:
            self.tokenizer: Any = _of_json(library, files[TOKENIZER], f"{folder}/{TOKENIZER}")
        else:
            self.tokenizer = _of_bpe(library, files, special, folder)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        ids = {name: self.tokenizer.token_to_id(special[name]) for name in USUAL}
        for name in ("eos_token", "pad_token"):
            if ids[name] is None:
                raise ValueError(
                    f"The tokenizer in {folder} lacks its {name}, {special[name]!r}. Set {name} in "
                    f"{folder}/{CONFIG} to one of its tokens."
                )
        if ids["pad_token"] != 0:
            raise ValueError(
                f"The padding token {special['pad_token']!r} of the tokenizer in {folder} has the "
                f"id {ids['pad_token']}, but batches are padded with 0. Use the tokenizer of a T5, "
                "whose padding has the id 0."
            )
        self.eos_id: int = ids["eos_token"]
        self.unk_id: int | None = ids["unk_token"]
        self.vocab_size: int = 1 + max(self.tokenizer.get_vocab().values())
        self._hidden = {
            self.tokenizer.token_to_id(special[name])
            for name in ("bos_token", "cls_token", "eos_token", "pad_token")
            if name in special
        }
        self._adds_eos = self.tokenizer.encode("").ids[-1:] == [self.eos_id]
        main = [name for name in (TOKENIZER, VOCAB, MERGES) if name in files]
        facts = {name: hashlib.sha256(files[name]).hexdigest() for name in main}
        facts |= {"ids": ids, "empty": self.tokenizer.encode("").ids}
        if TOKENIZER not in files:
            facts["added"] = token_files.added_tokens(files, folder)
        self.identity: bytes = json.dumps(facts, sort_keys=True).encode()

    def encode(self, s: str) -> list[int]:
        """Returns the token ids of a text, without an end-of-sequence id."""
        ids = self.tokenizer.encode(s).ids
        return ids[:-1] if self._adds_eos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids up to the first end-of-sequence id, without start, end and
        padding. Ids that are not in the vocabulary are decoded as the unknown token, if any."""
        shown = [int(i) for i in until_eos(ids, self.eos_id) if int(i) not in self._hidden]
        known = [i if i < self.vocab_size else self.unk_id for i in shown]
        known = [i for i in known if i is not None]
        return self.tokenizer.decode(known, skip_special_tokens=False)


def load(file: epath.Path, extra_ids: int | None) -> HuggingFaceVocabulary:
    """Loads the tokenizer of tokenizer.json, or of vocab.json with the merges.txt beside it.

    Args:
        file: the .json file.
        extra_ids: must be None or 0, since such tokenizers already contain their sentinels.

    Raises:
        ValueError: as in `HuggingFaceVocabulary`; `extra_ids` is set; or config.json beside the
            file has other ids of the end of sequence or of padding.
    """
    folder = file.parent
    if extra_ids:
        raise ValueError(
            f"{file} already contains its sentinels, but extra_ids is {extra_ids}. Leave "
            "vocabularies.load.extra_ids (--extra-ids) unset."
        )
    files = token_files.read_if_there(folder, (CONFIG, SPECIAL))
    if file.name == VOCAB:
        files |= token_files.read_if_there(folder, (VOCAB, MERGES, ADDED))
        if MERGES not in files:
            raise ValueError(
                f"{file} cannot be used without {MERGES}, which is missing. Copy {MERGES} into "
                f"{folder}."
            )
    else:
        files[TOKENIZER] = token_files.read_bytes(file)
    vocabulary = HuggingFaceVocabulary(files, folder)
    config = token_files.read_if_there(folder, ("config.json",)).get("config.json", b"{}")
    recorded = token_files.parse(config, folder / "config.json")
    for key, ours in (("eos_token_id", vocabulary.eos_id), ("pad_token_id", 0)):
        if recorded.get(key) not in (None, ours):
            raise ValueError(
                f"{folder}/config.json has {key} {recorded[key]!r}, but the tokenizer beside it "
                f"has {ours}. Take both files from the same model."
            )
    return vocabulary


def until_eos(ids: Iterable[int], eos_id: int) -> Sequence[int]:
    """Returns token ids up to and including the first end-of-sequence id."""
    ids = list(ids)
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids


def _library(folder: Any) -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ValueError(
            f"The vocabulary in {folder} is a Hugging Face tokenizer, which needs the package "
            "tokenizers. Run `pip install 'mpt-jax[tokenizers]'`, or `pip install --editable "
            "'.[tokenizers]'` in a clone."
        ) from error


def _of_json(library: Any, content: bytes, origin: str) -> Any:
    token_files.parse(content, origin)
    try:
        return library.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"{origin} is not a tokenizer that the package tokenizers {library.__version__} can "
            f"read ({error}). Download it again, or upgrade the package."
        ) from error


def _of_bpe(library: Any, files: dict[str, bytes], special: dict[str, str], folder: Any) -> Any:
    """Builds the tokenizer that transformers would build from the same files."""
    config = token_files.parse(files.get(CONFIG, b"{}"), f"{folder}/{CONFIG}")
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    if kind not in CLASSES:
        raise ValueError(
            f"{folder}/{CONFIG} has the tokenizer_class {config.get('tokenizer_class')!r}, but "
            f"{VOCAB} and {MERGES} can be used only for {' and '.join(CLASSES)}. Save the "
            f"tokenizer with transformers as {TOKENIZER}."
        )
    space = config.get("add_prefix_space") is True
    try:
        vocab = token_files.parse(files[VOCAB], f"{folder}/{VOCAB}")
        lines = files[MERGES].decode().split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and line[:9] != "#version:"]
        made = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"{folder}/{VOCAB} and {MERGES} are not a byte-level BPE ({error}). Download or copy "
            "both files again."
        ) from error
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=space)
    made.decoder = library.decoders.ByteLevel()
    added = token_files.added_tokens(files, folder)
    for token, number in sorted(added.items(), key=lambda pair: -1 if pair[1] is None else pair[1]):
        is_mask = token == special.get("mask_token")  # it takes the space before it, as in RoBERTa
        made.add_special_tokens([library.AddedToken(token, lstrip=is_mask, normalized=False)])
        if number not in (None, made.token_to_id(token)):
            raise ValueError(
                f"The added token {token!r} of the tokenizer in {folder} has the id {number}, but "
                f"with this {VOCAB} it would get the id {made.token_to_id(token)}. Save the "
                f"tokenizer with transformers as {TOKENIZER}."
            )
    if CLASSES[kind]:
        ends = [special.get("cls_token", "<s>"), special.get("sep_token", "</s>")]
        ids = list(map(made.token_to_id, ends))
        if None in ids:
            raise ValueError(
                f"{folder}/{VOCAB} lacks {' or '.join(map(repr, ends))}, which {kind} puts around "
                f"each text. Set cls_token and sep_token in {folder}/{CONFIG} to tokens in {VOCAB}."
            )
        made.post_processor = library.processors.TemplateProcessing(
            single=[ends[0], "$A", ends[1]], special_tokens=list(zip(ends, ids, strict=True))
        )
    return made
