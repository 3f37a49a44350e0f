"""``diffulex-jax generate`` and ``trace``: prompts are decoded, and printed, drawn, or written as a file that plays them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffulex_jax.cli import preflight, progress, prompts
from diffulex_jax.cli.options import STRATEGIES, USUAL, AsJson, Mesh, Model, one_line_errors, settings_as_options, split
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.sampling_params import SamplingParams


if TYPE_CHECKING:
    from diffulex_jax.engine.results import Output


_PROMPT = "The prompt as text; several are answered in order. '-', or none at all: standard input."
_Arguments = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help=_PROMPT)]
_Texts = Annotated[list[str] | None, typer.Option(help="The prompt as text. May be given several times.")]
_Files = Annotated[list[pathlib.Path] | None, typer.Option(help="A UTF-8 file that holds one prompt. May be given several times.")]
_Ids = Annotated[list[str] | None, typer.Option(help="The prompt as token ids: 1,2,3. May be given several times.")]
_Chat = Annotated[bool, typer.Option("--chat", help="Put each prompt through the model's chat template.")]


@settings_as_options(SamplingParams, EngineConfig, leave_out=("max_slots", "warm_up"))
def generate(
    arguments: _Arguments = None,
    *,
    model: Model = "embedded",
    strategy: Annotated[str | None, typer.Option(help=f"One of {STRATEGIES}. {USUAL}")] = None,
    prompt: _Texts = None,
    prompt_file: _Files = None,
    prompt_ids: _Ids = None,
    chat: _Chat = False,
    mesh: Mesh = None,
    watch: Annotated[bool, typer.Option("--watch", help="Draw the canvas on the terminal after each forward.")] = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Decode prompts. With several, or with --n above 1, the JSON object is {"outputs": [...]}."""
    with one_line_errors():
        asked = _collect(arguments, prompt, prompt_file, prompt_ids, chat=chat)
        if watch and as_json:
            raise ValueError("--watch draws on standard output, and --json prints one object and nothing else; give one of them")
        sampling, engine_settings = split(settings)
        if watch:
            from diffulex_jax.cli import watch as screen  # late: rich

            console = screen.terminal()
        slots = _slots(sampling, asked)
        began = time.perf_counter()
        with progress.shown():
            from diffulex_jax.engine.engine import Engine  # late, as all that takes JAX

            configured = EngineConfig(max_slots=slots, **engine_settings)
            asked = preflight.prepare(model, strategy, asked, chat=chat, sampling=sampling, settings=configured)
            engine = Engine.from_pretrained(model, strategy=strategy, max_slots=slots, mesh=mesh, warm_up=False, **engine_settings)
            engine.warm_up(asked, sampling)
        start_seconds = time.perf_counter() - began
        outputs = screen.watched(engine, asked, sampling, console=console) if watch else engine.generate(asked, sampling)
    if not as_json:
        typer.echo("\n\n".join(_readable(output, start_seconds) for output in outputs))
    elif len(outputs) == 1:
        typer.echo(json.dumps(_plain(outputs[0])))
    else:
        typer.echo(json.dumps({"outputs": [_plain(output) for output in outputs]}))


@settings_as_options(SamplingParams, EngineConfig, leave_out=("max_slots", "warm_up"))
def trace(
    arguments: _Arguments = None,
    *,
    html: Annotated[pathlib.Path, typer.Option(help="The file to write; it plays in any browser, and asks no host for anything.")],
    model: Model = "embedded",
    strategy: Annotated[list[str] | None, typer.Option(help=f"Side by side where given several times: {STRATEGIES}. {USUAL}")] = None,
    prompt: _Texts = None,
    prompt_file: _Files = None,
    prompt_ids: _Ids = None,
    chat: _Chat = False,
    mesh: Mesh = None,
    **settings: Any,
) -> None:
    """Decode prompts, and write a file that plays how their tokens came about, on the canvases of the server's page."""
    with one_line_errors():
        asked = _collect(arguments, prompt, prompt_file, prompt_ids, chat=chat)
        sampling, engine_settings = split(settings)
        if not html.parent.is_dir():
            raise ValueError(f"--html {html}: there is no directory {html.parent}")
        slots = _slots(sampling, asked)
        strategies: list[str | None] = [*strategy] if strategy else [None]
        with progress.shown():
            from diffulex_jax.engine.engine import Engine  # late, as all that takes JAX
            from diffulex_jax.viz.replaying import replay

            configured = EngineConfig(max_slots=slots, **engine_settings)
            ready = [preflight.prepare(model, name, asked, chat=chat, sampling=sampling, settings=configured) for name in strategies][0]
            engines = Engine.for_strategies(model, strategies, max_slots=slots, mesh=mesh, warm_up=False, **engine_settings)
            for engine in engines.values():
                engine.warm_up(ready, sampling)
        lanes: dict[str, Output] = {}
        for name, engine in engines.items():
            outputs = engine.generate(ready, sampling, trace=True)
            lanes |= {name if len(outputs) == 1 else f"{name}, {i}": output for i, output in enumerate(outputs, 1)}
        html.write_text(replay(lanes, tokenizer=engine.tokenizer), encoding="utf-8")
    for name, output in lanes.items():
        typer.echo(f"{name}: {len(output.token_ids)} tokens in {output.nfe} forwards, {output.tokens_per_forward:.2f} a forward")
    typer.echo(f"{html}: {html.stat().st_size} bytes")


def _collect(
    arguments: list[str] | None, texts: list[str] | None, files: list[pathlib.Path] | None, ids: list[str] | None, *, chat: bool
) -> list[str | list[int]]:
    """The prompts, from wherever they come."""
    asked = prompts.collect(arguments or [], texts=texts or [], files=files or [], ids=ids or [])
    if chat and ids:
        raise ValueError("--chat takes prompts as text, not --prompt-ids")
    return asked


def _slots(sampling: SamplingParams, asked: list[str | list[int]]) -> int:
    """As many as there are outputs, or as an engine has by itself."""
    return min(sampling.n * len(asked), max(sampling.n, EngineConfig().max_slots))


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
        "seed": output.seed,
        "seconds": f"{output.seconds:.2f}, after {start_seconds:.1f} to load and compile",
    }
    return "\n".join([answer, "", *(f"{name:>18}  {value}" for name, value in figures.items())])
