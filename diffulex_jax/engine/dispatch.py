"""What goes to the device and what comes back, as one array each way, around what is compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffulex_jax import decode, request_state
from diffulex_jax.engine import programs
from diffulex_jax.engine.words import Words
from diffulex_jax.models.adapted import ADAPTERS
from diffulex_jax.models.base import Params
from diffulex_jax.parallel.mesh import sharding
from diffulex_jax.state import STATE_AXES, DecodeState, KVPool, StepReport, Trace
from pallas_kernels.target import target_of, unwanted_passes


class Plan(NamedTuple):
    """What the host decides for a dispatch.

    Attributes:
      pages: ``[S, P]`` int32, the pages of each slot; N (one past the pool) where it has none.
      known: ``[S]`` int32, up to where the host knows the tokens of each slot.
      max_steps, stop_on_finish: scalars; see ``decode.denoise``.
      adapter: ``[S]`` int32, the adapter of each slot; see ``programs.denoise``. None where the parameters hold none.
    """

    pages: Any
    known: Any
    max_steps: Any
    stop_on_finish: Any
    adapter: Any = None

    def pack(self) -> np.ndarray:
        """The plan as one new array :meth:`packed_shape` int32; what concerns all slots stands in every row."""
        adapted = self.adapter is not None
        packed = np.empty(self.packed_shape(*self.pages.shape, adapted=adapted), np.int32)
        pages = self.pages.shape[1]
        packed[:, :pages] = self.pages
        for column, value in enumerate(self[1 : 1 + _COLUMNS + adapted], pages):
            packed[:, column] = value
        return packed

    @classmethod
    def unpack(cls, packed: jax.Array, *, adapted: bool) -> Plan:
        """What :meth:`pack` packed; ``adapted`` says whether there is an ``adapter``."""
        columns = _COLUMNS + adapted
        known, max_steps, stop_on_finish, *adapter = packed[:, -columns:].T
        return cls(packed[:, :-columns], known, max_steps[0], stop_on_finish[0] != 0, *adapter)

    @staticmethod
    def packed_shape(slots: int, pages_per_slot: int, *, adapted: bool = False) -> tuple[int, int]:
        """The shape of a packed plan."""
        return slots, pages_per_slot + _COLUMNS + adapted


_COLUMNS = len(Plan._fields) - 2  # behind the pages of a slot, without the adapter's


def jit_denoise(program: decode.Program, mesh: Mesh, *, dtype: Any, steps: int) -> Any:
    """The compiled denoise loop of an engine.

    ``(params, pool, state, packed plan) -> (pool, state, packed report, trace)``; pool and state are donated.
    """
    on_pool, on_slots, everywhere = programs.pool_placement(mesh, program), sharding(mesh, STATE_AXES), sharding(mesh, ())
    return jit(
        functools.partial(packed_denoise, program=program, steps=steps),
        dtype,
        mesh.devices.flat[0],
        donate_argnums=(1, 2),
        out_shardings=(on_pool, on_slots, everywhere, everywhere),
    )


def packed_denoise(
    params: Params, pool: KVPool, state: DecodeState, packed: jax.Array, *, program: decode.Program, steps: int
) -> tuple[KVPool, DecodeState, jax.Array, Trace]:
    """``decode.denoise`` with all that comes from the host, and the report, as one array each: one transfer each way."""
    plan = Plan.unpack(packed, adapted=ADAPTERS in params)
    pool, state, report, trace = programs.denoise(
        program,
        params,
        pool,
        state,
        page_table=plan.pages,
        known=plan.known,
        steps=steps,
        max_steps=plan.max_steps,
        stop_on_finish=plan.stop_on_finish,
        adapter=plan.adapter,
    )
    return pool, state, pack_report(report), trace


class MixedWork(NamedTuple):
    """What the host tells a mixed step.

    Attributes:
      prompts: what to write.
      pages, known: of each row, see ``Plan``.
      request: one that begins with this step.
      slot: its slot; past the last one: there is none.
    """

    prompts: decode.Prompts
    pages: Any
    known: Any
    request: request_state.Request
    slot: Any


def packed_mixed_step(
    params: Params, pool: KVPool, state: DecodeState, packed: jax.Array, *, program: decode.Program, words: Words
) -> tuple[KVPool, DecodeState, jax.Array]:
    """``decode.mixed_step`` of the ``MixedWork`` that ``words`` packed, in one launch with the request that begins, and the report."""
    work: MixedWork = words.unpack(packed)
    state = request_state.admit(program.dims, program.rule, state, work.slot, work.request)
    of_rows = {"page_table": work.pages, "known": work.known}
    pool, state, report = programs.mixed_step(program, params, pool, state, prompts=work.prompts, **of_rows)
    return pool, state, pack_report(report)


def packed_prefill(params: Params, pool: KVPool, packed: jax.Array, *, program: decode.Program, words: Words) -> tuple[KVPool, jax.Array]:
    """``decode.prefill`` of the ``packing.Packed`` that ``words`` packed."""
    return programs.prefill(program, params, pool, *words.unpack(packed))


def packed_admit(
    state: DecodeState, slot: jax.Array, packed: jax.Array, carried: jax.Array | None, *, program: decode.Program, words: Words
) -> DecodeState:
    """``request_state.admit`` of what ``words`` packed, and what prefill left of the prompt's last position; None for zeros."""
    request: request_state.Request = words.unpack(packed)
    if carried is not None:
        request = request.replace(carried=carried)
    return request_state.admit(program.dims, program.rule, state, slot, request)


def pack_report(report: StepReport) -> jax.Array:
    """The report as one array ``[S, n]`` int32."""
    return jnp.concatenate([*(getattr(report, name)[:, None] for name in _SCALARS), report.tokens], 1)


def unpack_report(packed: np.ndarray) -> StepReport:
    """What :func:`pack_report` packed."""
    fields: dict[str, Any] = {name: packed[:, i] for i, name in enumerate(_SCALARS)} | {"tokens": packed[:, len(_SCALARS) :]}
    return StepReport(**fields)


_SCALARS = [name for name in StepReport.__dataclass_fields__ if name != "tokens"]


def jit(function: Callable[..., Any], dtype: Any, device: jax.Device, **options: Any) -> Any:
    """``jax.jit`` of what computes in ``dtype`` on devices like ``device``, with its options, without XLA's ``unwanted_passes``."""
    unwanted = unwanted_passes(target_of(device), dtype)
    return jax.jit(exact(function, dtype), compiler_options={"xla_disable_hlo_passes": unwanted} if unwanted else None, **options)


def exact(function: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """``function`` with matmuls as precise as ``dtype`` says: accelerators round float32 operands down unless told not to."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            return function(*args, **kwargs)

    return traced
