"""Token for token what public implementations decode, and their logits (sources: golden/README.md)."""

from __future__ import annotations

import functools
import pathlib

import numpy as np
import pytest
import replay
from plain import attend_to, logits_of, sees

from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import checkpoint


GOLDEN = pathlib.Path(__file__).parent / "golden"
SDAR = ("families/tiny-sdar", "families/tiny-sdar-trained", "families/tiny-sdar-moe")
FAST_DLLM = ("families/tiny-fast-dllm-v2", "families/tiny-fast-dllm-v2-trained")
LLADA = ("families/tiny-llada", "families/tiny-llada-moe")
DREAM = ("families/tiny-dream",)
CHECKPOINTS = ("tiny-llada2", "tiny-llada2-trained", *SDAR, *FAST_DLLM, *LLADA, *DREAM)

# The only cases that are stable in float64 and not held against ours.
LEFT_OUT = {
    ("tiny-llada2", "diffusers-16"): "an EOS ends it although tokens before it would still be edited",
    ("tiny-llada2", "diffusers-18"): "run with the pipeline's own 2-D mask: plainly causal, not block-causal",
    ("tiny-llada2-trained", "diffusers-18"): "run with the pipeline's own 2-D mask: plainly causal, not block-causal",
    ("families/tiny-sdar", "tiny-sdar.gen-4"): (
        "generate.py measures the confidence after top-k: with top_k=1 it is 1, so a block takes one step"
    ),
    ("families/tiny-llada", "llada-16"): "the peer draws the order by a generator of its own",
    ("families/tiny-llada-moe", "llada-14"): "the peer draws the order by a generator of its own",
    ("families/tiny-dream", "dream-22"): "the peer draws the order by a generator of its own",
}


@functools.cache
def recorded(name: str) -> list[replay.Case]:
    return [case for path in sorted(GOLDEN.glob(f"{name}.*.json")) for case in replay.load(path, GOLDEN / name)]


def cases(*, fp64_same: bool = True) -> list:
    return [
        pytest.param(name, case, id=f"{case.checkpoint}-{case.peer}-{case.id}")
        for name in CHECKPOINTS
        for case in recorded(name)
        if case.recorded["fp64_same"] == fp64_same and (name, case.id) not in LEFT_OUT
    ]


@pytest.fixture(scope="module")
def decoded(engine_of):
    """``decoded(checkpoint, case)``: ours; all cases of a strategy go through one engine, several in a batch."""

    @functools.cache
    def batch(name: str, key: replay.EngineKey) -> dict[tuple[str, str], replay.Decoded]:
        stable = [case for checkpoint, case in (param.values for param in cases()) if checkpoint == name]
        alike = [case for case in stable if replay.engine_key(case) == key]
        return replay.decode(alike, functools.partial(engine_of, name))

    return lambda name, case: batch(name, replay.engine_key(case))[case.peer, case.id]


def test_nothing_else_is_left_out():
    stable = [(name, case) for name in CHECKPOINTS for case in recorded(name) if case.recorded["fp64_same"]]
    assert {(name, case.id): said for name, case in stable if (said := replay.left_out(case))} == LEFT_OUT
    assert len(stable) == 88 + 52 + 33 + 35 + 11
    assert not any(replay.unknown_setting(case) for _, case in stable)


@pytest.mark.parametrize(("name", "case"), cases())
def test_tokens(decoded, name, case):
    assert replay.difference(case, decoded(name, case)) is None


@pytest.mark.parametrize(("name", "case"), cases())
def test_forwards_and_edits(decoded, name, case):
    """Wherever the peer counts as ours does."""
    for count in (replay.forwards, replay.edits):
        if (pair := count(case, decoded(name, case))) is not None:
            assert pair[0] == pair[1], count.__name__


def test_forwards_and_edits_are_counted(decoded):
    def counted(count) -> int:
        return sum(count(case, decoded(name, case)) is not None for name, case in (param.values for param in cases()))

    assert (counted(replay.forwards), counted(replay.edits)) == (34 + 51 + 33 + 33 + 10, 24)


@pytest.mark.parametrize(("name", "case"), cases(fp64_same=False))
def test_first_steps(engine_of, name, case):
    """Where the peer itself gives other tokens in float64, its first steps still count."""
    pairs = replay.first_steps(case, functools.partial(engine_of, name))
    assert len(pairs) == replay.FIRST_STEPS
    for got, wanted in pairs:
        assert got == wanted


@pytest.fixture(scope="module", params=CHECKPOINTS)
def model(request):
    return request.param, *checkpoint.load(GOLDEN / request.param, make_mesh())


@pytest.mark.parametrize("i", range(3))
def test_logits(model, i):
    name, network, params = model
    with np.load(GOLDEN / f"{name}.logits.npz") as file:
        ids, want, block = file[f"ids{i}"], file[f"logits{i}"], int(file[f"block{i}"]) if f"block{i}" in file else 32
    got, _ = logits_of(network, params, ids, attend_to(sees(len(ids), block, network.spec.attention)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
