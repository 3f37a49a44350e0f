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
CHECKPOINTS = ("tiny-llada2", "tiny-llada2-trained")

# The only cases that are stable in float64 and not held against ours.
LEFT_OUT = {
    ("tiny-llada2", "diffusers-16"): "an EOS ends it although tokens before it would still be edited",
    ("tiny-llada2", "diffusers-18"): "run with the pipeline's own 2-D mask: plainly causal, not block-causal",
    ("tiny-llada2-trained", "diffusers-18"): "run with the pipeline's own 2-D mask: plainly causal, not block-causal",
}


@functools.cache
def recorded(name: str) -> list[replay.Case]:
    return [case for path in sorted(GOLDEN.glob(f"{name}.*.json")) for case in replay.load(path, GOLDEN / name)]


def cases(*, fp64_same: bool = True) -> list:
    return [
        pytest.param(case, id=f"{case.checkpoint}-{case.peer}-{case.id}")
        for name in CHECKPOINTS
        for case in recorded(name)
        if case.recorded["fp64_same"] == fp64_same and (case.checkpoint, case.id) not in LEFT_OUT
    ]


@pytest.fixture(scope="session")
def decoded(engine_of):
    """``decoded(case)``: ours; all cases of a strategy go through one engine, several in a batch."""

    @functools.cache
    def batch(name: str) -> dict[tuple[str, str], replay.Decoded]:
        compared = [param.values[0] for param in cases() if param.values[0].checkpoint == name]
        return replay.decode(compared, functools.partial(engine_of, name))

    return lambda case: batch(case.checkpoint)[case.peer, case.id]


def test_nothing_else_is_left_out():
    stable = [case for name in CHECKPOINTS for case in recorded(name) if case.recorded["fp64_same"]]
    assert {(case.checkpoint, case.id): said for case in stable if (said := replay.left_out(case))} == LEFT_OUT
    assert len(stable) == 88
    assert not any(replay.unknown_setting(case) for case in stable)


@pytest.mark.parametrize("case", cases())
def test_tokens(decoded, case):
    assert replay.difference(case, decoded(case)) is None


@pytest.mark.parametrize("case", cases(fp64_same=False))
def test_first_steps(engine_of, case):
    """Where the peer itself gives other tokens in float64, its first steps still count."""
    pairs = replay.first_steps(case, functools.partial(engine_of, case.checkpoint))
    assert len(pairs) == replay.FIRST_STEPS
    for got, wanted in pairs:
        assert got == wanted


def test_counts(decoded):
    """Forwards and edits, wherever the peer counts as ours does."""
    for count, least in ((replay.forwards, 34), (replay.edits, 24)):
        pairs = {param.id: pair for param in cases() if (pair := count(param.values[0], decoded(param.values[0])))}
        assert {id_: pair for id_, pair in pairs.items() if pair[0] != pair[1]} == {}
        assert len(pairs) == least


@pytest.fixture(scope="module", params=CHECKPOINTS)
def model(request):
    return request.param, *checkpoint.load(GOLDEN / request.param, make_mesh())


@pytest.mark.parametrize("i", range(3))
def test_logits(model, i):
    name, network, params = model
    with np.load(GOLDEN / f"{name}.logits.npz") as file:
        ids, want = file[f"ids{i}"], file[f"logits{i}"]
    got, _ = logits_of(network, params, ids, attend_to(sees(len(ids), 32)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
