"""What can be known to be wrong before a model is loaded and compiled."""

from __future__ import annotations

from collections.abc import Sequence


def through_template(model: str, prompts: Sequence[str]) -> list[list[int]]:
    """Puts each text through a model's chat template, as a user's message, and returns the token ids.

    Raises:
      ValueError: where there is no such model, or it has no tokenizer or no chat template.
    """
    from diffulex_jax.engine.tokenizer import Tokenizer
    from diffulex_jax.weights import checkpoint

    path = checkpoint.resolve(model)
    tokenizer = Tokenizer.load(path)
    if tokenizer is None:
        raise ValueError(f"--chat needs a tokenizer, and {path} holds none; give the prompt as --prompt-ids")
    return [tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]


def check(model: str, prompts: Sequence[str | list[int]]) -> None:
    """Refuses prompts that the model cannot take, by its small files alone.

    Raises:
      ValueError: naming the prompt, or the model, and what is wrong with it.
    """
    from diffulex_jax.engine.tokenizer import Tokenizer
    from diffulex_jax.weights import checkpoint

    path = checkpoint.resolve(model)
    if Tokenizer.load(path) is None and any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts as text need a tokenizer, and {path} holds none; give --prompt-ids")
