"""Group-relative policy optimisation (GRPO, arXiv 2402.03300) of a block-diffusion model, with the engine as its rollout.

The policy fills a block in one forward: every token of it is drawn by itself, given the prompt and the finished blocks. Its log
probabilities are therefore known exactly (at temperature 1 they are what ``Engine.score`` gives with ``BlockConditional``), in one forward
that has gradients. Each batch of samples is used for one step, so the ratio of new to old probabilities is 1, and there is nothing to clip.

    python -m diffulex_jax.rollout.grpo

teaches the embedded model to solve its word problems that way at a temperature at which its answers are muddled at first, since the tokens
of a block do not know of each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from diffulex_jax import Engine, Output, SamplingParams
from diffulex_jax.models.base import Model, Params
from diffulex_jax.training.arithmetic import data, tasks, tokenizer
from diffulex_jax.training.layout import predict


KEPT = SamplingParams(accept_threshold=0.0)
"""For strategy ``llada2``: whatever is drawn is kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run is made of.

    Attributes:
      steps: of the optimiser, each on samples of its own.
      prompts, group: different prompts of a step, and samples of each.
      temperature: of the policy, above 0: tokens are drawn from softmax(logits / temperature).
      canvas: tokens of a prompt and its completion.
      learning_rate: of Adam.
      clip: largest norm of a gradient.
      seed: of the samples.
    """

    steps: int = 100
    prompts: int = 16
    group: int = 16
    temperature: float = 2.5
    canvas: int = data.CANVAS
    learning_rate: float = 1e-4
    clip: float = 1.0
    seed: int = 0


class Samples(NamedTuple):
    """What a step learns from. R rows, L positions.

    Attributes:
      tokens: ``[R, L]`` int32, prompt, completion, and its end to the end of the canvas.
      start, end: ``[R]`` int32, the completion's first token, and the one behind its last, which is the end token where there is room.
      advantage: ``[R]`` float32.
    """

    tokens: Any
    start: Any
    end: Any
    advantage: Any


Reward = Callable[[int, Output], float]
"""``reward(i, output)``: how good an answer to the i-th prompt of a step is."""


def train(
    engine: Engine, params: Params, recipe: Recipe, batches: Callable[[int], tuple[Sequence[Sequence[int]], Reward]]
) -> tuple[Params, list[dict[str, float]]]:
    """Improves an engine's model.

    Args:
      engine: with strategy ``llada2``; it holds the new parameters at the end.
      params: its parameters. They stay as they are.
      recipe: what to do.
      batches: ``batches(step) -> (prompts, reward)``.

    Returns:
      The parameters, and for each step the mean reward of its samples and the seconds it took.
    """
    model, optimiser, history = engine.model, _optimiser(recipe), []
    # Copies, which the steps donate, where the engine has its own: a step leaves all as it finds it, so that one program makes them all.
    params = jax.tree.map(lambda new, old: jnp.array(jax.device_put(new, old.sharding)), params, engine.params)
    alike = NamedSharding(engine.mesh, PartitionSpec())
    state = jax.tree.map(lambda a: a if a.ndim else jax.device_put(a, alike), optimiser.init(params))
    placed = jax.tree.map(lambda a: a.sharding, (params, state))
    improved = jax.jit(update, static_argnames=("model", "recipe"), donate_argnums=(0, 1), out_shardings=placed)
    with tqdm(total=recipe.steps, unit="step") as bar:
        for step in range(recipe.steps):
            began = time.perf_counter()
            prompts, reward = batches(step)
            outputs = sample(engine, prompts, recipe, seed=recipe.seed * recipe.steps + step)
            rewards = np.array([[reward(i, output) for output in group] for i, group in enumerate(outputs)], np.float32)
            params, state = improved(params, state, pack(model, outputs, rewards, canvas=recipe.canvas), model=model, recipe=recipe)
            engine.update_params(params)
            history.append({"step": step, "reward": float(rewards.mean()), "seconds": round(time.perf_counter() - began, 3)})
            bar.update()
            bar.set_postfix(reward=f"{np.mean([h['reward'] for h in history[-10:]]):.3f}")
    return params, history


def sample(engine: Engine, prompts: Sequence[Sequence[int]], recipe: Recipe, *, seed: int) -> list[list[Output]]:
    """A group of samples for each prompt."""
    each = [
        dataclasses.replace(
            KEPT, temperature=recipe.temperature, max_tokens=recipe.canvas - len(prompt), n=recipe.group, seed=1000 * seed + i
        )
        for i, prompt in enumerate(prompts)
    ]
    outputs = engine.generate(prompts, each)
    return [outputs[i : i + recipe.group] for i in range(0, len(outputs), recipe.group)]


def pack(model: Model, outputs: Sequence[Sequence[Output]], rewards: np.ndarray, *, canvas: int) -> Samples:
    """Samples as arrays; ``rewards [prompts, group]`` become advantages over the group's mean, in its standard deviations."""
    advantage = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)
    rows = [output for group in outputs for output in group]
    tokens = np.full((len(rows), canvas), model.spec.eos_ids[0], np.int32)
    start, end = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
    for i, output in enumerate(rows):
        ids = output.prompt_token_ids + output.token_ids
        tokens[i, : len(ids)] = ids
        start[i], end[i] = len(output.prompt_token_ids), len(ids) + (output.finish_reason == "stop")
    return Samples(tokens, start, end, advantage.reshape(-1))


def update(params: Params, state: Any, samples: Samples, *, model: Model, recipe: Recipe) -> tuple[Params, Any]:
    """One step of the optimiser: samples better than their group become more probable, others less."""
    gradient = jax.grad(loss)(params, model, samples, recipe.temperature)
    updates, state = _optimiser(recipe).update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def loss(params: Params, model: Model, samples: Samples, temperature: float) -> jax.Array:
    """``-sum(advantage * log p) / tokens``, whose gradient is the policy's."""
    at = jnp.arange(samples.tokens.shape[1])
    hidden = at >= samples.start[:, None]
    scored = hidden & (at < samples.end[:, None])
    z = predict(params, model, jnp.where(hidden, model.spec.mask_id, samples.tokens), samples.tokens)
    log_p = -optax.softmax_cross_entropy_with_integer_labels(z / temperature, samples.tokens)
    return -jnp.sum(samples.advantage[:, None] * log_p, where=scored) / scored.sum()


def _optimiser(recipe: Recipe) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(recipe.clip), optax.adam(recipe.learning_rate))


def word_problems(recipe: Recipe) -> Callable[[int], tuple[list[list[int]], Reward]]:
    """Batches of training problems; an answer is worth 1 where its last number is right, else 0."""
    coder = tokenizer.build()

    def batch(step: int) -> tuple[list[list[int]], Reward]:
        problems = tasks.generate("train", recipe.prompts, seed=(recipe.seed, step))
        prompts = [encoding.ids for encoding in coder.encode_batch([problem.question for problem in problems])]
        return prompts, lambda i, output: float(tasks.is_correct(problems[i], output.text or ""))

    return batch


def accuracy(engine: Engine, problems: Sequence[tasks.Problem], recipe: Recipe, *, temperature: float) -> float:
    """Share of held-out problems that one sample each solves, a forward a block."""
    prompts = [encoding.ids for encoding in tokenizer.build().encode_batch([problem.question for problem in problems])]
    params = [
        dataclasses.replace(KEPT, temperature=temperature, max_tokens=recipe.canvas - len(prompt), seed=i)
        for i, prompt in enumerate(prompts)
    ]
    outputs = engine.generate(prompts, params)
    return sum(tasks.is_correct(p, o.text or "") for p, o in zip(problems, outputs, strict=True)) / len(problems)


def run(model: str, recipe: Recipe, *, problems: int, slots: int) -> dict[str, Any]:
    """A run on word problems: accuracy before and after it, on held-out ones, greedy and drawn, and what happened between."""
    engine = Engine.from_pretrained(model, strategy="llada2", max_slots=slots, max_model_len=recipe.canvas, warm_up=False)
    held_out = tasks.generate("test", problems, seed=1, unique=True)

    def measured() -> dict[str, float]:
        return {name: accuracy(engine, held_out, recipe, temperature=t) for name, t in (("greedy", 0.0), ("drawn", recipe.temperature))}

    before, began = measured(), time.perf_counter()
    _, history = train(engine, engine.params, recipe, word_problems(recipe))
    seconds = time.perf_counter() - began
    device = jax.devices()[0].device_kind
    facts = {"device": device, "problems": problems, "before": before, "after": measured(), "seconds": round(seconds, 1)}
    return {"recipe": dataclasses.asdict(recipe), **facts, "history": history}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="embedded", help="directory of a model that knows the embedded one's words, or 'embedded'")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run for each")
    parser.add_argument("--problems", type=int, default=500, help="held-out problems")
    parser.add_argument("--slots", type=int, default=32, help="requests decoded together")
    for name in ("steps", "prompts", "group"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe(), name))
    for name in ("temperature", "learning_rate"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Recipe(), name))
    args = parser.parse_args()
    sizes: dict[str, Any] = {name: getattr(args, name) for name in ("steps", "prompts", "group", "temperature", "learning_rate")}
    for seed in args.seeds:
        print(json.dumps(run(args.model, Recipe(**sizes, seed=seed), problems=args.problems, slots=args.slots)), flush=True)


if __name__ == "__main__":
    main()
