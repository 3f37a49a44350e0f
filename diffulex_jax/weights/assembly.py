"""Leaves of a model's parameters, put together from a directory's tensors on the devices of a mesh, piece by piece."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, Sharding

from diffulex_jax.models import names
from diffulex_jax.models.base import Param
from diffulex_jax.parallel.mesh import parts as parts_over
from diffulex_jax.parallel.mesh import sharding
from diffulex_jax.weights.quantise import placement
from diffulex_jax.weights.source import Source
from pallas_kernels.quantised import Form, dtype_of


HOST_BYTES = 256 * 2**20
"""A leaf is put together on the host in pieces of about so many bytes: layers, or experts of a layer, at least one."""


class Kept(NamedTuple):
    """How a leaf is put together.

    Attributes:
      planes: shape and dtype of each array that it is put together from: one, or values and scales.
      read: what each of them has of a tensor, by the tensor's name.
      keep: what becomes of a run of their layers; None: nothing else than is there.
    """

    planes: list[tuple[tuple[int, ...], np.dtype]]
    read: Callable[[str, names.Region], tuple[np.ndarray, ...]]
    keep: Callable[..., Any] | None


def groups(parts: list[tuple[names.Tensor, names.Part]], source: Source, *, form: Form) -> int:
    """In how many groups the scales of each column of a leaf are, of which the files hold the values and scales of ``form``.

    Raises:
      ValueError: where they hold something else of a tensor, naming it.
    """
    count = source.groups(parts[0][0].name, form)
    for tensor, _ in parts:
        if (found := source.groups(tensor.name, form)) is None or found != count or (form != "int4" and found != 1):
            raise ValueError(f"{tensor.name} is not stored as {form}, as the config says, with as many scales as the others")
    assert count is not None
    return count


def stored(param: Param, source: Source, *, form: Form, groups: int, keep: Callable[..., Any]) -> Kept:
    """A leaf of which the files hold the values and scales of ``form``: as many scales as values, but for experts one for each group."""
    values = dtype_of("fp8" if form == "fp8" else "int8")  # the host has no int4
    of_group = "expert" in param.axes

    def read(name: str, region: names.Region) -> tuple[np.ndarray, ...]:
        found = source.matrix(name)
        scales = found.scales.astype(ml_dtypes.bfloat16)
        if of_group:
            return found.values[region[0]], scales[region[0]]  # no device has a part of a column
        return found.values[region], np.repeat(scales, found.block[1], axis=1)[region]

    shape = (*param.shape[:-2], groups, param.shape[-1]) if of_group else param.shape
    return Kept([(param.shape, values), (shape, np.dtype(ml_dtypes.bfloat16))], read, keep)


def built(param: Param, parts: list[tuple[names.Tensor, names.Part]], kept: Kept, mesh: Mesh, *, step: Callable[[int], Any]) -> Any:
    """A leaf on ``mesh``, put together piece by piece: runs of layers, or of a layer's experts, that the host has room for."""
    where = sharding(mesh, param.axes)  # of what it is put together from
    sizes = _piece_sizes(param, parts, sum(math.prod(shape) * dtype.itemsize for shape, dtype in kept.planes), mesh)
    here = _held_here(where, param.shape)
    of_piece: dict[tuple[int, ...], list[tuple[names.Tensor, names.Part]]] = collections.defaultdict(list)
    for tensor, part in parts:
        of_piece[tuple(cast(int, at) // size * size for at, size in zip(part.at, sizes, strict=False))].append((tensor, part))

    def piece(first: tuple[int, ...]) -> list[jax.Array]:
        room = [min(size, n - at) for size, n, at in zip(sizes, param.shape, first, strict=False)]
        # Memory where something is put.
        host = [np.empty((*room, *shape[len(room) :]), dtype) for shape, dtype in kept.planes]
        for tensor, whole in of_piece[first]:
            step(1)
            if (found := names.within(whole, here, leaf=param.shape, tensor=tensor.shape)) is not None:
                part, region = found
                inside = tuple(cast(int, at) - begin for at, begin in zip(part.at, first, strict=False))
                for plane, read in zip(host, kept.read(tensor.name, region), strict=True):
                    names.put(plane, part._replace(at=(*inside, *part.at[len(first) :])), read)
        return [on_mesh(plane) for plane in host]

    def on_mesh(host: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    def keep(*planes: jax.Array) -> Any:
        return planes[0] if kept.keep is None else kept.keep(*planes)

    if len(of_piece) == 1 and kept.keep is None:
        return piece(*of_piece)[0]
    whole = jax.eval_shape(keep, *(jax.ShapeDtypeStruct(*plane) for plane in kept.planes))
    lies = placement(mesh, param, whole)

    def put(leaf: Any, first: tuple[jax.Array, ...], *planes: jax.Array) -> Any:
        def into(a: jax.Array, new: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(a, new, [*map(jnp.int32, first), *[jnp.int32(0)] * (a.ndim - len(first))])

        return jax.tree.map(into, leaf, keep(*planes))

    with jax.set_mesh(mesh):
        leaf = jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), whole), out_shardings=lies)()
        jitted = jax.jit(put, donate_argnums=0, out_shardings=lies)
        for first in sorted(of_piece):
            leaf = jitted(leaf, first, *piece(first))
    return leaf


def _piece_sizes(param: Param, parts: list[tuple[names.Tensor, names.Part]], size: int, mesh: Mesh | AbstractMesh) -> tuple[int, ...]:
    """What a piece of a leaf of ``size`` bytes has along its first axes: layers, or one layer and some of its experts, :data:`HOST_BYTES`
    together where that is possible. () for a leaf that is no stack."""
    if param.axes[0] != "layer":
        return ()
    layers, experts = param.shape[0], param.shape[1] if param.axes[1] == "expert" else 1
    one_by_one = all(len(part.at) > 1 and isinstance(part.at[1], int) for _, part in parts)
    # Experts that devices share lie in as many pieces already, and a piece must be on all of them.
    if size // layers <= HOST_BYTES or experts == 1 or not one_by_one or parts_over(mesh, ("expert",)) > 1:
        return (min(layers, max(1, HOST_BYTES * layers // max(1, size))),)
    most = max(1, HOST_BYTES * layers * experts // size)
    return 1, next(n for n in range(min(most, experts), 0, -1) if experts % n == 0)


def _held_here(where: Sharding, shape: tuple[int, ...]) -> list[names.Region]:
    """The parts of an array that devices of this host hold."""
    return [part for part in where.addressable_devices_indices_map(shape).values() if part is not None]
