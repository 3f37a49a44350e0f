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
_GPU: dict[str, Any] = {"exchange": 50e-6, "platform": "cuda"}
_HOPPER: dict[str, Any] = {"flops": 989e12, "link": 450e9, "capability": 9.0} | _GPU
CHIPS = {
    "v4": Chip(memory=int(15.25 * _GIB), bandwidth=614e9, flops=137.5e12, link=25e9, per_chip=2),
    "v5e": Chip(memory=int(15.75 * _GIB), bandwidth=819e9, flops=197e12, link=50e9),
    "v5p": Chip(memory=int(95.74 * _GIB), bandwidth=2765e9, flops=459e12, link=100e9),
    "v6e": Chip(memory=int(31.25 * _GIB), bandwidth=1640e9, flops=918e12, link=112e9),
    "tpu7x": Chip(memory=int(94.75 * _GIB), bandwidth=3690e9, flops=1153e12, link=100e9, per_chip=2),
    "h100": Chip(memory=int(79.6 * _GIB), bandwidth=3352e9, **_HOPPER),
    "h200": Chip(memory=int(140.4 * _GIB), bandwidth=4800e9, **_HOPPER),
    "a100": Chip(memory=int(39.0 * _GIB), bandwidth=1555e9, flops=312e12, link=300e9, capability=8.0, **_GPU),
    "l4": Chip(memory=int(21.8 * _GIB), bandwidth=300e9, flops=121e12, link=32e9, capability=8.9, **_GPU),
    # Without units for bfloat16, which is multiplied in float32.
    "t4": Chip(memory=int(14.5 * _GIB), bandwidth=320e9, flops=8.1e12, link=16e9, capability=7.5, **_GPU),
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
    layout = {"topology": f"1x1x{math.prod(sides)}", "target_config": _cuda(topology.partition(":")[0], chip)}
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


def _cuda(name: str, chip: Chip) -> str:
    """What XLA wants to know of a GPU that it cannot ask."""
    (major, minor), m = str(chip.capability).split("."), _MULTIPROCESSORS[chip.capability]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {m.threads}
  core_count: {_COUNTS[name]} fpus_per_core: {m.units}
  shared_memory_per_block: 49152 shared_memory_per_core: {m.shared} shared_memory_per_block_optin: {m.shared_by_one}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: {m.cache} clock_rate_ghz: {m.gigahertz}
  memory_bandwidth: {int(chip.bandwidth)} device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "NVIDIA {name.upper()}"
"""


class _Multiprocessor(NamedTuple):
    """What a multiprocessor has, in bytes; ``shared_by_one`` is what a block may take of ``shared``; ``cache`` is of the whole GPU."""

    threads: int
    units: int
    shared: int
    shared_by_one: int
    cache: int
    gigahertz: float


_MULTIPROCESSORS = {
    7.5: _Multiprocessor(1024, 64, 65536, 65536, 4 << 20, 1.59),
    8.0: _Multiprocessor(2048, 64, 167936, 166912, 40 << 20, 1.41),
    8.9: _Multiprocessor(1536, 128, 102400, 101376, 48 << 20, 2.04),
    9.0: _Multiprocessor(2048, 128, 233472, 232448, 50 << 20, 1.98),
}
_COUNTS = {"h100": 132, "h200": 132, "a100": 108, "l4": 58, "t4": 40}
