"""The engine: what a caller asked for is what comes back, whatever else is in the batch."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest
from plain import attend_to, probabilities, sees
from small import BLOCK, EOS, LONGEST, MASK, MODEL, SIZES, SLOTS, VOCAB, full, prompt

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import checkpoint


GOLDEN = pathlib.Path(__file__).parent / "golden"
STRATEGIES = ("llada2", "llada2_edit", "dmax")


@pytest.fixture(scope="module")
def engine(engine_of):
    def of(strategy: str = "llada2") -> Engine:
        return engine_of(MODEL, strategy=strategy, **SIZES)

    return of


# max_tokens, max_model_len, max_nfe


@pytest.mark.sweep_but("llada2_edit", "dmax")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_max_tokens_is_the_number_of_real_tokens(engine, strategy):
    """Look-ahead and the rest of the last block do not count; a mask never comes out."""
    wanted = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 77, 99, 100]
    outputs = engine(strategy).generate([prompt(1 + n % 13, n) for n in wanted], [full(n, accept_threshold=0.5) for n in wanted])
    assert [len(output.token_ids) for output in outputs] == wanted
    assert {output.finish_reason for output in outputs} == {"length"}
    assert all(0 <= token < VOCAB and token != MASK for output in outputs for token in output.token_ids)


def test_eos_is_left_out_and_ends_the_request(engine):
    prompts = [prompt(n) for n in (3, 9, 20, 30)]
    on = engine().generate(prompts, full(100, accept_threshold=0.3))
    until = engine().generate(prompts, SamplingParams(max_tokens=100, accept_threshold=0.3))
    assert {output.finish_reason for output in until} >= {"stop"}
    for a, b in zip(on, until, strict=True):
        want = a.token_ids[: a.token_ids.index(EOS)] if EOS in a.token_ids else a.token_ids
        assert b.token_ids == want
        assert b.finish_reason == ("stop" if EOS in a.token_ids else "length")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_request_may_fill_max_model_len(engine, strategy):
    """To the last position, which is also the last of a block, and not one further; with another request beside it."""
    long, short = engine(strategy).generate([prompt(LONGEST - 20), prompt(3)], [full(20), full(5)])
    assert (len(long.token_ids), len(short.token_ids)) == (20, 5)
    with pytest.raises(ValueError, match=f"prompt 1 has {LONGEST - 19} tokens; with max_tokens=20 that exceeds max_model_len={LONGEST}"):
        engine(strategy).generate([prompt(3), prompt(LONGEST - 19)], full(20))


def test_max_nfe_returns_the_contiguous_prefix(engine):
    """llada2 revises nothing: after n forwards it has the tokens of the first n, and returns them up to the first gap."""
    settings = {"accept_threshold": 0.6, "return_step_map": True}
    whole = engine().generate([prompt(5)], full(30, **settings))[0]
    lengths = []
    for n in range(1, whole.nfe):
        cut = engine().generate([prompt(5)], full(30, **settings, max_nfe=n))[0]
        filled = [first <= n for first, _last in whole.step_map] + [False]
        assert (cut.finish_reason, cut.nfe) == ("max_nfe", n)
        assert cut.token_ids == whole.token_ids[: filled.index(False)]
        lengths.append((len(cut.token_ids), sum(filled)))
    assert any(contiguous < filled for contiguous, filled in lengths)
    assert len(set(lengths)) > 3
    assert engine().generate([prompt(5)], full(30, **settings, max_nfe=whole.nfe))[0].finish_reason == "length"


@pytest.mark.parametrize("beside", [0, 3])
def test_a_slow_request_is_given_up_after_a_warm_up(engine, beside):
    """One token a forward: fewer than 1.01 are too few, and known to be from the first forward that counts on, in any batch."""
    others = [(prompt(20 + n), full(50 + n)) for n in range(beside)]
    slow = {"accept_threshold": 1.0}
    cases = [full(64, **slow, min_tokens_per_forward=least) for least in (0.0, 1.0, 1.01)]
    whole, fast_enough, given_up = (engine().generate(*zip((prompt(8), case), *others, strict=True))[0] for case in cases)
    assert (whole.finish_reason, whole.nfe) == ("length", 64)
    assert (fast_enough.finish_reason, fast_enough.token_ids) == ("length", whole.token_ids)
    assert (given_up.finish_reason, given_up.nfe) == ("max_nfe", 4 * BLOCK)
    assert given_up.token_ids == whole.token_ids[: 4 * BLOCK]


# Errors, before anything is computed


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "prompt 1 is empty"),
        ([3, VOCAB], r"prompt 1 holds token id 1024, outside the vocabulary \[0, 1024\)"),
        ([-1], "prompt 1 holds token id -1, outside"),
        ([2**40], "prompt 1 holds token id 1099511627776, outside"),
        ([1.5], r"prompt 1 must be text or a list of token ids, got \[1.5\]"),
        ([True], r"prompt 1 must be text or a list of token ids, got \[True\]"),
        ([[1, 2]], r"prompt 1 must be text or a list of token ids, got \[\[1, 2\]\]"),
        (None, "prompt 1 must be text or a list of token ids, got None"),
        ("text", "prompt 1 is text, and this model has no tokenizer"),
        (prompt(LONGEST), f"prompt 1 has {LONGEST} tokens; with max_tokens=6 that exceeds max_model_len={LONGEST}"),
    ],
)
def test_a_bad_prompt_is_named_and_harms_nobody(engine, bad, message):
    before = engine().generate([prompt(9)], full(6))[0]
    with pytest.raises(ValueError, match=message):
        engine().generate([prompt(9), bad], full(6))
    assert engine().generate([prompt(9)], full(6))[0].token_ids == before.token_ids


def test_settings_and_prompts_are_counted(engine):
    with pytest.raises(ValueError, match="1 SamplingParams for 2 prompts"):
        engine().generate([[1], [2]], [full(3)])
    assert engine().generate([]) == []


def test_an_interrupted_call_leaves_the_engine_usable(engine, monkeypatch):
    """Ctrl-C in the middle of a full house, more than once: no slot and no page stays taken, and no row writes on."""
    one = engine()
    house, params = [prompt(LONGEST - 160, i) for i in range(SLOTS)], full(160)
    next_door = prompt(LONGEST - 60)
    before = [o.token_ids for o in one.generate(house, params)]
    alone = one.generate([next_door], full(60))[0].token_ids
    launch, calls = one._device.launch, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return launch(*args, **kwargs)

    for _ in range(3):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(one._device, "launch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                one.generate(house, params)
        assert len(calls) == 2
        assert one.generate([next_door], full(60))[0].token_ids == alone
    assert [o.token_ids for o in one.generate(house, params)] == before


# Batches


MIXED = [
    (prompt(n, 1), SamplingParams(max_tokens=m, ignore_eos=i % 2 == 0, accept_threshold=a, **more))
    for i, (n, m, a, more) in enumerate(
        [
            (1, 40, 0.9, {}),
            (8, 9, 0.3, {}),
            (23, 33, 0.5, {"temperature": 0.8, "seed": 3}),
            (64, 16, 0.1, {"edit_threshold": 0.0, "settle_threshold": 0.5}),
            (130, 1, 0.7, {"penalty_lambda": 2.0}),
            (16, 50, 0.5, {"temperature": 0.8, "seed": 4, "top_p": 0.9, "top_k": 20}),
            (40, 25, 0.2, {"remask_threshold": 0.3}),
            (5, 60, 0.9, {"max_nfe": 4}),
            (31, 12, 1.0, {"num_to_transfer": 3}),
        ]
    )
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_of_everything_equals_each_alone(engine, strategy):
    """Different lengths and settings, more requests than slots, in two orders."""
    alone = [engine(strategy).generate([p], s)[0] for p, s in MIXED]
    together = engine(strategy).generate(*zip(*MIXED, strict=True))
    backwards = engine(strategy).generate(*zip(*MIXED[::-1], strict=True))[::-1]

    def told(output):
        return output.token_ids, output.finish_reason, output.nfe, output.revised_tokens, output.remasked_tokens, output.prompt_token_ids

    assert [told(o) for o in together] == [told(o) for o in alone]
    assert [told(o) for o in backwards] == [told(o) for o in alone]


def test_a_seed_means_the_same_in_any_batch(engine):
    def sampled(seed: int) -> SamplingParams:
        return full(30, temperature=1.0, seed=seed)

    p = prompt(11)
    alone = [engine().generate([p], sampled(seed))[0].token_ids for seed in (0, 1)]
    outputs = engine().generate([prompt(30), p, p, p], [full(50), sampled(1), sampled(0), sampled(1)])
    assert [o.token_ids for o in outputs[1:]] == [alone[1], alone[0], alone[1]]
    assert alone[0] != alone[1]


def test_positions_draw_for_themselves(engine):
    """So hot that all of 1023 tokens are about as likely: 60 draws hardly ever repeat one."""
    ids = engine().generate([prompt(11)], full(60, temperature=1e4, seed=0))[0].token_ids
    assert len(set(ids)) > 50


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sampling_from_one_token_is_greedy(engine, strategy):
    prompts = [prompt(n) for n in (4, 17)]
    greedy = engine(strategy).generate(prompts, full(30, accept_threshold=0.5))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        outputs = engine(strategy).generate(prompts, full(30, accept_threshold=0.5, temperature=1.5, seed=9, **narrow))
        assert [(o.token_ids, o.nfe) for o in outputs] == [(o.token_ids, o.nfe) for o in greedy]


# Prompts of any length, and no compilation for them


@pytest.fixture(scope="module")
def recompute():
    """LLaDA2.0's rule over a dense forward of the whole sequence: no cache, no window, no batch."""
    model, params = checkpoint.load(GOLDEN / MODEL, make_mesh())

    @jax.jit
    def forward(ids):
        p, _ = probabilities(model, params, ids, attend_to(sees(LONGEST, BLOCK)))
        return p.argmax(-1), p.max(-1)

    def decode(prompt: list[int], n: int, accept: float) -> list[int]:
        x = np.full(LONGEST, MASK)
        x[: len(prompt)] = prompt
        for start in range(len(prompt) // BLOCK * BLOCK, len(prompt) + n, BLOCK):
            while (open_ := np.flatnonzero(x[start : start + BLOCK] == MASK) + start).size:
                best, prob = (np.asarray(a) for a in forward(x))
                fill = open_[prob[open_] > accept]
                fill = fill if fill.size else open_[[prob[open_].argmax()]]
                x[fill] = best[fill]
        return x[len(prompt) : len(prompt) + n].tolist()

    return decode


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 24, 32, 40, 8 * 16, 8 * 16 + 5, 8 * 21, 8 * 29 + 7])
def test_prompts_of_any_length(engine, recompute, n):
    """Prefilled in chunks of 16, 4 and 1 blocks; a whole number of blocks leaves no prompt in the window."""
    output = engine().generate([prompt(n)], full(16, accept_threshold=0.6))[0]
    assert output.token_ids == recompute(prompt(n), 16, 0.6)
    assert output.prompt_token_ids == prompt(n)


COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: COMPILATIONS.append(name) if name.endswith("backend_compile_duration") else None
)


def test_nothing_is_compiled_after_the_engine_is_built():
    """Not for new prompt lengths, batch sizes or settings: also where the compilation cache would have it, it counts."""
    COMPILATIONS.clear()
    engine = Engine.from_pretrained(str(GOLDEN / MODEL), strategy="dmax", **SIZES)
    assert COMPILATIONS
    COMPILATIONS.clear()
    engine.generate([prompt(1)], full(3))
    engine.generate(*zip(*MIXED, strict=True))
    engine.generate([prompt(n) for n in (2, 33, 150, 222)], full(20, temperature=1.0, top_p=0.9))
    assert not COMPILATIONS
