"""Does a model fit on a slice, split how, and how fast might a denoise step be there?

Sizes are exact; temporaries and exchanges are those of the engine's own program, compiled for the slice; milliseconds are arithmetic on
data sheets, whose assumptions are printed beside them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, cast

from jax.sharding import AbstractMesh, Mesh

from diffulex_jax import decode
from diffulex_jax.bench.forward import step_bytes, step_operations
from diffulex_jax.bench.shapes import SHAPES, shape_model
from diffulex_jax.engine import settle
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.models.base import Model, leaves
from diffulex_jax.parallel.mesh import abstract_mesh, check_split, make_mesh, parts, sizes_of
from diffulex_jax.planning.chips import Slice, slice_of
from diffulex_jax.planning.compiling import Compiled, NotInstalled, OutOfMemory, compile_denoise
from diffulex_jax.planning.exchanges import Exchange, Exchanges
from diffulex_jax.state import Dims
from diffulex_jax.strategies import Strategy, for_model
from diffulex_jax.weights import checkpoint
from diffulex_jax.weights.quantise import check_groups, stored_bytes
from pallas_kernels import choose
from pallas_kernels.block_attention import KV, vector_bytes
from pallas_kernels.quantised import Form


REACHED = 0.75
"""Part of the data sheet's bandwidth at which weights are read: what the steps of one H100 reached (``pallas_kernels/README.md``). With
arithmetic at its peak added, this gives 8.3, 13.3 and 15.1 ms for the 8.2, 13.1 and 16.2 measured there at batch 1, 8 and 32."""

_RESERVE = 0.1  # of a device's memory, which a proposal leaves to temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a model takes on each device of a slice, and what a denoise step takes there. Bytes are those of one device.

    Attributes:
      model, topology, strategy, dtype, quantised, kv, slots, max_len: what was asked for.
      devices, mesh: how many devices there are, and how they are used.
      memory: what a device has for programs.
      weights, pool: bytes of parameters, and of keys and values for every position of every slot.
      missing: bytes that are too few; 0 where the model fits.
      not_compiled: why the program was not compiled; "" where it was.
      compiled: what the compiler says of it; None where it was not compiled, or refused for its size.
      exchanges: what a step exchanges; counted by hand where the program was not compiled.
      read, operations: bytes read and operations done in a step.
      floor_ms: milliseconds that reading them takes at the full bandwidth of the data sheet.
      step_ms: predicted milliseconds of a step.
      tokens_per_second: of all slots together, at one token a slot and step.
      assumptions: what ``step_ms`` rests on.
    """

    model: str
    topology: str
    strategy: str
    dtype: str
    quantised: str | None
    kv: str
    slots: int
    max_len: int
    devices: int
    mesh: dict[str, int]
    memory: int
    weights: int
    pool: int
    missing: int
    not_compiled: str
    compiled: Compiled | None
    exchanges: Exchanges
    read: int
    operations: int
    floor_ms: float
    step_ms: float
    tokens_per_second: float
    assumptions: tuple[str, ...]

    @property
    def head_room(self) -> int:
        """Bytes that are left of a device's memory; below 0 where they do not suffice."""
        taken = self.weights + self.pool if self.compiled is None else _taken(self.compiled)
        return self.memory - taken if not self.missing else -self.missing


def plan(
    model: str,
    topology: str,
    *,
    slots: int = 64,
    max_len: int = 4096,
    mesh: str | None = None,
    dtype: str = "bfloat16",
    weights: str | None = None,
    kv: str | None = None,
    strategy: str | None = None,
) -> Plan:
    """Plans an engine of ``model`` on the slice ``topology``, which need not be there.

    Args:
      model: a name of ``bench.shapes.SHAPES``, or what ``Engine.from_pretrained`` takes, of which only ``config.json`` is read.
      topology: see ``chips.slice_of``.
      slots: requests decoded together, on all devices.
      max_len: most tokens of a prompt and its output.
      mesh: ``"data=4,expert=2,tensor=2"``; without ``data``, that is what the others leave. Default: see :func:`propose`.
      dtype: of parameters, activations and the KV pool.
      weights: ``"int8"``, ``"int4"`` or ``"fp8"`` for quantised experts, or else layers.
      kv: ``"fp8"`` or ``"int8"`` for a KV pool in 8 bits, ``"bfloat16"``; default: ``dtype``.
      strategy: a name from ``diffulex_jax.strategies``; default: the one that the model's authors decode it with.

    Raises:
      ValueError: for a model, a topology, a mesh or a setting that will not do.
    """
    there, wanted = (
        slice_of(topology),
        want(model, strategy, EngineConfig(dtype=dtype, weights=weights, kv=kv, max_slots=slots, max_model_len=max_len)),
    )
    network, settings, paged = wanted.model, wanted.settings, wanted.attention.paged
    split = propose(wanted, there) if mesh is None else _mesh_of(wanted, there, mesh)
    own, pool = weight_bytes(wanted, split), pool_bytes(wanted, split)
    missing, compiled, not_compiled = max(0, own + pool - there.chip.memory), None, ""
    if missing:
        not_compiled = "weights and pool alone do not fit"
    elif there.devices is None:
        not_compiled = f"the compiler for {topology} is not installed ({there.lacks})"
    else:
        try:
            compiled = _compile(wanted, make_mesh(there.devices, **split.shape))
            missing = max(0, _taken(compiled) - there.chip.memory)
        except OutOfMemory as refused:
            missing, not_compiled = refused.missing, "the compiler refuses it for its size"
        except NotInstalled as lacking:
            not_compiled = str(lacking)
    rows = slots // split.shape["data"]
    tokens = rows * (wanted.dims.window * wanted.dims.block if paged else wanted.dims.positions)
    experts = _experts_touched(network, tokens)
    sizes: dict[str, Any] = {
        "batch": rows,
        "context": max_len if paged else 0,
        "experts": experts,
        "weights": _form(settings),
        "kv": _kv(settings),
    }
    read = step_bytes(network, settings.jax_dtype.itemsize, **sizes, mesh=split)
    operations = step_operations(network, tokens=tokens, context=max_len, mesh=split)
    exchanges = _exchanges(wanted, split, tokens) if compiled is None else compiled.exchanges
    chip, group = there.chip, split.shape["expert"] * split.shape["tensor"]
    floor, arithmetic = read / chip.bandwidth, operations / chip.flops
    sent = sum(e.bytes * _share_sent(kind, group) for kind, e in exchanges.items()) / chip.link
    step = floor / REACHED + arithmetic + sent + chip.exchange * sum(e.count for e in exchanges.values())
    return Plan(
        model=model,
        topology=topology,
        strategy=wanted.strategy.name,
        dtype=dtype,
        quantised=settings.weights,
        kv=kv or dtype,
        slots=slots,
        max_len=max_len,
        devices=there.size,
        mesh=dict(split.shape),
        memory=chip.memory,
        weights=own,
        pool=pool,
        missing=missing,
        not_compiled=not_compiled,
        compiled=compiled,
        exchanges=exchanges,
        read=int(read),
        operations=int(operations),
        floor_ms=1e3 * floor,
        step_ms=1e3 * step,
        tokens_per_second=slots / step,
        assumptions=(
            f"every slot holds {max_len} positions and all rows are greedy; no finished block is written beside the window",
            *([f"tokens choose experts independently of each other: {experts:.0f} are touched in a layer"] if experts else []),
            f"weights, keys and values are read at {REACHED:.0%} of {chip.bandwidth / 1e9:.0f} GB/s, as an H100 was measured to do",
            f"arithmetic at {chip.flops / 1e12:.0f} TFLOP/s, exchanges at {chip.link / 1e9:.0f} GB/s and {chip.exchange * 1e6:.0f} us "
            "each, and none of these at the same time",
            "one token a slot and step; a strategy that accepts more is as many times as fast",
        ),
    )


class Wanted(NamedTuple):
    """An engine that is planned: its network, strategy and settings, and what ``engine.settle.plan`` makes of them."""

    model: Model
    strategy: Strategy
    settings: EngineConfig
    attention: AttentionPolicy
    dims: Dims


def want(model: str, strategy: str | None, settings: EngineConfig) -> Wanted:
    """The engine of a name in ``bench.shapes.SHAPES``, or of a model directory or hub id.

    Raises:
      ValueError: for a model that is none of these, and a strategy or a setting that will not do.
    """
    if model in SHAPES:
        network = shape_model(model)
    else:
        path = checkpoint.resolve(model)
        network = checkpoint.load_model(path)
        settings = dataclasses.replace(settings, weights=checkpoint.form_in(path, settings.weights))
    chosen = for_model(network.spec, strategy)
    return Wanted(network, chosen, *settle.plan(network.spec, chosen, settings))


def propose(wanted: Wanted, there: Slice) -> AbstractMesh:
    """The smallest ``expert x tensor`` on which weights and pool leave a tenth of the memory free, all other devices to ``data``; of these
    ``tensor`` as many as there are key/value heads to split. Where nothing fits, the mesh that needs the least of a device.

    Raises:
      ValueError: where nothing divides the model and the slots over so many devices.
    """
    meshes = []
    for group in (n for n in range(1, there.size + 1) if there.size % n == 0):
        tensor = math.gcd(wanted.model.spec.layers.kv_heads, group)
        mesh = abstract_mesh(data=there.size // group, expert=group // tensor, tensor=tensor)
        try:
            _check(wanted, mesh)
        except ValueError:
            continue
        size = weight_bytes(wanted, mesh) + pool_bytes(wanted, mesh)
        if size <= (1 - _RESERVE) * there.chip.memory:
            return mesh
        meshes.append((size, group, mesh))
    if not meshes:
        raise ValueError(
            f"no mesh splits this model and {wanted.settings.max_slots} slots over the {there.size} devices of {there.topology}; "
            f"{there.size} slots, one for each device, or another topology may do"
        )
    return min(meshes, key=lambda found: found[:2])[2]


def weight_bytes(wanted: Wanted, mesh: AbstractMesh) -> int:
    """Bytes of parameters on each device."""
    size = wanted.settings.jax_dtype.itemsize
    return sum(
        stored_bytes(param, _form(wanted.settings), size) // parts(mesh, param.axes) for param in leaves(wanted.model.schema).values()
    )


def pool_bytes(wanted: Wanted, mesh: AbstractMesh) -> int:
    """Bytes of keys and values on each device, for every position of its slots; 0 where none are kept."""
    layers, dims = wanted.model.spec.layers, wanted.dims
    kept = 0 if wanted.attention.cache == "none" else 2 * layers.count * dims.slots * dims.positions
    vector = vector_bytes(layers.head_dim, _kv(wanted.settings), wanted.settings.jax_dtype)
    return kept * layers.kv_heads * vector // parts(mesh, ("slot", "kv_heads"))


def _mesh_of(wanted: Wanted, there: Slice, text: str) -> AbstractMesh:
    sizes = sizes_of(text)
    others = sizes.get("expert", 1) * sizes.get("tensor", 1)
    sizes.setdefault("data", max(1, there.size // others))
    if math.prod(sizes.values()) != there.size:
        would = f"data={there.size // others} would" if there.size % others == 0 else f"no data does with expert x tensor = {others}"
        raise ValueError(f"mesh={text!r} uses {math.prod(sizes.values())} of the {there.size} devices of {there.topology}; {would}")
    mesh = abstract_mesh(**sizes)
    _check(wanted, mesh)
    return mesh


def _check(wanted: Wanted, mesh: AbstractMesh) -> None:
    """Checks that parameters and slots can be split over ``mesh``; raises ValueError."""
    check_split(mesh, (wanted.dims.slots,), ("slot",), "slots")
    for path, param in leaves(wanted.model.schema).items():
        check_split(mesh, param.shape, param.axes, path[-1])
    check_groups(wanted.model, _form(wanted.settings), mesh)


def _compile(wanted: Wanted, mesh: Mesh) -> Compiled:
    """Compiles what the engine would run on ``mesh``, with a pool that holds every position of every slot."""
    model, strategy, settings, attention, dims = wanted
    kernels = choose(mesh.devices.flat[0])
    # Where the host drives loops, an engine has a program for greedy rows alone, and uses it where it can.
    kinds: dict[str, Any] = {"draws": strategy.draws, "confidence": strategy.confidence, "greedy": kernels.host_drives_loops}
    kinds["kv"] = _kv(settings)
    program = decode.Program(model, dims, strategy.rule, kernels, attention, **kinds)
    pages, steps = dims.slots * dims.pages_per_slot, settings.steps_per_dispatch
    return compile_denoise(program, mesh, dtype=settings.jax_dtype, num_pages=pages, steps=steps, weights=_form(settings))


def _form(settings: EngineConfig) -> Form | None:
    return cast(Form | None, settings.weights)  # checked where the settings are made


def _kv(settings: EngineConfig) -> KV | None:
    return cast(KV | None, settings.kv)


def _taken(compiled: Compiled) -> int:
    return compiled.arguments + compiled.temporaries + compiled.code


def _experts_touched(model: Model, tokens: int) -> float:
    """Experts of a layer that some of ``tokens`` chose, each its own independently of the others; 0 where there are none."""
    axes = [param.shape[param.axes.index("expert")] for param in leaves(model.schema).values() if "expert" in param.axes]
    return axes[0] * (1 - (1 - model.spec.experts_per_token / axes[0]) ** tokens) if axes else 0.0


def _exchanges(wanted: Wanted, mesh: AbstractMesh, tokens: int) -> Exchanges:
    """The sums of hidden states in each layer: after attention, and after the MLP. What else a step exchanges is a few numbers a row."""
    spec, size = wanted.model.spec, wanted.settings.jax_dtype.itemsize
    sums = spec.layers.count * sum(parts(mesh, (axis,)) > 1 for axis in ("kv_heads", "mlp"))
    return {"all-reduce": Exchange(sums, sums * tokens * spec.hidden_size * size)} if sums else {}


def _share_sent(kind: str, devices: int) -> float:
    """Bytes that a device sends for each byte of an exchange's result, along a ring of ``devices``."""
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices


def text(plan: Plan) -> str:
    """The plan, for people."""

    def gib(size: int) -> str:
        return f"{size / 2**30:.2f} GiB"

    p = plan
    kind = p.dtype + (f" with weights in {p.quantised}" if p.quantised else "") + (f", KV in {p.kv}" if p.kv != p.dtype else "")
    exchanges = [f"{e.count} {kind} of {e.bytes / 1e6:.1f} MB together" for kind, e in p.exchanges.items()]
    rows = {
        "slice": f"{p.topology}, {p.devices} device(s) as {' x '.join(f'{name} {n}' for name, n in p.mesh.items())}",
        "engine": f"{p.model}, {p.strategy}, {kind}, {p.slots} slots of {p.max_len} positions",
        "memory": f"{gib(p.memory)} a device",
        "weights": gib(p.weights),
        "pool": gib(p.pool),
        **({} if p.compiled is None else {"state": f"{gib(p.compiled.arguments - p.weights - p.pool)}, and what tiles fill up"}),
        "temporaries": "not known" if p.compiled is None else gib(p.compiled.temporaries),
        "head-room": gib(p.head_room) if not p.missing else f"DOES NOT FIT: {p.missing} bytes are missing on each device",
        "compiled": f"no: {p.not_compiled}" if p.compiled is None else f"in {p.compiled.seconds:.0f} s",
        "exchanges": ", ".join(exchanges) or "none",
        "floor": f"{p.floor_ms:.2f} ms a step, to read {p.read / 1e9:.2f} GB",
        "predicted": f"{p.step_ms:.2f} ms a step, {p.tokens_per_second:.0f} tokens a second",
    }
    lines = [f"{name:>12}  {value}" for name, value in rows.items()]
    return "\n".join([*lines, *(f"{'assuming' if i == 0 else '':>12}  {line}" for i, line in enumerate(p.assumptions))])
