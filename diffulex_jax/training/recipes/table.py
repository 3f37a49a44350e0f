"""The papers' claims in miniature: how a model is trained against how it is decoded.

    python -m diffulex_jax.training.recipes.table --out DIR [--task reversal] [--seeds 0 1 2]

trains four small models for every seed, which share their pre-training, and decodes held-out problems with each in every way of
:data:`DECODERS`. Writes ``table.json`` (accuracy and tokens per forward of every cell and seed), ``table.md`` and ``table.png`` from all
seeds that are in the directory, so that seeds may run side by side. Every model has the same number of steps: those of pre-training, then
those of one of :data:`VARIANTS`.

``training/README.md`` has the table that three seeds gave, and what it says of the papers' claims. The task ``arithmetic`` is the embedded
model's, with a smaller network, and wants a GPU; ``reversal`` takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.models.base import Model
from diffulex_jax.models.registry import model_of
from diffulex_jax.rules import chain, remask, soft_parallel
from diffulex_jax.strategies import AnyStrategy, Strategy
from diffulex_jax.training import objective, reversal
from diffulex_jax.training.arithmetic import data, tasks, tokenizer
from diffulex_jax.training.data import Batches, Examples, shuffled
from diffulex_jax.training.recipe import About, Recipe, Term, changed, described
from diffulex_jax.training.recipes import embedded
from diffulex_jax.training.trainer import train
from diffulex_jax.weights import checkpoint


TEST_SEED = 1


class Question(NamedTuple):
    """A held-out problem: its prompt's token ids, and what says whether an answer's are right."""

    prompt: list[int]
    right: Callable[[list[int]], bool]


class Task(NamedTuple):
    """What models learn here.

    Attributes:
      model: the network.
      pretraining: settings of the recipe that all begin with.
      more: what of them is changed to go on from there.
      examples: ``examples(count, seed)``, to train on.
      size: how many.
      questions: ``questions(count)``, others than those.
      canvas: tokens of a prompt and its answer.
      slots: requests decoded together.
    """

    model: Model
    pretraining: dict[str, Any]
    more: dict[str, Any]
    examples: Callable[[int, int], Examples]
    size: int
    questions: Callable[[int], list[Question]]
    canvas: int
    slots: int


def _arithmetic_questions(count: int) -> list[Question]:
    coder = tokenizer.build()

    def right(problem: tasks.Problem, answer: list[int]) -> bool:
        return tasks.is_correct(problem, coder.decode(answer))

    problems = tasks.generate("test", count, seed=TEST_SEED, unique=True)
    return [Question(coder.encode(problem.question).ids, functools.partial(right, problem)) for problem in problems]


def _arithmetic_examples(count: int, seed: int) -> Examples:
    return data.training_set(count, seed=seed, workers=8 if count > data.SHARD else 1)


def _reversal_questions(count: int) -> list[Question]:
    prompts = reversal.examples(count, 10_000 + TEST_SEED).tokens[:, : reversal.DIGITS].tolist()
    return [Question(prompt, functools.partial(reversal.is_correct, prompt)) for prompt in prompts]


_MASKED = (Term("masked", objective.masked),)
_SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 7, "num_attention_heads": 4}
TASKS = {
    "arithmetic": Task(
        model=model_of(embedded.MODEL.config.to_hf() | _SMALL),
        pretraining={"steps": 3000, "rows": 256, "learning_rate": 2e-3, "warmup": 200, "balance": 0.01},
        more={"steps": 1000, "learning_rate": 5e-4, "warmup": 50},
        examples=_arithmetic_examples,
        size=400_000,
        questions=_arithmetic_questions,
        canvas=data.CANVAS,
        slots=64,
    ),
    "reversal": Task(
        model=reversal.MODEL,
        pretraining={"steps": 1000, "rows": 32, "learning_rate": 4e-3, "warmup": 100, "dtype": "float32"},
        more={"steps": 500, "learning_rate": 2e-3, "warmup": 50},
        examples=reversal.examples,
        size=50_000,
        questions=_reversal_questions,
        canvas=reversal.CANVAS,
        slots=32,
    ),
}

_GROUPS = functools.partial(objective.multi_block, most=4)
VARIANTS: dict[str, tuple[Term, ...]] = {
    "pre-trained": _MASKED,
    "+ uniform": (Term("masked", objective.masked, 0.5), Term("uniform", objective.uniform, 0.5)),
    "+ on-policy": (Term("masked", objective.masked, 0.5), Term("on_policy", objective.on_policy, 0.5)),
    "+ MultiTF": (Term("masked", _GROUPS, 0.5), Term("on_policy", functools.partial(_GROUPS, drafts=True), 0.5)),
}
"""Objectives of the steps behind pre-training. MultiTF is on-policy too, in groups of up to four blocks."""


class Decoder(NamedTuple):
    """A way of decoding: a strategy, blocks denoised together, and settings by the name that the table gives them."""

    strategy: AnyStrategy
    window: int
    settings: dict[str, SamplingParams]


def _at(*thresholds: float) -> dict[str, SamplingParams]:
    return {f"{threshold:g}": SamplingParams(accept_threshold=threshold) for threshold in thresholds}


DECODERS: dict[str, Decoder] = {
    "llada2": Decoder("llada2", 1, _at(0.95, 0.9, 0.7, 0.5, 0.3)),
    "llada2 K=2": Decoder("llada2", 2, _at(0.95, 0.9, 0.7, 0.5, 0.3)),
    "llada2 K=4": Decoder("llada2", 4, _at(0.95, 0.9, 0.7, 0.5, 0.3)),
    "edit": Decoder("llada2_edit", 1, {"Q": SamplingParams.quality(), "S": SamplingParams.speed()}),
    "dmax, hard": Decoder(Strategy("dmax_hard", chain(soft_parallel(), remask()), canvas="block_causal"), 1, _at(0.9, 0.7, 0.5, 0.3, 0.0)),
    "dmax": Decoder("dmax", 1, _at(0.9, 0.7, 0.5, 0.3, 0.0)),
    "dmax K=2": Decoder("dmax", 2, _at(0.9, 0.7, 0.5, 0.3, 0.0)),
    "dmax K=4": Decoder("dmax", 4, _at(0.9, 0.7, 0.5, 0.3, 0.0)),
}
""""dmax, hard" is DMax's rule without soft tokens: what token merging adds is the difference to "dmax"."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path, help="directory of the results")
    parser.add_argument("--task", choices=TASKS, default="arithmetic")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of models; none: draw what is there")
    parser.add_argument("--steps", type=int, help="of pre-training; default: the task's, as what follows")
    parser.add_argument("--more", type=int, help="steps behind it")
    parser.add_argument("--rows", type=int, help="examples in a step")
    parser.add_argument("--examples", type=int, help="size of the training set")
    parser.add_argument("--problems", type=int, default=256, help="held-out problems of a cell")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    task = TASKS[args.task]
    first = task.pretraining | ({"rows": args.rows} if args.rows else {})
    task = task._replace(
        pretraining=_shortened(first, args.steps), more=_shortened(first | task.more, args.more), size=args.examples or task.size
    )
    engines: dict[str, Engine] = {}
    for seed in args.seeds:
        for sheet in fill(task, engines, seed=seed, problems=args.problems):
            (args.out / f"seed-{seed}.json").write_text(json.dumps(sheet, indent=1) + "\n")
    table = gather([json.loads(file.read_text()) for file in sorted(args.out.glob("seed-*.json"))])
    (args.out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    (args.out / "table.md").write_text(text(table))
    draw(args.out / "table.png", table)
    print(text(table))


def fill(task: Task, engines: dict[str, Engine], *, seed: int, problems: int) -> Iterator[dict[str, Any]]:
    """Trains and decodes the models of a seed; ``engines`` keeps what decodes them, for the next.

    Yields:
      After every variant, plain data: what was trained, on which device and for how long, and for each variant so far and each decoder the
      figures of :func:`measure` by the name of the settings.
    """
    began = time.perf_counter()
    made = task.examples(task.size, seed)
    data = functools.partial(_shuffled, made)
    first = Recipe(model=task.model, data=data, objectives=_MASKED, seed=seed, **task.pretraining)
    recipes = {"pre-training": first}
    recipes |= {name: changed(first, **task.more, objectives=terms, seed=seed + 1000) for name, terms in VARIANTS.items()}
    seconds = {"examples": round(time.perf_counter() - began, 1)}
    sheet: dict[str, Any] = {"seed": seed, "problems": problems, "seconds": seconds, "ends": {}, "cells": {}}
    sheet |= {"recipes": {name: described(recipe) for name, recipe in recipes.items()}}
    questions = task.questions(problems)
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in recipes.items():
            begin = folder if name in VARIANTS else recipe.model
            result = train(changed(recipe, model=begin))
            seconds[name] = round(result.seconds, 1)
            sheet["device"], sheet["ends"][name] = result.device, result.history[-1]
            if name not in VARIANTS:
                checkpoint.save(folder, result.model, result.params, dtype="float32")
                continue
            at = time.perf_counter()
            sheet["cells"][name] = decode(task, result.params, questions, engines)
            seconds[f"{name}, decoding"] = round(time.perf_counter() - at, 1)
            yield sheet


def decode(task: Task, params: Any, questions: Sequence[Question], engines: dict[str, Engine]) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of every decoder and setting. Engines that were made for other parameters take these: nothing is compiled again."""
    if not engines:
        with concurrent.futures.ThreadPoolExecutor() as pool:  # the compiler works beside itself
            made = pool.map(functools.partial(_engine, task, params, questions), DECODERS.values())
            engines.update(zip(DECODERS, made, strict=True))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, decoder in (bar := tqdm(DECODERS.items(), unit="decoder", disable=None)):
        bar.set_description(name)
        engines[name].update_params(params)
        of = functools.partial(measure, engines[name], questions, canvas=task.canvas)
        found[name] = {setting: of(params=settings) for setting, settings in decoder.settings.items()}
    return found


def _engine(task: Task, params: Any, questions: Sequence[Question], decoder: Decoder) -> Engine:
    """An engine that has compiled what the questions need."""
    sizes: dict[str, Any] = {"buffer_size": decoder.window, "max_slots": task.slots, "max_model_len": task.canvas}
    engine = Engine(task.model, params, strategy=decoder.strategy, warm_up=False, **sizes)
    engine.warm_up([question.prompt for question in questions], SamplingParams(max_tokens=8))
    return engine


def measure(engine: Engine, questions: Sequence[Question], *, params: SamplingParams, canvas: int) -> dict[str, float]:
    """``exact``: how many answers are right. ``tokens`` before the end of sequence, and ``forwards``, prefill not counted, of all."""
    prompts = [question.prompt for question in questions]
    outputs = engine.generate(prompts, [dataclasses.replace(params, max_tokens=canvas - len(prompt)) for prompt in prompts])
    return {
        "exact": sum(question.right(list(output.token_ids)) for question, output in zip(questions, outputs, strict=True)),
        "tokens": sum(len(output.token_ids) for output in outputs),
        "forwards": sum(output.nfe for output in outputs),
    }


def gather(sheets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One table of what :func:`fill` gave for each seed, of the variants that all of them have: accuracy and tokens per forward.

    Raises:
      ValueError: for no sheets, or such as are of different numbers of problems.
    """
    if len({sheet["problems"] for sheet in sheets}) != 1:
        raise ValueError("there must be sheets, all of the same number of problems")

    def cell(variant: str, decoder: str, setting: str) -> dict[str, list[float]]:
        figures = [sheet["cells"][variant][decoder][setting] for sheet in sheets]
        return {
            "exact": [round(figure["exact"] / sheets[0]["problems"], 4) for figure in figures],
            "tokens_per_forward": [round(figure["tokens"] / figure["forwards"], 3) for figure in figures],
        }

    cells = {
        variant: {decoder: {setting: cell(variant, decoder, setting) for setting in of} for decoder, of in decoders.items()}
        for variant, decoders in sheets[0]["cells"].items()
        if all(variant in sheet["cells"] for sheet in sheets)
    }
    kept = {name: sheets[0][name] for name in ("problems", "recipes")}
    return kept | {name: [sheet[name] for sheet in sheets] for name in ("seed", "device", "seconds", "ends")} | {"cells": cells}


def text(table: dict[str, Any]) -> str:
    """The table in Markdown: accuracy at tokens per forward, the mean of all seeds, and how far from it the furthest is."""

    def spread(values: list[float], form: str) -> str:
        mean = sum(values) / len(values)
        return f"{mean:{form}} ± {max(abs(value - mean) for value in values):{form}}"

    variants = list(table["cells"])
    lines = ["| decoder | setting | " + " | ".join(variants) + " |", "|---|---|" + "---|" * len(variants)]
    for decoder, settings in table["cells"][variants[0]].items():
        for setting in settings:
            cells = [table["cells"][variant][decoder][setting] for variant in variants]
            shown = [
                f"{spread([100 * value for value in cell['exact']], '.1f')} % at {spread(cell['tokens_per_forward'], '.2f')}"
                for cell in cells
            ]
            lines.append(f"| {decoder} | {setting} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def draw(path: pathlib.Path, table: dict[str, Any]) -> None:
    """Draws accuracy over tokens per forward: a panel for each way of training, a curve for each way of decoding. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    colours = {"llada2": "#8a939f", "edit": "#d95f0e", "dmax, hard": "#7a5195", "dmax": "#2c7fb8"}
    for ax, (variant, decoders) in zip(panels, table["cells"].items(), strict=False):
        for decoder, settings in decoders.items():
            base, _, window = decoder.partition(" K=")
            means = [[sum(cell[name]) / len(cell[name]) for cell in settings.values()] for name in ("tokens_per_forward", "exact")]
            lows, highs = ([f(cell["exact"]) for cell in settings.values()] for f in (min, max))
            off = [[mean - low for mean, low in zip(means[1], lows, strict=True)], [h - m for m, h in zip(means[1], highs, strict=True)]]
            form = {"": "-", "2": "--", "4": ":"}[window]
            ax.errorbar(*means, yerr=off, color=colours[base], linestyle=form, marker="o", markersize=3, linewidth=1.3, label=decoder)
        ax.set_title(variant, loc="left", fontsize=11)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("tokens per forward")
    figure.supylabel("exact answers")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _shortened(settings: dict[str, Any], steps: int | None) -> dict[str, Any]:
    steps = steps or settings["steps"]
    return settings | {"steps": steps, "warmup": min(settings["warmup"], steps // 4)}


def _shuffled(examples: Examples, about: About) -> Batches:
    return shuffled(examples, rows=about.rows, seed=about.seed)


if __name__ == "__main__":
    main()
