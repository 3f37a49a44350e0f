"""What passes between clients and the loop that owns the engine: plain, picklable data. Commands go in, events come out.

A request is named by its client (``id``); its ``n`` outputs are numbered by ``index``. Its events come in this order::

    Accepted, then per output any number of Commit and (where asked for) Provisional, then a Reply

or a Failure, which is the last event of the whole request whenever it comes.

**Committed text only grows.** The texts of an output's Commits, joined, are its Reply's text, and their token ids its Reply's
token ids. Nothing that a Commit said is ever taken back.

**Provisional events are patches of a canvas.** The canvas of an output has one cell for each position that may be generated, numbered
by ``offset`` from 0 (the first position after the prompt); it starts masked. A Provisional is the window as one denoise step
(forward) left it: cell ``offset + i`` becomes ``token_ids[i]``, or masked where that is None. Applied in order they show what the model
saw, step by step; cells may change, and be masked again. Cells that no later patch touches keep their token. After the last patch the first
``len(Reply.token_ids)`` cells are ``Reply.token_ids``; cells after them hold what the model wrote past the end (an EOS, say).
Over HTTP the same record is a JSON object; see ``records``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from diffulex_jax.engine.results import Output, TraceStep
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Decode a prompt.

    Attributes:
      id: the client's name of the request, in use by no other.
      prompt: token ids.
      params: the request's settings.
      strategy: of the engine that is to do it.
      commits: send Commits as text becomes final; otherwise only the Reply.
      provisional: send every denoise step.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    strategy: str
    commits: bool = True
    provisional: bool = False


@dataclasses.dataclass(frozen=True)
class Abort:
    """End a request at once. It answers with a Failure of code 499; an unknown id is no error (it may just have finished)."""

    id: str


@dataclasses.dataclass(frozen=True)
class StartProfile:
    """Begin a JAX profiler trace in a directory. Answered by Profiled."""

    directory: str


@dataclasses.dataclass(frozen=True)
class StopProfile:
    """End the profiler trace, which writes it. Answered by Profiled."""


@dataclasses.dataclass(frozen=True)
class Drain:
    """Refuse new requests (Failure, code 503) and finish those there are."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """Leave the loop."""


Command = Generate | Abort | StartProfile | StopProfile | Drain | Stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accepted:
    """The request is queued."""

    id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commit:
    """Tokens and text that became final since the last Commit; either may be empty, not both.

    Attributes:
      id, index: the output.
      offset: of the first of ``token_ids``.
      token_ids, text: what is appended. Text may lag behind tokens (an incomplete character, the beginning of a stop text).
      nfe: forwards the output has taken part in.
      logprobs: of the tokens, where asked for.
    """

    id: str
    index: int
    offset: int
    token_ids: tuple[int, ...]
    text: str
    nfe: int
    logprobs: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provisional:
    """The window after one denoise step, a patch of the canvas (see the module's docstring).

    Attributes:
      id, index: the output.
      nfe: number of the step, from 1 on.
      offset: of the first cell.
      token_ids: None where masked.
      confidence: probability of each token when it was last written; 0 where masked or given by the client.
      revised: offsets of filled cells that this step changed.
      remasked: offsets of filled cells that this step masked again.
    """

    id: str
    index: int
    nfe: int
    offset: int
    token_ids: tuple[int | None, ...]
    confidence: tuple[float, ...]
    revised: tuple[int, ...]
    remasked: tuple[int, ...]

    @classmethod
    def of(cls, step: TraceStep, *, id: str, index: int, nfe: int, prompt_tokens: int, max_tokens: int) -> Provisional:
        """A step of a trace, without the positions of the prompt and those past ``max_tokens``."""
        offset = step.start - prompt_tokens
        inside = slice(max(0, -offset), max(0, max_tokens - offset))
        offset = max(0, offset)
        tokens, masked = step.tokens[inside].tolist(), step.masked[inside].tolist()
        return cls(
            id=id,
            index=index,
            nfe=nfe,
            offset=offset,
            token_ids=tuple(None if hidden else token for token, hidden in zip(tokens, masked, strict=True)),
            confidence=tuple(step.confidence[inside].tolist()),
            revised=tuple((np.flatnonzero(step.revised[inside]) + offset).tolist()),
            remasked=tuple((np.flatnonzero(step.remasked[inside]) + offset).tolist()),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """An output is complete. Fields as in ``engine.results.Output``."""

    id: str
    index: int
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: str
    nfe: int
    revised_tokens: int
    remasked_tokens: int
    seconds: float
    queue_seconds: float
    first_block_seconds: float | None
    seed: int
    logprobs: tuple[float, ...] | None
    step_map: tuple[tuple[int, int], ...] | None

    @classmethod
    def of(cls, output: Output, *, id: str, index: int, text: str | None) -> Reply:
        """An output; ``text`` is what was given out of it."""
        return cls(
            id=id,
            index=index,
            text=text,
            token_ids=tuple(output.token_ids),
            finish_reason=output.finish_reason,
            nfe=output.nfe,
            revised_tokens=output.revised_tokens,
            remasked_tokens=output.remasked_tokens,
            seconds=output.seconds,
            queue_seconds=output.queue_seconds,
            first_block_seconds=output.first_block_seconds,
            seed=output.seed,
            logprobs=None if output.logprobs is None else tuple(output.logprobs),
            step_map=None if output.step_map is None else tuple(output.step_map),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """The request ended without being answered.

    Attributes:
      code: as in HTTP. 400: the request will not do; 499: aborted; 500: it alone failed; 503: the engine cannot take or finish it.
      message: what is wrong, for the client.
      field: the setting that is to blame (``"max_tokens"``, ``"prompt"``), if one is.
    """

    id: str
    code: int
    message: str
    field: str | None = None


@dataclasses.dataclass(frozen=True)
class Starting:
    """A stage of the start begins: ``"loading"`` a model, or ``"compiling"`` the programs of a strategy; ``what`` says which."""

    stage: str
    what: str


@dataclasses.dataclass(frozen=True)
class Ready:
    """The engines are built; ``tokenizer`` is their model's, ``facts`` what is true of all, and under ``strategies`` of each. Sent
    once, before anything but Starting."""

    tokenizer: Tokenizer | None
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Profiled:
    """The answer to a StartProfile or a StopProfile, in the order they came; ``error`` says what was wrong, if something was."""

    error: str = ""


@dataclasses.dataclass(frozen=True)
class Status:
    """``Engine.stats``, summed over the engines; sent when it changed."""

    stats: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Beat:
    """The worker lives; its current tick has taken ``busy`` seconds so far (0 between ticks)."""

    busy: float


@dataclasses.dataclass(frozen=True)
class Stopped:
    """The loop has ended: the last event there is.

    Attributes:
      reason: one line; empty after a Stop.
      refused: the engine was never built because its settings or its model will not do; another try would end the same.
    """

    reason: str
    refused: bool = False


RequestEvent = Accepted | Commit | Provisional | Reply | Failure
Event = RequestEvent | Starting | Profiled | Ready | Status | Beat | Stopped
