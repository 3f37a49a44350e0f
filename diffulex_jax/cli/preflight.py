"""What can be known to be wrong before a model is loaded and compiled."""

from __future__ import annotations

from collections.abc import Sequence

from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.sampling_params import SamplingParams


Prompt = str | list[int]


def prepare(
    model: str, strategy: str | None, prompts: Sequence[Prompt], *, chat: bool, sampling: SamplingParams, settings: EngineConfig
) -> list[Prompt]:
    """Returns the prompts as the engine is to take them, each checked by the small files of the model.

    Args:
      model: as for ``Engine.from_pretrained``.
      strategy: likewise.
      prompts: texts or token ids.
      chat: put texts through the chat template, each as a user's message.
      sampling: settings of every prompt.
      settings: the engine's.

    Raises:
      ValueError: for a model, a strategy, a setting or a prompt that will not do, naming it.
    """
    from diffulex_jax.engine.admission import check
    from diffulex_jax.engine.build import limits_of

    limits, chosen = limits_of(model, strategy, settings)
    if limits.tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts as text need a tokenizer, and model {model!r} holds none; give --prompt-ids")
    if chat and limits.tokenizer is not None:
        prompts = [limits.tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    for i, prompt in enumerate(prompts):
        check(limits, prompt, sampling.resolve(chosen.defaults), name=f"prompt {i}")
    return list(prompts)
