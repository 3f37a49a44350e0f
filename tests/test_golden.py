"""Token for token what public implementations decode, and their logits (sources: golden/README.md)."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from diffulex_jax import SamplingParams
from diffulex_jax.models import checkpoint, llada2
from diffulex_jax.parallel.mesh import make_mesh
from pallas_kernels.block_attention import split_heads


GOLDEN = pathlib.Path(__file__).parent / "golden"
CHECKPOINTS = ("tiny-llada2", "tiny-llada2-trained")
PEERS = ("llada21_generate", "llada21_generate_smode", "sglang_joint", "dinfer_threshold", "dmax_soft_parallel", "diffusers_pipeline")
EOS, MASK = 1020, 1021

# The only cases not held against ours, and why.
EXCLUDED = {
    ("tiny-llada2", "diffusers_pipeline", "diffusers-16"): "an EOS ends it although tokens before it would still be edited",
    ("tiny-llada2", "diffusers_pipeline", "diffusers-18"): "run with the pipeline's own 2-D mask: plainly causal, not block-causal",
    ("tiny-llada2-trained", "diffusers_pipeline", "diffusers-18"): "as above",
}


@functools.cache
def recorded(name: str, peer: str) -> list[dict]:
    path = GOLDEN / f"{name}.{peer}.json"
    cases = json.loads(path.read_text()) if path.is_file() else []  # S mode was recorded on the trained checkpoint only
    return [case for case in cases if (name, peer, case["id"]) not in EXCLUDED]


def ours(peer: str, settings: dict) -> tuple[str, SamplingParams]:
    """The strategy and settings that mean what the peer's settings mean."""
    params = {"max_tokens": settings["gen_length"], "accept_threshold": settings["threshold"]}
    if peer == "dmax_soft_parallel":
        return "dmax", SamplingParams(**params)
    for theirs in ("num_to_transfer", "penalty_lambda"):
        if theirs in settings:
            params[theirs] = settings[theirs]
    if "num_inference_steps" in settings:  # diffusers: with a threshold above 1, each step fills its quota
        params["num_to_transfer"] = settings["block_length"] // settings["num_inference_steps"]
    if peer == "diffusers_pipeline":
        params["ignore_eos"] = not settings["eos_early_stop"]
    edit_threshold = settings.get("editing_threshold", settings.get("edit_threshold"))
    if edit_threshold is None:
        return "llada2", SamplingParams(**params)
    post = settings.get("max_post_steps", settings.get("max_post_edit_steps"))
    # diffusers counts its post steps after the forward, the others before: it runs one more.
    post += peer == "diffusers_pipeline"
    return "llada2_edit", SamplingParams(edit_threshold=edit_threshold, max_post_edit_steps=post, **params)


@pytest.fixture(scope="session")
def decoded(engine_of):
    """``decoded(checkpoint, peer, id)``: our output; all cases of a strategy go through one engine, several in a batch."""

    @functools.cache
    def batch(name: str, strategy: str, block: int) -> dict:
        todo = [
            (peer, case["id"], case["prompt_ids"], params)
            for peer in PEERS
            for case in recorded(name, peer)
            if case["fp64_same"]
            for wanted, params in [ours(peer, case["settings"])]
            if (wanted, case["settings"]["block_length"]) == (strategy, block)
        ]
        engine = engine_of(name, strategy=strategy, block_size=block, max_slots=4, max_model_len=8 * block)
        outputs = engine.generate([ids for _, _, ids, _ in todo], [params for *_, params in todo])
        return {(peer, id): output for (peer, id, _, _), output in zip(todo, outputs, strict=True)}

    def one(name: str, peer: str, case: dict):
        strategy, _ = ours(peer, case["settings"])
        return batch(name, strategy, case["settings"]["block_length"])[peer, case["id"]]

    return one


def cases(*, fp64_same: bool) -> list:
    return [
        pytest.param(name, peer, case, id=f"{name}-{peer}-{case['id']}")
        for name in CHECKPOINTS
        for peer in PEERS
        for case in recorded(name, peer)
        if case["fp64_same"] == fp64_same
    ]


@pytest.mark.parametrize(("name", "peer", "case"), cases(fp64_same=True))
def test_tokens(decoded, name, peer, case):
    output = decoded(name, peer, case)
    settings, _, params = case["settings"], *ours(peer, case["settings"])
    got, want = output.token_ids, case["output"][: settings["gen_length"]]
    stops = EOS in want and not params.ignore_eos
    if stops:
        want = want[: want.index(EOS)]
    assert output.finish_reason == ("stop" if stops else "length")
    if peer == "diffusers_pipeline":
        # It hides the positions past prompt + gen_length in the last block, so that a block cut short decodes differently.
        whole = (len(case["prompt_ids"]) + settings["gen_length"]) // settings["block_length"] * settings["block_length"]
        got, want = (tokens[: whole - len(case["prompt_ids"])] for tokens in (got, want))
        assert len(want) >= 25 or stops
    assert got == want


@pytest.mark.parametrize(("name", "peer", "case"), cases(fp64_same=False))
def test_first_steps(engine_of, name, peer, case):
    """Where the peer itself gives other tokens in float64, its first steps still count: all it has up to the first mask."""
    strategy, params = ours(peer, case["settings"])
    engine = engine_of(name, strategy=strategy, block_size=32, max_slots=4, max_model_len=256)
    steps = [dataclasses.replace(params, ignore_eos=True, max_nfe=n + 1) for n in range(len(case["steps"]))]
    outputs = engine.generate([case["prompt_ids"]] * len(steps), steps)
    for output, (start, tokens) in zip(outputs, case["steps"], strict=True):
        tokens = tokens[len(case["prompt_ids"]) - start :] + [MASK]
        assert output.token_ids == tokens[: tokens.index(MASK)]


def forwards_compared() -> list:
    """Cases in which the peer spends forwards as we do: it goes to the end of the last block, and not past an EOS."""
    kept = []
    for param in cases(fp64_same=True):
        name, peer, case = param.values
        to_the_end = EOS not in case["output"][: case["settings"]["gen_length"]]
        edits = ours(peer, case["settings"])[0] == "llada2_edit"
        # SGLang runs the forward after the last post step, and drops what it says; only the chaotic checkpoint gets there.
        budget_unspent = not (peer == "sglang_joint" and name == "tiny-llada2")
        if to_the_end and (peer == "dmax_soft_parallel" or (edits and budget_unspent and peer != "diffusers_pipeline")):
            kept.append(param)
    return kept


@pytest.mark.parametrize(("name", "peer", "case"), forwards_compared())
def test_forwards(decoded, name, peer, case):
    """A finished block's KV costs no forward of its own; DMax counts its prefill as one."""
    assert decoded(name, peer, case).nfe == case["nfe"] - (peer == "dmax_soft_parallel")


COUNT_EDITS_AS_WE_DO = ("sglang_joint", "dmax_soft_parallel")


@pytest.mark.parametrize(("name", "peer", "case"), [p for p in cases(fp64_same=True) if p.values[1] in COUNT_EDITS_AS_WE_DO])
def test_edits(decoded, name, peer, case):
    assert decoded(name, peer, case).revised_tokens == case["edits"]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def model(request):
    return request.param, *checkpoint.load(GOLDEN / request.param, make_mesh())


@pytest.mark.parametrize("i", range(3))
def test_logits(model, i):
    name, config, params = model
    with np.load(GOLDEN / f"{name}.logits.npz") as file:
        ids, want = file[f"ids{i}"], file[f"logits{i}"]
    position = jnp.arange(len(ids))
    sees = position[None] // 32 <= position[:, None] // 32

    def attend(layer, heads):
        q, k, v = split_heads(heads)
        score = jnp.einsum("rtkgh,rskh->rkgts", q, k) / config.head_dim**0.5
        weight = jnp.where(sees, jnp.exp(score - score.max(-1, keepdims=True)), 0.0)
        return jnp.einsum("rkgts,rskh->rtkgh", weight / weight.sum(-1, keepdims=True), v), None

    hidden, _ = llada2.hidden(params, config, llada2.embed(params, ids[None]), position[None], attend)
    np.testing.assert_allclose(llada2.logits(params, hidden)[0], want, rtol=0, atol=1e-4)
