"""Every family and every strategy on eight devices of one CPU gives the tokens that one device gives, through the engine and over HTTP.

Run it in a process of its own, which has as many devices as it began with.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import pathlib

import jax
import pytest
import same_answer
from running import serving

from diffulex_jax import Engine
from diffulex_jax.models.base import init
from diffulex_jax.models.registry import model_of
from diffulex_jax.weights import checkpoint


jax.config.update("jax_num_cpu_devices", 8)

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
MESHES = ("data=8", "expert=8", "tensor=8", "data=2,expert=2,tensor=2")
# As the golden checkpoints, with heads and experts for eight devices.
EIGHT = ("num_attention_heads", "n_heads", "num_key_value_heads", "n_kv_heads", "num_experts")
BLOCK_CAUSAL = {
    "tiny-llada2": ["llada2", "multi_bd", "llada2_edit", "llada2_levenshtein"],
    "families/tiny-sdar": ["sdar", "sdar_leftmost", "sdar_sequential", "sdar_entropy"],
    "families/tiny-sdar-moe": ["sdar"],
    "families/tiny-fast-dllm-v2": ["fast_dllm_v2"],
}
WHOLE = {
    "families/tiny-llada": ["llada", "llada_random", "llada_threshold", "llada_factor", "d2f"],
    "families/tiny-llada-moe": ["llada"],
    "families/tiny-dream": ["dream", "dream_maskgit_plus", "dream_topk_margin", "dream_origin", "dream_threshold", "d2f"],
}
# Soft tokens of random weights make of a difference in the last bit another answer within ten steps; those of a trained model do not.
TRAINED = ("tiny-llada2-trained", "dmax")
CASES = [(family, name, mesh) for family, names in (BLOCK_CAUSAL | WHOLE).items() for name in names for mesh in MESHES]
CASES += [(*TRAINED, mesh) for mesh in MESHES if mesh != "tensor=8"]  # it has two heads
SIZES = {"max_slots": 8, "max_model_len": 112}
REQUESTS = same_answer.requests(8, [0.0, 0.7], longest=60, most=40, vocab=400)


@functools.cache
def folder(family: str, root: pathlib.Path) -> str:
    """A model of the family with random weights, unless it is the trained one."""
    if family == TRAINED[0]:
        return str(GOLDEN / family)
    raw = json.loads((GOLDEN / family / "config.json").read_text())
    model = model_of(raw | {name: 8 for name in EIGHT if name in raw}, name=family)
    path = root / family.replace("/", "-")
    checkpoint.save(path, model, init(model, jax.random.key(0), scale=0.3), dtype="float32")
    return str(path)


@functools.cache
def answers(path: str, strategy: str, mesh: str | None) -> list[list[int]]:
    """Of one request after the other, or, on a mesh, of all together, and preempted again and again."""
    engine = Engine.from_pretrained(path, strategy=strategy, mesh=mesh, **SIZES)
    if mesh is None:
        return same_answer.alone(engine, REQUESTS)
    answers = same_answer.preempted(engine, REQUESTS, every=2)
    assert answers == same_answer.together(engine, REQUESTS)
    return answers


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(("family", "strategy", "mesh"), CASES)
def test_the_tokens_of_one_device(root, family, strategy, mesh):
    path = folder(family, root)
    assert answers(path, strategy, mesh) == answers(path, strategy, None)


@pytest.mark.parametrize("mesh", MESHES)
def test_over_http(root, compiled, mesh, monkeypatch):
    """Sixteen requests at once, to a server in a process of its own."""
    path = folder("tiny-llada2", root)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    forms = [
        {
            "prompt": prompt,
            "max_tokens": p.max_tokens,
            "temperature": p.temperature,
            "seed": p.seed,
            "ignore_eos": True,
            "accept_threshold": 0.6,
        }
        for prompt, p in REQUESTS
    ]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    with serving(path, "--strategy", "llada2", "--mesh", mesh, *options, cache=compiled) as server:
        with concurrent.futures.ThreadPoolExecutor(len(forms)) as pool:
            found = list(pool.map(lambda form: server.post("/generate", **form).json()["token_ids"], forms))
    assert found == answers(path, "llada2", None)
