"""``diffulex-jax serve``, ``convert``, ``plan``, ``quantize`` and ``doctor``; ``generate``, ``trace``, ``bench`` and ``eval`` stand beside.

Settings of a request and of the engine become options by themselves, read from ``SamplingParams`` and ``EngineConfig``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import json
import os
import pathlib
import threading
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from diffulex_jax.async_serving.settings import ServerSettings
from diffulex_jax.cli import interrupt, surroundings
from diffulex_jax.cli.bench import bench
from diffulex_jax.cli.evaluate import evaluate
from diffulex_jax.cli.generate import generate, trace
from diffulex_jax.cli.options import SHAPE_NAMES, STRATEGIES, USUAL, AsJson, Mesh, Model, PlainCommand, one_line_errors, settings_as_options
from diffulex_jax.cli.train import train
from diffulex_jax.engine.config import EngineConfig


if TYPE_CHECKING:
    from diffulex_jax.parallel.hosts import Hosts


class CommandLine(typer.Typer):
    """The commands; called as the process's own command line, Ctrl-C ends it at any moment, and libraries are quiet."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        interrupt.watch()
        surroundings.prepare()
        return super().__call__(*args, **kwargs)


app = CommandLine(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Diffusion language models in JAX.",
)
app.add_typer(bench, name="bench")
app.command("generate", cls=PlainCommand)(generate)
app.command("trace", cls=PlainCommand)(trace)
app.command("train", cls=PlainCommand)(train)
app.command("eval", cls=PlainCommand)(evaluate)


def _show_version(wanted: bool) -> None:
    if wanted:
        from diffulex_jax.version import __version__

        typer.echo(f"diffulex-jax {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    *,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Diffusion language models in JAX."""


_PLAN_MESH = "How the devices are used: data=4,expert=2,tensor=2. Default: the smallest expert x tensor that fits, the rest to data."


class Isolation(enum.Enum):
    """Where ``serve`` runs the engine."""

    PROCESS = "process"
    THREAD = "thread"


_PROCESS = "The engine's process"
_HOSTS = "Several hosts"
_DISTRIBUTED = (
    "One of several hosts, which all run this command. What is not said below is found in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, "
    "JAX_PROCESS_ID, or by JAX itself."
)
_Distributed = Annotated[bool, typer.Option("--distributed", help=_DISTRIBUTED, rich_help_panel=_HOSTS)]
_Coordinator = Annotated[str | None, typer.Option(help="HOST:PORT of the first.", rich_help_panel=_HOSTS)]
_Hosts = Annotated[int | None, typer.Option(min=1, help="How many there are.", rich_help_panel=_HOSTS)]
_HostIndex = Annotated[int | None, typer.Option(min=0, help="Which this is, from 0 on.", rich_help_panel=_HOSTS)]
_MeetSeconds = Annotated[float | None, typer.Option(help="How long the first may wait for the last. Default: 300.", rich_help_panel=_HOSTS)]
_CACHE = "Keeps compiled programs. Default: $DIFFULEX_JAX_CACHE, or the user's cache."


@app.command(cls=PlainCommand)
@settings_as_options(EngineConfig, ServerSettings, leave_out=("warm_up",))
def serve(
    *,
    model: Model = "embedded",
    strategy: Annotated[list[str] | None, typer.Option(help=f"May be given several times: {STRATEGIES}. {USUAL}")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    isolation: Annotated[
        Isolation, typer.Option(help="A process, watched and restarted, or a thread.", rich_help_panel=_PROCESS)
    ] = Isolation.PROCESS,
    silence_seconds: Annotated[
        float, typer.Option(help="A process that gives no sign of life for so long is taken for dead.", rich_help_panel=_PROCESS)
    ] = 3.0,
    tick_seconds: Annotated[float, typer.Option(help="Longest time one step may take in a process.", rich_help_panel=_PROCESS)] = 120.0,
    compile_cache: Annotated[pathlib.Path | None, typer.Option(help=_CACHE)] = None,
    mesh: Mesh = None,
    distributed: _Distributed = False,
    coordinator: _Coordinator = None,
    hosts: _Hosts = None,
    host_index: _HostIndex = None,
    meet_seconds: _MeetSeconds = None,
    **settings: Any,
) -> None:
    """Serve a model over HTTP: OpenAI's routes, and some of its own."""
    with one_line_errors():
        job = _job(distributed, coordinator=coordinator, count=hosts, index=host_index, meet_seconds=meet_seconds)
        if job is not None and isolation is Isolation.THREAD:
            raise ValueError("--isolation thread is not for several hosts: one that is lost ends the engine's process")
        from diffulex_jax.async_serving import http  # late: its packages come with the extra "serve"
        from diffulex_jax.async_serving.async_engine import AsyncEngine
        from diffulex_jax.async_serving.worker import ENGINE_THREAD
        from diffulex_jax.engine import background

        mine = {field.name for field in dataclasses.fields(ServerSettings)}
        chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k in mine}
        engine_settings = {k: v for k, v in settings.items() if k not in mine}
        if (name := chosen["served_model_name"] or model) in (engine_settings["adapters"] or {}):
            raise ValueError(f"--adapters: {name!r} is what clients call the model itself; choose another name")
        http.log_as_json()
        engine = AsyncEngine(
            functools.partial(
                http.build_engines,
                model,
                strategy or [None],
                hosts=job,
                mesh=mesh,
                **engine_settings,
            ),
            restart=job is None,
            isolation=isolation.value,
            compile_cache=compile_cache,
            silence_seconds=silence_seconds,
            tick_seconds=tick_seconds,
        )
        interrupt.leave_to_loop()
        try:
            code = http.serve(engine, model=model, host=host, port=port, settings=ServerSettings(**chosen))
        except RuntimeError as error:
            if job is None:
                raise
            typer.echo(f"error: {error}", err=True)  # another host is lost, or was never there
            raise typer.Exit(1) from error
        if any(thread.name in (ENGINE_THREAD, background.THREAD) for thread in threading.enumerate()):
            interrupt.leave(code)  # it is in the compiler, perhaps for minutes
        raise typer.Exit(code)


@app.command("convert", cls=PlainCommand)
def convert_(
    *,
    model: Model,
    out: Annotated[pathlib.Path, typer.Option(help="The directory to make. Of several hosts, all see it.")],
    dtype: Annotated[str, typer.Option(help="Of parameters: bfloat16 or float32.")] = "bfloat16",
    weights: Annotated[str | None, typer.Option(help="Of experts, or else of all layers: int8, int4 or fp8. Default: as --dtype.")] = None,
    mesh: Mesh = None,
    distributed: _Distributed = False,
    coordinator: _Coordinator = None,
    hosts: _Hosts = None,
    host_index: _HostIndex = None,
    meet_seconds: _MeetSeconds = None,
) -> None:
    """Make a model directory for fast restarts: parameters as devices hold them, which every host reads its part of, on any mesh.

    It takes the place of --model, with the same --dtype and --weights. It needs diffulex-jax[orbax].
    """
    with one_line_errors():
        job = _job(distributed, coordinator=coordinator, count=hosts, index=host_index, meet_seconds=meet_seconds)
        settings = EngineConfig(dtype=dtype, weights=weights)
        from diffulex_jax.weights.convert import convert

        with contextlib.nullcontext() if job is None else job.joined():
            convert(model, out, mesh=mesh, dtype=settings.jax_dtype, weights=settings.weights, progress=True)


@app.command("plan", cls=PlainCommand)
def plan_(
    *,
    model: Annotated[str, typer.Option(help=f"A Hugging Face directory, a hub id, 'embedded', or a shape: {', '.join(SHAPE_NAMES)}.")],
    topology: Annotated[
        str,
        typer.Option(
            help="A slice of v4, v5e, v5p, v6e or tpu7x by its chips, v5e:4x4; or h100:2, h200:8, a100:4, l4:1, t4:1 of one host."
        ),
    ],
    slots: Annotated[int, typer.Option(help="Requests decoded together, on all devices.")] = 64,
    max_len: Annotated[int, typer.Option(help="Most tokens of a prompt and its output.")] = 4096,
    mesh: Annotated[str | None, typer.Option(help=_PLAN_MESH)] = None,
    dtype: Annotated[str, typer.Option(help="Of parameters, activations and the KV pool: bfloat16 or float32.")] = "bfloat16",
    weights: Annotated[str | None, typer.Option(help="Of experts, or else of all layers: int8, int4 or fp8. Default: as --dtype.")] = None,
    kv: Annotated[str | None, typer.Option(help="Of the KV pool: bfloat16, fp8 or int8. Default: as --dtype.")] = None,
    strategy: Annotated[str | None, typer.Option(help=f"One of {STRATEGIES}. {USUAL}")] = None,
    as_json: AsJson = False,
) -> None:
    """Plan a model on devices that need not be there.

    Compiles the engine's denoise program for them, on this machine's CPU, and prints what a device has to hold, what a step exchanges, and
    how long it might take. Compiling needs diffulex-jax[tpu] or diffulex-jax[cuda]; without, sizes are computed and the rest is estimated.
    Exit code 1: it does not fit.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for devices: none is used
    with one_line_errors():
        from diffulex_jax.planning import plan

        sizes: dict[str, Any] = {"slots": slots, "max_len": max_len, "mesh": mesh}
        made = plan.plan(model, topology, dtype=dtype, weights=weights, kv=kv, strategy=strategy, **sizes)
    typer.echo(json.dumps(dataclasses.asdict(made) | {"head_room": made.head_room}) if as_json else plan.text(made))
    if made.missing:
        typer.echo(f"error: {model} does not fit on {topology}: {made.missing} bytes are missing on each device", err=True)
        raise typer.Exit(1)


@app.command(cls=PlainCommand)
def quantize(
    *,
    model: Model,
    weights: Annotated[str, typer.Option(help="Of experts, or else of all layers: int8, int4 or fp8.")],
    out: Annotated[pathlib.Path, typer.Option(help="The directory to write; it must not be there, or be empty.")],
) -> None:
    """Write a model with quantised weights, which loads as it is.

    The files are compressed-tensors, which other engines read too. Everything else becomes bfloat16.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # one matrix after the other: no accelerator is worth its start
    with one_line_errors():
        EngineConfig(weights=weights)  # which says what there is
        from diffulex_jax.weights import checkpoint, compressed

        what = compressed.write(checkpoint.resolve(model), out, cast(Any, weights), progress=True)
    size = sum(file.stat().st_size for file in out.iterdir())
    typer.echo(f"{out}: {size / 2**30:.2f} GiB, {what} in {weights}")


@app.command(cls=PlainCommand)
@settings_as_options(EngineConfig, leave_out=("adapter", "adapters"))
def doctor(
    *,
    model: Annotated[str | None, typer.Option(help="Say which kernels it will run with: a directory, a hub id, or 'embedded'.")] = None,
    strategy: Annotated[str | None, typer.Option(help=f"One of {STRATEGIES}. {USUAL}")] = None,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Show what JAX sees here, and which kernels it takes; for a model, which of them it runs with, and what falls back to plain XLA."""
    with one_line_errors():
        configured = EngineConfig(**settings)
        if model is None and (strategy is not None or configured != EngineConfig()):
            raise ValueError("--strategy and the engine's settings say nothing without --model")
        from diffulex_jax.bench import fallbacks, machine

        facts = machine.describe()
        if model is not None:
            facts["model"] = fallbacks.describe(model, strategy, configured, machine.kernels())
    lines = [machine.text(facts), *([] if model is None else ["", fallbacks.text(facts["model"])])]
    typer.echo(json.dumps(facts) if as_json else "\n".join(lines))


def _job(distributed: bool, **told: Any) -> Hosts | None:
    """How this process meets the others, by what is ``told`` of ``Hosts``; None where it is the only one."""
    said = {name: value for name, value in told.items() if value is not None}
    if not distributed and not {"coordinator", "count", "index"} <= said.keys():
        if said:
            raise ValueError("--coordinator, --hosts and --host-index go together, or with --distributed")
        return None
    from diffulex_jax.parallel.hosts import Hosts  # late: it imports JAX

    return Hosts(**said)
