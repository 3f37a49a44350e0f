"""The families of networks there are, by the ``model_type`` of a ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffulex_jax.models import hf_config, llada, llada2, llada_moe, qwen2, qwen3
from diffulex_jax.models.base import Model


def _llada(raw: Mapping[str, Any], name: str) -> Model:
    """LLaDA or LLaDA-MoE, which have one ``model_type``: the config of the one that has experts counts them."""
    return (llada_moe if "num_experts" in raw else llada).model(raw, name)


REGISTRY: dict[str, Callable[[Mapping[str, Any], str], Model]] = {
    "Dream": qwen2.dream,
    "Fast_dLLM_Qwen": qwen2.fast_dllm_v2,
    "llada2_moe": llada2.model,
    "llada": _llada,
    "lladamoe": llada_moe.model,
    "sdar": qwen3.model,
    "sdar_moe": qwen3.model,
}


def model_of(raw: Mapping[str, Any], *, name: str = "") -> Model:
    """The network that a ``config.json`` mapping describes.

    Args:
      raw: the mapping.
      name: of the model's directory or on the hub, which may tell what the mapping leaves out.

    Raises:
      ValueError: for a family that is not there, or a config that its family refuses.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in REGISTRY:
        raise ValueError(f"config: model_type={hf_config.shown(kind)} is not implemented; supported: {', '.join(map(repr, REGISTRY))}")
    return REGISTRY[kind](raw, name)
