"""Families: a network is a value, and another one is a file and a line of the registry."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import attend_to, logits_of, sees
from scripted import RAW

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.models import hf_config, layers, registry
from diffulex_jax.models.base import LayerKind, Model, ModelSpec, init, leaves
from diffulex_jax.models.names import Names, put, take
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import assembly, checkpoint
from pallas_kernels import rotary
from pallas_kernels.norm import rms_norm


# A family of our own: the layers of a plain SwiGLU transformer, in about twenty lines.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftConfig:
    vocab_size: int
    hidden_size: int
    width: int
    depth: int
    eos_token_id: tuple[int, ...]

    def to_hf(self, *, dtype: str = "bfloat16"):
        return hf_config.written(self, {"model_type": ("draft",)}, dtype=dtype)


def draft(raw, name):
    c = DraftConfig(**hf_config.read(DraftConfig, raw, {"model_type": ("draft",)}))
    tree = layers.ends(c.vocab_size, c.hidden_size)
    tree["all"] = layers.attention(c.depth, c.hidden_size, kv=2, group=1, head=8) | layers.swiglu(c.depth, c.hidden_size, "mlp", c.width)
    spec = ModelSpec(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        max_positions=256,
        mask_id=0,
        eos_ids=c.eos_token_id,
        block_size=4,
        block_stated=False,
        strategy="llada2",
        layers=LayerKind(c.depth, 2, 2, 8, 8),
    )
    return Model(c, spec, tree, tuple(tensors(tree)), functools.partial(run, c), lambda params: params["lm_head"])


def run(c, params, x, positions, ops):
    table = rotary.table(positions, 8, 1e4)

    def layer(kind, i, at, x):
        p = params[kind]
        norms = rotary.HeadNorms(p["q_norm"], p["k_norm"], i, 1e-5)
        x, h = ops.norm(x, p["attn_norm"], i, 1e-5)
        out, fresh = ops.attend(at, ops.rotate(ops.linear(h, p["qkv"], i), table, norms))
        x = ops.add(x, ops.linear(out, p["out"], i), "kv_heads")
        x, h = ops.norm(x, p["mlp_norm"], i, 1e-5)
        return ops.add(x, ops.mlp(h, (p["mlp_gate_up"], p["mlp_down"]), i), "mlp"), fresh

    x, fresh = layers.run(layer, x, layers.spans(["all"] * c.depth), ops)
    return rms_norm(x, params["norm"], 1e-5), fresh


def tensors(tree):
    for path, param in leaves(tree).items():
        if param.axes[0] == "layer":
            for i in range(param.shape[0]):
                yield Names(f"{i}.", path[0], i).same(path[1], path[1], param.shape[1:])
        else:
            yield Names().same(path[0], path[0], param.shape)


DRAFT = {"model_type": "draft", "vocab_size": 32, "hidden_size": 16, "width": 24, "depth": 3, "eos_token_id": 31}


@pytest.fixture
def draft_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.REGISTRY, "draft", draft)
    model = registry.model_of(DRAFT)
    checkpoint.save(tmp_path / "draft", model, init(model, jax.random.key(0), scale=0.5), dtype="float32")
    return tmp_path / "draft"


def test_a_draft_family_is_loaded_decoded_and_cached(draft_folder):
    """Nothing outside this file knows it, and its tokens are those of a plain forward over the whole sequence."""
    engine = Engine.from_pretrained(str(draft_folder), page_size=4, max_slots=2, max_model_len=32, warm_up=False)
    assert engine.dims.block == 4
    model, params = checkpoint.load(draft_folder, make_mesh())
    forward = jax.jit(lambda ids: logits_of(model, params, ids, attend_to(sees(16, 4)))[0])
    prompt = [3, 1, 4, 1, 5, 9]
    want = np.array([*prompt, *[0] * 10])
    for start in (4, 8, 12):
        while (open_ := start + np.flatnonzero(want[start : start + 4] == 0)).size:
            p = jax.nn.softmax(forward(want).at[:, 0].set(-jnp.inf), -1)[open_]
            best = open_[int(p.max(-1).argmax())]
            want[best] = int(p.argmax(-1)[int(p.max(-1).argmax())])
    settings = SamplingParams(max_tokens=10, ignore_eos=True, accept_threshold=1.0)
    for _ in range(2):  # the second time from the prefix cache
        assert engine.generate([prompt], settings)[0].token_ids == want[6:].tolist()
    assert engine.stats["prefix_cache_hits"] > 0


def test_an_unknown_family_is_named():
    known = ", ".join(map(repr, registry.REGISTRY))
    with pytest.raises(ValueError, match=f"config: model_type='draft' is not implemented; supported: {known}"):
        registry.model_of(DRAFT)


# Names, both ways.


def test_a_tensor_is_put_into_its_leaf_and_taken_out_again():
    """Four query heads of two key/value heads, packed: q0 q1 k0 v0, q2 q3 k1 v1."""
    n = Names("x.", "dense", 1)
    tensor = n.tensor("q", (4, 3), n.part("qkv", "(kv g h) d -> d kv g h", at=(..., slice(2), slice(None)), kv=2, g=2))
    (part,) = tensor.parts
    assert (tensor.name, part.leaf) == ("x.q", ("dense", "qkv"))
    leaf, stored = np.zeros((2, 3, 2, 4, 1), int), np.arange(12).reshape(4, 3)
    put(leaf, part, stored)
    assert leaf[1, 0, :, :, 0].tolist() == [[0, 3, 0, 0], [6, 9, 0, 0]]  # column 0 of each head; key and value are others' parts
    assert not leaf[0].any()
    back = np.zeros_like(stored)
    take(leaf, part, back)
    assert (back == stored).all()


# SDAR's configs.

SDAR = {
    "model_type": "sdar",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mask_token_id": 509,
    "eos_token_id": 500,
}


@pytest.mark.parametrize(
    ("raw", "name", "want"),
    [
        ({}, "SDAR-4B-Chat", (4, False)),
        ({}, "SDAR-8B-Chat-b32", (32, True)),
        ({"block_size": 8}, "SDAR-8B-Chat-b32", (8, True)),
    ],
)
def test_the_block_size_is_the_configs_or_the_names(raw, name, want):
    spec = registry.model_of(SDAR | raw, name=name).spec
    assert (spec.block_size, spec.block_stated) == want


def test_the_hubs_sdar_configs_name_no_mask():
    raw = {key: value for key, value in SDAR.items() if key != "mask_token_id"} | {"vocab_size": 151_936}
    assert registry.model_of(raw).spec.mask_id == 151_669


def test_sparse_layers_lie_where_the_config_says():
    raw = SDAR | {"model_type": "sdar_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    model = registry.model_of(raw | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert model.config.kinds == ("dense", "moe", "dense", "dense")
    assert layers.spans(model.config.kinds) == (
        layers.Span("dense", 0, 0, 1),
        layers.Span("moe", 0, 1, 1),
        layers.Span("dense", 1, 2, 2),
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"attention_bias": True}, "config: attention_bias=True is not implemented"),
        ({"tie_word_embeddings": True}, "config: tie_word_embeddings=True is not implemented"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "config: rope_scaling="),
        ({"num_key_value_heads": 3}, "config: num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"mask_token_id": 500}, "config: mask_token_id=500 is an eos_token_id too"),
        ({"vocab_size": 400}, "config: mask_token_id=509 is not an id of the vocabulary"),
        ({"block_size": -4}, "config: block_size=-4 must be positive"),
    ],
)
def test_sdar_configs_that_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        registry.model_of(SDAR | raw)


# Bounded memory.


def resident_files() -> int:
    """Bytes of files that this process has mapped and holds in memory; 0 where the system does not tell."""
    status = pathlib.Path("/proc/self/status")
    kilobytes = re.findall(r"^Rss(?:File|Shmem):\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else []
    return 1024 * sum(map(int, kilobytes))


@pytest.mark.sweep
def test_reading_and_writing_hold_a_part_of_the_model_at_a_time(tmp_path, monkeypatch):
    """A model of 40 MB goes through files of 4 MB and pieces of 1 MB."""
    model = registry.model_of(RAW | {"hidden_size": 64, "num_hidden_layers": 16, "num_experts": 64, "moe_intermediate_size": 48})
    params = init(model, jax.random.key(0))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert total > 36e6
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 2**22)
    monkeypatch.setattr(assembly, "HOST_BYTES", 2**20)

    def peak(work):
        tracemalloc.start()
        result = work()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return result, most

    _, most = peak(lambda: checkpoint.save(tmp_path, model, params, dtype="float32"))
    assert most < total / 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) >= 8
    assert len(index) == len(model.tensors)
    (read, got), most = peak(lambda: checkpoint.load(tmp_path, make_mesh()))
    assert most < total / 2
    assert read == model
    jax.tree.map(np.testing.assert_array_equal, got, params)
    mapped: list[int] = []
    order: list[tuple[str, ...]] = []

    def watched(host, part, tensor):
        order.append(part.leaf)
        if part.at[0] in (slice(None), 0):  # of experts, the first of each layer
            mapped.append(resident_files() - before)
        put(host, part, tensor)

    monkeypatch.setattr(checkpoint.names, "put", watched)
    before = resident_files()
    checkpoint.load(tmp_path, make_mesh())
    stacked = [leaf[0] in ("dense", "moe") for leaf in order]
    assert True in stacked and stacked == sorted(stacked)  # what is held whole goes first, while there is little else
    assert max(mapped) < total / 2  # the system maps more around what is read
