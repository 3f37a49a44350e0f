"""The one table from logical axes to mesh axes, and programs that run on every device of a mesh.

A single device is the 1 x 1 x 1 mesh; nothing else counts devices. Kernels cannot be partitioned by XLA, so a program for several
devices is written for one of them (:func:`spread`): it works on its own slots and pages, heads, experts and part of the vocabulary,
and exchanges what :func:`shared_by` says is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from diffulex_jax.errors import SettingError


MESH_AXES = ("data", "expert", "tensor")

# Logical axis of a parameter, pool or state array -> mesh axes (None: replicated). Slots and the pages they use are on the same
# devices. Whatever can be is split over all devices that share a slot: each reads as little as possible in a step.
LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "slot": "data",
    "page": "data",
    "expert": ("expert", "tensor"),
    "vocab": ("expert", "tensor"),
    "mlp": ("expert", "tensor"),
    "kv_heads": "tensor",
    "block": None,
    "token": None,
    "embed": None,
    "head_dim": None,
    "layer": None,
}


def make_mesh(devices: Sequence[jax.Device] | None = None, *, data: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """A ``data x expert x tensor`` mesh over the first devices (default: those of the default backend).

    Raises:
      ValueError: when fewer devices exist than the axes need.
    """
    devices = jax.devices() if devices is None else devices
    need = data * expert * tensor
    if need > len(devices):
        raise ValueError(f"a {data}x{expert}x{tensor} mesh needs {need} devices; there are {len(devices)}")
    return Mesh(np.array(devices[:need]).reshape(data, expert, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_of(mesh: Mesh | str | None) -> Mesh:
    """The mesh of an engine: one as it is, or as a text says, ``"data=2,expert=2"``; None is the first device.

    Raises:
      SettingError: for a text that is not such a list, other axes, or more devices than exist.
    """
    try:
        made = mesh if isinstance(mesh, Mesh) else make_mesh(None, **({} if mesh is None else sizes_of(mesh)))
    except ValueError as error:
        raise SettingError("mesh", f"mesh={mesh!r}: {error}") from None
    if made.axis_names != MESH_AXES:
        raise SettingError("mesh", f"an engine takes a mesh of axes {MESH_AXES}; got {dict(made.shape)}")
    if len({device.process_index for device in made.devices.flat}) < jax.process_count():
        raise SettingError("mesh", f"mesh={mesh!r} must hold devices of all {jax.process_count()} hosts; there are {jax.device_count()}")
    return made


def sizes_of(text: str) -> dict[str, int]:
    """The axes that a text names, ``"expert=2,tensor=2"``, and the devices of each.

    Raises:
      ValueError: for a text that is not such a list, or another axis.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in MESH_AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"{part.strip()!r} is not AXIS=DEVICES with an axis of {', '.join(MESH_AXES)}, as in expert=2,tensor=2")
        if axis in sizes:
            raise ValueError(f"{axis} stands there twice")
        sizes[axis] = int(size)
    return sizes


def spec(*axes: str | None) -> PartitionSpec:
    """How an array whose dimensions carry the logical names ``axes`` (None: unnamed, replicated) is split."""
    return PartitionSpec(*(None if axis is None else LOGICAL_AXES[axis] for axis in axes))


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """The placement on ``mesh`` of an array whose dimensions carry the logical names ``axes``."""
    return NamedSharding(mesh, spec(*axes))


def abstract_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh of :func:`make_mesh` without its devices: what is split, and over how many."""
    return AbstractMesh((data, expert, tensor), MESH_AXES)


ONE_DEVICE = abstract_mesh()


def parts(mesh: Mesh | AbstractMesh, axes: Sequence[str | None]) -> int:
    """In how many parts an array is split whose dimensions carry the logical names ``axes``."""
    names = [name for split in spec(*axes) if split for name in ((split,) if isinstance(split, str) else split)]
    return math.prod(mesh.shape[name] for name in names)


def check_split(mesh: Mesh | AbstractMesh, shape: Sequence[int], axes: Sequence[str | None], name: str) -> None:
    """Checks that every device of ``mesh`` gets an equal part of an array.

    Raises:
      ValueError: naming the array ``name``, its axis and its size, the devices that do not divide it, and how many would.
    """
    for size, axis, names in zip(shape, axes, spec(*axes), strict=True):
        names = (names,) if isinstance(names, str) else names or ()
        devices = math.prod(mesh.shape[n] for n in names)
        if size % devices:
            fitting = [n for n in range(1, size + 1) if size % n == 0]
            nearest = [max(n for n in fitting if n < devices), *[n for n in fitting if n > devices][:1]]
            raise ValueError(
                f"{name}: {axis}={size} cannot be split over {devices} devices (mesh axes {', '.join(names)}); "
                f"it can over {' or '.join(map(str, nearest))}"
            )


def spread(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``function`` of whole arrays, run on every device of the current mesh with its parts; itself where there is one device.

    Args:
      function: what one device does. It takes positional arguments.
      in_specs, out_specs: how arguments and results are split (:func:`spec`), prefixes of their trees. What a result is not split over,
        all devices must agree on.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def run(*args: Any) -> Any:
        arrays, tree = jax.tree.flatten(args)
        specs = jax.tree.leaves(jax.tree.broadcast(in_specs, args))

        def local(*parts: jax.Array) -> Any:
            given = iter(parts)
            all_parts = [next(given) if a.size else empty(a, split) for a, split in zip(arrays, specs, strict=True)]
            return function(*jax.tree.unflatten(tree, all_parts))

        def empty(a: jax.Array, split: PartitionSpec) -> jax.Array:
            return jnp.zeros(NamedSharding(mesh, split).shard_shape(a.shape), a.dtype)

        # XLA for GPUs (JAX 0.11.2) crashes where an array without elements goes into the part of a program that is one device's, and out.
        split = tuple(s for a, s in zip(arrays, specs, strict=True) if a.size)
        parts = jax.shard_map(local, in_specs=split, out_specs=out_specs, check_vma=False)
        return parts(*(a for a in arrays if a.size))

    return run


def shared_by(axis: str) -> tuple[str, ...]:
    """The mesh axes over which the devices that run a :func:`spread` function share a logical axis; () where one device has all of it."""
    mesh, names = jax.sharding.get_abstract_mesh(), LOGICAL_AXES[axis]
    names = (names,) if isinstance(names, str) else names or ()
    return tuple(name for name in names if name in mesh.manual_axes and mesh.shape[name] > 1)


def first_index(axis: str, count: int) -> jax.Array | int:
    """The first index along a shared logical axis that this device holds ``count`` of."""
    names = shared_by(axis)
    return lax.axis_index(names) * count if names else 0


def add_up(x: jax.Array, axis: str) -> jax.Array:
    """The sum of ``x`` over the devices that share a logical axis."""
    names = shared_by(axis)
    return lax.psum(x, names) if names else x
