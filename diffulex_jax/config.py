"""Static configuration: frozen, hashable, and strict about what it does not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a LLaDA2-MoE network (the Bailing-MoE-v2 family), named as in its Hugging Face ``config.json``."""

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
    mask_token_id: int
    eos_token_id: int
    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    partial_rotary_factor: float = 0.5
    rope_theta: float = 600_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32_768

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        _divides(self, "num_key_value_heads", "num_attention_heads")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace} must lie in [0, num_hidden_layers={self.num_hidden_layers}]"
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor} gives {self.rotary_dim} rotary dimensions; "
                f"need an even number up to head_dim={self.head_dim}"
            )
        if self.num_moe_layers:
            _positive(self, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
            _divides(self, "n_group", "num_experts")
            if self.topk_group > self.n_group:
                raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
            if self.num_experts_per_tok > self.topk_group * (self.num_experts // self.n_group):
                raise ValueError(
                    f"num_experts_per_tok={self.num_experts_per_tok} exceeds the experts in topk_group={self.topk_group} groups"
                )
        if self.num_dense_layers:
            _positive(self, "intermediate_size")
        for name in ("mask_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} is not an id of the vocabulary [0, {self.vocab_size})")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_dense_layers(self) -> int:
        return self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head (GQA group size)."""
        return self.num_attention_heads // self.num_key_value_heads

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face ``config.json`` mapping.

        Raises:
          ValueError: naming a missing key, or a key whose value asks for something this implementation does not do.
        """
        raw = dict(raw)
        rope = raw.get("rope_parameters") or {}
        for key in ("rope_theta", "partial_rotary_factor"):
            raw.setdefault(key, rope.get(key, _DEFAULTS[key]))
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"config: rope_parameters.rope_type={rope['rope_type']!r} is not implemented; only 'default' is")
        for key, allowed in _ONLY.items():
            if key in raw and raw[key] not in allowed:
                raise ValueError(f"config: {key}={raw[key]!r} is not implemented; supported: {', '.join(map(repr, allowed))}")
        for key, default in (("num_shared_experts", 1), ("head_dim", None)):
            if raw.get(key) is None:
                raw[key] = default if default is not None else raw["hidden_size"] // raw["num_attention_heads"]
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and raw.get(f.name) is None]
        if missing:
            raise ValueError(f"config: missing {', '.join(missing)}")
        if isinstance(raw["eos_token_id"], list):
            raw["eos_token_id"] = raw["eos_token_id"][0]
        config = cls(**{f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw})
        if raw.get("rotary_dim", config.rotary_dim) != config.rotary_dim:
            raise ValueError(
                f"config: rotary_dim={raw['rotary_dim']} contradicts "
                f"partial_rotary_factor={config.partial_rotary_factor} (head_dim {config.head_dim})"
            )
        return config

    def to_hf(self, *, dtype: str = "bfloat16") -> dict[str, Any]:
        """The ``config.json`` mapping that :meth:`from_hf` reads back; ``dtype`` names the dtype of the stored weights."""
        fixed = {key: allowed[0] for key, allowed in _ONLY.items()}
        return (
            fixed
            | dataclasses.asdict(self)
            | {
                "architectures": ["LLaDA2MoeModelLM"],
                "pad_token_id": self.eos_token_id,
                "rotary_dim": self.rotary_dim,
                "torch_dtype": dtype,
            }
        )


# Keys of config.json that change the computation, with the values implemented here (the first is the one written back).
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("llada2_moe",),
    "hidden_act": ("silu",),
    "use_bias": (False, None),
    "use_qkv_bias": (False, None),
    "use_qk_norm": (True, None),
    "use_rmsnorm": (True, None),
    "use_sliding_window": (False, None),
    "tie_word_embeddings": (False, None),
    "rope_scaling": (None,),
    "score_function": ("sigmoid", None),
    "router_dtype": ("fp32", "float32", None),
    "moe_router_enable_expert_bias": (True, None),
    "norm_head": (False, None),
    "norm_softmax": (False, None),
}
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ModelConfig)}


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}={getattr(config, name)} must be positive")


def _divides(config: Any, small: str, large: str) -> None:
    if getattr(config, large) % getattr(config, small):
        raise ValueError(f"{small}={getattr(config, small)} must divide {large}={getattr(config, large)}")
