"""The Qwen2.5 network, whose output at a position speaks of the next one: Fast-dLLM v2 (arXiv 2509.26328), in blocks, and Dream
(arXiv 2508.15487) with Dream-Coder and DiffuCoder, over the whole canvas."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from diffulex_jax.models import hf_config
from diffulex_jax.models import layers as parts
from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.models.base import LayerKind, Model, ModelSpec, Params
from diffulex_jax.models.names import Names, Tensor
from diffulex_jax.models.ops import At, Ops, Stream
from pallas_kernels import rotary
from pallas_kernels.norm import rms_norm


MASK_ID = 151_665  # |<MASK>|; the configs of Fast-dLLM v2 on the hub do not say so
DREAM_MASK_ID = 151_666  # <|mask|>
DREAM_BLOCK = 512  # what Dream's README asks for at once; the network knows no blocks


def fast_dllm_v2(raw: Mapping[str, Any], name: str) -> Model:
    """The network of a Fast-dLLM v2 ``config.json`` mapping. ``name``, of its directory, tells nothing here."""
    del name
    c = FastDLLMConfig.from_hf(raw)
    spec = ModelSpec(
        **hf_config.sizes(c),
        block_size=c.bd_size,
        block_stated=True,
        layers=LayerKind(c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.head_dim),
        strategy="fast_dllm_v2",
        predicts="next",
    )
    return network(c, spec)


def dream(raw: Mapping[str, Any], name: str) -> Model:
    """The network of a Dream, Dream-Coder or DiffuCoder ``config.json`` mapping. ``name``, of its directory, tells nothing here."""
    del name
    c = DreamConfig.from_hf(raw)
    spec = ModelSpec(
        **hf_config.sizes(c),
        block_size=DREAM_BLOCK,
        block_stated=False,
        layers=LayerKind(c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.head_dim),
        strategy="dream",
        predicts="next",
        attention=AttentionPolicy("whole", canvas="whole", cache="none"),
    )
    return network(c, spec)


def network(c: Qwen2Config, spec: ModelSpec) -> Model:
    """The Qwen2 network of a config."""
    unread = ("lm_head.weight",) if c.tie_word_embeddings else ()
    return Model(c, spec, schema(c), tuple(tensors(c)), functools.partial(layers, c), parts.head, unread)


def layers(c: Qwen2Config, params: Params, x: jax.Array, positions: jax.Array, ops: Ops) -> tuple[jax.Array, Any]:
    """All layers and the final norm. See ``models.base.Model.layers``."""
    table = rotary.table(positions, c.head_dim, c.rope_theta)
    norm = functools.partial(ops.norm, eps=c.rms_norm_eps)
    p = params["dense"]

    def layer(kind: str, i: jax.Array, at: At, x: jax.Array | Stream) -> tuple[jax.Array | Stream, Any]:
        with jax.named_scope("attention"):
            x, h = norm(x, p["attn_norm"], i)
            out, fresh = ops.attend(at, ops.rotate(ops.linear(h, p["qkv"], i), table, bias=p["qkv_bias"][i]))
            x = ops.add(x, ops.linear(out, p["out"], i), "kv_heads")
        with jax.named_scope("mlp"):
            x, h = norm(x, p["mlp_norm"], i)
            return ops.add(x, ops.mlp(h, (p["mlp_gate_up"], p["mlp_down"]), i), "mlp"), fresh

    x, fresh = parts.run(layer, x, parts.spans(["dense"] * c.num_hidden_layers), ops)
    return rms_norm(x, params["norm"], c.rms_norm_eps), fresh


def schema(c: Qwen2Config) -> dict[str, Any]:
    """The parameter tree; without an output matrix where that is the embeddings'."""
    n, embed, kv = c.num_hidden_layers, c.hidden_size, c.num_key_value_heads
    group = c.num_attention_heads // kv
    heads = parts.attention(n, embed, kv=kv, group=group, head=c.head_dim, norms=False, bias=True, quantisable=True)
    mlp = parts.swiglu(n, embed, "mlp", c.intermediate_size, quantisable=True)
    return {**parts.ends(c.vocab_size, embed, tied=c.tie_word_embeddings), "dense": heads | mlp}


def tensors(c: Qwen2Config) -> Iterator[Tensor]:
    """The tensors of a checkpoint."""
    embed, kv, head = c.hidden_size, c.num_key_value_heads, c.head_dim
    group = c.num_attention_heads // kv
    yield Names().same("model.embed_tokens.weight", "embed", (c.vocab_size, embed))
    for i in range(c.num_hidden_layers):
        n = Names(f"model.layers.{i}.", "dense", i)
        yield n.same("input_layernorm.weight", "attn_norm", (embed,))
        yield from n.heads("self_attn.", kv=kv, group=group, head=head, embed=embed, bias=True)
        out = n.part("out", "d (kv g h) -> kv g h d", kv=kv, g=group)
        yield n.tensor("self_attn.o_proj.weight", (embed, c.num_attention_heads * head), out)
        yield n.same("post_attention_layernorm.weight", "mlp_norm", (embed,))
        yield from n.swiglu("mlp.", "mlp", width=c.intermediate_size, embed=embed)
    yield Names().same("model.norm.weight", "norm", (embed,))
    if not c.tie_word_embeddings:
        yield Names().same("lm_head.weight", "lm_head", (c.vocab_size, embed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config:
    """Shape of the network, named as in its Hugging Face ``config.json``. The biases of queries, keys and values are always there.

    Attributes:
      head_dim: 0 stands for ``hidden_size / num_attention_heads``, as configs leave it out.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    eos_token_id: tuple[int, ...]
    mask_token_id: int = MASK_ID
    head_dim: int = 0
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32_768
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        hf_config.positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        hf_config.positive(self, "num_attention_heads", "num_key_value_heads")
        hf_config.countable(self)
        hf_config.divides(self, "num_key_value_heads", "num_attention_heads")
        if self.head_dim == 0:
            hf_config.divides(self, "num_attention_heads", "hidden_size")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim < 0 or self.head_dim % 2:
            raise ValueError(f"config: head_dim={self.head_dim} must be positive and even")

    def to_hf(self, *, dtype: str = "bfloat16") -> dict[str, Any]:
        """The ``config.json`` mapping that ``from_hf`` reads back; ``dtype`` names the dtype of the stored weights."""
        return hf_config.written(self, self.only(), dtype=dtype)

    @classmethod
    def only(cls) -> hf_config.Only:
        """Keys that change the computation, with the values that are implemented."""
        return {"hidden_act": ("silu",), "use_sliding_window": (False,)}

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Any:
        """Reads a Hugging Face ``config.json`` mapping.

        Raises:
          ValueError: naming a missing key, or a key whose value asks for something this implementation does not do.
        """
        return cls(**hf_config.read(cls, raw, cls.only()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastDLLMConfig(Qwen2Config):
    """Fast-dLLM v2's. ``bd_size``: tokens of a block."""

    bd_size: int = 32

    @classmethod
    def only(cls) -> hf_config.Only:
        # How its training masked (sic), which decoding does not see.
        return {**super().only(), "architectures": (["Fast_dLLM_QwenForCausalLM"],), "conplemenrary_mask": (True, False)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamConfig(Qwen2Config):
    """Dream's. What its authors' class would fill in for a missing key is no checkpoint's, so that a config must say it."""

    mask_token_id: int = DREAM_MASK_ID
    rope_theta: float = dataclasses.field()
    rms_norm_eps: float = dataclasses.field()
    max_position_embeddings: int = dataclasses.field()

    @classmethod
    def only(cls) -> hf_config.Only:
        return {**super().only(), "architectures": (["DreamModel"],)}
