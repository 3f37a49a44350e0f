"""Expert choice: which experts of a mixture a token goes to, and how much each counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from pallas_kernels.expert_choice import compared, reference
from pallas_kernels.expert_choice.reference import Choice, Router
from pallas_kernels.target import Target, is_hopper, pick


__all__ = ["Backend", "Choice", "Router", "choose", "choose_backend"]

Backend = Literal["sorted", "compared", "gpu"]


def _hopper(*args: Any, **kwargs: Any) -> Choice:
    from pallas_kernels.expert_choice import gpu  # Mosaic GPU is imported where it is used

    return gpu.choose(*args, **kwargs)


_BACKENDS: dict[str, Callable[..., Choice]] = {"sorted": reference.choose, "compared": compared.choose, "gpu": _hopper}
assert tuple(_BACKENDS) == get_args(Backend)


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise."""
    return "gpu" if is_hopper(target) else "sorted"


def choose(
    x: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None,
    router: Router,
    *,
    valid: jax.Array | None = None,
    backend: str | None = None,
) -> Choice:
    """Top-k choice of experts in float32, limited to the best groups where the router has groups.

    Bias added, the ``kept`` groups with the largest sum of their two best experts stay, and the top-k experts among them are taken; of
    equals the lower index wins. Weights are the scores without the bias, normalised and scaled as the router says. Where the router
    has a capacity, the tokens of each block choose among the experts that the block admits.

    Args:
      x: ``[N, D]``; blocks one after the other where the router has a capacity.
      matrix: ``[D, E]``; ``x @ matrix`` are the experts' logits.
      bias: ``[E]``, added to scores where experts are compared and nowhere else; None adds nothing.
      router: the scheme; static.
      valid: ``[N]`` bool; other tokens are not counted and admit no experts, and their own experts mean nothing.
      backend: ``"sorted"`` (the one meant to be differentiated), ``"compared"`` (few kernels, for a GPU) or ``"gpu"`` (Hopper: a kernel
        for many tokens where it fits, else compared); None chooses by the current mesh's devices, else the default one. For a
        router with a capacity all are ``"sorted"``.

    Raises:
      ValueError: for an unknown backend or score, or a router that does not fit E experts or N tokens.
    """
    _check(router, len(x), matrix.shape[1])
    compute = pick("expert_choice", backend, choose_backend, _BACKENDS)
    with jax.named_scope("expert_choice"):
        return (reference.choose if router.capacity else compute)(x, matrix, bias, router, valid=valid)


def _check(router: Router, tokens: int, experts: int) -> None:
    if router.score not in ("sigmoid", "softmax"):
        raise ValueError(f"unknown score {router.score!r} of experts; valid: sigmoid, softmax")
    if experts % router.groups or not 0 < router.kept <= router.groups:
        raise ValueError(f"{experts} experts do not lie in groups={router.groups} of which kept={router.kept} are chosen from")
    if not 0 < router.top_k <= router.kept * (experts // router.groups):
        raise ValueError(f"top_k={router.top_k} exceeds the experts in kept={router.kept} of groups={router.groups} ({experts} in all)")
    if not router.capacity:
        return
    if router.kept < router.groups:
        raise ValueError(f"capacity={router.capacity} admits experts of all groups; kept={router.kept} of groups={router.groups} does not")
    if not router.top_k <= router.capacity <= experts:
        raise ValueError(f"capacity={router.capacity} must lie between top_k={router.top_k} and the {experts} experts")
    if router.block < 1 or tokens % router.block:
        raise ValueError(f"{tokens} tokens do not make whole blocks of {router.block}, whose tokens choose their experts together")
