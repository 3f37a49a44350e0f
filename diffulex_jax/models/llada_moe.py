"""LLaDA-MoE (inclusionAI/LLaDA-MoE-7B-A1B): the layers of Qwen3-MoE, with attention over the whole canvas."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from diffulex_jax.models import hf_config
from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.models.base import LayerKind, Model, ModelSpec
from diffulex_jax.models.qwen3_layers import layers, schema, tensors


MASK_ID = 156_895
BLOCK = 128  # as LLaDA's generate.py; the network knows no blocks


def model(raw: Mapping[str, Any], name: str) -> Model:
    """The network of a ``config.json`` mapping. ``name``, of its directory, tells nothing here."""
    del name
    c = LLaDAMoEConfig.from_hf(raw)
    spec = ModelSpec(
        **hf_config.sizes(c),
        block_size=BLOCK,
        block_stated=False,
        strategy="llada",
        layers=LayerKind(c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.head_dim),
        experts_per_token=c.num_experts_per_tok,
        attention=AttentionPolicy("whole", canvas="whole", cache="none"),
    )
    return Model(c, spec, schema(c), tuple(tensors(c)), functools.partial(layers, c), lambda params: params["lm_head"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLaDAMoEConfig:
    """Shape of the network, named as in its Hugging Face ``config.json``. It is a :class:`qwen3_layers.Shape`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    expert_intermediate_size: int
    eos_token_id: tuple[int, ...]
    rope_theta: float
    mask_token_id: int = MASK_ID
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        hf_config.positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        hf_config.positive(self, "num_experts", "num_experts_per_tok", "expert_intermediate_size", "max_position_embeddings")
        hf_config.countable(self)
        hf_config.divides(self, "num_key_value_heads", "num_attention_heads")
        hf_config.divides(self, "num_attention_heads", "hidden_size")
        if self.head_dim % 2:
            raise ValueError(
                f"config: num_attention_heads={self.num_attention_heads} of hidden_size={self.hidden_size} gives "
                f"head_dim={self.head_dim}, which must be even"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"config: num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer."""
        return ("moe",) * self.num_hidden_layers

    @property
    def moe_intermediate_size(self) -> int:
        return self.expert_intermediate_size

    @property
    def intermediate_size(self) -> int:
        """Of dense layers, of which there are none."""
        return 0

    @property
    def norm_topk_prob(self) -> bool:
        """The network never divides a token's weights by their sum, whatever its config says."""
        return False

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> LLaDAMoEConfig:
        """Reads a Hugging Face ``config.json`` mapping.

        Raises:
          ValueError: naming a missing key, or a key whose value asks for something this implementation does not do.
        """
        raw = {key: value for key, value in raw.items() if key not in _UNREAD}
        kinds = raw.pop("moe_layer_freq", None)
        config = cls(**hf_config.read(cls, raw, ONLY))
        if kinds not in (None, [1] * config.num_hidden_layers):
            raise ValueError(f"config: moe_layer_freq={hf_config.shown(kinds)} is not implemented; supported: 1 for every layer")
        return config

    def to_hf(self, *, dtype: str = "bfloat16") -> dict[str, Any]:
        """The ``config.json`` mapping that :meth:`from_hf` reads back; ``dtype`` names the dtype of the stored weights."""
        return hf_config.written(self, ONLY, dtype=dtype) | {"moe_layer_freq": [1] * self.num_hidden_layers}


_UNREAD = frozenset({"dense_intermediate_size", "norm_topk_prob"})
"""Keys that its network does not read: there are no dense layers, and no division of weights."""

ONLY: hf_config.Only = {
    "model_type": ("llada", "lladamoe"),
    "architectures": (["LLaDAMoEModelLM"],),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "clip_qkv": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_score_function": ("softmax",),
    "partial_rotary_factor": (1,),
    "qk_layernorm": (True,),
    "rope_scaling": (None,),
    "routed_scaling_factor": (1.0,),
    "router_num_group": (None, 1),
    "router_topk_group": (None, 1),
    "shared_expert_intermediate_size": (None, 0),
    "tie_word_embeddings": (False,),
}
