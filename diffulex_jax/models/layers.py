"""Pieces that families share: norms, rotary positions, packed heads, the loop over layers, and schemas of common parts.

Letters in shapes: R rows, T tokens, D embed, KV key/value heads, G query heads per key/value head, H head_dim, E experts,
F hidden width of an MLP, V vocabulary, L layers of one kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.models.base import Param
from diffulex_jax.models.ops import Ops


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive layers of one kind: the kind, the number of the first among its kind and among all layers, and how many."""

    kind: str
    start: int
    first: int
    count: int


def spans(kinds: Sequence[str]) -> tuple[Span, ...]:
    """The spans of layers whose kinds are ``kinds``, in order."""
    made: list[Span] = []
    for first, kind in enumerate(kinds):
        if made and made[-1].kind == kind:
            made[-1] = dataclasses.replace(made[-1], count=made[-1].count + 1)
        else:
            made.append(Span(kind, kinds[:first].count(kind), first, 1))
    return tuple(made)


Layer = Callable[[str, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""``layer(kind, i, at, x [R, T, D]) -> (x, kept)``: layer ``i`` of its kind, ``at`` among all."""


def run(layer: Layer, x: jax.Array, spans: Sequence[Span], ops: Ops) -> tuple[jax.Array, Any]:
    """``x`` through all layers; what they keep comes back stacked."""
    kept = []
    for span in spans:

        def turn(carry: tuple[jax.Array, jax.Array], _: None, span: Span = span) -> tuple[tuple[jax.Array, jax.Array], Any]:
            n, x = carry
            x, fresh = layer(span.kind, span.start + n, span.first + n, x)
            return (n + 1, x), fresh

        # On a GPU there is a gap between the turns of a loop. All layers in one turn would compile several times longer.
        (_, x), fresh = lax.scan(turn, (jnp.int32(0), x), None, length=span.count, unroll=min(ops.layers_per_turn, span.count))
        kept.append(fresh)
    return x, kept[0] if len(kept) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *kept)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale


def rotated_heads(qkv: jax.Array, q_norm: jax.Array, k_norm: jax.Array, table: tuple[jax.Array, jax.Array], *, eps: float) -> jax.Array:
    """Queries and keys of ``qkv [R, T, KV, G + 2, H]`` normalised per head and rotated, packed as before; values as they come.

    All heads go through both together, which makes two kernels of it on a GPU; the values then are taken as they came.
    """
    group = qkv.shape[-2] - 2
    value = (jnp.arange(group + 2) == group + 1)[:, None]
    scale = jnp.concatenate([jnp.broadcast_to(q_norm, (group, qkv.shape[-1])), jnp.stack([k_norm] * 2)])
    return jnp.where(value, qkv, rope(rms_norm(qkv, scale, eps), *(t[:, :, None, None] for t in table)))


def rope_table(positions: jax.Array, dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines ``[R, T, dim]`` (float32) for rotate-half RoPE on ``dim`` dimensions at ``positions [R, T]``."""
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    angle = positions[..., None].astype(jnp.float32) / theta**exponent
    return jnp.concatenate([jnp.cos(angle)] * 2, -1), jnp.concatenate([jnp.sin(angle)] * 2, -1)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first ``cos.shape[-1]`` dimensions of the last axis; the rest pass through."""
    dim = cos.shape[-1]
    r = x[..., :dim].astype(jnp.float32)
    half = jnp.concatenate([-r[..., dim // 2 :], r[..., : dim // 2]], -1)
    return jnp.concatenate([(r * cos + half * sin).astype(x.dtype), x[..., dim:]], -1)


Schema = dict[str, Param]


def ends(vocab: int, embed: int) -> Schema:
    """Input embeddings, output matrix, final norm."""
    return {
        "embed": Param((vocab, embed), (None, "embed")),  # on every device: looked up without an exchange
        "lm_head": Param((vocab, embed), ("vocab", "embed")),
        "norm": _norm(embed, "embed"),
    }


def attention(n: int, embed: int, *, kv: int, group: int, head: int) -> Schema:
    """Attention of ``n`` layers with a norm of queries and keys per head, and the two norms of a pre-norm layer.

    ``qkv`` holds, for each key/value head, its query heads followed by one key and one value: one matmul gives all three, and splitting
    ``KV`` over devices splits them together.
    """
    return {
        "attn_norm": _norm(embed, "embed", n),
        "qkv": Param((n, embed, kv, group + 2, head), ("layer", "embed", "kv_heads", None, "head_dim")),
        "q_norm": _norm(head, "head_dim", n),
        "k_norm": _norm(head, "head_dim", n),
        "out": Param((n, kv, group, head, embed), ("layer", "kv_heads", None, "head_dim", "embed")),
        "mlp_norm": _norm(embed, "embed", n),
    }


def swiglu(n: int, embed: int, prefix: str, width: int) -> Schema:
    """A gated MLP of ``n`` layers."""
    return {
        f"{prefix}_gate_up": Param((n, embed, 2, width), ("layer", "embed", None, "mlp")),
        f"{prefix}_down": Param((n, width, embed), ("layer", "mlp", "embed")),
    }


def mixture(n: int, embed: int, *, experts: int, width: int) -> Schema:
    """A router and its gated experts, of ``n`` layers."""
    return {
        "router": Param((n, embed, experts), ("layer", "embed", None)),
        "experts_gate_up": Param((n, experts, embed, 2 * width), ("layer", "expert", "embed", None)),
        "experts_down": Param((n, experts, width, embed), ("layer", "expert", None, "embed")),
    }


def _norm(size: int, axis: str, n: int | None = None) -> Param:
    return Param((size,), (axis,), init="ones", decay=False) if n is None else Param((n, size), ("layer", axis), init="ones", decay=False)
