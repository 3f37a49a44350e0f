"""What a finished request returns."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from diffulex_jax.engine.request import Tracked
from diffulex_jax.engine.results import Output, Progress
from diffulex_jax.engine.stops import Cut
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.state import Canvas


def make_output(request: Tracked, cut: Cut, sequence: Canvas | None, tokenizer: Tokenizer | None) -> Output:
    """The output of a request that has left the scheduler.

    Args:
      request: the request.
      cut: where its output ends, and why.
      sequence: what is known of its positions, ``[T]`` each; None where that is not wanted, or there is nothing.
      tokenizer: None where the model has none.
    """
    ids, made = request.tokens[: cut.length], slice(len(request.prompt), len(request.prompt) + cut.length)
    text = cut.text
    if text is None and tokenizer is not None:
        text = tokenizer.decode(ids)
    logprobs = step_map = None
    if request.params.logprobs:
        logprobs = [] if sequence is None else [math.log(p) if p > 0 else -math.inf for p in sequence.confidence[made].tolist()]
    if request.params.return_step_map:
        steps = (sequence.first_step[made].tolist(), sequence.last_step[made].tolist()) if sequence is not None else ([], [])
        step_map = list(zip(*steps, strict=True))
    assert request.params.seed is not None
    now = time.perf_counter()
    return Output(
        text=text,
        token_ids=ids,
        finish_reason=cut.reason,
        nfe=request.nfe,
        revised_tokens=request.revised,
        remasked_tokens=request.remasked,
        prompt_token_ids=request.prompt.tolist(),
        seconds=now - request.began if request.began else 0.0,
        queue_seconds=(request.began or now) - request.queued,
        first_block_seconds=request.settled - request.began if request.settled else None,
        seed=request.params.seed,
        logprobs=logprobs,
        step_map=step_map,
        trace=request.trace,
    )


def make_progress(request: Tracked) -> Progress:
    """What is known of a request that has not finished."""
    assert request.params.seed is not None
    return Progress(request.tokens, request.nfe, request.revised, request.remasked, request.trace, request.params.seed)


def with_progress(finished: Iterable[tuple[int, Output]], *, total: int) -> Iterator[tuple[int, Output]]:
    """Passes outputs on as they come, and shows a bar of how many there are, with their tokens per forward."""
    tokens = forwards = 0
    with tqdm(total=total, unit="request") as bar:
        for id_, output in finished:
            tokens, forwards = tokens + len(output.token_ids), forwards + output.nfe
            bar.update()
            bar.set_postfix_str(f"{tokens / max(forwards, 1):.2f} tokens/forward")
            yield id_, output
