"""The command line: ``diffulex-jax generate``, ``serve``, ``bench serve``, ``bench decode``, ``bench step`` and ``doctor``.

Settings of a request and of the engine become options by themselves, read from ``SamplingParams`` and ``EngineConfig``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import json
import os
import pathlib
import re
import time
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any

import typer

from diffulex_jax.async_serving.async_engine import AsyncEngine
from diffulex_jax.async_serving.settings import ServerSettings
from diffulex_jax.bench import aot, decode, machine, step
from diffulex_jax.bench.load import Load
from diffulex_jax.bench.load import text as load_text
from diffulex_jax.bench.shapes import SHAPES
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.engine import Engine
from diffulex_jax.engine.results import Output
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.strategies import STRATEGIES


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Diffusion language models in JAX.")
bench = typer.Typer(no_args_is_help=True, help="Measure speed.")
app.add_typer(bench, name="bench")

Command = Callable[..., None]


def _tokens_by_offset(text: str) -> dict[int, int]:
    """``0:262,5:451`` as ``{0: 262, 5: 451}``."""
    try:
        return {int(offset): int(token) for offset, token in (pair.split(":") for pair in text.split(","))}
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not OFFSET:TOKEN_ID,...") from None


# The types that become options, each with the type and the details of its option.
_OPTION_TYPES: dict[Any, tuple[Any, dict[str, Any]]] = {
    str: (str, {}),
    int: (int, {}),
    float: (float, {}),
    bool: (bool, {}),
    int | None: (int | None, {}),
    str | None: (str | None, {}),
    tuple[int, ...]: (list[int], {}),
    tuple[str, ...]: (list[str], {}),
    Mapping[int, int] | None: (dict | None, {"parser": _tokens_by_offset, "metavar": "OFFSET:TOKEN_ID,..."}),
}


def settings_as_options(*sources: Callable[..., Any], leave_out: Collection[str] = (), **defaults: Any) -> Callable[[Command], Command]:
    """Replaces the ``**settings`` of a command by one option for each setting of ``sources``, so that none can be missing.

    Args:
      *sources: functions or dataclasses; their keyword-only parameters of the types above become options. The help of an option
        is the parameter's entry in the docstring.
      leave_out: settings that do not become options.
      **defaults: defaults that differ from those of the source.
    """
    options = []
    for source in sources:
        hints, docs = typing.get_type_hints(source), _entries(inspect.getdoc(source) or "")
        for name, parameter in inspect.signature(source).parameters.items():
            if parameter.kind is not parameter.KEYWORD_ONLY or hints[name] not in _OPTION_TYPES or name in leave_out:
                continue
            kind, details = _OPTION_TYPES[hints[name]]
            default, flag = defaults.get(name, parameter.default), f"--{name.replace('_', '-')}"
            if default is True:
                flag += f"/--no{flag[1:]}"
            option = typer.Option(flag, help=docs[name], rich_help_panel=source.__qualname__, **details)
            options.append(parameter.replace(annotation=Annotated[kind, option], default=default))

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [p for p in own if p.kind is not p.VAR_KEYWORD]
        vars(command)["__signature__"] = inspect.Signature([*kept, *options])
        return command

    return decorate


def _entries(doc: str) -> dict[str, str]:
    """The ``name: text`` entries of a docstring's sections."""
    found = re.findall(r"^  (\w+): (.+(?:\n    .+)*)", doc, re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()) for name, text in found}


_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
_STRATEGIES = ", ".join(STRATEGIES)
_PROMPTS = "Random prompts of this length, which ignore EOS. Default: built-in questions for the embedded model, 64 for others."


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Ends the command with one line on stderr and exit code 2 where an input will not do."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


@app.command()
@settings_as_options(SamplingParams, EngineConfig, leave_out=("max_slots",))
def generate(
    *,
    model: Annotated[str, typer.Option(help="A Hugging Face directory, a hub id, or 'embedded'.")] = "embedded",
    strategy: Annotated[str, typer.Option(help=f"One of {_STRATEGIES}.")] = "llada2",
    prompt: Annotated[str | None, typer.Option(help="The prompt as text.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="The prompt as token ids: 1,2,3.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put --prompt through the model's chat template.")] = False,
    as_json: _AsJson = False,
    **settings: Any,
) -> None:
    """Decode one prompt. With --n above 1 the JSON object is {"outputs": [...]}."""
    with _one_line_errors():
        request = _request(prompt, prompt_ids)
        if chat and not isinstance(request, str):
            raise ValueError("--chat takes a --prompt, not --prompt-ids")
        sampling, engine_settings = _split(settings)
        began = time.perf_counter()
        engine = Engine.from_pretrained(model, strategy=strategy, max_slots=sampling.n, **engine_settings)
        start_seconds = time.perf_counter() - began
        if chat:
            if engine.tokenizer is None:
                raise ValueError("--chat needs a model with a tokenizer")
            request = engine.tokenizer.apply_chat_template([{"role": "user", "content": str(request)}])
        outputs = engine.generate([request], sampling)
    if not as_json:
        typer.echo("\n\n".join(_readable(output, start_seconds) for output in outputs))
    elif sampling.n == 1:
        typer.echo(json.dumps(_plain(outputs[0])))
    else:
        typer.echo(json.dumps({"outputs": [_plain(output) for output in outputs]}))


class Isolation(enum.Enum):
    """Where ``serve`` runs the engine."""

    PROCESS = "process"
    THREAD = "thread"


@app.command()
@settings_as_options(EngineConfig, ServerSettings, AsyncEngine.from_pretrained)
def serve(
    *,
    model: Annotated[str, typer.Option(help="A Hugging Face directory, a hub id, or 'embedded'.")] = "embedded",
    strategy: Annotated[list[str] | None, typer.Option(help=f"May be given several times: {_STRATEGIES}. Default: llada2.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    isolation: Annotated[Isolation, typer.Option(help="A process, watched and restarted, or a thread.")] = Isolation.PROCESS,
    compile_cache: Annotated[pathlib.Path | None, typer.Option(help="Keeps compiled programs; default: in the user's cache.")] = None,
    **settings: Any,
) -> None:
    """Serve a model over HTTP: OpenAI's routes, and some of its own."""
    with _one_line_errors():
        from diffulex_jax.async_serving import http  # late: its packages come with the extra "serve"

        mine = {field.name for field in dataclasses.fields(ServerSettings)}
        chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k in mine}
        watching = {name: settings.pop(name) for name in ("silence_seconds", "tick_seconds")}
        engine_settings = {k: v for k, v in settings.items() if k not in mine}
        http.log_as_json()
        engine = AsyncEngine(
            functools.partial(http.build_engines, model, strategy or ["llada2"], **engine_settings),
            isolation=isolation.value,
            compile_cache=compile_cache or _cache_directory(),
            **watching,
        )
        http.serve(engine, model=model, host=host, port=port, settings=ServerSettings(**chosen))


def _cache_directory() -> pathlib.Path:
    """Where this user's programs keep what they can make again."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "diffulex-jax" / "compiled"


@bench.command("decode")
@settings_as_options(SamplingParams, EngineConfig, leave_out=("pinned", "init_tokens"), max_tokens=256, max_slots=1)
def bench_decode(
    *,
    model: Annotated[str | None, typer.Option(help="A Hugging Face directory, a hub id, or 'embedded'.")] = None,
    shape: Annotated[str | None, typer.Option(help=f"Random weights instead of a model: {', '.join(SHAPES)}.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help=f"May be given several times: {_STRATEGIES}. Default: all.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help=_PROMPTS)] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often every prompt is decoded.")] = 5,
    as_json: _AsJson = False,
    **settings: Any,
) -> None:
    """Tokens per second, milliseconds a step, and the share of a step that is not the model."""
    with _one_line_errors():
        sampling, engine_settings = _split(settings)
        report = decode.run(
            model=model,
            shape=shape,
            strategies=strategy or list(STRATEGIES),
            sampling=sampling,
            prompt_tokens=prompt_tokens,
            repeats=repeats,
            progress=not as_json,
            **engine_settings,
        )
    typer.echo(json.dumps(report) if as_json else decode.table(report))


@bench.command("step")
def bench_step(
    *,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}; the weights are random.")] = "llada2-mini",
    batch: Annotated[str, typer.Option(help="Rows decoded together: 1,8,32.")] = "1,8,32",
    strategy: Annotated[str, typer.Option(help=f"Of {_STRATEGIES}, separated by commas.")] = "llada2,dmax",
    context: Annotated[str, typer.Option(help="Cached positions in front of the block: 128,2048.")] = "128,2048",
    dtype: Annotated[str, typer.Option(help="Of weights, activations and cache: bfloat16 or float32.")] = "bfloat16",
    kernels: Annotated[str, typer.Option(help="auto (the device's own kernels) or reference (plain XLA).")] = "auto",
    repeats: Annotated[int, typer.Option(help="How many blocks of each combination are timed.")] = 10,
    as_json: _AsJson = False,
) -> None:
    """Milliseconds a denoise step and each of its kernels, against the memory traffic they cannot do without."""
    with _one_line_errors():
        report = step.run(
            shape=shape,
            batches=_numbers("--batch", batch),
            strategies=strategy.split(","),
            contexts=_numbers("--context", context),
            dtype=dtype,
            kernels=kernels,
            repeats=repeats,
            progress=(lambda line: None) if as_json else typer.echo,
        )
    if as_json:
        typer.echo(json.dumps(report))


@bench.command("serve")
@settings_as_options(SamplingParams, Load, leave_out=("logprobs", "return_step_map", "pinned", "init_tokens"))
def bench_serve(
    *,
    url: Annotated[str, typer.Option(help="The server, without a path.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str, typer.Option(help="Sent with every request.")] = "",
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times. Default: built-in questions.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Random token ids of this length instead.")] = None,
    plot: Annotated[pathlib.Path | None, typer.Option(help="Draw the load into this PNG file.")] = None,
    as_json: _AsJson = False,
    **settings: Any,
) -> None:
    """Put load on a running server: latencies, throughput, goodput, forwards."""
    with _one_line_errors():
        from diffulex_jax.bench import serve, serve_plots  # late: their packages come with the extra "serve"

        if prompt and prompt_tokens:
            raise ValueError("give --prompt or --prompt-tokens, not both")
        mine = {field.name for field in dataclasses.fields(Load)}
        load = Load(**{name: value for name, value in settings.items() if name in mine})
        sampling, _ = _split({name: value for name, value in settings.items() if name not in mine})
        figures, seen = serve.run(
            url=url,
            prompts=prompt_tokens or prompt or decode.QUESTIONS,
            settings=_asked_for(sampling),
            load=load,
            api_key=api_key,
        )
        if plot is not None:
            serve_plots.draw(seen, load, plot)
    typer.echo(json.dumps(figures) if as_json else load_text(figures))


def _asked_for(sampling: SamplingParams) -> dict[str, Any]:
    """Settings that differ from their defaults, as JSON has them."""
    plain, usual = dataclasses.asdict(sampling), SamplingParams()
    return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items() if v != getattr(usual, name)}


@app.command("aot")
@settings_as_options(aot.compile_denoise)
def aot_(
    *,
    topology: Annotated[str, typer.Option(help="A slice of TPUs: v5e:2x2, v5e:16x16, v6e:2x2, v5p:2x2x1, v4:2x2x1, tpu7x:2x2x1, ….")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llada2-mini",
    as_json: _AsJson = False,
    **settings: Any,
) -> None:
    """Compile the denoise loop for TPUs that need not be there: does it fit, and what is exchanged? Needs diffulex-jax[tpu]."""
    with _one_line_errors():
        if shape not in SHAPES:
            raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
        compiled = aot.compile_denoise(topology, SHAPES[shape], **settings)
    typer.echo(json.dumps(dataclasses.asdict(compiled) | {"fits": compiled.fits}) if as_json else aot.text(compiled))


@app.command()
def doctor(*, as_json: _AsJson = False) -> None:
    """Show what JAX sees on this machine and which kernels would be used."""
    facts = machine.describe()
    typer.echo(json.dumps(facts) if as_json else machine.text(facts))


def _split(settings: dict[str, Any]) -> tuple[SamplingParams, dict[str, Any]]:
    """The settings of a request, and those of the engine."""
    mine = {field.name for field in dataclasses.fields(SamplingParams)}
    return SamplingParams(**{k: v for k, v in settings.items() if k in mine}), {k: v for k, v in settings.items() if k not in mine}


def _request(prompt: str | None, prompt_ids: str | None) -> str | list[int]:
    """The prompt as the engine takes it."""
    if prompt is not None and prompt_ids is None:
        return prompt
    if prompt is not None or prompt_ids is None:
        raise ValueError("give exactly one of --prompt and --prompt-ids")
    try:
        return [int(part) for part in prompt_ids.split(",")]
    except ValueError:
        raise ValueError(f"--prompt-ids must be integers separated by commas, got {prompt_ids!r}") from None


def _numbers(option: str, text: str) -> list[int]:
    """``1,8,32`` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be integers separated by commas, got {text!r}") from None


def _plain(output: Output) -> dict[str, Any]:
    fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output) if field.name != "trace"}
    return fields | {"tokens_per_forward": output.tokens_per_forward}


def _readable(output: Output, start_seconds: float) -> str:
    answer = output.text if output.text is not None else ",".join(map(str, output.token_ids))
    figures = {
        "tokens": f"{len(output.token_ids)} ({output.finish_reason})",
        "forwards": output.nfe,
        "tokens per forward": f"{output.tokens_per_forward:.2f}",
        "edits": output.revised_tokens,
        "masked again": output.remasked_tokens,
        "seconds": f"{output.seconds:.2f}, after {start_seconds:.1f} to load and compile",
    }
    return "\n".join([answer, "", *(f"{name:>18}  {value}" for name, value in figures.items())])
