"""``python -m diffulex_jax``: the command line, where its script is not on the path."""

from diffulex_jax.cli import main


main()
