"""What settings, a strategy and a model come to: the attention they mean, the sizes of the state, and what of them will not do."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.errors import SettingError
from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.models.base import ModelSpec
from diffulex_jax.rules.base import dims_for
from diffulex_jax.state import Dims
from diffulex_jax.strategies import STRATEGIES, Strategy
from pallas_kernels import REFERENCE


_CACHED_BLOCK = 32  # Fast-dLLM's, where a block is not the whole output
_LEAST_PAGE, _FILLED_PAGE = 8, 16  # tokens; with fewer than the first, page tables are long and kernels' tiles empty


def plan(spec: ModelSpec, strategy: Strategy, settings: EngineConfig) -> tuple[EngineConfig, AttentionPolicy, Dims]:
    """Fills in what the settings leave to the strategy and the model.

    Returns:
      The settings with ``buffer_size``, ``attention``, ``block_size``, ``page_size`` and ``max_batched_tokens`` filled in, the attention
      they mean, and the sizes of the state.

    Raises:
      SettingError: for a setting that will not do.
    """
    spec = _form_of(spec, strategy, settings)
    whole_canvas, prompt_apart = spec.attention.canvas == "whole", spec.attention == AttentionPolicy("whole")
    _check_canvas(spec, strategy, settings)
    usual = "full" if whole_canvas else "block_causal"
    window, attention = settings.buffer_size or strategy.window, settings.attention or strategy.attention or usual
    batched = settings.max_batched_tokens or REFERENCE.batched_tokens
    s = dataclasses.replace(settings, buffer_size=window, attention=attention, max_batched_tokens=batched)
    if s.max_model_len > spec.max_positions:
        raise SettingError(
            "max_model_len", f"max_model_len={s.max_model_len} exceeds the model's max_position_embeddings={spec.max_positions}"
        )
    if whole_canvas:
        cache: Any = s.cache or "none"
        s, policy = dataclasses.replace(s, cache=cache), dataclasses.replace(spec.attention, cache=cache)
    else:
        policy = AttentionPolicy("whole" if attention == "prefix_full" else "block_causal")
    cached = policy.cache in ("prefix", "dual")
    if cached and strategy.rule.one_block and s.block_size is None:
        s = dataclasses.replace(s, block_size=_CACHED_BLOCK)
    block = _block_size(spec, s)
    _check_sub_blocks(spec, strategy, s, block)
    page = -(-s.max_model_len // block) * block if whole_canvas else s.sub_block_cache or _page_size(block, s)
    unit = max(block, page)
    dims = dims_for(
        strategy.rule,
        slots=s.max_slots,
        window=window,
        block=block,
        page=page,
        pages_per_slot=-(-s.max_model_len // unit) * (unit // page),
        mask_id=spec.mask_id,
        commit_alone=spec.predicts == "next" and policy.cache != "none" and not prompt_apart,
        sub_block_cache=s.sub_block_cache or 0,
        whole_canvas=whole_canvas,
        cached_canvas=cached,
        prompt_apart=prompt_apart,
        carried=spec.hidden_size if prompt_apart and spec.predicts == "next" else 0,
    )
    return dataclasses.replace(s, block_size=block, page_size=page), policy, dims


def _form_of(spec: ModelSpec, strategy: Strategy, settings: EngineConfig) -> ModelSpec:
    """The spec as settings and strategy have the model run: one that sees its whole canvas may be D2F's, which sees a prompt and blocks."""
    attention = settings.attention or strategy.attention
    return spec.in_blocks() if spec.attention.canvas == "whole" and attention == "prefix_full" else spec


def _check_canvas(spec: ModelSpec, strategy: Strategy, settings: EngineConfig) -> None:
    whole = spec.attention.canvas == "whole"
    sees = "sees its whole canvas" if whole else "is block-causal"
    if spec.attention == AttentionPolicy("whole"):
        sees += " with attention='prefix_full'"
    if (settings.attention == "full") != whole and settings.attention is not None:
        raise SettingError("attention", f"attention={settings.attention!r} is not for this model, which {sees}; leave it out")
    fitting = [name for name, known in STRATEGIES.items() if known.canvas == ("whole" if whole else "block_causal")]
    if strategy.canvas not in (None, "whole" if whole else "block_causal"):
        raise SettingError(
            "strategy", f"strategy {strategy.name!r} is not for this model, which {sees}; choose one of {', '.join(fitting)}"
        )
    if not whole:
        if settings.cache is not None:
            raise SettingError("cache", f"cache={settings.cache!r} is not for this model, which {sees} and cached exactly; leave it out")
        return
    if strategy.rule.moves or strategy.rule.merge is not None:
        does = "moves tokens within a block" if strategy.rule.moves else "makes soft tokens"
        raise SettingError("strategy", f"strategy {strategy.name!r} {does}, which a model that {sees} cannot do")
    if (blocks := settings.buffer_size or strategy.window) > 1:
        raise SettingError("buffer_size", f"buffer_size={blocks} must be 1 for this model, which {sees} and decodes one block at a time")
    for name in ("num_pages", "page_size", "kv"):
        if (value := getattr(settings, name)) is not None:
            raise SettingError(name, f"{name}={value} is not for this model, which {sees} and has one page for each slot; leave it out")


def _check_sub_blocks(spec: ModelSpec, strategy: Strategy, settings: EngineConfig, block: int) -> None:
    size = settings.sub_block_cache
    if size is None:
        return

    def refuse(why: str) -> SettingError:
        return SettingError("sub_block_cache", f"sub_block_cache={size} {why}")

    if not spec.commit_alone:
        raise refuse("is not for this model, only for those whose outputs speak of the next position; leave it out")
    if "sub_block" not in strategy.reads or strategy.rule.merge is not None:
        raise refuse(f"is not for strategy {strategy.name!r}, which does not decode sub-block by sub-block")
    if settings.buffer_size != 1:
        raise refuse(f"does not go with buffer_size={settings.buffer_size}; one block is denoised at a time")
    if block % size:
        raise refuse(f"must divide the block_size={block}")
    if settings.page_size not in (None, size):
        raise refuse(f"does not go with page_size={settings.page_size}; pages are as long as a sub-block")


def _block_size(spec: ModelSpec, settings: EngineConfig) -> int:
    """Tokens in a block: the settings', else the model's.

    Raises:
      SettingError: where the checkpoint says that it was trained with another, or cannot do with another.
    """
    asked = settings.block_size
    if asked is not None and spec.routing_block not in (0, asked):
        raise SettingError(
            "block_size",
            f"block_size={asked} must be {spec.routing_block} for this model, whose blocks of {spec.routing_block} tokens choose their "
            "experts together; leave it out",
        )
    if asked is not None and asked != spec.block_size and spec.block_stated and not settings.force_block_size:
        raise SettingError(
            "block_size",
            f"block_size={asked}, but the checkpoint was trained with blocks of {spec.block_size}; leave it out, or set "
            "force_block_size=True and expect worse text",
        )
    return asked or spec.block_size


def _page_size(block: int, settings: EngineConfig) -> int:
    """Tokens in a page of the pool.

    Raises:
      SettingError: where neither of a page and a block divides the other.
    """
    page = settings.page_size or (block if block >= _LEAST_PAGE else block * -(-_FILLED_PAGE // block))
    if page % block and block % page:
        raise SettingError("page_size", f"page_size={page} must be a multiple of block_size={block}, or divide it")
    return page
