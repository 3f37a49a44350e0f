"""LoRA adapters beside the matrices that they adapt, as ``models.adapted.Factors``: several, for a batch each of whose rows has its own, or
one that is trained."""

from __future__ import annotations

import collections
import functools
import hashlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffulex_jax.errors import SettingError
from diffulex_jax.models.adapted import Adapted, Factors, with_axes
from diffulex_jax.models.base import Model, Param, Params, leaves
from diffulex_jax.models.names import Part, Path, spelt_out
from diffulex_jax.parallel.mesh import sharding
from diffulex_jax.weights import adapters
from diffulex_jax.weights.adapters import Lora, Site
from pallas_kernels.quantised.matrices import Matrices


Loaded = list[tuple[Lora, adapters.Adapters]]
"""Of each adapter what is adapted, and the matrices."""


def load(folders: Mapping[str, str], model: Model) -> Loaded:
    """Reads adapters in PEFT's files, by their names and directories, in order.

    Raises:
      SettingError: naming the adapter, and what ``adapters.load`` says, or the leaf that no row can adapt by itself.
    """
    schema, each = leaves(model.schema), Loaded()
    for name, folder in folders.items():
        try:
            lora, trained = adapters.load(folder, model)
            for site in adapters.sites(model, lora):
                if not schema[site.tensors[0].parts[0].leaf].adaptable:
                    can = "only attention and dense or shared MLPs can be, unless it is merged (adapter=)"
                    raise ValueError(f"{folder} adapts {site.name}, which cannot be adapted row by row; {can}")
                if not all(np.isfinite(matrix).all() for matrix in trained[site.name].values()):
                    raise ValueError(f"{folder} holds numbers for {site.name} that are not finite")
        except ValueError as error:
            raise SettingError("adapters", f"adapters: {name!r}: {error}") from error
        each.append((lora, trained))
    return each


def digests(folders: Mapping[str, str]) -> dict[str, str]:
    """What tells an adapter from others of the same name: its name, and a digest of its files."""

    def one(folder: str) -> str:
        files = (pathlib.Path(folder) / name for name in (adapters.CONFIG, adapters.WEIGHTS))
        return hashlib.blake2b(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files), digest_size=8).hexdigest()

    return {name: f"{name}#{one(folder)}" for name, folder in folders.items()}


def placed(model: Model, each: Loaded, *, dtype: Any, mesh: Mesh) -> dict[str, Any]:
    """The tree at ``adapted.ADAPTERS``: of ``dtype``, each factor split over ``mesh`` as the leaf that it adapts."""

    def put(factors: Factors, axes: Factors) -> Factors:
        return Factors(*(_on_mesh(a.astype(dtype), sharding(mesh, own)) for a, own in zip(factors, axes, strict=True)))

    return with_axes(put, model.schema, stacked(model, each))


def stacked(model: Model, each: Loaded) -> dict[str, Any]:
    """The same on the host, float32. Ranks are those of the widest adapter; matrices that share a leaf have columns of their own."""
    schema, rank = leaves(model.schema), max(lora.rank for lora, _ in each)
    places: dict[Path, list[str]] = collections.defaultdict(list)  # of a leaf the sites that some adapter changes
    for site, *_ in _changed(model, each):
        here = places[site.tensors[0].parts[0].leaf]
        here += [site.name] * (site.name not in here)
    flat: dict[Path, Factors] = {}
    for site, n, lora, trained in _changed(model, each):
        path = site.tensors[0].parts[0].leaf
        if path not in flat:
            flat[path] = _zeros(schema[path], site.tensors[0].parts[0], len(each), rank * len(places[path]))
        first = rank * places[path].index(site.name)
        for tensor, a, b in zip(site.tensors, trained["a"], trained["b"], strict=True):
            _put(flat[path], tensor.parts, (n, slice(first, first + lora.rank)), (np.asarray(a), lora.alpha / lora.rank * np.asarray(b)))
    tree: dict[str, Any] = {}
    for path, factors in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = factors
    return tree


def beside(model: Model, lora: Lora, params: Params, trained: adapters.Adapters) -> Params:
    """``adapters.merge``, but for quantised matrices of layers: these have their products beside them, for all rows.

    Raises:
      SettingError: for a target whose leaf is quantised, and no such matrices.
    """
    schema, flat = leaves(model.schema), leaves(params)
    quantised = [path for path, leaf in flat.items() if isinstance(leaf, Matrices)]
    found: dict[Path, list[Factors]] = collections.defaultdict(list)
    for site in adapters.sites(model, lora):
        if (path := site.tensors[0].parts[0].leaf) in quantised:
            found[path].append(_factors(schema[path], site, trained[site.name], lora.alpha / lora.rank))
    tree = adapters.merge(model, lora, params, trained, but=quantised)
    for path, factors in found.items():
        a, b = zip(*factors, strict=True)
        every = Adapted(flat[path], Factors(jnp.concatenate(a, -1), jnp.concatenate(b, 2)), jnp.ones(1, jnp.int32))
        functools.reduce(lambda node, name: node[name], path[:-1], tree)[path[-1]] = every
    return tree


def _factors(param: Param, site: Site, pair: dict[str, jax.Array], scale: float) -> Factors:
    """The factors of one site, which has a matrix in every layer of its leaf: what :func:`_put` writes, for one adapter."""
    layers, *rest = param.shape
    assert len(site.tensors) == layers
    b = jnp.zeros((layers, pair["b"].shape[-1], *rest[param.quantisable :]))
    for part in site.tensors[0].parts:
        axes = _Axes.of(part)
        into_a, into_b = f"n r {axes.columns} -> n {' '.join(axes.inputs)} r", f"n {axes.rows} r -> n r {' '.join(axes.outputs)}"
        inputs = einops.rearrange(pair["a"], into_a, **_known(part, into_a))
        _, *at = spelt_out(part.at, len(param.shape))
        rows = einops.rearrange(scale * pair["b"][:, part.rows], into_b, **_known(part, into_b))
        b = b.at[(slice(None), slice(None), *at[param.quantisable :])].set(rows)
    return Factors(inputs[..., None, :], b[:, None])


def _changed(model: Model, each: Loaded) -> Iterator[tuple[Site, int, Lora, dict[str, Any]]]:
    """Of each adapter, by its number, the sites that it changes."""
    for n, (lora, trained) in enumerate(each):
        for site in adapters.sites(model, lora):
            if np.any(trained[site.name]["b"]):
                yield site, n, lora, trained[site.name]


def _zeros(param: Param, part: Part, count: int, rank: int) -> Factors:
    layers, *rest = param.shape
    contracted = len(_Axes.of(part).inputs)
    a, b = (layers, *rest[:contracted], count, rank), (layers, count, rank, *rest[contracted:])
    return Factors(np.zeros(a, np.float32), np.zeros(b, np.float32))


def _put(factors: Factors, parts: Sequence[Part], where: tuple[int, slice], matrices: tuple[np.ndarray, np.ndarray]) -> None:
    """Writes ``A [rank, in]`` and ``B [out, rank]`` of a tensor to adapter and columns ``where`` of its layer."""
    (n, columns), (a, b) = where, matrices
    for part in parts:
        axes = _Axes.of(part)
        layer, *at = spelt_out(part.at, factors.a.ndim + factors.b.ndim - 5)
        into_a, into_b = f"r {axes.columns} -> {' '.join(axes.inputs)} r", f"{axes.rows} r -> r {' '.join(axes.outputs)}"
        factors.a[layer][..., n, columns] = einops.rearrange(a, into_a, **_known(part, into_a))
        factors.b[layer][(n, columns, *at[len(axes.inputs) :])] = einops.rearrange(b[part.rows], into_b, **_known(part, into_b))


class _Axes(NamedTuple):
    """A part's ``"(kv g h) d -> d kv g h"``, of a tensor ``[out, in]``: its first and second axis there, and what they are in the leaf."""

    rows: str
    columns: str
    inputs: list[str]
    outputs: list[str]

    @classmethod
    def of(cls, part: Part) -> _Axes:
        source, target = part.pattern.split(" -> ")
        rows, columns = re.findall(r"\([^)]*\)|\w+", source)
        inputs, names = re.findall(r"\w+", columns), target.split()
        assert names[: len(inputs)] == inputs, "a leaf that is adaptable has the axes that products contract first"
        return cls(rows, columns, inputs, names[len(inputs) :])


def _known(part: Part, pattern: str) -> dict[str, int]:
    return {name: size for name, size in part.sizes.items() if re.search(rf"\b{name}\b", pattern)}


def _on_mesh(host: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])
