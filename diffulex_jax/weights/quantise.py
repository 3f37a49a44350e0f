"""Parameters whose schema lets them be quantised, in the form that the machine's kernels read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import Model, Param, Params, leaves
from diffulex_jax.parallel.mesh import ONE_DEVICE, parts, spec
from pallas_kernels import REFERENCE, Kernels, grouped_matmul, linear
from pallas_kernels.quantised import Form, Quantised
from pallas_kernels.quantised.matrices import Matrices, is_quantised


Store = Callable[[jax.Array], Any]
"""What becomes of a leaf, or of some of its layers, before it is kept: an array, or a tree of arrays."""


def store(param: Param, weights: Form | None, *, kernels: Kernels, dtype: Any, mesh: Mesh | AbstractMesh) -> Store | None:
    """How a leaf is kept: quantised where ``weights`` names a form and its schema lets it be, else None, as it is.

    Entry after entry of the first axis is quantised: what is put into another order takes several times its room while that is done.
    """
    if weights is None or not param.quantisable:
        return None
    if "expert" in param.axes:
        one = functools.partial(grouped_matmul.stored, form=weights, backend=kernels.grouped_matmul, dtype=dtype)
        return functools.partial(lax.map, one)
    return functools.partial(linear.stored, form=weights, **_how(param, kernels, dtype, mesh))


def keep(
    param: Param, form: Form, *, groups: int, kernels: Kernels, dtype: Any, mesh: Mesh | AbstractMesh
) -> Callable[[jax.Array, jax.Array], Any]:
    """How values and scales that were quantised elsewhere are kept, as :func:`store` does: both ``[L, ...]`` as the leaf, but for experts,
    whose scales have ``groups`` in the place of rows."""
    if "expert" not in param.axes:
        return functools.partial(linear.arranged, form=form, groups=groups, **_how(param, kernels, dtype, mesh))

    def one(planes: tuple[jax.Array, jax.Array]) -> Any:
        return grouped_matmul.arranged(Quantised(*planes, form), backend=kernels.grouped_matmul, dtype=dtype)

    return lambda values, scales: lax.map(one, (values, scales))


def specs(param: Param, kept: Any) -> Any:
    """How each array of a leaf, as it is kept, is split over devices."""
    if not isinstance(kept, Matrices):
        return jax.tree.map(lambda _: spec(*param.axes), kept)
    rows, columns = _axes(param)
    named = kept.axes(rows[0], columns)
    return jax.tree.map(lambda axes: spec(*axes), named, is_leaf=lambda node: isinstance(node, tuple))


def placement(mesh: Mesh | AbstractMesh, param: Param, kept: Any) -> Any:
    """Where each array of a leaf, as it is kept, lies on ``mesh``.

    Raises:
      SettingError: where groups of rows that share a scale would be split.
    """
    if isinstance(kept, Matrices) and (groups := kept.scales.shape[1]) > 1:
        rows, _ = _axes(param)
        if groups % (devices := parts(mesh, rows)):
            shape = param.shape[1:]
            raise SettingError(
                "weights", f"weights={kept.form!r}: the {groups} groups of a matrix {shape} cannot be split over {devices} devices"
            )
    return jax.tree.map(lambda split: NamedSharding(mesh, split), specs(param, kept))


def check_groups(model: Model, weights: Form | None, mesh: Mesh | AbstractMesh) -> None:
    """Checks that no device of ``mesh`` would hold a part of the rows that share a scale; raises what :func:`placement` does."""
    for param in leaves(model.schema).values():
        if (keep := store(param, weights, kernels=REFERENCE, dtype=jnp.bfloat16, mesh=mesh)) is not None:
            placement(mesh, param, jax.eval_shape(keep, jax.ShapeDtypeStruct(param.shape, jnp.bfloat16)))


def stored_bytes(param: Param, weights: Form | None, itemsize: int) -> int:
    """What a leaf takes of a device's memory, its elements ``itemsize`` each, unless it has a dtype of its own or is quantised."""
    keep = store(param, weights, kernels=REFERENCE, dtype=jnp.bfloat16, mesh=ONE_DEVICE)
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
        leaf, keep = given[path], store(param, weights, kernels=kernels, dtype=dtype, mesh=mesh)
        if keep is not None:
            leaf = jnp.asarray(leaf)
            where = placement(mesh, param, jax.eval_shape(keep, leaf))
            with jax.set_mesh(mesh):
                leaf = jax.jit(keep, out_shardings=where)(leaf)
        node[path[-1]] = leaf
    return tree


def what_is_quantised(model: Model) -> str:
    """What ``weights`` is about, for messages: the experts of a mixture alone, of another model the matrices of its layers."""
    return "experts" if model.spec.experts_per_token else "matrices"


def form_of(params: Params) -> str | None:
    """The form in which the parameters are quantised; None where they are not."""
    forms = {leaf.form for leaf in leaves(params).values() if is_quantised(leaf)}
    return min(forms, default=None)


def _axes(param: Param) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """The names of the axes of each matrix of a stack that products contract, of which the first alone may be split, and of the others."""
    behind = param.axes[1:]
    return behind[: param.quantisable], behind[param.quantisable :]


def _how(param: Param, kernels: Kernels, dtype: Any, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """How the matrices of a stack that is no mixture's are laid out for ``kernels`` and ``mesh``."""
    count, (rows, columns) = param.quantisable, _axes(param)
    apart = slice(len(columns) > 1, None)  # of several axes the first can be split whatever is behind it
    deep, wide = math.prod(param.shape[1 : 1 + count]), math.prod(param.shape[1 + count :][apart])
    part = deep // parts(mesh, rows), wide // parts(mesh, columns[apart])
    return {"rows": count, "backend": kernels.grouped_matmul, "dtype": dtype, "part": part}
