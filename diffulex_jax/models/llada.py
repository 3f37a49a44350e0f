"""LLaDA-8B and LLaDA-1.5 (arXiv 2502.09992): OLMo's network and names, with attention over the whole canvas."""

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


MASK_ID = 126_336  # <|mdm_mask|>
BLOCK = 128  # generate.py's default; the network knows no blocks


def model(raw: Mapping[str, Any], name: str) -> Model:
    """The network of a ``config.json`` mapping. ``name``, of its directory, tells nothing here."""
    del name
    c = LLaDAConfig.from_hf(raw)
    spec = ModelSpec(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        max_positions=c.max_sequence_length,
        mask_id=c.mask_token_id,
        eos_ids=c.eos_token_id,
        block_size=BLOCK,
        block_stated=False,
        strategy="llada",
        layers=LayerKind(c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.head_dim),
        attention=AttentionPolicy("whole", canvas="whole", cache="none"),
    )
    return Model(c, spec, schema(c), tuple(tensors(c)), functools.partial(layers, c), lambda params: params["lm_head"])


def layers(c: LLaDAConfig, params: Params, x: jax.Array, positions: jax.Array, ops: Ops) -> tuple[jax.Array, Any]:
    """All layers and the final norm. See ``models.base.Model.layers``."""
    table = rotary.table(positions, c.head_dim, c.rope_theta)
    norm = functools.partial(ops.norm, eps=c.rms_norm_eps)

    def layer(kind: str, i: jax.Array, at: At, x: jax.Array | Stream) -> tuple[jax.Array | Stream, Any]:
        p = params[kind]
        with jax.named_scope("attention"):
            x, h = norm(x, p["attn_norm"], i)
            out, fresh = ops.attend(at, ops.rotate(ops.linear(h, p["qkv"], i), table))
            x = ops.add(x, ops.linear(out, p["out"], i), "kv_heads")
        with jax.named_scope("mlp"):
            x, h = norm(x, p["mlp_norm"], i)
            return ops.add(x, ops.mlp(h, (p["mlp_gate_up"], p["mlp_down"]), i), "mlp"), fresh

    x, fresh = parts.run(layer, x, parts.spans(("dense",) * c.n_layers), ops)
    return rms_norm(x, params["norm"], c.rms_norm_eps), fresh


def schema(c: LLaDAConfig) -> dict[str, Any]:
    """The parameter tree."""
    group = c.n_heads // c.n_kv_heads
    attention = parts.attention(c.n_layers, c.d_model, kv=c.n_kv_heads, group=group, head=c.head_dim, norms=False, quantisable=True)
    dense = attention | parts.swiglu(c.n_layers, c.d_model, "mlp", c.mlp_hidden_size, quantisable=True)
    return parts.ends(c.vocab_size, c.d_model) | {"dense": dense}


def tensors(c: LLaDAConfig) -> Iterator[Tensor]:
    """The tensors of a checkpoint. ``ff_out`` is the output matrix, and in a layer the MLP's way down."""
    embed, kv, head, heads, width = c.d_model, c.n_kv_heads, c.head_dim, c.n_heads, c.mlp_hidden_size
    group = heads // kv
    ends = Names("model.transformer.")
    yield ends.same("wte.weight", "embed", (c.vocab_size, embed))
    for i in range(c.n_layers):
        n = Names(f"model.transformer.blocks.{i}.", "dense", i)
        yield n.same("attn_norm.weight", "attn_norm", (embed,))
        yield from n.heads("", kv=kv, group=group, head=head, embed=embed)
        yield n.tensor("attn_out.weight", (embed, heads * head), n.part("out", "d (kv g h) -> kv g h d", kv=kv, g=group))
        yield n.same("ff_norm.weight", "mlp_norm", (embed,))
        for half, name in enumerate(("ff_proj", "up_proj")):
            yield n.transposed(f"{name}.weight", "mlp_gate_up", (width, embed), at=(slice(None), half))
        yield n.transposed("ff_out.weight", "mlp_down", (embed, width))
    yield ends.same("ln_f.weight", "norm", (embed,))
    yield ends.same("ff_out.weight", "lm_head", (c.vocab_size, embed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLaDAConfig:
    """Shape of the network, named as in its Hugging Face ``config.json``."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    max_sequence_length: int
    rope_theta: float
    eos_token_id: tuple[int, ...]
    mask_token_id: int = MASK_ID
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        hf_config.positive(self, "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "max_sequence_length")
        hf_config.countable(self, layers="n_layers")
        hf_config.divides(self, "n_kv_heads", "n_heads")
        hf_config.divides(self, "n_heads", "d_model")
        if self.head_dim % 2:
            raise ValueError(f"config: n_heads={self.n_heads} of d_model={self.d_model} gives head_dim={self.head_dim}, which must be even")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> LLaDAConfig:
        """Reads a Hugging Face ``config.json`` mapping.

        Raises:
          ValueError: naming a missing key, or a key whose value asks for something this implementation does not do.
        """
        raw = {key: value for key, value in raw.items() if key not in _UNREAD and value is not None}
        raw.setdefault("n_kv_heads", raw.get("n_heads"))
        rows = raw.pop("embedding_size", raw.get("vocab_size"))
        if rows != raw.get("vocab_size"):
            raise ValueError(f"config: embedding_size={hf_config.shown(rows)} is not implemented; supported: that of vocab_size")
        return cls(**hf_config.read(cls, raw, ONLY))

    def to_hf(self, *, dtype: str = "bfloat16") -> dict[str, Any]:
        """The ``config.json`` mapping that :meth:`from_hf` reads back; ``dtype`` names the dtype of the stored weights."""
        return hf_config.written(self, ONLY, dtype=dtype) | {"embedding_size": self.vocab_size}


_UNREAD = frozenset(
    """
    alibi_bias_max attention_layer_norm_with_affine block_group_size flash_attention init_cutoff_factor init_device init_fn init_std
    mlp_ratio precision residual_dropout
    """.split()
)
"""OLMo's keys that change nothing here: training, how torch runs it, and what other keys stand in for or turn off."""

ONLY: hf_config.Only = {
    "model_type": ("llada",),
    "architectures": (["LLaDAModelLM"],),
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "rope": (True,),
    "rope_full_precision": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "input_emb_norm": (False,),
    "multi_query_attention": (None, False),
    "scale_logits": (False,),
    "weight_tying": (False,),
}
