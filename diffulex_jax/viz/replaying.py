"""Outputs as a file that plays them in a browser."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from diffulex_jax.async_serving import page, records
from diffulex_jax.async_serving.protocol import Provisional, Reply
from diffulex_jax.engine.results import Output, TraceStep
from diffulex_jax.engine.tokenizer import Tokenizer


def replay(outputs: Output | Mapping[str, Output], *, tokenizer: Tokenizer | None = None) -> str:
    """Plays outputs side by side, as the server's page does: play, step, scrub, ask a cell what it knows.

    Args:
      outputs: decoded with ``trace=True``; one, or several by what they are called.
      tokenizer: the engine's; None: token ids are shown.

    Returns:
      A whole HTML file, which asks no host for anything.

    Raises:
      ValueError: for no outputs, or one without a trace.
    """
    named = outputs if isinstance(outputs, Mapping) else {"": outputs}
    if not named:
        raise ValueError("nothing to replay")
    for name, output in named.items():
        if not output.trace:
            raise ValueError(f"{name or 'this output'} has no trace; pass trace=True to Engine.generate")
    lanes: list[dict[str, Any]] = [
        {"name": name, "asked": _asked(output.prompt_token_ids, tokenizer), "records": list(_records(output, tokenizer))}
        for name, output in named.items()
    ]
    traces = [output.trace for output in named.values() if output.trace]
    return page.replay(lanes, block_size=math.gcd(*map(_block_size, traces)))


def _records(output: Output, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any]]:
    """What the server would have sent."""
    prompt = len(output.prompt_token_ids)
    steps = output.trace or []
    end = max(step.start + len(step.tokens) for step in steps) - prompt
    most = len(output.token_ids) if output.finish_reason == "length" else end  # what ended before its block shows the rest of it
    for number, step in enumerate(steps, 1):
        patch = Provisional.of(step, id="", index=0, nfe=number, prompt_tokens=prompt, max_tokens=most)
        yield records.buffer_snapshot(patch, "", prompt_tokens=prompt, committed=0, tokenizer=tokenizer)
    yield records.final(Reply.of(output, id="", index=0, text=output.text), "", prompt_tokens=prompt)


def _block_size(trace: list[TraceStep]) -> int:
    """The window moves on by whole blocks, and is as long as some."""
    moves = (after.start - before.start for before, after in itertools.pairwise(trace))
    return math.gcd(len(trace[0].tokens), *moves)


def _asked(ids: list[int], tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """What the server tells of a prompt."""
    if tokenizer is None:
        return [{"text": " ".join(map(str, ids)), "special": False}]
    return [part._asdict() for part in tokenizer.spelled(ids)]
