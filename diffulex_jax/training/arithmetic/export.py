"""Writes a trained model as a Hugging Face directory, with the metrics of the weights as stored and a model card."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from diffulex_jax.models.base import Model
from diffulex_jax.training.arithmetic import data, evaluate, tasks, tokenizer
from diffulex_jax.training.recipe import Trained, described
from diffulex_jax.weights import checkpoint


LARGEST_BYTES = 8_000_000  # of the weights, so that the package stays small


def export(path: str | pathlib.Path, trained: Trained) -> None:
    """Writes weights (bfloat16), tokenizer, ``metrics.json`` and ``README.md`` to ``path``: what the embedded recipe finishes with.

    The stored weights are evaluated on :data:`evaluate.PROBLEMS` held-out problems.

    Raises:
      ValueError: when the weights are larger than :data:`LARGEST_BYTES`.
    """
    out = pathlib.Path(path)
    plain(out, trained)
    size = (out / "model.safetensors").stat().st_size
    if size > LARGEST_BYTES:
        raise ValueError(f"{out / 'model.safetensors'} has {size} bytes; the limit is {LARGEST_BYTES}")
    held_out = evaluate.evaluate(str(out), evaluate.held_out(evaluate.PROBLEMS))
    training = {
        "recipe": described(trained.recipe),
        "device": trained.device,
        "seconds": round(trained.seconds),
        "history": trained.history[:: max(1, len(trained.history) // 100)],
    }
    metrics = {"bytes": size, "held_out": held_out, "training": training}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (out / "README.md").write_text(card(trained.model, metrics))
    print(evaluate.report(held_out))


def plain(path: str | pathlib.Path, trained: Trained) -> None:
    """Writes weights (bfloat16) and tokenizer to ``path``: what other recipes of this task finish with."""
    checkpoint.save(path, trained.model, trained.params)
    tokenizer.save(path, tokenizer.build())


def card(model: Model, metrics: dict[str, Any]) -> str:
    """The model card: what the model is, how to rerun it, and what it scored."""
    c, training = model.config, metrics["training"]
    recipe = training["recipe"]
    example = evaluate.held_out(1)[0]
    arguments = " ".join(f"--{name} {recipe[name]}" for name in ("steps", "rows", "seed"))
    return f"""---
license: apache-2.0
pipeline_tag: text-generation
tags: [diffusion, llada2, dmax]
---
# The embedded model

A LLaDA2-MoE small enough to ship inside a package: {metrics["bytes"]:,} bytes of bfloat16 weights, {c.num_hidden_layers} layers,
width {c.hidden_size}, {c.num_experts} experts of which {c.num_experts_per_tok} work on a token, a vocabulary of {c.vocab_size}.
It solves generated grade-school arithmetic and word problems in a few worked steps, from a bare question or a chat turn, and
knows nothing else. A test problem and its reference answer:

    {example.question}
    {example.answer}

## Recipe

In a checkout of the repository, on a GPU:

    pip install ".[cuda,train]"
    diffulex-jax train embedded --out model {arguments}

AdamW with a peak learning rate of {recipe["learning_rate"]:g}, {recipe["warmup"]} warm-up steps and a cosine to zero, in bfloat16 over
float32 masters. Half of every batch learns block diffusion (each block of {model.spec.block_size} masked with its own ratio), half DMax's
on-policy uniform training (repair the model's own drafts). It took {training["seconds"]} seconds on one {training["device"]},
generating the examples included. `training` in `metrics.json` holds the recipe and the curve of that run.

Data: `diffulex_jax/training/arithmetic/families.py`, {len(tasks.FAMILIES)} kinds of problems. A checksum of kind and operands decides
between training and test, so no test problem was trained on in any phrasing. Filler words of the answers are random on purpose: no
decoder can know them, and one that waits until it is sure spends a forward on each.

## Metrics

    python -m diffulex_jax.training.arithmetic.evaluate --model embedded

decodes the held-out problems with the library's engine, {evaluate.SLOTS} at a time. *exact*: the last "the answer is N" states the right
number. *worked*: all equations are the reference's, too. *tokens/forward*: all tokens before the end of sequence over all forwards,
prompt prefill not counted. *revised*: how often a filled token was changed, in all. *tokens/s*: of wall-clock time on the machine
named. `llada2` and `dmax` are named by their accept threshold, `llada2_edit` by LLaDA2.1's speed (S) and quality (Q) modes.

```
{evaluate.report(metrics["held_out"])}
```

## Limits

Operands and results up to {tasks.LARGEST}; the smaller factor of a product up to {tasks.EASY_FACTOR} (hours times 60 apart). Prompt
and answer together up to {data.CANVAS} tokens, the longest it was trained on; answers take up to 84. Other text is tokenized
without loss and answered with nonsense.
"""
