"""Exact match and tokens per forward on held-out problems, by a small decoder that recomputes the canvas at every step.

It exists to watch training and to state the metrics of the model card; the library's engine is the one to serve with. Rows
are independent: each is at its own block. Blocks after the current one are all masks and invisible under block-causal
attention, so a forward over the whole canvas equals one over a cache of finished blocks.

    python -m diffulex_jax.training.evaluate --model embedded
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from diffulex_jax.config import ModelConfig
from diffulex_jax.models import checkpoint, llada2
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.training import data, losses, tasks, tokenizer


BLOCK = losses.BLOCK
Format = Literal["raw", "chat"]


class Rule(NamedTuple):
    """A decoding rule.

    kind: ``llada2`` fills masks surer than ``accept`` (or the surest one); ``edit`` also revises filled tokens surer than ``revise``;
      ``dmax`` fills the run of sure masks from the left, re-predicts every filled token, and feeds back mixed embeddings.
    """

    kind: Literal["llada2", "edit", "dmax"]
    accept: float
    revise: float = 0.0


RULES = {
    "llada2 0.95": Rule("llada2", 0.95),
    "dmax 0.5": Rule("dmax", 0.5),
    "dmax 0.3": Rule("dmax", 0.3),
    "dmax 0.0": Rule("dmax", 0.0),
    "edit 0.7/0.5": Rule("edit", 0.7, 0.5),
    "edit 0.5/0.0": Rule("edit", 0.5, 0.0),
}
MOST_STEPS = {"dmax": 32, "edit": 16}  # forwards a block may spend: on all of it, or after its last mask
STOP = 0.9  # of `dmax`: a block whose every confidence reaches this is done


class Rows(NamedTuple):
    """Rows in the middle of decoding.

    tokens: ``[R, L]`` int32, meaningless where masked; masked, free: ``[R, L]`` bool, still a mask / not part of the prompt;
    soft: ``[R, L, D]`` input embeddings; block, spent, forwards: ``[R]`` int32, ``spent`` as in
    :data:`MOST_STEPS`; done: ``[R]`` bool.
    """

    tokens: jax.Array
    masked: jax.Array
    free: jax.Array
    soft: jax.Array
    block: jax.Array
    spent: jax.Array
    forwards: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "rule"))
def decode(params: llada2.Params, config: ModelConfig, tokens: jax.Array, start: jax.Array, *, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Answers prompts.

    Args:
      params: of the model.
      config: of the model.
      tokens: ``[R, L]`` canvases whose first ``start`` tokens are the prompt.
      start: ``[R]`` prompt lengths.
      rule: how to decode.

    Returns:
      ``(tokens [R, L], forwards [R])``.
    """
    length = tokens.shape[1]
    at = jnp.arange(length)[None]
    free = at >= start[:, None]
    zeros = jnp.zeros(len(tokens), jnp.int32)
    tokens = jnp.where(free, config.mask_token_id, tokens)
    rows = Rows(tokens, free, free, llada2.embed(params, tokens), start // BLOCK, zeros, zeros, zeros > 0)

    def step(rows: Rows) -> Rows:
        new = _step(params, config, rows, rule, at // BLOCK)
        return jax.tree.map(lambda a, b: jnp.where(rows.done.reshape(-1, *[1] * (a.ndim - 1)), a, b), rows, new)

    rows = jax.lax.while_loop(lambda rows: ~rows.done.all(), step, rows)
    return rows.tokens, rows.forwards


def _step(params: llada2.Params, config: ModelConfig, rows: Rows, rule: Rule, blocks: jax.Array) -> Rows:
    """One forward and one update of every row's current block."""
    length = blocks.shape[1]
    best, p = _guess(params, config, rows.soft, blocks)
    here = (blocks == rows.block[:, None]) & rows.free
    masked = rows.masked & here
    filled = here & ~masked
    surest = masked & (jnp.arange(length) == jnp.where(masked, p, -1).argmax(1)[:, None])
    if rule.kind == "dmax":
        unsure = jnp.cumsum(masked & (p < rule.accept), 1) > 0
        leftmost = masked & (jnp.cumsum(masked, 1) == 1)
        fill = jnp.where((masked & ~unsure).any(1, keepdims=True), masked & ~unsure, leftmost)
        revise = filled
    else:
        fill = masked & (p > rule.accept)
        fill = jnp.where(fill.any(1, keepdims=True), fill, surest)
        revise = filled & (p > rule.revise) & (best != rows.tokens) & (rule.kind == "edit")
    changed = (fill | revise) & (best != rows.tokens)
    tokens = jnp.where(fill | revise, best, rows.tokens)
    left = rows.masked & ~fill
    complete = ~masked.any(1)
    spent = rows.spent + (complete | (rule.kind == "dmax"))
    if rule.kind == "dmax":
        finished = ~(here & (p < STOP)).any(1) | ~changed.any(1) | (spent >= MOST_STEPS["dmax"])
    elif rule.kind == "edit":
        finished = complete & (~revise.any(1) | (spent >= MOST_STEPS["edit"]))
    else:
        finished = ~(left & here).any(1)
    soft = llada2.embed(params, jnp.where(left, config.mask_token_id, tokens))
    if rule.kind == "dmax":
        mixed = _mix(params, config, best, p).astype(soft.dtype)
        soft = jnp.where((here & ~left & ~finished[:, None])[..., None], mixed, soft)
    ended = (here & (tokens == config.eos_token_id)).any(1)
    block = rows.block + finished
    done = finished & (ended | (block * BLOCK >= length))
    return Rows(tokens, left, rows.free, soft, block, jnp.where(finished, 0, spent), rows.forwards + 1, done)


def _guess(params: llada2.Params, config: ModelConfig, x: jax.Array, blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Most likely token and its probability ``[R, L]`` at every position of ``x [R, L, D]``; the mask is never one."""
    mask = blocks[0][:, None] >= blocks[0][None]
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])

    def attend(layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[()]]:
        del layer
        return losses.attention(q, k, v, mask), ()

    h, _ = llada2.hidden(params, config, x, positions, attend, experts=losses.dense_experts)
    z = llada2.logits(params, h).at[..., config.mask_token_id].set(-jnp.inf)
    return z.argmax(-1).astype(jnp.int32), jnp.exp(z.max(-1) - jax.nn.logsumexp(z, -1))


def _mix(params: llada2.Params, config: ModelConfig, token: jax.Array, p: jax.Array) -> jax.Array:
    """DMax's hybrid embedding: ``p e(token) + (1 - p) e(mask)``, rescaled to the same mix of their norms (float32)."""
    e, m = llada2.embed(params, token).astype(jnp.float32), params["embed"][config.mask_token_id].astype(jnp.float32)
    p = p[..., None]
    mix = p * e + (1 - p) * m
    norm = functools.partial(jnp.linalg.norm, axis=-1, keepdims=True)
    return mix * (p * norm(e) + (1 - p) * norm(m)) / (norm(mix) + 1e-6)


def evaluate(
    params: llada2.Params, config: ModelConfig, problems: Sequence[tasks.Problem], *, rules: dict[str, Rule], form: Format
) -> dict[str, Any]:
    """Metrics per rule.

    ``exact`` is the share of problems whose final number is right; ``worked`` the share whose equations are all right, too;
    ``tpf`` is all generated tokens (before the end of sequence) over all forwards, none of them a prefill.
    """
    texts = [p.question if form == "raw" else tokenizer.chat(p.question) for p in problems]
    examples = data.encode(texts, [p.answer for p in problems])
    if len(examples.tokens) < len(problems):
        raise ValueError(f"only {len(examples.tokens)} of {len(problems)} problems fit the canvas of {data.CANVAS} tokens")
    coder, metrics = tokenizer.build(), {}
    for name, rule in rules.items():
        tokens, forwards = jax.device_get(decode(params, config, examples.tokens.astype(np.int32), examples.start, rule=rule))
        answers = [row[at:] for row, at in zip(tokens, examples.start, strict=True)]
        answers = [a[: np.argmax(a == config.eos_token_id)] if (a == config.eos_token_id).any() else a for a in answers]
        said = coder.decode_batch([a.tolist() for a in answers])
        counts = np.array([len(a) for a in answers])
        metrics[name] = {
            "exact": float(np.mean([tasks.is_correct(p, s) for p, s in zip(problems, said, strict=True)])),
            "worked": float(np.mean([tasks.equations(p.answer) == tasks.equations(s) for p, s in zip(problems, said, strict=True)])),
            "tpf": float(counts.sum() / forwards.sum()),
            "tokens": float(counts.mean()),
            "forwards": float(forwards.mean()),
        }
    return metrics


def report(metrics: dict[str, Any]) -> str:
    """Metrics of :func:`evaluate` as a table."""
    lines = [f"{'rule':14} {'exact':>7} {'worked':>7} {'TPF':>6} {'tokens':>7} {'forwards':>8}"]
    for name, m in metrics.items():
        lines.append(f"{name:14} {m['exact']:7.2%} {m['worked']:7.2%} {m['tpf']:6.2f} {m['tokens']:7.1f} {m['forwards']:8.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact match and tokens per forward of a trained model on held-out problems.")
    parser.add_argument("--model", default="embedded", help="directory of the model, or 'embedded'")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="of the held-out problems")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", help="also write the metrics to this file")
    args = parser.parse_args()
    path = checkpoint.resolve(args.model)
    config, params = checkpoint.load(path, make_mesh(), dtype=args.dtype)
    problems = tasks.generate("test", args.problems, seed=args.seed, unique=True)
    metrics = {form: evaluate(params, config, problems, rules=RULES, form=form) for form in get_args(Format)}
    for form, table in metrics.items():
        print(f"{form} prompts, {args.problems} problems, {args.dtype}\n{report(table)}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
