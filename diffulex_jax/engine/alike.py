"""What all hosts of an engine must have alike, or each would compute a part of something else; compared before anything is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Sequence

import jax
from jax.sharding import Mesh

from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.fingerprint import strategy_id
from diffulex_jax.parallel import hosts
from diffulex_jax.strategies import Strategy
from diffulex_jax.version import __version__
from diffulex_jax.weights.placed import ARRAYS


_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a file


def check(settings: EngineConfig, strategies: Sequence[Strategy], mesh: Mesh, *, path: pathlib.Path | None = None) -> None:
    """Compares versions, settings, strategies, the mesh and the model's files, if it is read from any, with those of the other hosts.

    The files may lie elsewhere on each. All hosts call this; of one alone it asks nothing.

    Raises:
      ValueError: on all of them, naming what differs.
    """
    if not hosts.several():
        return
    facts = {"the version of diffulex-jax": __version__, "the version of JAX": jax.__version__}
    facts |= {field.name: str(getattr(settings, field.name)) for field in dataclasses.fields(settings) if field.name != "adapter"}
    facts |= {"mesh": ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())}
    facts |= {"strategy": ", ".join(map(strategy_id, strategies))}
    folders = {"the digest of the model's files": path, "the digest of the adapter's files": settings.adapter}
    facts |= {name: "none" if folder is None else digest(pathlib.Path(folder)) for name, folder in folders.items()}
    hosts.agree(facts)


def digest(folder: pathlib.Path) -> str:
    """A digest of the files of a model or an adapter, the same wherever they lie: of their names and sizes, of all that is in small ones,
    and of 64 pieces of each large one, since a model may have hundreds of gigabytes."""
    found = hashlib.blake2b(digest_size=8)
    for file in _files(folder):
        size = file.stat().st_size
        found.update(f"{file.relative_to(folder)} {size}\0".encode())
        with open(file, "rb") as raw:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                found.update(raw.read())
                continue
            for i in range(_SAMPLES):
                raw.seek(i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                found.update(raw.read(_SAMPLE_BYTES))
    return found.hexdigest()


def _files(folder: pathlib.Path) -> Iterable[pathlib.Path]:
    """What decides what an engine computes, and not what else people keep in such a directory."""
    patterns = ("*.json", "*.safetensors", f"{ARRAYS}/**/*")
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
