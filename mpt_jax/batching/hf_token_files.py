"""Special tokens and added tokens of a Hugging Face tokenizer, read from its files.

The files are tokenizer_config.json, special_tokens_map.json, added_tokens.json and tokenizer.json.
Any of them may be missing. They are not trusted, so their types and sizes are checked.
"""

from __future__ import annotations

import json
import re
from typing import Any

from etils import epath

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TOKENIZER = "tokenizer.json"
MOST_BYTES = 256 * 2**20  # the largest files of the hub have some 40 MB
MOST_NAMED = 20
_SENTINEL = re.compile(r"<extra_id_\d+>")
_SPECIAL_KEY = re.compile(r"[a-z]+_token")


def parse(content: bytes, origin: Any) -> dict[str, Any]:
    """Returns the JSON object in a file's content; `origin` names the file in errors.

    Raises:
        ValueError: the content is not a JSON object.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{origin} cannot be read as JSON ({error}). Download or copy the file again."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{origin} must hold a JSON object, got {type(value).__name__}. Download or copy the "
            "file again."
        )
    return value


def read_bytes(path: epath.Path) -> bytes:
    """Returns the content of a file. Raises ValueError if it has more than `MOST_BYTES`."""
    if (size := path.stat().length) > MOST_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, but the limit for files of a tokenizer is "
            f"{MOST_BYTES:,}. Give the path of another file."
        )
    return path.read_bytes()


def read_if_there(folder: epath.Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Returns {name: content} of the named files that exist in a folder."""
    return {name: read_bytes(folder / name) for name in names if (folder / name).exists()}


def special_tokens(files: dict[str, bytes], folder: Any) -> dict[str, str]:
    """Returns {'eos_token': '</s>', ...} from special_tokens_map.json and tokenizer_config.json;
    the latter takes precedence. Raises ValueError if a token is not a string."""
    found: dict[str, str] = {}
    for name in (SPECIAL, CONFIG):
        for key, value in parse(files.get(name, b"{}"), f"{folder}/{name}").items():
            token = _content(value)
            if not _SPECIAL_KEY.fullmatch(key) or token is None:
                continue
            if not isinstance(token, str):
                raise ValueError(
                    f"{folder}/{name} sets {key} to {value!r}, which is not a string. Download or "
                    "copy the file again."
                )
            found[key] = _checked(token, folder)
    return found


def added_tokens(files: dict[str, bytes], folder: Any) -> dict[str, int | None]:
    """Returns {token: id} of all added and special tokens; the id is None if no file gives it.

    Raises:
        ValueError: a file does not have the expected structure.
    """
    found: dict[str, int | None] = dict.fromkeys(special_tokens(files, folder).values())
    for name in (SPECIAL, CONFIG):
        more = parse(files.get(name, b"{}"), f"{folder}/{name}").get("additional_special_tokens")
        texts = map(_content, more if isinstance(more, list) else [])
        found |= {_checked(text, folder): None for text in texts if isinstance(text, str)}
    pairs: list[tuple[Any, Any]] = []
    if ADDED in files:
        pairs += parse(files[ADDED], f"{folder}/{ADDED}").items()
    if CONFIG in files:
        decoder = parse(files[CONFIG], f"{folder}/{CONFIG}").get("added_tokens_decoder")
        numbered = decoder.items() if isinstance(decoder, dict) else ()
        pairs += [(_content(x), int(n) if n.isdecimal() else n) for n, x in numbered]
    if TOKENIZER in files:
        listed = parse(files[TOKENIZER], f"{folder}/{TOKENIZER}").get("added_tokens")
        listed = listed if isinstance(listed, list) else []
        pairs += [(_content(x), x.get("id")) for x in listed if isinstance(x, dict)]
    for token, number in pairs:
        if not isinstance(token, str) or isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(
                f"The tokenizer in {folder} has the added token {token!r} with the id {number!r}, "
                "but a string and an integer were expected. Download or copy its files again."
            )
        found[_checked(token, folder)] = number
    return found


def check_model_holds_all(model: epath.Path, processor: Any) -> None:
    """Checks that a SentencePiece model holds all tokens that the files beside it name, except
    sentinels (`<extra_id_0>`), which are appended to the model.

    Args:
        model: the model file.
        processor: its `SentencePieceProcessor`.

    Raises:
        ValueError: the model lacks tokens, which the message lists.
    """
    folder = model.parent
    files = read_if_there(folder, (CONFIG, SPECIAL, ADDED, TOKENIZER))
    unknown = processor.unk_id()
    lacking = [
        token
        for token in added_tokens(files, folder)
        if not _SENTINEL.fullmatch(token)
        and processor.PieceToId(token) == unknown
        and token != processor.IdToPiece(unknown)
    ]
    if lacking:
        more = f" and {len(lacking) - MOST_NAMED} more" if len(lacking) > MOST_NAMED else ""
        save = (
            ""
            if TOKENIZER in files
            else " after writing it with transformers' "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
        raise ValueError(
            f"The tokenizer in {folder} has added tokens that {model.name} lacks: "
            f"{', '.join(map(repr, lacking[:MOST_NAMED]))}{more}. Set the vocabulary (VOCABULARY, "
            f"or --vocabulary) to {folder / TOKENIZER}{save}, or use a folder without added tokens."
        )


def _checked(token: str, folder: Any) -> str:
    """Returns a token unchanged. Raises ValueError if it has half of a surrogate pair, which JSON
    can escape ("\\ud800") but no text contains."""
    try:
        token.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The tokenizer in {folder} has the token {token!r}, which has half of a surrogate "
            "pair instead of a character. Download or copy its files again."
        ) from error
    return token


def _content(token: Any) -> Any:
    """Returns the text of a token, given as a string or as an object with the field `content`."""
    return token.get("content") if isinstance(token, dict) else token
