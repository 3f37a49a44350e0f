"""Diffusion language models (LLaDA2, DMax and their kin) decoded and served in JAX."""

from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.engine import Engine
from diffulex_jax.engine.results import Output
from diffulex_jax.rules import Rule, chain, stateless
from diffulex_jax.sampling_params import SamplingParams


__all__ = ["Engine", "EngineConfig", "Output", "Rule", "SamplingParams", "chain", "stateless"]
