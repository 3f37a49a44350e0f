"""LLaDA2-MoE as pure functions over a parameter pytree (arXiv 2512.15745; the Bailing-MoE-v2 / Ling-2.0 architecture).

Attention heads are kept grouped by key/value head throughout: ``qkv`` holds, for each of the ``KV`` key/value heads, its
``G`` query heads followed by one key and one value, so one matmul gives all three and sharding ``KV`` shards them together.

Letters in shapes: R rows, T tokens, D embed, KV key/value heads, G query heads per key/value head, H head_dim, E experts,
F expert hidden width, V vocabulary, L layers of one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.config import ModelConfig
from diffulex_jax.parallel.mesh import add_up
from pallas_kernels import expert_choice, grouped_matmul, linear


Params = dict[str, Any]
Attend = Callable[..., tuple[jax.Array, Any]]
"""``attend(layer, heads [R, T, KV, G + 2, H]) -> (out [R, T, KV, G, H], aux)``: the attention policy of the caller. ``heads`` are
queries, key and value of each key/value head, packed as ``qkv`` has them; ``layer`` is the index over all layers; ``aux`` comes
back stacked over layers. With leading tokens (see :func:`hidden`) it is called for them first, and then for the rest with
``before=heads`` of theirs; the first call's aux counts."""
Experts = Callable[..., jax.Array]
"""``experts(x [N, D], expert_ids [N, k], weights [N, k], gate_up [L, E, D, 2F], down [L, E, F, D], layer=i, valid=[N]) -> [N, D]``:
layer i of the stacked experts. They get the whole stack, because slicing a layer of it out would copy what only a part of is read."""


Times = Callable[[jax.Array, str], jax.Array]
"""``times(x, name)``: x, its last axes contracted, times a matrix of the current layer."""


# One entry per parameter: shape and logical axes. `parallel.mesh` maps the axes to the machine.
def schema(config: ModelConfig) -> dict[str, Any]:
    """The parameter tree as ``(shape, logical axes)`` leaves."""
    c = config
    embed, kv, group, head = c.hidden_size, c.num_key_value_heads, c.queries_per_kv, c.head_dim

    def layers(n: int, extra: dict[str, Any]) -> dict[str, Any]:
        common = {
            "attn_norm": ((n, embed), ("layer", "embed")),
            "qkv": ((n, embed, kv, group + 2, head), ("layer", "embed", "kv_heads", None, "head_dim")),
            "q_norm": ((n, head), ("layer", "head_dim")),
            "k_norm": ((n, head), ("layer", "head_dim")),
            "out": ((n, kv, group, head, embed), ("layer", "kv_heads", None, "head_dim", "embed")),
            "mlp_norm": ((n, embed), ("layer", "embed")),
        }
        return common | extra

    def mlp(n: int, prefix: str, width: int) -> dict[str, Any]:
        return {
            f"{prefix}_gate_up": ((n, embed, 2, width), ("layer", "embed", None, "mlp")),
            f"{prefix}_down": ((n, width, embed), ("layer", "mlp", "embed")),
        }

    n, experts, width = c.num_moe_layers, c.num_experts, c.moe_intermediate_size
    moe = {
        "router": ((n, embed, experts), ("layer", "embed", None)),
        "router_bias": ((n, experts), ("layer", None)),
        "experts_gate_up": ((n, experts, embed, 2 * width), ("layer", "expert", "embed", None)),
        "experts_down": ((n, experts, width, embed), ("layer", "expert", None, "embed")),
    }
    if c.num_shared_experts:
        moe |= mlp(n, "shared", width * c.num_shared_experts)
    tree: dict[str, Any] = {
        "embed": ((c.vocab_size, embed), (None, "embed")),  # on every device: looked up without an exchange
        "lm_head": ((c.vocab_size, embed), ("vocab", "embed")),
        "norm": ((embed,), ("embed",)),
    }
    if c.num_dense_layers:
        tree["dense"] = layers(c.num_dense_layers, mlp(c.num_dense_layers, "mlp", c.intermediate_size))
    if c.num_moe_layers:
        tree["moe"] = layers(n, moe)
    return tree


def is_leaf(node: Any) -> bool:
    """True for a ``(shape, axes)`` leaf of :func:`schema`."""
    return isinstance(node, tuple)


def init(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32, *, scale: float = 0.02) -> Params:
    """Random parameters: normal with deviation ``scale``, ones for norms, zeros for the router bias."""
    leaves, treedef = jax.tree.flatten_with_path(schema(config), is_leaf=is_leaf)

    def one(path: Any, leaf: Any, key: jax.Array) -> jax.Array:
        name, (shape, _) = path[-1].key, leaf
        if name == "router_bias":
            return jnp.zeros(shape, jnp.float32)
        if name.endswith("norm"):
            return jnp.ones(shape, dtype)
        return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [one(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)])


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Input embeddings ``[..., D]`` of token ids ``[...]``."""
    return params["embed"][tokens]


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """Vocabulary logits ``[..., V]`` in float32 of normalised hidden states ``[..., D]``."""
    with jax.named_scope("lm_head"):
        return jnp.einsum("...d,vd->...v", hidden, params["lm_head"], preferred_element_type=jnp.float32)


def hidden(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    positions: jax.Array,
    attend: Attend,
    *,
    leading: int = 0,
    valid: jax.Array | None = None,
    experts: Experts = grouped_matmul.expert_mlp,
    streamed: bool = False,
) -> tuple[jax.Array, Any]:
    """Runs all layers and the final norm.

    Args:
      params: see :func:`schema`.
      config: the model's shape.
      x: ``[R, T, D]`` input embeddings.
      positions: ``[R, T]`` int32 absolute positions, for RoPE.
      attend: the caller's attention policy.
      leading: this many first tokens of every row go through matmuls and attention of their own. So the others' results do
        not depend, to the bit, on whether there are any: a matmul's rounding may change with its shape.
      valid: ``[R, T]`` bool; False rows route to no expert (their output means nothing).
      experts: how the routed experts are computed; a token's result must not depend on the others.
      streamed: for a GPU, where in bfloat16 a token's last bits may depend on what else is there. A layer's weights are then read where
        they lie in the stack (``pallas_kernels.linear``) instead of sliced out of it, ``experts`` gets the shared expert to go along
        with the routed ones, experts are chosen without sorting, and only attention tells leading tokens from the others.

    Returns:
      ``(hidden [R, T, D], aux)``; ``aux`` has every leaf of the policy's aux stacked over all layers.
    """

    def both(a: jax.Array) -> tuple[jax.Array, ...]:
        return (a[:, :leading], a[:, leading:]) if leading else (a,)

    split = (lambda a: (a,)) if streamed else both
    tables = [rope_table(p, config) for p in split(positions)]
    valid = None if valid is None else valid.reshape(-1)
    eps = config.rms_norm_eps

    def join(parts: Sequence[jax.Array]) -> jax.Array:
        return jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]

    def attention(xs: Sequence[jax.Array], w: Params, times: Times, at: jax.Array) -> tuple[list[jax.Array], Any]:
        heads = [rotated_heads(times(rms_norm(x, w["attn_norm"], eps), "qkv"), w, config, t) for x, t in zip(xs, tables, strict=True)]
        if streamed:
            heads = list(both(heads[0]))
        out, aux = attend(at, heads[0])
        outs = [out] if len(heads) == 1 else [out, attend(at, heads[1], before=heads[0])[0]]
        if streamed:
            outs = [join(outs)]
        return [x + add_up(times(o, "out"), "kv_heads") for x, o in zip(xs, outs, strict=True)], aux

    def dense(hs: Sequence[jax.Array], w: Params, times: Times, layer: jax.Array) -> list[jax.Array]:
        return [gated(h, "mlp", times) for h in hs]

    def moe(hs: Sequence[jax.Array], w: Params, times: Times, layer: jax.Array) -> list[jax.Array]:
        stack, shared = params["moe"], config.num_shared_experts > 0
        along: dict[str, Any] = {}
        flat = join(hs).reshape(-1, hs[0].shape[-1])
        if streamed:
            chosen = expert_choice.choose(flat, w["router"], w["router_bias"], router, valid=valid, backend="gpu")
            ids, weights, along["counted"] = chosen
            along["shared"] = (stack["shared_gate_up"], stack["shared_down"]) if shared else None
        else:
            rows = (h.reshape(-1, h.shape[-1]) for h in hs)
            routed = [expert_choice.choose(h, w["router"], w["router_bias"], router, backend="sorted")[:2] for h in rows]
            parts = ([r.reshape(*h.shape[:2], -1) for r, h in zip(rs, hs, strict=True)] for rs in zip(*routed, strict=True))
            ids, weights = (join(rs).reshape(len(flat), -1) for rs in parts)
        y = experts(flat, ids, weights, stack["experts_gate_up"], stack["experts_down"], layer=layer, valid=valid, **along)
        ys = split(y.reshape(len(x), -1, y.shape[-1]))
        return [y + gated(h, "shared", times) for y, h in zip(ys, hs, strict=True)] if shared and not streamed else list(ys)

    router = expert_choice.Router(
        top_k=config.num_experts_per_tok,
        groups=config.n_group,
        kept=config.topk_group,
        normalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )
    first, auxes, xs = 0, [], list(split(x))
    for kind, mlp in (("dense", dense), ("moe", moe)):
        if kind not in params:
            continue

        def block(
            carry: tuple[jax.Array, list[jax.Array]], w: Params, kind: str = kind, mlp: Any = mlp, first: int = first
        ) -> tuple[tuple[jax.Array, list[jax.Array]], Any]:
            layer, xs = carry

            def times(x: jax.Array, name: str) -> jax.Array:
                return linear.linear(x, params[kind][name], layer, backend="gpu") if streamed else _contract(x, w[name])

            with jax.named_scope("attention"):
                xs, aux = attention(xs, w, times, first + layer)
            with jax.named_scope("mlp"):
                ys = mlp([rms_norm(x, w["mlp_norm"], eps) for x in xs], w, times, layer)
                return (layer + 1, [x + add_up(y, "mlp") for x, y in zip(xs, ys, strict=True)]), aux

        scanned = {leaf: w for leaf, w in params[kind].items() if not leaf.startswith("experts_")}
        # A GPU stands still for some microseconds wherever one turn of a loop ends; all turns in one would compile several times longer.
        (_, xs), aux = lax.scan(block, (jnp.int32(0), xs), scanned, unroll=2 if streamed else 1)
        first += len(scanned["attn_norm"])
        auxes.append(aux)
    aux = auxes[0] if len(auxes) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)
    return join([rms_norm(x, params["norm"], eps) for x in xs]), aux


def rotated_heads(qkv: jax.Array, w: Params, config: ModelConfig, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Queries and keys of ``qkv [R, T, KV, G + 2, H]`` normalised and rotated, packed as before; per-head RMSNorm comes before RoPE.

    All heads go through both together, which makes two kernels of it on a GPU; the values then are taken as they came.
    """
    group = config.queries_per_kv
    value = (jnp.arange(group + 2) == group + 1)[:, None]
    scale = jnp.concatenate([jnp.broadcast_to(w["q_norm"], (group, config.head_dim)), jnp.stack([w["k_norm"]] * 2)])
    normed = rms_norm(qkv, scale, config.rms_norm_eps)
    return jnp.where(value, qkv, rope(normed, *(t[:, :, None, None] for t in table)))


def gated(x: jax.Array, prefix: str, times: Times) -> jax.Array:
    """``silu(x Wg) * (x Wu)`` through ``{prefix}_down``; ``{prefix}_gate_up [D, 2, F]`` holds Wg and Wu."""
    h = times(x, f"{prefix}_gate_up")
    return times(jax.nn.silu(h[..., 0, :]) * h[..., 1, :], f"{prefix}_down")


def _contract(x: jax.Array, w: jax.Array) -> jax.Array:
    """Contracts the last axes of ``x [R, T, ...]`` with the first of ``w``."""
    axes = x.ndim - 2
    return jnp.tensordot(x, w, axes)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale


def rope_table(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines ``[R, T, rotary_dim]`` (float32) for rotate-half RoPE on the first ``rotary_dim`` dimensions."""
    exponent = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / config.rotary_dim
    angle = positions[..., None].astype(jnp.float32) / config.rope_theta**exponent
    return jnp.concatenate([jnp.cos(angle)] * 2, -1), jnp.concatenate([jnp.sin(angle)] * 2, -1)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first ``cos.shape[-1]`` dimensions of the last axis; the rest pass through."""
    dim = cos.shape[-1]
    r = x[..., :dim].astype(jnp.float32)
    half = jnp.concatenate([-r[..., dim // 2 :], r[..., : dim // 2]], -1)
    return jnp.concatenate([(r * cos + half * sin).astype(x.dtype), x[..., dim:]], -1)
