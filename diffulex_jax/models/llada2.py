"""LLaDA2-MoE (arXiv 2512.15745; the Bailing-MoE-v2 / Ling-2.0 architecture): its config, network and checkpoint names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from diffulex_jax.models import hf_config
from diffulex_jax.models import layers as parts
from diffulex_jax.models.base import LayerKind, Model, ModelSpec, Param, Params
from diffulex_jax.models.layers import Span
from diffulex_jax.models.names import Names, Tensor
from diffulex_jax.models.ops import At, Ops, Stream
from pallas_kernels import rotary
from pallas_kernels.expert_choice import Router
from pallas_kernels.norm import rms_norm
from pallas_kernels.rotary import HeadNorms


BLOCK = 32  # tokens of a block of every published checkpoint; only LLaDA2.2's config says so
MASK_ID = 156_895  # of every published checkpoint; few configs say so


def model(raw: Mapping[str, Any], name: str) -> Model:
    """The network of a ``config.json`` mapping. ``name``, of its directory, tells nothing here."""
    del name
    c = LLaDA2Config.from_hf(raw)
    spec = ModelSpec(
        **hf_config.sizes(c),
        block_size=c.block_size or BLOCK,
        block_stated=c.block_size > 0,
        strategy="llada2",
        routing_block=(c.block_size or BLOCK) if c.expert_capacity else 0,
        layers=LayerKind(c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rotary_dim),
        experts_per_token=c.num_experts_per_tok,
    )
    return Model(c, spec, schema(c), tuple(tensors(c)), functools.partial(layers, c), lambda params: params["lm_head"])


def layers(c: LLaDA2Config, params: Params, x: jax.Array, positions: jax.Array, ops: Ops) -> tuple[jax.Array, Any]:
    """All layers and the final norm. See ``models.base.Model.layers``."""
    table = rotary.table(positions, c.rotary_dim, c.rope_theta)
    norm = functools.partial(ops.norm, eps=c.rms_norm_eps)
    router = Router(top_k=c.num_experts_per_tok, normalise=c.norm_topk_prob, scale=c.routed_scaling_factor)
    if c.expert_capacity:  # LLaDA2.2 states groups too, and does not use them
        router = router._replace(capacity=c.expert_capacity, block=c.block_size or BLOCK)
    else:
        router = router._replace(groups=c.n_group, kept=c.topk_group)

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

    x, fresh = parts.run(layer, x, c.spans, ops)
    return rms_norm(x, params["norm"], c.rms_norm_eps), fresh


def schema(c: LLaDA2Config) -> dict[str, Any]:
    """The parameter tree: dense layers first, then those with experts."""
    alone = c.first_k_dense_replace == c.num_hidden_layers
    attention = functools.partial(
        parts.attention, embed=c.hidden_size, kv=c.num_key_value_heads, group=c.queries_per_kv, head=c.head_dim, quantisable=alone
    )
    tree: dict[str, Any] = parts.ends(c.vocab_size, c.hidden_size)
    if n := c.first_k_dense_replace:
        tree["dense"] = attention(n) | parts.swiglu(n, c.hidden_size, "mlp", c.intermediate_size, quantisable=alone)
    if n := c.num_hidden_layers - c.first_k_dense_replace:
        tree["moe"] = attention(n) | parts.mixture(n, c.hidden_size, experts=c.num_experts, width=c.moe_intermediate_size)
        tree["moe"]["router_bias"] = Param((n, c.num_experts), ("layer", None), init="zeros", dtype="float32", decay=False)
        if c.num_shared_experts:
            tree["moe"] |= parts.swiglu(n, c.hidden_size, "shared", c.moe_intermediate_size * c.num_shared_experts)
    return tree


def tensors(c: LLaDA2Config) -> Iterator[Tensor]:
    """The tensors of a checkpoint."""
    embed, kv, group, head, heads = c.hidden_size, c.num_key_value_heads, c.queries_per_kv, c.head_dim, c.num_attention_heads
    yield Names().same("model.word_embeddings.weight", "embed", (c.vocab_size, embed))
    for i in range(c.num_hidden_layers):
        dense = i < c.first_k_dense_replace
        n = Names(f"model.layers.{i}.", "dense" if dense else "moe", i if dense else i - c.first_k_dense_replace)
        yield n.same("input_layernorm.weight", "attn_norm", (embed,))
        yield n.tensor(
            "attention.query_key_value.weight",
            ((heads + 2 * kv) * head, embed),
            n.part("qkv", "(kv g h) d -> d kv g h", at=(..., slice(group), slice(None)), rows=slice(heads * head), kv=kv, g=group),
            n.part("qkv", "(kv h) d -> d kv h", at=(..., group, slice(None)), rows=slice(heads * head, (heads + kv) * head), kv=kv),
            n.part("qkv", "(kv h) d -> d kv h", at=(..., group + 1, slice(None)), rows=slice((heads + kv) * head, None), kv=kv),
        )
        yield n.same("attention.query_layernorm.weight", "q_norm", (head,))
        yield n.same("attention.key_layernorm.weight", "k_norm", (head,))
        yield n.tensor("attention.dense.weight", (embed, heads * head), n.part("out", "d (kv g h) -> kv g h d", kv=kv, g=group))
        yield n.same("post_attention_layernorm.weight", "mlp_norm", (embed,))
        if dense:
            yield from n.swiglu("mlp.", "mlp", width=c.intermediate_size, embed=embed)
            continue
        yield n.transposed("mlp.gate.weight", "router", (c.num_experts, embed))
        yield n.same("mlp.gate.expert_bias", "router_bias", (c.num_experts,))
        yield from n.experts("mlp.experts.", count=c.num_experts, width=c.moe_intermediate_size, embed=embed)
        if c.num_shared_experts:
            yield from n.swiglu("mlp.shared_experts.", "shared", width=c.moe_intermediate_size * c.num_shared_experts, embed=embed)
    yield Names().same("model.norm.weight", "norm", (embed,))
    yield Names().same("lm_head.weight", "lm_head", (c.vocab_size, embed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLaDA2Config:
    """Shape of the network, named as in its Hugging Face ``config.json``.

    With ``expert_capacity`` (LLaDA2.2) the tokens of a block choose their experts together, and the groups mean nothing.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_group: int
    topk_group: int
    eos_token_id: tuple[int, ...]
    mask_token_id: int = MASK_ID
    block_size: int = 0
    expert_capacity: int = 0
    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    partial_rotary_factor: float = 0.5
    rope_theta: float = 600_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32_768

    def __post_init__(self) -> None:
        hf_config.positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        hf_config.countable(self)
        hf_config.divides(self, "num_key_value_heads", "num_attention_heads")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ValueError(
                f"config: first_k_dense_replace={self.first_k_dense_replace} must lie in [0, num_hidden_layers={self.num_hidden_layers}]"
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"config: partial_rotary_factor={self.partial_rotary_factor} gives {self.rotary_dim} rotary dimensions; "
                f"need an even number up to head_dim={self.head_dim}"
            )
        if self.first_k_dense_replace < self.num_hidden_layers:
            hf_config.positive(self, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
            self._check_routing()
        if self.first_k_dense_replace:
            hf_config.positive(self, "intermediate_size")

    def _check_routing(self) -> None:
        if self.expert_capacity:
            if not self.num_experts_per_tok <= self.expert_capacity <= self.num_experts:
                raise ValueError(
                    f"config: expert_capacity={self.expert_capacity} must lie between "
                    f"num_experts_per_tok={self.num_experts_per_tok} and num_experts={self.num_experts}"
                )
            return
        hf_config.positive(self, "n_group", "topk_group")
        hf_config.divides(self, "n_group", "num_experts")
        if self.topk_group > self.n_group:
            raise ValueError(f"config: topk_group={self.topk_group} exceeds n_group={self.n_group}")
        if self.num_experts_per_tok > self.topk_group * (self.num_experts // self.n_group):
            raise ValueError(
                f"config: num_experts_per_tok={self.num_experts_per_tok} exceeds the experts in topk_group={self.topk_group} groups"
            )

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head (GQA group size)."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def spans(self) -> tuple[Span, ...]:
        """Layers of a kind that follow each other."""
        dense = self.first_k_dense_replace
        return parts.spans(["dense"] * dense + ["moe"] * (self.num_hidden_layers - dense))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> LLaDA2Config:
        """Reads a Hugging Face ``config.json`` mapping.

        Raises:
          ValueError: naming a missing key, or a key whose value asks for something this implementation does not do.
        """
        raw = dict(raw)
        rotary_dim = raw.pop("rotary_dim", None)
        width, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
        if raw.get("head_dim") is None and isinstance(width, int) and isinstance(heads, int) and heads:
            raw["head_dim"] = width // heads
        config = cls(**hf_config.read(cls, raw, ONLY))
        if rotary_dim not in (None, config.rotary_dim):
            raise ValueError(
                f"config: rotary_dim={hf_config.shown(rotary_dim)} contradicts partial_rotary_factor={config.partial_rotary_factor} "
                f"(head_dim {config.head_dim})"
            )
        return config

    def to_hf(self, *, dtype: str = "bfloat16") -> dict[str, Any]:
        """The ``config.json`` mapping that :meth:`from_hf` reads back; ``dtype`` names the dtype of the stored weights."""
        raw = hf_config.written(self, ONLY, dtype=dtype) | {"rotary_dim": self.rotary_dim}
        # Other readers route by blocks wherever the key is there, whatever it says.
        return {key: value for key, value in raw.items() if value or key not in ("block_size", "expert_capacity")}


ONLY: hf_config.Only = {
    "model_type": ("llada2_moe",),
    "architectures": (["LLaDA2MoeModelLM"],),
    "hidden_act": ("silu",),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "use_qk_norm": (True,),
    "use_rmsnorm": (True,),
    "use_sliding_window": (False,),
    "tie_word_embeddings": (False,),
    "score_function": ("sigmoid",),
    "router_dtype": ("fp32", "float32"),
    "moe_router_enable_expert_bias": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "sliding_window": (None, 4096),  # what the config's class writes beside use_sliding_window=false
    "delete_token_id": (None, 156_930),  # of LLaDA2.2, which rules.levenshtein reads
    "split_token_id": (None, 156_931),
}
