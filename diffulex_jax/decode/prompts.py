"""Prompts in the network: in a forward of their own, or beside the windows of a denoise step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffulex_jax.decode.forward import Rows, Written, forward_through_pool, pages_written
from diffulex_jax.decode.program import Program
from diffulex_jax.models.attention import Where
from diffulex_jax.models.base import Params
from diffulex_jax.state import KVPool
from pallas_kernels.block_attention import Keys


class Prompts(NamedTuple):
    """Prompt blocks of any requests. A row is a piece of a prompt, or, where attention is not chunkable, a whole one.

    Attributes:
      tokens: ``[R, C, B]`` int32: R rows of C blocks, as compiled.
      start: ``[R]`` int32, position of a row's first token, a multiple of B.
      length: ``[R]`` int32, how many of its tokens exist: whole blocks, but for the last of a whole prompt; 0: no such row.
      written: ``[R, C]`` bool, the blocks to write. Others are there to be seen in their row, or not at all.
      page_table: ``[R, P]`` int32, the pages of each row's request.
    """

    tokens: Any
    start: Any
    length: Any
    written: Any
    page_table: Any


def prefill(program: Program, params: Params, pool: KVPool, prompts: Prompts) -> tuple[KVPool, jax.Array]:
    """Writes the KV of prompt blocks.

    A row sees what lies before it in the pool, where an earlier forward wrote it, or another row of this one. So, to the bit, a row is what
    it is however prompts are cut and packed, as long as its ``start`` and the compiled size are the same.

    Args:
      program, params: the static part, and model parameters.
      pool: the KV pool; donate it.
      prompts: what to write.

    Returns:
      The pool, and ``[R, dims.carried]`` float32, the hidden state of each row's last position.
    """
    (hidden,), pool = forward_through_pool(program, params, pool, [prompt_rows(program, params, pool, prompts)])
    last = hidden[jnp.arange(len(hidden)), jnp.maximum(prompts.length - 1, 0), : program.dims.carried]
    return pool, last.astype(jnp.float32)


def prompt_rows(program: Program, params: Params, pool: KVPool, prompts: Prompts) -> Rows:
    """``prompts`` as rows of a forward."""
    tokens, start, length, written, page_table = prompts
    rows, blocks, block = tokens.shape
    at = jnp.arange(blocks * block, dtype=jnp.int32)
    lanes, visible = at[::block] < length[:, None], None
    if not program.attention.chunkable:
        where = Where(at // block, at < length[:, None])
        visible = program.attention.mask(where, where) & where.prompt[:, None]
    firsts = (start[:, None] + at[::block]).reshape(-1)
    pages = pages_written(program, pool, jnp.repeat(page_table, blocks, 0), firsts, written.reshape(-1))
    x = params["embed"][tokens.reshape(rows, -1)]
    return Rows(x, start[:, None] + at, Keys(pool.k, pool.v, page_table, start, lanes), visible, Written(pages, firsts))
