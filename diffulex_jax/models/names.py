"""Checkpoint tensors and the leaves of a parameter tree: declared once, used to read and to write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import einops
import numpy as np


Path = tuple[str, ...]
Index = tuple[int | slice | EllipsisType, ...]


class Part(NamedTuple):
    """Rows of a checkpoint tensor, and where they lie in a leaf.

    Attributes:
      leaf: the leaf's path in the tree.
      at: which part of the leaf, as NumPy indexes it; the first entry of a stacked leaf is the layer.
      pattern: einops' description of the way from the tensor's rows to that part: ``"(kv g h) d -> d kv g h"``.
      sizes: lengths that the pattern cannot infer, in both directions.
      rows: of the tensor's first axis; default: all.
    """

    leaf: Path
    at: Index
    pattern: str
    sizes: Mapping[str, int] = {}
    rows: slice = slice(None)


class Tensor(NamedTuple):
    """A tensor of a checkpoint: its name and shape there, and its parts."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


Region = tuple[slice, ...]
"""A part of an array: its range along each axis."""


def within(part: Part, held: Sequence[Region], *, leaf: Sequence[int], tensor: Sequence[int]) -> tuple[Part, Region] | None:
    """What of a ``part`` lies in regions ``held`` of its leaf, or between them, and the region of its tensor that it is made of.

    Args:
      part: of a tensor.
      held: regions of the leaf.
      leaf, tensor: shapes of both.

    Returns:
      The part for a tensor of which only that region was read. None where nothing of it is held.
    """
    at = spelt_out(part.at, len(leaf))
    ours = [region for region in held if all(i in range(n)[r] for i, n, r in zip(at, leaf, region, strict=True) if isinstance(i, int))]
    if not ours:
        return None
    source, target = (side.split() for side in _axes(part.pattern, len(tensor)))
    free, sizes = [axis for axis, i in enumerate(at) if not isinstance(i, int)], dict(part.sizes)
    taken = [range(n)[part.rows] if k == 0 else range(n) for k, n in enumerate(tensor)]
    for axis, name in zip(free, target, strict=True):
        ranges = [range(leaf[axis])[region[axis]] for region in ours]
        low, high = min(r.start for r in ranges), max(r.stop for r in ranges)
        if (low, high) == (0, leaf[axis]) or at[axis] != slice(None):
            continue
        # The axis begins one of the tensor's: it is all of it, or what its first axis "(kv g h)" is split into first.
        k = next((k for k, side in enumerate(source) if side.split(",")[0] == name), None)
        if k is None:
            continue
        each = len(taken[k]) // leaf[axis]
        taken[k], at[axis] = taken[k][low * each : high * each], slice(low, high)
        sizes |= {name: high - low} if name in sizes else {}
    region = tuple(slice(r.start, r.stop) for r in taken)
    return part._replace(at=tuple(at), rows=slice(None), sizes=sizes), region


def spelt_out(at: Index, ndim: int) -> list[int | slice]:
    """An entry for each axis."""
    entries = [i for i in at if not isinstance(i, EllipsisType)]
    where = at.index(...) if ... in at else len(at)
    return [*entries[:where], *[slice(None)] * (ndim - len(entries)), *entries[where:]]


def _axes(pattern: str, ndim: int) -> list[str]:
    """Both sides of a pattern: ``"(kv g h) d -> d kv g h"`` as ``"kv,g,h d"`` and ``"d kv g h"``."""
    spelt = pattern.replace("...", " ".join(f"axis{k}" for k in range(ndim)))
    joined = re.sub(r"\(([^)]*)\)", lambda group: group[1].replace(" ", ","), spelt)
    return joined.split(" -> ")


def put(leaf: np.ndarray, part: Part, tensor: np.ndarray) -> None:
    """Writes a part of a checkpoint ``tensor`` to its place in ``leaf``, in place."""
    leaf[part.at] = einops.rearrange(tensor[part.rows], part.pattern, **part.sizes)


def take(leaf: np.ndarray, part: Part, tensor: np.ndarray) -> None:
    """Writes a part of ``leaf`` to its place in the checkpoint ``tensor``, in place: the inverse of :func:`put`."""
    source, target = part.pattern.split(" -> ")
    tensor[part.rows] = einops.rearrange(leaf[part.at], f"{target} -> {source}", **part.sizes)


class Names:
    """Declares the tensors of one layer (or of none) in the order of a checkpoint.

    ``Names("model.layers.3.", "moe", 1)`` declares tensors of that prefix in leaf ``("moe", ...)``, layer 1 of the stack.
    """

    def __init__(self, prefix: str = "", kind: str | None = None, layer: int | None = None):
        self.prefix = prefix
        self._path: Path = () if kind is None else (kind,)
        self._layer: tuple[int, ...] = () if layer is None else (layer,)

    def part(self, leaf: str, pattern: str, *, at: Index = (), rows: slice = slice(None), **sizes: int) -> Part:
        """A part of the leaf named ``leaf``, at ``at`` behind the layer."""
        return Part((*self._path, leaf), (*self._layer, *at), pattern, sizes, rows)

    def tensor(self, name: str, shape: tuple[int, ...], *parts: Part) -> Tensor:
        """A tensor made of ``parts``."""
        return Tensor(self.prefix + name, shape, parts)

    def same(self, name: str, leaf: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that lies in its leaf as it is."""
        return self.tensor(name, shape, self.part(leaf, "... -> ..."))

    def transposed(self, name: str, leaf: str, shape: tuple[int, int], *, at: Index = ()) -> Tensor:
        """A matrix ``[out, in]`` that lies in its leaf as ``[in, out]``."""
        return self.tensor(name, shape, self.part(leaf, "o i -> i o", at=at))

    def heads(self, base: str, *, kv: int, group: int, head: int, embed: int, bias: bool = False) -> Iterator[Tensor]:
        """The projections to queries, keys and values, which lie together in ``qkv [D, KV, G + 2, H]``, and their biases."""
        whose: tuple[tuple[str, int, int | slice, str], ...] = (
            ("q_proj", kv * group, slice(group), "kv g h"),
            ("k_proj", kv, group, "kv h"),
            ("v_proj", kv, group + 1, "kv h"),
        )
        for name, count, at, rows in whose:
            where: dict[str, Any] = {"at": (..., at, slice(None)), "kv": kv, "h": head}
            weight = self.part("qkv", f"({rows}) d -> d {rows}", **where)
            yield self.tensor(f"{base}{name}.weight", (count * head, embed), weight)
            if bias:
                yield self.tensor(f"{base}{name}.bias", (count * head,), self.part("qkv_bias", f"({rows}) -> {rows}", **where))

    def swiglu(self, base: str, leaf: str, *, width: int, embed: int) -> Iterator[Tensor]:
        """Three matrices of a gated MLP; gate and up lie side by side in ``{leaf}_gate_up [D, 2, F]``."""
        for half, name in enumerate(("gate_proj", "up_proj")):
            yield self.transposed(f"{base}{name}.weight", f"{leaf}_gate_up", (width, embed), at=(slice(None), half))
        yield self.transposed(f"{base}down_proj.weight", f"{leaf}_down", (embed, width))

    def experts(self, base: str, *, count: int, width: int, embed: int) -> Iterator[Tensor]:
        """The experts ``{base}{e}.``; gate columns come before up columns in ``experts_gate_up [E, D, 2 F]``."""
        for e in range(count):
            for half, name in enumerate(("gate_proj", "up_proj")):
                at = (e, slice(None), slice(half * width, (half + 1) * width))
                yield self.transposed(f"{base}{e}.{name}.weight", "experts_gate_up", (width, embed), at=at)
            yield self.transposed(f"{base}{e}.down_proj.weight", "experts_down", (embed, width), at=(e,))
