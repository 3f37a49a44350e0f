"""An output with stop tokens is the same output without them, up to the first: real models of every family, greedy and sampled."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffulex_jax import SamplingParams


@pytest.mark.sweep_but("families/tiny-sdar-trained-sdar-4")
@pytest.mark.parametrize(
    ("checkpoint", "strategy", "block"),
    [
        *(("tiny-llada2-trained", "llada2_edit", 32), ("families/tiny-sdar-trained", "sdar", 4)),
        *(("families/tiny-sdar-moe", "sdar_leftmost", 8), ("families/tiny-fast-dllm-v2-trained", "fast_dllm_v2", 32)),
        *(("families/tiny-llada", "llada_threshold", 32), ("families/tiny-dream", "dream", 144)),
        ("families/tiny-dream", "d2f", 16),
    ],
)
def test_a_real_model_ends_where_the_same_output_without_stops_has_one(engine_of, checkpoint, strategy, block):
    engine = engine_of(checkpoint, strategy=strategy, block_size=block, force_block_size=True, max_slots=8, max_model_len=256)
    rng = np.random.default_rng(block)
    spec, prompts, free = engine.model.spec, [], []
    for i in range(24):
        prompts.append(rng.integers(0, spec.vocab_size - 30, rng.integers(1, 120)).tolist())
        settings = {"temperature": float(rng.choice([0.0, 1.0])), "denoising_steps": int(rng.integers(0, block + 1))}
        free.append(SamplingParams(max_tokens=int(rng.integers(1, 130)), ignore_eos=True, seed=i, accept_threshold=0.6, **settings))
    whole = engine.generate(prompts, free)
    for output, params in zip(whole, free, strict=True):
        assert (len(output.token_ids), output.finish_reason) == (params.max_tokens, "length")
        assert all(0 <= token < spec.vocab_size and token != spec.mask_id for token in output.token_ids)
    stops = [rng.choice(spec.vocab_size, 3, replace=False).tolist() + output.token_ids[-1:] for output in whole]
    cut = engine.generate(prompts, [dataclasses.replace(p, ignore_eos=False, stop_token_ids=s) for p, s in zip(free, stops, strict=True)])
    for output, stopped, ends in zip(whole, cut, stops, strict=True):
        first = next(i for i, token in enumerate(output.token_ids) if token in (*ends, *engine._limits.eos_ids))
        assert (stopped.token_ids, stopped.finish_reason) == (output.token_ids[:first], "stop")
        assert stopped.nfe <= output.nfe
    assert engine.stats["pages_held"] == 0
