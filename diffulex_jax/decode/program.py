"""Everything static about a decode step."""

from __future__ import annotations

from typing import Any, NamedTuple

from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.models.base import Model
from diffulex_jax.rules.base import Rule
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import FORWARDS_PER_TOKEN, Dims
from pallas_kernels import Kernels
from pallas_kernels.block_attention import KV


_MANY_SLOTS = 16  # fewer take no longer than reading the weights does, pending blocks or not
_SLOTS_OF_A_PENDING = 4


class Program(NamedTuple):
    """What is compiled.

    Attributes:
      model, dims, rule, kernels: the network, the state's sizes, what is made of a prediction, and by which backends.
      attention: what positions see of each other.
      draws, confidence: see ``strategies.Strategy``.
      kv: the form in which the pool holds keys and values; None: the model's dtype.
      greedy: whoever launches this knows that no row samples, or asks for another distribution than the model's (``asks_nothing``). A GPU
        then has one question less to ask the host at every step.
    """

    model: Model
    dims: Dims
    rule: Rule
    kernels: Kernels
    attention: AttentionPolicy = AttentionPolicy()
    draws: str = "position"
    confidence: str = "model"
    kv: KV | None = None
    greedy: bool = False

    def asks_nothing(self, params: SamplingParams) -> bool:
        """Whether a request of resolved ``params`` decodes by the model's own distribution: greedily, doubting no token, and, where
        confidences are of what top-p and top-k leave, with neither."""
        narrows = self.confidence == "narrowed" and (params.top_p != 1 or params.top_k != 0)
        return params.temperature == 0 and not params.doubted_token_ids and not narrows

    def mixes(self, dtype: Any) -> bool:
        """Whether prompts may be prefilled in a forward of a denoise step: what a row gives must not be held, to the bit, to what it gives
        without them, its prompt may come in pieces, and a block is committed beside the next."""
        apart = self.kernels.for_layers(dtype).rows_apart
        return not apart and self.attention.paged and self.attention.chunkable and not (self.dims.commit_alone or self.dims.carried)

    def few_pending(self, dtype: Any) -> int:
        """How many rows mostly commit a block in the same step, at the most: there is a forward for so many pending blocks beside the one
        for all; 0: there is none. Only in a program that others can stand in for, so that nobody waits until it is compiled."""
        return self.dims.slots // _SLOTS_OF_A_PENDING if self.greedy and self.mixes(dtype) and self.dims.slots >= _MANY_SLOTS else 0

    @property
    def block_budget(self) -> int:
        """Forwards after which a block is filled by force, whatever the rules say: every block ends. Where a window is wide, a block may
        wait for a token a forward in each of those before it."""
        return max(FORWARDS_PER_TOKEN, self.dims.window) * self.dims.block
