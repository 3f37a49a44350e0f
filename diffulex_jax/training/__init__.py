"""Training of diffusion language models: objectives, recipes, and one optax trainer that runs any of them.

    from diffulex_jax.training import recipe, trainer
    trained = trainer.train(recipe.changed(recipe.find("embedded"), steps=100))

``diffulex-jax train RECIPE --out DIR`` does it from the command line and writes a model.
"""
