"""Which kernels the step of one model is made of on a machine, and what falls back to plain XLA.

The step is traced, without weights, and read: what a kernel takes is written down where the kernel is, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp

from diffulex_jax import decode
from diffulex_jax.decode.denoise_step import step
from diffulex_jax.engine import settle
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.device import empty
from diffulex_jax.models.base import Model, Param, init, is_param
from diffulex_jax.parallel.mesh import ONE_DEVICE
from diffulex_jax.strategies import AnyStrategy, Strategy, for_model
from diffulex_jax.weights import checkpoint, quantise
from pallas_kernels import REFERENCE, Kernels
from pallas_kernels.quantised import Form


_EXPERTS = ("expert_choice", "grouped_matmul")
_OPERATIONS = ("block_attention", *_EXPERTS, "linear", "norm", "prediction", "remask", "rotary", "token_merge")
_NAMES = {
    "block_attention": "block_attention",
    "write_blocks": "block_attention",
    "choose_experts": "expert_choice",
    "place_rows": "grouped_matmul",
    "grouped_matmul": "linear",  # or of experts, in their scope
    "grouped_swiglu": "linear",
    "add_and_norm": "norm",
    "prediction": "prediction",
    "lm_head_prediction": "prediction",
    "remask_decide": "remask",
    "rotate_heads": "rotary",
    "token_merge": "token_merge",
}
"""The operation of each kernel, by the kernel's name in a traced program."""


def describe(model: str, strategy: AnyStrategy | None, settings: EngineConfig, kernels: Kernels) -> dict[str, Any]:
    """What an engine would compute with.

    Args:
      model: a directory, a hub id, or ``"embedded"``.
      strategy: as for ``Engine.from_pretrained``; None: the one of the model's authors.
      settings: the engine's.
      kernels: those of the machine; where ``settings.kernels`` is ``"reference"``, plain XLA all the same.

    Returns:
      Plain data: ``model``, ``strategy``, ``dtype``, ``block_size``, and ``kernels``: for each operation ``chosen``, the backend, and
      ``runs``: ``"kernel"``, ``"plain XLA"``, or None where this model and strategy do not have the operation.

    Raises:
      ValueError: for a model, a strategy or a setting that will not do, naming it.
    """
    path = checkpoint.resolve(model)
    network, settings = checkpoint.load_model(path), dataclasses.replace(settings, weights=checkpoint.form_in(path, settings.weights))
    chosen = for_model(network.spec, strategy)
    filled = settle.plan(network.spec, chosen, settings)[0]
    kernels = REFERENCE if settings.kernels == "reference" else kernels
    found = kernels_in(network, chosen, settings, kernels)
    layers = kernels.for_layers(settings.jax_dtype)._asdict()
    absent = {name for name in _EXPERTS if not network.spec.experts_per_token} | ({"token_merge"} if chosen.rule.merge is None else set())
    absent |= {"remask"} if layers["remask"] != REFERENCE.remask and "remask" not in found else set()
    runs = {name: None if name in absent else "kernel" if name in found else "plain XLA" for name in _OPERATIONS}
    return {
        "model": model,
        "strategy": chosen.name,
        "dtype": settings.dtype,
        "block_size": filled.block_size,
        "kernels": {name: {"chosen": layers[name], "runs": runs[name]} for name in _OPERATIONS},
    }


def text(facts: dict[str, Any]) -> str:
    """The facts of :func:`describe` for people."""
    lines = [f"{'model':>16}  {facts['model']}: {facts['strategy']}, {facts['dtype']}, blocks of {facts['block_size']}"]
    for name, entry in facts["kernels"].items():
        chosen, runs = entry["chosen"], entry["runs"]
        if runs is None:
            said = "not used"
        elif runs == "kernel" or chosen in (getattr(REFERENCE, name), "cpu"):
            said = chosen
        else:
            said = f"plain XLA: {chosen!r} does not take this model with these settings"
        lines.append(f"{name:>16}  {said}")
    return "\n".join(lines)


def kernels_in(model: Model, strategy: Strategy, settings: EngineConfig, kernels: Kernels) -> set[str]:
    """The operations for which a step of an engine's program holds a kernel, ours or cuDNN's."""
    s, policy, dims = settle.plan(model.spec, strategy, settings)
    kinds: dict[str, Any] = {"draws": strategy.draws, "confidence": strategy.confidence, "kv": s.kv}
    program = decode.Program(model, dims, strategy.rule, kernels, policy, **kinds)
    plain = jax.eval_shape(functools.partial(init, model, dtype=s.jax_dtype), jax.random.key(0))

    def kept(param: Param, leaf: Any) -> Any:
        keep = quantise.store(param, cast(Form | None, s.weights), kernels=kernels, dtype=s.jax_dtype, mesh=ONE_DEVICE)
        return leaf if keep is None else jax.eval_shape(keep, leaf)

    params = jax.tree.map(kept, model.schema, plain, is_leaf=is_param)
    pages = dims.slots * dims.pages_per_slot
    pool, state = jax.eval_shape(functools.partial(empty, program, s.jax_dtype, pages))
    table = jax.ShapeDtypeStruct((dims.slots, dims.pages_per_slot), jnp.int32)
    traced = jax.make_jaxpr(functools.partial(step, program))(params, pool, state, page_table=table)
    return set(_operations(traced.jaxpr))


def _operations(jaxpr: Any, scope: str = "") -> Iterator[str]:
    for equation in jaxpr.eqns:
        here, name = f"{scope}/{equation.source_info.name_stack}", equation.params.get("name")
        primitive = equation.primitive.name
        if "dot_product_attention" in primitive:
            yield "block_attention"  # cuDNN's, over whole canvases
        elif primitive not in ("jit", "pjit") and name in _NAMES:
            yield "grouped_matmul" if "expert_mlp" in here and _NAMES[name] == "linear" else _NAMES[name]
            continue
        elif primitive == "pallas_call" and name is None and "expert_mlp" in here:
            yield "grouped_matmul"  # JAX's own, which has no name
            continue
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _operations(getattr(inner, "jaxpr", inner), here)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")
