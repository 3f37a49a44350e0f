"""Recipes: what is trained, on what, towards what, and how. A recipe is a value; ``recipes/`` has a page for each of our own."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax

from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import Model, Params
from diffulex_jax.training.data import Batches
from diffulex_jax.training.layout import Batch
from diffulex_jax.training.objective import Score
from diffulex_jax.weights.adapters import Adapters, Lora
from pallas_kernels.quantised import FORMS


class Objective(Protocol):
    """A function of ``training.objective``, or one like them."""

    def __call__(self, params: Params, model: Model, batch: Batch, key: jax.Array, *, balance: float) -> Score: ...


class Term(NamedTuple):
    """One of the objectives of a recipe.

    Attributes:
      name: of its curve.
      objective: what it computes.
      weight: its share, of the rows of every batch and of the loss alike.
    """

    name: str
    objective: Objective
    weight: float = 1.0


class About(NamedTuple):
    """What data are made for.

    Attributes:
      model: the network.
      folder: the directory that it was read from; None for one that begins with random weights.
      rows: examples in a batch.
      seed: the recipe's.
    """

    model: Model
    folder: pathlib.Path | None
    rows: int
    seed: int


class Trained(NamedTuple):
    """What a run gave.

    Attributes:
      recipe, model: what was trained.
      folder: the directory that it began with; None for random weights.
      params: float32 parameters, or the adapters alone of a recipe with ``lora``.
      history: of every some steps ``step``, the loss and accuracy of each objective, ``gradient_norm`` and ``seconds`` since the start.
      device: its kind.
      seconds: all in all.
    """

    recipe: Recipe
    model: Model
    folder: pathlib.Path | None
    params: Params | Adapters
    history: list[dict[str, float]]
    device: str
    seconds: float


Data = Callable[[About], Batches]
Finish = Callable[[pathlib.Path, Trained], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run.

    Attributes:
      model: a network that begins with random weights; or a Hugging Face directory, a hub id or ``"embedded"``, to go on with.
      data: ``data(about)`` gives the batches; see ``training.data``.
      objectives: what the loss is made of; each has its share of the rows of every batch.
      steps, rows: optimiser steps, and examples in each.
      seed: of everything random: initial weights, the order of examples, noise.
      learning_rate, warmup, weight_decay, beta2, clip: AdamW after a linear warm-up (in steps), decaying to zero along a cosine;
        gradients are clipped by their global norm.
      balance: weight of the gradient that balances the load of experts.
      dtype: of the computation, ``"bfloat16"`` or ``"float32"``; parameters and optimiser are float32.
      lora: train adapters of these matrices alone; None: all parameters.
      weights: with ``lora``, hold a mixture's experts, or the matrices of a model without, quantised: ``"int8"``, ``"int4"`` or ``"fp8"``.
        They stay as they are.
      finish: ``finish(folder, trained)`` writes the result; None: a Hugging Face directory, or PEFT's files of adapters.
    """

    model: Model | str
    data: Data
    objectives: tuple[Term, ...]
    steps: int
    rows: int = 256
    seed: int = 0
    learning_rate: float = 2e-3
    warmup: int = 300
    weight_decay: float = 0.05
    beta2: float = 0.98
    clip: float = 1.0
    balance: float = 0.0
    dtype: str = "bfloat16"
    lora: Lora | None = None
    weights: str | None = None
    finish: Finish | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "rows"):
            if getattr(self, name) < 1:
                raise SettingError(name, f"{name}={getattr(self, name)} must be positive")
        for name in ("warmup", "weight_decay", "balance", "seed"):
            if getattr(self, name) < 0:
                raise SettingError(name, f"{name}={getattr(self, name)} must not be negative")
        if self.warmup >= self.steps:
            raise SettingError("warmup", f"warmup={self.warmup} must be less than steps={self.steps}")
        for name in ("learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise SettingError(name, f"{name}={getattr(self, name)} must be positive")
        if not 0 < self.beta2 < 1:
            raise SettingError("beta2", f"beta2={self.beta2} must lie between 0 and 1")
        if self.dtype not in ("bfloat16", "float32"):
            raise SettingError("dtype", f"dtype={self.dtype!r} must be bfloat16 or float32")
        if self.weights not in (None, *FORMS):
            raise SettingError("weights", f"weights={self.weights!r} must be one of {', '.join(FORMS)}")
        if self.weights is not None and self.lora is None:
            raise SettingError("weights", f"weights={self.weights!r} needs lora: quantised parameters cannot be trained themselves")
        if self.lora is not None and isinstance(self.model, Model):
            raise SettingError("lora", "lora adapts a model that is trained already; this recipe's begins with random weights")
        names = [term.name for term in self.objectives]
        if not names or len(set(names)) < len(names):
            raise SettingError("objectives", f"objectives must be one or more, each with a name of its own; got {names}")
        _ = self.shares

    @property
    def shares(self) -> tuple[int, ...]:
        """Rows of a batch that each objective has."""
        whole = sum(term.weight for term in self.objectives)
        shares = [self.rows * term.weight / whole if term.weight > 0 else 0.5 for term in self.objectives]
        if any(abs(share - round(share)) > 1e-6 or share < 1 for share in shares):
            weights = ", ".join(f"{term.weight:g}" for term in self.objectives)
            raise SettingError("rows", f"rows={self.rows} cannot be shared out among objectives of weights {weights}")
        return tuple(round(share) for share in shares)


BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "embedded": "diffulex_jax.training.recipes.embedded:RECIPE",
        "sft": "diffulex_jax.training.recipes.sft:RECIPE",
        "dmax": "diffulex_jax.training.recipes.dmax:RECIPE",
        "multi_block": "diffulex_jax.training.recipes.multi_block:RECIPE",
    }
)
"""Recipes by name, and where each is."""


def find(name: str) -> Recipe:
    """The recipe that a name of :data:`BUILT_IN` or an import path ``"my_module:MY_RECIPE"`` means. Modules are looked for on ``sys.path``
    and in the current directory.

    Raises:
      ValueError: for an unknown name, or a path that leads to no recipe.
    """
    path = BUILT_IN.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not colon:
        raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(BUILT_IN)}, or give an import path, my_module:MY_RECIPE")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"recipe {name!r}: {error}") from error
    if not isinstance(found, Recipe):
        raise ValueError(f"recipe {name!r}: {attribute} must be a Recipe, got {type(found).__name__}")
    return found


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    """``recipe`` with other settings.

    Raises:
      SettingError: for a setting that no recipe has, or a value that will not do; naming it.
    """
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in settings:
        if name not in known:
            raise SettingError(name, f"unknown setting {name!r} of a recipe; there are {', '.join(known)}")
    return dataclasses.replace(recipe, **settings)


def described(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data, for the files of a run."""
    model = recipe.model if isinstance(recipe.model, str) else recipe.model.config.to_hf()
    plain = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe) if field.name != "finish"}
    objectives = [{"name": t.name, "weight": t.weight, **_function(t.objective)} for t in recipe.objectives]
    lora = None if recipe.lora is None else recipe.lora._asdict() | {"targets": list(recipe.lora.targets)}
    return plain | {"model": model, "data": _function(recipe.data), "objectives": objectives, "lora": lora}


def _function(function: Any) -> dict[str, Any]:
    """A function's import path and the settings that a partial gives it."""
    settings: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in function.keywords.items()} | settings
        function = function.func
    return {"function": f"{function.__module__}:{function.__qualname__}", "settings": settings}
