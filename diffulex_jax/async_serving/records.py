"""The stream's own records as JSON. A page or a terminal that shows denoising is written against this.

``/generate`` with ``"stream": true`` sends them as ``data:`` frames; streams of the OpenAI routes send ``buffer_snapshot`` as frames named
``event: diffusion`` where ``"diffusion": {"provisional": true}`` asks for them. Every record has ``event``, ``id`` and ``index`` (of
the output among the request's). ``offset`` always counts generated positions: 0 follows the prompt.

``buffer_snapshot`` (``stream_mode: "denoise"``): the window as one denoise step left it; a patch of the canvas (see ``protocol``).
  ``nfe``: number of the step, from 1 on.
  ``token_offset``: of the first cell. ``absolute_start``, ``absolute_end``: the same cells counted from the first token of the prompt.
  ``token_ids``: null where masked.
  ``tokens``: each token's own text, null where masked; a piece of a multi-byte character shows as U+FFFD.
  ``text``: the text of the tokens that are there.
  ``confidence``: probability of each token when it was last written; 0 where masked or given.
  ``revised``, ``remasked``: offsets of filled cells that this step changed, or masked again.
  ``committed``: so many tokens from offset 0 on were final before this step's batch; they never change again.
``append`` (``stream_mode: "block_append"``): ``token_offset``, ``token_ids`` and ``text`` that became final, ``nfe`` so far, and
  ``logprobs`` where asked for.
``final``: the whole output, last of its index: ``text``, ``token_ids``, ``finish_reason`` (``stop``, ``length``, ``max_nfe``,
  ``repetition``), ``nfe``, ``tokens_per_forward``, ``revised_tokens``, ``remasked_tokens``, ``prompt_tokens``, and ``logprobs`` and
  ``step_map`` where asked for.
  ``seed``: of this output; asked for again, with ``n`` 1, it gives the same tokens.
  ``queue_seconds``: until it got a slot. ``seconds``: from then on. ``first_block_seconds``: of these, until its first tokens were
  final; null where none ever were.

``final`` carries ``"finished": true``, the others false. An error is ``{"error": {...}}``, OpenAI's envelope. The stream ends with
``data: [DONE]``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from diffulex_jax.async_serving.protocol import Commit, Provisional, Reply
from diffulex_jax.engine.tokenizer import Tokenizer


LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's stand-in for it


def finite(logprobs: tuple[float, ...] | None) -> list[float] | None:
    """Log probabilities that JSON can hold."""
    return None if logprobs is None else [max(p, LEAST_LOGPROB) if math.isfinite(p) else LEAST_LOGPROB for p in logprobs]


def append(event: Commit, id: str) -> dict[str, Any]:
    """A Commit."""
    record: dict[str, Any] = {
        "event": "append",
        "id": id,
        "index": event.index,
        "token_offset": event.offset,
        "token_ids": event.token_ids,
        "text": event.text,
        "nfe": event.nfe,
        "finished": False,
    }
    if event.logprobs is not None:
        record["logprobs"] = finite(event.logprobs)
    return record


def buffer_snapshot(event: Provisional, id: str, *, prompt_tokens: int, committed: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A Provisional."""
    start = prompt_tokens + event.offset
    there = [token for token in event.token_ids if token is not None]
    return {
        "event": "buffer_snapshot",
        "id": id,
        "index": event.index,
        "nfe": event.nfe,
        "token_offset": event.offset,
        "absolute_start": start,
        "absolute_end": start + len(event.token_ids),
        "token_ids": event.token_ids,
        "tokens": None if tokenizer is None else [None if t is None else tokenizer.piece(t) for t in event.token_ids],
        "text": None if tokenizer is None else tokenizer.decode(there),
        "confidence": [round(p, 4) for p in event.confidence],
        "revised": event.revised,
        "remasked": event.remasked,
        "committed": committed,
        "finished": False,
    }


def final(event: Reply, id: str, *, prompt_tokens: int) -> dict[str, Any]:
    """A Reply."""
    record = dataclasses.asdict(event) | {"id": id, "logprobs": finite(event.logprobs), "prompt_tokens": prompt_tokens}
    record["tokens_per_forward"] = tokens_per_forward(event)
    for name in ("logprobs", "step_map"):
        if record[name] is None:
            del record[name]
    return {"event": "final"} | record | {"finished": True}


def tokens_per_forward(event: Reply) -> float:
    """Tokens of the output for each of its forwards."""
    return len(event.token_ids) / event.nfe if event.nfe else 0.0
