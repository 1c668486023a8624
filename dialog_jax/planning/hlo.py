"""What a partitioned program does: its text, as XLA prints it, to collectives, matrix products and what loops store.

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

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*{$")
_NAMED = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
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
    """As XLA writes it: f32, bf16, pred."""
    shape: tuple[int, ...]
    bits: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.bits // 8


class Instruction(NamedTuple):
    """One line."""

    name: str
    arrays: tuple[Array, ...]
    """Of the result; several if it is a tuple."""
    operation: str
    operands: tuple[str, ...]
    parts: tuple[int, ...]
    """Which array of each operand is meant; 0 where it is not a tuple. XLA of JAX 0.11 writes `x#2`."""
    attributes: str
    root: bool

    @property
    def operation_name(self) -> str:
        """Where it comes from in the Python program, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


class Program(NamedTuple):
    """Computations by name, and the one that is run."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str


class Collective(NamedTuple):
    """An exchange between devices."""

    kind: str
    """One of `COLLECTIVES`. An all-reduce of which a device goes on to use its own part only counts as the
    reduce-scatter that compilers for TPU and GPU make of it."""
    bytes: int
    """Of the whole array: what is gathered, what is reduced, what a device sends to all."""
    group: tuple[int, ...]
    """The first of the groups of devices; the others are alike."""
    runs: float
    """Times a step."""
    operation_name: str


class Products(NamedTuple):
    """Matrix products of one device in a step."""

    flops: float
    bytes: float
    """Of operands and results."""


class StoredArray(NamedTuple):
    """An array that a loop fills, an entry a turn."""

    array: Array
    operation_name: str


def parse(text: str) -> Program:
    """Reads the text of a module.

    Raises:
      UserError: it has no entry.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, here = "", ""
    for line in text.splitlines():
        if line.startswith("}"):
            here = ""
        elif here:
            if (instruction := _instruction(line)) is not None:
                computations[here][instruction.name] = instruction
        elif not line.startswith("HloModule") and (header := _HEADER.match(line)):
            here = header.group(2)
            computations[here] = {}
            entry = here if header.group(1) else entry
    if not entry:
        raise UserError(
            f"no program in a text of {len(text):,} characters; does this version of XLA print another form?"
        )
    return Program(computations, entry)


def count_runs(program: Program, *, unknown: Callable[[str], float]) -> dict[str, float]:
    """Returns how often each computation runs in a step; fractions where `unknown` says so.

    Args:
      unknown: operation name to turns, for a loop whose number is not in the text.
    """
    counts: dict[str, float] = dict.fromkeys(program.computations, 0.0)

    def visit(computation: str, times: float) -> None:
        counts[computation] += times
        for instruction in program.computations[computation].values():
            turns = _turns(program, instruction, unknown) if instruction.operation == "while" else 1.0
            for name in list_callees(instruction):
                visit(name, times * turns)

    visit(program.entry, 1.0)
    return counts


def find_collectives(program: Program, counts: Mapping[str, float], devices: int) -> list[Collective]:
    """Returns every collective of the program, with how often it runs."""
    found = []
    for name, body in program.computations.items():
        for instruction in body.values():
            kind = instruction.operation
            if kind not in COLLECTIVES or not counts[name]:
                continue
            group = _group(instruction, devices)
            if len(group) == 1:  # nobody to exchange with: XLA removes these later
                continue
            size = sum(array.bytes for array in instruction.arrays)
            if kind == "reduce-scatter":
                size *= len(group)
            if kind == "all-reduce" and _only_own_part(instruction, body, len(group)):
                kind = "reduce-scatter"
            found.append(Collective(kind, size, group, counts[name], instruction.operation_name))
    return found


def sum_products(program: Program, counts: Mapping[str, float]) -> Products:
    """Returns the work of all matrix products. A multiply-add is two FLOPs."""
    flops = size = 0.0
    for name, body in program.computations.items():
        for instruction in body.values():
            if instruction.operation != "dot":
                continue
            named = zip(instruction.operands, instruction.parts, strict=True)
            left, right = (body[operand].arrays[number] for operand, number in named)
            (result,) = instruction.arrays
            contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
            depth = math.prod(left.shape[axis] for axis in contracted)
            flops += counts[name] * 2 * math.prod(result.shape) * depth
            size += counts[name] * (left.bytes + right.bytes + result.bytes)
    return Products(flops, size)


def find_stored_arrays(program: Program) -> list[StoredArray]:
    """Returns the arrays that loops of a known number of turns fill entry by entry: activations that the backward pass
    needs, and gradients."""
    found = []
    for body in program.computations.values():
        for instruction in body.values():
            if instruction.operation == "while" and _turns(program, instruction, lambda name: 0.0):
                for filled in find_called_computation(program, instruction).values():
                    if filled.operation == "dynamic-update-slice":
                        found.append(StoredArray(filled.arrays[0], filled.operation_name))
    return found


def find_called_computation(program: Program, instruction: Instruction) -> Mapping[str, Instruction]:
    """Returns the computation that a fusion or a loop runs; of what runs none, nothing."""
    names = list_callees(instruction)
    return program.computations[names[0]] if names else {}


def list_callees(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction runs, but a loop's condition."""
    names = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        names += [branch.strip().lstrip("%") for branch in branches.split(",")]
    return names


def _instruction(line: str) -> Instruction | None:
    named = _NAMED.match(line)
    if not named:
        return None
    rest = line[named.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    operation, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    operands = [operand.strip().lstrip("%") for operand in re.sub(r"/\*.*?\*/", "", rest[: end - 1]).split(",")]
    return Instruction(
        name=named.group(2),
        arrays=tuple(
            Array(name, tuple(map(int, shape.split(","))) if shape else (), int(bits or 8))
            for name, bits, shape in _ARRAY.findall(kind)
        ),
        operation=operation,
        operands=tuple(operand.partition("#")[0] for operand in operands),
        parts=tuple(int(operand.partition("#")[2] or 0) for operand in operands),
        attributes=rest[end:],
        root=bool(named.group(1)),
    )


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the one at the start."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place + 1
    raise UserError(f"a parenthesis stays open in {text[:80]!r}")


def _turns(program: Program, loop: Instruction, unknown: Callable[[str], float]) -> float:
    """Turns of a loop: as XLA found, or the constant that JAX's counter, which begins at 0, is compared with."""
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


def _group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The first group of devices that exchange; XLA has four ways to write them."""
    attributes = instruction.attributes
    if instruction.operation == "collective-permute":
        pairs = re.findall(r"{(\d+),(\d+)}", attributes)
        # Of all pairs, the one that is farthest apart.
        return max(((int(a), int(b)) for a, b in pairs), key=lambda pair: abs(pair[0] - pair[1]))
    if sets := _SETS.search(attributes):
        return tuple(map(int, sets.group(1).split(",")))
    if groups := _GROUPS.search(attributes):
        shape, *iota = groups.groups()
        return tuple(_iota(*iota).reshape(_integers(shape))[0].tolist())
    if axes := _AXES.search(attributes):
        sizes, ids, order, names = axes.groups()
        mesh = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
        named = re.findall(r"'(\w+)'", names)
        if set(named) <= set(mesh) and ":" not in names:
            places = np.arange(devices) if ids is None else _iota(ids, order)
            places = places.reshape(list(mesh.values()))
            return tuple(places[tuple(slice(None) if name in named else 0 for name in mesh)].ravel().tolist())
    if "replica_groups={}" in attributes:
        return tuple(range(devices))
    raise UserError(f"the devices of {instruction.name} cannot be read from {attributes[:200]!r}")


def _iota(shape: str, order: str | None) -> np.ndarray:
    places = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return places.transpose(_integers(order)) if order else places


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _numbers(attributes: str, name: str) -> list[int]:
    found = re.search(name + r"={([\d,]*)}", attributes)
    return _integers(found.group(1)) if found and found.group(1) else []


def _only_own_part(instruction: Instruction, body: Mapping[str, Instruction], parts: int) -> bool:
    """Whether all that is done with an array is to cut out one of as many parts as there are devices."""
    users = [other for other in body.values() if instruction.name in other.operands]
    if len(users) != 1 or instruction.root or len(instruction.arrays) != 1:
        return False
    (user,) = users
    return user.operation == "dynamic-slice" and user.arrays[0].bytes * parts == instruction.arrays[0].bytes
