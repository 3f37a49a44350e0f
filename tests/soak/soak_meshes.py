"""Every family and every strategy on eight devices of one CPU gives the tokens that one device gives, through the engine and over HTTP.

Run it in a process of its own, which has as many devices as it began with.
"""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import json
import pathlib

import jax
import pytest
import same_answer
from running import serving

from diffulex_jax import Engine
from diffulex_jax.engine.snapshot import Snapshot
from diffulex_jax.models.base import init
from diffulex_jax.models.registry import model_of
from diffulex_jax.weights import checkpoint


jax.config.update("jax_num_cpu_devices", 8)

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
MESHES = ("data=2,expert=2,tensor=2", "data=8", "expert=8", "tensor=8")
# As the golden checkpoints, with heads and experts for eight devices.
EIGHT = ("num_attention_heads", "n_heads", "num_key_value_heads", "n_kv_heads", "num_experts")
STRATEGIES = {
    "tiny-llada2": ["llada2", "multi_bd", "llada2_edit", "llada2_levenshtein", "d2f"],
    "families/tiny-sdar": ["sdar", "sdar_leftmost", "sdar_sequential", "sdar_entropy"],
    "families/tiny-sdar-moe": ["sdar"],
    "families/tiny-fast-dllm-v2": ["fast_dllm_v2"],
    "families/tiny-llada": ["llada", "llada_random", "llada_threshold", "llada_factor", "d2f"],
    "families/tiny-llada-moe": ["llada", "d2f"],
    "families/tiny-dream": ["dream", "dream_maskgit_plus", "dream_topk_margin", "dream_origin", "dream_threshold", "d2f"],
    # Soft tokens of random weights make of a difference in the last bit another answer within ten steps; those of a trained model do not.
    "tiny-llada2-trained": ["dmax"],
}
SETTINGS: dict[tuple[str, str], dict[str, dict]] = {  # beside none
    ("families/tiny-fast-dllm-v2", "fast_dllm_v2"): {"sub-blocks cached": {"sub_block_cache": 8}},
    ("families/tiny-llada", "llada_threshold"): {"prefix cached": {"cache": "prefix"}, "all cached": {"cache": "dual"}},
    ("families/tiny-llada-moe", "llada"): {"prefix cached": {"cache": "prefix"}},
    ("families/tiny-dream", "dream_threshold"): {"prefix cached": {"cache": "prefix"}, "all cached": {"cache": "dual"}},
    ("families/tiny-sdar-moe", "sdar"): {"two blocks": {"buffer_size": 2}},
}
PLAIN = ""
CASES = [
    (mesh, family, strategy, settings)
    for mesh in MESHES
    for family, names in STRATEGIES.items()
    for strategy in names
    for settings in (PLAIN, *SETTINGS.get((family, strategy), ()))
    if (family, mesh) != ("tiny-llada2-trained", "tensor=8")  # it has two heads
]
OVER_HTTP = [("tiny-llada2", "llada2", mesh) for mesh in MESHES]
OVER_HTTP += [(family, names[0], MESHES[0]) for family, names in STRATEGIES.items() if family != "tiny-llada2"]
SIZES = {"max_slots": 8, "max_model_len": 112}
BLOCKS = {"tiny-llada2": 8, "families/tiny-fast-dllm-v2": 8}  # in others' place: prompts of several blocks begin alike
REQUESTS = same_answer.requests(5, [0.0, 0.7], longest=60, most=30, vocab=400)


@pytest.fixture(autouse=True)
def _little_is_kept():
    """A process holds the programs of some tens of engines, and not more."""
    yield
    jax.clear_caches()
    gc.collect()


@functools.cache
def folder(family: str, root: pathlib.Path) -> str:
    """A model of the family with random weights, unless it is a trained one."""
    if family.endswith("-trained"):
        return str(GOLDEN / family)
    raw = json.loads((GOLDEN / family / "config.json").read_text())
    model = model_of(raw | {name: 8 for name in EIGHT if name in raw}, name=family)
    path = root / family.replace("/", "-")
    checkpoint.save(path, model, init(model, jax.random.key(0), scale=0.3), dtype="float32")
    return str(path)


def build(path: str, strategy: str, settings: str, mesh: str | None) -> Engine:
    family = next(name for name in STRATEGIES if path.endswith(name.replace("/", "-")))
    more: dict = SETTINGS[family, strategy][settings] if settings else {}
    if family in BLOCKS and "sub_block_cache" not in more:
        more = more | {"block_size": BLOCKS[family], "force_block_size": True}
    return Engine.from_pretrained(path, strategy=strategy, mesh=mesh, warm_up=False, **SIZES, **more)


@functools.cache
def of_one_device(path: str, strategy: str, settings: str) -> tuple[list[list[int]], list[Snapshot]]:
    """The answers to one request after the other, and the first two requests as they are after some steps."""
    engine = build(path, strategy, settings, None)
    return same_answer.alone(engine, REQUESTS), [taken(engine, request) for request in REQUESTS[:2]]


def taken(engine: Engine, request: same_answer.Request, *, steps: int = 4) -> Snapshot:
    (id_,) = engine.add(*request)
    engine._scheduler.steps_per_dispatch, usual = 1, engine._scheduler.steps_per_dispatch
    for _ in range(steps):
        assert not engine.step()
    engine._scheduler.steps_per_dispatch = usual
    snapshot = engine.snapshot(id_)
    engine.abort(id_)
    return snapshot


def finished(engine: Engine, snapshots: list[Snapshot]) -> list[list[int]]:
    outputs, ids = {}, [engine.restore(snapshot) for snapshot in snapshots]
    while engine.has_work:
        outputs |= engine.step()
    return [outputs[id_].token_ids for id_ in ids]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(("mesh", "family", "strategy", "settings"), CASES)
def test_the_tokens_of_one_device(root, mesh, family, strategy, settings):
    """All requests together, preempted again and again, from snapshots of one device, and from those of the mesh."""
    path = folder(family, root)
    answers, snapshots = of_one_device(path, strategy, settings)
    engine = build(path, strategy, settings, mesh)
    assert same_answer.together(engine, REQUESTS) == answers
    assert same_answer.preempted(engine, REQUESTS, every=2) == answers
    if engine.settings.attention == "block_causal" and "sub_block_cache" not in SETTINGS.get((family, strategy), {}).get(settings, {}):
        assert engine.stats["prefix_cache_hits"] > 0
    assert finished(engine, snapshots) == answers[:2]
    assert finished(engine, [taken(engine, request) for request in REQUESTS[:2]]) == answers[:2]


@pytest.mark.parametrize(("family", "strategy", "mesh"), OVER_HTTP)
def test_over_http(root, compiled, family, strategy, mesh, monkeypatch):
    """Ten requests at once, to a server in a process of its own."""
    path = folder(family, root)
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
    options += [f"--block-size={BLOCKS[family]}", "--force-block-size"] if family in BLOCKS else []
    with serving(path, "--strategy", strategy, "--mesh", mesh, *options, cache=compiled) as server:
        with concurrent.futures.ThreadPoolExecutor(len(forms)) as pool:
            found = list(pool.map(lambda form: server.post("/generate", **form).json()["token_ids"], forms))
    assert found == of_one_device(path, strategy, PLAIN)[0]
