"""The denoise step on the device it runs on: its time against what its memory traffic alone takes, and the host's share."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffulex_jax import decode, request_state
from diffulex_jax.bench import forward, traffic
from diffulex_jax.bench import kernels as kernel_times
from diffulex_jax.bench.shapes import random_params, shape_model
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.device import empty
from diffulex_jax.engine.dispatch import Plan, exact, packed_denoise
from diffulex_jax.models.base import Params, leaves
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import DecodeState, KVPool
from diffulex_jax.strategies import for_model
from diffulex_jax.weights import quantise
from pallas_kernels import REFERENCE, choose
from pallas_kernels.quantised import Form


BLOCK, STEPS = 32, EngineConfig().steps_per_dispatch


def run(
    *,
    shape: str,
    batches: Sequence[int],
    strategies: Sequence[str | None],
    contexts: Sequence[int],
    dtype: str = "bfloat16",
    weights: Form | None = None,
    kernels: str = "auto",
    repeats: int = 10,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures every combination of batch, strategy and context on the default device.

    Weights are random (see ``shapes.random_params``), and so is what the cache holds.

    Args:
      shape: a name in ``SHAPES``.
      batches: rows decoded together.
      strategies: names of strategies; None for the one that the model's authors decode it with.
      contexts: cached positions in front of the first block, multiples of the block size.
      dtype: of weights, activations and cache: ``"bfloat16"`` or ``"float32"``.
      weights: ``"int8"`` or ``"int4"`` for quantised experts; None for none.
      kernels: ``"auto"`` or ``"reference"``, as in ``EngineConfig``.
      repeats: measurements of each combination.
      progress: is given the report line by line as it comes.

    Returns:
      Plain data: what was measured on what; under ``steps`` the figures of :func:`measure` for each combination, and under
      ``kernel_times`` those of ``kernels.measure`` for each batch.

    Raises:
      ValueError: for a name that does not exist or a number that will not do.
    """
    model = shape_model(shape)
    settings = EngineConfig(dtype=dtype, weights=weights, kernels=kernels)
    for name, numbers in {"batch": batches, "repeats": (repeats,), "context": contexts}.items():
        if bad := [n for n in numbers if n < 1 or (name == "context" and n % BLOCK)]:
            raise ValueError(f"{name}={bad[0]} must be positive" + (f" and a multiple of {BLOCK}" if name == "context" else ""))
    quantise.check(model.spec, weights)
    found = [for_model(model.spec, name) for name in strategies]
    device = jax.devices()[0]
    chosen = choose(device) if settings.kernels == "auto" else REFERENCE
    with jax.set_mesh(make_mesh()):
        bandwidth = traffic.copy_bandwidth(device)
        params = random_params(model, settings.jax_dtype, weights=weights, kernels=chosen)
        report: dict[str, Any] = {
            "device": f"{device.platform}: {device.device_kind}",
            "jax": jax.__version__,
            "shape": shape,
            "parameters": sum(math.prod(param.shape) for param in leaves(model.schema).values()),
            "dtype": dtype,
            "weights": weights,
            "kernels": chosen._asdict(),
            "copy_terabytes_per_second": bandwidth / 1e12,
            "steps_per_dispatch": STEPS,
            "steps": [],
            "kernel_times": [],
        }
        progress(_head(report))
        cases = [(context, batch, strategy.name) for context in contexts for batch in batches for strategy in found]
        with ThreadPoolExecutor() as threads:  # everything is compiled before anything is timed
            compiled, counters = {}, {}
            for (context, batch, name), strategy in zip(cases, itertools.cycle(found), strict=False):
                sizes: dict[str, Any] = {
                    "block_size": 3 * BLOCK if strategy.rule.one_block else BLOCK,
                    "force_block_size": True,
                    "buffer_size": 1,
                    "max_slots": batch,
                }
                asked = EngineConfig(dtype=dtype, weights=weights, max_model_len=context + 3 * BLOCK, **sizes)
                program = forward.program_of(model, strategy, asked, chosen)
                arguments = _arguments(program, params)
                dispatch = jax.jit(
                    exact(functools.partial(packed_denoise, program=program, steps=STEPS), settings.jax_dtype), donate_argnums=(1, 2)
                )
                compiled[context, batch, name] = program, threads.submit(dispatch.lower(*arguments).compile)
                if (context, batch) not in counters:
                    count, counts = forward.touch_counter(program)
                    state = jax.eval_shape(forward.shared_part, arguments[2])
                    lowered = jax.jit(count).lower(*arguments[:2], state, _page_tables(program))
                    counters[context, batch] = threads.submit(lowered.compile), counts
        for context, batch, name in cases:
            program, executable = compiled[context, batch, name]
            counter, counts = counters[context, batch]
            run_block = functools.partial(measure, program, params, executable.result(), counter.result(), counts, weights=weights)
            figures = run_block(context=context, bandwidth=bandwidth, repeats=repeats)
            report["steps"].append({"strategy": name, "batch": batch, "context": context} | figures)
            progress(_line(_STEP_COLUMNS, report["steps"][-1]))
        progress(_title(_KERNEL_COLUMNS))
        for batch in batches:
            for figures in kernel_times.measure(model, params, chosen, batch=batch, context=contexts[0], block=BLOCK, bandwidth=bandwidth):
                report["kernel_times"].append({"batch": batch} | figures)
                progress(_line(_KERNEL_COLUMNS, report["kernel_times"][-1]))
    return report


def measure(
    program: decode.Program,
    params: Params,
    dispatch: Callable[..., Any],
    counter: Callable[..., Any],
    counts: list[int],
    *,
    context: int,
    bandwidth: float,
    repeats: int,
    weights: Form | None = None,
) -> dict[str, Any]:
    """Times whole blocks, one token of each row a step: dispatches of a few steps, the first of which also writes the block before.

    They are timed as the engine runs them, each with its report read before the next is launched, and once more queued all at once:
    what the former takes longer is the host's share.

    Args:
      program, params: what is run.
      dispatch: the compiled ``packed_denoise``.
      counter, counts: the compiled ``forward.touch_counter`` of these shapes.
      context, bandwidth, repeats, weights: see :func:`run`.

    Returns:
      ``ms_median`` over blocks and ``ms_p90`` over dispatches, of a step; ``device_ms`` of a step with nobody waiting; ``host_share``
      = 1 - device / median; ``experts_touched`` a layer, on average over the block's beginning and end; ``gigabytes`` that a step must
      read with so many; ``floor_ms``, those at ``bandwidth`` bytes a second; ``floor_ratio`` = median / floor.
    """
    pool, state = _mid_request(program, params, context=context)
    batch, pages = program.dims.slots, _page_tables(program)
    plan = Plan(pages, known=0, max_steps=STEPS, stop_on_finish=False).pack()
    counts.clear()
    jax.block_until_ready(counter(params, pool, forward.shared_part(state), pages))

    def block(pool: KVPool, state: DecodeState, *, read: bool) -> tuple[KVPool, DecodeState, list[float]]:
        times = [time.perf_counter()]
        for _ in range(BLOCK // STEPS):
            pool, state, report, _ = dispatch(params, pool, state, plan)
            if read:
                np.asarray(report)
                times.append(time.perf_counter())
        jax.block_until_ready(report)
        times[-1 if read else 1 :] = [time.perf_counter()]
        return pool, state, [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]

    pool, state, _ = block(pool, state, read=True)  # the first block
    jax.block_until_ready(counter(params, pool, forward.shared_part(state), pages))
    jax.effects_barrier()
    spent: dict[bool, list[list[float]]] = {True: [], False: []}
    for _ in range(repeats):
        for read, times in spent.items():
            own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
            pool, own, each = block(pool, own, read=read)
            times.append(each)
            if int((own.nfe - state.nfe).min()) != BLOCK:
                raise RuntimeError(f"a block of {BLOCK} tokens took {own.nfe - state.nfe} steps instead of one a token")
    median, device = (statistics.median(sum(each) / BLOCK for each in spent[read]) for read in (True, False))
    mean = statistics.mean(counts) if counts else 0.0
    cached = context + BLOCK if program.attention.paged else 0
    sizes: dict[str, Any] = {"batch": batch, "context": cached, "experts": mean, "weights": weights}
    bytes_read = forward.step_bytes(program.model, params["embed"].dtype.itemsize, **sizes)
    gigabytes = bytes_read / 1e9
    floor = 1e12 * gigabytes / bandwidth
    return {
        "ms_median": median,
        "ms_p90": float(np.percentile(np.array(spent[True]) / STEPS, 90)),
        "device_ms": device,
        "host_share": max(0.0, 1 - device / median),
        "experts_touched": mean,
        "gigabytes": gigabytes,
        "floor_ms": floor,
        "floor_ratio": median / floor,
    }


def _arguments(program: decode.Program, params: Params) -> tuple[Any, ...]:
    """The shapes of what a dispatch is called with."""
    pool, state = jax.eval_shape(functools.partial(empty, program, params["embed"].dtype, _page_tables(program).size))
    return params, pool, state, Plan(_page_tables(program), known=0, max_steps=STEPS, stop_on_finish=False).pack()


def _page_tables(program: decode.Program) -> np.ndarray:
    """Of as many pages for each row as there can be, all its own."""
    dims = program.dims
    return np.arange(dims.slots * dims.pages_per_slot, dtype=np.int32).reshape(dims.slots, -1)


def _mid_request(program: decode.Program, params: Params, *, context: int) -> tuple[KVPool, DecodeState]:
    """Every row behind ``context`` cached positions, with nothing decoded."""
    dims, rule = program.dims, program.rule
    pool, state = empty(program, params["embed"].dtype, _page_tables(program).size)
    pool = KVPool(*(jax.random.normal(jax.random.key(i), a.shape, a.dtype) for i, a in enumerate((pool.k, pool.v))))
    sampling = SamplingParams(max_tokens=3 * BLOCK, accept_threshold=2.0, ignore_eos=True)
    admit = jax.jit(functools.partial(request_state.admit, dims, rule), donate_argnums=0)
    for slot in range(dims.slots):
        prompt = np.random.default_rng(slot).integers(0, program.model.spec.vocab_size // 2, context).astype(np.int32)
        state = admit(state, np.int32(slot), request_state.make_request(dims, prompt=prompt, params=sampling, eos_ids=()))
    return pool, state


_STEP_COLUMNS = {
    "strategy": ("strategy", "s"),
    "batch": ("batch", "d"),
    "context": ("context", "d"),
    "ms": ("ms_median", ".3f"),
    "p90": ("ms_p90", ".3f"),
    "device": ("device_ms", ".3f"),
    "host": ("host_share", ".1%"),
    "experts": ("experts_touched", ".1f"),
    "GB": ("gigabytes", ".2f"),
    "floor": ("floor_ms", ".3f"),
    "x floor": ("floor_ratio", ".2f"),
}
_KERNEL_COLUMNS = {
    "kernel": ("kernel", "s"),
    "batch": ("batch", "d"),
    "tokens": ("tokens", "d"),
    "ms": ("ms", ".4f"),
    "floor": ("floor_ms", ".4f"),
    "x floor": ("floor_ratio", ".2f"),
    "experts": ("experts_touched", ".0f"),
}


def _head(report: dict[str, Any]) -> str:
    quantised = f", {report['weights']} experts" if report["weights"] else ""
    used = ", ".join(f"{operation} {backend}" for operation, backend in report["kernels"].items())
    return "\n".join(
        [
            f"{report['shape']} ({report['parameters'] / 1e9:.2f} G parameters), {report['dtype']}{quantised}, random weights; "
            f"{report['device']}, jax {report['jax']}; {used}",
            f"floors: bytes that must be read, at {report['copy_terabytes_per_second']:.2f} TB/s, which a copy on this device reaches",
            _title(_STEP_COLUMNS),
        ]
    )


def _title(columns: dict[str, tuple[str, str]]) -> str:
    return "  ".join(name.rjust(18 if form == "s" else 8) for name, (_, form) in columns.items())


def _line(columns: dict[str, tuple[str, str]], row: dict[str, Any]) -> str:
    cells = ((format(row[key], form) if row[key] is not None else "", form) for key, form in columns.values())
    return "  ".join(cell.rjust(18 if form == "s" else 8) for cell, form in cells)
