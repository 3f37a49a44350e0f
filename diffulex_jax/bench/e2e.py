"""From the prompt to the last token, as its user gets it: time to the first token and between blocks, prompts and outputs a second."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from diffulex_jax.bench.answering import ALL, Answering, Answers, Flood, InProcess, OverHTTP
from diffulex_jax.bench.load import Load, arrivals, spread
from diffulex_jax.bench.shapes import random_params, shape_model
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.engine import Engine
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.strategies import for_model


FIRST_TOKEN_PROMPTS = (31, 100, 500, 2000, 4000)


def run(
    *,
    shape: str | None = None,
    model: str | None = None,
    url: str | None = None,
    slots: int = 32,
    requests: int = 64,
    rate: float | None = None,
    flood: int | None = None,
    prompt: tuple[int, int] = (400, 600),
    shared_prefix: int = 0,
    output: int = 256,
    tokens_per_forward: Sequence[int | None] = (1, 4, 8),
    first_token_prompts: Sequence[int] = FIRST_TOKEN_PROMPTS,
    strategy: str | None = None,
    dtype: str | None = None,
    vocabulary: int | None = None,
    api_key: str | None = None,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> dict[str, Any]:
    """Measures an engine that it builds, or a server. No two prompts begin alike, but for what they share.

    Args:
      shape: a name in ``SHAPES``: an engine over random weights; LLaDA2-mini's where there is no ``model`` and no ``url``.
      model: a model's directory: an engine over its weights; with ``url`` the model's name there.
      url: of a server that speaks OpenAI's completions, without a path.
      slots: requests decoded together; of a server, requests at once where their rate is measured by the prompt.
      requests: how many are given, at once where there is no ``rate``.
      rate: so many are given a second, at random moments (Poisson's, always the same), whether answers come or not.
      flood: they are given once more, and beside them prompts of so many tokens for one token each: in every slot that they leave, the
        next as soon as one is answered.
      prompt: least and most tokens of a prompt.
      shared_prefix: so many first tokens, in addition, are the same in all prompts of ``outputs``.
      output: tokens of each answer.
      tokens_per_forward: how many masks every step fills, one measurement each; None: as the model or the server likes best.
      first_token_prompts: tokens of the prompts whose first token is timed; those that an engine has no room for are left out.
      strategy: the name of one that reads ``num_to_transfer``; None for the one that the model's authors decode it with.
      dtype, **settings: of the engine; by default ``"bfloat16"``. None of these, nor ``strategy``, is for a server.
      vocabulary, api_key: only of a server: prompts are made of ids below the one (10 000), and the other is sent with every request.
      repeats: measurements of a first token, of which the median is taken.
      progress: is given the report line by line as it comes.

    Returns:
      Plain data: what was measured on what; ``ready_seconds`` from parameters to an engine, ``all_ready_seconds`` to one that compiles
        nothing more in the background, before which nothing else is measured; ``first_token`` and ``prompts``, see
      :func:`first_token` and :func:`prompt_rate`; ``outputs``, for each number of tokens a forward what :func:`output_rate` gives.

    Raises:
      ValueError: for a name that does not exist, a number that will not do, or what a server says against a request.
      OSError: when there is no server.
    """
    sizes: dict[str, Any] = {"slots": slots, "requests": requests, "output": output, "repeats": repeats, "flood": flood}
    several = {"prompt": prompt, "tokens_per_forward": tokens_per_forward, "first_token_prompts": first_token_prompts}
    _check_numbers({name: (n,) for name, n in sizes.items()} | several | {"vocabulary": (vocabulary,)})
    if shared_prefix < 0:
        raise ValueError(f"shared_prefix={shared_prefix} must not be negative")
    if prompt[0] > prompt[1]:
        raise ValueError(f"prompt={prompt[0]}-{prompt[1]} must begin with the lesser number")
    if rate is not None and not 0 < rate < float("inf"):
        raise ValueError(f"rate={rate} must be positive")
    if flood is not None and requests >= slots:
        raise ValueError(f"flood={flood} needs slots of its own: give fewer requests ({requests}) than slots ({slots})")
    asked = {"strategy": strategy, "dtype": dtype, **settings}
    if url is not None:
        answering, about = _server(url, model, vocabulary, api_key, {"shape": shape, **asked})
        lengths, long = list(first_token_prompts), prompt[1]
        progress(f"{model} at {url}")
    else:
        if unused := [name for name, value in {"vocabulary": vocabulary, "api_key": api_key}.items() if value is not None]:
            raise ValueError(f"{unused[0]} is of a server: give its url, or leave {unused[0]} out")
        most = max(shared_prefix + prompt[1] + output, max(first_token_prompts) + 1, (flood or 0) + 1)
        engine, about = _engine(shape, model, most, {"max_slots": slots, **asked})
        room = engine.settings.max_model_len
        if flood is not None and flood >= room:
            raise ValueError(f"flood={flood} must be less than {room}, the most tokens of a prompt and its output")
        answering, lengths, long = InProcess(engine), [n for n in first_token_prompts if n < room], min(2000, room - 1)
        line = "{what}, {dtype}, {device}, jax {jax}; {slots} slots; ready after {ready_seconds:.1f} s, "
        line += "with all programs after {all_ready_seconds:.1f} s"
        progress(line.format(what=about["shape"] or model, slots=slots, **about))
    report: dict[str, Any] = {**about, **sizes, "rate": rate, "prompt": list(prompt), "shared_prefix": shared_prefix}
    seeds = itertools.count()
    filling = {"tokens_per_forward": None if None in tokens_per_forward else ALL}
    report["first_token"] = {n: first_token(answering, seeds, length=n, repeats=repeats, **filling) for n in lengths}
    progress("first token: " + ", ".join(f"{n} tokens {1e3 * seconds:.1f} ms" for n, seconds in report["first_token"].items()))
    report["prompts"] = prompt_rate(answering, seeds, count=slots, length=long, **filling)
    progress("prompts: {count} of {length} tokens in {seconds:.2f} s, {tokens_per_second:.0f} tokens/s".format(**report["prompts"]))
    report["outputs"] = []
    moments = list(itertools.islice(arrivals(Load(requests=requests, rate=rate)), requests)) if rate else []
    tokens = [shared_prefix, *np.random.default_rng(0).integers(prompt[0], prompt[1] + 1, requests).tolist()]
    for n in tokens_per_forward:

        def answers(flood: Flood | None = None, n: int | None = n) -> Answers:
            shared, *prompts = _prompts(answering, seeds, tokens)
            given = [shared + rest for rest in prompts]
            return answering.answer(given, output=output, tokens_per_forward=n, moments=moments, flood=flood)

        found = answers()
        figures = output_rate(found, tokens_per_forward=n, in_slots=None if rate else min(requests, slots))
        report["outputs"].append(figures)
        progress(_rate_line(figures))
        if flood is not None:
            fresh = (prompt for _ in itertools.count() for prompt in _prompts(answering, seeds, [flood] * 64))
            figures["flood"] = under_flood(found, answers(Flood(fresh, slots - requests)), at_once=slots - requests, length=flood)
            progress(_flood_line(figures["flood"]))
    return report


def first_token(answering: Answering, seeds: Iterator[int], *, length: int, repeats: int, tokens_per_forward: int | None = ALL) -> float:
    """Seconds from a prompt of ``length`` tokens to one token, with nothing else to do; the median of all but the first. Of itself one step
    fills what there is."""
    given = [_prompts(answering, seeds, [length]) for _ in range(repeats + 1)]
    found = [answering.answer(prompts, output=1, tokens_per_forward=tokens_per_forward).seconds for prompts in given]
    return statistics.median(found[1:])


def prompt_rate(
    answering: Answering, seeds: Iterator[int], *, count: int, length: int, tokens_per_forward: int | None = ALL
) -> dict[str, float]:
    """``count`` prompts of ``length`` tokens at once, one token each: ``seconds``, and ``tokens_per_second`` of the prompts."""
    seconds = answering.answer(_prompts(answering, seeds, [length] * count), output=1, tokens_per_forward=tokens_per_forward).seconds
    return {"count": count, "length": length, "seconds": seconds, "tokens_per_second": count * length / seconds}


def output_rate(found: Answers, *, tokens_per_forward: int | None, in_slots: int | None) -> dict[str, Any]:
    """Figures of answers. ``in_slots``: so many requests shared the time, from the first moment on; None where nobody can say.

    Returns:
      ``seconds`` for all; ``ms_per_step``, these shared among the forwards of a slot, all in, and ``nfe`` of a request, where somebody
      counts them; ``tokens_per_second`` of the outputs; ``first_block`` and ``inter_block``, seconds until the first tokens of a request
      and between those that came then, each by its mean and percentiles.
    """
    requests = len(found.came)
    return {
        "tokens_per_forward": tokens_per_forward,
        "requests": requests,
        "seconds": found.seconds,
        "ms_per_step": 1e3 * found.seconds * in_slots / found.forwards if found.forwards and in_slots else None,
        "tokens_per_second": found.tokens / found.seconds,
        "nfe": found.forwards and found.forwards / requests,
        "first_block": spread(found.first),
        "inter_block": spread(found.gaps),
    }


def under_flood(alone: Answers, beside: Answers, *, at_once: int, length: int) -> dict[str, Any]:
    """Figures of answers beside ``at_once`` prompts of ``length`` tokens at any time, and of the same answers ``alone``.

    Returns:
      ``prompts_per_second`` of the flood, and ``answered``, seconds of each, None where none was; of the answers ``tokens_per_second``,
      ``first_block`` and ``inter_block`` as in :func:`output_rate`, and ``p99_ratio`` of the latter to that of those alone, None where
      every answer came at once.
    """
    usual, now = spread(alone.gaps), spread(beside.gaps)
    return {
        "at_once": at_once,
        "length": length,
        "prompts_per_second": len(beside.beside) / beside.seconds,
        "answered": spread(beside.beside),
        "tokens_per_second": beside.tokens / beside.seconds,
        "first_block": spread(beside.first),
        "inter_block": now,
        "p99_ratio": now["p99"] / usual["p99"] if usual and now else None,
    }


def _rate_line(figures: dict[str, Any]) -> str:
    line = "{tokens_per_forward} a forward: " if figures["tokens_per_forward"] else ""
    line += "{requests} answers in {seconds:.2f} s, {tokens_per_second:.0f} tokens/s, " + _latencies(figures)
    return (line + (", {ms_per_step:.2f} ms a step" if figures["ms_per_step"] else "")).format(**figures)


def _flood_line(figures: dict[str, Any]) -> str:
    line = "  beside {at_once} prompts of {length} tokens at a time, {prompts_per_second:.2f} a second: " + _latencies(figures)
    return (line + (", at p99 {p99_ratio:.2f} x" if figures["p99_ratio"] else "")).format(**figures)


def _latencies(figures: dict[str, Any]) -> str:
    """How long users wait."""
    told = []
    for name, key in {"first block": "first_block", "between blocks": "inter_block"}.items():
        if times := figures[key]:
            told.append(f"{name} {1e3 * times['p50']:.0f} / {1e3 * times['p90']:.0f} / {1e3 * times['p99']:.0f}")
    return ", ".join(told) + " ms (p50 / p90 / p99)"


def _check_numbers(numbers: dict[str, Sequence[int | None]]) -> None:
    """Raises ValueError for one that is given and not positive."""
    if bad := [f"{name}={n}" for name, of in numbers.items() for n in of if n is not None and n < 1]:
        raise ValueError(f"{bad[0]} must be positive")


def _server(
    url: str, model: str | None, vocabulary: int | None, api_key: str | None, unused: dict[str, Any]
) -> tuple[Answering, dict[str, Any]]:
    """What answers at ``url``, and what is known of it. Raises ValueError for what only an engine of this process can be told."""
    if given := [name for name, value in unused.items() if value is not None]:
        raise ValueError(f"{given[0]}={unused[given[0]]!r} is of an engine of this process; the server at {url} has its own")
    if model is None:
        raise ValueError(f"model must be given: the model's name at {url}")
    return OverHTTP(url, model, vocabulary or 10_000, api_key or ""), {"url": url, "model": model}


def _engine(shape: str | None, model: str | None, most: int, asked: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    """An engine with room for requests of ``most`` tokens, if the model goes so far, and what is known of it."""
    if shape is not None and model is not None:
        raise ValueError(f"shape={shape!r} is of random weights; there is a model too")
    asked = asked | {"dtype": asked["dtype"] or "bfloat16"}
    if model is not None:
        began = time.perf_counter()
        engine = Engine.from_pretrained(model, max_model_len=most, **asked)
    else:
        shape = shape or "llada2-mini"
        network = shape_model(shape)
        asked |= {"max_model_len": min(network.spec.max_positions, most)}
        asked["strategy"] = for_model(network.spec, asked["strategy"])  # an unknown one should not cost the weights
        dtype = EngineConfig(dtype=asked["dtype"]).jax_dtype
        with jax.set_mesh(make_mesh()):
            params = jax.block_until_ready(random_params(network, dtype))
        began = time.perf_counter()
        engine = Engine(network, params, **asked)
    ready = time.perf_counter() - began
    engine.warm_up()
    seconds = {"ready_seconds": ready, "all_ready_seconds": time.perf_counter() - began}
    device = jax.devices()[0]
    about = {"device": f"{device.platform}: {device.device_kind}", "jax": jax.__version__, "shape": shape, "model": model}
    settings = {name: value for name, value in asked.items() if name not in ("max_slots", "max_model_len")}
    return engine, {**about, **settings, "strategy": engine.strategy, **seconds}


def _prompts(answering: Answering, seeds: Iterator[int], lengths: Sequence[int]) -> list[list[int]]:
    """Random prompts, none of which begins like another, or like an earlier one."""
    ids = answering.vocabulary
    return [np.random.default_rng(next(seeds)).choice(ids, n).tolist() for n in lengths]
