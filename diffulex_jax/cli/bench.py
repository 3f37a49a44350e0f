"""``diffulex-jax bench decode``, ``bench step``, ``bench e2e``, ``bench quality`` and ``bench serve``."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Annotated, Any, cast

import typer

from diffulex_jax.bench.load import Load
from diffulex_jax.bench.load import text as load_text
from diffulex_jax.cli.options import SHAPE_NAMES, STRATEGY_NAMES, PlainCommand, numbers, one_line_errors, settings_as_options, split
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.sampling_params import SamplingParams


bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed, and what quantising costs.")

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
_STRATEGIES = ", ".join(STRATEGY_NAMES)
_USUAL = "Default: the one that the model's authors decode it with."
_SHAPES = ", ".join(SHAPE_NAMES)
_PROMPTS = "Random prompts of this length, which ignore EOS. Default: built-in questions for the embedded model, 64 for others."


@bench.command("decode", cls=PlainCommand)
@settings_as_options(
    SamplingParams,
    EngineConfig,
    leave_out=("pinned", "init_tokens", "warm_up", "adapter", "adapters", "adapter_name"),
    max_tokens=256,
    max_slots=1,
)
def bench_decode(
    *,
    model: Annotated[str | None, typer.Option(help="A Hugging Face directory, a hub id, or 'embedded'.")] = None,
    shape: Annotated[str | None, typer.Option(help=f"Random weights instead of a model: {_SHAPES}.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help=f"May be given several times: {_STRATEGIES}. {_USUAL}")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help=_PROMPTS)] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often every prompt is decoded.")] = 5,
    against: Annotated[str | None, typer.Option(help="torch: a step against a bare forward of LLaDA2's network in it, on a CPU.")] = None,
    as_json: _AsJson = False,
    **settings: Any,
) -> None:
    """Tokens per second, milliseconds a step, and the share of a step that is not the model."""
    with one_line_errors():
        sampling, engine_settings = split(settings)
        from diffulex_jax import compile_cache
        from diffulex_jax.bench import decode

        compile_cache.enable()
        report = decode.run(
            model=model,
            shape=shape,
            strategies=strategy or [None],
            sampling=sampling,
            prompt_tokens=prompt_tokens,
            repeats=repeats,
            against=against,
            progress=not as_json,
            **engine_settings,
        )
    typer.echo(json.dumps(report) if as_json else decode.table(report))


@bench.command("step", cls=PlainCommand)
def bench_step(
    *,
    shape: Annotated[str, typer.Option(help=f"One of {_SHAPES}; the weights are random.")] = "llada2-mini",
    batch: Annotated[str, typer.Option(help="Rows decoded together: 1,8,32.")] = "1,8,32",
    strategy: Annotated[str | None, typer.Option(help=f"Of {_STRATEGIES}, separated by commas. {_USUAL}")] = None,
    context: Annotated[str, typer.Option(help="Cached positions in front of the block: 128,2048.")] = "128,2048",
    dtype: Annotated[str, typer.Option(help="Of weights, activations and cache: bfloat16 or float32.")] = "bfloat16",
    weights: Annotated[str | None, typer.Option(help="Of experts, or else of all layers: int8, int4 or fp8. Default: as --dtype.")] = None,
    cache: Annotated[str | None, typer.Option(help="Of a model that sees its whole canvas: none, prefix or dual. Default: none.")] = None,
    sub_block_cache: Annotated[int | None, typer.Option(help="Of Fast-dLLM v2: forwards over one sub-block of so many tokens.")] = None,
    kernels: Annotated[str, typer.Option(help="auto (the device's own kernels) or reference (plain XLA).")] = "auto",
    mesh: Annotated[str | None, typer.Option(help="How devices share the work: data=2,expert=2. Default: one device.")] = None,
    repeats: Annotated[int, typer.Option(help="How many blocks of each combination are timed.")] = 10,
    as_json: _AsJson = False,
) -> None:
    """Milliseconds a denoise step and each of its kernels, against the memory traffic they cannot do without."""
    with one_line_errors():
        batches, contexts = numbers("--batch", batch), numbers("--context", context)
        from diffulex_jax import compile_cache
        from diffulex_jax.bench import step

        compile_cache.enable()
        report = step.run(
            shape=shape,
            batches=batches,
            strategies=[None] if strategy is None else strategy.split(","),
            contexts=contexts,
            dtype=dtype,
            weights=cast(Any, weights),  # checked with the other settings
            cache=cache,
            sub_block_cache=sub_block_cache,
            kernels=kernels,
            mesh=mesh,
            repeats=repeats,
            progress=(lambda line: None) if as_json else typer.echo,
        )
    if as_json:
        typer.echo(json.dumps(report))


@bench.command("e2e", cls=PlainCommand)
def bench_e2e(
    *,
    shape: Annotated[str | None, typer.Option(help=f"One of {_SHAPES}; the weights are random. Default: llada2-mini.")] = None,
    model: Annotated[str | None, typer.Option(help="A model's directory instead; with --url the model's name there.")] = None,
    url: Annotated[str | None, typer.Option(help="A server that speaks OpenAI's completions, without a path, instead.")] = None,
    slots: Annotated[int, typer.Option(help="Requests decoded together.")] = 32,
    requests: Annotated[int, typer.Option(help="How many are given, at once if there is no --rate.")] = 64,
    rate: Annotated[
        float | None, typer.Option(help="So many requests are given a second, at random moments, instead of all at once.")
    ] = None,
    flood: Annotated[
        int | None, typer.Option(help="Again beside prompts of so many tokens, which never end, in the slots that the requests leave.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt, or the least and the most of them: 400-600.")] = "400-600",
    shared_prefix: Annotated[int, typer.Option(help="So many more tokens begin all of them.")] = 0,
    output: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    tokens_per_forward: Annotated[
        str, typer.Option(help="Masks that a step fills, one measurement each: 1,4,8. '': as the model likes best; for others' servers.")
    ] = "1,4,8",
    first_token: Annotated[str, typer.Option(help="Tokens of the prompts whose first token is timed.")] = "31,100,500,2000,4000",
    strategy: Annotated[str | None, typer.Option(help=f"One that reads num_to_transfer, of {_STRATEGIES}. {_USUAL}")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of weights, activations and cache: bfloat16 (default) or float32.")] = None,
    max_batched_tokens: Annotated[int | None, typer.Option(help="Of prompts between two steps; default: by the device.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Of a server: prompts are of ids below this one. Default: 10000.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Sent to a server with every request.")] = None,
    repeats: Annotated[int, typer.Option(help="How often the time to a first token is measured.")] = 5,
    as_json: _AsJson = False,
) -> None:
    """Time to the first token, prompt tokens a second, milliseconds a step all in, between blocks: of an engine, or of any server."""
    with one_line_errors():
        least, _, most = prompt.partition("-")
        lengths = numbers("--prompt", f"{least},{most or least}")
        rates = numbers("--tokens-per-forward", tokens_per_forward) if tokens_per_forward else [None]
        timed = numbers("--first-token", first_token)
        from diffulex_jax.bench import e2e

        report = e2e.run(
            shape=shape,
            model=model,
            url=url,
            slots=slots,
            requests=requests,
            rate=rate,
            flood=flood,
            prompt=(lengths[0], lengths[1]),
            shared_prefix=shared_prefix,
            output=output,
            tokens_per_forward=rates,
            first_token_prompts=timed,
            strategy=strategy,
            dtype=dtype,
            vocabulary=vocabulary,
            api_key=api_key,
            repeats=repeats,
            progress=(lambda line: None) if as_json else typer.echo,
            max_batched_tokens=max_batched_tokens,
        )
    if as_json:
        typer.echo(json.dumps(report))


@bench.command("quality", cls=PlainCommand)
def bench_quality(
    *,
    model: Annotated[str, typer.Option(help="A directory of a model of the arithmetic problems, or 'embedded'.")] = "embedded",
    problems: Annotated[int, typer.Option(help="Held-out problems.")] = 1000,
    strategy: Annotated[str, typer.Option(help="llada2, llada2_edit or dmax.")] = "llada2",
    dtype: Annotated[str, typer.Option(help="Of everything that is not quantised: bfloat16 or float32.")] = "float32",
    weights: Annotated[str, typer.Option(help="Of experts, or else of all layers, separated by commas; '' for none.")] = "int8,int4,fp8",
    kv: Annotated[str, typer.Option(help="Of keys and values, separated by commas; '' for none.")] = "int8,fp8",
    as_json: _AsJson = False,
) -> None:
    """How near a model stays to itself with quantised weights, or keys and values: right answers, same answers, tokens a forward."""
    with one_line_errors():
        from diffulex_jax.bench import quality

        report = quality.run(
            model=model,
            problems=problems,
            strategy=strategy,
            dtype=dtype,
            weights=[form for form in weights.split(",") if form],
            kv=[form for form in kv.split(",") if form],
            progress=(lambda line: None) if as_json else typer.echo,
        )
    if as_json:
        typer.echo(json.dumps(report))


@bench.command("serve", cls=PlainCommand)
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
    with one_line_errors():
        if prompt and prompt_tokens:
            raise ValueError("give --prompt or --prompt-tokens, not both")
        mine = {field.name for field in dataclasses.fields(Load)}
        load = Load(**{name: value for name, value in settings.items() if name in mine})
        sampling, _ = split({name: value for name, value in settings.items() if name not in mine})
        from diffulex_jax.bench import serve, serve_plots  # late: their packages come with the extra "serve"
        from diffulex_jax.bench.decode import QUESTIONS

        figures, seen = serve.run(
            url=url,
            prompts=prompt_tokens or prompt or QUESTIONS,
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
