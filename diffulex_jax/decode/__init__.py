"""The decode step and the loop around it: pure functions of parameters, pool and state."""

from diffulex_jax.decode.denoise_step import step
from diffulex_jax.decode.loop import denoise, mixed_step
from diffulex_jax.decode.program import Program
from diffulex_jax.decode.prompts import Prompts, prefill


__all__ = ["Program", "Prompts", "denoise", "mixed_step", "prefill", "step"]
