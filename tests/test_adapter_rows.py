"""Engines whose rows have LoRA adapters of their own: each request decodes as if its adapter were merged, whatever is beside it."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sweep import sweep

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.engine.dispatch import Plan
from diffulex_jax.engine.request import Tracked
from diffulex_jax.engine.snapshot import Snapshot
from diffulex_jax.errors import SettingError
from diffulex_jax.models.adapted import ADAPTERS, Adapted, Factors, for_rows
from diffulex_jax.models.ops import machine_ops
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import adapter_stacks, adapters, checkpoint
from diffulex_jax.weights.adapters import Lora
from pallas_kernels import REFERENCE
from pallas_kernels.parts import summed


GOLDEN = pathlib.Path(__file__).parent / "golden"
LLADA2, SDAR = str(GOLDEN / "tiny-llada2-trained"), str(GOLDEN / "families" / "tiny-sdar-trained")
SIZES = {"max_slots": 4, "max_model_len": 64, "warm_up": False}
RANKS = {"wide": 4, "narrow": 2}
TARGETS = {
    LLADA2: {"wide": ("qkv", "out", "mlp_gate_up", "shared_gate_up", "shared_down"), "narrow": ("out", "mlp_down")},
    SDAR: {"wide": ("qkv", "mlp_gate_up"), "narrow": ("qkv", "out", "mlp_down")},
}
PROMPT = [int(token) for token in np.random.default_rng(1).integers(0, 200, 27)]


def written(folder: pathlib.Path, path: str, name: str, **changed) -> str:
    """An adapter that changes what a model says, in PEFT's files."""
    model, lora = checkpoint.load_model(pathlib.Path(path)), Lora(RANKS[name], 8.0, TARGETS[path][name])._replace(**changed)
    fresh, rng = jax.eval_shape(lambda: adapters.init(model, lora, jax.random.key(0))), np.random.default_rng(lora.rank)
    adapters.save(folder / name, model, lora, jax.tree.map(lambda a: 0.2 * rng.standard_normal(a.shape, np.float32), fresh))
    return str(folder / name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``folders(path)``: the directories of two adapters of a model, by name."""
    made = {path: tmp_path_factory.mktemp("adapters") for path in TARGETS}
    found = {path: {name: written(folder, path, name) for name in RANKS} for path, folder in made.items()}
    return found.__getitem__


@pytest.fixture(scope="module")
def engines(folders):
    return {
        path: Engine.from_pretrained(path, adapters=folders(path), **SIZES, **settings)
        for path, settings in {LLADA2: {"strategy": "llada2", "block_size": 8}, SDAR: {}}.items()
    }


@pytest.fixture
def engine(engines):
    return engines[LLADA2]


def asks(name: str | None, **settings) -> SamplingParams:
    return SamplingParams(max_tokens=16, ignore_eos=True, adapter_name=name, **settings)


def answers(engine, *names, prompt=PROMPT) -> list[list[int]]:
    return [output.token_ids for output in engine.generate([prompt] * len(names), [asks(name) for name in names])]


@pytest.mark.parametrize("path", sweep([LLADA2, SDAR], but=[LLADA2]))
def test_rows_decode_as_if_their_own_adapters_were_merged(engines, folders, path):
    engine, asked = engines[path], ("wide", None, "narrow", "wide")
    mixed = answers(engine, *asked)
    assert mixed[0] == mixed[3] and len({tuple(tokens) for tokens in mixed}) == 3
    for name, tokens in zip(asked, mixed, strict=True):
        assert answers(engine, name) == [tokens]
    scores = {name: engine.score([PROMPT], [mixed[0]], adapter_name=name)[0] for name in (None, *RANKS)}
    model, base = checkpoint.load(pathlib.Path(path), make_mesh())
    for name, folder in folders(path).items():
        lora, trained = adapters.load(folder, model)
        engine.update_params(jax.jit(functools.partial(adapters.merge, model, lora))(base, trained))
        assert answers(engine, None) == [mixed[asked.index(name)]]
        merged = engine.score([PROMPT], [mixed[0]])[0]
        np.testing.assert_allclose(merged, scores[name], atol=1e-4)
        assert np.abs(merged - scores[None]).max() > 1
    engine.update_params(base)  # adapters stay
    assert answers(engine, *asked) == mixed


def test_kv_of_an_adapter_serves_that_adapter_alone(engine):
    prompt = [int(token) for token in np.random.default_rng(2).integers(0, 200, 27)]
    hits = []
    for name in (None, "wide", "narrow", "wide", "narrow", None):
        before = engine.stats["prefix_cache_hits"]
        hits.append((answers(engine, name, prompt=prompt)[0], engine.stats["prefix_cache_hits"] - before))
    first, again = dict(zip((None, "wide", "narrow"), hits[:3], strict=True)), dict(zip(("wide", "narrow", None), hits[3:], strict=True))
    assert {name: tokens for name, (tokens, _) in first.items()} == {name: tokens for name, (tokens, _) in again.items()}
    assert [count for _, count in hits] == [0, 0, 0, 3, 3, 3]


def test_no_salt_is_an_adapter():
    def salt(name, own):
        return Tracked(id=0, prompt=np.zeros(1, np.int32), params=SamplingParams(adapter_name=name, cache_salt=own)).salt

    assert len({salt(*pair) for pair in ((None, ""), (None, "ab"), ("ab", ""), ("a", "b"), ("abÿ", ""), (None, "abÿ"))}) == 6


@pytest.mark.sweep_but("from a snapshot")
@pytest.mark.parametrize("way", ["preempted", "from a snapshot", "from a file"])
def test_a_request_keeps_its_adapter(engine, tmp_path, way):
    (want,) = answers(engine, "wide")
    (id_,) = engine.add(PROMPT, asks("wide", max_nfe=None))
    for _ in range(2):
        engine.step()
    request = engine._desk.find(id_)
    assert request in engine._scheduler.running.values()
    if way == "preempted":
        engine._scheduler.preempt(request)
    else:
        taken = engine.snapshot(id_)
        engine.discard(id_)
        if way == "from a file":
            taken.save(tmp_path / "taken")
            taken = Snapshot.load(tmp_path / "taken", like=engine.saved_structure)
        id_ = engine.restore(taken)
    (other,) = engine.add(PROMPT, asks(None))  # the slot may be another's now
    done = {}
    while engine.has_work:
        done |= engine.step()
    assert done[id_].token_ids == want != done[other].token_ids


@pytest.mark.sweep
def test_snapshots_go_on_with_the_adapter_they_began_with(engine):
    ids = [engine.add(PROMPT, asks(name))[0] for name in ("wide", None)]
    taken, plain = (engine.snapshot(id_) for id_ in ids)
    for id_ in ids:
        engine.discard(id_)
    assert taken.fingerprint["adapter"].startswith("wide#") and "adapter" not in plain.fingerprint
    other = dataclasses.replace(taken, fingerprint=taken.fingerprint | {"adapter": "wide#0"})
    with pytest.raises(ValueError, match="the snapshot is of adapter='wide#0'; this engine has adapter='wide#"):
        engine.restore(other)
    elsewhere = dataclasses.replace(taken, params=asks("unknown"))
    with pytest.raises(ValueError, match="the snapshot is of adapter='wide#.*'; this engine has adapter=None"):
        engine.restore(elsewhere)


def test_an_unknown_adapter_is_named(engine):
    with pytest.raises(SettingError, match="prompt 1: adapter_name='tall' must be one of wide, narrow") as refused:
        engine.generate([PROMPT, PROMPT], [asks(None), asks("tall")])
    assert refused.value.field == "adapter_name"
    with pytest.raises(SettingError, match="adapter_name='tall' must be one of wide, narrow"):
        engine.score([PROMPT], [[1]], adapter_name="tall")
    plain = Engine.from_pretrained(LLADA2, strategy="llada2", block_size=8, **SIZES)
    with pytest.raises(SettingError, match="adapter_name='wide' asks for an adapter, and this engine has none"):
        plain.generate([PROMPT], asks("wide"))


def test_adapters_that_will_not_do_are_named_before_the_model_is_loaded(tmp_path, folders, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("loaded"))

    def refusal(given) -> str:
        with pytest.raises(SettingError) as refused:
            Engine.from_pretrained(LLADA2, adapters=given, **SIZES)
        assert refused.value.field == "adapters"
        return str(refused.value)

    experts = written(tmp_path, LLADA2, "wide", targets=("qkv", "experts_down"))
    assert "'e': " in (said := refusal({"e": experts})) and "mlp.experts" in said and "cannot be adapted row by row" in said
    router = written(tmp_path, LLADA2, "wide", targets=("router",))
    assert "mlp.gate" in refusal({"r": router})
    broken = pathlib.Path(written(tmp_path, LLADA2, "narrow")) / adapters.WEIGHTS
    tensors = load_file(broken)
    first = min(tensors)
    save_file(tensors | {first: tensors[first] * np.inf}, broken)
    assert "not finite" in refusal({"b": str(broken.parent)})
    assert "cannot be read" in refusal(folders(LLADA2) | {"c": str(tmp_path)})
    assert "must map names to directories" in refusal("wide")
    assert "'': 'there' must be a name" in refusal({"": "there"})
    assert "'a': 3 must be a name" in refusal({"a": 3})


def test_parameters_that_are_given_have_no_adapters(folders):
    with pytest.raises(ValueError, match="adapters are read while a model is loaded"):
        Engine(checkpoint.load_model(pathlib.Path(LLADA2)), {}, adapters=folders(LLADA2), **SIZES)


def test_engines_without_adapters_are_as_they_were():
    params = {"embed": jnp.zeros((2, 2))}
    assert for_rows(params, jnp.zeros(3, jnp.int32)) is params
    assert for_rows(params | {ADAPTERS: {}}, None) == params
    plan = Plan(np.full((2, 3), 7, np.int32), np.array([4, 5], np.int32), 6, True)
    assert plan.pack().tolist() == [[7, 7, 7, 4, 6, 1], [7, 7, 7, 5, 6, 1]]
    adapted = plan._replace(adapter=np.array([2, 0], np.int32))
    back = Plan.unpack(jnp.asarray(adapted.pack()), adapted=True)
    assert back.pages.tolist() == plan.pages.tolist() and back.adapter.tolist() == [2, 0] and back.known.tolist() == [4, 5]


def test_a_product_is_that_of_the_rows_own_matrices():
    """Two layers, three adapters of rank 2 and four rows, by hand; and the gated MLP of such matrices."""
    rng = np.random.default_rng(0)

    def some(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    rows = jnp.array([3, 0, 1, 3], jnp.int32)
    gate_up = Adapted(some(2, 6, 2, 5), Factors(some(2, 6, 3, 2), some(2, 3, 2, 2, 5)), rows)
    down = Adapted(some(2, 5, 6), Factors(some(2, 5, 3, 2), some(2, 3, 2, 6)), rows)
    x, layer = some(4, 7, 6), jnp.int32(1)

    def exact(a):
        return np.asarray(a, np.float64)

    def merged(leaf: Adapted, row: int):
        flat = exact(leaf.matrix[1])
        n = int(rows[row])
        return flat if n == 0 else flat + np.tensordot(exact(leaf.factors.a[1, :, n - 1]), exact(leaf.factors.b[1, n - 1]), 1)

    def gated(h):
        return h[:, 0] / (1 + np.exp(-h[:, 0])) * h[:, 1]

    for kernels, pending in ((REFERENCE, 0), (REFERENCE._replace(rows_apart=True), 3)):
        ops = machine_ops(kernels, lambda *_: None, pending=pending)
        with jax.default_matmul_precision("highest"):
            wide, through, half = (
                jax.jit(lambda x, leaves, of=of: summed(of(x, leaves, layer)))(x, leaves)
                for of, leaves in ((ops.linear, gate_up), (ops.mlp, (gate_up, down)), (ops.mlp, (gate_up.matrix, down)))
            )
        for row in range(4):
            h = np.tensordot(exact(x[row]), merged(gate_up, row), 1)
            np.testing.assert_allclose(wide[row], h, atol=1e-5)
            np.testing.assert_allclose(through[row], gated(h) @ merged(down, row), atol=1e-4)
            h = np.tensordot(exact(x[row]), exact(gate_up.matrix[1]), 1)
            np.testing.assert_allclose(half[row], gated(h) @ merged(down, row), atol=1e-4)


def test_matrices_of_one_leaf_have_columns_of_their_own(folders):
    """SDAR's queries, keys and values lie in one leaf, and each has an A of its own; the narrower adapter is padded."""
    model = checkpoint.load_model(pathlib.Path(SDAR))
    tree = adapter_stacks.stacked(model, adapter_stacks.load(folders(SDAR), model))["dense"]
    n, width = tree["qkv"].a.shape[:2]
    assert tree["qkv"].a.shape == (n, width, 2, 3 * 4) and tree["mlp_gate_up"].a.shape == (n, width, 2, 2 * 4)
    assert tree["mlp_down"].b.shape == (n, 2, 4, width)
    assert not tree["mlp_down"].b[:, 0].any() and tree["mlp_down"].b[:, 1, :2].all() and not tree["mlp_down"].b[:, 1, 2:].any()
