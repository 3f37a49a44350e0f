"""From the prompt to the last token, as a user of the engine gets it: time to the first token, prompts and outputs a second."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from diffulex_jax.bench.decode import random_prompts
from diffulex_jax.bench.shapes import random_params, shape_model
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.engine import Engine
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.strategies import for_model


FIRST_TOKEN_PROMPTS = (31, 100, 500, 2000, 4000)


def run(
    *,
    shape: str,
    slots: int = 32,
    requests: int = 64,
    prompt: tuple[int, int] = (400, 600),
    output: int = 256,
    tokens_per_forward: Sequence[int] = (1, 4, 8),
    strategy: str | None = None,
    dtype: str = "bfloat16",
    repeats: int = 5,
    progress: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> dict[str, Any]:
    """Builds an engine over random weights, and measures it. No two prompts begin alike.

    Args:
      shape: a name in ``SHAPES``.
      slots: requests decoded together.
      requests: how many are given to the engine at once.
      prompt: least and most tokens of a prompt.
      output: tokens of each answer.
      tokens_per_forward: how many masks every step fills, one measurement each.
      strategy: the name of one that reads ``num_to_transfer``; None for the one that the model's authors decode it with.
      dtype, **settings: of the engine.
      repeats: measurements of a first token, of which the median is taken.
      progress: is given the report line by line as it comes.

    Returns:
      Plain data: what was measured on what; ``ready_seconds`` from parameters to an engine; ``first_token`` and ``prompts``, see
      :func:`first_token` and :func:`prompt_rate`; ``outputs``, for each number of tokens a forward what :func:`output_rate` gives.

    Raises:
      ValueError: for a name that does not exist or a number that will not do.
    """
    model = shape_model(shape)
    sizes = {"slots": slots, "requests": requests, "prompt": prompt[0], "output": output, "repeats": repeats}
    if bad := [f"{name}={n}" for name, n in [*sizes.items(), *(("tokens_per_forward", n) for n in tokens_per_forward)] if n < 1]:
        raise ValueError(f"{bad[0]} must be positive")
    if prompt[0] > prompt[1]:
        raise ValueError(f"prompt={prompt[0]}-{prompt[1]} must begin with the lesser number")
    longest = min(model.spec.max_positions, max(prompt[1] + output, FIRST_TOKEN_PROMPTS[-1] + 1))
    chosen = for_model(model.spec, strategy)  # an unknown one should not cost the weights
    asked: dict[str, Any] = {"dtype": dtype, "max_slots": slots, "max_model_len": longest} | settings
    with jax.set_mesh(make_mesh()):
        params = jax.block_until_ready(random_params(model, EngineConfig(**asked).jax_dtype))
    began = time.perf_counter()
    engine = Engine(model, params, strategy=chosen, **asked)
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "device": f"{device.platform}: {device.device_kind}",
        "jax": jax.__version__,
        "shape": shape,
        "strategy": engine.strategy,
        "dtype": dtype,
        **settings,
        **sizes,
        "prompt": list(prompt),
        "ready_seconds": time.perf_counter() - began,
    }
    progress(f"{shape}, {dtype}, {report['device']}, jax {report['jax']}; {slots} slots; ready after {report['ready_seconds']:.1f} s")
    seeds = itertools.count()
    lengths = [n for n in FIRST_TOKEN_PROMPTS if n < longest]
    report["first_token"] = {n: first_token(engine, seeds, length=n, repeats=repeats) for n in lengths}
    progress("first token: " + ", ".join(f"{n} tokens {1e3 * seconds:.1f} ms" for n, seconds in report["first_token"].items()))
    report["prompts"] = prompt_rate(engine, seeds, count=slots, length=min(2000, longest - 1))
    progress("prompts: {count} of {length} tokens in {seconds:.2f} s, {tokens_per_second:.0f} tokens/s".format(**report["prompts"]))
    report["outputs"] = []
    for n in tokens_per_forward:
        figures = output_rate(engine, seeds, count=requests, prompt=prompt, output=output, tokens_per_forward=n)
        report["outputs"].append(figures)
        line = "{tokens_per_forward} a forward: {requests} answers in {seconds:.2f} s, {ms_per_step:.2f} ms a step"
        progress((line + ", {tokens_per_second:.0f} tokens/s").format(**figures))
    return report


def first_token(engine: Engine, seeds: Iterator[int], *, length: int, repeats: int) -> float:
    """Seconds from a prompt of ``length`` tokens to one token, with nothing else to do; the median. One step fills what there is."""
    seconds = []
    for _ in range(repeats + 1):
        given = _prompts(engine, seeds, [length])
        began = time.perf_counter()
        engine.generate(given, _params(1, engine.dims.block))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def prompt_rate(engine: Engine, seeds: Iterator[int], *, count: int, length: int) -> dict[str, float]:
    """``count`` prompts of ``length`` tokens at once, one token each: ``seconds``, and ``tokens_per_second`` of the prompts."""
    given = _prompts(engine, seeds, [length] * count)
    began = time.perf_counter()
    engine.generate(given, _params(1, engine.dims.block))
    seconds = time.perf_counter() - began
    return {"count": count, "length": length, "seconds": seconds, "tokens_per_second": count * length / seconds}


def output_rate(
    engine: Engine, seeds: Iterator[int], *, count: int, prompt: tuple[int, int], output: int, tokens_per_forward: int
) -> dict[str, float]:
    """``count`` requests at once.

    Args:
      engine: what is measured.
      seeds: of prompts, each of which is taken once.
      count, prompt, output, tokens_per_forward: see :func:`run`.

    Returns:
      ``seconds`` for all; ``ms_per_step``, these shared among the forwards of a slot, all in; ``tokens_per_second`` of the outputs;
      ``nfe`` of a request; ``first_block_seconds`` after a request entered a slot, the median.
    """
    lengths = np.random.default_rng(0).integers(prompt[0], prompt[1] + 1, count)
    given = _prompts(engine, seeds, lengths.tolist())
    began = time.perf_counter()
    outputs = engine.generate(given, _params(output, tokens_per_forward))
    seconds = time.perf_counter() - began
    nfe = sum(o.nfe for o in outputs)
    return {
        "tokens_per_forward": tokens_per_forward,
        "requests": count,
        "seconds": seconds,
        "ms_per_step": 1e3 * seconds * min(count, engine.settings.max_slots) / nfe,
        "tokens_per_second": sum(len(o.token_ids) for o in outputs) / seconds,
        "nfe": nfe / count,
        "first_block_seconds": statistics.median(o.first_block_seconds or 0.0 for o in outputs),
    }


def _prompts(engine: Engine, seeds: Iterator[int], lengths: Sequence[int]) -> list[list[int]]:
    """Random prompts, none of which begins like another, or like an earlier one."""
    return [random_prompts(engine.model.spec, count=1, tokens=n, seed=next(seeds))[0] for n in lengths]


def _params(output: int, tokens_per_forward: int) -> SamplingParams:
    """No prediction is above a threshold of 2: every step fills as many masks as it must."""
    return SamplingParams(
        max_tokens=output, num_to_transfer=tokens_per_forward, accept_threshold=2.0, ignore_eos=True, max_repetition_run=2**30
    )
