"""The machines a plan may be for: what a device of each can do, and slices of them whose compiler is here and whose devices need not be."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from jax.experimental import topologies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of device, as JAX shows it, in bytes, seconds and their like.

    Attributes:
      memory: what programs may use of its memory: on a TPU what its compiler names where a program exceeds it.
      bandwidth: of its memory, by the data sheet.
      flops: operations a second on bfloat16 matrices, by the data sheet.
      link: bytes a second that leave it by one link of its interconnect, in one direction.
      exchange: seconds that an exchange takes beside those of its bytes.
      platform: whose compiler it takes; a key of ``_COMPILERS``.
      capability: CUDA's compute capability.
      per_chip: how many of them JAX shows for a chip.
    """

    memory: int
    bandwidth: float
    flops: float
    link: float
    exchange: float = 10e-6
    platform: str = "tpu"
    capability: float = 0.0
    per_chip: int = 1


_GIB = 2**30
# An exchange on a GPU takes what it added to a step of LLaDA2-mini between two H200s (diffulex_jax/parallel/README.md), waiting included.
# On TPUs none was measured.
_GPU: dict[str, Any] = {"flops": 989e12, "link": 450e9, "exchange": 50e-6, "platform": "cuda", "capability": 9.0}
CHIPS = {
    "v4": Chip(memory=int(15.25 * _GIB), bandwidth=614e9, flops=137.5e12, link=25e9, per_chip=2),
    "v5e": Chip(memory=int(15.75 * _GIB), bandwidth=819e9, flops=197e12, link=50e9),
    "v5p": Chip(memory=int(95.74 * _GIB), bandwidth=2765e9, flops=459e12, link=100e9),
    "v6e": Chip(memory=int(31.25 * _GIB), bandwidth=1640e9, flops=918e12, link=112e9),
    "tpu7x": Chip(memory=int(94.75 * _GIB), bandwidth=3690e9, flops=1153e12, link=100e9, per_chip=2),
    "h100": Chip(memory=int(79.6 * _GIB), bandwidth=3352e9, **_GPU),
    "h200": Chip(memory=int(140.4 * _GIB), bandwidth=4800e9, **_GPU),
}
"""By the name that a topology begins with."""


class Slice(NamedTuple):
    """Devices that need not exist.

    Attributes:
      topology: as it was asked for: ``"v5e:4x4"``, ``"h100:2"``.
      chip: what each device can do.
      size: how many devices there are.
      devices: as its compiler sees them; None where that is not installed.
      lacks: what would have to be installed; "" where nothing does.
    """

    topology: str
    chip: Chip
    size: int
    devices: list[Any] | None
    lacks: str


def slice_of(topology: str) -> Slice:
    """The devices of ``topology``: chips in each direction of a TPU slice, ``"v5e:4x4"``, ``"v5p:4x4x4"``; GPUs of one host, ``"h100:2"``.

    Raises:
      ValueError: for a kind that is not in ``CHIPS``, and for a topology that its compiler does not know.
    """
    name, _, layout = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", layout):
        raise ValueError(
            f"topology {topology!r} is not one of {', '.join(CHIPS)}, a colon and a layout, as in v5e:4x4, v5p:4x4x4 or h100:2"
        )
    chip, sides = CHIPS[name], [int(side) for side in layout.split("x")]
    module, extra, open_topology = _COMPILERS[chip.platform]
    size = math.prod(sides) * chip.per_chip
    if importlib.util.find_spec(module) is None:
        return Slice(topology, chip, size, None, extra)
    try:
        devices = open_topology(topology, chip, sides)
    except Exception as error:  # the compilers' own
        raise ValueError(f"topology {topology!r}: {error}") from error
    assert len(devices) == size, (topology, len(devices), size)
    return Slice(topology, chip, size, devices, "")


def _tpu_devices(topology: str, chip: Chip, sides: list[int]) -> list[Any]:
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # libtpu takes hosts to have four chips; the smallest slices are a part of one.
    host: dict[str, Any] = {"chips_per_host_bounds": (*sides, 1, 1)[:3]} if math.prod(sides) < 4 else {}
    return list(topologies.get_topology_desc(platform=chip.platform, topology_name=topology, **host).devices)


def _gpu_devices(topology: str, chip: Chip, sides: list[int]) -> list[Any]:
    layout = {"topology": f"1x1x{math.prod(sides)}", "target_config": _hopper(topology.partition(":")[0].upper(), chip)}
    return list(topologies.get_topology_desc(platform=chip.platform, topology_name=topology, **layout).devices)


# Platform -> the module of its compiler, the extra that has it, and what opens a topology.
_COMPILERS = {
    "tpu": ("libtpu", "diffulex-jax[tpu]", _tpu_devices),
    "cuda": ("jax_cuda13_plugin", "diffulex-jax[cuda]", _gpu_devices),
}

# libtpu looks for a TPU and its cloud unless told what it would find; and for itself, already loaded by another process.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _hopper(name: str, chip: Chip) -> str:
    """What XLA wants to know of a Hopper GPU that it cannot ask."""
    major, minor = str(chip.capability).split(".")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  memory_bandwidth: {int(chip.bandwidth)} device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "NVIDIA {name}"
"""
