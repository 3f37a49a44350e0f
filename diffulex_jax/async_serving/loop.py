"""The owner loop: (engines, serving state, commands) -> events. One thread runs it, and nothing else touches the engines.

There is an engine for each strategy, all over the same parameters; they take turns. ``Engine.step`` collects the dispatch that the
previous step launched and launches the next before it returns, so everything here (text, events, admission) is done while the device
computes.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np

from diffulex_jax.async_serving import protocol
from diffulex_jax.async_serving.detokenizer import Detokenizer, flush, push
from diffulex_jax.engine import background
from diffulex_jax.engine.engine import Engine
from diffulex_jax.engine.results import Output, TraceStep
from diffulex_jax.errors import SettingError


logger = logging.getLogger(__name__)


@dataclasses.dataclass
class ServingRequestState:
    """What has been said about one output (upstream's record of that name).

    Attributes:
      command: the request it belongs to, and its ``index`` among the request's outputs.
      engine: of the command's strategy.
      engine_id: the engine's number of it.
      text: None where the model has no tokenizer or no Commits are wanted.
      committed: tokens given out. They follow the text: while a possible stop text is held back, so are its tokens.
      steps: denoise steps looked at, of the engine's trace.
      confidence: ``[max_tokens]`` float32 by offset, as of those steps; None where the request is not traced.
    """

    command: protocol.Generate
    index: int
    engine: Engine
    engine_id: int
    text: Detokenizer | None
    committed: int = 0
    steps: int = 0
    confidence: np.ndarray | None = None


@dataclasses.dataclass
class ServingState:
    """Everything the loop knows beside the engines: outputs by strategy and the engine's number of them; programs compiled since it
    began, other than in the background."""

    requests: dict[tuple[str, int], ServingRequestState] = dataclasses.field(default_factory=dict)
    draining: bool = False
    recompiles: int = 0
    stats: dict[str, int] = dataclasses.field(default_factory=dict)


def tick(engines: Mapping[str, Engine], state: ServingState, commands: Iterable[protocol.Command]) -> list[protocol.Event]:
    """Obeys the commands, lets each engine work once, and says what came of it.

    Raises:
      Exception: whatever an engine's step raised; that engine cannot be used any more then. What concerns one request alone
        becomes that request's Failure instead.
    """
    events: list[protocol.Event] = []
    for command in commands:
        events += obey(engines, state, command)
    for strategy, engine in engines.items():
        if engine.has_work:
            outputs = engine.step()
            for key, request in list(state.requests.items()):
                if key[0] == strategy and key in state.requests:  # not dropped with an output of the same request
                    events += report(state, request, outputs.get(request.engine_id))
    if (stats := stats_of(engines) | {"recompiles": state.recompiles}) != state.stats:
        state.stats = stats
        events.append(protocol.Status(stats))
    return events


def stats_of(engines: Mapping[str, Engine]) -> dict[str, int]:
    """``Engine.stats``, summed."""
    each = [engine.stats for engine in engines.values()]
    return {name: sum(stats[name] for stats in each) for name in each[0]}


def obey(engines: Mapping[str, Engine], state: ServingState, command: protocol.Command) -> Sequence[protocol.Event]:
    """Carries out one command."""
    match command:
        case protocol.Generate():
            return _generate(engines[command.strategy], state, command)
        case protocol.Abort(id):
            return [protocol.Failure(id=id, code=499, message="the request was aborted")] if drop(state, id) else []
        case protocol.Drain():
            state.draining = True
        case protocol.StartProfile(directory):
            return [_profiled(_start_trace, directory)]
        case protocol.StopProfile():
            return [_profiled(jax.profiler.stop_trace)]
    return []


def _start_trace(directory: str) -> None:
    os.makedirs(directory, exist_ok=True)  # jax would only find out at the end
    jax.profiler.start_trace(directory)


def _profiled(act: Callable[..., None], *args: str) -> protocol.Profiled:
    try:
        act(*args)
    except Exception as error:  # a profile that fails must not take the engine along
        return protocol.Profiled(f"{type(error).__name__}: {error}".splitlines()[0])
    return protocol.Profiled()


def drop(state: ServingState, id: str) -> bool:
    """Ends the outputs of a request that are still going; says whether there were any."""
    going = [request for request in state.requests.values() if request.command.id == id]
    for request in going:
        del state.requests[request.command.strategy, request.engine_id]
        request.engine.discard(request.engine_id)
    return bool(going)


def report(state: ServingState, request: ServingRequestState, output: Output | None) -> Sequence[protocol.Event]:
    """What is new about one output; a Failure of its request where that cannot be told."""
    try:
        if output is None:
            return _advance(request) if request.command.commits or request.command.provisional else []
        del state.requests[request.command.strategy, request.engine_id]
        if output.finish_reason != "error":
            return _finish(request, output)
        message = "the model's prediction for this request was not finite (NaN)"
    except Exception as error:  # whatever it is, it is this request's alone
        logger.exception("request %s failed", request.command.id)
        message = str(error) or type(error).__name__
    drop(state, request.command.id)
    return [protocol.Failure(id=request.command.id, code=500, message=message)]


def _generate(engine: Engine, state: ServingState, command: protocol.Generate) -> Sequence[protocol.Event]:
    def failure(code: int, message: str, field: str | None = None) -> Sequence[protocol.Event]:
        return [protocol.Failure(id=command.id, code=code, message=message, field=field)]

    if state.draining:
        return failure(503, "the server is shutting down")
    # A stream's log probabilities are read off the trace; the engine gives its own only at the end.
    traced = command.provisional or (command.commits and command.params.logprobs)
    try:
        ids = engine.add(command.prompt, command.params, trace=traced)
    except SettingError as error:
        return failure(400, str(error), error.field)
    except Exception as error:
        logger.exception("request %s was not accepted", command.id)
        return failure(500, str(error) or type(error).__name__)
    for index, engine_id in enumerate(ids):
        text = Detokenizer(engine.tokenizer.decode, command.params.stop) if engine.tokenizer is not None and command.commits else None
        confidence = np.zeros(command.params.max_tokens, np.float32) if traced else None
        request = ServingRequestState(command, index, engine, engine_id, text, confidence=confidence)
        state.requests[command.strategy, engine_id] = request
    return [protocol.Accepted(id=command.id)]


def _advance(request: ServingRequestState) -> list[protocol.Event]:
    progress = request.engine.progress(request.engine_id)
    events = _steps(request, progress.trace)
    text, tokens = "", progress.tokens[request.committed :]
    if request.text is not None:
        text = push(request.text, progress.tokens[len(request.text.tokens) :])
        if request.command.params.stop and not request.text.complete:
            tokens = []  # a stop text may yet take them
    if request.command.commits and (text or tokens):
        events.append(_commit(request, tokens, text, progress.nfe))
    return events


def _finish(request: ServingRequestState, output: Output) -> list[protocol.Event]:
    events = _steps(request, output.trace)
    text = output.text
    if request.command.commits:
        tokens, tail = output.token_ids[request.committed :], ""
        if request.text is not None and text is not None:
            text, tail = _tail(request.text, output.token_ids, text)
        if tokens or tail:
            events.append(_commit(request, tokens, tail, output.nfe))
    events.append(protocol.Reply.of(output, id=request.command.id, index=request.index, text=text))
    return events


def _tail(text: Detokenizer, tokens: Sequence[int], whole: str) -> tuple[str, str]:
    """The output's text, and what of it was not given out yet.

    Where the text of all tokens does not begin with what was given out (decoders exist whose text is no function of its parts), what
    was given out stands, and goes on with the text of the rest.
    """
    if whole.startswith(text.given):
        return whole, whole[len(text.given) :]
    tail = push(text, tokens[len(text.tokens) :]) + flush(text)
    return text.given, tail


def _commit(request: ServingRequestState, tokens: Sequence[int], text: str, nfe: int) -> protocol.Commit:
    offset, request.committed = request.committed, request.committed + len(tokens)
    logprobs = None
    if request.command.params.logprobs and request.confidence is not None:
        with np.errstate(divide="ignore"):
            logprobs = tuple(np.log(request.confidence[offset : request.committed].astype(float)).tolist())
    return protocol.Commit(
        id=request.command.id, index=request.index, offset=offset, token_ids=tuple(tokens), text=text, nfe=nfe, logprobs=logprobs
    )


def _steps(request: ServingRequestState, trace: Sequence[TraceStep] | None) -> list[protocol.Event]:
    """Takes in what the trace holds beyond the steps seen; as Provisional events where they are wanted."""
    events: list[protocol.Event] = []
    if trace is None or request.confidence is None:
        return events
    for number, step in enumerate(trace[request.steps :], request.steps + 1):
        command = request.command
        patch = protocol.Provisional.of(
            step, id=command.id, index=request.index, nfe=number, prompt_tokens=len(command.prompt), max_tokens=command.params.max_tokens
        )
        request.confidence[patch.offset : patch.offset + len(patch.confidence)] = patch.confidence
        if command.provisional:
            events.append(patch)
    request.steps = len(trace)
    return events


def run(
    engines: Mapping[str, Engine], receive: Callable[[bool], list[protocol.Command]], emit: Callable[[list[protocol.Event]], None]
) -> None:
    """Runs until a Stop. ``receive(wait)`` gives the commands there are, and waits for one where ``wait``."""
    state = ServingState()

    def count(event: str, duration_secs: float, **_: object) -> None:
        state.recompiles += event == "/jax/core/compile/backend_compile_duration" and not background.is_here()

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        while True:
            commands = receive(not any(engine.has_work for engine in engines.values()))
            if any(isinstance(command, protocol.Stop) for command in commands):
                return
            if events := tick(engines, state, commands):
                emit(events)
    finally:  # JAX knows one list of listeners for the process, which may see many loops
        jax.monitoring.unregister_event_duration_listener(count)
