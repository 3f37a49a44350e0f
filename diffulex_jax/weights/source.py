"""The tensors of a model's directory by their names, found to be what the model needs, quantised ones among them, read part by part."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffulex_jax.models import names
from diffulex_jax.models.base import Model
from diffulex_jax.models.hf_config import readable
from diffulex_jax.weights import formats
from diffulex_jax.weights.folder import open_tensors, read_float8, read_json, tensors_in
from pallas_kernels.quantised import Form


READABLE = ("F64", "F32", "F16", "BF16")
Read = Callable[[str, names.Region], np.ndarray]
"""``read(name, region)``: that part of a tensor; all of it where the region is empty."""


class Source(NamedTuple):
    """The tensors of a directory, by their names in it.

    Attributes:
      read: a tensor; a quantised one made plain.
      matrix: a quantised one as it is.
      groups: in how many groups the scales of each row of one of a form are; None where it is not of that form, or has not one scale or
        more a row.
    """

    read: Read
    matrix: Callable[[str], formats.Matrix]
    groups: Callable[[str, Form], int | None]


def open_source(path: pathlib.Path, model: Model, *, host_bytes: int) -> Source:
    """The tensors of a directory, once all of them were found to be what the model needs.

    Args:
      path: the directory.
      model: what needs them.
      host_bytes: so much of mapped files stays with the process at the most.

    Raises:
      ValueError: naming what is wrong.
    """
    files, opened = tensors_in(path)
    expected = {tensor.name: tensor.shape for tensor in model.tensors}
    files = {name: file for name, file in files.items() if name not in model.unread}
    scheme = formats.scheme_of(read_json(path / "config.json"))
    parts = {name: found for name in expected if scheme is not None and (found := formats.matrix_names(name, files))}
    kinds = {name: {part: _kind(opened[files[at]], at) for part, at in found.items()} for name, found in parts.items()}
    odd = [wrong for name, kind in kinds.items() if scheme and (wrong := formats.problem(name, expected[name], kind, scheme))]
    inside = {at for found in parts.values() for at in found.values()}
    read_file = _in_little_memory(files, opened, host_bytes)

    def matrix(name: str) -> formats.Matrix:
        assert scheme is not None
        return formats.matrix(
            name, expected[name], {part: read_file(at, ()) for part, at in parts[name].items() if part not in _UNREAD}, scheme
        )

    def read(name: str, region: names.Region) -> np.ndarray:
        return formats.plain(matrix(name))[region] if name in parts else read_file(name, region)

    def groups(name: str, form: Form) -> int | None:
        if name not in parts or scheme is None:
            return None
        same = formats.form_of(expected[name], kinds[name], scheme) == form
        return formats.groups_of(expected[name], kinds[name], scheme) if same else None

    files = {name: file for name, file in files.items() if name not in inside}
    expected_plain = {name: shape for name, shape in expected.items() if name not in parts}
    _check_tensors(path, files, opened, expected_plain, odd)
    return Source(read, matrix, groups)


_UNREAD = ("weight_shape", "input_scale")  # what the shape of the others says, and of activations, which stay as they are


def _kind(opened: Any, name: str) -> tuple[str, tuple[int, ...]]:
    found = opened.get_slice(name)
    return found.get_dtype(), tuple(found.get_shape())


def _check_tensors(
    path: pathlib.Path,
    files: Mapping[str, pathlib.Path],
    opened: Mapping[pathlib.Path, Any],
    expected: Mapping[str, tuple[int, ...]],
    problems: list[str],
) -> None:
    """Checks that plain tensors are what a model needs; ``problems`` are those of the others.

    Raises:
      ValueError: naming what is wrong.
    """
    there = [name for name in expected if name in files]
    slices = {name: opened[files[name]].get_slice(name) for name in there}
    problems = problems + [
        f"{name} in {files[name].name} is stored as {stored.get_dtype()}; only {', '.join(READABLE)} are read"
        for name, stored in slices.items()
        if stored.get_dtype() not in READABLE
    ]
    problems += [f"missing {name}" for name in sorted(expected.keys() - files)]
    problems += [f"unexpected {readable(name)} in {files[name].name}" for name in sorted(files.keys() - expected)]
    problems += [
        f"{name} in {files[name].name} has shape {tuple(stored.get_shape())}, expected {expected[name]}"
        for name, stored in slices.items()
        if tuple(stored.get_shape()) != expected[name]
    ]
    if problems:
        raise ValueError(f"{path}: {_few(problems)}{_renamed(expected.keys() - files, files.keys() - expected)}")


def _in_little_memory(files: dict[str, pathlib.Path], opened: dict[pathlib.Path, Any], host_bytes: int) -> Read:
    """What reads a part of a tensor from the file that holds it. What was read of a mapped file stays with the process as long as it is
    open, so files are opened anew whenever that is more than ``host_bytes``."""
    read_of: collections.Counter[pathlib.Path] = collections.Counter()

    def read(name: str, region: names.Region) -> np.ndarray:
        if read_of.total() > host_bytes:
            opened.update({file: open_tensors(file) for file in read_of})
            read_of.clear()
        stored = opened[files[name]].get_slice(name)
        region = region or (slice(None),) * len(stored.get_shape())
        tensor: np.ndarray = read_float8(files[name], name)[region] if stored.get_dtype() == "F8_E4M3" else stored[region]
        read_of[files[name]] += tensor.nbytes
        return tensor

    return read


def _renamed(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """What to do where all names lack a prefix, or have one too many."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if not missing or len(missing) != len(unexpected):
        return ""
    for more, less, remedy in ((unexpected, missing, "without"), (missing, unexpected, "with")):
        prefix = more[0].removesuffix(less[0])
        if prefix and [prefix + name for name in less] == more:
            return f"; the names differ by a prefix: save the weights {remedy} {readable(prefix)!r} before these names"
    return ""


def _few(problems: list[str], most: int = 8) -> str:
    return "; ".join(problems[:most]) + (f"; and {len(problems) - most} more" if len(problems) > most else "")
