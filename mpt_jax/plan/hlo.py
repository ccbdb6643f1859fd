"""What a compiled program does, counted from its text: products, memory, communication.

The compiler's own count (`cost_analysis`) takes the body of a loop once, whatever its trip count,
and counts copies into the chip's fast memory (VMEM) as it counts memory (HBM). Here a body counts
times its trips, and HBM is counted apart: an array whose layout names another memory (`S(1)`) is
not in it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}
ACROSS_SLICES = "send"  # the compiler splits what crosses slices into sends and receives
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    ACROSS_SLICES,
)  # fmt: skip
# They name or order arrays and move nothing.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "partition-id", "replica-id", "opt-barrier", "while", "conditional", "call", "async-start",
    "async-update", "async-done",
}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computations)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's size, and whether it lies in HBM."""

    shape: tuple[int, ...]
    bytes: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
        name: its own.
        op: `fusion`, `convolution`, ...
        arrays: its results.
        operands: names of what it reads.
        text: all after the opening bracket of its operands.
    """

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations it runs, a loop's condition left out."""
        names = _CALLED.findall(re.sub(r"condition=%?[\w.\-]+", "", self.text))
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        if branches:
            names += re.findall(r"%?([\w.\-]+)", branches.group(1))
        return tuple(names)


@dataclasses.dataclass
class Cost:
    """Of a program on one chip.

    Attributes:
        flops: of products, 2 for a multiply-add; element-wise operations are left out.
        hbm_bytes: read from and written to HBM.
        accessed_bytes: the same over all memories; the compiler's own count of a program without
            loops is up to a quarter more or less, by rules of its own.
        collectives: kind -> (how many, bytes that they leave on this chip, or that a `send` takes
            from it).
        kernels: name -> (how many calls, flops, bytes), by the estimate that came with each.
        loops: how many there are, those that repeat counted once.
        unknown_loops: those of them whose length depends on what is computed.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    accessed_bytes: float = 0.0
    collectives: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    kernels: dict[str, tuple[int, float, float]] = dataclasses.field(default_factory=dict)
    loops: int = 0
    unknown_loops: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        """Adds another's numbers, `times` over."""
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        self.accessed_bytes += times * other.accessed_bytes
        self.loops += other.loops
        self.unknown_loops += other.unknown_loops
        for name, (number, size) in other.collectives.items():
            old = self.collectives.get(name, (0, 0.0))
            self.collectives[name] = (old[0] + times * number, old[1] + times * size)
        for name, (number, flops, size) in other.kernels.items():
            was = self.kernels.get(name, (0, 0.0, 0.0))
            sums = (was[0] + times * number, was[1] + times * flops, was[2] + times * size)
            self.kernels[name] = sums


def cost(text: str, unknown_trips: int = 1) -> Cost:
    """Counts a compiled program.

    Args:
        text: of `jax.stages.Compiled.as_text()`.
        unknown_trips: how often to count a loop whose length depends on what it computes.
    """
    return _Program(text, unknown_trips).cost()


class _Program:
    def __init__(self, text: str, unknown_trips: int):
        self.entry, self.unknown_trips = "", unknown_trips
        self.computations: dict[str, list[Instruction]] = {}
        body: list[Instruction] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                body = self.computations.setdefault(header.group(2), [])
                self.entry = header.group(2) if header.group(1) else self.entry
            elif found := _INSTRUCTION.match(line):
                body.append(_instruction(*found.groups()))

    def cost(self) -> Cost:
        return self._of(self.entry)

    @functools.cache  # noqa: B019 - lives as long as one count
    def _of(self, name: str) -> Cost:
        """The cost of a computation that is run, not fused into another."""
        total, made = Cost(), {each.name: each for each in self.computations[name]}
        for each in self.computations[name]:
            if each.op == "while":
                trips = self._trips(each)
                often = self.unknown_trips if trips is None else trips
                total.add(self._of(each.called[0]), often)
                total.loops += 1
                total.unknown_loops += trips is None
            elif each.op in ("call", "conditional", "async-start"):
                for called in each.called:
                    total.add(self._of(called))
            else:
                total.add(self._single(each, made))
        return total

    def _single(self, each: Instruction, made: dict[str, Instruction]) -> Cost:
        found = Cost(flops=sum(map(self._flops, self._inside(each))))
        if each.op in _FREE or each.op.endswith("-done"):
            return found
        kind = each.op.removesuffix("-start")
        if kind in COLLECTIVES:
            found.collectives[kind] = (1, _left(each))
        if 'custom_call_target="tpu_custom_call"' in each.text:
            flops, moved = _estimate(each)
            found.flops += flops
            found.kernels[re.sub(r"[.\d]+$", "", each.name)] = (1, flops, moved)
        elif each.op == "custom-call":
            return found  # markers of the compiler: allocations, views of what lies side by side
        for array in self._moved(each, made):
            found.accessed_bytes += array.bytes
            found.hbm_bytes += array.bytes * array.in_hbm
        return found

    def _trips(self, loop: Instruction) -> int | None:
        """How often a loop's body runs; None where that depends on what it computes.

        Compilers that know it say so. Others leave JAX's own loops over an axis, which count from
        0: their condition is that the count is below a constant, and nothing else.
        """
        if said := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
            return int(said.group(1))
        name = re.search(r"\bcondition=%?([\w.\-]+)", loop.text)
        condition = self.computations[name.group(1)] if name else []
        limits = [each for each in condition if each.op == "constant"]
        counts = bool(condition) and condition[-1].op == "compare"
        if not counts or "direction=LT" not in condition[-1].text or len(limits) != 1:
            return None
        return int(limits[0].text.partition(")")[0])

    def _inside(self, each: Instruction) -> Iterator[Instruction]:
        """An operation and all that is fused into it."""
        yield each
        if each.op == "fusion":
            for called in each.called:
                for inner in self.computations[called]:
                    yield from self._inside(inner)

    def _moved(self, each: Instruction, made: dict[str, Instruction]) -> Iterator[Array]:
        """What an operation reads and writes: of an array that is only sliced, the slice; of one
        that is updated in place, the update."""
        if each.op.endswith("-start"):
            yield from each.arrays[:2]  # (source, target, context)
            return
        if each.op == "dynamic-update-slice":
            update = made[each.operands[1]].arrays
            yield from (*update, *update)
            return
        if each.op in ("slice", "dynamic-slice", "gather"):
            yield from (*each.arrays, *each.arrays)
            return
        inner = self.computations[each.called[0]] if each.op == "fusion" else []
        in_place = _in_place(inner)
        yield from in_place or each.arrays
        for position, name in enumerate(each.operands):
            whole = made[name].arrays if name in made else ()
            yield from _read(inner, position, whole) if inner else whole

    def _flops(self, each: Instruction) -> float:
        if each.op not in ("convolution", "dot"):
            return 0.0
        shapes = {x.name: x.arrays for x in self._home[each.name]}
        lhs, rhs = (shapes[name][0].shape for name in each.operands[:2])
        if each.op == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.text)
            inner = [lhs[int(i)] for i in axes.group(1).split(",") if i] if axes else []
            return 2.0 * math.prod(each.arrays[0].shape) * math.prod(inner)
        return _convolution_flops(lhs, rhs, each.arrays[0].shape, each.text)

    @functools.cached_property
    def _home(self) -> dict[str, list[Instruction]]:
        """Instruction -> the computation it is in."""
        return {each.name: body for body in self.computations.values() for each in body}


def _instruction(name: str, shape: str, op: str, rest: str) -> Instruction:
    depth, end = 1, len(rest)
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            end = i
            break
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return Instruction(name, op, tuple(_arrays(shape)), operands, rest)


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, sizes, layout in _ARRAY.findall(shape):
        dims = tuple(int(n) for n in sizes.split(",") if n)
        memory = re.search(r"S\((\d+)\)", layout)
        yield Array(dims, BYTES[dtype] * math.prod(dims), memory is None or memory.group(1) == "0")


def _size(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays)


def _left(each: Instruction) -> int:
    """Bytes that a collective leaves on this chip. The start of one names what it reads as well,
    in front, and scalar contexts behind; that of an all-reduce names its results alone. What is
    sent leaves this chip."""
    if each.op == "all-reduce-start" or not each.op.endswith("-start"):
        return _size(each.arrays[:1] if each.op == ACROSS_SLICES else each.arrays)
    arrays = tuple(array for array in each.arrays if array.shape)
    return _size(arrays[len(arrays) // 2 :])


def _read(inner: list[Instruction], position: int, whole: tuple[Array, ...]) -> Iterator[Array]:
    """What a fusion reads of the operand at a position."""
    mine = next(
        (x for x in inner if x.op == "parameter" and x.text.startswith(f"{position})")), None
    )
    if mine is None:
        yield from whole
        return
    users = [x for x in inner if mine.name in x.operands]
    slices = ("dynamic-slice", "slice", "gather")
    updated = [x for x in users if x.op == "dynamic-update-slice" and x.operands[0] == mine.name]
    if users and len(updated) == len(users):
        return
    if users and all(x.op in slices and x.operands[0] == mine.name for x in users):
        for each in users:
            for array, source in zip(each.arrays, whole, strict=False):
                yield dataclasses.replace(array, in_hbm=source.in_hbm)
        return
    yield from whole


def _in_place(inner: list[Instruction]) -> list[Array]:
    """The updates a fusion writes, where its result is an array updated in place."""
    if not inner or inner[-1].op != "dynamic-update-slice":
        return []
    named = {each.name: each for each in inner}
    return list(named[inner[-1].operands[1]].arrays)


def _convolution_flops(
    lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...], text: str
) -> float:
    """The compiler writes every product as a convolution, batches as dilated windows: counts the
    pairs of elements that meet."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert labels is not None
    left, right, result = labels.groups()
    total = 2.0 * out[result.index("b")] * out[result.index("f")] * rhs[right.index("i")]
    for axis in sorted(set(left) - set("bf")):
        total *= _meetings(
            lhs[left.index(axis)],
            rhs[right.index(axis)],
            out[result.index(axis)],
            stride=_window(text, "stride", int(axis)),
            dilate=_window(text, "lhs_dilate", int(axis)),
            spread=_window(text, "rhs_dilate", int(axis)),
            low=_padding(text, int(axis)),
        )
    return total


def _meetings(
    source: int, size: int, out: int, *, stride: int, dilate: int, spread: int, low: int
) -> int:
    """How many (output, window) positions of an axis fall on an element of the source."""
    reach = (source - 1) * dilate + 1
    return sum(
        0 <= (at := o * stride - low + k * spread) < reach and at % dilate == 0
        for o in range(out)
        for k in range(size)
    )


def _window(text: str, field: str, axis: int) -> int:
    found = re.search(rf"window=\{{[^}}]*\b{field}=([\dx]+)", text)
    return int(found.group(1).split("x")[axis]) if found else 1


def _padding(text: str, axis: int) -> int:
    found = re.search(r"window=\{[^}]*\bpad=([\d_x\-]+)", text)
    return int(found.group(1).split("x")[axis].split("_")[0]) if found else 0


def _estimate(each: Instruction) -> tuple[float, float]:
    """(flops, bytes) that a kernel was declared to cost."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', each.text)
    numbers = json.loads(found.group(1)) if found else {}
    return float(numbers.get("flops", 0)), float(numbers.get("bytes_accessed", 0))
