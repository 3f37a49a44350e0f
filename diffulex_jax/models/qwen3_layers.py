"""The layers of Qwen3 and Qwen3-MoE, their parameters and names: the network of SDAR and of LLaDA-MoE."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Protocol

import jax

from diffulex_jax.models import layers as parts
from diffulex_jax.models.base import Params
from diffulex_jax.models.names import Names, Tensor
from diffulex_jax.models.ops import At, Ops, Stream
from pallas_kernels import rotary
from pallas_kernels.expert_choice import Router
from pallas_kernels.norm import rms_norm
from pallas_kernels.rotary import HeadNorms


def layers(c: Shape, params: Params, x: jax.Array, positions: jax.Array, ops: Ops) -> tuple[jax.Array, Any]:
    """All layers and the final norm. See ``models.base.Model.layers``."""
    table = rotary.table(positions, c.head_dim, c.rope_theta)
    norm = functools.partial(ops.norm, eps=c.rms_norm_eps)
    router = Router(top_k=c.num_experts_per_tok, score="softmax", normalise=c.norm_topk_prob)

    def layer(kind: str, i: jax.Array, at: At, x: jax.Array | Stream) -> tuple[jax.Array | Stream, Any]:
        p = params[kind]
        with jax.named_scope("attention"):
            x, h = norm(x, p["attn_norm"], i)
            norms = HeadNorms(p["q_norm"], p["k_norm"], i, c.rms_norm_eps)
            out, fresh = ops.attend(at, ops.rotate(ops.linear(h, p["qkv"], i), table, norms))
            x = ops.add(x, ops.linear(out, p["out"], i), "kv_heads")
        with jax.named_scope("mlp"):
            x, h = norm(x, p["mlp_norm"], i)
            y = ops.experts(h, p, i, router) if kind == "moe" else ops.mlp(h, (p["mlp_gate_up"], p["mlp_down"]), i)
            return ops.add(x, y, "mlp"), fresh

    x, fresh = parts.run(layer, x, parts.spans(c.kinds), ops)
    return rms_norm(x, params["norm"], c.rms_norm_eps), fresh


def schema(c: Shape) -> dict[str, Any]:
    """The parameter tree: the layers of each kind, dense or with experts, in a stack of their own."""
    tree: dict[str, Any] = parts.ends(c.vocab_size, c.hidden_size)
    group, alone = c.num_attention_heads // c.num_key_value_heads, "moe" not in c.kinds
    heads: dict[str, Any] = {"kv": c.num_key_value_heads, "group": group, "head": c.head_dim, "quantisable": alone}
    mlps = {
        "dense": lambda n: parts.swiglu(n, c.hidden_size, "mlp", c.intermediate_size, quantisable=alone),
        "moe": lambda n: parts.mixture(n, c.hidden_size, experts=c.num_experts, width=c.moe_intermediate_size),
    }
    for kind, mlp in mlps.items():
        if n := c.kinds.count(kind):
            tree[kind] = parts.attention(n, c.hidden_size, **heads) | mlp(n)
    return tree


def tensors(c: Shape) -> Iterator[Tensor]:
    """The tensors of a checkpoint."""
    embed, kv, head, heads = c.hidden_size, c.num_key_value_heads, c.head_dim, c.num_attention_heads
    group = heads // kv
    yield Names().same("model.embed_tokens.weight", "embed", (c.vocab_size, embed))
    for i, kind in enumerate(c.kinds):
        n = Names(f"model.layers.{i}.", kind, c.kinds[:i].count(kind))
        yield n.same("input_layernorm.weight", "attn_norm", (embed,))
        yield from n.heads("self_attn.", kv=kv, group=group, head=head, embed=embed)
        yield n.same("self_attn.q_norm.weight", "q_norm", (head,))
        yield n.same("self_attn.k_norm.weight", "k_norm", (head,))
        yield n.tensor("self_attn.o_proj.weight", (embed, heads * head), n.part("out", "d (kv g h) -> kv g h d", kv=kv, g=group))
        yield n.same("post_attention_layernorm.weight", "mlp_norm", (embed,))
        if kind == "dense":
            yield from n.swiglu("mlp.", "mlp", width=c.intermediate_size, embed=embed)
        else:
            yield n.transposed("mlp.gate.weight", "router", (c.num_experts, embed))
            yield from n.experts("mlp.experts.", count=c.num_experts, width=c.moe_intermediate_size, embed=embed)
    yield Names().same("model.norm.weight", "norm", (embed,))
    yield Names().same("lm_head.weight", "lm_head", (c.vocab_size, embed))


class Shape(Protocol):
    """What the layers, the schema and the checkpoint names read of a config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def norm_topk_prob(self) -> bool: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def kinds(self) -> tuple[str, ...]: ...
