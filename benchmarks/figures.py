"""What every benchmark does with its figures."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Instructions on bfloat16, as Linux names them.
BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")


def report(found: Mapping[str, Any], out: Path | None) -> None:
    """Prints figures as JSON and, where `out` names a file, writes them to it."""
    text = json.dumps(found, indent=2)
    print(text)
    write(found, out)


def write(found: Mapping[str, Any], out: Path | None) -> None:
    """Writes figures as JSON to `out`, where it names a file."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=2) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers in three digits."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_shown, line)) + " |" for line in lines)


def _shown(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def machine() -> dict[str, Any]:
    """What a reader must know of this machine: its processor, cores, and which instructions on
    bfloat16 it has."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "bfloat16_instructions": [name for name in BFLOAT16 if name in flags],
    }
