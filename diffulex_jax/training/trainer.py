"""The trainer: any recipe, on one device or over a mesh, batches split over its axis ``data`` and parameters by the model's own axes.

Everything random follows from the recipe's seed: the order of examples, initial weights, noise. A run that goes on where one was
ended gives the same parameters, bit for bit.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from diffulex_jax.errors import SettingError
from diffulex_jax.models import base
from diffulex_jax.models.base import Model, Params
from diffulex_jax.parallel.mesh import check_split, mesh_of, sharding
from diffulex_jax.training.layout import Batch
from diffulex_jax.training.recipe import About, Recipe, Term, Trained
from diffulex_jax.weights import adapter_stacks, adapters, checkpoint
from diffulex_jax.weights.adapters import Lora


CHUNK = 50  # steps in a dispatch
Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """What training changes.

    Attributes:
      params: float32, all of the network's or the adapters.
      optimizer: optax's state.
      key: uint32 data of the key that the noise of each step is drawn from.
      step: int32, steps taken.
    """

    params: Params
    optimizer: Any
    key: jax.Array
    step: jax.Array


class How(NamedTuple):
    """What of a recipe is compiled into a step: runs that differ in nothing else share the program."""

    objectives: tuple[Term, ...]
    shares: tuple[int, ...]
    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float
    beta2: float
    clip: float
    balance: float
    dtype: str
    lora: Lora | None


Saved = Callable[[State, list[dict[str, float]]], None]


def train(
    recipe: Recipe,
    *,
    mesh: Mesh | str | None = None,
    begin: Callable[[State], tuple[State, list[dict[str, float]]]] | None = None,
    after_chunk: Saved | None = None,
    chunk: int = CHUNK,
) -> Trained:
    """Runs a recipe.

    Args:
      recipe: what to do.
      mesh: where, as an engine's: a mesh, or the sizes of its axes, as in ``"data=2"``; default: the first device.
      begin: given a fresh state and its placement, returns the one to go on from and the history up to it.
      after_chunk: called with the state and the history after every dispatch.
      chunk: steps in a dispatch. The bits of a run may depend on it.

    Returns:
      The parameters, where they were trained, and the history.

    Raises:
      ValueError: for a model, data or a mesh that will not do.
    """
    began, over = time.perf_counter(), mesh_of(mesh)
    if recipe.rows % over.shape["data"]:
        raise SettingError("rows", f"rows={recipe.rows} cannot be split over the mesh's data={over.shape['data']}")
    with jax.set_mesh(over):
        model, folder, params = _network(recipe, over)
        how = How(recipe.objectives, recipe.shares, **{name: getattr(recipe, name) for name in How._fields[2:]})
        batches = recipe.data(About(model, folder, recipe.rows, recipe.seed))
        state, frozen = _fresh(recipe, model, params, over, how)
        del params
        state, history = (state, []) if begin is None else begin(state)
        split = NamedSharding(over, PartitionSpec(None, "data"))
        with tqdm(total=recipe.steps, initial=int(state.step), unit="step", mininterval=1, disable=None) as bar:
            for at in range(int(state.step), recipe.steps, chunk):
                steps = range(at, min(at + chunk, recipe.steps))
                columns = zip(*map(batches, steps), strict=True)
                many = Batch(*(jax.device_put(np.stack(column), split) for column in columns))
                state, metrics = run_steps(state, frozen, many, model=model, how=how)
                entry = {"step": int(state.step), **{k: round(float(v), 5) for k, v in metrics.items()}}
                history.append(entry | {"seconds": round(time.perf_counter() - began, 1)})
                bar.update(len(steps))
                bar.set_postfix({term.name: f"{entry[term.name]:.3f}" for term in recipe.objectives})
                if after_chunk is not None:
                    after_chunk(state, history)
    device = over.devices.flat[0].device_kind
    return Trained(recipe, model, folder, state.params, history, device, time.perf_counter() - began)


@functools.partial(jax.jit, static_argnames=("model", "how"), donate_argnums=0)
def run_steps(state: State, frozen: Params | None, batches: Batch, *, model: Model, how: How) -> tuple[State, Metrics]:
    """One optimiser step for each of ``batches`` (``[S, R, ...]``); metrics are means over the steps.

    Args:
      state: see :class:`State`.
      frozen: with ``how.lora``, the parameters that adapters are added to; else None.
      batches: whole batches, one for each step.
      model, how: what is trained, and how.
    """

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        batch = jax.tree.map(lambda x: x.astype(jnp.int32), batch)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        gradient, metrics = jax.grad(loss, has_aux=True)(state.params, frozen, model, batch, key, how=how)
        updates, optimizer_state = optimizer(model, how).update(gradient, state.optimizer, state.params)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        return State(optax.apply_updates(state.params, updates), optimizer_state, state.key, state.step + 1), metrics

    state, metrics = jax.lax.scan(step, state, batches)
    return state, jax.tree.map(jnp.mean, metrics)


def loss(params: Params, frozen: Params | None, model: Model, batch: Batch, key: jax.Array, *, how: How) -> tuple[jax.Array, Metrics]:
    """The weighted mean of the objectives, each on its rows of the batch with a key of its own, in ``how.dtype``."""
    if how.lora is not None:
        assert frozen is not None, "adapters are added to something"
        params = adapter_stacks.beside(model, how.lora, frozen, params)
    half = jax.tree.map(lambda x: x.astype(how.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
    metrics: Metrics = {}
    total, first = jnp.float32(0), 0
    whole = sum(term.weight for term in how.objectives)
    for term, rows, own in zip(how.objectives, how.shares, jax.random.split(key, len(how.objectives)), strict=True):
        part = jax.tree.map(lambda x, at=slice(first, first + rows): x[at], batch)
        value, accuracy = term.objective(half, model, part, own, balance=how.balance)
        total += value * (term.weight / whole)
        metrics |= {term.name: value, f"{term.name}_accuracy": accuracy}
        first += rows
    return total, metrics


def optimizer(model: Model, how: How) -> optax.GradientTransformation:
    """AdamW, clipped, with warm-up and cosine; parameters decay as the model's schema says, and adapters do."""
    rate = optax.warmup_cosine_decay_schedule(0.0, how.learning_rate, how.warmup, how.steps)
    decays = True if how.lora else jax.tree.map(lambda param: param.decay, model.schema, is_leaf=base.is_param)
    adam = optax.adamw(rate, b1=0.9, b2=how.beta2, weight_decay=how.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(how.clip), adam)


def _network(recipe: Recipe, mesh: Mesh) -> tuple[Model, Any, Params | None]:
    """The network, the directory it comes from and the parameters there; None and None where it begins with random ones."""
    if isinstance(recipe.model, Model):
        for leaf, param in base.leaves(recipe.model.schema).items():
            check_split(mesh, param.shape, param.axes, leaf[-1])
        return recipe.model, None, None
    folder = checkpoint.resolve(recipe.model)
    weights: Any = recipe.weights  # checked where the recipe is made
    model, params = checkpoint.load(folder, mesh, dtype=jnp.float32, weights=weights)
    return model, folder, params


def _fresh(recipe: Recipe, model: Model, params: Params | None, mesh: Mesh, how: How) -> tuple[State, Params | None]:
    """The state before the first step, and what stays frozen."""
    key, noise = jax.random.split(jax.random.key(recipe.seed))
    everywhere = NamedSharding(mesh, PartitionSpec())
    tx, frozen = optimizer(model, how), None
    where = jax.tree.map(lambda param: sharding(mesh, param.axes), model.schema, is_leaf=base.is_param)
    if how.lora is not None:
        made = jax.jit(functools.partial(adapters.init, model, how.lora), out_shardings=everywhere)(key)
        where, frozen = jax.tree.map(lambda _: everywhere, made), params
    elif params is None:
        made = jax.jit(functools.partial(base.init, model, scale=0.02), out_shardings=where)(key)
    else:
        made = params
    shapes = jax.eval_shape(tx.init, made)
    slots = optax.tree.map_params(tx, lambda _, at: at, shapes, where, transform_non_params=lambda _: everywhere)
    slots = jax.jit(tx.init, out_shardings=slots)(made)
    return State(made, slots, *jax.device_put((jax.random.key_data(noise), jnp.int32(0)), everywhere)), frozen
