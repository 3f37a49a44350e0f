"""How an engine is put together: settings and a strategy become buffers, compiled programs and a scheduler."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh

from diffulex_jax import decode
from diffulex_jax.cache.pages import PagePool, chain_digest
from diffulex_jax.engine import alike, background
from diffulex_jax.engine.admission import Limits
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.device import JaxDevice
from diffulex_jax.engine.fingerprint import strategy_id
from diffulex_jax.engine.mirror import Mirror
from diffulex_jax.engine.pace import Pace
from diffulex_jax.engine.pool_size import default_num_pages
from diffulex_jax.engine.scheduler import Scheduler
from diffulex_jax.engine.settle import plan
from diffulex_jax.engine.startup import announce, is_told
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.errors import SettingError
from diffulex_jax.models.adapted import ADAPTERS, without
from diffulex_jax.models.base import Model, Params, leaves
from diffulex_jax.parallel import hosts
from diffulex_jax.parallel.mesh import mesh_of
from diffulex_jax.state import Dims
from diffulex_jax.strategies import AnyStrategy, Strategy, for_model, resolve
from diffulex_jax.weights import adapter_stacks, adapters, checkpoint
from diffulex_jax.weights.quantise import form_of, quantised
from pallas_kernels import REFERENCE, Kernels, choose
from pallas_kernels.block_attention import KV, vector_bytes
from pallas_kernels.quantised import Form


class Network(NamedTuple):
    """A model that is ready to run.

    Attributes:
      model: the network.
      params: its parameters, on the mesh; at ``ADAPTERS`` also the adapters that stay beside them.
      tokenizer: None where it has none.
      eos_ids: tokens that end an output.
      model_id: keeps cached prefixes and snapshots of different models apart.
      mesh: where it is.
    """

    model: Model
    params: Params
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    model_id: str
    mesh: Mesh


class Parts(NamedTuple):
    """What an engine consists of.

    Attributes:
      settings: ``buffer_size``, ``attention``, ``block_size`` and ``page_size`` filled in.
      dims: sizes of the state.
      limits: what it can take.
      device, scheduler: the device's side, and who runs where.
      fingerprint: what must agree for a snapshot to be continued.
      adapters: what else must, of a request that has one; see ``adapter_stacks.digests``.
    """

    settings: EngineConfig
    dims: Dims
    limits: Limits
    device: JaxDevice | Mirror
    scheduler: Scheduler
    fingerprint: Mapping[str, str]
    adapters: Mapping[str, str]


def load(
    model: str, strategies: Sequence[AnyStrategy | None], mesh: Mesh | str | None, settings: EngineConfig
) -> tuple[Network, list[Strategy]]:
    """Reads a model, and finds the strategies that are to decode it; see ``Engine.for_strategies``.

    Raises:
      ValueError: for a model, a strategy or a mesh that will not do.
    """
    mesh = mesh_of(mesh)
    _check_shards(settings, mesh.shape["data"])
    for strategy in strategies:
        if strategy is not None:
            resolve(strategy)  # an unknown one should not cost a download
    announce("loading", str(model))
    path = checkpoint.resolve(str(model))
    spec = checkpoint.load_model(path).spec
    found = [for_model(spec, strategy) for strategy in strategies]
    names = [strategy.name for strategy in found]
    if not names or len(set(names)) < len(names):
        hint = "; give a rule of your own one with Strategy(name=..., rule=...)" if "custom" in names else ""
        raise SettingError("strategy", f"strategies must be one or more, each with a name of its own; got {names}{hint}")
    tokenizer, eos_ids = Tokenizer.load(path), checkpoint.load_end_ids(path)
    for strategy in found:
        plan(spec, strategy, settings)  # a setting that will not do should not cost a load either
    alike.check(settings, found, mesh, path=path)
    kernels, weights = _kernels(mesh, settings), _form(settings)
    adapter = None if settings.adapter is None else adapters.load(settings.adapter, checkpoint.load_model(path))
    if adapter is not None and checkpoint.form_in(path, weights) is not None:
        _check_plain(checkpoint.load_model(path), adapter[0])
    beside = None if settings.adapters is None else adapter_stacks.load(settings.adapters, checkpoint.load_model(path))
    of = {"dtype": settings.jax_dtype, "weights": weights, "kernels": kernels}
    network, params = checkpoint.load(path, mesh, **of, progress=not is_told())
    name = str(model)
    if adapter is not None:
        params, name = _adapted(network, params, *adapter, mesh=mesh), f"{model} + {settings.adapter}"
    if beside is not None:
        params |= {ADAPTERS: adapter_stacks.placed(network, beside, dtype=settings.jax_dtype, mesh=mesh)}
    return Network(network, params, tokenizer, eos_ids, name, mesh), found


def _check_plain(model: Model, lora: adapters.Lora) -> None:
    """Checks that an adapter changes nothing that will be quantised when it is merged.

    Raises:
      SettingError: naming the first leaf that is.
    """
    schema = leaves(model.schema)
    for site in adapters.sites(model, lora):
        path = site.tensors[0].parts[0].leaf
        if schema[path].quantisable:
            others = "; adapters= leaves an adapter beside it" if schema[path].adaptable else ""
            raise SettingError("adapter", f"adapter: {'.'.join(path)} is quantised, and only plain leaves are adapted{others}")


def _adapted(model: Model, params: Params, lora: adapters.Lora, trained: adapters.Adapters, *, mesh: Mesh) -> Params:
    """The parameters with an adapter merged, each where it was: the old ones are donated."""
    where = jax.tree.map(lambda leaf: leaf.sharding, params)
    with jax.set_mesh(mesh):
        return jax.jit(functools.partial(adapters.merge, model, lora), donate_argnums=0, out_shardings=where)(params, trained)


def limits_of(model: str, strategy: AnyStrategy | None, settings: EngineConfig) -> tuple[Limits, Strategy]:
    """What an engine could take that is not built, by the small files of its model alone, and the strategy that would decode.

    Its pool is as large as it must be.

    Raises:
      ValueError: for a model, a strategy or a setting that will not do, naming it.
    """
    if strategy is not None:
        resolve(strategy)  # an unknown one should not cost a download
    path = checkpoint.resolve(model)
    spec, tokenizer, eos_ids = checkpoint.load_model(path).spec, Tokenizer.load(path), checkpoint.load_end_ids(path)
    chosen = for_model(spec, strategy)
    s, _, dims = plan(spec, chosen, settings)
    num_pages = None if dims.whole_canvas else s.num_pages or s.max_slots * dims.units_per_slot
    names = tuple(settings.adapters or ())
    return Limits(s, dims, tokenizer, spec.vocab_size, eos_ids, num_pages, _reads(chosen, s, dims), adapters=names), chosen


def _reads(strategy: Strategy, settings: EngineConfig, dims: Dims) -> tuple[str, ...]:
    """What the strategy reads. The second forward of guidance has no cache of its own; an output that is one block is as long as that."""
    idle = {"cfg_scale": settings.cache != "none", "block_length": dims.one_block}
    return tuple(name for name in strategy.reads if not idle.get(name))


def build(network: Network, strategy: Strategy, settings: EngineConfig, *, memory_share: float) -> Parts:
    """Makes what an engine consists of, and compiles what it will run where the settings ask for it.

    Raises:
      ValueError: for a setting that will not do, naming it.
    """
    spec, mesh, rule = network.model.spec, network.mesh, strategy.rule
    alike.check(settings, [strategy], mesh)
    kernels = _kernels(mesh, settings)
    layers = kernels.for_layers(settings.jax_dtype)
    batched = settings.max_batched_tokens or kernels.batched_tokens
    s, policy, dims = plan(spec, strategy, dataclasses.replace(settings, max_batched_tokens=batched))
    shards, heads = mesh.shape["data"], spec.layers.kv_heads // mesh.shape["tensor"]
    _check_shards(s, shards)
    unit_bytes = 2 * spec.layers.count * dims.unit * heads * vector_bytes(spec.layers.head_dim, _kv(s), s.jax_dtype)  # of a device
    needed = s.max_slots // shards * dims.units_per_slot  # in a shard, as what follows
    num_pages = s.num_pages // shards if s.num_pages else needed
    if policy.paged and not s.num_pages:
        mine = default_num_pages(mesh.local_devices[0], unit_bytes, needed=needed, share=memory_share)
        num_pages = hosts.least(mine)
    # Soft inputs leave other KV than a prompt of the same tokens would, and where a prompt sees all of itself its KV depends on
    # what follows: such pages must not be found by their tokens.
    shareable = policy.shareable and (rule.merge is None or not rule.merge.commit_soft)
    each = num_pages if policy.paged else 0
    pools = [PagePool(each, first=i * each, prefix_cache=s.prefix_cache and shareable) for i in range(shards)]
    params, names = quantised(network.model, without(network.params), _form(s), kernels=kernels, mesh=mesh), tuple(s.adapters or ())
    if names:
        params = params | {ADAPTERS: network.params[ADAPTERS]}
    announce("compiling", strategy.name)
    own = JaxDevice(
        decode.Program(network.model, dims, rule, kernels, policy, draws=strategy.draws, confidence=strategy.confidence, kv=_kv(s)),
        params,
        mesh=mesh,
        dtype=s.jax_dtype,
        num_pages=shards * num_pages * (dims.unit // dims.page),
        max_batched_tokens=batched,
        steps_per_dispatch=s.steps_per_dispatch,
        eos_ids=network.eos_ids,
        adapters=names,
    )
    if s.warm_up:
        with background.held():
            own.warm_up(wait=hosts.several())  # which of the others are there, every host would know for itself alone
    device = Mirror(own) if hosts.several() else own
    # The KV of a block depends on these; on the strategy it does not.
    same_kv = {
        "model": network.model_id,
        "config": str(network.model.config),
        "dtype": s.dtype,
        "weights": str(form_of(params)),
        "kv": str(s.kv or s.dtype),
        "block_size": str(dims.block),
        "attention": str(s.attention),
        "cache": policy.cache,
    }
    scheduler = Scheduler(
        device,
        pools,
        slots=s.max_slots,
        block=dims.block,
        page=dims.unit,
        window=dims.window,
        pace=Pace(batched, layers.prefill_tokens, layers.free_tokens),
        steps_per_dispatch=s.steps_per_dispatch,
        whole_prompts=not policy.chunkable,
        prompt_apart=dims.prompt_apart,
        commit_alone=dims.commit_alone,
        keeps_window=dims.sub_block_cache > 0,
        paged=policy.paged,
        root=chain_digest(repr(same_kv).encode(), np.zeros(0, np.int32)),
    )
    same_state = {
        "strategy": strategy_id(strategy),
        "buffer_size": str(dims.window),
        "page": str(dims.page),
        "sub_block_cache": str(dims.sub_block_cache),
        "positions": str(dims.positions),
    }
    paged_limit = num_pages if policy.paged else None
    limits = Limits(s, dims, network.tokenizer, spec.vocab_size, network.eos_ids, paged_limit, _reads(strategy, s, dims), shards, names)
    return Parts(s, dims, limits, device, scheduler, same_kv | same_state, adapter_stacks.digests(s.adapters or {}))


def _kernels(mesh: Mesh, settings: EngineConfig) -> Kernels:
    return choose(mesh.local_devices[0]) if settings.kernels == "auto" else REFERENCE


def _form(settings: EngineConfig) -> Form | None:
    return cast(Form | None, settings.weights)  # checked where the settings are made


def _kv(settings: EngineConfig) -> KV | None:
    return cast(KV | None, settings.kv)  # likewise


def _check_shards(settings: EngineConfig, shards: int) -> None:
    """Slots and pages come in equal parts, one for each of so many ``shards``."""
    for name in ("max_slots", "num_pages"):
        value = getattr(settings, name)
        if value is not None and value % shards:
            nearest = " or ".join(str(n * shards) for n in (value // shards, value // shards + 1) if n)
            raise SettingError(name, f"{name}={value} cannot be split over the mesh's data={shards}; {nearest} can")
