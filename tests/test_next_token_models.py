"""Models whose output at a position speaks of the next one: the step that writes a block's KV decides the token behind it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from plain import attend_to, probabilities, sees
from test_qwen2 import RAW

from diffulex_jax import Engine, SamplingParams, SettingError
from diffulex_jax.models.base import init
from diffulex_jax.models.registry import model_of


BLOCK, MASK, LONGEST = 4, 31, 40
MODEL = model_of(RAW | {"bd_size": BLOCK})
PARAMS = init(MODEL, jax.random.key(3), scale=0.6)
PROMPTS = [[5], [3, 1, 4], [1, 2, 3, 4], [9, 8, 7, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8], [1, 1, 2, 3, 5, 8, 13, 21, 3, 5, 8]]


@pytest.fixture(scope="module")
def engine():
    return Engine(MODEL, PARAMS, max_slots=4, max_model_len=LONGEST, page_size=BLOCK, warm_up=False)


def test_its_authors_strategy_decodes_a_model_where_none_is_named(engine):
    assert engine.strategy == "fast_dllm_v2"


@jax.jit
def plain(ids):
    return probabilities(MODEL, PARAMS, ids, attend_to(sees(LONGEST, BLOCK)))[0]


def say(tokens: list[int]) -> np.ndarray:
    """``[T, V]``: what a forward over the whole sequence says, without caches and windows; row i of position i + 1."""
    return np.asarray(plain(np.array([*tokens, *[0] * (LONGEST - len(tokens))])))


def decoded(prompt: list[int], count: int, *, threshold: float = 2.0, sub_block: int = 0) -> tuple[list[int], int]:
    """The first ``count`` tokens after ``prompt``, and the forwards they take."""
    tokens, forwards = list(prompt), 0
    while len(tokens) < len(prompt) + count:
        if len(tokens) % BLOCK == 0:
            tokens.append(int(say(tokens)[len(tokens) - 1].argmax()))
            forwards += 1
            continue
        start = len(tokens) // BLOCK * BLOCK
        tokens += [MASK] * (start + BLOCK - len(tokens))
        while MASK in tokens:
            p = say(tokens)
            masks = [i for i, token in enumerate(tokens) if token == MASK]
            size = sub_block or BLOCK
            masks = [i for i in masks if (i - start) // size == (masks[0] - start) // size]
            sure = [i for i in masks if p[i - 1].max() > threshold] or [max(masks, key=lambda i: p[i - 1].max())]
            for i in sure:
                tokens[i] = int(p[i - 1].argmax())
            forwards += 1
    return tokens[len(prompt) : len(prompt) + count], forwards


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.3}, {"sub_block": 2}, {"threshold": 0.2, "sub_block": 3}], ids=str)
def test_tokens_and_forwards_are_those_of_whole_forwards(engine, settings):
    counts = [4 * n - len(prompt) % 4 + 1 for n, prompt in enumerate(PROMPTS, 1)]  # whole blocks, and the token behind the last
    params = [
        SamplingParams(
            max_tokens=count, accept_threshold=settings.get("threshold", 2.0), sub_block=settings.get("sub_block", 0), ignore_eos=True
        )
        for count in counts
    ]
    want = [decoded(prompt, count, **settings) for prompt, count in zip(PROMPTS, counts, strict=True)]
    for _ in range(2):  # the second time from the prefix cache
        assert [(o.token_ids, o.nfe) for o in engine.generate(PROMPTS, params)] == want
    assert engine.stats["prefix_cache_hits"] > 0


def full(count: int, **settings) -> SamplingParams:
    return SamplingParams(**{"max_tokens": count, "accept_threshold": 2.0, "sub_block": 0, "ignore_eos": True} | settings)


def test_a_prompt_that_fills_its_blocks_needs_one_forward_for_one_token(engine):
    (output,) = engine.generate([PROMPTS[4]], full(1))
    assert (output.token_ids, output.nfe) == decoded(PROMPTS[4], 1)
    assert output.nfe == 1


@pytest.mark.parametrize("prompt", [PROMPTS[4], PROMPTS[1]], ids=["after the prompt", "after a block"])
def test_the_first_token_of_a_block_may_end_the_output(engine, prompt):
    at = -len(prompt) % BLOCK
    whole = decoded(prompt, at + 1)[0]
    assert whole[at] not in whole[:at]
    (output,) = engine.generate([prompt], full(20, stop_token_ids=[whole[at]]))
    assert (output.token_ids, output.finish_reason, output.nfe) == (whole[:at], "stop", at + 1)


def test_min_tokens_holds_for_it_too(engine):
    token = decoded(PROMPTS[4], 1)[0][0]
    (output,) = engine.generate([PROMPTS[4]], full(3, stop_token_ids=[token], min_tokens=3))
    assert len(output.token_ids) == 3 and token not in output.token_ids


def test_it_is_the_best_token_at_any_temperature(engine):
    outputs = engine.generate([PROMPTS[4]] * 4, [full(4, temperature=5.0, seed=seed) for seed in range(4)])
    assert {o.token_ids[0] for o in outputs} == {decoded(PROMPTS[4], 1)[0][0]}
    assert len({tuple(o.token_ids) for o in outputs}) == 4


def test_steps_and_probabilities_are_told(engine):
    (output,) = engine.generate([PROMPTS[4]], full(9, logprobs=True, return_step_map=True))
    first = [step[0] if isinstance(step, (tuple, list)) else step for step in output.step_map]
    assert (first[0], first[4], first[8]) == (1, 5, 9)
    p = say(PROMPTS[4])[len(PROMPTS[4]) - 1].max()
    assert output.logprobs[0] == pytest.approx(np.log(p), rel=1e-4)


def test_given_tokens_stay_and_a_whole_block_of_them_needs_no_forward_of_its_own(engine):
    """Pinned: the first of a block, and then a whole block, of which only the KV is still to be written."""
    prompt = PROMPTS[4]
    (output,) = engine.generate([prompt], full(4, pinned={0: 17}))
    assert output.token_ids[0] == 17 and output.nfe == 4
    pinned = {0: 1, 1: 2, 2: 3, 3: 4}
    (output,) = engine.generate([prompt], full(5, pinned=pinned))
    assert output.token_ids == [1, 2, 3, 4, *decoded([*prompt, 1, 2, 3, 4], 1)[0]]
    assert output.nfe == 2


def test_no_rule_edits_the_first_token_of_a_block():
    """Nothing that a forward over the block says speaks of it; the others are edited, initial tokens too."""
    engine = Engine(MODEL, PARAMS, strategy="llada2_edit", max_slots=2, max_model_len=LONGEST, page_size=BLOCK, warm_up=False)
    prompt, params = PROMPTS[4], full(8, accept_threshold=0.2, edit_threshold=0.0, init_tokens={0: 17, 1: 18, 2: 19, 3: 20})
    (output,) = engine.generate([prompt], params)
    assert output.token_ids[0] == 17
    p = say([*prompt, 17, 18, 19, 20])
    (first,) = engine.generate([prompt], dataclasses.replace(params, max_tokens=4, max_post_edit_steps=1))
    assert first.token_ids == [17, *(int(p[i].argmax()) for i in (8, 9, 10))]
    assert first.nfe == 2


def test_look_ahead_blocks_end_with_what_was_asked_for():
    """With several blocks at once the first token of a block may be guessed before the one in front of it is complete."""
    engine = Engine(
        MODEL, PARAMS, strategy="fast_dllm_v2", buffer_size=2, max_slots=4, max_model_len=LONGEST, page_size=BLOCK, warm_up=False
    )
    params = [full(17, accept_threshold=0.3) for _ in PROMPTS]
    together = engine.generate(PROMPTS, params)
    assert [len(o.token_ids) for o in together] == [17] * len(PROMPTS)
    assert [engine.generate([prompt], full(17, accept_threshold=0.3))[0].token_ids for prompt in PROMPTS] == [o.token_ids for o in together]


# Sub-blocks beside old keys and values


def cached(**settings) -> Engine:
    return Engine(MODEL, PARAMS, sub_block_cache=2, max_slots=4, max_model_len=LONGEST, warm_up=False, **settings)


def test_what_a_row_does_beside_old_keys_never_depends_on_the_others():
    """Rows that need a forward over the whole block go first; the others wait, and spend nothing."""
    engine = cached()
    params = [full(15, accept_threshold=0.3, sub_block=2, seed=i, temperature=0.5 * (i % 2)) for i in range(len(PROMPTS))]
    together = engine.generate(PROMPTS, params, trace=True)
    alone = [engine.generate([prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    assert [(o.token_ids, o.nfe) for o in together] == [(o.token_ids, o.nfe) for o in alone]
    assert all(len(o.trace) == o.nfe for o in together)


def test_old_keys_are_an_approximation_that_spends_as_many_forwards(engine):
    """At a token a step."""
    params = [full(21, sub_block=2) for _ in PROMPTS]
    exact, approximate = (one.generate(PROMPTS, params) for one in (engine, cached()))
    assert [o.nfe for o in approximate] == [o.nfe for o in exact]
    assert [o.token_ids for o in approximate] != [o.token_ids for o in exact]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sub_block_cache": 3}, "sub_block_cache=3 must divide the block_size=4"),
        ({"sub_block_cache": 2, "buffer_size": 2}, "sub_block_cache=2 does not go with buffer_size=2"),
        ({"sub_block_cache": 2, "page_size": 4}, "sub_block_cache=2 does not go with page_size=4"),
        ({"sub_block_cache": 2, "strategy": "llada2"}, "sub_block_cache=2 is not for strategy 'llada2'"),
        ({"sub_block_cache": 0}, "sub_block_cache=0 must be a positive integer"),
    ],
)
def test_what_does_not_go_with_a_cache_of_sub_blocks(settings, message):
    with pytest.raises(SettingError, match=message):
        Engine(MODEL, PARAMS, max_slots=1, max_model_len=LONGEST, **settings)


def test_a_cache_of_sub_blocks_is_refused_where_outputs_speak_of_their_own_position(golden_model):
    with pytest.raises(SettingError, match="sub_block_cache=8 is not for this model"):
        Engine.from_pretrained(golden_model, strategy="fast_dllm_v2", sub_block_cache=8)


def test_a_requests_sub_block_is_the_engines():
    with pytest.raises(SettingError, match="sub_block=3 must be 2, the engine's sub_block_cache"):
        cached().generate([[1]], full(4, sub_block=3))
