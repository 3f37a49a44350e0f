"""What a model takes on machines that need not be there: :func:`diffulex_jax.planning.plan.plan`."""
