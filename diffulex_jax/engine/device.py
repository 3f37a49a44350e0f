"""The device side of the engine: buffers, the jitted functions that own them, and the shapes they are compiled for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffulex_jax import decode, request_state
from diffulex_jax.decode.likelihood import Canvases
from diffulex_jax.engine import packing, parameters, programs, scoring
from diffulex_jax.engine.dispatch import Plan, jit, jit_denoise, unpack_report
from diffulex_jax.engine.executables import Programs
from diffulex_jax.engine.request import Chunk, Tracked
from diffulex_jax.engine.results import TraceStep
from diffulex_jax.engine.words import Words
from diffulex_jax.models.adapted import ADAPTERS, without
from diffulex_jax.models.base import Params, leaves
from diffulex_jax.parallel.mesh import sharding
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import STATE_AXES, Canvas, DecodeState, KVPool, StepReport, Trace
from pallas_kernels.block_attention import stored


_CACHED_PAGES = 8  # pages at the most, in times of what the slots need


class Launched(NamedTuple):
    """A dispatch under way: the packed report, the slots of its rows, the trace, and the slots whose trace is wanted with the lists it
    goes to."""

    report: jax.Array
    slots: np.ndarray
    trace: Trace | None
    traced: list[tuple[int, list[TraceStep]]]


class JaxDevice:
    """Implements ``scheduler.Device`` on a mesh.

    Attributes:
      pool, state: what is on the device.
      saved_structure: a ``Saved`` with shapes and dtypes for arrays; how many pages one holds differs.
    """

    def __init__(
        self,
        program: decode.Program,
        params: Params,
        *,
        mesh: Mesh,
        dtype: Any,
        num_pages: int,
        max_batched_tokens: int,
        steps_per_dispatch: int,
        eos_ids: tuple[int, ...],
        adapters: Sequence[str] = (),
    ):
        """``adapters`` are the names of those that ``params`` hold at ``ADAPTERS``, in order."""
        self.program, self.mesh, self.num_pages = program, mesh, num_pages
        self._params, self.eos_ids = params, eos_ids
        self._numbers: dict[str | None, int] = {name: i for i, name in enumerate((None, *adapters))}
        dims = program.dims
        self._adapter = np.zeros(dims.slots, np.int32) if adapters else None
        on_pool, on_slots, everywhere = programs.pool_placement(mesh, program), sharding(mesh, STATE_AXES), sharding(mesh, ())
        kernels = program.kernels.for_layers(dtype)
        few = kernels.few_rows if program.attention.paged else ()
        self._shards = mesh.shape["data"]
        self._prefill_shapes = packing.prefill_shapes(program, kernels.prefill_tokens, budget=max_batched_tokens, shards=self._shards)
        self._pages, self._known = np.full((dims.slots, dims.pages_per_slot), num_pages, np.int32), np.zeros(dims.slots, np.int32)
        # The list of pages that each row was made from, and how many of them: only what is new is written.
        self._placed: list[tuple[list[int], int]] = [([], 0)] * dims.slots
        # What a prefill left for the row of a request, by its number, until it is admitted.
        self._carried: dict[int, jax.Array] = {}
        self._jit_one = jax.jit(lambda rows, at: rows[at], out_shardings=everywhere)
        jit_state = functools.partial(jax.jit, donate_argnums=(0,), out_shardings=on_slots)
        self._requests = Words(self._request(Tracked(id=0, prompt=np.zeros(1, np.int32), params=SamplingParams())))
        self._prompts = {shape: Words(self._no_prompts(shape)) for shape in self._prefill_shapes}
        self._jit_admit = jit_state(functools.partial(_admit, self.program, self._requests))
        self._jit_put, self._jit_release = jit_state(request_state.put), jit_state(request_state.release)
        self._jit_take = jax.jit(request_state.take, out_shardings=everywhere)
        self._jit_read = jax.jit(_read_pages, out_shardings=everywhere)
        self._jit_write = jax.jit(_write_pages, donate_argnums=(0,), out_shardings=on_pool)
        self._jit_sequence = jax.jit(lambda state, slot: jax.tree.map(lambda a: a[slot], state.sequence), out_shardings=everywhere)
        # The large ones. Denoising by whether all rows are known to be greedy: one question less for a host that drives the loops.
        kinds = (False, True) if program.kernels.host_drives_loops else (False,)
        self._programs = Programs(mesh, keep=program.kernels.kept_ready)
        self._denoise = {g: jit_denoise(program._replace(greedy=g), mesh, dtype=dtype, steps=steps_per_dispatch) for g in kinds}
        compiled = functools.partial(jit, dtype=dtype, device=mesh.devices.flat[0], donate_argnums=(1,), out_shardings=(on_pool, on_slots))
        self._budget = max_batched_tokens
        self._log_probs = jit(functools.partial(programs.log_probs, program), dtype, mesh.devices.flat[0], out_shardings=everywhere)
        self._prefills = {shape: compiled(functools.partial(_prefill, program, words)) for shape, words in self._prompts.items()}
        each = dims.slots // self._shards
        # Rows of each data shard that a dispatch may have, and the slots that they are.
        self._rows = {n: np.flatnonzero(np.arange(dims.slots) % each < n) for n in sorted({min(n, each) for n in (*few, each)})}
        with jax.set_mesh(mesh):
            self.pool, self.state = jax.jit(lambda: empty(program, dtype, num_pages), out_shardings=(on_pool, on_slots))()
            row = jax.eval_shape(request_state.take, self.state, np.int32(0))
            kv = jax.eval_shape(_read_pages, self.pool, self._table([]))
        self.saved_structure = request_state.Saved(row, kv.k, kv.v)

    def warm_up(self, requests: Sequence[Tracked] | None = None, *, wait: bool = True) -> None:
        """Compiles what requests need, by default every program there is, by running each once on nothing. No slot may be in use.

        Unless it is to ``wait``: what any request can do with. Others, which do the same in less time, are compiled in the background.
        """
        shapes: Sequence[packing.Shape] = self._prefill_shapes
        loops = [(greedy, rows) for greedy in self._denoise for rows in self._rows]
        if requests is not None:
            shapes = packing.shapes_for(self.program, shapes, requests)
            kinds = {self._kind([request]) for request in requests}
            loops = [(greedy, rows) for greedy, rows in loops if greedy in kinds]
        spare_loops, spare_shapes = ([], []) if wait else self._spare()
        loops, shapes = [loop for loop in loops if loop not in spare_loops], [shape for shape in shapes if shape not in spare_shapes]
        self._begin(self._programs.begin, loops, shapes)
        self._begin(self._programs.begin_later, spare_loops, spare_shapes)
        probe = Tracked(id=0, prompt=np.zeros(1, np.int32), params=SamplingParams(seed=0).resolve(), slot=0)
        for shape in shapes:
            self._prefill(self._no_prompts(shape), {0: probe})
        self.admit(probe)
        if requests is None or self.num_pages < self.program.dims.slots * self.program.dims.pages_per_slot:  # some may be set aside
            probe.saved = self.save(probe)
            self.restore(probe)
        if requests is None or any(request.wants_sequence for request in requests):
            self.read(probe)
        self.release(0)
        for greedy, rows in loops:
            jax.block_until_ready(self._dispatch(self._plan(rows, max_steps=1, stop_on_finish=False), greedy=greedy))

    @property
    def params(self) -> Params:
        """The model's parameters, without adapters."""
        return without(self._params)

    def update_params(self, params: Params, *, donate: bool) -> None:
        """Takes other parameters in; adapters stay. Should memory not suffice for it, it holds some of both, until it is called again.

        Raises:
          ValueError: naming the leaf that will not do; then nothing is changed.
        """
        program, tree = self.program, jax.tree.structure(self.params, is_leaf=lambda node: not isinstance(node, dict))
        parameters.check(program.model, self.params, params)
        adapters = {name: node for name, node in self._params.items() if name == ADAPTERS}
        held, self._params = leaves(self.params), {}
        try:
            parameters.replace(program.model, held, params, programs=self._programs, kernels=program.kernels, mesh=self.mesh, donate=donate)
        finally:
            self._params = jax.tree.unflatten(tree, held.values()) | adapters

    def score(
        self, asked: Sequence[scoring.Asked], estimator: scoring.Estimator, adapter: str | None, *, progress: bool
    ) -> list[np.ndarray]:
        """See ``scoring.score``; ``adapter`` is the name of one, or None."""
        program, shards = self.program, self._shards
        each = program.dims.slots // shards

        def run(canvases: Canvases) -> np.ndarray:
            shape = canvases.noisy.shape, None if canvases.clean is None else canvases.clean.shape[1]
            rows = None if self._adapter is None else np.full(shape[0][0], self._numbers[adapter], np.int32)
            return np.asarray(self._programs(("score", shape), self._log_probs, self._params, canvases, rows))

        return scoring.score(
            asked,
            estimator,
            dims=program.dims,
            policy=program.attention,
            most=program.dims.positions,
            rows=lambda tokens: shards * max(1, min(each, self._budget // tokens)),
            run=run,
            progress=progress,
        )

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        how = {"table_of": self._table, "adapter_of": self._adapter_of, "shards": self._shards}
        shapes = [shape for shape in self._prefill_shapes if not self._programs.is_awaited(("prefill", shape))]
        for packed, requests in packing.pack(self.program, shapes, chunks, **how):
            self._prefill(packed, requests)

    def admit(self, request: Tracked) -> None:
        packed = self._requests.pack(self._request(request))
        with jax.set_mesh(self.mesh):
            self.state = self._jit_admit(self.state, _slot(request), packed, self._carried.pop(request.id, None))

    def save(self, request: Tracked) -> request_state.Saved:
        with jax.set_mesh(self.mesh):
            row = self._jit_take(self.state, _slot(request))
            kv = self._jit_read(self.pool, self._table(self._pages_held(request)))
        row, kv = jax.device_get((row, kv))
        count = self._pages_written(request)
        return request_state.Saved(row, *jax.tree.map(lambda a: a[:, :count].copy(), (kv.k, kv.v)))

    def restore(self, request: Tracked) -> None:
        saved, dims = request.saved, self.program.dims
        count = saved.k.shape[1]
        room = dims.pages_per_slot - count
        kv = jax.tree.map(lambda a: np.pad(a, [(0, room if i == 1 else 0) for i in range(a.ndim)]), KVPool(saved.k, saved.v))
        with jax.set_mesh(self.mesh):
            self.pool = self._jit_write(self.pool, kv, self._table(self._pages_held(request), count))
            self.state = self._jit_put(self.state, _slot(request), saved.row)

    def release(self, slot: int) -> None:
        with jax.set_mesh(self.mesh):
            self.state = self._jit_release(self.state, np.int32(slot))

    def read(self, request: Tracked) -> Canvas:
        with jax.set_mesh(self.mesh):
            return jax.device_get(self._jit_sequence(self.state, _slot(request)))

    def launch(self, running: dict[int, Tracked], *, max_steps: int, stop_on_finish: bool) -> Launched:
        # Slots that nothing runs in keep old pages: their rows are not live.
        for slot, request in running.items():
            pages, placed = self._placed[slot]
            if pages is not request.pages:
                placed = 0
                self._pages[slot] = self.num_pages
            new = self._split(request.pages[placed:])
            first = len(new) // max(1, len(request.pages) - placed) * placed
            self._pages[slot, first : first + len(new)] = new
            self._placed[slot] = request.pages, len(request.pages)
            self._known[slot] = request.known
            if self._adapter is not None:
                self._adapter[slot] = self._numbers[request.params.adapter_name]
        greedy, rows = self._loop_for(running)
        report, trace = self._dispatch(self._plan(rows, max_steps=max_steps, stop_on_finish=stop_on_finish), greedy=greedy)
        traced = [(slot, r.trace) for slot, r in running.items() if r.trace is not None]
        report.copy_to_host_async()
        return Launched(report, self._rows[rows], trace if traced else None, traced)

    def collect(self, launched: Launched) -> StepReport:
        if launched.traced:
            seen = jax.device_get(launched.trace)
            for slot, steps in launched.traced:
                steps += _trace_steps(seen, int(np.searchsorted(launched.slots, slot)))
        rows = np.asarray(launched.report)
        report = np.zeros((self.program.dims.slots, *rows.shape[1:]), rows.dtype)
        report[launched.slots] = rows
        return unpack_report(report)

    @property
    def _adapter_of(self) -> packing.AdapterOf | None:
        return None if self._adapter is None else lambda request: self._numbers[request.params.adapter_name]

    def _request(self, request: Tracked) -> request_state.Request:
        return request_state.make_request(self.program.dims, prompt=request.prompt, params=request.params, eos_ids=self.eos_ids)

    def _kind(self, requests: Iterable[Tracked]) -> bool:
        """Whether the program that asks nothing of its rows will do, where there is one."""
        return True in self._denoise and all(self.program.asks_nothing(request.params) for request in requests)

    def _begin(self, begin: Callable[..., None], loops: Iterable[tuple[bool, int]], shapes: Iterable[packing.Shape]) -> None:
        """Has programs compiled by ``begin``, a method of ``Programs``."""
        for greedy, rows in loops:
            begin(*self._denoising(self._plan(rows, max_steps=1, stop_on_finish=False), greedy=greedy))
        for shape in shapes:
            begin(*self._prefilling(self._no_prompts(shape)))

    def _loop_for(self, running: dict[int, Tracked]) -> tuple[bool, int]:
        """The denoise loop for requests by slot: of those that are there, one with the fewest rows, if it can be the one that asks nothing.

        Whether all rows are greedy, and how many there are.
        """
        kinds = (True, False) if self._kind(running.values()) else (False,)
        able = [(kind, n) for n, slots in self._rows.items() if np.isin(list(running), slots).all() for kind in kinds]
        return next(loop for loop in able if not self._programs.is_awaited(("denoise", *loop)))

    def _spare(self) -> tuple[list[tuple[bool, int]], list[packing.Shape]]:
        """Loops and prefill shapes without which every request can be served; first those that serve a few.

        The loop over all slots that asks its rows does for all requests. Prompts may be prefilled in pieces of one size: the largest that
        takes no longer than reading the weights.
        """
        loops = [(kind, n) for n in self._rows for kind in sorted(self._denoise, reverse=True)]
        loops.remove((False, max(self._rows)))
        if not self.program.attention.chunkable:
            return loops, []
        block = self.program.dims.block
        small = [shape for shape in self._prefill_shapes if shape.rows * shape.blocks * block <= self.program.kernels.free_tokens]
        kept = small[-1:] or self._prefill_shapes[:1]
        return loops, [shape for shape in self._prefill_shapes if shape not in kept]

    def _plan(self, rows: int, *, max_steps: int, stop_on_finish: bool) -> Plan:
        slots = self._rows[rows]
        adapter = None if self._adapter is None else self._adapter[slots]
        return Plan(self._pages[slots], self._known[slots], max_steps, stop_on_finish, adapter)

    def _denoising(self, plan: Plan, *, greedy: bool) -> tuple[Any, ...]:
        """What ``Programs`` takes."""
        return ("denoise", greedy, len(plan.known)), self._denoise[greedy], self._params, self.pool, self.state, plan.pack()

    def _dispatch(self, plan: Plan, *, greedy: bool) -> tuple[jax.Array, Trace]:
        self.pool, self.state, report, trace = self._programs(*self._denoising(plan, greedy=greedy))
        return report, trace

    def _pages_held(self, request: Tracked) -> Sequence[int]:
        """The scheduler's pages of a request; where it gives none, that of its slot."""
        return request.pages if self.program.attention.paged else [int(_slot(request))]

    def _pages_written(self, request: Tracked) -> int:
        """Pages of the pool that hold what was written of a request."""
        dims = self.program.dims
        if not self.program.attention.paged:
            return dims.pages_per_slot
        blocks = request.written + (dims.sub_block_cache > 0)  # and old keys and values of the window
        return min(-(-blocks * dims.block // dims.page), len(self._split(request.pages)))

    def _table(self, pages: Sequence[int], count: int | None = None) -> np.ndarray:
        """``[P]`` int32: a request's pages as the device knows them, the first ``count`` of them; one past the pool elsewhere."""
        table = np.full(self.program.dims.pages_per_slot, self.num_pages, np.int32)
        own = self._split(pages)[:count]
        table[: len(own)] = own
        return table

    def _split(self, pages: Sequence[int]) -> np.ndarray:
        """Pages of the pool: the scheduler's hold at least a block, and are several of the pool's where a block does not fit in one."""
        parts = self.program.dims.unit // self.program.dims.page
        return (np.asarray(pages, np.int32)[:, None] * parts + np.arange(parts, dtype=np.int32)).reshape(-1)

    def _no_prompts(self, shape: packing.Shape) -> packing.Packed:
        how = {"table_of": self._table, "adapter_of": self._adapter_of, "shards": self._shards}
        return packing.packed(self.program.dims, shape, {}, **how)

    def _prefilling(self, packed: packing.Packed) -> tuple[Any, ...]:
        """What ``Programs`` takes."""
        rows, blocks, _ = packed.tokens.shape
        shape = packing.Shape(rows // self._shards, blocks)
        return ("prefill", shape), self._prefills[shape], self._params, self.pool, self._prompts[shape].pack(packed)

    def _prefill(self, packed: packing.Packed, requests: dict[int, Tracked]) -> None:
        self.pool, last = self._programs(*self._prefilling(packed))
        if self.program.dims.carried:  # then a row is a whole prompt
            with jax.set_mesh(self.mesh):
                self._carried |= {request.id: self._jit_one(last, np.int32(row)) for row, request in requests.items()}


def empty(program: decode.Program, dtype: Any, num_pages: int) -> tuple[KVPool, DecodeState]:
    """A pool of zeros and a state whose slots are all free. Where no keys and values are kept, the pool has no layers."""
    layers, dims = program.model.spec.layers, program.dims
    shape = (0 if program.attention.cache == "none" else layers.count, num_pages, dims.page, layers.kv_heads, layers.head_dim)
    state = request_state.empty_state(dims, program.rule)
    return KVPool(*(stored.empty(shape, program.kv, dtype) for _ in range(2))), state


def default_num_pages(device: jax.Device, page_bytes: int, *, needed: int, share: float) -> int:
    """How many pages of ``page_bytes`` to make, now that the parameters are on the device.

    ``share`` of what accelerators have left, less a tenth of their memory for the step's temporaries, up to eight times ``needed``:
    beyond that even a prefix cache gains nothing. A CPU shares its memory with everything else; there it is what all slots need.

    An allocator that did not take all memory at once (``XLA_PYTHON_CLIENT_PREALLOCATE=false``) holds what it once took, in pieces: that is
    of use for temporaries, not for a pool, which is two arrays in one piece each.

    Raises:
      ValueError: when no page fits.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return needed
    limit, taken, held = stats["bytes_limit"], stats["bytes_in_use"], stats.get("pool_bytes", 0)
    if held < limit:
        taken = max(taken, held)
    free = int(share * (0.9 * limit - taken))
    if free < page_bytes:
        raise ValueError(f"no KV page fits: {taken / 2**30:.1f} of {limit / 2**30:.1f} GiB are taken on {device}")
    return min(free // page_bytes, _CACHED_PAGES * needed)


def _prefill(program: decode.Program, prompts: Words, params: Params, pool: KVPool, words: jax.Array) -> tuple[KVPool, jax.Array]:
    """``programs.prefill`` of what ``prompts`` packed."""
    return programs.prefill(program, params, pool, **prompts.unpack(words)._asdict())


def _admit(
    program: decode.Program, requests: Words, state: DecodeState, slot: jax.Array, words: jax.Array, carried: jax.Array | None
) -> DecodeState:
    """``request_state.admit`` of what ``requests`` packed, and what prefill left of the prompt's last position; None for zeros."""
    request = requests.unpack(words)
    if carried is not None:
        request = request.replace(carried=carried)
    return request_state.admit(program.dims, program.rule, state, slot, request)


def _slot(request: Tracked) -> np.int32:
    assert request.slot is not None
    return np.int32(request.slot)


def _read_pages(pool: KVPool, pages: jax.Array) -> KVPool:
    """``[L, P, B, KV, H]``: the pages of ``pages`` ``[P]``; entries past the pool read anything."""
    return jax.tree.map(lambda p: p[:, jnp.minimum(pages, p.shape[1] - 1)], pool)


def _write_pages(pool: KVPool, kv: KVPool, pages: jax.Array) -> KVPool:
    """``pool`` with ``kv`` ``[L, P, B, KV, H]`` in ``pages`` ``[P]``; entries past the pool write nothing."""
    return jax.tree.map(lambda p, new: p.at[:, pages].set(new.astype(p.dtype), mode="drop"), pool, kv)


def _trace_steps(trace: Trace, slot: int) -> list[TraceStep]:
    names = [name for name in TraceStep.__dataclass_fields__ if name != "start"]
    return [
        TraceStep(start=int(trace.start[i, slot]), **{name: getattr(trace, name)[i, slot].reshape(-1) for name in names})
        for i in np.flatnonzero(trace.live[:, slot])
    ]
