"""What machine a program is compiled for, and so which backend an operation uses on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Target(NamedTuple):
    """A kind of device.

    Attributes:
      platform: JAX's name: ``"cpu"``, ``"gpu"``, ``"tpu"``.
      capability: CUDA compute capability (9.0 is Hopper); 0 where there is none or it is not known.
      kind: JAX's name of a TPU: ``"TPU v5 lite"``.
    """

    platform: str
    capability: float = 0.0
    kind: str = ""


def target_of(device: jax.Device) -> Target:
    """The kind of ``device``."""
    if device.platform == "gpu":
        return Target("gpu", float(getattr(device, "compute_capability", None) or 0))
    return Target(device.platform, kind=device.device_kind if device.platform == "tpu" else "")


def is_hopper(target: Target) -> bool:
    """Whether kernels written for Hopper's tensor cores run on ``target``, and this JAX compiles them."""
    return target.platform == "gpu" and 9 <= target.capability < 10 and jax.__version_info__ >= (0, 11)


def multiplies(target: Target) -> str | None:
    """The dtype of weights that XLA's grouped matmul multiplies bfloat16 with as they are: it would widen all others first."""
    return _MULTIPLIES.get(target.kind) if target.platform == "tpu" else None


_MULTIPLIES = {"TPU v5 lite": "int8", "TPU v6 lite": "int8", "TPU7x": "float8_e4m3fn"}


def unwanted_passes(target: Target, dtype: Any) -> str:
    """Passes of XLA, separated by commas, that make a program of layers in ``dtype`` worse on ``target``.

    XLA for CPUs widens bfloat16 to float32 before it multiplies. It would do so for whole stacks of layers ahead of the loop over them,
    and hold every weight once more in twice the size, unless told to leave that where it is, in which a step is faster too.

    XLA for GPUs computes once more, wherever it is read, what it would otherwise keep, if all that a program holds exceeds 80 percent of
    the memory. Parameters and a large pool alone do, and then there is no end to it: each turn of the loop over layers copies its slices of
    the stacks up to eight times, and its temporaries take as much as before.
    """
    if target.platform == "cpu" and dtype == jnp.bfloat16:
        return "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
    return "rematerialization" if target.platform == "gpu" else ""


def current_target() -> Target:
    """The kind of the current mesh's devices, else of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    default = jax.devices()[0]
    if device is None or device.platform == default.platform:
        return target_of(default)
    return Target(device.platform, kind=device.device_kind if device.platform == "tpu" else "")


def pick(operation: str, backend: str | None, choose: Callable[[Target], str], backends: Mapping[str, Any]) -> Any:
    """The entry of ``backends`` called ``backend``; None chooses by the current target.

    Raises:
      ValueError: for a name that is not in ``backends``.
    """
    name = choose(current_target()) if backend is None else backend
    if name not in backends:
        raise ValueError(f"unknown {operation} backend {name!r}; valid: {', '.join(backends)}")
    return backends[name]


def anywhere(flag: jax.Array) -> jax.Array:
    """Whether ``flag`` (bool, any shape) holds on some device of those that run this code in one ``jax.shard_map``; else ``flag``.

    For the condition of a branch that holds exchanges: all devices must take the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in mesh.manual_axes if mesh.shape[name] > 1)
    return lax.psum(flag.astype("int32"), axes) > 0 if axes else flag
