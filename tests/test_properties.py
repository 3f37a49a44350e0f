"""What holds for any input: the rules on random predictions, and the reference kernels against NumPy in float64."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scripted import EOS, Script, play

from diffulex_jax import SamplingParams
from diffulex_jax.rules import chain, edit, entropy_bounded, in_sub_blocks, levenshtein, remask
from diffulex_jax.strategies import dmax, fast_dllm_v2, llada2, llada2_edit, sdar_leftmost, sdar_sequential
from pallas_kernels import block_attention, prediction, token_merge


seeds = st.integers(0, 2**31 - 1)
shares = st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0, 2.0])


# The rules

BLOCK, PAGES = 4, 3
RULES = {
    "llada2": llada2(),
    "llada2_edit": llada2_edit(),
    "llada2_levenshtein": levenshtein(delete_id=EOS - 3, split_id=EOS - 2),
    "dmax": dmax(),
    "dmax fast": dmax(mode="fast"),
    "sdar_leftmost": sdar_leftmost(),
    "sdar_sequential": sdar_sequential(),
    "sdar_entropy with edit": chain(entropy_bounded(), edit(), remask()),
    "fast_dllm_v2": fast_dllm_v2(),
    "fast_dllm_v2 with edit": in_sub_blocks(llada2_edit()),
}
ALONE = ("fast_dllm_v2", "fast_dllm_v2 with edit", "dmax")  # commit alone
MOST_POST_STEPS = 3
BUDGET = 4 * BLOCK + MOST_POST_STEPS


@st.composite
def requests(draw, positions: int = BLOCK * PAGES) -> Script:
    """A prompt, settings, and a model that says something else at every forward."""
    rng = np.random.default_rng(draw(seeds))
    prompt = rng.integers(0, EOS, draw(st.integers(1, positions - 1))).tolist()
    # Few tokens make agreement likely, small shares make doubt likely; EOS is one of them at times.
    tokens = rng.integers(EOS - draw(st.integers(1, 4)), EOS + draw(st.integers(0, 1)), (BUDGET, positions)).astype(np.int32)
    probs, current = (rng.uniform(0, 1, (BUDGET, positions)).astype(np.float32) ** draw(st.sampled_from([0.1, 1.0, 4.0])) for _ in "pc")
    params = SamplingParams(
        max_tokens=draw(st.integers(1, positions - len(prompt))),
        accept_threshold=draw(shares),
        edit_threshold=draw(shares),
        remask_threshold=draw(shares),
        settle_threshold=draw(shares),
        num_to_transfer=draw(st.integers(1, 5)),
        denoising_steps=draw(st.integers(0, BLOCK)),
        sub_block=draw(st.integers(0, BLOCK)),
        entropy_bound=draw(shares),
        max_post_edit_steps=draw(st.integers(0, MOST_POST_STEPS)),
        max_nfe=draw(st.sampled_from([None, None, 1, 5])),
        ignore_eos=draw(st.booleans()),
        add_block_threshold=draw(shares),
        semi_complete_threshold=draw(shares),
        token_stability_threshold=draw(shares),
    )
    return Script(prompt, tokens, probs, params, current)


@pytest.mark.sweep_but(
    "llada2-False-1",
    "llada2_levenshtein-False-2",
    "dmax-False-2",
    "sdar_leftmost-False-2",
    "sdar_entropy with edit-False-2",
    "fast_dllm_v2-True-1",
    "dmax-True-1",
)
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(("name", "alone"), [(name, False) for name in RULES] + [(name, True) for name in ALONE])
@settings(max_examples=50)
@given(pair=st.tuples(requests(), requests()))
def test_rules_on_any_prediction(name, alone, window, pair):
    steps = PAGES * (BUDGET + alone)
    played, _state = play(RULES[name], *pair, block=BLOCK, pages=PAGES, window=window, steps=steps, commit_alone=alone)
    for request, one in zip(pair, played, strict=True):
        params, prompt = request.params, list(request.prompt)
        # It ends, and with what was asked for.
        assert one.reason is not None
        assert len(one.tokens) == params.max_tokens or one.reason != "length"
        assert len(one.tokens) < params.max_tokens or one.reason != "stop"
        assert one.nfe == len(one.trace) <= (params.max_nfe or steps)
        assert set(one.tokens) <= set(range(EOS + params.ignore_eos))
        # No block is open for longer than its budget.
        longest = max(len(list(group)) for _, group in itertools.groupby(one.starts))
        assert longest <= 4 * BLOCK + params.max_post_edit_steps + alone
        # The prompt stays, unmasked, whatever the model says there; a mask id is never written.
        for start, window_tokens in zip(one.starts, one.trace, strict=True):
            given_here = max(0, len(prompt) - start)
            assert window_tokens[:given_here] == prompt[start:]
            assert all(token is None or 0 <= token <= EOS for token in window_tokens)
        # Counters are the sum of what the trace shows.
        assert (one.revised, one.remasked) == (sum(one.revised_a_step), sum(one.remasked_a_step))
        if name == "llada2_levenshtein":
            assert not set(one.tokens) & {EOS - 3, EOS - 2}  # deletions and insertions happen; they are not written
        else:
            assert one.remasked <= 2 * params.max_tokens + 2 * BLOCK * window
            assert one.remasked == 0 or params.remask_threshold > 0
        if params.remask_threshold == 0:
            if name in ("llada2", "sdar_leftmost", "sdar_sequential", "fast_dllm_v2"):
                assert one.revised == 0


@pytest.mark.sweep_but("llada2_edit", "llada2_levenshtein", "dmax", "fast_dllm_v2 with edit")
@pytest.mark.parametrize("name", RULES)
@settings(max_examples=20)
@given(pair=st.tuples(requests(), requests()))
def test_rows_do_not_see_each_other(name, pair):
    """Alone, first or last in a batch: the same tokens in the same steps."""
    together, _state = play(RULES[name], *pair, block=BLOCK, pages=PAGES, steps=PAGES * BUDGET)
    swapped, _state = play(RULES[name], *pair[::-1], block=BLOCK, pages=PAGES, steps=PAGES * BUDGET)
    assert together == swapped[::-1]
    twice, _state = play(RULES[name], pair[0], pair[0], block=BLOCK, pages=PAGES, steps=PAGES * BUDGET)
    assert twice == [together[0]] * 2


# prediction.predict

ROWS, VOCAB = 6, 12
jit_predict = functools.partial(jax.jit, static_argnames="top_k")(prediction.predict)


def logits_with_ties(rng) -> np.ndarray:
    return rng.integers(-6, 7, (ROWS, VOCAB)).astype(np.float32) / 2


def sampling(seed: int, *, temperature, top_p=1.0, top_k=0, rows: int = ROWS) -> prediction.Sampling:
    keys = jax.random.split(jax.random.key(seed), rows)
    return prediction.Sampling(keys, jnp.full(rows, temperature), jnp.full(rows, top_p), jnp.full(rows, top_k))


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@given(seed=seeds, forbidden=st.integers(0, VOCAB - 1))
def test_predict_greedy(seed, forbidden):
    rng = np.random.default_rng(seed)
    logits, current = logits_with_ties(rng), rng.integers(0, VOCAB, ROWS)
    penalized, penalty = rng.integers(-1, VOCAB, ROWS), rng.uniform(0, 3, ROWS).astype(np.float32)
    best = jit_predict(
        logits, current, forbidden_id=forbidden, sampling=sampling(0, temperature=0.0), penalized=penalized, penalty=penalty, top_k=3
    )
    want = logits.copy()
    for row in range(ROWS):
        if penalized[row] >= 0:
            want[row, penalized[row]] -= penalty[row]
    want[:, forbidden] = -np.inf
    p = softmax(want)
    order = np.argsort(-want, axis=-1, kind="stable")  # ties by the lower id
    assert best.token.tolist() == order[:, 0].tolist()
    assert best.top_ids.tolist() == order[:, :3].tolist()
    np.testing.assert_allclose(best.prob, p.max(-1), rtol=1e-5)
    np.testing.assert_allclose(best.current_prob, p[np.arange(ROWS), current], rtol=1e-5)
    np.testing.assert_allclose(best.top_probs, np.take_along_axis(p, order[:, :3], -1), rtol=1e-5)
    only = jit_predict(
        logits, current, forbidden_id=forbidden, sampling=sampling(0, temperature=0.0), penalized=penalized, penalty=penalty, top_k=1
    )
    assert only.top_ids[:, 0].tolist() == best.token.tolist()


def kept_by_sorting(logits: np.ndarray, *, temperature: float, top_p: float, top_k: int) -> tuple[set[int], float]:
    """The tokens that may be drawn, and how far the nearest cumulative probability is from ``top_p``."""
    p = softmax(logits / temperature)
    order = np.argsort(-logits, kind="stable")
    floor = logits[order[min(top_k, len(order)) - 1]] if top_k else -np.inf
    order = [i for i in order if logits[i] >= floor and p[i] > 0]  # ties at the cut stay together
    total, kept, margin = p[order].sum(), [], np.inf
    for i in order:
        if kept and logits[i] < logits[kept[-1]]:
            reached = p[kept].sum() / total
            margin = min(margin, abs(reached - top_p))
            if reached >= top_p:
                break
        kept.append(i)
    return set(map(int, kept)), margin


DRAWS = 1500


@settings(max_examples=40)
@given(
    seed=seeds,
    forbidden=st.integers(0, VOCAB - 1),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.25, 0.01]),
    top_k=st.sampled_from([0, 1, 2, 5, VOCAB, 100]),
)
def test_sampling_draws_from_the_cut_off_set_and_all_of_it(seed, forbidden, temperature, top_p, top_k):
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 4, VOCAB).astype(np.float32) / 2  # every token has a chance above 1 %
    allowed = logits.copy()
    allowed[forbidden] = -np.inf
    want, margin = kept_by_sorting(allowed, temperature=temperature, top_p=top_p, top_k=top_k)
    assume(top_p == 1.0 or margin > 1e-4)
    best = jit_predict(
        np.tile(logits, (DRAWS, 1)),
        np.zeros(DRAWS, np.int32),
        forbidden_id=forbidden,
        sampling=sampling(seed, temperature=temperature, top_p=top_p, top_k=top_k, rows=DRAWS),
    )
    drawn = set(best.token.tolist())
    assert drawn <= want
    likely = {i for i in want if softmax(allowed / temperature)[i] > 0.01}
    assert drawn >= likely
    # A threshold means the same at every temperature: probabilities are those of temperature 1.
    np.testing.assert_allclose(best.prob, softmax(allowed)[best.token], rtol=1e-5)


def test_sampling_frequencies():
    """Logits 0, ln 2, ln 3 at temperature 1 are 1/6, 2/6, 3/6; at 0.5 they are 1/14, 4/14, 9/14."""
    rows = 20_000
    logits = np.tile(np.log(np.array([1, 2, 3, 99], np.float32)), (rows, 1))
    for temperature, odds in ((1.0, [1, 2, 3]), (0.5, [1, 4, 9])):
        best = jit_predict(logits, np.zeros(rows, np.int32), forbidden_id=3, sampling=sampling(7, temperature=temperature, rows=rows))
        np.testing.assert_allclose(np.bincount(best.token, minlength=4)[:3] / rows, np.array(odds) / sum(odds), atol=0.015)


@given(seed=seeds)
def test_top_k_1_is_greedy_and_rows_are_their_own(seed):
    rng = np.random.default_rng(seed)
    logits, current = rng.normal(size=(ROWS, VOCAB)).astype(np.float32), np.zeros(ROWS, np.int32)
    one = jit_predict(logits, current, forbidden_id=3, sampling=sampling(seed, temperature=2.0, top_k=1))
    greedy = jit_predict(logits, current, forbidden_id=3, sampling=sampling(seed, temperature=0.0))
    assert one.token.tolist() == greedy.token.tolist()
    mixed = sampling(seed, temperature=2.0)._replace(temperature=jnp.array([2.0, 0.0] * 3))
    half = jit_predict(logits, current, forbidden_id=3, sampling=mixed).token.tolist()
    hot = jit_predict(logits, current, forbidden_id=3, sampling=sampling(seed, temperature=2.0)).token.tolist()
    assert half == [h if i % 2 == 0 else int(greedy.token[i]) for i, h in enumerate(hot)]


# token_merge.merge


@given(seed=seeds, top_k=st.integers(1, 3), spec=st.sampled_from([{}, {"renormalize": False}, {"mode": "iter_smooth_topk", "weight": 0.3}]))
def test_merge(seed, top_k, spec):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(VOCAB, 5)).astype(np.float32)
    tokens, soft, mask = rng.integers(0, VOCAB, (2, 4)), rng.random((2, 4)) < 0.5, int(rng.integers(VOCAB))
    ids = rng.integers(0, VOCAB, (2, 4, top_k))
    probs = rng.dirichlet(np.ones(top_k + 1), (2, 4))[..., :top_k].astype(np.float32)
    spec = token_merge.MergeSpec(top_k=top_k, **spec)
    got = token_merge.merge(jnp.array(table), tokens, mask_id=mask, ids=ids, probs=probs, soft=soft, spec=spec)
    e, p = table.astype(np.float64), probs.astype(np.float64)
    for at in np.ndindex(2, 4):
        want = e[tokens[at]]
        if soft[at]:
            mix = sum(p[at][j] * e[ids[at][j]] for j in range(top_k))
            if spec.mode == "iter_smooth_topk":
                want = want + spec.weight * mix
            else:
                rest = 1 - p[at].sum()
                want = mix + rest * e[mask]
                if spec.renormalize:
                    norm = sum(p[at][j] * np.linalg.norm(e[ids[at][j]]) for j in range(top_k)) + rest * np.linalg.norm(e[mask])
                    want = want * norm / np.linalg.norm(want)
        np.testing.assert_allclose(got[at], want, rtol=1e-4, atol=1e-5)


# block_attention

LAYERS, KV, GROUP, HEAD = 2, 2, 3, 4


@st.composite
def attention_inputs(draw, block: int, pages_per_row: int, rows: int = 3, blocks: int = 3):
    rng = np.random.default_rng(draw(seeds))
    pages = rows * pages_per_row + 1

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    # Pages in any order; past a row's prefix the table may hold anything, also "none".
    table = rng.permutation(rows * pages_per_row).reshape(rows, pages_per_row).astype(np.int32)
    prefix = np.array([draw(st.integers(0, pages_per_row)) for _ in range(rows)])
    table = np.where(np.arange(pages_per_row) < prefix[:, None], table, rng.choice([0, pages, pages + 7], table.shape)).astype(np.int32)
    lanes = np.array([draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks)) for _ in range(rows)])
    pool = [normal(LAYERS, pages, block, KV, HEAD) for _ in "kv"]
    heads = normal(rows, blocks * block, KV, GROUP + 2, HEAD)
    return heads, *pool, draw(st.integers(0, LAYERS - 1)), table, (prefix * block).astype(np.int32), lanes


@functools.partial(jax.jit, static_argnames="leading")
def jit_attention(heads, pool_k, pool_v, layer, page_table, prefix_len, lanes, *, leading):
    """All W queries, or the first block and the rest apart, as a forward with a pending block does it."""
    keys = block_attention.Keys(pool_k, pool_v, page_table, prefix_len, lanes)
    attend = functools.partial(block_attention.block_attention, layer=layer, block=heads.shape[1] // lanes.shape[1])
    if not leading:
        return attend(heads, keys)
    first, rest = heads[:, :leading], heads[:, leading:]
    own, others = keys._replace(lanes=lanes[:, :1]), keys._replace(lanes=lanes[:, 1:])
    return jnp.concatenate([attend(first, own), attend(rest, others, pending=(first, lanes[:, 0]))], 1)


def dense_attention(heads, pool_k, pool_v, layer, table, prefix, lanes):
    """One query at a time: the cached positions, then the window's live blocks up to its own."""
    q, k, v = block_attention.split_heads(heads)
    block, out = pool_k.shape[2], np.zeros(q.shape)
    for r in range(len(q)):
        cached = [(table[r, p // block], p % block) for p in range(prefix[r])]
        for t in range(q.shape[1]):
            here = [s for s in range(q.shape[1]) if s // block == t // block or (s // block < t // block and lanes[r, s // block])]
            keys = np.array([pool_k[layer, page, i] for page, i in cached] + [k[r, s] for s in here], np.float64)
            values = np.array([pool_v[layer, page, i] for page, i in cached] + [v[r, s] for s in here], np.float64)
            weight = softmax(np.einsum("kgh,skh->kgs", q[r, t], keys) / np.sqrt(q.shape[-1]))
            out[r, t] = np.einsum("kgs,skh->kgh", weight, values)
    return out


@pytest.mark.parametrize(("block", "pages"), [(4, 3), (64, 5)])  # 320 positions take more than one pass over the prefix
@settings(max_examples=4)
@given(data=st.data())
def test_block_attention(block, pages, data):
    inputs = data.draw(attention_inputs(block, pages, **({} if block == 4 else {"rows": 2, "blocks": 2})))
    lanes = np.repeat(inputs[-1], block, 1)
    want = np.where(lanes[..., None, None, None], dense_attention(*inputs), 0)
    for leading in (0, block):
        got = np.where(lanes[..., None, None, None], jit_attention(*inputs, leading=leading), 0)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@given(data=st.data())
def test_block_attention_of_a_row_is_its_own_to_the_bit(data):
    """The other rows, and what stands in pages that are not the row's, change nothing."""
    heads, pool_k, pool_v, layer, table, prefix, lanes = data.draw(attention_inputs(4, 3))
    before = np.asarray(jit_attention(heads, pool_k, pool_v, layer, table, prefix, lanes, leading=4))[0]
    heads, pool_k, pool_v = (np.array(a) for a in (heads, pool_k, pool_v))
    heads[1:] += 1
    mine = table[0, : prefix[0] // 4]
    others = np.setdiff1d(np.arange(pool_k.shape[1]), mine)
    pool_k[:, others], pool_v[:, others] = 7, -7
    prefix, lanes = np.array([prefix[0], 12, 0], np.int32), np.vstack([lanes[:1], [[True, True, False], [False, True, True]]])
    table = np.vstack([table[:1], others[[[0, 1, 2], [2, 1, 0]]]]).astype(np.int32)
    after = np.asarray(jit_attention(heads, pool_k, pool_v, layer, table, prefix, lanes, leading=4))[0]
    live = np.repeat(lanes[0], 4)
    np.testing.assert_array_equal(before[live], after[live])


@given(seed=seeds)
def test_write_blocks(seed):
    rng = np.random.default_rng(seed)
    pool, fresh = rng.normal(size=(2, 5, 4, 1, 3)).astype(np.float32), rng.normal(size=(2, 3, 4, 1, 3)).astype(np.float32)
    pages = np.where(rng.random(3) < 0.5, rng.permutation(5)[:3], 5 + rng.integers(0, 3, 3))
    got = np.asarray(block_attention.write_blocks(jnp.array(pool), fresh, pages, np.zeros(3, np.int32)))
    for page, row in zip(pages, range(3), strict=True):
        if page < 5:
            pool[:, page] = fresh[:, row]
    np.testing.assert_array_equal(got, pool)
