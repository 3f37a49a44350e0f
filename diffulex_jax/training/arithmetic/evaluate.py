"""Accuracy and speed of a trained model on held-out problems, decoded by the engine with every strategy.

    python -m diffulex_jax.training.evaluate --model embedded

prints a table for bare questions and one for chat turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
from tqdm import tqdm

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.evaluation.run import decode
from diffulex_jax.training.arithmetic import data, tasks, tokenizer


PROBLEMS, SEED = 1000, 1  # how many held-out problems, and which
SLOTS = 16  # decoded together

PROMPTS: dict[str, Callable[[str], str]] = {"raw": str, "chat": tokenizer.chat}
"""What is made of a question."""

SETTINGS: dict[str, dict[str, SamplingParams]] = {
    "llada2": {"0.95": SamplingParams(accept_threshold=0.95)},
    "llada2_edit": {"S": SamplingParams.speed(), "Q": SamplingParams.quality()},
    "dmax": {"0.5": SamplingParams(accept_threshold=0.5), "0.0": SamplingParams(accept_threshold=0.0)},
}
"""Strategy -> name -> settings, named by what is accepted or by LLaDA2.1's mode."""


def held_out(count: int, *, seed: int = SEED) -> list[tasks.Problem]:
    """``count`` different problems of the test split."""
    return tasks.generate("test", count, seed=seed, unique=True)


def evaluate(
    model: str,
    problems: Sequence[tasks.Problem],
    *,
    dtype: str = "float32",
    weights: str | None = None,
    strategies: Sequence[str] | None = None,
    forms: Sequence[str] | None = None,
    buffer_sizes: Sequence[int] = (1,),
) -> dict[str, Any]:
    """Decodes every problem with the :data:`SETTINGS` of some strategies, as a bare question and as a chat turn.

    Args:
      model: a directory, or ``"embedded"``.
      problems: what to ask.
      dtype, weights: of the engine.
      strategies: names in :data:`SETTINGS`; default: all.
      forms: names in :data:`PROMPTS`; default: all.
      buffer_sizes: of the engine, each in turn.

    Returns:
      Plain data: ``problems``, ``machine``, and for every form the figures of :func:`measure` under ``"strategy name"``, with
      ``"K=n"`` after it for buffer sizes above 1.
    """
    forms = list(PROMPTS) if forms is None else forms
    results: dict[str, Any] = {"problems": len(problems), "machine": _machine(dtype, weights), **{form: {} for form in forms}}
    settings = {strategy: SETTINGS[strategy] for strategy in (SETTINGS if strategies is None else strategies)}
    with tqdm(total=len(forms) * len(buffer_sizes) * sum(map(len, settings.values())), unit="run") as bar:
        for (strategy, modes), window in itertools.product(settings.items(), buffer_sizes):
            bar.set_description(f"{strategy}: compiling")
            sizes: dict[str, Any] = {"buffer_size": window, "max_slots": SLOTS, "max_model_len": data.CANVAS}
            engine = Engine.from_pretrained(model, strategy=strategy, dtype=dtype, weights=weights, **sizes)
            for (mode, params), form in itertools.product(modes.items(), forms):
                name = f"{strategy} {mode}" + (f" K={window}" if window > 1 else "")
                bar.set_description(f"{name}, {form}")
                results[form][name] = measure(engine, problems, [PROMPTS[form](p.question) for p in problems], params)
                bar.update()
    return results


def measure(engine: Engine, problems: Sequence[tasks.Problem], prompts: Sequence[str], params: SamplingParams) -> dict[str, float]:
    """Decodes ``prompts`` up to the end of the canvas, and marks the answers.

    Returns:
      ``exact``: share of answers whose final number is right; ``worked``: share whose equations are all the reference's;
      ``tokens`` (before the end of sequence), ``forwards`` (a request's own, prefill not counted) and ``revised`` (filled tokens
      changed): totals; ``tokens_per_forward``; ``tokens_per_second`` of wall-clock time, compilation not counted.
    """
    ids = [encoding.ids for encoding in tokenizer.build().encode_batch(list(prompts))]
    params_of = [dataclasses.replace(params, max_tokens=data.CANVAS - len(prompt)) for prompt in ids]
    outputs, work = decode(engine, ids, params_of)
    answers = [output.text or "" for output in outputs]
    return {
        "exact": sum(map(tasks.is_correct, problems, answers)) / len(problems),
        "worked": sum(tasks.equations(p.answer) == tasks.equations(a) for p, a in zip(problems, answers, strict=True)) / len(problems),
        "tokens": work.tokens,
        "forwards": work.forwards,
        "revised": work.revised,
        "tokens_per_forward": work.tokens_per_forward,
        "tokens_per_second": work.tokens_per_second,
    }


def report(results: dict[str, Any]) -> str:
    """Results of :func:`evaluate` as a table for each form of prompt."""
    lines = [f"{results['problems']} problems, {results['machine']}"]
    for form in (form for form in PROMPTS if form in results):
        lines += ["", f"{form + ' prompts':15} {'exact':>7} {'worked':>7} {'tokens/forward':>14} {'revised':>8} {'tokens/s':>8}"]
        for name, m in results[form].items():
            accuracy = f"{m['exact']:7.1%} {m['worked']:7.1%}"
            lines.append(f"{name:15} {accuracy} {m['tokens_per_forward']:14.2f} {m['revised']:8} {m['tokens_per_second']:8.0f}")
    return "\n".join(lines)


def _machine(dtype: str, weights: str | None) -> str:
    device = jax.devices()[0]
    name = f"{os.cpu_count()}-core CPU" if device.platform == "cpu" else device.device_kind
    experts = f", {weights} experts" if weights else ""
    return f"{name}, {dtype}{experts}, Python {platform.python_version()}, JAX {jax.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="embedded", help="directory of the model, or 'embedded'")
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--seed", type=int, default=SEED, help="of the held-out problems")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--weights", choices=("int8", "int4", "fp8"), help="quantised experts, or else layers")
    parser.add_argument("--strategy", nargs="+", default=list(SETTINGS), choices=SETTINGS, dest="strategies")
    parser.add_argument("--form", nargs="+", default=list(PROMPTS), choices=PROMPTS, dest="forms", help="of the question")
    parser.add_argument("--buffer-size", nargs="+", default=[1], type=int, dest="buffer_sizes", help="blocks denoised together")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    args = parser.parse_args()
    if args.problems < 1:
        parser.error("--problems must be at least 1")
    chosen = {name: getattr(args, name) for name in ("dtype", "weights", "strategies", "forms", "buffer_sizes")}
    results = evaluate(args.model, held_out(args.problems, seed=args.seed), **chosen)
    print(json.dumps(results, indent=1) if args.json else report(results))


if __name__ == "__main__":
    main()
