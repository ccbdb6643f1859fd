"""What every benchmark does with its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def report(found: Mapping[str, Any], out: Path | None) -> None:
    """Prints figures as JSON and, where `out` names a file, writes them to it."""
    text = json.dumps(found, indent=2)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
