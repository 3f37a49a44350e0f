"""The one table from logical axes to mesh axes. A single device is the 1 x 1 x 1 mesh; nothing else counts devices."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


MESH_AXES = ("data", "expert", "tensor")

# Logical axis of a parameter, pool or state array -> mesh axes (None: replicated). Slots and the pages they use are on the same
# devices. Whatever can be is split over all devices that share a slot: each reads as little as possible in a step.
LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "slot": "data",
    "page": "data",
    "expert": ("expert", "tensor"),
    "vocab": ("expert", "tensor"),
    "kv_heads": "tensor",
    "mlp": "tensor",
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


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """The placement of an array whose dimensions carry the logical names ``axes`` (None: unnamed, replicated)."""
    return NamedSharding(mesh, PartitionSpec(*(None if axis is None else LOGICAL_AXES[axis] for axis in axes)))


def platform(mesh: Mesh) -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: what kernels are chosen by."""
    return mesh.devices.flat[0].platform
