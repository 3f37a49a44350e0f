"""What JAX sees on this machine, and which kernels the decode step would use on it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import jax

from diffulex_jax.weights import checkpoint
from pallas_kernels import Kernels, choose


def describe() -> dict[str, Any]:
    """Versions, devices, kernels and optional parts.

    Returns:
      Plain data: ``versions`` (None where a package is not installed), ``platform``, ``devices`` (``memory_gib`` is None where the
      backend does not tell), ``kernels`` (operation -> backend), ``embedded_model`` (is it in this installation?).
    """
    backend = jax.default_backend()
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in ("diffulex-jax", "jax", "jaxlib", "tokamax")},
        "platform": backend,
        "devices": [{"id": d.id, "kind": d.device_kind, "memory_gib": _memory_gib(d)} for d in jax.devices()],
        "kernels": kernels()._asdict(),
        "embedded_model": (checkpoint.EMBEDDED / "config.json").is_file(),
    }


def kernels() -> Kernels:
    """The kernels of this machine's devices."""
    return choose(jax.devices()[0])


def text(facts: dict[str, Any]) -> str:
    """The facts of :func:`describe` for people."""
    lines = [f"{name:>16}  {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines += [f"{'platform':>16}  {facts['platform']}"]
    for device in facts["devices"]:
        memory = "" if device["memory_gib"] is None else f", {device['memory_gib']} GiB"
        lines.append(f"{'device ' + str(device['id']):>16}  {device['kind']}{memory}")
    lines += [f"{name:>16}  {backend}" for name, backend in facts["kernels"].items()]
    return "\n".join([*lines, f"{'embedded model':>16}  {'installed' if facts['embedded_model'] else 'missing'}"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib(device: jax.Device) -> float | None:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else round(limit / 2**30, 1)
