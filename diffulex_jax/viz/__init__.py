"""Pictures of decoding. They need matplotlib: ``pip install "diffulex-jax[viz]"``."""

try:
    from diffulex_jax.viz.comparison import compare
    from diffulex_jax.viz.denoising import canvas
except ModuleNotFoundError as error:
    raise ImportError('diffulex_jax.viz needs matplotlib: pip install "diffulex-jax[viz]"') from error


__all__ = ["canvas", "compare"]
