"""The engine as a rollout worker: Tunix's contract as recorded from google-tunix 0.1.7, and ``nnx`` states."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from plain import attend_to, logits_of, sees
from scripted import EOS, RAW

from diffulex_jax import Engine, MonteCarlo
from diffulex_jax.models.base import init
from diffulex_jax.models.nnx import Network, from_nnx
from diffulex_jax.models.registry import model_of
from diffulex_jax.rollout import tunix
from diffulex_jax.rollout.tunix import DiffusionRollout, RolloutOutput, rollout_class


MODEL = model_of(RAW | {"block_size": 4})
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]

CONTRACT = {
    "generate": ("prompts", "rollout_config", "kwargs"),
    "get_per_token_logps": ("prompt_tokens", "completion_tokens"),
    "update_params": ("params", "filter_types"),
    "pad_id": (),
    "eos_id": (),
    "model": (),
}
OUTPUT = ["text", "logits", "tokens", "left_padded_prompt_tokens", "logprobs"]
BUILT_WITH = {"rollout_actor", "tokenizer", "mesh", "rollout_config"}


def config(**settings) -> types.SimpleNamespace:
    """What is looked at of Tunix's ``RolloutConfig``, with its defaults."""
    usual = {"max_tokens_to_generate": 8, "temperature": 0.9, "top_p": 1.0, "top_k": None, "seed": None}
    return types.SimpleNamespace(**usual | {"max_prompt_length": 6, "eos_tokens": None} | settings)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL, init(MODEL, jax.random.key(0), scale=0.5), strategy="llada2", max_slots=8, max_model_len=16, warm_up=False)


@pytest.fixture(scope="module")
def rollout(engine) -> DiffusionRollout:
    return DiffusionRollout(engine=engine)


def test_the_contract_is_met(engine):
    for name, parameters in CONTRACT.items():
        have = inspect.signature(getattr(DiffusionRollout, name)).parameters
        assert [p for p in have if p != "self"][: len(parameters)] == list(parameters)
        extra = list(have.values())[1 + len(parameters) :]
        assert all(p.default is not p.empty for p in extra)  # what a later version adds may be left out
    assert [field.name for field in dataclasses.fields(RolloutOutput)] == OUTPUT
    actor = object()
    made = DiffusionRollout(engine=engine, **dict.fromkeys(BUILT_WITH - {"rollout_actor"}), rollout_actor=actor)
    assert made.model() is actor


def test_it_becomes_tunixs_own_class(monkeypatch, engine):
    base = type("BaseRollout", (), {})
    theirs = dataclasses.make_dataclass("RolloutOutput", OUTPUT)
    module = types.SimpleNamespace(BaseRollout=base, RolloutOutput=theirs)
    names = ("tunix", "tunix.rl", "tunix.rl.rollout")
    monkeypatch.setattr("sys.modules", {**__import__("sys").modules, **dict.fromkeys(names, module), f"{names[-1]}.base_rollout": module})
    made = rollout_class()
    assert issubclass(made, base)
    assert isinstance(made(engine=engine).generate(PROMPTS, config(seed=1)), theirs)


def test_a_group_differs_and_a_seed_gives_it_again(rollout):
    prompts = [PROMPTS[0]] * 6
    one, other = (rollout.generate(prompts, config(seed=seed)) for seed in (3, 3))
    assert len({tuple(tokens) for tokens in one.tokens}) == 6
    assert [t.tolist() for t in one.tokens] == [t.tolist() for t in other.tokens]
    key = rollout.generate(prompts, config(seed=jax.random.PRNGKey(5)))
    typed = rollout.generate(prompts, config(seed=jax.random.key(5)))
    assert [t.tolist() for t in key.tokens] == [t.tolist() for t in typed.tokens] != [t.tolist() for t in one.tokens]


def test_prompts_are_padded_on_the_left_and_completions_end_with_their_end_token(rollout):
    output = rollout.generate(PROMPTS * 4, config(temperature=3.0, seed=0))
    assert output.left_padded_prompt_tokens[:2].tolist() == [[EOS, EOS, EOS, 1, 2, 3], [EOS, 4, 5, 6, 7, 8]]
    ended = [tokens for tokens in output.tokens if EOS in tokens]
    assert 0 < len(ended) and all(tokens[-1] == EOS and EOS not in tokens[:-1] for tokens in ended)
    assert all(len(tokens) == 8 for tokens in output.tokens if EOS not in tokens)
    longer = rollout.generate([[1] * 7, [2]], config())
    assert longer.left_padded_prompt_tokens.shape == (2, 7)


def test_log_probabilities_are_the_engines_and_0_for_padding(engine, rollout):
    output = rollout.generate(PROMPTS * 2, config(temperature=3.0, seed=0))
    width = max(map(len, output.tokens)) + 1
    padded = np.full((4, width), EOS, np.int32)
    for row, tokens in zip(padded, output.tokens, strict=True):
        row[: len(tokens)] = tokens
    given = [tokens.tolist() for tokens in output.tokens]
    found = rollout.get_per_token_logps(output.left_padded_prompt_tokens, jnp.asarray(padded))
    mask = np.arange(width) < np.array([len(tokens) for tokens in given])[:, None]
    masked = rollout.get_per_token_logps(output.left_padded_prompt_tokens, jnp.asarray(padded), completion_mask=mask)
    for row, with_mask, want, tokens in zip(found, masked, engine.score(PROMPTS * 2, given), given, strict=True):
        np.testing.assert_array_equal(with_mask[: len(tokens)], want)
        if EOS in tokens:  # else, without a mask, the padding is one
            np.testing.assert_array_equal(row, with_mask)
        assert (np.asarray(with_mask[len(tokens) :]) == 0).all()
    estimated = DiffusionRollout(engine=engine, estimator=MonteCarlo(samples=4))
    assert (estimated.get_per_token_logps(output.left_padded_prompt_tokens, jnp.asarray(padded)) != found).any()


def test_parameters_come_from_nnx_states(engine, rollout):
    old = jax.tree.map(np.array, engine.params)
    network = Network(MODEL, init(MODEL, jax.random.key(1), scale=0.5))
    tokens, mask = jnp.array([[1, 2, 3, 15]]), sees(4, 4)
    want, _ = logits_of(MODEL, from_nnx(network), tokens[0], attend_to(mask))

    @nnx.jit
    def spoken(network):
        return network(tokens, jnp.arange(4)[None], mask)

    np.testing.assert_allclose(spoken(network)[0], want, atol=2e-5)
    gradient = nnx.jit(nnx.grad(lambda network: spoken(network).sum()))(network)
    assert float(jnp.abs(from_nnx(gradient)["lm_head"]).sum()) > 0
    for params in (nnx.state(network, nnx.Param), nnx.state(network.params), from_nnx(network)):
        rollout.update_params(jax.tree.map(jnp.zeros_like, old))
        rollout.update_params(params, (nnx.Param,))
        jax.tree.map(np.testing.assert_array_equal, engine.params, from_nnx(network))
    with pytest.raises(ValueError, match="is missing"):
        rollout.update_params(nnx.state(network, lambda path, _: "lm_head" not in path))
    engine.update_params(old)


@pytest.mark.sweep
def test_the_readmes_snippet_runs_as_written(monkeypatch):
    monkeypatch.setattr(Engine, "from_pretrained", functools.partial(Engine.from_pretrained, warm_up=False))
    (snippet,) = re.findall(r"```python\n(.*?)```", (pathlib.Path(tunix.__file__).parent / "README.md").read_text(), re.DOTALL)
    found: dict = {}
    exec(snippet, found)
    scores = [found[name] for name in ("at_once", "bound", "as_drawn")]
    assert [[len(one) for one in each] for each in scores] == [[len(tokens) for tokens in found["completions"]]] * 3
    assert len({tuple(tokens) for tokens in found["completions"]}) > 1
