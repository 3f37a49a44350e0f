"""What a strategy says about sampling: when a position is drawn anew, and which distribution confidence is measured in."""

from __future__ import annotations

import pathlib

import pytest

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.strategies import STRATEGIES, Strategy


MODEL = str(pathlib.Path(__file__).parent / "golden" / "tiny-llada2-trained")
SDAR = STRATEGIES["sdar"]
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


@pytest.fixture(scope="module")
def decode():
    """``decode(strategy, temperature)``: tokens and forwards of two prompts."""

    def run(strategy: Strategy, temperature: float, **settings) -> list[tuple[list[int], int]]:
        engine = Engine.from_pretrained(MODEL, strategy=strategy, block_size=8, max_slots=4, max_model_len=256, warm_up=False)
        params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=temperature, seed=5, **settings)
        return [(output.token_ids, output.nfe) for output in engine.generate(PROMPTS, params)]

    return run


@pytest.mark.sweep
def test_greedy_decoding_knows_neither(decode):
    assert decode(SDAR, 0.0) == decode(SDAR._replace(draws="position", confidence="model"), 0.0)


@pytest.mark.sweep
def test_every_forward_draws_anew(decode):
    """A position that a step passes over gets another draw in the next."""
    anew, kept = (decode(SDAR._replace(draws=draws), 2.0, accept_threshold=1.0) for draws in ("step", "position"))
    assert [tokens for tokens, _ in anew] != [tokens for tokens, _ in kept]
    assert anew == decode(SDAR, 2.0, accept_threshold=1.0)


def test_a_low_temperature_makes_tempered_confidence_high(decode):
    """Near temperature 0 every drawn token has a probability near 1: a block a forward. The model's own probability is what it was."""
    sure, unsure = (decode(SDAR._replace(confidence=confidence), 0.01) for confidence in ("tempered", "model"))
    assert [nfe for _, nfe in sure] == [6, 6]  # 5 or 3 tokens of the prompt, then 40 more, in blocks of 8
    assert all(nfe > 6 for _, nfe in unsure)
