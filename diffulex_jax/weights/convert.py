"""From any model directory to one of :mod:`diffulex_jax.weights.placed`."""

from __future__ import annotations

import pathlib
from typing import Any, cast

from diffulex_jax.parallel import hosts
from diffulex_jax.parallel.mesh import mesh_of
from diffulex_jax.weights import checkpoint, placed
from pallas_kernels import choose
from pallas_kernels.quantised import Form


def convert(model: str, out: str | pathlib.Path, *, mesh: str | None, dtype: Any, weights: str | None, progress: bool = False) -> None:
    """Makes ``out`` a directory that starts in the place of ``model``, with parameters as the devices of ``mesh`` hold them.

    Of several hosts all call it.

    Args:
      model: what ``Engine.from_pretrained`` takes.
      out: see ``placed.save``.
      mesh: where the parameters are meanwhile; ``out`` can be read onto any.
      dtype, weights, progress: see ``checkpoint.load``.

    Raises:
      ImportError: where Orbax is not installed.
      ValueError: for a model, a mesh or a directory that will not do.
    """
    out, over = pathlib.Path(out), mesh_of(mesh)
    placed.check(out)
    kernels, source = choose(over.local_devices[0]), checkpoint.resolve(model)
    form = cast(Form | None, weights)
    network, params = checkpoint.load(source, over, dtype=dtype, weights=form, kernels=kernels, progress=progress)
    placed.save(out, network, params, kernels=kernels)
    if hosts.leads():
        placed.copy_beside(source, out)
