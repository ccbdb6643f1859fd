"""Idioms that this project does not use: checked by `make lint` in every text that people read.

    python tests/words/lint.py

An idiom that is meant (a quotation, a name, data) is listed in ALLOWED with its file. Every file
must be in reread.txt, the list of files that were reread as a whole.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("mpt_jax/", "gin/", "docs/", "benchmarks/", "tpu/")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SUFFIXES = (".py", ".gin", ".md", ".sh", ".toml")
# Data: worlds and templates of tasks, whose words the tiny T5 was trained on, and its training log.
DATA = re.compile(r"mpt_jax/tasks/(toy\w*\.py|data/)|mpt_jax/experiments/paper/published\.toml")
# Idiom -> what to write.
IDIOMS = {
    r"of (?:its|their) own\b(?! \w)": "own; separate",
    r"\bgo(?:es)? on\b|\bwent on\b|\bgoing on\b": "resume; continue",
    r"\bl(?:ies|ie|ay) (?:in|on|below|beside)\b": "is in; is below",
    r"\btold\b|\btells? of\b|\bsays? of\b": "reported; known; says that",
    r"\baside\b": "renamed; moved to",
    r"\bat hand\b": "available",
    r"\b[Ww]hoever\b": "a caller that; users who",
    r"\b[Ss]o it is with\b": "likewise",
    r"\bby themselves\b": "automatically; separately",
    r"\bbut for\b": "except",
    r"\bhand(?:s|ed|ing)? (?:it |them )?on\b": "pass; write; read",
    r"\bcomes? again\b": "is seen again",
    r"\bfares?d?\b": "ended; scored",
    r"\bspeaks? for\b": "represents",
    r"\b(?:what|that|which) learns?\b": "trainable parameters",
    r"\b(?:is|are) theirs\b": "name the owner",
    r"\bbelongs? to (?:an)?other\b": "is incompatible with",
    r"\bthe very\b": "the same",
    r"\btakes? (?:its|their) place\b": "replaces",
    r"\bg(?:ive|ives|iven|ave|iving) up\b": "stop waiting; drop",
    r"\bis over\b": "is finished",
    r"\bartefact|\blearnt\b|\w+isation\b|\bcolour": "American spelling",
}
# (file, text of the line) -> why it stays.
ALLOWED = {
    ("mpt_jax/experiments/paper/variants.py", "sources of its own"): "a variant's recorded name",
    ("docs/study/results-crosspt-parts.md", "sources of its own"): "a variant's recorded name",
    ("mpt_jax/artifacts/model_card.py", "each of its own"): "text of recorded model cards",
    (
        "mpt_jax/config/gin_errors.py",
        "artefact",
    ): "old gin names, which are errors that say the new one",
    ("benchmarks/ragged.py", "model_flops_utilisation"): "a key of committed results",
    ("mpt_jax/core/old_names.py", "artefact"): "the old spelling is what it reads",
    ("CHANGELOG.md", "artefact"): "names the old spelling",
}


def lines() -> list[tuple[str, int, str]]:
    """Returns (file, number, line) of every line that is checked."""
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    chosen = [
        name
        for name in names
        if (name.startswith(FOLDERS) or name in PAGES)
        and name.endswith(SUFFIXES)
        and not DATA.search(name)
        and (ROOT / name).is_file()
    ]
    return [
        (name, number, line)
        for name in chosen
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1)
    ]


def main() -> None:
    """Prints every line with an idiom and every file that was not reread; exits with 1 if any."""
    count, checked = 0, lines()
    reread = (ROOT / "tests" / "words" / "reread.txt").read_text().splitlines()
    for name in sorted({name for name, _, _ in checked} - set(reread)):
        count += 1
        print(f"{name}: reread this file, and add it to tests/words/reread.txt")
    for name, number, line in checked:
        for idiom, instead in IDIOMS.items():
            if not (match := re.search(idiom, line)):
                continue
            if any(name == file and text in line for file, text in ALLOWED):
                continue
            count += 1
            print(f"{name}:{number}: {match[0]!r} (write: {instead}): {line.strip()}")
    if count:
        sys.exit(f"{count} findings. See docs/glossary.md for the terms of this project.")


if __name__ == "__main__":
    main()
