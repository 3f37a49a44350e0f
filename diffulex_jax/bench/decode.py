"""Decoding speed: what a user of the engine gets, and how much of a step is not the model."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from diffulex_jax import decode, request_state
from diffulex_jax.bench.forward import bare, program_of, shared_part
from diffulex_jax.bench.shapes import shape_model
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.device import empty
from diffulex_jax.engine.dispatch import jit
from diffulex_jax.engine.engine import Engine
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.models.base import Model, ModelSpec, Params, init, logits
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import DecodeState, KVPool
from diffulex_jax.strategies import for_model, resolve
from diffulex_jax.weights import checkpoint
from pallas_kernels import choose


QUESTIONS = (
    "What is 17 + 25 - 9?",
    "Tom has 6 boxes with 12 pens in each box. Tom gives away 15 pens. How many pens are left?",
    "What is (14 + 9) x 3?",
    "A shop has 8 boxes of 25 cups. It sells 47 cups. How many cups are left?",
)
"""What the embedded model is asked."""


def run(
    *,
    model: str | None,
    shape: str | None,
    strategies: Sequence[str | None],
    sampling: SamplingParams,
    prompt_tokens: int | None,
    repeats: int,
    dtype: str,
    block_size: int,
    buffer_size: int | None,
    max_slots: int,
    against: str | None = None,
    progress: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Measures strategies on one model.

    Args:
      model: as ``Engine.from_pretrained`` takes it; None with ``shape``.
      shape: a name in ``SHAPES``, filled with random weights; None with ``model``.
      strategies: names of strategies; None for the one that the model's authors decode it with.
      sampling: settings of every request.
      prompt_tokens: length of random prompts, one a slot, which ignore EOS; None asks the embedded model :data:`QUESTIONS` and
        gives others 64 random tokens.
      repeats: how often every prompt is decoded.
      dtype, block_size, buffer_size, max_slots, **settings: of the engine.
      against: ``"torch"`` times a bare forward of the same network in it too, see ``torch_forward``.
      progress: show a progress bar over strategies.

    Returns:
      Plain data: what was measured on what, and for each strategy the figures of :func:`measure` and :func:`measure_step`.

    Raises:
      ValueError: for a model, shape, strategy or setting that will not do.
      ImportError: without torch, where it is asked for.
    """
    if against not in (None, "torch"):
        raise ValueError(f"against={against!r} must be 'torch'")
    if against:
        from diffulex_jax.bench import torch_forward  # needs an extra, and is asked for before anything is loaded
    for strategy in strategies:
        if strategy is not None:
            resolve(strategy)  # an unknown one should not cost a load
    sizes: dict[str, Any] = {"block_size": block_size, "buffer_size": buffer_size, "max_slots": max_slots}
    if against and shape is not None:
        torch_forward.check(shape_model(shape))
    network, params, tokenizer = _model(model, shape, dtype)
    beside = torch_forward.forward_of(network, params) if against else None
    found = [for_model(network.spec, strategy) for strategy in strategies]
    if model == "embedded" and tokenizer is not None and prompt_tokens is None:
        prompts = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    else:
        prompts = random_prompts(network.spec, count=max_slots, tokens=64 if prompt_tokens is None else prompt_tokens)
        sampling = dataclasses.replace(sampling, ignore_eos=True)
    longest = max(map(len, prompts))

    results = {}
    kernels = choose(jax.devices()[0])
    for chosen in tqdm(found, disable=not progress, unit="strategy"):
        began = time.perf_counter()
        engine = Engine(network, params, strategy=chosen, dtype=dtype, **sizes, **settings)
        start_seconds = time.perf_counter() - began
        engine.warm_up()
        figures = measure(engine, prompts, sampling, repeats=repeats)
        program = program_of(network, chosen, EngineConfig(dtype=dtype, **sizes, **settings), kernels)
        figures |= measure_step(program, params, prompt_tokens=longest, beside=beside)
        results[chosen.name] = {"start_seconds": start_seconds} | figures
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "jax": jax.__version__,
        "kernels": choose(device)._asdict(),
        "model": model or f"{shape}, random weights",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "config": dataclasses.asdict(network.config),
        "dtype": dtype,
        **sizes,
        **settings,
        "prompts": len(prompts),
        "longest_prompt": longest,
        "repeats": repeats,
        "against": against,
        "sampling": dataclasses.asdict(sampling),
        "strategies": results,
    }


def random_prompts(spec: ModelSpec, *, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """``count`` prompts of ``tokens`` random ids, none of them the mask or EOS."""
    ordinary = np.setdiff1d(np.arange(spec.vocab_size), (spec.mask_id, *spec.eos_ids))
    return np.random.default_rng(seed).choice(ordinary, (count, tokens)).tolist()


def measure(engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, repeats: int) -> dict[str, float]:
    """Decodes ``prompts`` ``repeats`` times through ``Engine.generate``, after once to warm up.

    Returns:
      ``tokens`` and ``nfe`` of one repeat, ``tokens_per_second`` of wall-clock time, ``tokens_per_forward``, and
      ``ms_per_step_median`` and ``ms_per_step_p90`` over requests, prompt prefill and host work included.
    """
    engine.generate(prompts, sampling)
    began = time.perf_counter()
    outputs = [output for _ in range(repeats) for output in engine.generate(prompts, sampling)]
    seconds = time.perf_counter() - began
    tokens, nfe = sum(len(o.token_ids) for o in outputs), sum(o.nfe for o in outputs)
    steps = [1e3 * o.seconds / o.nfe for o in outputs]
    return {
        "tokens": tokens // repeats,
        "nfe": nfe // repeats,
        "tokens_per_second": tokens / seconds,
        "tokens_per_forward": tokens / nfe,
        "ms_per_step_median": statistics.median(steps),
        "ms_per_step_p90": float(np.percentile(steps, 90)),
    }


def measure_step(
    program: decode.Program,
    params: Params,
    *,
    prompt_tokens: int,
    beside: Callable[[np.ndarray], np.ndarray] | None = None,
    rounds: int = 7,
) -> dict[str, float]:
    """Times a denoise step against the bare model (embeddings, layers, vocabulary logits) of the same shapes and the same kernels.

    Both run as a loop of steps on the device, turn about in one process; what a step has beyond the model is the
    prediction, the rules, the cache and the bookkeeping. The step is the common one, with no finished block to write along.

    Args:
      program: what is run: half of a block is decoded, one token a step, and the first block of the window is active.
      params: of the network.
      prompt_tokens: cached positions in front of the block, rounded down to whole pages.
      beside: another forward, of ``[S, B]`` tokens, timed in turn with these.
      rounds: measurements of each; medians are returned.

    Returns:
      ``step_ms``, ``model_ms`` and ``outside_model_share`` = 1 - model / step of each turn; with ``beside`` also ``torch_ms`` and
      ``torch_ratio`` = step / that of each turn.
    """
    program, pool, state = _mid_request(program, params, prompt_tokens=prompt_tokens)
    dims = program.dims
    here = jax.devices()[0]
    whole = jit(functools.partial(decode.denoise, program, steps=dims.block), params["embed"].dtype, here, donate_argnums=(1, 2))
    alone = jit(functools.partial(_model_loop, program), params["embed"].dtype, here)
    steps = np.int32(max(1, dims.block // 2))
    spent, tables, known = [], _page_tables(state, pool), np.zeros(dims.slots, np.int32)
    with jax.set_mesh(make_mesh()):
        for _ in range(rounds + 1):
            own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
            began = time.perf_counter()
            pool, _, report, _ = jax.block_until_ready(
                whole(params, pool, own, page_table=tables, known=known, max_steps=steps, stop_on_finish=np.bool_(False))
            )
            middle = time.perf_counter()
            jax.block_until_ready(alone(params, pool, shared_part(state), page_table=tables, steps=steps))
            end = time.perf_counter()
            if beside is not None:
                for _ in range(steps):
                    beside(np.asarray(state.tokens).reshape(dims.slots, -1))
            other = time.perf_counter() - end
            spent.append((1e3 * (middle - began) / int(report.nfe.max()), *(1e3 * t / int(steps) for t in (end - middle, other))))
    spent = spent[1:]  # the first compiled
    step_ms, model_ms, other_ms = (statistics.median(times) for times in zip(*spent, strict=True))
    figures = {"step_ms": step_ms, "model_ms": model_ms, "outside_model_share": statistics.median(1 - m / s for s, m, _ in spent)}
    return figures | ({"torch_ms": other_ms, "torch_ratio": statistics.median(s / t for s, _, t in spent)} if beside else {})


def _mid_request(program: decode.Program, params: Params, *, prompt_tokens: int) -> tuple[decode.Program, KVPool, DecodeState]:
    """Every slot at the first block after its prompt, which fills one mask a step. The pool is empty: its content takes no time."""
    block = program.dims.block
    sampling = SamplingParams(max_tokens=block, accept_threshold=2.0, add_block_threshold=2.0, ignore_eos=True)
    prompt = np.zeros(max(1, prompt_tokens // block * block), np.int32)
    dims = dataclasses.replace(program.dims, pages_per_slot=-(-(len(prompt) + block) // program.dims.page))
    program = program._replace(dims=dims)
    pool, state = empty(program, params["embed"].dtype, dims.slots * dims.pages_per_slot)
    request = request_state.make_request(dims, prompt=prompt, params=sampling, eos_ids=())
    for slot in range(dims.slots):
        state = request_state.admit(dims, program.rule, state, jnp.int32(slot), request)
    return program, pool, state


def _page_tables(state: DecodeState, pool: KVPool) -> jax.Array:
    """``[S, P]``: every slot its own pages, in order."""
    slots = len(state.live)
    return jnp.arange(pool.k.shape[1], dtype=jnp.int32).reshape(slots, -1)


def _model_loop(
    program: decode.Program, params: Params, pool: KVPool, state: DecodeState, *, page_table: jax.Array, steps: jax.Array
) -> jax.Array:
    """``steps`` forwards over the window of a ``shared_part``, and the logits of the last."""

    def forward(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens, _ = carry
        found = logits(program.model, params, bare(program, params, pool, state.replace(tokens=tokens), page_table))
        # What goes in next depends on what came out, as in decoding: no forward can be left out or moved out of the loop.
        return jnp.where(jnp.isnan(found[..., 0]).reshape(tokens.shape), 0, tokens), found

    shape = (len(state.tokens), state.tokens[0].size, program.model.spec.vocab_size)
    return lax.fori_loop(0, steps, forward, (state.tokens, jnp.zeros(shape)))[1]


def _model(model: str | None, shape: str | None, dtype: str) -> tuple[Model, Params, Tokenizer | None]:
    if (model is None) == (shape is None):
        raise ValueError("give exactly one of a model and a shape")
    try:
        jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype={dtype!r} is not a dtype") from error
    if shape is not None:
        network = shape_model(shape)
        return network, jax.jit(lambda key: init(network, key, dtype))(jax.random.key(0)), None
    path = checkpoint.resolve(str(model))
    return *checkpoint.load(path, make_mesh(), dtype=dtype), Tokenizer.load(path)


def table(report: dict[str, Any]) -> str:
    """A report of :func:`run` for people."""
    head = [
        f"{report['model']} ({report['parameters'] / 1e6:.1f} M parameters), {report['dtype']}, {report['device']}, jax {report['jax']}",
        f"prompts: {report['prompts']} of up to {report['longest_prompt']} tokens; max_tokens {report['sampling']['max_tokens']}, "
        f"block {report['block_size']}, {report['max_slots']} at a time, {report['repeats']} times",
    ]
    columns = {
        "tokens/s": ("tokens_per_second", ".1f"),
        "tokens/forward": ("tokens_per_forward", ".2f"),
        "forwards": ("nfe", "d"),
        "ms/step": ("ms_per_step_median", ".2f"),
        "p90": ("ms_per_step_p90", ".2f"),
        "in the loop": ("step_ms", ".2f"),
        "model alone": ("model_ms", ".2f"),
        "outside": ("outside_model_share", ".1%"),
    }
    if report["against"]:
        columns |= {"torch alone": ("torch_ms", ".2f"), "step / torch": ("torch_ratio", ".2f")}
    rows = [["strategy", *columns]]
    rows += [[name, *(format(figures[key], form) for key, form in columns.values())] for name, figures in report["strategies"].items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join([*head, *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)])
