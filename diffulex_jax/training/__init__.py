"""Training of diffusion language models: objectives, an optax trainer, and recipes."""
