"""GRPO over the engine: what it learns from is the policy that drew, and the reward rises."""

from __future__ import annotations

import types

import jax
import jax.monitoring
import numpy as np
import pytest
from jax.sharding import NamedSharding
from scripted import EOS, RAW

from diffulex_jax import BlockConditional, Engine
from diffulex_jax.engine import programs
from diffulex_jax.models.base import init
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.rollout import grpo


MODEL = model_of(RAW | {"block_size": 4})
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Its parameters lie where those of a checkpoint do, each on axes of a mesh."""
    placed = jax.tree.map(lambda split: NamedSharding(make_mesh(), split), programs.param_specs(MODEL))
    params = jax.device_put(init(MODEL, jax.random.key(0), scale=0.5), placed)
    return Engine(MODEL, params, strategy="llada2", max_slots=8, max_model_len=16, warm_up=False)


RECIPE = grpo.Recipe(steps=40, prompts=2, group=16, canvas=16, learning_rate=0.03, temperature=1.0)


def test_reward_rises(engine):
    """For tokens from 8 on: from a third to most. The engine decodes with what was learnt, and its caller's parameters stay."""
    params = jax.tree.map(np.array, engine.params)

    def reward(i: int, output) -> float:
        return float(np.mean([token >= 8 for token in output.token_ids])) if output.token_ids else 0.0

    lowered = []

    def note(event: str, _seconds: float, *, fun_name: str = "", **_) -> None:
        lowered.extend([fun_name] * event.endswith("/jaxpr_to_mlir_module_duration"))

    jax.monitoring.register_event_duration_secs_listener(note)
    learnt, history = grpo.train(engine, engine.params, RECIPE, lambda step: (PROMPTS, reward))
    jax.monitoring.unregister_event_duration_listener(note)
    assert lowered.count("jit(update)") == 1  # a program for all steps
    assert [entry["step"] for entry in history] == list(range(40))
    assert np.mean([entry["reward"] for entry in history[:4]]) < 0.4
    assert np.mean([entry["reward"] for entry in history[-4:]]) > 0.7
    jax.tree.map(np.testing.assert_array_equal, engine.params, learnt)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(learnt), strict=True))
    engine.update_params(params)


@pytest.mark.sweep
def test_what_is_learnt_from_is_what_was_drawn_and_its_probability_is_the_policys(engine):
    """A step makes no difference between the probability it raises and that by which the engine drew."""
    outputs = grpo.sample(engine, PROMPTS, RECIPE, seed=7)
    rewards = np.arange(32, dtype=np.float32).reshape(2, 16)
    samples = grpo.pack(MODEL, outputs, rewards, canvas=16)
    np.testing.assert_allclose(samples.advantage.reshape(2, 16).mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(samples.advantage.reshape(2, 16).std(1), 1, atol=1e-3)
    flat = [output for group in outputs for output in group]
    completions = [o.token_ids + [EOS] * (o.finish_reason == "stop") for o in flat]
    for row, output, completion in zip(samples.tokens, flat, completions, strict=True):
        ids = output.prompt_token_ids + completion
        assert row.tolist() == ids + [EOS] * (16 - len(ids))
        assert output.nfe == len({i // 4 for i in range(len(output.prompt_token_ids), len(ids))})  # a forward a block
    scores = engine.score([o.prompt_token_ids for o in flat], completions, BlockConditional())
    want = -sum(a * s.sum() for a, s in zip(samples.advantage, scores, strict=True)) / sum(map(len, completions))
    assert float(grpo.loss(engine.params, MODEL, samples, 1.0)) == pytest.approx(want, abs=1e-4)


def test_word_problems_are_worth_1_where_they_are_right():
    prompts, reward = grpo.word_problems(grpo.Recipe(prompts=3))(0)
    assert len(prompts) == 3
    problem = grpo.tasks.generate("train", 3, seed=(0, 0))[1]
    answers = [types.SimpleNamespace(text=text) for text in (problem.answer, "So the answer is 1000.", None)]
    assert [reward(1, answer) for answer in answers] == [1, 0, 0]
