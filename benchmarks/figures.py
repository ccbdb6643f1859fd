"""Output of benchmark figures: JSON, Markdown tables, and a description of the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Linux's names of bfloat16 instructions.
BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")


def report(found: Mapping[str, Any], out: Path | None) -> None:
    """Prints figures as JSON, and writes them to `out` if given."""
    text = json.dumps(found, indent=2)
    print(text)
    write(found, out)


def write(found: Mapping[str, Any], out: Path | None) -> None:
    """Writes figures as JSON to `out`, if given."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=2) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table; floats have three significant digits, or no decimals from 100."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_shown, line)) + " |" for line in lines)


def best_of(scores: Mapping[float, float]) -> str:
    """Returns a sentence on the setting with the best score, and whether it is at the edge of the
    grid, so that a better one may lie outside."""
    best = max(scores, key=scores.__getitem__)
    sentence = f"Best: {best} ({scores[best]:.2f})."
    if len(scores) > 1 and best in (min(scores), max(scores)):
        sentence += " It is at the edge of the grid: extend it."
    return sentence


def _shown(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def machine() -> dict[str, Any]:
    """Returns the facts about this machine that matter for figures: processor, cores, and bfloat16
    instructions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "bfloat16_instructions": [name for name in BFLOAT16 if name in flags],
    }
