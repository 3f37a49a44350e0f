"""The decode step and the loop around it: pure functions of parameters, pool and state."""

from diffulex_jax.decode.forward import prefill
from diffulex_jax.decode.loop import denoise, step
from diffulex_jax.decode.program import Program


__all__ = ["Program", "denoise", "prefill", "step"]
