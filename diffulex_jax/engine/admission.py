"""What an engine takes: a prompt and its settings are checked before anything is computed."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.request import Tracked
from diffulex_jax.engine.scoring import Asked
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.errors import SettingError
from diffulex_jax.request_state import MAX_STOP_IDS
from diffulex_jax.sampling_params import READ_BY_FEW, SamplingParams, seeds
from diffulex_jax.state import FORWARDS_PER_TOKEN, Dims


Prompt = str | Sequence[int]
AnyParams = SamplingParams | Sequence[SamplingParams]
"""Settings for all prompts, or for each."""


class Limits(NamedTuple):
    """What an engine can take.

    Attributes:
      settings: the engine's, ``attention`` filled in.
      dims: sizes of its state.
      tokenizer: None where the model has none.
      vocab_size, eos_ids: of the model.
      num_pages: in each data shard's part of the pool, since a request lives in one; None where requests take none.
      reads: settings of ``sampling_params.READ_BY_FEW`` that its strategy reads.
      shards: data shards.
      adapters: names of those that a request may have.
    """

    settings: EngineConfig
    dims: Dims
    tokenizer: Tokenizer | None
    vocab_size: int
    eos_ids: tuple[int, ...]
    num_pages: int | None
    reads: tuple[str, ...] = ()
    shards: int = 1
    adapters: tuple[str, ...] = ()


def paired(prompts: Sequence[Prompt] | str, params: AnyParams) -> list[tuple[Prompt, SamplingParams]]:
    """Every prompt with its settings; a single text is one prompt.

    Raises:
      ValueError: where there are not as many settings as prompts.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    if len(each) != len(prompts):
        raise ValueError(f"{len(each)} SamplingParams for {len(prompts)} prompts")
    return list(zip(prompts, each, strict=True))


def admit(limits: Limits, prompt: Prompt, params: SamplingParams, *, name: str, trace: bool, new_id: Callable[[], int]) -> list[Tracked]:
    """Makes the ``params.n`` requests of a prompt, each with a seed of its own.

    Args:
      limits: what the engine can take.
      prompt: text, or token ids.
      params: the settings, none left to the strategy.
      name: what error messages call the prompt.
      trace: whether the requests record their steps.
      new_id: gives the number of a request.

    Raises:
      SettingError: naming what will not do and why.
    """
    ids = check(limits, prompt, params, name=name)
    each = [params.alone(seed) for seed in seeds(params)]
    return [Tracked(id=new_id(), prompt=ids, params=one, trace=[] if trace else None) for one in each]


def check(limits: Limits, prompt: Prompt, params: SamplingParams, *, name: str) -> np.ndarray:
    """The prompt as ``[n]`` int32 token ids, n >= 1. Args and errors are those of :func:`admit`."""
    ids = _token_ids(limits, prompt, name)
    _check_lengths(limits, len(ids), params, name)
    _check_stops(limits, params, name)
    _check_read_by_few(limits, params, name)
    check_adapter(limits, params.adapter_name, name=name)
    steps, most = params.denoising_steps or 0, limits.dims.block
    length = params.block_length or most
    if length > most:
        raise SettingError("block_length", f"{name}: block_length={length} is more than the engine's block_size={most}")
    if limits.dims.one_block:
        if params.max_tokens > most:
            raise SettingError(
                "max_tokens",
                f"{name}: max_tokens={params.max_tokens} is more than the engine's block_size={most}, all that this strategy decodes",
            )
    if limits.dims.noise_steps:
        if steps > limits.dims.noise_steps:
            raise SettingError(
                "denoising_steps",
                f"{name}: denoising_steps={steps} is more than {FORWARDS_PER_TOKEN} for each token of the engine's block_size={most}",
            )
    elif steps > length:
        raise SettingError("denoising_steps", f"{name}: denoising_steps={steps} is more than the tokens of a block, {length}")
    if (size := limits.dims.sub_block_cache) and params.sub_block != size:
        raise SettingError("sub_block", f"{name}: sub_block={params.sub_block} must be {size}, the engine's sub_block_cache")
    for field in ("pinned", "init_tokens"):
        for offset, token in (getattr(params, field) or {}).items():
            if token >= limits.vocab_size or token == limits.dims.mask_id:
                raise SettingError(field, f"{name}: {field}[{offset}]={token} is not a token that can be given")
    return ids


def check_adapter(limits: Limits, adapter: str | None, *, name: str) -> None:
    """Checks that an engine has an adapter; ``name`` is what error messages call the prompt.

    Raises:
      SettingError: where it has not.
    """
    if adapter is not None and adapter not in limits.adapters:
        there = f"must be one of {', '.join(limits.adapters)}" if limits.adapters else "asks for an adapter, and this engine has none"
        raise SettingError("adapter_name", f"{name}: adapter_name={adapter!r} {there}")


def _token_ids(limits: Limits, prompt: Prompt, name: str) -> np.ndarray:
    def refuse(why: str) -> SettingError:
        return SettingError("prompt", f"{name} {why}")

    if isinstance(prompt, str):
        if limits.tokenizer is None:
            raise refuse("is text, and this model has no tokenizer; pass token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise refuse(f"is not Unicode text: the character at {error.start} is half a surrogate pair") from None
        prompt = limits.tokenizer.encode(prompt)
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of several lengths
        ids = np.zeros((1, 1))
    if ids.size == 0:
        raise refuse("is empty")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise refuse(f"must be text or a list of token ids, got {reprlib.repr(prompt)}")
    outside = ids[(ids < 0) | (ids >= limits.vocab_size)]
    if outside.size:
        raise refuse(f"holds token id {outside[0]}, outside the vocabulary [0, {limits.vocab_size})")
    return ids.astype(np.int32)


def scored(limits: Limits, prompts: Sequence[Prompt] | str, completions: Sequence[Prompt] | str) -> list[Asked]:
    """Prompts and completions as the sequences that are to be scored; a single text is one of them.

    Raises:
      SettingError: naming the prompt or the completion, and what is wrong with it.
    """
    prompts, completions = ([given] if isinstance(given, str) else given for given in (prompts, completions))
    if len(prompts) != len(completions):
        raise SettingError("completions", f"{len(completions)} completions for {len(prompts)} prompts")
    asked = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids, name = _token_ids(limits, prompt, f"prompt {i}"), f"completion {i}"
        if isinstance(completion, str) and limits.tokenizer is not None:
            completion = limits.tokenizer.encode_more(completion)
        more = _token_ids(limits, completion, name) if len(completion) else np.zeros(0, np.int32)
        if limits.dims.mask_id in more:
            raise SettingError("completions", f"{name} holds the mask {limits.dims.mask_id}, which is never chosen")
        if len(ids) + len(more) > (most := limits.settings.max_model_len):
            raise SettingError(
                "completions", f"{name} and its prompt have {len(ids) + len(more)} tokens; that exceeds max_model_len={most}"
            )
        asked.append(Asked(np.concatenate([ids, more]), len(ids)))
    return asked


def _check_lengths(limits: Limits, length: int, params: SamplingParams, name: str) -> None:
    settings, most = limits.settings, params.max_tokens
    if length + most > settings.max_model_len:
        field = "max_tokens" if length < settings.max_model_len else "prompt"
        raise SettingError(field, f"{name} has {length} tokens; with max_tokens={most} that exceeds max_model_len={settings.max_model_len}")
    limit = settings.max_batched_tokens
    if settings.attention == "prefix_full" and limit is not None and length > limit:
        raise SettingError(
            "prompt", f"{name} has {length} tokens; with attention='prefix_full' at most max_batched_tokens={limit} go through"
        )
    page = limits.dims.unit
    needed = -(-(length + most) // page)
    if limits.num_pages is not None and needed > limits.num_pages:
        field = "max_tokens" if length < limits.num_pages * page else "prompt"
        where = f" in each of the mesh's data={limits.shards} parts, one of which it must fit in" if limits.shards > 1 else ""
        raise SettingError(field, f"{name} needs {needed} pages with max_tokens={most}; the pool has {limits.num_pages}{where}")


def _check_read_by_few(limits: Limits, params: SamplingParams, name: str) -> None:
    for field, nothing in READ_BY_FEW.items():
        if (value := getattr(params, field)) not in (None, nothing) and field not in limits.reads:
            read = ", ".join(limits.reads) or "none of these"
            raise SettingError(field, f"{name}: {field}={value} means nothing to this engine's strategy, which reads {read}")
    ids = params.doubted_token_ids
    if len(ids) > MAX_STOP_IDS or any(id_ >= limits.vocab_size for id_ in ids):
        raise SettingError(
            "doubted_token_ids", f"{name}: doubted_token_ids={list(ids)} must be at most {MAX_STOP_IDS} ids of the vocabulary"
        )


def _check_stops(limits: Limits, params: SamplingParams, name: str) -> None:
    if params.stop and limits.tokenizer is None:
        raise SettingError("stop", f"{name}: stop={params.stop!r} needs a tokenizer, and this model has none")
    eos = 0 if params.ignore_eos else len(limits.eos_ids)
    if eos + len(params.stop_token_ids) > MAX_STOP_IDS:
        most, given = MAX_STOP_IDS - eos, len(params.stop_token_ids)
        raise SettingError("stop_token_ids", f"{name}: at most {most} stop_token_ids beside {eos} EOS ids, got {given}")
