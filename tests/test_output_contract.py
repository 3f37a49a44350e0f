"""Ten thousand requests against an oracle that needs no loop: the model says the same at every forward, so the answer is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import EOS, Script, play

from diffulex_jax import SamplingParams
from diffulex_jax.engine.request import Tracked
from diffulex_jax.engine.stops import find_cut
from diffulex_jax.strategies import STRATEGIES


SLOTS, BATCHES, POSITIONS, STOP = 60, 28, 48, 11


def request(rng: np.random.Generator) -> Script:
    """A prompt, a budget, and what the model says everywhere: ordinary tokens, here and there an EOS or a stop token."""
    prompt = rng.integers(0, STOP, rng.integers(1, POSITIONS)).tolist()
    tokens = rng.integers(0, STOP, (1, POSITIONS)).astype(np.int32)
    for special in (EOS, STOP):
        if rng.random() < 0.5:
            tokens[0, rng.integers(0, POSITIONS)] = special
    params = SamplingParams(
        max_tokens=int(rng.integers(1, POSITIONS - len(prompt) + 1)),
        accept_threshold=float(rng.choice([0.0, 0.5, 0.95, 2.0])),
        num_to_transfer=int(rng.integers(1, 4)),
        denoising_steps=int(rng.integers(0, 5)),
        sub_block=int(rng.integers(0, 5)),
        entropy_bound=float(rng.choice([0.0, 0.5, 2.0])),
        ignore_eos=bool(rng.random() < 0.3),
        stop_token_ids=[STOP] if rng.random() < 0.5 else [],
        add_block_threshold=float(rng.choice([0.0, 0.3, 1.0])),
    )
    return Script(prompt, tokens, rng.uniform(0.05, 1, tokens.shape).astype(np.float32), params)


def expected(say: Script) -> tuple[list[int], str]:
    ends = set(say.params.stop_token_ids) | (set() if say.params.ignore_eos else {EOS})
    made = say.tokens[0, len(say.prompt) : len(say.prompt) + say.params.max_tokens].tolist()
    stop = next((i for i, token in enumerate(made) if token in ends), None)
    return (made, "length") if stop is None else (made[:stop], "stop")


@pytest.mark.sweep_but(
    "llada2-8-3-False",
    "dmax-8-2-True",
    "sdar_entropy-4-2-False",
    "fast_dllm_v2-4-3-True",
    "d2f-4-8-False",
    "llada_factor-8-1-False",
    "dream_threshold-4-1-True",
)
@pytest.mark.parametrize(
    ("name", "block", "window", "commit_alone"),
    [
        *(("llada2", 4, 1, False), ("llada2", 8, 3, False), ("llada2_edit", 8, 1, False), ("llada2_edit", 4, 2, False)),
        *(("dmax", 4, 3, False), ("dmax", 16, 1, False)),
        *(("sdar_leftmost", 4, 1, False), ("sdar_sequential", 8, 3, False), ("sdar_entropy", 4, 2, False)),
        *(("fast_dllm_v2", 8, 1, True), ("fast_dllm_v2", 4, 3, True), ("llada2_edit", 4, 1, True), ("dmax", 8, 2, True)),
        *(("d2f", 8, 1, False), ("d2f", 4, 8, False)),
        *(("llada", 8, 1, False), ("llada_random", 4, 1, False), ("llada_threshold", 16, 1, False), ("llada_factor", 8, 1, False)),
        *(("dream", 48, 1, False), ("dream_topk_margin", 48, 1, False), ("dream_origin", 48, 1, False), ("dream_threshold", 48, 1, False)),
        *(("dream", 8, 1, True), ("dream_origin", 16, 1, True), ("dream_threshold", 4, 1, True)),  # behind a cache
    ],
)
def test_exact_length_no_masks_and_the_right_reason(name, block, window, commit_alone):
    rng = np.random.default_rng([len(name), block, window])
    reasons = set()
    whole, kind = STRATEGIES[name].canvas == "whole", {"commit_alone": commit_alone, "prompt_apart": name == "d2f"}
    for _ in range(BATCHES):
        say = [request(rng) for _ in range(SLOTS)]
        if whole:  # blocks of any length, from the prompt's end on
            lengths = [0] * SLOTS if STRATEGIES[name].rule.one_block and not commit_alone else rng.integers(0, block + 1, SLOTS).tolist()
            say = [dataclasses.replace(s, params=dataclasses.replace(s.params, block_length=n)) for s, n in zip(say, lengths, strict=True)]
        sizes = {"block": block, "pages": POSITIONS // block, "window": window, "steps": 4 * POSITIONS}
        kind |= {"whole_canvas": whole, "cached_canvas": whole and commit_alone}
        played, _state = play(STRATEGIES[name].rule, *say, **sizes, **kind)
        for one, script in zip(played, say, strict=True):
            assert (one.tokens, one.reason) == expected(script)
            reasons.add(one.reason)
    assert reasons == {"length", "stop"}


class Letters:
    """A tokenizer whose tokens are texts of one to three letters."""

    pieces = ("a", "b", "c", "ab", "ba", "abc", "é", "cab")

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


@given(
    ids=st.lists(st.integers(0, 7), max_size=30),
    stops=st.lists(st.text("abcé", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_a_stop_text_is_found_wherever_tokens_and_blocks_begin(ids, stops, cuts):
    """However the tokens arrive: the text ends before the first stop text that any prefix of the tokens shows."""
    letters = Letters()
    tracked = Tracked(id=0, prompt=np.zeros(1, np.int32), params=SamplingParams(stop=tuple(stops)))
    found = None
    for upto in [*sorted(c for c in cuts if c < len(ids)), len(ids)]:
        tracked.tokens = ids[:upto]
        if found := find_cut(tracked, letters):
            break
    prefixes = (letters.decode(ids[:n]) for n in range(len(ids) + 1))
    text = next((text for text in prefixes if any(stop in text for stop in stops)), None)
    if text is None:
        assert found is None
    else:
        assert found.reason == "stop"
        assert found.text == text[: min(text.index(stop) for stop in stops if stop in text)]
        assert found.text.startswith(letters.decode(ids[: found.length]))
