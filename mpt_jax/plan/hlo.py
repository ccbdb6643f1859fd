"""Cost of a compiled program, counted in its text: matrix products, memory and communication.

The compiler's own count (`cost_analysis`) counts the body of a loop once, regardless of its trip
count, and does not distinguish the chip's fast memory (VMEM) from main memory (HBM). Here, the cost
of a loop's body is multiplied by the trip count, and HBM is counted separately: an array whose
layout has another memory space, such as `S(1)`, is not in HBM.
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
ACROSS_SLICES = "send"  # the compiler splits traffic between slices into sends and receives
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    ACROSS_SLICES,
)  # fmt: skip
# Operations that only name or order arrays. They move no data.
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
    """Shape and bytes of an array, and whether it is in HBM."""

    shape: tuple[int, ...]
    bytes: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a program.

    Attributes:
        name: The name of the instruction.
        op: The operation: `fusion`, `convolution`, ...
        arrays: The results.
        operands: The names of the instructions whose results it reads.
        text: The part of the line after the opening parenthesis of the operands.
    """

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that the instruction runs, except a loop's condition."""
        names = _CALLED.findall(re.sub(r"condition=%?[\w.\-]+", "", self.text))
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        if branches:
            names += re.findall(r"%?([\w.\-]+)", branches.group(1))
        return tuple(names)


@dataclasses.dataclass
class Cost:
    """Cost of a program on one chip.

    Attributes:
        flops: The operations of matrix products, 2 for a multiply-add, and those that kernels
            declare. Element-wise operations are not counted.
        hbm_bytes: The bytes read from and written to HBM.
        accessed_bytes: The bytes read and written in all memories. The compiler counts by other
            rules: in programs without loops, its count differs by up to a quarter.
        collectives: Kind -> (number, bytes of the results on this chip). For `send`, bytes sent.
        kernels: Name -> (number of calls, flops, bytes), as estimated by the kernels.
        loops: The number of loops. A loop inside another loop counts once.
        unknown_loops: The number of loops whose trip count depends on computed values.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    accessed_bytes: float = 0.0
    collectives: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    kernels: dict[str, tuple[int, float, float]] = dataclasses.field(default_factory=dict)
    loops: int = 0
    unknown_loops: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        """Adds another cost, multiplied by `times`. Numbers of loops are added once."""
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
    """Returns the cost of a compiled program.

    Args:
        text: The output of `jax.stages.Compiled.as_text()`.
        unknown_trips: The trip count to assume for loops whose trip count depends on computed
            values.
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
            elif match := _INSTRUCTION.match(line):
                body.append(_instruction(*match.groups()))

    def cost(self) -> Cost:
        return self._cost_of(self.entry)

    @functools.cache  # noqa: B019 - lives as long as one count
    def _cost_of(self, name: str) -> Cost:
        """Returns the cost of a computation that is not fused into another one."""
        total, body = Cost(), self.computations[name]
        by_name = {instruction.name: instruction for instruction in body}
        for instruction in body:
            if instruction.op == "while":
                trips = self._trips(instruction)
                often = self.unknown_trips if trips is None else trips
                total.add(self._cost_of(instruction.called[0]), often)
                total.loops += 1
                total.unknown_loops += trips is None
            elif instruction.op in ("call", "conditional", "async-start"):
                for called in instruction.called:
                    total.add(self._cost_of(called))
            else:
                total.add(self._single(instruction, by_name))
        return total

    def _single(self, instruction: Instruction, by_name: dict[str, Instruction]) -> Cost:
        cost = Cost(flops=sum(map(self._flops, self._inside(instruction))))
        if instruction.op in _FREE or instruction.op.endswith("-done"):
            return cost
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            cost.collectives[kind] = (1, _result_bytes(instruction))
        if 'custom_call_target="tpu_custom_call"' in instruction.text:
            flops, moved = _estimate(instruction)
            cost.flops += flops
            cost.kernels[re.sub(r"[.\d]+$", "", instruction.name)] = (1, flops, moved)
        elif instruction.op == "custom-call":
            return cost  # compiler markers: allocations, views of adjacent arrays
        for array in self._accessed_arrays(instruction, by_name):
            cost.accessed_bytes += array.bytes
            cost.hbm_bytes += array.bytes * array.in_hbm
        return cost

    def _trips(self, loop: Instruction) -> int | None:
        """Returns how often the body of a loop runs; None if this depends on computed values.

        Some compilers write the trip count into the program. For others, it is derived from the
        form of JAX's loops over an axis, which count from 0 up to a constant.
        """
        if count := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
            return int(count.group(1))
        name = re.search(r"\bcondition=%?([\w.\-]+)", loop.text)
        condition = self.computations[name.group(1)] if name else []
        limits = [instruction for instruction in condition if instruction.op == "constant"]
        counts = bool(condition) and condition[-1].op == "compare"
        if not counts or "direction=LT" not in condition[-1].text or len(limits) != 1:
            return None
        return int(limits[0].text.partition(")")[0])

    def _inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yields an instruction and all instructions that are fused into it."""
        yield instruction
        if instruction.op == "fusion":
            for called in instruction.called:
                for inner in self.computations[called]:
                    yield from self._inside(inner)

    def _accessed_arrays(
        self, instruction: Instruction, by_name: dict[str, Instruction]
    ) -> Iterator[Array]:
        """Yields the arrays that an instruction reads and writes. For an array that is only sliced,
        yields the slice; for an array that is updated in place, the update."""
        if instruction.op.endswith("-start"):
            yield from instruction.arrays[:2]  # (source, target, context)
            return
        if instruction.op == "dynamic-update-slice":
            update = by_name[instruction.operands[1]].arrays
            yield from (*update, *update)
            return
        if instruction.op in ("slice", "dynamic-slice", "gather"):
            yield from (*instruction.arrays, *instruction.arrays)
            return
        inner = self.computations[instruction.called[0]] if instruction.op == "fusion" else []
        in_place = _in_place(inner)
        yield from in_place or instruction.arrays
        for position, name in enumerate(instruction.operands):
            whole = by_name[name].arrays if name in by_name else ()
            yield from _operand_reads(inner, position, whole) if inner else whole

    def _flops(self, instruction: Instruction) -> float:
        if instruction.op not in ("convolution", "dot"):
            return 0.0
        shapes = {x.name: x.arrays for x in self._computation_of[instruction.name]}
        lhs, rhs = (shapes[name][0].shape for name in instruction.operands[:2])
        if instruction.op == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
            inner = [lhs[int(i)] for i in axes.group(1).split(",") if i] if axes else []
            return 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(inner)
        return _convolution_flops(lhs, rhs, instruction.arrays[0].shape, instruction.text)

    @functools.cached_property
    def _computation_of(self) -> dict[str, list[Instruction]]:
        """Name of an instruction -> all instructions of the computation that contains it."""
        return {
            instruction.name: body for body in self.computations.values() for instruction in body
        }


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


def _result_bytes(instruction: Instruction) -> int:
    """Returns the bytes of a collective's results on this chip; for a send, the bytes sent.

    A start operation lists its inputs, then its results and scalar contexts. The exception is the
    start of an all-reduce, which lists only the results.
    """
    if instruction.op == "all-reduce-start" or not instruction.op.endswith("-start"):
        sent = instruction.op == ACROSS_SLICES
        return _size(instruction.arrays[:1] if sent else instruction.arrays)
    arrays = tuple(array for array in instruction.arrays if array.shape)
    return _size(arrays[len(arrays) // 2 :])


def _operand_reads(
    inner: list[Instruction], position: int, whole: tuple[Array, ...]
) -> Iterator[Array]:
    """Yields the arrays that a fusion reads from its operand at `position`: none if the operand is
    only updated in place, slices if it is only sliced, otherwise its arrays, `whole`."""
    parameter = next(
        (x for x in inner if x.op == "parameter" and x.text.startswith(f"{position})")), None
    )
    if parameter is None:
        yield from whole
        return
    users = [x for x in inner if parameter.name in x.operands]
    slices = ("dynamic-slice", "slice", "gather")
    updated = [
        x for x in users if x.op == "dynamic-update-slice" and x.operands[0] == parameter.name
    ]
    if users and len(updated) == len(users):
        return
    if users and all(x.op in slices and x.operands[0] == parameter.name for x in users):
        for user in users:
            for array, source in zip(user.arrays, whole, strict=False):
                yield dataclasses.replace(array, in_hbm=source.in_hbm)
        return
    yield from whole


def _in_place(inner: list[Instruction]) -> list[Array]:
    """Returns the update that a fusion writes if it updates an array in place, otherwise []."""
    if not inner or inner[-1].op != "dynamic-update-slice":
        return []
    named = {instruction.name: instruction for instruction in inner}
    return list(named[inner[-1].operands[1]].arrays)


def _convolution_flops(
    lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...], text: str
) -> float:
    """Returns the operations of a convolution, counted by the pairs of elements that it multiplies.
    The compiler writes every matrix product as a convolution, with batches as dilated windows."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert labels is not None
    left, right, result = labels.groups()
    total = 2.0 * out[result.index("b")] * out[result.index("f")] * rhs[right.index("i")]
    for axis in sorted(set(left) - set("bf")):
        total *= _count_meetings(
            lhs[left.index(axis)],
            rhs[right.index(axis)],
            out[result.index(axis)],
            stride=_window(text, "stride", int(axis)),
            dilate=_window(text, "lhs_dilate", int(axis)),
            spread=_window(text, "rhs_dilate", int(axis)),
            low=_padding(text, int(axis)),
        )
    return total


def _count_meetings(
    source: int, size: int, out: int, *, stride: int, dilate: int, spread: int, low: int
) -> int:
    """Returns how many (output, window) positions of an axis fall on an element of the source."""
    reach = (source - 1) * dilate + 1
    return sum(
        0 <= (position := o * stride - low + k * spread) < reach and position % dilate == 0
        for o in range(out)
        for k in range(size)
    )


def _window(text: str, field: str, axis: int) -> int:
    match = re.search(rf"window=\{{[^}}]*\b{field}=([\dx]+)", text)
    return int(match.group(1).split("x")[axis]) if match else 1


def _padding(text: str, axis: int) -> int:
    match = re.search(r"window=\{[^}]*\bpad=([\d_x\-]+)", text)
    return int(match.group(1).split("x")[axis].split("_")[0]) if match else 0


def _estimate(instruction: Instruction) -> tuple[float, float]:
    """Returns the (flops, bytes) that a kernel declares as its cost."""
    match = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.text)
    numbers = json.loads(match.group(1)) if match else {}
    return float(numbers.get("flops", 0)), float(numbers.get("bytes_accessed", 0))
