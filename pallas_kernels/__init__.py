"""Kernels for the hot updates: each a reference, its backends, and one public function that picks."""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels import block_attention, grouped_matmul, prediction, remask, token_merge
from pallas_kernels.target import target_of


__all__ = ["REFERENCE", "Kernels", "choose"]


class Kernels(NamedTuple):
    """The backend of each operation, by name."""

    block_attention: str
    grouped_matmul: str
    prediction: str
    remask: str
    token_merge: str


REFERENCE = Kernels(
    block_attention="reference", grouped_matmul="ragged", prediction="reference", remask="reference", token_merge="reference"
)
"""Plain XLA for everything: right everywhere, fast nowhere."""


def choose(device: jax.Device) -> Kernels:
    """The backends that are fastest on ``device``, as far as was measured."""
    target = target_of(device)
    return Kernels(
        block_attention=block_attention.choose_backend(target),
        grouped_matmul=grouped_matmul.choose_backend(target),
        prediction=prediction.choose_backend(target),
        remask=remask.choose_backend(target),
        token_merge=token_merge.choose_backend(target),
    )
