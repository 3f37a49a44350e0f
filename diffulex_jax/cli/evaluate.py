"""``diffulex-jax eval``."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Annotated, Any

import typer

from diffulex_jax.cli import progress
from diffulex_jax.cli.options import STRATEGIES, SUITE_NAMES, USUAL, AsJson, Mesh, Model, one_line_errors, settings_as_options, split
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.sampling_params import SamplingParams


_SUITE = (
    f"A generated suite, of {', '.join(SUITE_NAMES)}, or a file of JSON lines, or of a JSON list, in the format of GSM8K, MATH-500, "
    "HumanEval or MBPP. Several are asked in order."
)
_RUN_CODE = "Run what the model writes, as you, on this machine, 10 seconds and 1 GiB each: HumanEval and MBPP are graded so."


@settings_as_options(
    SamplingParams,
    EngineConfig,
    leave_out=("n", "logprobs", "return_step_map", "pinned", "init_tokens", "warm_up"),
    max_tokens=256,
)
def evaluate(
    suites: Annotated[list[str], typer.Argument(metavar="SUITE", help=_SUITE)],
    *,
    model: Model = "embedded",
    strategy: Annotated[str | None, typer.Option(help=f"One of {STRATEGIES}. {USUAL}")] = None,
    mesh: Mesh = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt through the model's chat template.")] = False,
    items: Annotated[
        int | None, typer.Option(min=1, help="So many of a suite: the first of a file. Default: 200, and all of a file.")
    ] = None,
    suite_seed: Annotated[int, typer.Option(min=0, help="Of generated items.")] = 1,
    run_code: Annotated[bool, typer.Option("--run-code", help=_RUN_CODE)] = False,
    answers: Annotated[pathlib.Path | None, typer.Option(help="Write each prompt, answer and mark to this file, as JSON lines.")] = None,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """How many answers are right, with a 95 % interval, and what they took: tokens per forward, tokens a second."""
    with one_line_errors():
        sampling, engine_settings = split(settings)
        from diffulex_jax.evaluation import files, run  # late, as all that takes NumPy or JAX
        from diffulex_jax.evaluation.suites import GENERATED, Suite, generated

        asked = []
        for name in suites:
            if name in GENERATED:
                suite = generated(name, items or 200, seed=suite_seed)
            elif pathlib.Path(name).is_file():
                suite = files.read(name)
                suite = Suite(suite.name, suite.items[:items])
            else:
                raise ValueError(f"suite {name!r} is no file, and none of {', '.join(GENERATED)}")
            run.check(suite, run_code=run_code)
            asked.append(suite)
        with progress.shown():
            from diffulex_jax.engine.engine import Engine

            engine = Engine.from_pretrained(model, strategy=strategy, mesh=mesh, warm_up=False, **engine_settings)
        results = []
        for suite in asked:
            result, marked = run.evaluate(engine, suite, sampling, chat=chat, run_code=run_code, progress=not as_json)
            results.append(result)
            if answers is not None:
                lines = [
                    json.dumps({"suite": suite.name, "prompt": item.prompt, "answer": answer, "right": right})
                    for item, (answer, right) in zip(suite.items, marked, strict=True)
                ]
                with answers.open("a", encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n")
    if not as_json:
        typer.echo(run.table(results))
        return
    facts = {"model": model, "strategy": engine.strategy, "chat": chat, "sampling": _plain(sampling), "counting": run.COUNTING}
    typer.echo(json.dumps(facts | {"suites": [result.plain() for result in results]}))


def _plain(sampling: SamplingParams) -> dict[str, Any]:
    """What was asked for, as JSON has it."""
    usual = SamplingParams()
    return {name: value for name, value in dataclasses.asdict(sampling).items() if value != getattr(usual, name)}
