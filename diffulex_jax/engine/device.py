"""The device side of the engine: buffers, the jitted functions that own them, and the shapes they are compiled for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffulex_jax import decode, request_state
from diffulex_jax.decode.likelihood import Canvases
from diffulex_jax.engine import packing, parameters, programs, scoring
from diffulex_jax.engine.dispatch import MixedWork, jit, jit_denoise, packed_admit, packed_mixed_step, packed_prefill, unpack_report
from diffulex_jax.engine.executables import Programs
from diffulex_jax.engine.request import Chunk, Tracked
from diffulex_jax.engine.results import TraceStep
from diffulex_jax.engine.tables import Tables
from diffulex_jax.engine.words import Words
from diffulex_jax.models.adapted import ADAPTERS, without
from diffulex_jax.models.base import Params, leaves
from diffulex_jax.parallel.mesh import sharding
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import STATE_AXES, Canvas, DecodeState, KVPool, StepReport, Trace
from pallas_kernels.block_attention import stored


class Launched(NamedTuple):
    """A dispatch under way: the packed report, the slots of its rows, the trace, and the slots whose trace is wanted with the lists it
    goes to."""

    report: jax.Array
    slots: np.ndarray
    trace: Trace | None
    traced: list[tuple[int, list[TraceStep]]]


class Held(NamedTuple):
    """What a mixed step takes along: prompts, whose their rows are, and the last request that was admitted since, if one was."""

    packed: packing.Packed
    requests: dict[int, Tracked]
    entering: Tracked | None = None


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
        dims = program.dims
        on_pool, on_slots, everywhere = programs.pool_placement(mesh, program), sharding(mesh, STATE_AXES), sharding(mesh, ())
        kernels = program.kernels.for_layers(dtype)
        few = kernels.few_rows if program.attention.paged else ()
        self._shards = mesh.shape["data"]
        self._prefill_shapes = packing.prefill_shapes(program, kernels.prefill_tokens, budget=max_batched_tokens, shards=self._shards)
        self._tables = Tables(dims, num_pages=num_pages, shards=self._shards, few=few, adapters=adapters)
        self._packing: Any = {"table_of": self._tables.table, "adapter_of": self._tables.adapter_of, "shards": self._shards}
        # What the next launch does with its first step, unless something else needs it before.
        self._held: Held | None = None
        # What a prefill left for the row of a request, by its number, until it is admitted.
        self._carried: dict[int, jax.Array] = {}
        self._jit_one = jax.jit(lambda rows, at: rows[at], out_shardings=everywhere)
        jit_state = functools.partial(jax.jit, donate_argnums=(0,), out_shardings=on_slots)
        self._nobody = self._request(Tracked(id=0, prompt=np.zeros(1, np.int32), params=SamplingParams()))
        self._requests = Words(self._nobody)
        self._prompts = {shape: Words(self._no_prompts(shape)) for shape in self._prefill_shapes}
        self._jit_admit = jit_state(functools.partial(packed_admit, program=program, words=self._requests))
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
        self._prefills = {
            shape: compiled(functools.partial(packed_prefill, program=program, words=words)) for shape, words in self._prompts.items()
        }
        # A step that asks the host nothing is launched together with the loop that goes on behind it.
        mixes = program.mixes(dtype) and not adapters and True in kinds
        out = (on_pool, on_slots, everywhere)
        into = functools.partial(jit, dtype=dtype, device=mesh.devices.flat[0], donate_argnums=(1, 2), out_shardings=out)
        # Where prompts take much longer than reading the weights does, that these are read once less does not matter.
        self._mixed = {
            (shape, rows): (words, into(functools.partial(packed_mixed_step, program=program._replace(greedy=True), words=words)))
            for shape in self._prefill_shapes
            for rows in self._tables.rows
            if mixes and shape.rows * shape.blocks * dims.block <= kernels.free_tokens
            for words in [Words(self._mixed_work(Held(self._no_prompts(shape), {}), rows))]
        }
        with jax.set_mesh(mesh):
            self.pool, self.state = jax.jit(lambda: empty(program, dtype, num_pages), out_shardings=(on_pool, on_slots))()
            row = jax.eval_shape(request_state.take, self.state, np.int32(0))
            kv = jax.eval_shape(_read_pages, self.pool, self._tables.table([]))
        self.saved_structure = request_state.Saved(row, kv.k, kv.v)

    def warm_up(self, requests: Sequence[Tracked] | None = None, *, wait: bool = True) -> None:
        """Compiles what requests need, by default every program there is, by running each once on nothing. No slot may be in use.

        Unless it is to ``wait``: what any request can do with. Others, which do the same in less time, are compiled in the background.
        """
        names = self._names(requests)
        later = [] if wait else self._spare(names)
        now = [name for name in names if name not in later]
        for name in now:
            self._programs.begin(*self._on_nothing(name))
        for name in later:
            self._programs.begin_later(*self._on_nothing(name))
        probe = Tracked(id=0, prompt=np.zeros(1, np.int32), params=SamplingParams(seed=0).resolve(), slot=0)
        self._run_on_nothing([name for name in now if name[0] != "denoise"], probe)
        self.admit(probe)
        if requests is None or self.num_pages < self.program.dims.slots * self.program.dims.pages_per_slot:  # some may be set aside
            probe.saved = self.save(probe)
            self.restore(probe)
        if requests is None or any(request.wants_sequence for request in requests):
            self.read(probe)
        self.release(0)
        self._run_on_nothing([name for name in now if name[0] == "denoise"], probe)

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
            rows = self._tables.all_of(adapter, shape[0][0])
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
        """See ``scheduler.Device``. What a step can take along waits for one."""
        shapes = [shape for shape in self._prefill_shapes if not self._programs.is_awaited(("prefill", shape))]
        for made in packing.pack(self.program, shapes, chunks, **self._packing):
            self._do_held()
            self._held = Held(*made)
        if self._held is not None and (_shape_of(self._held.packed, self._shards), max(self._tables.rows)) not in self._mixed:
            self._do_held()

    def admit(self, request: Tracked) -> None:
        if self._held is None:
            self._enter(request)
            return
        if self._held.entering is not None:
            self._enter(self._held.entering)
        self._held = self._held._replace(entering=request)

    def save(self, request: Tracked) -> request_state.Saved:
        self._do_held()
        with jax.set_mesh(self.mesh):
            row = self._jit_take(self.state, _slot(request))
            kv = self._jit_read(self.pool, self._tables.table(self._pages_held(request)))
        row, kv = jax.device_get((row, kv))
        count = self._pages_written(request)
        return request_state.Saved(row, *jax.tree.map(lambda a: a[:, :count].copy(), (kv.k, kv.v)))

    def restore(self, request: Tracked) -> None:
        self._do_held()  # of a request that may be gone, whose pages this one may have
        saved, dims = request.saved, self.program.dims
        count = saved.k.shape[1]
        room = dims.pages_per_slot - count
        kv = jax.tree.map(lambda a: np.pad(a, [(0, room if i == 1 else 0) for i in range(a.ndim)]), KVPool(saved.k, saved.v))
        with jax.set_mesh(self.mesh):
            self.pool = self._jit_write(self.pool, kv, self._tables.table(self._pages_held(request), count))
            self.state = self._jit_put(self.state, _slot(request), saved.row)

    def release(self, slot: int) -> None:
        self._do_held()
        with jax.set_mesh(self.mesh):
            self.state = self._jit_release(self.state, np.int32(slot))

    def read(self, request: Tracked) -> Canvas:
        self._do_held()
        with jax.set_mesh(self.mesh):
            return jax.device_get(self._jit_sequence(self.state, _slot(request)))

    def launch(self, running: dict[int, Tracked], *, max_steps: int, stop_on_finish: bool) -> Launched:
        self._tables.place(running)
        greedy, rows = self._loop_for(running)
        report = trace = None
        traced = [(slot, r.trace) for slot, r in running.items() if r.trace is not None]
        if self._held is not None and greedy and self._mixes(rows) and not traced:  # of a step beside prompts there is no trace
            held, self._held = self._held, None
            report, max_steps = self._mix(held, rows), max_steps - 1
        self._do_held()
        # Where each row lacks one token, a step beside prompts was probably the last: the host looks before it goes on.
        if report is None or (max_steps and any(r.params.max_tokens - len(r.tokens) > 1 for r in running.values())):
            report, trace = self._dispatch(greedy, rows, max_steps=max_steps, stop_on_finish=stop_on_finish)
        report.copy_to_host_async()
        return Launched(report, self._tables.rows[rows], trace if traced else None, traced)

    def collect(self, launched: Launched) -> StepReport:
        if launched.traced:
            seen = jax.device_get(launched.trace)
            for slot, steps in launched.traced:
                steps += _trace_steps(seen, int(np.searchsorted(launched.slots, slot)))
        rows = np.asarray(launched.report)
        report = np.zeros((self.program.dims.slots, *rows.shape[1:]), rows.dtype)
        report[launched.slots] = rows
        return unpack_report(report)

    def _request(self, request: Tracked) -> request_state.Request:
        return request_state.make_request(self.program.dims, prompt=request.prompt, params=request.params, eos_ids=self.eos_ids)

    def _kind(self, requests: Iterable[Tracked]) -> bool:
        """Whether the program that asks nothing of its rows will do, where there is one."""
        return True in self._denoise and all(self.program.asks_nothing(request.params) for request in requests)

    def _names(self, requests: Sequence[Tracked] | None) -> list[_Name]:
        """The large programs that requests may need, None for any; first those that serve a few."""
        kinds, shapes, rows = set(self._denoise), self._prefill_shapes, self._tables.rows
        if requests is not None:
            kinds, shapes = {self._kind([request]) for request in requests}, packing.shapes_for(self.program, shapes, requests)
        loops = [("denoise", kind, n) for n in rows for kind in sorted(kinds, reverse=True)]
        mixed = [("mixed", *which) for which in self._mixed if which[0] in shapes and True in kinds]
        return [*loops, *[("prefill", shape) for shape in shapes], *mixed]

    def _spare(self, names: Sequence[_Name]) -> list[_Name]:
        """Those without which every request can be served.

        The loop over all slots that asks its rows does for all requests. Prompts may be prefilled in pieces of one size, the largest that
        takes no longer than reading the weights, and apart from steps.
        """
        sizes = {("prefill", shape): shape.rows * shape.blocks * self.program.dims.block for shape in self._prefill_shapes}
        kept = list(sizes)
        if self.program.attention.chunkable:
            kept = [name for name, size in sizes.items() if size <= self.program.kernels.free_tokens][-1:] or kept[:1]
        return [name for name in names if name not in (("denoise", False, max(self._tables.rows)), *kept)]

    def _on_nothing(self, name: _Name) -> tuple[Any, ...]:
        """What ``Programs`` takes for a program and no requests."""
        kind, *which = name
        if kind == "denoise":
            return self._denoising(*which)
        none = self._no_prompts(which[0])
        return self._prefilling(none) if kind == "prefill" else self._mixing(Held(none, {}), which[1])

    def _run_on_nothing(self, names: Sequence[_Name], probe: Tracked) -> None:
        for kind, *which in names:
            if kind == "denoise":
                jax.block_until_ready(self._dispatch(*which))
                continue
            none = self._no_prompts(which[0])
            if kind == "prefill":
                self._prefill(none, {0: probe})
            else:
                self._mix(Held(none, {}), which[1])

    def _loop_for(self, running: dict[int, Tracked]) -> tuple[bool, int]:
        """The denoise loop for requests by slot: of those that are there, one with the fewest rows, if it can be the one that asks nothing.

        Whether all rows are greedy, and how many there are.
        """
        kinds = (True, False) if self._kind(running.values()) else (False,)
        able = [(kind, n) for n in self._tables.rows_for(running) for kind in kinds]
        return next(loop for loop in able if not self._programs.is_awaited(("denoise", *loop)))

    def _mixes(self, rows: int) -> bool:
        """Whether the program that takes the held prompts along with a step of so many rows is there."""
        assert self._held is not None
        return not self._programs.is_awaited(("mixed", _shape_of(self._held.packed, self._shards), rows))

    def _denoising(self, greedy: bool, rows: int, *, max_steps: int = 1, stop_on_finish: bool = False) -> tuple[Any, ...]:
        """What ``Programs`` takes."""
        plan = self._tables.plan(rows, max_steps=max_steps, stop_on_finish=stop_on_finish)
        return ("denoise", greedy, rows), self._denoise[greedy], self._params, self.pool, self.state, plan.pack()

    def _dispatch(self, greedy: bool, rows: int, **bounds: Any) -> tuple[jax.Array, Trace]:
        """Steps of so many rows; ``bounds`` are those of :meth:`_denoising`."""
        self.pool, self.state, report, trace = self._programs(*self._denoising(greedy, rows, **bounds))
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
        return min(-(-blocks * dims.block // dims.page), len(self._tables.split(request.pages)))

    def _prefilling(self, packed: packing.Packed) -> tuple[Any, ...]:
        """What ``Programs`` takes."""
        shape = _shape_of(packed, self._shards)
        return ("prefill", shape), self._prefills[shape], self._params, self.pool, self._prompts[shape].pack(packed)

    def _prefill(self, packed: packing.Packed, requests: dict[int, Tracked]) -> None:
        self.pool, last = self._programs(*self._prefilling(packed))
        if self.program.dims.carried:  # then a row is a whole prompt
            with jax.set_mesh(self.mesh):
                self._carried |= {request.id: self._jit_one(last, np.int32(row)) for row, request in requests.items()}

    def _no_prompts(self, shape: packing.Shape) -> packing.Packed:
        return packing.packed(self.program.dims, shape, {}, **self._packing)

    def _enter(self, request: Tracked) -> None:
        packed = self._requests.pack(self._request(request))
        with jax.set_mesh(self.mesh):
            self.state = self._jit_admit(self.state, _slot(request), packed, self._carried.pop(request.id, None))

    def _do_held(self) -> None:
        """Does what is held, if something is, without a step."""
        if self._held is not None:
            held, self._held = self._held, None
            self._prefill(held.packed, held.requests)
            if held.entering is not None:
                self._enter(held.entering)

    def _mixed_work(self, held: Held, rows: int) -> MixedWork:
        entering, slot = held.entering, np.int32(self.program.dims.slots)
        request = self._nobody if entering is None else self._request(entering)
        return MixedWork(held.packed.prompts, *self._tables.of(rows), request, slot if entering is None else _slot(entering))

    def _mixing(self, held: Held, rows: int) -> tuple[Any, ...]:
        """What ``Programs`` takes."""
        which = _shape_of(held.packed, self._shards), rows
        words, function = self._mixed[which]
        return ("mixed", *which), function, self._params, self.pool, self.state, words.pack(self._mixed_work(held, rows))

    def _mix(self, held: Held, rows: int) -> jax.Array:
        """Does what is held in a step of so many rows."""
        self.pool, self.state, report = self._programs(*self._mixing(held, rows))
        return report


_Name = tuple[Any, ...]
"""Of a large program: ``("denoise", whether all rows are greedy, rows)``, ``("prefill", shape)``, ``("mixed", shape, rows)``"""


def empty(program: decode.Program, dtype: Any, num_pages: int) -> tuple[KVPool, DecodeState]:
    """A pool of zeros and a state whose slots are all free. Where no keys and values are kept, the pool has no layers."""
    layers, dims = program.model.spec.layers, program.dims
    shape = (0 if program.attention.cache == "none" else layers.count, num_pages, dims.page, layers.kv_heads, layers.head_dim)
    state = request_state.empty_state(dims, program.rule)
    return KVPool(*(stored.empty(shape, program.kv, dtype) for _ in range(2))), state


def _shape_of(packed: packing.Packed, shards: int) -> packing.Shape:
    rows, blocks, _ = packed.prompts.tokens.shape
    return packing.Shape(rows // shards, blocks)


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
