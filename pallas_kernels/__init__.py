"""Kernels for the hot updates: each a reference, its backends, and one public function that picks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import block_attention, expert_choice, grouped_matmul, linear, norm, prediction, remask, rotary, token_merge
from pallas_kernels.target import Target, target_of


__all__ = ["REFERENCE", "Kernels", "choose", "choose_for"]


class Kernels(NamedTuple):
    """What an engine computes with on its devices: the backend of each operation by name, and what follows from them.

    Attributes:
      block_attention, expert_choice, grouped_matmul, linear, norm, prediction, remask, rotary, token_merge: names of backends.
      host_drives_loops: every branch and every turn of a loop asks the device something and waits for the answer (XLA on a GPU). Then a
        program should ask as little as it can, at the price of a longer one.
      layers_per_turn: layers in one turn of the loop over layers: where there is a gap between turns, more of them leave fewer gaps.
      rows_apart: the last bits of a row of a matmul may depend on which rows are beside it, and must not; so rows that are there in some
        steps only go through matmuls of their own. Where it is False, bits are not held to that.
      pending_apart: the pending block goes through the network ahead of the window, not beside it: where a step is bound by arithmetic and
        not by reading weights, that costs nothing, and the program compiles in less time.
      few_rows: the denoise loop is compiled for so many rows as well, where there are more: then a few requests need not pay for all slots.
        Where bits are held to be independent of other rows, for none.
      prefill_tokens: a forward over prompts is compiled for so many tokens. Where bits are held to be independent of other rows, for one
        number alone: with its shapes the last bits of a row may change.
      free_tokens: a forward takes in so many in the time in which it reads its weights: what costs twice as much as the first has so many.
      kept_ready: a program can be written down and read back ready to run. On a CPU one that was itself read back lacks functions then.
      batched_tokens: of prompts between two steps, at the most, where nobody says otherwise.
      pool_order: dimensions of the KV pool from major to minor, as the kernels read it; None leaves them in their order.
    """

    block_attention: str
    expert_choice: str
    grouped_matmul: str
    linear: str
    norm: str
    prediction: str
    remask: str
    rotary: str
    token_merge: str
    host_drives_loops: bool = False
    layers_per_turn: int = 1
    rows_apart: bool = True
    pending_apart: bool = True
    few_rows: tuple[int, ...] = ()
    prefill_tokens: tuple[int, ...] = (128,)
    free_tokens: int = 512
    kept_ready: bool = False
    batched_tokens: int = 2048
    pool_order: tuple[int, ...] | None = None

    def for_layers(self, dtype: Any) -> Kernels:
        """The kernels of layers whose weights are of ``dtype``.

        The Hopper kernels that read stacks of layers in place are for bfloat16. Other layers are plain XLA, and in float32 independent of
        the rows beside them.
        """
        if self.rows_apart or jnp.dtype(dtype) == jnp.bfloat16:
            return self
        held = self._replace(rows_apart=True, few_rows=(), prefill_tokens=_ONE_PREFILL, free_tokens=512)
        return held._replace(expert_choice="sorted", linear="sliced", layers_per_turn=1)


_ONE_PREFILL = (512,)  # of accelerators: weights are read once for so many tokens

REFERENCE = Kernels(
    block_attention="reference",
    expert_choice="sorted",
    grouped_matmul="ragged",
    linear="sliced",
    norm="reference",
    prediction="reference",
    remask="reference",
    rotary="reference",
    token_merge="reference",
)
"""Plain XLA for everything: right everywhere, fast nowhere."""


def choose(device: jax.Device) -> Kernels:
    """The backends that are fastest on ``device``, as far as was measured."""
    return choose_for(target_of(device))


def choose_for(target: Target) -> Kernels:
    """The backends that are fastest on a kind of device, as far as was measured."""
    attention, matrices = block_attention.choose_backend(target), linear.choose_backend(target)
    in_place = matrices == "gpu"
    return Kernels(
        block_attention=attention,
        expert_choice=expert_choice.choose_backend(target),
        grouped_matmul=grouped_matmul.choose_backend(target),
        linear=matrices,
        norm=norm.choose_backend(target),
        prediction=prediction.choose_backend(target),
        remask=remask.choose_backend(target),
        rotary=rotary.choose_backend(target),
        token_merge=token_merge.choose_backend(target),
        host_drives_loops=target.platform == "gpu",
        layers_per_turn=2 if in_place else 1,
        rows_apart=not in_place,
        pending_apart=target.platform == "cpu",
        few_rows=(8,) if in_place else (),
        prefill_tokens=(256, 1024, 2048, 4096) if in_place else (128,) if target.platform == "cpu" else _ONE_PREFILL,
        free_tokens=2048 if in_place else 32 if target.platform == "cpu" else 512,
        kept_ready=target.platform != "cpu",
        batched_tokens=4096 if in_place else 2048,
        pool_order=block_attention.pool_order(attention),
    )
