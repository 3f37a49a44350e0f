"""Writes a trained model as a Hugging Face directory, with the metrics of the weights as stored and a model card."""

from __future__ import annotations

import json
import pathlib
from typing import Any, get_args

import jax
import jax.numpy as jnp

from diffulex_jax.config import ModelConfig
from diffulex_jax.models import checkpoint, llada2
from diffulex_jax.training import data, evaluate, tasks, tokenizer


LARGEST_BYTES = 8_000_000  # of the weights, so that the package stays small
HELD_OUT, HELD_OUT_SEED = 1000, 1


def export(
    path: str, config: ModelConfig, params: llada2.Params, *, recipe: dict[str, Any], history: list[dict[str, float]], seconds: float
) -> None:
    """Writes weights (bfloat16), tokenizer, ``metrics.json`` and ``README.md`` to ``path``.

    Raises:
      ValueError: when the weights are larger than :data:`LARGEST_BYTES`.
    """
    out = pathlib.Path(path)
    checkpoint.save(out, config, params)
    tokenizer.save(out, tokenizer.build())
    size = (out / "model.safetensors").stat().st_size
    if size > LARGEST_BYTES:
        raise ValueError(f"{out / 'model.safetensors'} has {size} bytes; the limit is {LARGEST_BYTES}")
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    problems = tasks.generate("test", HELD_OUT, seed=HELD_OUT_SEED, unique=True)
    tables = {form: evaluate.evaluate(stored, config, problems, rules=evaluate.RULES, form=form) for form in get_args(evaluate.Format)}
    metrics = {
        "recipe": recipe,
        "device": jax.devices()[0].device_kind,
        "seconds": round(seconds),
        "bytes": size,
        "held_out": tables,
        "history": history[:: max(1, len(history) // 100)],
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (out / "README.md").write_text(card(config, metrics))
    for form, table in tables.items():
        print(f"{form}\n{evaluate.report(table)}")


def card(config: ModelConfig, metrics: dict[str, Any]) -> str:
    """The model card: what the model is, how to rerun it, and what it scored."""
    c, recipe = config, metrics["recipe"]
    example = tasks.generate("test", 1, seed=HELD_OUT_SEED, unique=True)[0]
    arguments = " ".join(f"--{name} {recipe[name]}" for name in ("steps", "rows", "examples", "seed"))
    tables = "\n".join(f"{form} prompts\n{evaluate.report(table)}\n" for form, table in metrics["held_out"].items())
    return f"""---
license: apache-2.0
pipeline_tag: text-generation
tags: [diffusion, llada2, dmax]
---
# The embedded model

A LLaDA2-MoE small enough to ship inside a package: {metrics["bytes"]:,} bytes of bfloat16 weights, {c.num_hidden_layers} layers,
width {c.hidden_size}, {c.num_experts} experts of which {c.num_experts_per_tok} work on a token, a vocabulary of {c.vocab_size}.
It solves generated grade-school arithmetic and word problems in a few worked steps, from a bare question or a chat turn, and
knows nothing else.

    {example.question}
    {example.answer}

## Recipe

    python -m diffulex_jax.training.train --out DIR {arguments}

AdamW with a peak learning rate of {recipe["learning_rate"]:g}, {recipe["warmup"]} warm-up steps and a cosine to zero, in bfloat16 over
float32 masters. Half of every batch learns block diffusion (each block of {evaluate.BLOCK} masked with its own ratio), half DMax's
on-policy uniform training (repair the model's own drafts). It took {metrics["seconds"]} seconds on one {metrics["device"]},
generating the examples and watching included. `metrics.json` holds the curve.

Data: `diffulex_jax/training/families.py`, {len(tasks.FAMILIES)} kinds of problems. A checksum of kind and operands decides between
training and test, so no test problem was trained on in any phrasing. Filler words of the answers are random on purpose: no
decoder can know them, and one that waits until it is sure spends a forward on each.

## Metrics

{HELD_OUT} held-out problems, `python -m diffulex_jax.training.evaluate`. *exact*: the last "the answer is N" states the right number.
*worked*: all equations are the reference's, too. *TPF*: all tokens before the end of sequence over all forwards, none of them
a prefill. Rules are named by their thresholds: accept, and for `edit` revise.

```
{tables}```

## Limits

Operands and results up to {tasks.LARGEST}; the smaller factor of a product up to {tasks.EASY_FACTOR} (hours times 60 apart). Prompt
and answer together up to {data.CANVAS} tokens, the longest it was trained on; answers take up to 84. Other text is tokenized
without loss and answered with nonsense.
"""
