"""What a request returns."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class TraceStep:
    """What one denoise step made of the window.

    Attributes:
      start: absolute position of the window's first token.
      tokens: ``[W]`` int32, W = window blocks x B.
      masked: ``[W]`` bool.
      confidence: ``[W]`` float32, probability of each token when it was last written; 0 where masked.
      revised: ``[W]`` bool, filled tokens that this step changed.
      remasked: ``[W]`` bool, filled tokens that this step masked again.
    """

    start: int
    tokens: np.ndarray
    masked: np.ndarray
    confidence: np.ndarray
    revised: np.ndarray
    remasked: np.ndarray


class Progress(NamedTuple):
    """What is known of a request that has not finished.

    Attributes:
      tokens: generated tokens that can no longer change; the list grows, nothing in it is taken back. Stop texts may yet cut it.
      nfe, revised_tokens, remasked_tokens, seed: see :class:`Output`.
      trace: the window after every step so far, where asked for.
    """

    tokens: list[int]
    nfe: int
    revised_tokens: int
    remasked_tokens: int
    trace: list[TraceStep] | None
    seed: int


@dataclasses.dataclass(frozen=True)
class Output:
    """One finished request.

    Attributes:
      text: the tokens as text; None where the model has no tokenizer.
      token_ids: generated tokens, without the EOS that ended them; never a mask.
      finish_reason: ``"stop"`` (EOS, a stop token or a stop text), ``"length"`` (max_tokens), ``"max_nfe"`` (or fewer than
        min_tokens_per_forward), ``"repetition"``, ``"abort"``, or ``"error"`` (the model gave something that is not a number; the
        tokens are those settled before).
      nfe: forwards this request took part in, prompt prefill not counted.
      revised_tokens: how often a filled token was changed.
      remasked_tokens: how often a filled token was masked again.
      prompt_token_ids: the prompt as the model saw it.
      seconds: from when the request first entered a slot until it left, waiting after a preemption included; 0 where it never did.
      queue_seconds: from when it was queued until it first entered a slot, or left without.
      first_block_seconds: from when it first entered a slot until its first tokens were final; None where none ever were.
      seed: of its random key: the one given, or the one drawn. Asked for again (with ``n=1``) it gives this output again.
      logprobs: log probability of each token when it was accepted (or last revised), where asked for.
      step_map: for each token, the forward (from 1) that first accepted it and the one that last wrote it, where asked for;
        ``(0, 0)`` for pinned tokens.
      trace: the window after every step, where asked for.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str
    nfe: int
    revised_tokens: int
    remasked_tokens: int
    prompt_token_ids: list[int]
    seconds: float
    queue_seconds: float
    first_block_seconds: float | None
    seed: int
    logprobs: list[float] | None = None
    step_map: list[tuple[int, int]] | None = None
    trace: list[TraceStep] | None = None

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens per forward; 0 before the first."""
        return len(self.token_ids) / self.nfe if self.nfe else 0.0
