"""New parameters in the place of those that an engine's programs are compiled for, leaf by leaf: nothing is compiled again."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffulex_jax.engine.executables import Programs
from diffulex_jax.models.base import Model, Params, leaves
from diffulex_jax.parallel.mesh import sharding
from diffulex_jax.weights import quantise
from pallas_kernels import Kernels
from pallas_kernels.quantised.matrices import is_quantised


Leaves = dict[tuple[str, ...], Any]


def check(model: Model, held: Params, given: Params) -> None:
    """Checks that ``given`` can take the place of ``held``: the same tree, shapes and dtypes. What is held quantised is given so, or plain.

    Raises:
      ValueError: naming the first leaf that will not do, what it is, and what it must be.
    """
    if not isinstance(given, dict):
        raise ValueError(f"parameters must be a tree of dicts like the model's schema, not of type {type(given).__name__}")
    ours, theirs = leaves(held), leaves(given)
    dtype, schema = ours[("embed",)].dtype, leaves(model.schema)
    for path in ours | theirs:
        name = ".".join(map(str, path))
        if path not in theirs or path not in ours:
            raise ValueError(f"parameter {name} is missing" if path in ours else f"parameter {name} is none of this model's")
        old, new = ours[path], theirs[path]
        if is_quantised(old) and not is_quantised(new):
            old = jax.ShapeDtypeStruct(schema[path].shape, dtype)
        one_tree, other_tree = (str(jax.tree.structure(leaf)) for leaf in (old, new))
        if one_tree != other_tree:
            raise ValueError(f"parameter {name} is given as {_kind(new)}; this engine holds it as {_kind(old)}")
        for one, other in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            if not isinstance(other, (jax.Array, np.ndarray)):
                raise ValueError(f"parameter {name} must be an array, not of type {type(other).__name__}")
            for what in ("shape", "dtype"):
                if getattr(one, what) != getattr(other, what):
                    raise ValueError(f"parameter {name} has {what} {getattr(other, what)}; it must be {getattr(one, what)}")


def replace(model: Model, held: Leaves, given: Params, *, programs: Programs, kernels: Kernels, mesh: Mesh, donate: bool) -> None:
    """Puts the leaves of ``given``, which :func:`check` found right, into ``held`` one after the other; each old one is let go of first.

    Args:
      model: whose parameters they are.
      held: the leaves, by their path.
      given: the new ones, wherever they are.
      programs: keeps what quantises a leaf compiled.
      kernels: in whose form quantised leaves are held.
      mesh: where they are held.
      donate: ``given`` may be shared, not copied, where it lies right.
    """
    schema, new = leaves(model.schema), leaves(given)
    dtype = new[("embed",)].dtype
    for path, old in held.items():
        leaf, param = new[path], schema[path]
        if is_quantised(old) and not is_quantised(leaf):
            keep = quantise.store(param, old.form, kernels=kernels, dtype=dtype, mesh=mesh)
            assert keep is not None, "only what the schema lets be is quantised"
            program = jax.jit(keep, out_shardings=quantise.placement(mesh, param, old))
            held[path] = programs(("quantise", path), program, jax.device_put(leaf, sharding(mesh, param.axes)))
        else:
            where = jax.tree.map(lambda part: part.sharding, old)
            held[path] = jax.device_put(leaf, where, may_alias=None if donate else False)


def _kind(leaf: Any) -> str:
    return f"quantised {leaf.form}" if is_quantised(leaf) else f"a {type(leaf).__name__}"
