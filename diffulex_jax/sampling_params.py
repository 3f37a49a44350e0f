"""Per-request settings."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


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
      min_tokens: no stop token is predicted in that many first generated positions.
      stop_token_ids: further tokens that end the output, as EOS does.
      stop: texts that end the output, wherever they begin; they are left out of it.
      max_repetition_run: most times a token may follow itself; the output is cut there. None: no limit.
      pinned: ``{offset: token id}``, generated positions that are fixed (infilling); offset 0 follows the prompt.
      init_tokens: ``{offset: token id}``, generated positions that start filled but may be revised (warm start).
      logprobs: return the log probability each token had when it was accepted.
      return_step_map: return the forward at which each token was first accepted and last revised.
      cache_salt: cached prefixes are shared only among requests of the same salt (tenants that must not learn of each other).
      n: outputs for the prompt; output i uses seed + i.
      max_nfe: most forwards to spend; the contiguous decoded prefix is returned then. None: no limit.
      accept_threshold: a mask is filled when its prediction is more probable than this; 1 or more never accepts by threshold, so
        ``num_to_transfer`` masks are filled a step.
      num_to_transfer: masks filled per block and step at the least (``llada2``, ``llada2_edit``, ``sdar``).
      denoising_steps: steps over which a block's masks are shared out, in place of ``num_to_transfer``: of B masks, step i of S fills
        floor(B / S) at the least, and one more while i < B mod S. At most the block size; 0 leaves it to ``num_to_transfer``.
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
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    max_repetition_run: int | None = None
    pinned: Mapping[int, int] | None = None
    init_tokens: Mapping[int, int] | None = None
    logprobs: bool = False
    return_step_map: bool = False
    cache_salt: str = ""
    n: int = 1
    max_nfe: int | None = None
    accept_threshold: float = 0.9
    num_to_transfer: int = 1
    denoising_steps: int = 0
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

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping that cannot change cannot be pickled either.
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain: dict[str, Any] = {name: dict(value) if isinstance(value, Mapping) else value for name, value in given.items()}
        return functools.partial(type(self), **plain), ()

    def __post_init__(self) -> None:
        for name in ("stop_token_ids", "stop"):
            object.__setattr__(self, name, _several(name, getattr(self, name), int if name == "stop_token_ids" else str))
        for name in ("pinned", "init_tokens"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _tokens_by_offset(name, getattr(self, name), self.max_tokens))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float":
                if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
                    raise ValueError(f"{field.name}={value!r} must be a number")
                if not 0 <= value <= _LARGEST:  # nor is NaN
                    raise ValueError(f"{field.name}={value} must be finite and at least 0")
                object.__setattr__(self, field.name, float(value))
            elif field.type == "str" and not isinstance(value, str):
                raise ValueError(f"{field.name}={value!r} must be text")
            elif field.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{field.name}={value!r} must be True or False")
            elif field.type == "int" or (field.type == "int | None" and value is not None):
                object.__setattr__(self, field.name, _integer(field.name, value, 1 if field.name in _AT_LEAST_ONE else 0))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")


_LARGEST = float(np.finfo(np.float32).max)  # what the device computes with
_AT_LEAST_ONE = ("max_tokens", "num_to_transfer", "max_nfe", "max_repetition_run", "n")


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r} must be an integer")
    if not least <= value < 2**31:
        raise ValueError(f"{name}={value} must be at least {least} and below 2**31")
    return int(value)


def _several(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        value = (value,)
    value = tuple(_integer(name, v, 0) if kind is int else v for v in value)
    if kind is str and not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{name}={value!r} must be non-empty texts")
    return value


def _tokens_by_offset(name: str, value: Any, max_tokens: Any) -> Mapping[int, int]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r} must map offsets to token ids")
    pairs = {_integer(f"{name} offset", k, 0): _integer(f"{name}[{k}]", v, 0) for k, v in value.items()}
    beyond = [k for k in pairs if isinstance(max_tokens, (int, np.integer)) and k >= max_tokens]
    if beyond:
        raise ValueError(f"{name} offset {beyond[0]} is not below max_tokens={max_tokens}")
    return types.MappingProxyType(pairs)
