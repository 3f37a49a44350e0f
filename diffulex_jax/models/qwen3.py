"""SDAR, SDAR-MoE and TraDo: block diffusion on the Qwen3 and Qwen3-MoE networks (JetAstra/SDAR)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from diffulex_jax.models import hf_config
from diffulex_jax.models.base import LayerKind, Model, ModelSpec
from diffulex_jax.models.qwen3_layers import layers, schema, tensors


MASK_ID = 151_669  # <|MASK|>; the configs on the hub do not say so
BLOCK = 4  # of checkpoints whose name ends in no -b8, -b16, -b32 or -b64; the configs on the hub name none


def model(raw: Mapping[str, Any], name: str) -> Model:
    """The network of a ``config.json`` mapping; ``name``, of its directory or on the hub, may end in its block size: ``"-b32"``."""
    c = SDARConfig.from_hf(raw)
    in_name = re.search(r"-b(\d+)$", name)
    stated = c.block_size or (int(in_name[1]) if in_name else None)
    spec = ModelSpec(
        **hf_config.sizes(c),
        block_size=stated or BLOCK,
        block_stated=stated is not None,
        strategy="sdar",
        layers=LayerKind(c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.head_dim),
        experts_per_token=c.num_experts_per_tok if "moe" in c.kinds else 0,
    )
    return Model(c, spec, schema(c), tuple(tensors(c)), functools.partial(layers, c), lambda params: params["lm_head"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDARConfig:
    """Shape of the network, named as in its Hugging Face ``config.json``; a dense one has no experts."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    eos_token_id: tuple[int, ...]
    intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    mask_token_id: int = MASK_ID
    block_size: int = 0
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32_768

    def __post_init__(self) -> None:
        hf_config.positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        hf_config.positive(self, "decoder_sparse_step")
        hf_config.countable(self)
        hf_config.divides(self, "num_key_value_heads", "num_attention_heads")
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim={self.head_dim} must be even")
        if "dense" in self.kinds:
            hf_config.positive(self, "intermediate_size")
        if "moe" in self.kinds:
            hf_config.positive(self, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
            if self.num_experts_per_tok > self.num_experts:
                raise ValueError(f"config: num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer: ``"dense"`` or ``"moe"``."""
        if self.model_type == "sdar":
            return ("dense",) * self.num_hidden_layers
        sparse = ((i + 1) % self.decoder_sparse_step == 0 and i not in self.mlp_only_layers for i in range(self.num_hidden_layers))
        return tuple("moe" if is_sparse else "dense" for is_sparse in sparse)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> SDARConfig:
        """Reads a Hugging Face ``config.json`` mapping.

        Raises:
          ValueError: naming a missing key, or a key whose value asks for something this implementation does not do.
        """
        return cls(**hf_config.read(cls, raw, ONLY))

    def to_hf(self, *, dtype: str = "bfloat16") -> dict[str, Any]:
        """The ``config.json`` mapping that :meth:`from_hf` reads back; ``dtype`` names the dtype of the stored weights."""
        return hf_config.written(self, ONLY, dtype=dtype) | {"architectures": [ARCHITECTURES[self.model_type]]}


ARCHITECTURES = {"sdar": "SDARForCausalLM", "sdar_moe": "SDARMoeForCausalLM"}
ONLY: hf_config.Only = {
    "architectures": tuple([name] for name in ARCHITECTURES.values()),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "tie_word_embeddings": (False,),
}
