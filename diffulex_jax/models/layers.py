"""Pieces that families share: the loop over layers, and schemas of common parts.

Letters in shapes: R rows, T tokens, D embed, KV key/value heads, G query heads per key/value head, H head_dim, E experts,
F hidden width of an MLP, V vocabulary, L layers of one kind.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.models.base import Param, Params
from diffulex_jax.models.ops import At, Ops, Stream, settled
from diffulex_jax.parallel.mesh import first_index, shared_by


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


Layer = Callable[[str, jax.Array, At, jax.Array | Stream], tuple[jax.Array | Stream, Any]]
"""``layer(kind, i, at, x) -> (x, kept)``, of the residual stream ``x``, ``[R, T, D]`` or a ``Stream`` of it: layer ``i`` of its
kind, ``at`` among all; ``kept`` is from ``ops.attend``."""


def run(layer: Layer, x: jax.Array, spans: Sequence[Span], ops: Ops) -> tuple[jax.Array, Any]:
    """``x`` through all layers; what they keep comes back stacked, or, where there is an ``ops.pool``, what the last made of that."""
    kept, pool = [], ops.pool
    for span in spans:
        # On a GPU there is a gap between the turns of a loop. All layers in one turn would compile several times longer.
        for turns, each in _turns(span, min(ops.layers_per_turn, span.count)):
            (_, x, pool), fresh = lax.scan(functools.partial(_turn, layer, each), (jnp.int32(0), x, pool), None, length=turns)
            kept.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), fresh))
    if pool is not None:
        return x, pool
    return x, kept[0] if len(kept) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *kept)


def _turns(span: Span, layers: int) -> Iterator[tuple[int, Span]]:
    """How many turns of ``layers`` layers, the first of which is given, and one of those that are left."""
    turns, left = divmod(span.count, layers)
    yield turns, dataclasses.replace(span, count=layers)
    if left:
        done = turns * layers
        yield 1, Span(span.kind, span.start + done, span.first + done, left)


def _turn(layer: Layer, span: Span, carry: tuple[jax.Array, jax.Array, Any], _: None) -> tuple[tuple[jax.Array, jax.Array, Any], Any]:
    """The layers of ``span``, so many turns of them later as the carry says."""
    turn, before, pool = carry
    x: jax.Array | Stream = before
    kept = []
    for j in range(span.count):
        n = turn * span.count + j
        x, fresh = layer(span.kind, span.start + n, At(span.first + n, pool), x)
        if pool is None:
            kept.append(fresh)
        else:
            pool = fresh
    return (turn + 1, settled(x), pool), jax.tree.map(lambda *a: jnp.stack(a), *kept) if kept else ()


Schema = dict[str, Param]


def ends(vocab: int, embed: int, *, tied: bool = False) -> Schema:
    """Input embeddings, output matrix (none of its own where it is ``tied`` to the embeddings), final norm."""
    return {
        "embed": Param((vocab, embed), (None, "embed")),  # on every device: looked up without an exchange
        **({} if tied else {"lm_head": Param((vocab, embed), ("vocab", "embed"))}),
        "norm": _norm(embed, "embed"),
    }


def head(params: Params) -> jax.Array:
    """The output matrix of :func:`ends`: this device's rows.

    Raises:
      ValueError: for a tied one whose rows cannot be shared out equally.
    """
    if "lm_head" in params:
        return params["lm_head"]
    embed, devices = params["embed"], math.prod(map(lax.axis_size, shared_by("vocab")))
    rows, left = divmod(embed.shape[0], devices)
    if left:
        raise ValueError(f"embed: vocab={embed.shape[0]} cannot be split over {devices} devices")
    return embed if devices == 1 else lax.dynamic_slice_in_dim(embed, first_index("vocab", rows), rows)


def attention(
    n: int, embed: int, *, kv: int, group: int, head: int, norms: bool = True, bias: bool = False, quantisable: bool = False
) -> Schema:
    """Attention of ``n`` layers, and the two norms of a pre-norm layer.

    ``qkv`` holds, for each key/value head, its query heads followed by one key and one value: one matmul gives all three, and splitting
    ``KV`` over devices splits them together. ``norms``: queries and keys are normalised per head. ``bias``: all three have one.
    ``quantisable``: the matrices are; where there are experts, these alone should be.
    """
    heads, axes = (kv, group + 2, head), ("kv_heads", None, "head_dim")
    return {
        "attn_norm": _norm(embed, "embed", n),
        "qkv": Param((n, embed, *heads), ("layer", "embed", *axes), quantisable=int(quantisable), adaptable=True),
        **({"qkv_bias": Param((n, *heads), ("layer", *axes), init="zeros", decay=False)} if bias else {}),
        **({"q_norm": _norm(head, "head_dim", n), "k_norm": _norm(head, "head_dim", n)} if norms else {}),
        "out": Param(
            (n, kv, group, head, embed),
            ("layer", "kv_heads", None, "head_dim", "embed"),
            quantisable=3 * quantisable,
            adaptable=True,
        ),
        "mlp_norm": _norm(embed, "embed", n),
    }


def swiglu(n: int, embed: int, prefix: str, width: int, *, quantisable: bool = False) -> Schema:
    """A gated MLP of ``n`` layers; ``quantisable`` as for :func:`attention`."""
    one = int(quantisable)
    return {
        f"{prefix}_gate_up": Param((n, embed, 2, width), ("layer", "embed", None, "mlp"), quantisable=one, adaptable=True),
        f"{prefix}_down": Param((n, width, embed), ("layer", "mlp", "embed"), quantisable=one, adaptable=True),
    }


def mixture(n: int, embed: int, *, experts: int, width: int) -> Schema:
    """A router and its gated experts, of ``n`` layers."""
    return {
        "router": Param((n, embed, experts), ("layer", "embed", None)),
        "experts_gate_up": Param((n, experts, embed, 2 * width), ("layer", "expert", "embed", None), quantisable=1),
        "experts_down": Param((n, experts, width, embed), ("layer", "expert", None, "embed"), quantisable=1),
    }


def _norm(size: int, axis: str, n: int | None = None) -> Param:
    return Param((size,), (axis,), init="ones", decay=False) if n is None else Param((n, size), ("layer", axis), init="ones", decay=False)
