"""A compiled program, read from its text: its computations, how often each runs, and what it sends between devices.

The text is that of `compiled.as_text()`: computations, `name (parameters) -> shape {`, of lines
`%name = shape opcode(operands), attributes`; a computation is called by its name in the attributes.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_OF_SCALARS = ("all-reduce", "all-reduce-start", "reduce", "reduce-scatter", "reduce-window", "scatter", "sort")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """A dtype and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in memory, without padding."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        return self.size * int(bits[1] if bits else 8) // 8  # pred has no number, and a byte


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    result: tuple[Array, ...]  # of a tuple, its parts
    operands: tuple[str, ...]  # names of instructions of the same computation
    literal: str  # what else stands in the parentheses: a constant's value, a parameter's number
    attributes: str

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs."""
        if self.opcode in _OF_SCALARS:
            return ()  # what is done with each pair of numbers
        return tuple(re.findall(r"%([\w.\-]+)", " ".join(_CALLS.findall(self.attributes))))

    def attribute(self, name: str) -> str | None:
        """`name={…}` or `name=…` of the attributes, without braces."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([\w.\->]+))", self.attributes)
        return (found[1] if found[1] is not None else found[2]) if found else None


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices."""

    kind: str
    bytes: int  # that one device sends, each time
    times: int  # in one run of the program
    asynchronous: bool  # whether other work goes on meanwhile


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module: its computations by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def __iter__(self) -> Iterator[tuple[str, Instruction]]:
        """(name of its computation, instruction) of every instruction that runs."""
        for name in self._order:
            for instruction in self.computations[name].values():
                yield name, instruction

    @functools.cached_property
    def _order(self) -> list[str]:
        """The computations that run, callers before what they call."""
        order: dict[str, None] = {}

        def visit(name: str) -> None:
            for instruction in self.computations[name].values():
                for called in instruction.called:
                    if called not in order:
                        visit(called)
            order[name] = None

        visit(self.entry)
        return list(reversed(order))

    @functools.cached_property
    def times(self) -> Counter[str]:
        """How often each computation runs; each branch of a conditional counts as if it were taken."""
        times = Counter({self.entry: 1})
        for name, instruction in self:
            trips = self.trip_count(name, instruction) if instruction.opcode == "while" else 1
            for called in instruction.called:
                times[called] += times[name] * trips
        return times

    @functools.cached_property
    def _loops(self) -> dict[str, str]:
        """For each computation, the loop's body (or the entry) that it belongs to."""
        loops = {self.entry: self.entry}
        for name, instruction in self:
            for called in instruction.called:
                loops[called] = called if instruction.opcode == "while" else loops[name]
        return loops

    @functools.cached_property
    def ragged_groups(self) -> dict[str, int]:
        """Of computations within a TPU's ragged dot, its groups: it is written as all rows times every group's matrix.

        What runs is each row with its own matrix: the fusion skips the tiles that its mask leaves out.
        """
        groups: dict[str, int] = {}
        for name, instruction in self:
            found = re.search(r'"is_ragged_dot":true,"num_groups_in_ragged_dot":"(\d+)"', instruction.attributes)
            number = int(found[1]) if found else groups.get(name, 1)
            groups |= dict.fromkeys(instruction.called, number) if number > 1 else {}
        return groups

    def trip_count(self, computation: str, loop: Instruction) -> int:
        """Iterations of a `while`: what XLA wrote down, or from the counter that its condition compares; else 1."""
        if known := re.search(r"known_trip_count\D*(\d+)", loop.attributes):
            return int(known[1])
        body, condition = (self.computations[str(loop.attribute(part))] for part in ("body", "condition"))
        compare = next((one for one in condition.values() if one.opcode == "compare"), None)
        if compare is None:
            return 1
        counter, bound = (condition[name] for name in compare.operands)
        index = int(counter.attribute("index") or -1)
        limit = _constant(bound)
        if limit is None or index < 0:
            return 1
        start = _constant(self._element(self.computations[computation], loop.operands[0], index)) or 0
        added = self._element(body, list(body)[-1], index)
        steps = [_constant(body[name]) for name in added.operands] if added and added.opcode == "add" else []
        step = next((value for value in steps if value), 1)
        return max(-(-(limit - start) // step), 1)

    @staticmethod
    def _element(computation: Computation, name: str, index: int) -> Instruction | None:
        """What a tuple's element was made from, through copies."""
        made = computation[name]
        if made.opcode != "tuple":
            return None
        made = computation[made.operands[index]]
        while made.opcode in ("copy", "bitcast"):
            made = computation[made.operands[0]]
        return made

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """Every transfer. On TPU several fusions carry one on beside other work: it counts where it is started."""
        transfers = []
        for name, instruction in self:
            if (kind := self._kind(name, instruction)) in _COLLECTIVES:
                transfers.append((name, instruction, (self._loops[name], kind, instruction.attribute("channel_id"))))
        started = {channel for name, _, channel in transfers if name in self._starting}
        found = []
        for name, instruction, channel in transfers:
            starts = name in self._starting
            if starts or channel not in started or name not in self._fused:
                sent = sent_bytes(channel[1], instruction, self.computations[name])
                beside = starts or instruction.opcode.endswith("-start")
                found.append(Collective(channel[1], sent, self.times[name], beside))
        return found

    def _kind(self, name: str, instruction: Instruction) -> str:
        """The opcode, without -start. A TPU's reduce-scatter is a fusion of an all-reduce and what cuts its result."""
        kind = instruction.opcode.removesuffix("-start")
        cuts = any(one.opcode == "dynamic-slice" for one in self.computations[name].values())
        return "reduce-scatter" if kind == "all-reduce" and name in self._fused and cuts else kind

    @functools.cached_property
    def _fused(self) -> set[str]:
        return {name for _, instruction in self if instruction.opcode == "fusion" for name in instruction.called}

    @functools.cached_property
    def _starting(self) -> set[str]:
        """Computations that begin a transfer which another instruction ends."""
        wrapped = (instruction.called for _, instruction in self if instruction.opcode == "async-start")
        fused = (name for name, instruction in self if 'target="AsyncCollectiveStart"' in instruction.attributes)
        return {name for names in wrapped for name in names} | set(fused)


def parse(text: str) -> Program:
    """Reads the text of a compiled module."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, name = "", {}, ""
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            name = match[1]
            current[name] = _instruction(name, line[match.end() :])
        elif match := _COMPUTATION.match(line):
            name, current = "", computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif name and line != "}":  # a kernel's attributes go over several lines
            current[name] = dataclasses.replace(current[name], attributes=current[name].attributes + line)
    return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    """The rest of a line after `%name = `."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing]
    arrays = (
        Array(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}|/\*.*?\*/", "", text[:end]))
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, text[end + 1 : opening].strip(), tuple(arrays), operands, inside, text[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _constant(instruction: Instruction | None) -> int | None:
    number = (
        instruction is not None and instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal)
    )
    return int(number[0]) if number else None


def sent_bytes(kind: str, collective: Instruction, computation: Computation) -> int:
    """Bytes that one device sends, at least.

    With G devices taking part and S bytes of the gathered, or the not yet reduced, array: S·(G − 1)/G, twice that for
    an all-reduce. A permutation sends its operand. What a ragged all-to-all sends is decided as the program runs:
    counted as if every device sent and got as many rows as there is room for on the side with less of it.
    """
    sizes = [sum(array.bytes for array in computation[name].result) for name in collective.operands]
    size = min(sizes[:2]) if kind == "ragged-all-to-all" else sum(sizes)
    if kind == "collective-permute":
        return size
    devices = group_size(collective.attributes)
    factor = {"all-gather": devices, "all-reduce": 2}.get(kind, 1)
    return size * factor * (devices - 1) // devices


def group_size(attributes: str) -> int:
    """Devices that take part in one collective, from any of three spellings of `replica_groups`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if grid := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):  # [groups,devices]<=[…]
        return int(grid[1])
    if mesh := re.search(r"replica_groups=@?\w*\[([^\]]*)\]\s*\{([^}]*)\}", attributes):  # mesh['x'=2,'y'=4] {'y'}
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])  # an axis, or a part of one: 'y':(1)2
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 1
