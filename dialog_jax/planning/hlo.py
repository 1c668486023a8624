"""The text of a partitioned XLA program in; its collectives, matrix products and arrays stored by loops out.

XLA's own cost analysis counts the body of a loop once. Here every computation is counted as often as it runs: layers,
micro-batches and recomputation are loops and calls.

    %body { %r = f32[8] all-reduce(%x), replica_groups=[2,4]<=[8] }      %cond { ROOT %c = compare(%i, constant 5), LT }
    ENTRY { while(...), condition=%cond, body=%body }                    an all-reduce of 32 bytes among 4, five times
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dialog_jax.errors import UserError

_VERSIONS = "Plans are tested with the versions of JAX that BUILD.md lists."
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*{$")
_ASSIGNMENT = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(pred|token|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations={([^}]*)}")
_SETS = re.compile(r"replica_groups={{([\d,]*)}")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=" + _IOTA)
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + _IOTA + r"\))? {([^}]*)}")


class Array(NamedTuple):
    """The type of an array."""

    kind: str
    """Element type as XLA writes it: f32, bf16, pred."""
    shape: tuple[int, ...]
    bits: int

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.bits // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    """The arrays of the result; several if it is a tuple."""
    operation: str
    operands: tuple[str, ...]
    parts: tuple[int, ...]
    """Index of the array within each operand that is a tuple, otherwise 0. XLA of JAX 0.11 writes `x#2`."""
    attributes: str
    root: bool

    @property
    def operation_name(self) -> str:
        """JAX's name for its place in the Python program."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""


class Program(NamedTuple):
    """Computations by name, and the name of the one that starts."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str


class Collective(NamedTuple):
    """An exchange between devices."""

    kind: str
    """One of `COLLECTIVES`. An all-reduce of which each device uses only its own part counts as a reduce-scatter, which
    compilers for TPU and GPU replace it by."""
    bytes: int
    """Size of the array of all devices of a group: what is gathered or reduced, or what one device sends."""
    group: tuple[int, ...]
    """The first group of devices; the others have the same size."""
    runs: float
    """How often it runs in a step."""
    operation_name: str


class Products(NamedTuple):
    """Matrix products of one device in a step."""

    flops: float
    bytes: float
    """Size of all operands and results."""


class StoredArray(NamedTuple):
    """An array that a loop fills, one entry per iteration."""

    array: Array
    operation_name: str


def parse(text: str) -> Program:
    """Returns the program that the text of a module describes.

    Raises:
      UserError: it has no entry.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if line.startswith("}"):
            name = ""
        elif name:
            if (instruction := _parse_instruction(line)) is not None:
                computations[name][instruction.name] = instruction
        elif not line.startswith("HloModule") and (header := _HEADER.match(line)):
            name = header.group(2)
            computations[name] = {}
            entry = name if header.group(1) else entry
    if not entry:
        raise UserError(f"no program in XLA's text of {len(text):,} characters. {_VERSIONS}")
    return Program(computations, entry)


def count_runs(program: Program, *, unknown: Callable[[str], float]) -> dict[str, float]:
    """Returns how often each computation runs in a step.

    Args:
      unknown: operation name to mean trip count, for a loop whose trip count is not in the text.
    """
    counts: dict[str, float] = dict.fromkeys(program.computations, 0.0)

    def visit(computation: str, times: float) -> None:
        counts[computation] += times
        for instruction in program.computations[computation].values():
            trip_count = _find_trip_count(program, instruction, unknown) if instruction.operation == "while" else 1.0
            for name in list_callees(instruction):
                visit(name, times * trip_count)

    visit(program.entry, 1.0)
    return counts


def find_collectives(program: Program, counts: Mapping[str, float], devices: int) -> list[Collective]:
    """Returns every collective of the program that runs."""
    collectives = []
    for name, body in program.computations.items():
        for instruction in body.values():
            kind = instruction.operation
            if kind not in COLLECTIVES or not counts[name]:
                continue
            group = _parse_group(instruction, devices)
            if len(group) == 1:  # no other device to exchange with; XLA removes these later
                continue
            size = sum(array.bytes for array in instruction.arrays)
            if kind == "reduce-scatter":
                size *= len(group)
            if kind == "all-reduce" and _uses_only_local_part(instruction, body, len(group)):
                kind = "reduce-scatter"
            collectives.append(Collective(kind, size, group, counts[name], instruction.operation_name))
    return collectives


def sum_products(program: Program, counts: Mapping[str, float]) -> Products:
    """Returns the work of all matrix products. A multiply-add is two FLOPs."""
    flops = size = 0.0
    for name, body in program.computations.items():
        for instruction in body.values():
            if instruction.operation != "dot":
                continue
            operands = zip(instruction.operands, instruction.parts, strict=True)
            left, right = (body[operand].arrays[index] for operand, index in operands)
            (result,) = instruction.arrays
            axes = re.search(r"lhs_contracting_dims={([\d,]+)}", instruction.attributes)
            depth = math.prod(left.shape[axis] for axis in _parse_integers(axes.group(1))) if axes else 1
            flops += counts[name] * 2 * math.prod(result.shape) * depth
            size += counts[name] * (left.bytes + right.bytes + result.bytes)
    return Products(flops, size)


def find_stored_arrays(program: Program) -> list[StoredArray]:
    """Returns the arrays that loops of known trip count fill: activations for the backward pass, and gradients."""
    stored = []
    for body in program.computations.values():
        for instruction in body.values():
            if instruction.operation == "while" and _find_trip_count(program, instruction, lambda name: 0.0):
                for update in find_called_computation(program, instruction).values():
                    if update.operation == "dynamic-update-slice":
                        stored.append(StoredArray(update.arrays[0], update.operation_name))
    return stored


def find_called_computation(program: Program, instruction: Instruction) -> Mapping[str, Instruction]:
    """Returns the computation that a fusion or a loop runs; empty for other instructions."""
    names = list_callees(instruction)
    return program.computations[names[0]] if names else {}


def list_callees(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction runs, without a loop's condition."""
    names = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        names += [branch.strip().lstrip("%") for branch in branches.split(",")]
    return names


def _parse_instruction(line: str) -> Instruction | None:
    assignment = _ASSIGNMENT.match(line)
    if not assignment:
        return None
    rest = line[assignment.end() :]
    end = _find_closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    operation, _, rest = rest.partition("(")
    end = _find_closing("(" + rest) - 1
    operands = [operand.strip().lstrip("%") for operand in re.sub(r"/\*.*?\*/", "", rest[: end - 1]).split(",")]
    return Instruction(
        name=assignment.group(2),
        arrays=tuple(
            Array(name, tuple(map(int, shape.split(","))) if shape else (), int(bits or 8))
            for name, bits, shape in _ARRAY.findall(kind)
        ),
        operation=operation,
        operands=tuple(operand.partition("#")[0] for operand in operands),
        parts=tuple(int(operand.partition("#")[2] or 0) for operand in operands),
        attributes=rest[end:],
        root=bool(assignment.group(1)),
    )


def _find_closing(text: str) -> int:
    """Returns the index after the parenthesis that closes the one at the start."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return index + 1
    raise UserError(f"XLA's text cannot be read: a parenthesis stays open in {text[:80]!r}. {_VERSIONS}")


def _find_trip_count(program: Program, loop: Instruction, unknown: Callable[[str], float]) -> float:
    """Returns the trip count that XLA found, or the limit of JAX's loop counter, which starts at 0."""
    if known := re.search(r'"known_trip_count":{"n":"(\d+)"}', loop.attributes):
        return float(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    assert condition, loop
    body = program.computations[condition.group(1)]
    (root,) = (instruction for instruction in body.values() if instruction.root)
    if root.operation == "compare" and "direction=LT" in root.attributes:
        limit = body[root.operands[1]]
        if limit.operation == "constant":
            return float(limit.operands[0])
    return unknown(loop.operation_name)


def _parse_group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """Returns the first group of devices that exchange, from any of XLA's four notations."""
    attributes = instruction.attributes
    if instruction.operation == "collective-permute":
        pairs = re.findall(r"{(\d+),(\d+)}", attributes)
        # The pair of devices that are farthest apart.
        return max(((int(a), int(b)) for a, b in pairs), key=lambda pair: abs(pair[0] - pair[1]))
    if sets := _SETS.search(attributes):
        return tuple(map(int, sets.group(1).split(",")))
    if groups := _GROUPS.search(attributes):
        shape, *iota = groups.groups()
        return tuple(_iota(*iota).reshape(_parse_integers(shape))[0].tolist())
    if axes := _AXES.search(attributes):
        sizes, ids, order, names = axes.groups()
        mesh = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
        group_axes = re.findall(r"'(\w+)'", names)
        if set(group_axes) <= set(mesh) and ":" not in names:
            numbers = np.arange(devices) if ids is None else _iota(ids, order)
            numbers = numbers.reshape(list(mesh.values()))
            return tuple(numbers[tuple(slice(None) if name in group_axes else 0 for name in mesh)].ravel().tolist())
    if "replica_groups={}" in attributes:
        return tuple(range(devices))
    raise UserError(f"the devices of {instruction.name} cannot be read from {attributes[:200]!r}. {_VERSIONS}")


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Returns 0, 1, ... in `shape`, transposed to `order`: the notation `[2,4]<=[4,2]T(1,0)`."""
    numbers = np.arange(math.prod(_parse_integers(shape))).reshape(_parse_integers(shape))
    return numbers.transpose(_parse_integers(order)) if order else numbers


def _parse_integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _uses_only_local_part(instruction: Instruction, body: Mapping[str, Instruction], parts: int) -> bool:
    """Returns whether the only use of an array is to slice out one of `parts` equal parts."""
    users = [other for other in body.values() if instruction.name in other.operands]
    if len(users) != 1 or instruction.root or len(instruction.arrays) != 1:
        return False
    (user,) = users
    return user.operation == "dynamic-slice" and user.arrays[0].bytes * parts == instruction.arrays[0].bytes
