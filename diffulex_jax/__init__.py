"""Diffusion language models (LLaDA2, DMax and their kin) decoded and served in JAX.

Names are imported when they are first used: ``import diffulex_jax`` alone does not import JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffulex_jax import lazy


if TYPE_CHECKING:
    from diffulex_jax.engine.config import EngineConfig
    from diffulex_jax.engine.engine import Engine
    from diffulex_jax.engine.results import Output
    from diffulex_jax.engine.scoring import BlockConditional, MonteCarlo, StepMap
    from diffulex_jax.errors import SettingError
    from diffulex_jax.rules import Rule, chain, stateless
    from diffulex_jax.sampling_params import SamplingParams
    from diffulex_jax.strategies import Strategy
    from diffulex_jax.version import __version__


__all__ = [
    "BlockConditional",
    "Engine",
    "EngineConfig",
    "MonteCarlo",
    "Output",
    "Rule",
    "SamplingParams",
    "SettingError",
    "StepMap",
    "Strategy",
    "__version__",
    "chain",
    "stateless",
]

__getattr__ = lazy.names(
    __name__,
    {
        "BlockConditional": "diffulex_jax.engine.scoring",
        "Engine": "diffulex_jax.engine.engine",
        "EngineConfig": "diffulex_jax.engine.config",
        "MonteCarlo": "diffulex_jax.engine.scoring",
        "Output": "diffulex_jax.engine.results",
        "Rule": "diffulex_jax.rules",
        "SamplingParams": "diffulex_jax.sampling_params",
        "SettingError": "diffulex_jax.errors",
        "StepMap": "diffulex_jax.engine.scoring",
        "Strategy": "diffulex_jax.strategies",
        "__version__": "diffulex_jax.version",
        "chain": "diffulex_jax.rules",
        "stateless": "diffulex_jax.rules",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
