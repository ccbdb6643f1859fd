"""Output of benchmark figures: JSON, Markdown tables, and a description of the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# Starts of Linux's names of the instructions that decide how fast matrix products are.
VECTOR_INSTRUCTIONS = ("amx", "avx", "bf16", "fma", "sve")
PACKAGES = ("jax", "flax", "torch", "triton", "transformers", "peft", "nvidia-")  # by prefix
L2_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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
    """Returns the facts about this machine that matter for figures: processor, cores, vector
    instructions, L2 cache of a core, and which memory is in huge pages. Unknown facts are ''."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "vector_instructions": [name for name in flags if name.startswith(VECTOR_INSTRUCTIONS)],
        "l2_of_a_core": _line_of(L2_SIZE),
        "transparent_huge_pages": _line_of(HUGE_PAGES),
    }


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages that figures depend on."""
    found = {each.name.replace("_", "-"): each.version for each in metadata.distributions()}
    return {name: found[name] for name in sorted(found) if name.startswith(PACKAGES)}


def _line_of(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
