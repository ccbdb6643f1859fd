"""CLIP's tokenizer: published ids, a small BPE learned here, and damaged files."""

import html
import json
import unicodedata

import pytest

from mpt_jax.artifacts.artifacts import vocabulary_digest
from mpt_jax.batching import clip_tokenizer
from mpt_jax.batching.clip_tokenizer import ClipTokenizer
from tests.fixtures import clip_files
from tests.fixtures.shared_data import shared

# Computed with the published code; without start (49406) and end (49407).
PUBLISHED = {
    "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
    "X X X X face.": [343, 343, 343, 343, 1710, 269],
    "hello world!!": [3306, 1002, 748],
    "a centered satellite photo of Annual Crop Land.": [
        *(320, 24584, 10316, 1125, 539, 2906, 9955, 973, 269)
    ],
    "2012 BMW M3 coupe.": [273, 271, 272, 273, 7869, 332, 274, 16773, 269],
    "707-320.": [278, 271, 278, 268, 274, 273, 271, 269],
    "pink-yellow dahlia?": [3360, 268, 4481, 41768, 286],
    "don't stop's": [847, 713, 1691, 568],
    "abyssinian 日本": [16342, 690, 36638, 39121, 19277, 361],
    "": [],
}
PLAIN = (
    *(text for text in PUBLISHED if text.isascii()),
    "  Two\t spaces \n and a line ",
    "I'LL we've they're DON'T 's 't ''s",
    "x<|endoftext|>y <|STARTOFTEXT|>",
    "naïve façade №5 ½ ² Ⅷ Straße ΑΒΓ привет",
    "under_score a-b -- ... e-mail@x.org 100% 3.14",
    "emoji 👍🏽 done",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    archive = shared("clip_bpe/bpe_simple_vocab_16e6.txt.gz")
    folder = tmp_path_factory.mktemp("published")
    return clip_files.write(folder, clip_files.published_merges(archive))


@pytest.fixture
def folder(tmp_path):
    return clip_files.write(tmp_path / "clip")


def test_published_vectors_are_reproduced(published):
    made = ClipTokenizer.from_folder(published)
    assert (made.vocab_size, made.bos_id, made.eos_id, made.pad_id) == (49408, 49406, 49407, 0)
    for text, ids in PUBLISHED.items():
        assert made.encode(text) == ids
        assert made.encode(text) == ids  # from the cache
    assert made.decode([49406, *PUBLISHED["707-320."], 49407, 0, 0]) == "7 0 7 - 3 2 0 ."
    assert made.decode(PUBLISHED["abyssinian 日本"]) == "abyssinian 日本"


@pytest.mark.parity
def test_ids_equal_those_of_transformers(published, tmp_path):
    import transformers

    for files in (published, clip_files.write(tmp_path / "small")):
        names = str(files / "vocab.json"), str(files / "merges.txt")
        slow, fast = transformers.CLIPTokenizer(*names), transformers.CLIPTokenizerFast(*names)
        ours = ClipTokenizer.from_folder(files)
        for text in (*PLAIN, *clip_files.TEXTS):
            expected = slow.encode(text, add_special_tokens=False)
            assert ours.encode(text) == expected, text
            assert fast.encode(text, add_special_tokens=False) == expected, text
            if "<|" not in text:
                assert ours.decode(expected) == slow.decode(expected).strip()
        # The slow tokenizer separates CJK characters unless ftfy is installed; the fast one does
        # not, like the published code.
        for text in ("日本 の 写真", "e\u0301te\u0301 한국어 देवनागरी", "\u2167\u00b3\u2460"):
            assert ours.encode(text) == fast.encode(text, add_special_tokens=False), text


def test_learned_merges_give_ids_by_hand(tmp_path):
    files = clip_files.write(tmp_path / "a", [("a", "t</w>"), ("c", "at</w>"), ("a", "a")])
    made = ClipTokenizer.from_folder(files)
    byte = {c: i for i, c in enumerate(clip_files.bytes_in_order())}
    assert (made.vocab_size, made.bos_id, made.eos_id) == (517, 515, 516)
    assert made.encode("cat") == [513]
    assert made.encode("CAT at") == [513, 512]
    # Occurrences are joined from the left: (aa)(aa) c; a last letter never joins as a first one.
    assert made.encode("aaaac") == [514, 514, 256 + byte["c"]]
    assert made.encode("aaa") == [514, 256 + byte["a"]]
    assert made.encode("é") == [byte["Ã"], 256 + byte["©"]]
    assert made.encode("1 23") == [256 + byte[c] for c in "123"]
    for text in ("cat at aaaac é 1 2 3", ""):
        assert made.decode([515, *made.encode(text), 516, 0]) == text
    assert made.decode([byte["Ã"]]) == "\N{REPLACEMENT CHARACTER}"


def test_text_is_cleaned(folder):
    made = ClipTokenizer.from_folder(folder)
    cat = made.encode("a cat & dog")
    for text in ("A\u3000CAT &amp;  Dog", " a cat &amp;amp; dog\n", "a&nbsp;cat &#38; dog"):
        assert made.encode(text) == cat
    assert made.encode("e\u0301") == made.encode("é")
    assert html.unescape("&amp;amp;") == "&amp;"  # so that once is not enough
    with pytest.raises(ValueError, match=r"text 'x\\ud800' has half of a surrogate pair.* Correct"):
        made.encode("x\ud800")


@pytest.mark.slow
def test_pieces_equal_those_of_published_pattern_for_every_character():
    regex = pytest.importorskip("regex")
    pattern = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
        r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE,
    )
    # The package knows a later version of Unicode than Python, so unassigned characters differ.
    known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) != "Cn"]
    assert len(known) > 280_000
    different = []
    for character in known:
        text = f"a{character}{character}1'{character}"
        if pattern.findall(text) != clip_tokenizer._pieces(text):
            different.append(character)
    # A mark that has a letter as its upper case, so ignoring case makes it one for the package.
    assert different == ["\u0345"]


def test_digest_depends_on_tokens_and_merges_only(folder, tmp_path):
    made = ClipTokenizer.from_folder(str(folder))
    assert made.files == {n: (folder / n).read_bytes() for n in ("vocab.json", "merges.txt")}
    indented = json.dumps(json.loads((folder / "vocab.json").read_text()), indent=1)
    (folder / "vocab.json").write_text(indented)
    assert vocabulary_digest(ClipTokenizer.from_folder(folder)) == vocabulary_digest(made)
    merges = clip_files.learned_merges()
    others = [
        ClipTokenizer.from_folder(clip_files.write(tmp_path / name, changed))
        for name, changed in (("less", merges[:-1]), ("order", [*merges[1:], merges[0]]))
    ]
    assert len({vocabulary_digest(x) for x in (made, *others)}) == 3


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks vocab.json and merges.txt.* Copy"):
        ClipTokenizer.from_folder(tmp_path / "nowhere")
    folder = clip_files.write(tmp_path / "clip")
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="lacks merges.txt, the tokenizer of CLIP"):
        ClipTokenizer.from_folder(folder)


def _without(vocabulary, *tokens):
    kept = [token for token in vocabulary if token not in tokens]
    return {token: number for number, token in enumerate(kept)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [1], r"vocab.json has the value \[1\], but an object was expected"),
        (lambda v: {**v, "a": "0"}, "has the token 'a' with the id \"0\", but the ids of its 534"),
        (lambda v: {**v, "a": -1}, "has the token 'a' with the id -1, but"),
        (lambda v: {**v, "a": True}, "has the token 'a' with the id true, but"),
        (lambda v: {**v, "a": [{}]}, r"has the token 'a' with the id \[{}\], but"),
        (lambda v: {**v, "a": 1}, r"gives the id 1 to two tokens, '\"' and 'a'"),
        (
            lambda v: {**v, "z~": 10**6},
            "id 1000000, but the ids of its 535 tokens must be 0 to 534",
        ),
        (lambda v: _without(v, "<|startoftext|>"), r"lacks tokens .*: '<\|startoftext\|>'\. Copy"),
        (lambda v: _without(v, "<|endoftext|>"), r"lacks tokens .*: '<\|endoftext\|>'\. Copy"),
        (lambda v: _without(v, *map(str, range(10))), "'0', '1', '2', '3', '4' and 5 more. Copy"),
        (lambda v: {**v, "\ud800": 534}, r"has the token '\\ud800', which is not made of"),
        (lambda v: {**v, "日本": 534}, "which is not made of the characters of a byte-level BPE"),
        (lambda v: _without(v, "cat"), "whose token 'cat' is not in vocab.json"),
    ],
)
def test_damaged_vocabulary_fails(folder, change, message):
    path = folder / "vocab.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message) as raised:
        ClipTokenizer.from_folder(folder)
    assert str(raised.value).endswith("again from the folder of the backbone.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[text.index("\n") + 1 :], "must start with a line '#version: 0.2', but"),
        (lambda text: "", "must start with a line"),
        (
            lambda text: text + "a b c\n",
            r"line 'a b c' \(line 22\), but a line must have two",
        ),
        (
            lambda text: text.replace("\n", "\n\n", 1),
            r"line '' \(line 2\), but",
        ),
        (lambda text: text + "a qq\n", "whose token 'qq' is not in vocab.json"),
        (lambda text: text + "a 9\n", "whose token 'a9' is not in vocab.json"),
        (lambda text: text + text.split("\n")[3] + "\n", r"\(line 22\), which repeats line 4\."),
    ],
)
def test_damaged_merges_fail(folder, change, message):
    path = folder / "merges.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        ClipTokenizer.from_folder(folder)


def test_files_that_are_no_text_fail(folder, monkeypatch):
    (folder / "merges.txt").write_bytes(b"#version: 0.2\n\xff\xfe")
    with pytest.raises(ValueError, match="merges.txt is not UTF-8 text"):
        ClipTokenizer.from_folder(folder)
    (folder / "vocab.json").write_bytes(b"{\xff")
    with pytest.raises(ValueError, match="vocab.json is not JSON"):
        ClipTokenizer.from_folder(folder)
    monkeypatch.setattr(clip_tokenizer.token_files, "MOST_BYTES", 2)
    with pytest.raises(ValueError, match="merges.txt has 16 bytes, but the limit"):
        ClipTokenizer.from_folder(folder)


def test_decoding_unknown_id_fails(folder):
    made = ClipTokenizer.from_folder(folder)
    with pytest.raises(ValueError, match="token id 534 is not in CLIP's vocabulary, which has ids"):
        made.decode([534])
