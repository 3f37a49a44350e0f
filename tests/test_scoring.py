"""Scores of completions: each estimator against a plain loop over the network, and against what decoding itself recorded."""

from __future__ import annotations

import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from plain import attend_to, logits_of, sees
from test_next_token_models import MODEL as NEXT

from diffulex_jax import BlockConditional, Engine, MonteCarlo, SamplingParams, StepMap
from diffulex_jax.engine import scoring
from diffulex_jax.models.attention import Where
from diffulex_jax.models.base import init
from diffulex_jax.models.functional import pure
from diffulex_jax.models.registry import model_of


SMALL = {"vocab_size": 16, "embedding_size": 16, "eos_token_id": 14, "pad_token_id": 14, "mask_token_id": 15}
SMALL |= {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 16}
CONFIG = json.loads((pathlib.Path(__file__).parent / "golden" / "families" / "tiny-llada" / "config.json").read_text())
LLADA = model_of(CONFIG | SMALL)
MODELS = {"block": scripted.MODEL, "next": NEXT, "whole": LLADA}
PARAMS = {name: init(model, jax.random.key(3), scale=0.6) for name, model in MODELS.items()}
BLOCK, LONGEST = 4, 16
PROMPTS, COMPLETIONS = [[1, 2, 3, 4], [5, 6, 7], [3], [8, 9]], [[5, 3, 1, 2, 7, 7, 2], [1, 4, 4, 9, 6, 2, 1, 3], [], [3, 4]]


def engine_over(name: str, **settings) -> Engine:
    sizes = {"block_size": BLOCK, "force_block_size": True, "max_slots": 2, "max_model_len": LONGEST, "warm_up": False}
    return Engine(MODELS[name], PARAMS[name], **sizes | settings)


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    return {name: engine_over(name) for name in MODELS}


def plain(name: str, tokens: list[int], block: int = BLOCK) -> np.ndarray:
    """``[T, V]``: log probabilities of a whole forward over ``tokens``; row i of position i."""
    model, policy = MODELS[name], MODELS[name].spec.attention

    @jax.jit
    def forward(params, tokens):
        found, _ = logits_of(model, params, tokens, attend_to(sees(len(tokens), block, policy)))
        return jax.nn.log_softmax(found if name == "whole" else found.at[:, model.spec.mask_id].set(-jnp.inf), -1)

    found = np.asarray(forward(PARAMS[name], np.array(tokens)))
    return np.roll(found, 1, 0) if model.spec.predicts == "next" else found


def log_probs(name: str, tokens: list[int], hidden: set[int]) -> dict[int, float]:
    """Of each hidden token, with masks for all of them, to the end of its block."""
    model = MODELS[name]
    shown = [model.spec.mask_id if i in hidden else token for i, token in enumerate(tokens)]
    if name != "whole":
        shown += [model.spec.mask_id] * (-len(shown) % BLOCK)
    found = plain(name, shown)
    return {i: float(found[i, tokens[i]]) for i in hidden}


def blocks(name: str, prompt: list[int], completion: list[int]) -> list[list[int]]:
    """Positions of the completion, block by block."""
    start = len(prompt) if name == "whole" else 0
    positions = range(len(prompt), len(prompt) + len(completion))
    return [list(group) for _, group in itertools.groupby(positions, lambda i: (i - start) // BLOCK)]


@pytest.mark.sweep_but("block", "next")
@pytest.mark.parametrize("name", MODELS)
def test_each_block_is_scored_given_the_clean_past(engines, name):
    found = engines[name].score(PROMPTS, COMPLETIONS)
    assert [(len(scores), scores.dtype) for scores in found] == [(len(completion), np.float32) for completion in COMPLETIONS]
    for prompt, completion, scores in zip(PROMPTS, COMPLETIONS, found, strict=True):
        want: dict[int, float] = {}
        for positions in blocks(name, prompt, completion):
            if name == "whole":  # what is behind is masked too
                hidden = set(range(positions[0], len(prompt) + len(completion)))
                want |= {i: p for i, p in log_probs(name, prompt + completion, hidden).items() if i in positions}
            else:
                want |= log_probs(name, (prompt + completion)[: positions[-1] + 1], set(positions))
        np.testing.assert_allclose(scores, [want[i] for i in sorted(want)], atol=2e-5)


@pytest.mark.sweep_but("block-settings1", "whole-settings3")
@pytest.mark.parametrize(
    ("name", "settings"),
    [("block", {}), ("block", {"strategy": "multi_bd"}), ("next", {}), ("whole", {"strategy": "llada_threshold"})],
)
def test_along_the_steps_a_decoder_took_scores_are_what_it_recorded(engines, name, settings):
    """Outputs that end with a block: of the canvas nothing is left out."""
    engine = engine_over(name, **settings) if settings else engines[name]
    lengths = [12, 9] if name != "whole" else [12, 12]
    params = [SamplingParams(max_tokens=n, ignore_eos=True, accept_threshold=0.4, logprobs=True, return_step_map=True) for n in lengths]
    outputs = engine.generate(PROMPTS[:2], params)
    assert all(len(output.token_ids) / 4 < output.nfe for output in outputs)  # blocks took several forwards
    found = engine.score(PROMPTS[:2], [o.token_ids for o in outputs], StepMap([o.step_map for o in outputs]))
    for output, scores in zip(outputs, found, strict=True):
        np.testing.assert_allclose(scores, output.logprobs, atol=2e-5)


@pytest.mark.sweep_but("block-from_start", "block-behind_a_block")
@pytest.mark.parametrize("prompt", [PROMPTS[1], [5, 6, 7, 1, 2, 3]], ids=["from_start", "behind_a_block"])
@pytest.mark.parametrize("name", MODELS)
def test_samples_are_weighted_forwards_of_the_plain_network(engines, name, prompt):
    """Several of them share a row, and the sequence that they see."""
    completion, estimator = COMPLETIONS[0][:4], MonteCarlo(samples=7, seed=2)
    begin, end = len(prompt), len(prompt) + 4
    groups = [[*range(begin, end)]] if name == "whole" else blocks(name, prompt, completion)
    group_of = np.array([-1] * begin + [n for n, group in enumerate(groups) for _ in group])
    want = np.zeros(end)
    for canvas in scoring._sampled(np.arange(end) >= begin, group_of, estimator):
        for group in groups:
            hidden = {i for i in group if canvas.hidden[i]}
            for i, p in log_probs(name, (prompt + completion)[: group[-1] + 1], hidden).items():
                want[i] += canvas.weight[i] * p
    (scores,) = engines[name].score([prompt], [completion], estimator)
    np.testing.assert_allclose(scores, want[begin:], atol=2e-4)
    (again,) = engines[name].score([prompt], [completion], estimator)
    (other,) = engines[name].score([prompt], [completion], MonteCarlo(samples=7, seed=1))
    assert (again == scores).all() and (other != scores).any()


@pytest.mark.parametrize(
    ("length", "cells", "count", "width"),
    [
        (1024, 64, 1, 256),  # a short answer behind a long context, once
        (1024, 64, 16, 1024),  # 16 canvases in one row
        (1024, 1024, 32, 1024),  # a row may be no longer
        (128, 96, 32, 512),  # 7 rows of 640 tokens; 32 rows of 256 are more
        (4, 4, 1, 4),
    ],
)
def test_rows_take_few_tokens(length, cells, count, width):
    assert scoring._width(length, cells, count, block=4) == width


def test_samples_tend_to_the_bound_that_all_subsets_make():
    """Which is ``sum over l = 1 .. n of E[1 / l sum of masked log p]``, whatever log p is given what is masked."""
    rng, n = np.random.default_rng(0), 3
    subsets = [s for count in range(1, n + 1) for s in itertools.combinations(range(n), count)]
    table = {s: rng.uniform(-4, 0, n) for s in subsets}
    want = sum(np.mean([table[s][list(s)].sum() for s in subsets if len(s) == count]) / count for count in range(1, n + 1))
    canvases = scoring._sampled(np.ones(n, bool), np.zeros(n), MonteCarlo(samples=30_000))
    got = sum(canvas.weight @ (canvas.hidden * table[tuple(np.flatnonzero(canvas.hidden))]) for canvas in canvases)
    assert got == pytest.approx(want, rel=0.01)


def test_numbers_of_masks_are_spread_evenly():
    open_ = np.arange(10) >= 4
    canvases = list(scoring._sampled(open_, np.zeros(10), MonteCarlo(samples=12)))
    assert sorted(int(canvas.hidden.sum()) for canvas in canvases) == sorted([1, 2, 3, 4, 5, 6] * 2)
    for canvas in canvases:
        assert not canvas.hidden[:4].any()
        np.testing.assert_allclose(canvas.weight[canvas.hidden], 6 / canvas.hidden.sum() / 12)


def test_one_token_is_scored_alike_by_all(engines):
    """It is masked, and nothing else is."""
    (a,) = engines["block"].score([PROMPTS[0]], [[7]], MonteCarlo(samples=3))
    (b,) = engines["block"].score([PROMPTS[0]], [[7]])
    (c,) = engines["block"].score([PROMPTS[0]], [[7]], StepMap([[(4, 9)]]))
    np.testing.assert_allclose([a, c], [b, b], rtol=1e-5)
    assert (engines["block"].score([PROMPTS[0]], [[7]], StepMap([[(0, 0)]]))[0] == 0).all()  # pinned


def test_scores_do_not_depend_on_what_is_scored_beside_and_few_programs_are_compiled(engines):
    engine = engines["block"]
    alone = [engine.score([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    for scores, together in zip(alone, engine.score(PROMPTS, COMPLETIONS), strict=True):
        np.testing.assert_array_equal(scores, together)
    drawn, together = MonteCarlo(samples=6), engine.score(PROMPTS, COMPLETIONS, MonteCarlo(samples=6))
    for prompt, completion, scores in zip(PROMPTS, COMPLETIONS, together, strict=True):
        np.testing.assert_array_equal(engine.score([prompt], [completion], drawn)[0], scores)
    for length in range(1, LONGEST):
        engine.score([[1]], [[2] * length])
    shapes = {
        (width, length) for name in engine._device._programs._found if name[0] == "score" for (_, width), length in name[1:] if length
    }
    assert shapes >= {(4, 4), (8, 8), (16, 16)} and shapes <= {(width, n) for n in (4, 8, 16) for width in (n // 4, n, 4 * n)}


def test_requests_under_way_are_not_disturbed(engines):
    engine, params = engines["block"], SamplingParams(max_tokens=8, ignore_eos=True, accept_threshold=1.0)
    (want,) = engine.generate([PROMPTS[0]], params)
    (id_,) = engine.add(PROMPTS[0], params)
    engine.step()
    engine.score(PROMPTS, COMPLETIONS)
    finished = {}
    while engine.has_work:
        finished |= engine.step()
    assert finished[id_].token_ids == want.token_ids


def test_blocks_behind_a_prompt_that_sees_all_of_itself_begin_at_its_end():
    engine = engine_over("whole", strategy="d2f", attention="prefix_full", buffer_size=1)
    prompt, completion, mask = PROMPTS[1], COMPLETIONS[1][:6], LLADA.spec.mask_id
    shown = prompt + completion[:4] + [mask] * 4
    at = np.arange(len(shown))
    where = Where(jnp.asarray((at - len(prompt)) // 4), jnp.asarray(at < len(prompt)))
    policy = engine._device.program.attention
    forward = jax.jit(lambda ids, mask: jax.nn.log_softmax(logits_of(LLADA, PARAMS["whole"], ids, attend_to(mask))[0], -1))
    want = np.asarray(forward(np.array(shown), policy.mask(where, where)))  # as its confidences are
    (scores,) = engine.score([prompt], [completion])
    np.testing.assert_allclose(scores[4:], [want[7 + i, completion[4 + i]] for i in range(2)], atol=2e-5)


@pytest.mark.parametrize(
    ("prompts", "completions", "estimator", "message"),
    [
        ([[1]], [[2], [3]], None, "2 completions for 1 prompts"),
        ([[1]], [[2, 15]], None, "completion 0 holds the mask 15"),
        ([[1]], [[2, 16]], None, "completion 0 holds token id 16, outside the vocabulary"),
        ([[]], [[2]], None, "prompt 0 is empty"),
        (["a"], [[2]], None, "prompt 0 is text, and this model has no tokenizer"),
        ([[1]], ["a"], None, "completion 0 is text, and this model has no tokenizer"),
        ([[1] * 10], [[2] * 7], None, "completion 0 and its prompt have 17 tokens; that exceeds max_model_len=16"),
        ([[1]], [[2]], "block", "estimator='block' must be"),
        ([[1]], [[2]], StepMap([]), "0 step maps for 1 completions"),
        ([[1]], [[2]], StepMap([[]]), "completion 0 has 1 tokens, and its step map 0"),
        ([[1]], [[2]], StepMap([None]), "completion 0 has 1 tokens, and its step map none; ask for return_step_map"),
    ],
)
def test_what_will_not_do_is_named(engines, prompts, completions, estimator, message):
    with pytest.raises(ValueError, match=message):
        engines["block"].score(prompts, completions, estimator)


@pytest.mark.parametrize(("settings", "message"), [({"samples": 0}, "samples=0"), ({"seed": -1}, "seed=-1"), ({"samples": 2.5}, "2.5")])
def test_samples_are_counted(settings, message):
    with pytest.raises(ValueError, match=message):
        MonteCarlo(**settings)


def test_a_network_is_a_pure_function_that_has_gradients():
    model, params = MODELS["block"], PARAMS["block"]
    tokens = jnp.array([PROMPTS[0] + [15, 15, 15, 15]])
    positions, mask = jnp.arange(8)[None], sees(8, BLOCK)
    f = jax.jit(pure(model))
    want = jax.jit(lambda params, ids: logits_of(model, params, ids, attend_to(mask))[0])(params, tokens[0])
    np.testing.assert_allclose(f(params, tokens, positions, mask)[0], want, atol=2e-5)
    np.testing.assert_allclose(f(params, tokens, positions, jnp.stack([mask]))[0], want, atol=2e-5)
    gradient = jax.grad(lambda p: f(p, tokens, positions, mask)[0, 5, 3])(params)
    assert all(math.isfinite(float(jnp.abs(leaf).sum())) for leaf in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient["lm_head"]).sum()) > 0


def test_the_default_estimator_is_the_block_conditional_one(engines):
    for one, other in zip(
        engines["block"].score(PROMPTS, COMPLETIONS), engines["block"].score(PROMPTS, COMPLETIONS, BlockConditional()), strict=True
    ):
        np.testing.assert_array_equal(one, other)
