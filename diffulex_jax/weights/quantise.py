"""Parameters whose schema lets them be quantised, in the form that the machine's kernels read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import Model, ModelSpec, Param, Params, leaves
from diffulex_jax.parallel.mesh import sharding
from pallas_kernels import REFERENCE, Kernels, grouped_matmul
from pallas_kernels.quantised import Form, Quantised


Store = Callable[[jax.Array], Any]
"""What becomes of a leaf, or of some of its layers, before it is kept: an array, or a tree of arrays."""


def check(spec: ModelSpec, weights: str | None) -> None:
    """Checks that a model has something to quantise.

    Raises:
      SettingError: where it has not.
    """
    if weights is not None and not spec.experts_per_token:
        raise SettingError("weights", f"weights={weights!r} is for models with experts, and this one has none; leave it out")


def store(param: Param, weights: Form | None, *, kernels: Kernels, dtype: Any) -> Store | None:
    """How a leaf is kept: quantised where ``weights`` names a form and its schema lets it be, else None, as it is.

    Entry after entry of the first axis is quantised: what is put into another order takes several times its room while that is done.
    """
    if weights is None or not param.quantisable:
        return None
    one = functools.partial(grouped_matmul.stored, form=weights, backend=kernels.grouped_matmul, dtype=dtype)
    return functools.partial(lax.map, one)


def keep(form: Form, *, kernels: Kernels, dtype: Any) -> Callable[[jax.Array, jax.Array], Any]:
    """How values and scales that were quantised elsewhere, ``[L, ...]`` each, are kept: entry after entry, as :func:`store` does."""

    def one(planes: tuple[jax.Array, jax.Array]) -> Any:
        return grouped_matmul.arranged(Quantised(*planes, form), backend=kernels.grouped_matmul, dtype=dtype)

    return lambda values, scales: lax.map(one, (values, scales))


def stored_bytes(param: Param, weights: Form | None, itemsize: int) -> int:
    """What a leaf takes of a device's memory, its elements ``itemsize`` each, unless it has a dtype of its own or is quantised."""
    keep = store(param, weights, kernels=REFERENCE, dtype=jnp.bfloat16)
    if keep is None:
        return math.prod(param.shape) * (jnp.dtype(param.dtype).itemsize if param.dtype else itemsize)
    return int(jax.eval_shape(keep, jax.ShapeDtypeStruct(param.shape, jnp.bfloat16)).nbytes)


def quantised(model: Model, params: Params, weights: Form | None, *, kernels: Kernels, mesh: Mesh) -> Params:
    """``params`` with ``weights`` quantised, on ``mesh``; those that are already stay as they are.

    Raises:
      SettingError: where they are quantised in another form.
    """
    if weights is None or (found := form_of(params)) == weights:
        return params
    if found is not None:
        raise SettingError("weights", f"weights={weights!r}, but the parameters are quantised already, as {found!r}")
    tree: Params = {}
    given, dtype = leaves(params), params["embed"].dtype
    for path, param in leaves(model.schema).items():
        node = functools.reduce(lambda node, name: node.setdefault(name, {}), path[:-1], tree)
        keep = store(param, weights, kernels=kernels, dtype=dtype)
        with jax.set_mesh(mesh):
            kept = given[path] if keep is None else jax.jit(keep, out_shardings=sharding(mesh, param.axes))(jnp.asarray(given[path]))
        node[path[-1]] = kept
    return tree


def form_of(params: Params) -> str | None:
    """The form in which the parameters are quantised; None where they are not."""
    forms = {leaf.form for leaf in leaves(params).values() if grouped_matmul.is_quantised(leaf)}
    return min(forms, default=None)
