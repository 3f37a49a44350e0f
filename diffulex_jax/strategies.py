"""Strategies: a rule with the settings that go with it, under a name that requests can use."""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import ModelSpec
from diffulex_jax.rules import (
    Rule,
    at_random,
    by_noise_level,
    chain,
    decide,
    entropy_bounded,
    factor,
    in_sub_blocks,
    levenshtein,
    rationed,
    remask,
    scheduled,
    sequential,
    soft_parallel,
    threshold,
    token_merge,
)
from diffulex_jax.sampling_params import LEFT_TO_STRATEGY, READ_BY_FEW, SamplingParams


class Strategy(NamedTuple):
    """How a model is decoded.

    Attributes:
      name: what requests call it, and what snapshots, metrics and error messages say.
      rule: what is made of a prediction.
      window: blocks denoised together, where the engine's ``buffer_size`` says nothing else.
      attention: what a prompt sees of itself, where the engine's ``attention`` says nothing else; see ``EngineConfig``.
      defaults: fields of ``SamplingParams`` that may be left to the strategy (``sampling_params.LEFT_TO_STRATEGY``), and their
        values where a request sets none.
      draws: (temperature > 0) what a position's random draw is tied to. ``"position"``: while the distribution stays, so does the
        sample, until the request masks something again. ``"step"``: every forward draws anew.
      confidence: (temperature > 0) the distribution that a token's probability is read from. ``"model"``: the model's own.
        ``"tempered"``: the model's at the request's temperature. ``"drawn"``: what top-k and top-p leave of that. ``"whole"``: the
        model's with the mask id's share, and without the request's ``doubted_token_ids``. ``"narrowed"``: at any temperature what top-p and
        then top-k leave of the tempered one, the mask id's share included.
      reads: settings of ``sampling_params.READ_BY_FEW`` that requests may set.
      canvas: what it is for: ``"block_causal"``, models whose blocks see none behind them, or are made to by ``attention``; ``"whole"``,
        models that see their whole canvas (LLaDA, Dream). None: both.
    """

    name: str
    rule: Rule
    window: int = 1
    attention: Literal["block_causal", "prefix_full"] | None = None
    defaults: Mapping[str, Any] = MappingProxyType({})
    draws: Literal["position", "step"] = "position"
    confidence: Literal["model", "tempered", "drawn", "whole", "narrowed"] = "model"
    reads: tuple[str, ...] = ()
    canvas: Literal["block_causal", "whole"] | None = None


AnyStrategy = str | Rule | Strategy
"""What callers may give for a strategy: see :func:`resolve`."""


def for_model(spec: ModelSpec, strategy: AnyStrategy | None) -> Strategy:
    """Finds the strategy that decodes a model: the one a caller means (:func:`resolve`), or None: what its authors decode it with."""
    return resolve(spec.strategy if strategy is None else strategy)


def resolve(strategy: AnyStrategy) -> Strategy:
    """Finds the strategy that a caller means.

    Args:
      strategy: a name from :data:`STRATEGIES`; an import path ``"my_module:my_rule"``, looked for on ``sys.path`` and in the current
        directory, whose attribute is a :class:`Rule`, a :class:`Strategy`, or a function without arguments that returns one (the
        path is the strategy's name); a :class:`Strategy`; or a :class:`Rule`, whose name is ``"custom"``.

    Raises:
      SettingError: (field ``"strategy"``) for an unknown name, an import path that leads to no strategy, or a strategy whose fields
        will not do.
      TypeError: for anything else.
    """
    if isinstance(strategy, Strategy):
        return _checked(strategy)
    if isinstance(strategy, Rule):
        return Strategy("custom", strategy)
    if not isinstance(strategy, str):
        raise TypeError(f"strategy must be a name, an import path, a Rule or a Strategy, got {strategy!r}")
    if ":" in strategy:
        return _imported(strategy)
    if strategy not in STRATEGIES:
        raise SettingError(
            "strategy",
            f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}, or give the import path of a rule, my_module:my_rule",
        )
    return STRATEGIES[strategy]


def llada2() -> Rule:
    """LLaDA2.0: fill masks above a threshold."""
    return decide(edit=False)


def llada2_edit() -> Rule:
    """LLaDA2.1: fill masks and revise filled tokens in the same step."""
    return decide()


def dmax(*, mode: str = "reference", top_k: int = 1) -> Rule:
    """DMax's soft parallel decoding.

    Args:
      mode: ``"reference"`` (the authors' rule) or ``"fast"`` (Diffulex's fast path: only newly filled tokens are soft, only
        masked positions are asked for confidence, and a block's KV comes from its last soft inputs).
      top_k: candidates mixed into a soft token.

    Raises:
      ValueError: for another mode.
    """
    if mode == "reference":
        return chain(soft_parallel(), remask(), token_merge(top_k=top_k))
    if mode == "fast":
        return chain(soft_parallel(settle_on="masked"), remask(), token_merge(top_k=top_k, newly_filled_only=True, commit_soft=True))
    raise ValueError(f"dmax mode {mode!r} must be 'reference' or 'fast'")


def llada2_levenshtein() -> Rule:
    """LLaDA2.2: fill and revise, and let positions be deleted or inserted within the block."""
    return levenshtein()


def sdar() -> Rule:
    """SDAR: fill masks above a threshold, at least the step's share of the most confident ones."""
    return decide(edit=False)


def sdar_leftmost() -> Rule:
    """SDAR as JetEngine decodes it: fill masks above a threshold, or the step's share from the left where those are fewer."""
    return chain(threshold(fallback="leftmost"), remask())


def sdar_sequential() -> Rule:
    """SDAR's sequential remasking: fill the step's share from the left, as an autoregressive model does."""
    return chain(sequential(), remask())


def sdar_entropy() -> Rule:
    """SDAR's entropy-bounded remasking: fill masks by entropy, the lowest first, up to a bound on their sum."""
    return chain(entropy_bounded(), remask())


def fast_dllm_v2() -> Rule:
    """Fast-dLLM v2: fill masks above a threshold, sub-block by sub-block."""
    return in_sub_blocks(decide(edit=False))


def llada() -> Rule:
    """LLaDA: fill the step's share of a block's masks, the surest first."""
    return scheduled()


def llada_random() -> Rule:
    """LLaDA's random remasking: fill the step's share of a block's masks, drawn at random."""
    return scheduled(order="random")


def llada_threshold() -> Rule:
    """Fast-dLLM's parallel decoding of LLaDA: fill masks at a threshold or above, and the surest in any case."""
    return threshold(inclusive=True)


def llada_factor() -> Rule:
    """Fast-dLLM's factor rule: fill the more masks at once, the surer all of them are."""
    return factor()


def dream() -> Rule:
    """Dream: fill masks as the noise level falls, those of the lowest entropy first."""
    return by_noise_level(confidence="entropy")


def dream_maskgit_plus() -> Rule:
    """Dream's ``maskgit_plus``: fill masks as the noise level falls, the most probable first."""
    return by_noise_level(confidence="prob")


def dream_topk_margin() -> Rule:
    """Dream's ``topk_margin``: fill masks as the noise level falls, those first whose best token is furthest ahead of the second."""
    return by_noise_level(confidence="margin")


def dream_origin() -> Rule:
    """Dream's ``origin``: fill masks at random as the noise level falls."""
    return at_random()


def dream_threshold() -> Rule:
    """Fast-dLLM's ``confidence_threshold`` on Dream: fill sure masks within a ration, and the surest in any case."""
    return rationed()


def _of_blocks(name: str, rule: Rule, **more: Any) -> Strategy:
    """A strategy of models whose blocks see none behind them."""
    return Strategy(name, rule, canvas="block_causal", **more)


def _of_sdar(name: str, rule: Rule, **defaults: Any) -> Strategy:
    """A strategy that samples as SDAR's authors do: every forward draws anew, and confidence is that at the temperature."""
    return _of_blocks(name, rule, defaults=MappingProxyType(defaults), draws="step", confidence="tempered")


def _of_llada(name: str, rule: Rule, *reads: str, **defaults: Any) -> Strategy:
    """A strategy that samples as LLaDA's authors do: every forward draws anew, and confidence is the model's, the mask id's included."""
    reads = ("block_length", "cfg_scale", "doubted_token_ids", *reads)
    kept = MappingProxyType(defaults)
    return Strategy(name, rule, defaults=kept, draws="step", confidence="whole", reads=reads, canvas="whole")


def _of_dream(name: str, rule: Rule, *reads: str, **defaults: Any) -> Strategy:
    """A strategy that samples as Dream's authors do: every forward draws anew, and top-p and top-k bear on confidence too."""
    kept, reads = MappingProxyType(defaults), ("block_length", *reads)
    return Strategy(name, rule, defaults=kept, draws="step", confidence="narrowed", reads=reads, canvas="whole")


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        _of_blocks("llada2", llada2()),
        _of_blocks("multi_bd", llada2(), window=2),  # MBD-LMs' buffer
        _of_blocks(
            "d2f",
            llada2(),
            window=4,
            attention="prefix_full",
            defaults=MappingProxyType({"semi_complete_threshold": 0.95}),  # its scripts'
            draws="step",
            confidence="narrowed",
        ),
        _of_blocks("llada2_edit", llada2_edit()),
        _of_blocks("llada2_levenshtein", llada2_levenshtein()),
        _of_blocks("dmax", dmax()),
        _of_sdar("sdar", sdar(), accept_threshold=0.85),  # generate.py's
        _of_sdar("sdar_leftmost", sdar_leftmost(), accept_threshold=0.9),  # JetEngine's
        _of_sdar("sdar_sequential", sdar_sequential()),
        _of_sdar("sdar_entropy", sdar_entropy(), entropy_bound=0.35),  # generate.py's and JetEngine's
        Strategy(
            "fast_dllm_v2",
            fast_dllm_v2(),
            defaults=MappingProxyType({"accept_threshold": 0.9, "sub_block": 8, "top_p": 0.95}),  # the README's; generate()'s top_p
            draws="step",
            confidence="drawn",
            reads=("sub_block",),
            canvas="block_causal",
        ),
        _of_llada("llada", llada()),
        _of_llada("llada_random", llada_random()),
        _of_llada("llada_threshold", llada_threshold(), accept_threshold=0.9),  # Fast-dLLM's
        _of_llada("llada_factor", llada_factor(), "confidence_factor", confidence_factor=1.0),  # Fast-dLLM's
        # Its README's: generation_config.json names `origin`, which no published setting uses.
        _of_dream("dream", dream(), "eps", "alg_temp"),
        _of_dream("dream_maskgit_plus", dream_maskgit_plus(), "eps", "alg_temp"),
        _of_dream("dream_topk_margin", dream_topk_margin(), "eps", "alg_temp"),
        _of_dream("dream_origin", dream_origin(), "eps"),
        _of_dream("dream_threshold", dream_threshold(), accept_threshold=0.9, num_to_transfer=32),  # Fast-dLLM's, in gen / 32 steps
    )
}


def _imported(path: str) -> Strategy:
    def refuse(why: str) -> SettingError:
        return SettingError("strategy", f"strategy {path!r}: {why}")

    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise refuse("an import path is my_module:my_rule")
    # What is installed goes first: a file that happens to lie here must not stand in for it.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise refuse(f"importing {module_name} failed: {error}") from error
        raise refuse(f"there is no module {error.name!r} in the current directory or on sys.path") from error
    except Exception as error:
        raise refuse(f"importing {module_name} failed: {_one_line(error)}") from error
    try:
        found = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise refuse(f"module {module_name!r} has no {attribute!r}") from error
    if not isinstance(found, (Rule, Strategy)) and callable(found):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise refuse(f"{attribute} must be callable without arguments, but {error}") from error
        except ValueError:  # a builtin without a signature
            pass
        try:
            found = found()
        except Exception as error:
            raise refuse(f"calling {attribute}() failed: {_one_line(error)}") from error
    if not isinstance(found, (Rule, Strategy)):
        kind = type(found).__name__
        raise refuse(f"{attribute} must be a Rule, a Strategy, or a function without arguments that returns one, got {kind}")
    return _checked(found._replace(name=path) if isinstance(found, Strategy) else Strategy(path, found))


def _checked(strategy: Strategy) -> Strategy:
    def refuse(why: str) -> SettingError:
        return SettingError("strategy", f"strategy {strategy.name!r}: {why}")

    if not isinstance(strategy.name, str) or not strategy.name:
        raise refuse("name must be a non-empty text")
    if not isinstance(strategy.rule, Rule):
        raise refuse(f"rule must be a Rule, got {strategy.rule!r}")
    if isinstance(strategy.window, bool) or not isinstance(strategy.window, int) or strategy.window < 1:
        raise refuse(f"window={strategy.window!r} must be a positive integer")
    for field, choices in _CHOICES.items():
        if getattr(strategy, field) not in choices:
            raise refuse(f"{field}={getattr(strategy, field)!r} must be one of {', '.join(map(str, choices))}")
    if unknown := [name for name in strategy.reads if name not in READ_BY_FEW]:
        raise refuse(f"reads: {unknown[0]!r} is not one of {', '.join(READ_BY_FEW)}")
    if unknown := [name for name in strategy.defaults if name not in LEFT_TO_STRATEGY]:
        raise refuse(f"defaults: {unknown[0]!r} is not one of {', '.join(LEFT_TO_STRATEGY)}")
    try:
        SamplingParams(**strategy.defaults)
    except ValueError as error:
        raise refuse(f"defaults: {error}") from error
    return strategy


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "attention": (None, "block_causal", "prefix_full"),
    "draws": ("position", "step"),
    "confidence": ("model", "tempered", "drawn", "whole", "narrowed"),
    "canvas": (None, "block_causal", "whole"),
}


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
