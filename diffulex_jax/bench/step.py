"""The denoise step on the device it runs on: its time against what its memory traffic alone takes, and the host's share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffulex_jax import decode, request_state
from diffulex_jax.bench import forward, traffic
from diffulex_jax.bench import kernels as kernel_times
from diffulex_jax.bench.shapes import random_params, shape_model
from diffulex_jax.engine import settle
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.device import empty
from diffulex_jax.engine.dispatch import Plan, jit_denoise
from diffulex_jax.engine.programs import pool_placement
from diffulex_jax.models.base import Model, Params, leaves
from diffulex_jax.parallel.mesh import check_split, mesh_of, parts, sharding
from diffulex_jax.planning.compiling import arguments
from diffulex_jax.planning.exchanges import exchanges_of_step
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import STATE_AXES, DecodeState, KVPool
from diffulex_jax.strategies import Strategy, for_model
from diffulex_jax.weights.quantise import check_groups, what_is_quantised
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
    cache: str | None = None,
    sub_block_cache: int | None = None,
    kernels: str = "auto",
    mesh: str | None = None,
    repeats: int = 10,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures every combination of batch, strategy and context on the default device, or on a mesh.

    Weights are random (see ``shapes.random_params``), and so is what the cache holds.

    Args:
      shape: a name in ``SHAPES``.
      batches: rows decoded together.
      strategies: names of strategies; None for the one that the model's authors decode it with.
      contexts: cached positions in front of the first block, multiples of the block size.
      dtype: of weights, activations and cache: ``"bfloat16"`` or ``"float32"``.
      weights: ``"int8"``, ``"int4"`` or ``"fp8"`` for quantised experts, or else layers; None for none.
      cache, sub_block_cache: as in ``EngineConfig``.
      kernels: ``"auto"`` or ``"reference"``, as in ``EngineConfig``.
      mesh: how devices share the work, ``"data=2,expert=2"``; None for one device.
      repeats: measurements of each combination.
      progress: is given the report line by line as it comes.

    Returns:
      Plain data: what was measured on what; under ``steps`` the figures of :func:`measure`, :func:`floor` and :func:`exchanged` for each
      combination, with ``floor_ratio`` = median / floor; under ``kernel_times`` those of ``kernels.measure`` for each batch, on one device
      only.

    Raises:
      ValueError: for a name that does not exist or a number that will not do.
    """
    model, devices = shape_model(shape), mesh_of(mesh)
    settings = EngineConfig(dtype=dtype, weights=weights, cache=cache, sub_block_cache=sub_block_cache, kernels=kernels)
    for name, numbers in {"batch": batches, "repeats": (repeats,), "context": contexts}.items():
        if bad := [n for n in numbers if n < 1 or (name == "context" and n % BLOCK)]:
            raise ValueError(f"{name}={bad[0]} must be positive" + (f" and a multiple of {BLOCK}" if name == "context" else ""))
    found = [for_model(model.spec, name) for name in strategies]
    for strategy in found:  # what will not do should not cost the weights
        settle.plan(model.spec, strategy, _sized(settings, strategy, batch=1, context=BLOCK))
    _check_mesh(model, batches, devices, weights)
    device = devices.devices.flat[0]
    chosen = choose(device) if settings.kernels == "auto" else REFERENCE
    bandwidth, rate = traffic.copy_bandwidth(device), traffic.matmul_rate(device, settings.jax_dtype)
    with jax.set_mesh(devices):
        params = random_params(model, settings.jax_dtype, weights=weights, kernels=chosen, mesh=devices)
        report: dict[str, Any] = {
            "device": f"{device.platform}: {device.device_kind}",
            "mesh": dict(devices.shape),
            "jax": jax.__version__,
            "shape": shape,
            "parameters": sum(math.prod(param.shape) for param in leaves(model.schema).values()),
            "dtype": dtype,
            "weights": weights,
            "cache": cache,
            "sub_block_cache": sub_block_cache,
            "kernels": chosen._asdict(),
            "copy_terabytes_per_second": bandwidth / 1e12,
            "matmul_teraflops": rate / 1e12,
            "steps_per_dispatch": STEPS,
            "steps": [],
            "kernel_times": [],
        }
        progress(_head(report, devices))
        cases = [(context, batch, strategy.name) for context in contexts for batch in batches for strategy in found]
        with ThreadPoolExecutor() as threads:  # everything is compiled before anything is timed
            compiled, counters = {}, {}
            for (context, batch, name), strategy in zip(cases, itertools.cycle(found), strict=False):
                asked = _sized(settings, strategy, batch=batch, context=context)
                program = forward.program_of(model, strategy, asked, chosen)
                pages = _page_tables(program)
                given = arguments(program, devices, dtype=settings.jax_dtype, num_pages=pages.size, weights=weights)
                dispatch = jit_denoise(program, devices, dtype=settings.jax_dtype, steps=STEPS)
                compiled[context, batch, name] = program, threads.submit(dispatch.lower(*given).compile)
                if model.spec.experts_per_token and (context, batch) not in counters:
                    count, counts = forward.touch_counter(program)
                    lowered = jax.jit(count).lower(*given[:2], _jit_shared_part(devices).eval_shape(given[2]), pages)
                    counters[context, batch] = threads.submit(lowered.compile), counts
        for context, batch, name in cases:
            program, executable = compiled[context, batch, name]
            counter = counters.get((context, batch))
            times = measure(program, params, executable.result(), mesh=devices, counter=counter, context=context, repeats=repeats)
            sizes: dict[str, Any] = {"context": context, "experts": times["experts_touched"], "weights": weights}
            floors = floor(program, params, mesh=devices, **sizes, bandwidth=bandwidth, rate=rate)
            figures = times | floors | {"floor_ratio": times["ms_median"] / floors["floor_ms"]} | exchanged(executable.result(), devices)
            report["steps"].append({"strategy": name, "batch": batch, "context": context} | figures)
            progress(_line(_step_columns(devices), report["steps"][-1]))
        if devices.size > 1:
            return report
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
    *,
    mesh: Mesh,
    counter: tuple[Future[Any], list[int]] | None,
    context: int,
    repeats: int,
) -> dict[str, float]:
    """Times whole blocks, one token of each row a step: dispatches of a few steps, the first of which also writes the block before.

    They are timed as the engine runs them, each with its report read before the next is launched, and once more queued all at once:
    what the former takes longer is the host's share.

    Args:
      program, params: what is run.
      dispatch: the compiled ``jit_denoise`` of ``mesh``.
      mesh: where the parameters are.
      counter: the compiled ``forward.touch_counter`` of these shapes; None for a model without experts.
      context, repeats: see :func:`run`.

    Returns:
      ``ms_median`` over blocks, of a row's step, and ``ms_p90`` over dispatches, of the device's; ``device_ms`` with nobody waiting;
      ``host_share`` = 1 - device / median; ``experts_touched`` a layer, on average over the block's beginning and end.
    """
    pool, state = _mid_request(program, params, mesh, context=context)
    shared_part = _jit_shared_part(mesh)
    pages = _page_tables(program)
    plan = Plan(pages, known=0, max_steps=STEPS, stop_on_finish=False).pack()
    touched: list[int] = []

    def count(pool: KVPool, state: DecodeState) -> None:
        if counter is not None:
            executable, counts = counter
            counts.clear()
            jax.block_until_ready(executable.result()(params, pool, shared_part(state), pages))
            jax.effects_barrier()
            touched.extend(counts)

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

    count(pool, state)
    pool, state, _ = block(pool, state, read=True)  # the first block
    count(pool, state)
    spent: dict[bool, list[list[float]]] = {True: [], False: []}
    for _ in range(repeats):
        for read, times in spent.items():
            own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
            pool, own, each = block(pool, own, read=read)
            times.append(each)
            forwards = np.asarray(own.nfe - state.nfe)
            if not program.dims.sub_block_cache and int(forwards.min()) != BLOCK:
                raise RuntimeError(f"a block of {BLOCK} tokens took {forwards} steps instead of one a token")
    # Behind a cache of sub-blocks rows wait for each other, and then take fewer steps than the device.
    median, device = (statistics.median(sum(each) / forwards.mean() for each in spent[read]) for read in (True, False))
    return {
        "ms_median": median,
        "ms_p90": float(np.percentile(np.array(spent[True]) / STEPS, 90)),
        "device_ms": device,
        "host_share": max(0.0, 1 - device / median),
        "experts_touched": statistics.mean(touched) if touched else 0.0,
    }


def floor(
    program: decode.Program,
    params: Params,
    *,
    mesh: Mesh,
    context: int,
    experts: float,
    bandwidth: float,
    rate: float,
    weights: Form | None = None,
) -> dict[str, float]:
    """What no step of :func:`measure` can do without on each device, on average over a block.

    Args:
      program, params, mesh, context, weights: as there, and see :func:`run`.
      experts: routed experts of a layer that some token of a step goes to; with ``data``, of those of its slots.
      bandwidth, rate: bytes and operations a second.

    Returns:
      ``gigabytes`` that a step must read, ``floor_ms``, which they take at ``bandwidth``, and ``arithmetic_ms``, which its operations on
      matrices take at ``rate``: where a step feeds many positions, that is the greater one.
    """
    model, batch, split = program.model, program.dims.slots // parts(mesh, ("slot",)), mesh.abstract_mesh
    fed, cached = _fed_and_cached(program, context)
    sizes: dict[str, Any] = {"batch": batch, "context": cached, "experts": experts, "weights": weights}
    bytes_read = forward.step_bytes(model, params["embed"].dtype.itemsize, **sizes, mesh=split)
    window = program.dims.window * program.dims.block
    head = model.head(params).size / parts(mesh, ("vocab",)) * batch * (window - fed)  # only of the window
    operations = forward.step_operations(model, tokens=batch * fed, context=fed + cached, mesh=split) + 2 * head
    return {"gigabytes": bytes_read / 1e9, "floor_ms": 1e3 * bytes_read / bandwidth, "arithmetic_ms": 1e3 * operations / rate}


def exchanged(compiled: Any, mesh: Mesh) -> dict[str, float]:
    """What devices exchange in a step of the compiled ``jit_denoise``.

    Returns:
      ``exchanges``, how many; ``exchanged_megabytes``, the results of all of them on one device; ``exchange_ms``, which as many sums of
      their mean size take with nothing between them.
    """
    found = exchanges_of_step(compiled.as_text()).values() if mesh.size > 1 else ()
    seconds = sum(kind.count * traffic.sum_seconds(mesh, kind.bytes // kind.count) for kind in found)
    return {
        "exchanges": sum(kind.count for kind in found),
        "exchanged_megabytes": sum(kind.bytes for kind in found) / 1e6,
        "exchange_ms": 1e3 * seconds,
    }


def _check_mesh(model: Model, batches: Sequence[int], mesh: Mesh, weights: Form | None) -> None:
    """Checks that rows and parameters can be split over ``mesh``; raises ValueError."""
    for batch in batches:
        check_split(mesh, (batch,), ("slot",), f"batch={batch}")
    for path, param in leaves(model.schema).items():
        check_split(mesh, param.shape, param.axes, path[-1])
    check_groups(model, weights, mesh)


def _fed_and_cached(program: decode.Program, context: int) -> tuple[float, float]:
    """Positions of a row that go through the network in a step, and those whose keys and values it reads. It decodes its second block."""
    start, end = context + BLOCK, context + 3 * BLOCK
    if program.attention.paged:
        fed = program.dims.sub_block_cache or BLOCK
        return fed, start + BLOCK - fed
    if program.attention.cache == "none":
        return end, 0
    fed = BLOCK if program.attention.cache == "dual" else end - start
    later = 1 - 1 / BLOCK  # all but the first forward of a block, which is over the whole canvas
    return later * fed + end / BLOCK, later * (end - fed)


def _sized(settings: EngineConfig, strategy: Strategy, *, batch: int, context: int) -> EngineConfig:
    """The settings of an engine that decodes three blocks behind ``context`` positions, or one of three where there can be but one."""
    block = 3 * BLOCK if strategy.rule.one_block and settings.cache in (None, "none") else BLOCK
    sizes: dict[str, Any] = {"max_slots": batch, "max_model_len": context + 3 * BLOCK}
    return dataclasses.replace(settings, block_size=block, force_block_size=True, buffer_size=1, **sizes)


def _jit_shared_part(mesh: Mesh) -> Any:
    return jax.jit(forward.shared_part, out_shardings=sharding(mesh, STATE_AXES))


def _page_tables(program: decode.Program) -> np.ndarray:
    """Of as many pages for each row as there can be, all its own."""
    dims = program.dims
    return np.arange(dims.slots * dims.pages_per_slot, dtype=np.int32).reshape(dims.slots, -1)


def _mid_request(program: decode.Program, params: Params, mesh: Mesh, *, context: int) -> tuple[KVPool, DecodeState]:
    """Every row behind ``context`` cached positions, with nothing decoded."""
    dims, rule = program.dims, program.rule
    on_pool, on_slots = pool_placement(mesh, program), sharding(mesh, STATE_AXES)

    def fresh() -> tuple[KVPool, DecodeState]:
        pool, state = empty(program, params["embed"].dtype, _page_tables(program).size)
        return KVPool(*(jax.random.normal(jax.random.key(i), a.shape, a.dtype) for i, a in enumerate((pool.k, pool.v)))), state

    pool, state = jax.jit(fresh, out_shardings=(on_pool, on_slots))()
    sampling = SamplingParams(max_tokens=3 * BLOCK, accept_threshold=2.0, ignore_eos=True)
    admit = jax.jit(functools.partial(request_state.admit, dims, rule), donate_argnums=0, out_shardings=on_slots)
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
    "compute": ("arithmetic_ms", ".3f"),
}
_EXCHANGE_COLUMNS = {
    "exchgs": ("exchanges", "d"),
    "MB": ("exchanged_megabytes", ".2f"),
    "alone": ("exchange_ms", ".3f"),
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


def _step_columns(mesh: Mesh) -> dict[str, tuple[str, str]]:
    return _STEP_COLUMNS | (_EXCHANGE_COLUMNS if mesh.size > 1 else {})


def _head(report: dict[str, Any], mesh: Mesh) -> str:
    quantised = f", {report['weights']} {what_is_quantised(shape_model(report['shape']))}" if report["weights"] else ""
    split = "".join(f", {axis}={size}" for axis, size in report["mesh"].items() if size > 1)
    used = ", ".join(f"{operation} {backend}" for operation, backend in report["kernels"].items())
    return "\n".join(
        [
            f"{report['shape']} ({report['parameters'] / 1e9:.2f} G parameters), {report['dtype']}{quantised}, random weights; "
            f"{report['device']}{split}, jax {report['jax']}; {used}",
            f"floors: bytes that must be read, at {report['copy_terabytes_per_second']:.2f} TB/s, which a copy on this device reaches",
            _title(_step_columns(mesh)),
        ]
    )


def _title(columns: dict[str, tuple[str, str]]) -> str:
    return "  ".join(name.rjust(18 if form == "s" else 8) for name, (_, form) in columns.items())


def _line(columns: dict[str, tuple[str, str]], row: dict[str, Any]) -> str:
    cells = ((format(row[key], form) if row[key] is not None else "", form) for key, form in columns.values())
    return "  ".join(cell.rjust(18 if form == "s" else 8) for cell, form in cells)
