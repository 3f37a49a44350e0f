"""Decodes cases through engines, as many through one as it can take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.engine.results import Output

from .case import DREAM, FAST_DLLM, LLADA, Case
from .reading import SDAR_STRATEGIES, reading


FIRST_STEPS = 5  # of a case that float64 decodes differently: so far rounding has not changed a token yet


class Decoded(NamedTuple):
    """Ours: the output, and, where forwards are counted there, the output up to the end of the peer's last block."""

    output: Output
    to_block_end: Output | None


def decode(cases: Sequence[Case], engine_for: Callable[..., Engine]) -> dict[tuple[str, str], Decoded]:
    """Ours for every case, by ``(peer, id)``; all cases of a strategy and block size go through one engine, several in a batch.

    ``engine_for(strategy=..., block_size=..., ...)`` builds an engine.
    """
    groups: dict[EngineKey, list[Case]] = {}
    for case in cases:
        groups.setdefault(engine_key(case), []).append(case)
    decoded = {}
    for group in groups.values():
        engine = engine_of(group, engine_for)
        jobs = list(_jobs(group))
        outputs = engine.generate([case.prompt for case, _, _ in jobs], [params for *_, params in jobs])
        by_job = {(case.peer, case.id, whole): output for (case, whole, _), output in zip(jobs, outputs, strict=True)}
        for case in group:
            at = (case.peer, case.id)
            decoded[at] = Decoded(by_job[*at, False], by_job.get((*at, True)))
    return decoded


def first_steps(case: Case, engine_for: Callable[..., Engine]) -> list[tuple[list[int], list[int]]]:
    """Ours and the peer's tokens up to the first mask after each of the first steps of the first block.

    Where the peer itself gives other tokens in float64, these still count.
    """
    trajectory = [(step["start"], step["after"]) for step in case.recorded.get("trajectory", []) if "after" in step]
    steps = case.recorded.get("steps", trajectory)[: min(FIRST_STEPS, case.recorded.get("fp64_agree_steps", [FIRST_STEPS])[0])]
    steps = [(start, tokens) for start, tokens in steps if start <= len(case.prompt)]
    params, engine = reading(case).params, engine_of([case], engine_for)
    budgets = [dataclasses.replace(params, ignore_eos=True, max_nfe=n + 1) for n in range(len(steps))]
    outputs = engine.generate([case.prompt] * len(steps), budgets)
    pairs = []
    for output, (start, tokens) in zip(outputs, steps, strict=True):
        tokens = [*tokens[len(case.prompt) - start :], case.mask_id]
        pairs.append((output.token_ids, tokens[: tokens.index(case.mask_id)]))
    return pairs


class EngineKey(NamedTuple):
    """What cases must have in common to go through one engine.

    Attributes:
      strategy, block: its name, and the block size. On a whole canvas one engine takes blocks of many lengths.
      more: other settings of the engine, each with its value.
    """

    strategy: str
    block: int
    more: tuple[tuple[str, Any], ...] = ()


def engine_key(case: Case) -> EngineKey:
    """The engine for a case."""
    strategy, s = reading(case).strategy, case.settings
    if case.peer in LLADA + DREAM:
        return EngineKey(strategy, -(-case.block // 64) * 64, (("cache", s.get("cache", "none")),))
    if case.peer == "d2f":  # as many blocks at once as there are
        return EngineKey(strategy, case.block, (("buffer_size", max(4, -(-case.max_tokens // case.block))),))
    if case.peer in FAST_DLLM and s["use_block_cache"]:
        return EngineKey(strategy, case.block, (("sub_block_cache", s["small_block_size"]),))
    return EngineKey(strategy, case.block)


def engine_of(cases: Sequence[Case], engine_for: Callable[..., Engine]) -> Engine:
    """The engine for cases of one :func:`engine_key`."""
    key = engine_key(cases[0])
    longest = max(len(case.prompt) + case.max_tokens for case in cases) + (key.block if cases[0].peer not in LLADA + DREAM else 0)
    room = max(64, key.block)
    length = max(256, -(-longest // room) * room)
    sizes = {"block_size": key.block, "force_block_size": True, "max_slots": 4, "max_model_len": length}
    return engine_for(strategy=key.strategy, **sizes, **dict(key.more))


def _jobs(cases: Sequence[Case]) -> Iterator[tuple[Case, bool, SamplingParams]]:
    for case in cases:
        params = reading(case).params
        yield case, False, params
        if (tokens := to_block_end(case)) is not None:
            yield case, True, dataclasses.replace(params, max_tokens=len(tokens), stop_token_ids=())


def to_block_end(case: Case) -> list[int] | None:
    """All that a peer decoded, where it goes on after a stop token: up to there both spend the same forwards."""
    if case.peer == "batch_sample":
        return case.decoded
    if case.peer not in SDAR_STRATEGIES:
        return None
    output = [*case.decoded, case.mask_id]
    output = output[: output.index(case.mask_id)]
    return output if output and (len(case.prompt) + len(output)) % case.block == 0 else None
