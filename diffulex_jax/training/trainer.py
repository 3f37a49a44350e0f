"""An optax trainer: half of every batch learns block diffusion, half the repair of its own drafts.

Everything random follows from the seed: the order of examples, initial weights, noise.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from diffulex_jax.models import base
from diffulex_jax.models.base import Model, Params
from diffulex_jax.training import objective


class Recipe(NamedTuple):
    """What a run is made of; written into the model card.

    steps, rows: optimiser steps, and examples in each.
    examples: size of the generated training set; it is shuffled anew on every pass.
    seed: of everything.
    learning_rate, warmup, weight_decay, clip: AdamW after a linear warm-up (in steps), decaying to zero along a cosine.
    balance: weight of the expert load-balancing gradient.
    """

    steps: int = 10_500
    rows: int = 256
    examples: int = 1_500_000
    seed: int = 0
    learning_rate: float = 2e-3
    warmup: int = 300
    weight_decay: float = 0.05
    clip: float = 1.0
    balance: float = 0.01


CHUNK = 50  # steps per dispatch
Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """Master parameters (float32), optimiser state, and the key of the next step's noise."""

    params: Params
    optimizer: Any
    key: jax.Array
    step: jax.Array


def optimizer(model: Model, recipe: Recipe) -> optax.GradientTransformation:
    """AdamW, clipped, with warm-up and cosine; parameters decay as the model's schema says."""
    rate = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, recipe.warmup, recipe.steps)

    decays = jax.tree.map(lambda param: param.decay, model.schema, is_leaf=base.is_param)
    adam = optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=recipe.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), adam)


@functools.partial(jax.jit, static_argnames=("model", "recipe"))
def init(model: Model, recipe: Recipe) -> State:
    """A fresh run."""
    key, noise = jax.random.split(jax.random.key(recipe.seed))
    params = base.init(model, key, scale=0.02)
    return State(params, optimizer(model, recipe).init(params), noise, jnp.int32(0))


def loss(params: Params, model: Model, batch: objective.Batch, key: jax.Array, *, balance: float) -> tuple[jax.Array, Metrics]:
    """Mean of the two losses, each on its half of the batch, in bfloat16 compute."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    first, second = (jax.tree.map(lambda x, part=part: jnp.split(x, 2)[part], batch) for part in (0, 1))
    masked_key, policy_key = jax.random.split(key)
    masked, masked_accuracy = objective.masked(half, model, first, masked_key, balance=balance)
    policy, policy_accuracy = objective.on_policy(half, model, second, policy_key, balance=balance)
    metrics = {"masked": masked, "masked_accuracy": masked_accuracy, "on_policy": policy, "on_policy_accuracy": policy_accuracy}
    return (masked + policy) / 2, metrics


@functools.partial(jax.jit, static_argnames=("model", "recipe"), donate_argnums=0)
def run_steps(state: State, examples: objective.Batch, index: jax.Array, *, model: Model, recipe: Recipe) -> tuple[State, Metrics]:
    """One optimiser step per row of ``index`` (``[S, R]``, into ``examples``); metrics are means over the steps."""

    def step(state: State, index: jax.Array) -> tuple[State, Metrics]:
        batch = jax.tree.map(lambda x: x[index].astype(jnp.int32), examples)
        key = jax.random.fold_in(state.key, state.step)
        gradient, metrics = jax.grad(loss, has_aux=True)(state.params, model, batch, key, balance=recipe.balance)
        updates, optimizer_state = optimizer(model, recipe).update(gradient, state.optimizer, state.params)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        return State(optax.apply_updates(state.params, updates), optimizer_state, state.key, state.step + 1), metrics

    state, metrics = jax.lax.scan(step, state, index)
    return state, jax.tree.map(jnp.mean, metrics)


def order(recipe: Recipe, examples: int) -> np.ndarray:
    """``[steps, rows]`` int32 indices of examples: every pass over them is a new permutation."""
    rng = np.random.default_rng((recipe.seed, 2))
    need = recipe.steps * recipe.rows
    passes = [rng.permutation(examples).astype(np.int32) for _ in range(-(-need // examples))]
    return np.concatenate(passes)[:need].reshape(recipe.steps, recipe.rows)


def train(model: Model, recipe: Recipe, examples: objective.Batch) -> tuple[Params, list[dict[str, float]]]:
    """Runs a recipe.

    Args:
      model: the network.
      recipe: what to do.
      examples: the training set, on the device.

    Returns:
      ``(parameters in float32, history)``; the history holds the metrics of every chunk of steps.
    """
    indices, state, history = order(recipe, len(examples.start)), init(model, recipe), []
    with tqdm(total=recipe.steps, unit="step", mininterval=5) as bar:
        for at in range(0, recipe.steps, CHUNK):
            state, metrics = run_steps(state, examples, indices[at : at + CHUNK], model=model, recipe=recipe)
            history.append({"step": int(state.step), **{k: round(float(v), 5) for k, v in metrics.items()}})
            bar.update(len(indices[at : at + CHUNK]))
            bar.set_postfix({k: f"{history[-1][k]:.3f}" for k in ("masked", "on_policy")})
    return state.params, history
