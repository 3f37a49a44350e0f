"""Recipes: a model, its data and its settings, each a page."""
