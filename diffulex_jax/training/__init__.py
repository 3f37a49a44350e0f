"""Training of the embedded model: generated tasks, block-diffusion and on-policy uniform losses, an optax trainer."""
