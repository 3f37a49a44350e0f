"""What devices exchange in a denoise step, read from the text of a compiled program (HLO)."""

from __future__ import annotations

import dataclasses
import functools
import math
import re


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Exchanges of one kind in a step: how many, and the bytes of their results on one device."""

    count: int
    bytes: int


Exchanges = dict[str, Exchange]
"""By kind, as XLA calls it: ``"all-reduce"``, ``"all-gather"``, …."""


def exchanges_of_step(hlo: str) -> Exchanges:
    """What one turn of the program's outermost loop of unknown length exchanges: that is the loop of denoise steps.

    A loop of known length, such as that over layers, counts as often as it turns. Where the program chooses, the branch that exchanges
    least counts: all rows are greedy, and no finished block is written beside the window. So it is with several loops of unknown length
    in one step: where the host drives loops, each has steps of its kind.

    Raises:
      ValueError: where there is no such loop, or something is exchanged that nothing seems to call.
    """
    computations, entry = _computations(hlo)
    reached = set()

    @functools.cache
    def of(name: str) -> Exchanges:
        """What a computation exchanges, those that it calls included; of its loops of unknown length, the least that exchanges."""
        reached.add(name)
        total: Exchanges = {}
        open_loops = []
        for line in computations[name]:
            if found := _EXCHANGE.search(line):
                # What starts an exchange has what goes in beside what comes out, in a tuple of its own for GPUs; only a sum for others,
                # where both are alike, has one.
                pair = bool(found["start"]) and (found["kind"] != "all-reduce" or found["result"].startswith("(("))
                total = _add(total, {found["kind"]: Exchange(1, _bytes(found["result"], pair=pair))})
            elif loop := _WHILE.search(line):
                turn, times = _add(of(loop["body"]), of(loop["condition"])), _turns(line, computations[loop["condition"]])
                if times is None:
                    open_loops.append(turn)
                total = _add(total, turn, times or 0)
            elif branches := _BRANCHES.search(line):
                total = _add(total, min(map(of, branches[1].replace("%", "").split(", ")), key=_size))
            elif call := _CALL.search(line):
                total = _add(total, of(call[1]))
        return _add(total, min(filter(None, open_loops), key=_size, default={}))

    of(entry)
    if lost := [name for name in computations.keys() - reached if any(map(_EXCHANGE.search, computations[name]))]:
        raise ValueError(f"the program exchanges something in {', '.join(sorted(lost))}, and what calls that was not understood")
    for line in computations[entry]:
        if (loop := _WHILE.search(line)) and _turns(line, computations[loop["condition"]]) is None:
            return _add(of(loop["body"]), of(loop["condition"]))
    raise ValueError("the program has no loop of denoise steps")


_KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
_EXCHANGE = re.compile(rf" = (?P<result>.*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%(?P<condition>[\w.-]+), body=%(?P<body>[\w.-]+)")
_BRANCHES = re.compile(r" conditional\(.*branch_computations=\{([^}]*)\}")
_CALL = re.compile(r" (?:call|fusion|async)(?:-start)?\(.*(?:calls|to_apply)=%([\w.-]+)")
_HEAD = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_SHAPE = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one that is the program."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _turns(line: str, condition: list[str]) -> int | None:
    """How often a loop turns: as it says itself, or by its condition, a counter from zero compared with a constant; None if not known."""
    if said := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(said[1])
    text = "\n".join(condition)
    if not (compared := re.search(r"ROOT .* compare\(.*, %([\w.-]+)\), direction=LT", text)):
        return None
    limit = re.search(rf"%{re.escape(compared[1])} = \S+ constant\((\d+)\)", text)
    return int(limit[1]) if limit else None


def _bytes(shapes: str, *, pair: bool) -> int:
    """Bytes of ``"(s32[2]{0}, bf16[8,32]{1,0:T(8,128)})"``; of a pair, those of its second half."""
    found = _SHAPE.findall(shapes)
    sizes = [int(bits or 8) // 8 * math.prod(map(int, filter(None, sides.split(",")))) for _, bits, sides in found]
    return sum(sizes[len(sizes) // 2 :] if pair else sizes)


def _add(a: Exchanges, b: Exchanges, times: int = 1) -> Exchanges:
    def sum_of(kind: str) -> Exchange:
        mine, theirs = a.get(kind, Exchange(0, 0)), b.get(kind, Exchange(0, 0))
        return Exchange(mine.count + times * theirs.count, mine.bytes + times * theirs.bytes)

    return {kind: found for kind in {**a, **b} if (found := sum_of(kind)).count}


def _size(exchanges: Exchanges) -> tuple[int, int]:
    return sum(e.bytes for e in exchanges.values()), sum(e.count for e in exchanges.values())
