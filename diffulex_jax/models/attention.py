"""Who sees whom: one policy for the forward, its reference kernel, the tests and the trainer."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class Where(NamedTuple):
    """Where positions lie. The arrays broadcast against each other.

    Attributes:
      block: int32, the number of the position's block.
      prompt: bool, whether it belongs to the prompt.
    """

    block: jax.Array
    prompt: jax.Array


@dataclasses.dataclass(frozen=True)
class AttentionPolicy:
    """What positions see of each other.

    Attributes:
      prompt: what a prompt sees of itself: ``"block_causal"``, the blocks before a position's own and its own, or ``"whole"``, all of it
        (D2F).
      canvas: what other positions see: ``"block_causal"``, the prompt and the blocks up to their own, or ``"whole"``, all of the
        canvas, the prompt and what is still masked included (LLaDA). Then a prompt sees the whole canvas too, and keys and values change
        with every token that is written.
      cache: ``"exact"``: keys and values that can no longer change are kept (block-causal canvases). ``"none"``: every forward makes all
        anew. ``"prefix"``, ``"dual"``: only the first forward of a block does; the others take those of what lies before the block, or of
        all but the block, as that one made them, which is an approximation (Fast-dLLM, arXiv 2505.22618).
    """

    prompt: Literal["block_causal", "whole"] = "block_causal"
    canvas: Literal["block_causal", "whole"] = "block_causal"
    cache: Literal["exact", "none", "prefix", "dual"] = "exact"

    def __post_init__(self) -> None:
        assert self.canvas == "block_causal" or self.prompt == "whole", "a canvas that sees all of itself has a prompt that does"
        assert (self.canvas == "block_causal") == (self.cache == "exact"), "what changes with every token is not cached exactly"

    @property
    def paged(self) -> bool:
        """Whether keys and values of prompts and of finished blocks are kept, in pages that requests take as they need them."""
        return self.canvas == "block_causal"

    @property
    def chunkable(self) -> bool:
        """Whether a prompt may be prefilled in pieces, from the front."""
        return self.prompt == "block_causal"

    @property
    def shareable(self) -> bool:
        """Whether keys and values of a block depend on nothing that follows it, so that prompts which begin alike can share them."""
        return self.prompt == "block_causal"

    def mask(self, query: Where, key: Where) -> jax.Array:
        """``[..., Q, K]`` bool: which keys ``[..., K]`` each query ``[..., Q]`` sees."""
        sees = key.block[..., None, :] <= query.block[..., :, None]
        if self.canvas == "whole":
            return jnp.ones_like(sees)
        if self.prompt == "whole":
            sees |= query.prompt[..., :, None] & key.prompt[..., None, :]
        return sees


def positions_of(blocks: jax.Array) -> Where:
    """Positions of generated blocks, whose numbers are ``blocks``."""
    return Where(blocks, jnp.zeros(blocks.shape, bool))
