"""What else takes a mesh: the bench of a step, and training."""

from __future__ import annotations

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from models import MODEL, SHAPE, random_weights

from diffulex_jax.bench import step
from diffulex_jax.bench.forward import step_bytes
from diffulex_jax.bench.shapes import SHAPES, random_params
from diffulex_jax.engine import programs
from diffulex_jax.models.base import leaves
from diffulex_jax.parallel.mesh import abstract_mesh, make_mesh, sharding
from diffulex_jax.training import objective
from diffulex_jax.training.data import Examples, shuffled
from diffulex_jax.training.recipe import Recipe, Term, changed
from diffulex_jax.training.trainer import train


def bench(axes):
    """What the bench of a step finds on a mesh, how many times what a device must read it says, and whether random weights are shared."""
    mesh, schema = make_mesh(**axes), leaves(MODEL.schema)
    params = jax.device_put(random_weights(), jax.tree.map(lambda split: NamedSharding(mesh, split), programs.param_specs(MODEL)))
    text = ",".join(f"{axis}={size}" for axis, size in axes.items())
    asked = {"shape": "own", "strategies": ["llada2"], "contexts": [32], "dtype": "float32", "repeats": 1, "mesh": text}
    with mock.patch.dict(SHAPES, own=SHAPE), mock.patch.object(step, "random_params", lambda *_, **__: params):
        report = step.run(batches=[2], **asked)
        try:
            step.run(batches=[1], **asked)
        except ValueError as error:
            refused = str(error)
    (figures,) = report["steps"]
    must = step_bytes(MODEL, 4, batch=1, context=64, experts=figures["experts_touched"], mesh=abstract_mesh(**axes))
    few = dataclasses.replace(MODEL, schema={"embed": MODEL.schema["embed"], "moe": {"experts_down": MODEL.schema["moe"]["experts_down"]}})
    one, shared = (leaves(random_params(few, jnp.float32, mesh=each)) for each in (make_mesh(), mesh))
    return {
        "counted": [figures[name] for name in ("exchanges", "experts_touched")],
        "read": figures["gigabytes"] * 1e9 / must,
        "timed": min(figures["ms_median"], figures["exchange_ms"]) > 0,
        "kernel_times": report["kernel_times"],
        "refused": refused,
        "same": all(np.allclose(one[path], shared[path], atol=1e-6) for path in one),
        "placed": all(a.sharding.is_equivalent_to(sharding(mesh, schema[path].axes), a.ndim) for path, a in shared.items()),
    }


def trained(axes):
    """How far two steps of training over a mesh are from those on one device, where its parameters are, and what is said of rows."""
    rng = np.random.default_rng(0)
    examples = Examples(rng.integers(0, 90, (4, 64)), np.full(4, 10), np.full(4, 50))
    terms = (Term("masked", objective.masked, 0.5), Term("multi_block", objective.multi_block, 0.5))
    settings = {"objectives": terms, "steps": 2, "rows": 4, "warmup": 1, "learning_rate": 0.01, "balance": 0.01, "dtype": "float32"}
    recipe = Recipe(model=MODEL, data=lambda about: shuffled(examples, rows=about.rows, seed=0), **settings)
    one, many = train(recipe), train(recipe, mesh=make_mesh(**axes))
    pairs = [[np.ravel(leaves(made.params)[path]) for path in leaves(MODEL.schema)] for made in (one, many)]
    try:
        train(changed(recipe, rows=6), mesh=make_mesh(data=4))
        refused = ""
    except ValueError as error:
        refused = str(error)
    schema = leaves(MODEL.schema)
    return {
        "losses": max(abs(one.history[0][name] - many.history[0][name]) for name in ("masked", "multi_block", "gradient_norm")),
        # Adam makes a step of each gradient, however small: what is rounding alone may go either way.
        "same": float(np.mean(np.abs(np.concatenate(pairs[0]) - np.concatenate(pairs[1])) < 1e-5)),
        "placed": all(
            leaf.sharding.is_equivalent_to(sharding(make_mesh(**axes), schema[path].axes), leaf.ndim)
            for path, leaf in leaves(many.params).items()
        ),
        "refused": refused,
    }
