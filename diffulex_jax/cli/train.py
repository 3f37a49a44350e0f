"""``diffulex-jax train``."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Annotated, Any

import typer

from diffulex_jax.cli.options import one_line_errors


RECIPE_NAMES = ("embedded", "sft", "dmax", "multi_block")
"""The names in ``training.recipe.BUILT_IN``, whose module takes JAX to import."""

_RECIPE = f"One of {', '.join(RECIPE_NAMES)}, or the import path of one of your own, my_module:MY_RECIPE."
_CHANGES = "Changes to the recipe"
_ADAPTERS = "Adapters"
_DATA = 'A JSON-lines file of {"prompt": ..., "completion": ...} or {"messages": [...]}, in place of the recipe\'s data.'
_LENGTH = "With --data: tokens of a canvas, whole blocks; longer examples are left out. Default: as the longest one takes."
_SAVE_EVERY = "Steps between states that are kept, a multiple of 50; 0 keeps none, and needs no Orbax."
_MESH = "How devices share the work: data=2,expert=2,tensor=2. Default: one device."


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=_RECIPE)],
    *,
    out: Annotated[pathlib.Path, typer.Option(help="The directory to write to.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, to the same parameters bit for bit.")] = False,
    save_every: Annotated[int, typer.Option(help=_SAVE_EVERY)] = 500,
    mesh: Annotated[str | None, typer.Option(help=_MESH)] = None,
    model: Annotated[str | None, typer.Option(help="A Hugging Face directory, a hub id, or 'embedded'.", rich_help_panel=_CHANGES)] = None,
    data: Annotated[pathlib.Path | None, typer.Option(help=_DATA, rich_help_panel=_CHANGES)] = None,
    length: Annotated[int | None, typer.Option(help=_LENGTH, rich_help_panel=_CHANGES)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.", rich_help_panel=_CHANGES)] = None,
    rows: Annotated[int | None, typer.Option(help="Examples in a step.", rich_help_panel=_CHANGES)] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.", rich_help_panel=_CHANGES)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest.", rich_help_panel=_CHANGES)] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps up to it.", rich_help_panel=_CHANGES)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's.", rich_help_panel=_CHANGES)] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the computation: bfloat16 or float32.", rich_help_panel=_CHANGES)] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train adapters of this rank alone, and write PEFT's files.", rich_help_panel=_ADAPTERS)
    ] = None,
    lora_alpha: Annotated[float, typer.Option(help="ALPHA / RANK scales them.", rich_help_panel=_ADAPTERS)] = 16.0,
    lora_target: Annotated[
        list[str] | None, typer.Option(help="A leaf of matrices: qkv, out, ... May be given several times.", rich_help_panel=_ADAPTERS)
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Hold experts, or else all layers, quantised under the adapters: int8, int4 or fp8.", rich_help_panel=_ADAPTERS),
    ] = None,
) -> None:
    """Train a model by a recipe, and write it as a Hugging Face directory, or its adapters as PEFT's files.

    It needs diffulex-jax[train].
    """
    with one_line_errors():
        if data is None and length is not None:
            raise ValueError("--length goes with --data")
        if lora_rank is None and lora_target:
            raise ValueError("--lora-target goes with --lora-rank")
        if importlib.util.find_spec("optax") is None:
            raise ImportError("training needs optax: pip install 'diffulex-jax[train]'")
        from diffulex_jax import compile_cache
        from diffulex_jax.training import recipe as recipes
        from diffulex_jax.training import run
        from diffulex_jax.training.data import from_file
        from diffulex_jax.weights.adapters import Lora

        settings: dict[str, Any] = {"model": model, "steps": steps, "rows": rows, "seed": seed, "learning_rate": learning_rate}
        settings |= {"warmup": warmup, "weight_decay": weight_decay, "dtype": dtype, "weights": weights}
        settings["data"] = None if data is None else from_file(data, length=length)
        settings["lora"] = None if lora_rank is None else Lora(lora_rank, lora_alpha, tuple(lora_target or Lora._field_defaults["targets"]))
        chosen = recipes.changed(recipes.find(recipe), **{name: value for name, value in settings.items() if value is not None})
        compile_cache.enable()
        trained = run.run(chosen, out, mesh=mesh, resume=resume, save_every=save_every)
    typer.echo(f"{trained.recipe.steps} steps in {trained.seconds:.0f} s on {trained.device}; written to {out}")
