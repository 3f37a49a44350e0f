"""Per-request settings."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded. Requests with different settings share a batch.

    Attributes:
      max_tokens: real tokens to generate: exactly that many, unless EOS comes first.
      temperature: 0 is greedy; above 0 tokens are drawn from softmax(logits / temperature).
      top_p: (temperature > 0) keep the smallest set of tokens whose probability reaches this; 1 keeps all.
      top_k: (temperature > 0) keep this many tokens; 0 keeps all.
      seed: of the request's own random key; the same seed gives the same tokens in any batch.
      ignore_eos: go on after EOS, to ``max_tokens``.
      max_nfe: most forwards to spend; the contiguous decoded prefix is returned then. None: no limit.
      accept_threshold: a mask is filled when its prediction is more probable than this; 1 or more never accepts by threshold, so
        ``num_to_transfer`` masks are filled a step.
      num_to_transfer: masks filled per block and step at the least (``llada2``, ``llada2_edit``).
      edit_threshold: (``llada2_edit``) a filled token is replaced by a different prediction more probable than this; 0 replaces
        every one.
      max_post_edit_steps: (``llada2_edit``) steps spent on a block after its last mask was filled.
      remask_threshold: a filled token less probable than this in the current prediction is masked again; 0 turns it off.
      settle_threshold: (``dmax``) a block ends once every generated position is at least this probable.
      add_block_threshold: (``buffer_size`` above 1) the next block starts once this share of the last one is filled.
      token_stability_threshold: (``buffer_size`` above 1) and this share of its filled tokens kept their value in the step.
      semi_complete_threshold: (``buffer_size`` above 1) a look-ahead block is forced to fill a mask in every step only once this
        share of its predecessor is filled.
      penalty_lambda: subtracted from the logit of the token one position to the left (against repetition).
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    max_nfe: int | None = None
    accept_threshold: float = 0.9
    num_to_transfer: int = 1
    edit_threshold: float = 0.5
    max_post_edit_steps: int = 16
    remask_threshold: float = 0.0
    settle_threshold: float = 0.9
    penalty_lambda: float = 0.0
    add_block_threshold: float = 0.1
    token_stability_threshold: float = 0.0
    semi_complete_threshold: float = 0.9

    @classmethod
    def speed(cls, **settings: Any) -> SamplingParams:
        """LLaDA2.1's speed mode for ``llada2_edit``: accept above 0.5, edit every disagreement."""
        return cls(**{"accept_threshold": 0.5, "edit_threshold": 0.0} | settings)

    @classmethod
    def quality(cls, **settings: Any) -> SamplingParams:
        """LLaDA2.1's quality mode for ``llada2_edit``: accept above 0.7, edit above 0.5."""
        return cls(**{"accept_threshold": 0.7, "edit_threshold": 0.5} | settings)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float":
                if isinstance(value, bool) or not isinstance(value, numbers.Real):
                    raise ValueError(f"{field.name}={value!r} must be a number")
                object.__setattr__(self, field.name, float(value))
            elif field.type == "bool":
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name}={value!r} must be True or False")
            elif not (value is None and "None" in field.type):
                if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                    raise ValueError(f"{field.name}={value!r} must be an integer")
                object.__setattr__(self, field.name, int(value))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name}={value} must be finite and at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        for name, least in (("max_tokens", 1), ("top_k", 0), ("num_to_transfer", 1), ("max_post_edit_steps", 0), ("max_nfe", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                raise ValueError(f"{name}={value} must be at least {least} and below 2**31")
