"""Per-request settings."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from diffulex_jax.errors import SettingError


LEFT_TO_STRATEGY: Mapping[str, float | int] = types.MappingProxyType(
    {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "accept_threshold": 0.9,
        "num_to_transfer": 1,
        "denoising_steps": 0,
        "sub_block": 0,
        "block_length": 0,
        "cfg_scale": 0.0,
        "confidence_factor": 1.0,
        "eps": 1e-3,
        "alg_temp": 0.0,
        "entropy_bound": 0.35,
        "edit_threshold": 0.5,
        "max_post_edit_steps": 16,
        "remask_threshold": 0.0,
        "settle_threshold": 0.9,
        "penalty_lambda": 0.0,
        "add_block_threshold": 0.1,
        "token_stability_threshold": 0.0,
        "semi_complete_threshold": 0.9,
    }
)
"""Settings that a strategy may have defaults of its own for, and their values where it has none."""
READ_BY_FEW: Mapping[str, Any] = types.MappingProxyType(
    {"sub_block": 0, "block_length": 0, "cfg_scale": 0.0, "confidence_factor": 1.0, "eps": 1e-3, "alg_temp": 0.0, "doubted_token_ids": ()}
)
"""Settings that other values than these are refused for, unless the strategy reads them (``Strategy.reads``)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded. Requests with different settings share a batch.

    Settings of :data:`LEFT_TO_STRATEGY` are None where the request does not set them. Each is then what the strategy's ``defaults``
    say, else the value documented here; :meth:`resolve` fills them in when the engine takes the request.

    Attributes:
      max_tokens: real tokens to generate: exactly that many, unless EOS comes first.
      temperature: 0 is greedy; above 0 tokens are drawn from softmax(logits / temperature). Default: 0.
      top_p: (temperature > 0) keep the smallest set of tokens whose probability reaches this; 1 keeps all. Default: 1.
      top_k: (temperature > 0) keep this many tokens; 0 keeps all. Default: 0. With ``d2f``, ``dream`` and its variants, top-p and top-k
        change confidences at temperature 0 too.
      seed: (temperature > 0) of the request's own random key, below 2**64; the same seed gives the same tokens alone and in any batch.
        None: a fresh one for every request and prompt. ``Output.seed`` tells the one used.
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
      adapter_name: one of the engine's ``adapters``, which decodes this request; None: the model as it is.
      n: outputs for the prompt, each of a seed of its own that follows from ``seed`` (see :func:`seeds`).
      max_nfe: most forwards to spend; the contiguous decoded prefix is returned then. None: no limit.
      min_tokens_per_forward: give up on a request, as at ``max_nfe``, that has filled fewer tokens than this for each of its forwards;
        judged at every forward, from the one whose number is four times the block size on. 0 never gives up.
      accept_threshold: a mask is filled when its prediction is more probable than this (``llada_threshold``: or as probable); 1 or more
        never accepts by threshold, so ``num_to_transfer`` masks are filled a step. Default: 0.9.
      num_to_transfer: masks filled per block and step at the least (``llada2``, ``llada2_edit``, ``sdar``). Default: 1.
      denoising_steps: steps over which a block's masks are shared out, in place of ``num_to_transfer``: of B masks, step i of S fills
        floor(B / S) at the least, and one more while i < B mod S. At most the block size; 0 leaves it to ``num_to_transfer``. Default: 0.
        (``dream``, ``dream_maskgit_plus``, ``dream_topk_margin``, ``dream_origin``) steps over which the noise level falls, at most four
        times the block size; 0: as many as ``max_tokens``, or behind a cache as a block has tokens. But for ``dream_origin``'s, steps that
        would fill no mask are left out, and are no forwards.
      sub_block: (``fast_dllm_v2``) masks are filled only in the first of a block's runs of so many positions that has any; 0 is the whole
        block. Default: 0.
      block_length: (``llada`` and its variants) tokens of a block, at most the engine's ``block_size``. Blocks are decoded one after the
        other, the first from the prompt's end on, and the masks of a block are what ``denoising_steps`` shares out. 0: the engine's
        ``block_size``. With an engine's ``cache``, of ``dream`` and its variants too. Default: 0.
      cfg_scale: (``llada`` and its variants) w of classifier-free guidance: logits are u + (w + 1)(z - u), where u is what the network
        says with masks for the prompt; every forward is then two. 0: none. Default: 0.
      confidence_factor: (``llada_factor``) f: of a block's masks the n-th surest (n >= 2) is filled if its probability is at least
        1 - f / (n + 1), and all surer ones are. Default: 1.
      eps: (``dream`` and its variants) the noise level at which the last of ``denoising_steps`` ends, at most 1. Default: 1e-3.
      alg_temp: (``dream``, ``dream_maskgit_plus``, ``dream_topk_margin``) which masks are filled is drawn from softmax(confidence /
        alg_temp); 0 fills the most confident. Default: 0.
      doubted_token_ids: (``llada`` and its variants) tokens whose probability counts as 0, so that they are filled last. With the ids of
        EOS and of the end of a turn it keeps LLaDA from ending early (its authors' ``confidence_eos_eot_inf``).
      entropy_bound: (``sdar_entropy``) masks are filled by ascending entropy as long as their entropies, in nats, add up to less.
        Default: 0.35.
      edit_threshold: (``llada2_edit``) a filled token is replaced by a different prediction more probable than this; 0 replaces
        every one. Default: 0.5.
      max_post_edit_steps: (``llada2_edit``) steps spent on a block after its last mask was filled. Default: 16.
      remask_threshold: a filled token less probable than this in the current prediction is masked again; 0 turns it off.
        Default: 0.
      settle_threshold: (``dmax``) a block ends once every generated position is at least this probable. Default: 0.9.
      add_block_threshold: (``buffer_size`` above 1) the next block starts once this share of the last one is filled. Default:
        0.1.
      token_stability_threshold: (``buffer_size`` above 1) and this share of its filled tokens kept their value in the step.
        Default: 0.
      semi_complete_threshold: (``buffer_size`` above 1) a look-ahead block is forced to fill a mask in every step only once this
        share of its predecessor is filled. Default: 0.9 (``d2f``: 0.95).
      penalty_lambda: subtracted from the logit of the token one position to the left (against repetition). Default: 0.
    """

    max_tokens: int = 64
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    doubted_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    max_repetition_run: int | None = None
    pinned: Mapping[int, int] | None = None
    init_tokens: Mapping[int, int] | None = None
    logprobs: bool = False
    return_step_map: bool = False
    cache_salt: str = ""
    adapter_name: str | None = None
    n: int = 1
    max_nfe: int | None = None
    min_tokens_per_forward: float = 0.0
    accept_threshold: float | None = None
    num_to_transfer: int | None = None
    denoising_steps: int | None = None
    sub_block: int | None = None
    block_length: int | None = None
    cfg_scale: float | None = None
    confidence_factor: float | None = None
    eps: float | None = None
    alg_temp: float | None = None
    entropy_bound: float | None = None
    edit_threshold: float | None = None
    max_post_edit_steps: int | None = None
    remask_threshold: float | None = None
    settle_threshold: float | None = None
    penalty_lambda: float | None = None
    add_block_threshold: float | None = None
    token_stability_threshold: float | None = None
    semi_complete_threshold: float | None = None

    @classmethod
    def speed(cls, **settings: Any) -> SamplingParams:
        """LLaDA2.1's speed mode for ``llada2_edit``: accept above 0.5, edit every disagreement."""
        return cls(**{"accept_threshold": 0.5, "edit_threshold": 0.0} | settings)

    @classmethod
    def quality(cls, **settings: Any) -> SamplingParams:
        """LLaDA2.1's quality mode for ``llada2_edit``: accept above 0.7, edit above 0.5."""
        return cls(**{"accept_threshold": 0.7, "edit_threshold": 0.5} | settings)

    def resolve(self, defaults: Mapping[str, Any] = types.MappingProxyType({})) -> SamplingParams:
        """These settings with none left to the strategy: what is None takes its value from ``defaults``, else its usual one."""
        usual = {**LEFT_TO_STRATEGY, **{name: value for name, value in defaults.items() if value is not None}}
        unset = {name: value for name, value in usual.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **unset) if unset else self

    def alone(self, seed: int) -> SamplingParams:
        """These settings of one output, with a seed of :func:`seeds`: not checked again, which would take longer than all else here."""
        one = object.__new__(type(self))
        one.__dict__.update(self.__dict__, n=1, seed=seed)
        return one

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping that cannot change cannot be pickled either.
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain: dict[str, Any] = {name: dict(value) if isinstance(value, Mapping) else value for name, value in given.items()}
        return functools.partial(type(self), **plain), ()

    def __post_init__(self) -> None:
        for name, kind in (("stop_token_ids", int), ("doubted_token_ids", int), ("stop", str)):
            object.__setattr__(self, name, _several(name, getattr(self, name), kind))
        for name in ("pinned", "init_tokens"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _tokens_by_offset(name, getattr(self, name), self.max_tokens))
        for name, check, optional in _checks():
            value = getattr(self, name)
            if value is not None or not optional:
                object.__setattr__(self, name, check(name, value))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SettingError("top_p", f"top_p={self.top_p} must be above 0 and at most 1")
        if self.eps is not None and self.eps > 1:
            raise SettingError("eps", f"eps={self.eps} must be at most 1")
        if self.min_tokens > self.max_tokens:
            raise SettingError("min_tokens", f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")


def seeds(params: SamplingParams) -> list[int]:
    """The seeds of a request's ``n`` outputs. Each of them alone (``seed=``, ``n=1``) gives its output again.

    The first is ``params.seed``, or where that is None drawn from the operating system. The others are a hash of it and of the output's
    number, so that outputs of neighbouring seeds do not coincide. All but the given one are below 2**53: every reader of JSON keeps
    them to the last digit.
    """
    first = int.from_bytes(os.urandom(7)) >> 3 if params.seed is None else params.seed
    hashed = (hashlib.blake2b(f"{first}/{i}".encode(), digest_size=7).digest() for i in range(1, params.n))
    return [first, *(int.from_bytes(digest) >> 3 for digest in hashed)]


_LARGEST = float(np.finfo(np.float32).max)  # what the device computes with
_AT_LEAST_ONE = ("max_tokens", "num_to_transfer", "max_nfe", "max_repetition_run", "n")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise SettingError(name, f"{name}={value!r} must be a number")
    if not 0 <= value <= _LARGEST:  # nor is NaN
        raise SettingError(name, f"{name}={_shown(value)} must be finite and at least 0")
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SettingError(name, f"{name}={value!r} must be text")
    return value


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise SettingError(name, f"{name}={value!r} must be True or False")
    return value


def _whole(name: str, value: Any) -> int:
    return _integer(name, value, 1 if name in _AT_LEAST_ONE else 0, bits=64 if name == "seed" else 31)


_Check = Callable[[str, Any], Any]
_CHECKS: dict[str, _Check] = {"float": _number, "str": _text, "bool": _truth, "int": _whole}


@functools.cache
def _checks() -> list[tuple[str, _Check, bool]]:
    """For each setting of a plain type: its name, what checks it, and whether it may be None."""
    types_ = {field.name: str(field.type) for field in dataclasses.fields(SamplingParams)}
    plain = {name: type_.removesuffix(" | None") for name, type_ in types_.items()}
    return [(name, _CHECKS[type_], types_[name] != type_) for name, type_ in plain.items() if type_ in _CHECKS]


def _integer(name: str, value: Any, least: int, *, bits: int = 31, what: str = "") -> int:
    """``what`` it is, where that is not the setting ``name`` itself."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise SettingError(name, f"{what or name}={value!r} must be an integer")
    if not least <= value < 2**bits:
        raise SettingError(name, f"{what or name}={_shown(value)} must be at least {least} and below 2**{bits}")
    return int(value)


def _shown(value: Any) -> str:
    """A number for a message: Python refuses to print integers of thousands of digits."""
    return str(value) if abs(value) < 1e100 else f"a number of {len(f'{int(value):b}')} bits" if isinstance(value, int) else str(value)


def _several(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        value = (value,)
    value = tuple(_integer(name, v, 0) if kind is int else v for v in value)
    if kind is str and not all(isinstance(v, str) and v for v in value):
        raise SettingError(name, f"{name}={value!r} must be non-empty texts")
    return value


def _tokens_by_offset(name: str, value: Any, max_tokens: Any) -> Mapping[int, int]:
    if not isinstance(value, Mapping):
        raise SettingError(name, f"{name}={value!r} must map offsets to token ids")
    pairs = {
        _integer(name, offset, 0, what=f"{name} offset"): _integer(name, token, 0, what=f"{name}[{offset}]")
        for offset, token in value.items()
    }
    beyond = [k for k in pairs if isinstance(max_tokens, (int, np.integer)) and k >= max_tokens]
    if beyond:
        raise SettingError(name, f"{name} offset {beyond[0]} is not below max_tokens={max_tokens}")
    return types.MappingProxyType(pairs)
