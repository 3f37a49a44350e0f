"""Model directories: what is read, what is written, and what is refused by name."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file
from scripted import MODEL, RAW

from diffulex_jax import Engine
from diffulex_jax.engine import startup
from diffulex_jax.models import names
from diffulex_jax.models.base import Model, is_param, leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import assembly, checkpoint
from diffulex_jax.weights.convert import convert


GOLDEN = pathlib.Path(__file__).parent / "golden" / "tiny-llada2"
WORDS, ROUTER = "model.word_embeddings.weight", "model.layers.1.mlp.gate.weight"


def random_params(model: Model):
    """No leaf is constant, so that none can be mistaken for another."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda param: rng.normal(size=param.shape).astype(np.float32), model.schema, is_leaf=is_param)


@pytest.fixture
def tiny(tmp_path) -> pathlib.Path:
    """A small checkpoint of our own, to be broken."""
    checkpoint.save(tmp_path / "tiny", MODEL, random_params(MODEL), dtype="float32")
    return tmp_path / "tiny"


def load(path, **settings):
    return checkpoint.load(path, make_mesh(), **settings)


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def change(path: pathlib.Path, **weights) -> None:
    """Rewrites the weights file; None removes a weight."""
    tensors = load_file(path / "model.safetensors") | weights
    save_file({name: w for name, w in tensors.items() if w is not None}, path / "model.safetensors")


def change_config(path: pathlib.Path, **values) -> None:
    raw = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


# Reading and writing


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 2},
        {"num_shared_experts": 0},
        {"num_shared_experts": 2},
        {"num_attention_heads": 6, "num_key_value_heads": 2},
    ],
)
def test_what_was_written_is_read_back(tmp_path, shape):
    model = model_of(RAW | shape)
    params = random_params(model)
    checkpoint.save(tmp_path, model, params, dtype="float32")
    read_model, read = load(tmp_path)
    assert read_model == model
    same(read, params)


def test_a_public_checkpoint_is_written_back_weight_for_weight(tmp_path):
    """Names, layout and values: what torch would read is what it was."""
    model, params = load(GOLDEN)
    checkpoint.save(tmp_path, model, params, dtype="float32")
    original, written = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert original.keys() == written.keys()
    for name in original:
        np.testing.assert_array_equal(original[name], written[name], err_msg=name)
    assert checkpoint.load_model(tmp_path) == model
    spec = model.spec
    assert (spec.layers.count, spec.mask_id, spec.eos_ids, spec.layers.rotary_dim) == (4, 1021, (1020,), 8)


def test_bfloat16(tmp_path):
    """Stored in bfloat16, read as either; the router bias, which only selects, keeps its float32."""
    params = random_params(MODEL)
    checkpoint.save(tmp_path, MODEL, params)
    stored = load_file(tmp_path / "model.safetensors")
    assert {str(w.dtype) for name, w in stored.items() if not name.endswith("expert_bias")} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16).astype(jnp.float32), params)
    rounded["moe"]["router_bias"] = params["moe"]["router_bias"]
    same(load(tmp_path)[1], rounded)
    half = load(tmp_path, dtype=jnp.bfloat16)[1]
    assert {a.dtype for a in jax.tree.leaves(half)} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    assert half["moe"]["router_bias"].dtype == jnp.float32
    same(jax.tree.map(lambda a: a.astype(jnp.float32), half), rounded)


@pytest.mark.parametrize("index", [True, False])
def test_shards(tiny, index):
    _, whole = load(tiny)
    tensors = sorted(load_file(tiny / "model.safetensors").items())
    (tiny / "model.safetensors").unlink()
    where = {}
    for i in range(3):
        name = f"model-{i + 1:05}-of-00003.safetensors"
        save_file(dict(tensors[i::3]), tiny / name)
        where |= {weight: name for weight, _ in tensors[i::3]}
    if index:
        (tiny / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        save_file({"leftover": np.zeros(1)}, tiny / "adapter.safetensors")  # not in the index, so not part of the model
    same(load(tiny)[1], whole)


# What is wrong with a checkpoint, by name


def test_missing_weights(tiny):
    change(tiny, **{WORDS: None, ROUTER: None})
    with pytest.raises(ValueError, match=f"tiny: missing {ROUTER}; missing {WORDS}$"):
        load(tiny)


def test_unexpected_weights(tiny):
    change(tiny, **{"model.layers.0.mlp.bias": np.zeros(3)})
    with pytest.raises(ValueError, match="tiny: unexpected model.layers.0.mlp.bias in model.safetensors$"):
        load(tiny)


def test_misshapen_weights(tiny):
    change(tiny, **{WORDS: np.zeros((17, 8), np.float32), ROUTER: np.zeros((8, 4), np.float32)})
    with pytest.raises(ValueError, match=r"word_embeddings.weight in model.safetensors has shape \(17, 8\), expected \(16, 8\)") as error:
        load(tiny)
    assert f"{ROUTER} in model.safetensors has shape (8, 4), expected (4, 8)" in str(error.value)


def test_many_problems_are_counted(tiny):
    change(tiny, **dict.fromkeys(load_file(tiny / "model.safetensors")), x=np.zeros(1))
    with pytest.raises(ValueError, match=r"missing .*; and \d+ more$"):
        load(tiny)


def test_a_directory_without_weights_or_config(tiny):
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="tiny holds no safetensors file"):
        load(tiny)
    (tiny / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no config.json"):
        checkpoint.resolve(str(tiny))


def test_the_engine_says_so_too(tiny):
    change(tiny, **{ROUTER: None})
    with pytest.raises(ValueError, match=f"missing {ROUTER}"):
        Engine.from_pretrained(str(tiny))


# config.json


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "config: model_type='llama' is not implemented; supported: 'Dream', "),
        ({"hidden_act": "gelu"}, "config: hidden_act='gelu' is not implemented; supported: 'silu'"),
        ({"use_bias": True}, "config: use_bias=True is not implemented"),
        ({"use_qkv_bias": True}, "config: use_qkv_bias=True is not implemented"),
        ({"use_qk_norm": False}, "config: use_qk_norm=False is not implemented"),
        ({"tie_word_embeddings": True}, "config: tie_word_embeddings=True is not implemented"),
        ({"use_sliding_window": True}, "config: use_sliding_window=True is not implemented"),
        ({"score_function": "softmax"}, "config: score_function='softmax' is not implemented"),
        ({"rope_scaling": {"type": "yarn"}}, 'config: rope_scaling={"type": "yarn"} is not implemented'),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type='yarn' is not implemented"),
        ({"expert_shape": [1]}, "config: expert_shape=[1] is not implemented, and it may change what the model computes"),
        ({"sliding_window": 128}, "config: sliding_window=128 is not implemented"),
        ({"attention_bias": True}, "config: attention_bias=True is not implemented"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "config: layer_types="),
        ({"quantization_config": {"quant_method": "fp8"}}, "config: quantization_config.weight_block_size=None is not implemented"),
        ({"architectures": ["LlamaForCausalLM"]}, 'config: architectures=["LlamaForCausalLM"] is not implemented'),
        ({"rope_theta": None}, "config: rope_theta is null; it must be a number"),
        ({"rotary_dim": 4}, "rotary_dim=4 contradicts partial_rotary_factor=0.5"),
        ({"hidden_size": "absent", "n_group": None}, "config: missing hidden_size, n_group"),
        ({"mask_token_id": 16}, r"mask_token_id=16 is not an id of the vocabulary \[0, 16\)"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=2"),
        ({"n_group": 3}, "n_group=3 must divide num_experts=4"),
        ({"topk_group": 3}, "topk_group=3 exceeds n_group=2"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok=3 exceeds the experts in topk_group=1 groups"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive integer"),
        ({"first_k_dense_replace": 3}, r"first_k_dense_replace=3 must lie in \[0, num_hidden_layers=2\]"),
        ({"partial_rotary_factor": 0.8, "rotary_dim": "absent"}, "partial_rotary_factor=0.8 gives 3 rotary dimensions"),
    ],
)
def test_config_values_that_are_not_implemented(tiny, values, message):
    change_config(tiny, **values)
    with pytest.raises(ValueError, match=re.escape(message) if "\\" not in message else message):
        load(tiny)


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({"use_qk_norm": "absent", "rope_scaling": None, "score_function": "absent"}, {}),
        ({"head_dim": "absent"}, {}),
        ({"num_shared_experts": "absent"}, {}),
        ({"eos_token_id": [14, 3]}, {"eos_token_id": [14, 3]}),
        ({"eos_token_id": None}, {"eos_token_id": None}),
        ({"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"rope_theta": 1e4}),
        ({"rope_theta": "absent"}, {"rope_theta": 600_000.0}),
        ({"some_key_of_tomorrow": None, "another": False, "and_a_third": []}, {}),
    ],
)
def test_config_keys_that_may_be_absent(tiny, values, want):
    change_config(tiny, **values)
    assert checkpoint.load_model(tiny) == model_of(RAW | want)


# Where a model comes from


@pytest.mark.parametrize("error", [OSError("no route to host"), LocalEntryNotFoundError("not in the cache"), ValueError("bad repo id")])
def test_a_hub_id_that_cannot_be_fetched(monkeypatch, error):
    def fails(*_args, **_settings):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    message = f"model 'nobody/nothing' is neither a directory, nor 'embedded', nor a hub id that could be fetched: {error}"
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained("nobody/nothing")


def test_a_hub_id_is_fetched(monkeypatch, tiny):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: asked.append((name, settings)) or str(tiny))
    assert checkpoint.resolve("somebody/something") == tiny
    assert asked[0][0] == "somebody/something"
    assert "*.safetensors" in asked[0][1]["allow_patterns"]


def test_a_directory_goes_before_the_hub(monkeypatch, tiny):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: pytest.fail("asked the hub"))
    assert checkpoint.resolve(str(tiny)) == tiny
    assert (checkpoint.resolve("embedded") / "config.json").is_file()


def test_a_host_reads_no_experts_but_those_of_its_devices(tiny, monkeypatch):
    read, mine, count = [], slice(2, 4), RAW["num_experts"]

    def reader(path, model, **options):
        real = checkpoint_reader(path, model, **options)
        return real._replace(read=lambda name, region: read.append(name) or real.read(name, region))

    def held_here(where, shape):
        names = where.spec + (None,) * (len(shape) - len(where.spec))
        return [tuple(mine if name == ("expert", "tensor") and n == count else slice(None) for name, n in zip(names, shape, strict=True))]

    checkpoint_reader, whole = checkpoint.open_source, load(tiny)[1]
    monkeypatch.setattr(checkpoint, "open_source", reader)
    monkeypatch.setattr(assembly, "_held_here", held_here)
    part = load(tiny)[1]
    experts = {int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name}
    assert experts == set(range(mine.start, mine.stop)) < set(range(count))
    assert any("mlp.gate.weight" in name for name in read) and WORDS in read
    for leaf in ("experts_gate_up", "experts_down"):
        want, got = (next(value for path, value in leaves(params).items() if path[-1] == leaf) for params in (whole, part))
        same(got[:, mine], want[:, mine])


@pytest.mark.parametrize(
    ("facts", "settings", "message"),
    [
        ({}, {"weights": "int8"}, "weights='int8', but .* holds float32; leave it out"),
        ({"weights": "int4"}, {"weights": "int8"}, "weights='int8', but .* holds int4; leave it out"),
        ({"weights": "int4"}, {"dtype": jnp.bfloat16}, "dtype='bfloat16', but .* holds int4 weights for float32; set dtype='float32'"),
        ({"weights": "int4", "kernels": "gpu"}, {}, "its int4 weights lie as the 'gpu' kernels read them, not as the 'ragged' ones"),
        ({"weights": "int3"}, {}, "placed.json does not say what placed holds"),
        ({}, {}, "placed does not hold the parameters of this model whole"),
    ],
)
def test_what_orbax_wrote_is_read_as_it_is_or_not_at_all(tiny, facts, settings, message):
    usual = {"dtype": "float32", "weights": None, "kernels": "ragged"}
    (tiny / "placed.json").write_text(json.dumps(usual | facts))
    with pytest.raises(ValueError, match=message):
        load(tiny, **settings)
    with pytest.raises(ValueError, match=r"tiny holds parameters already \(placed.json\); choose another directory"):
        convert(str(tiny), tiny, mesh=None, dtype=jnp.float32, weights=None)


def test_loading_shows_a_bar_unless_something_else_shows_that_it_loads(tiny, monkeypatch):
    asked = []

    def remember(*_, progress, **__):
        asked.append(progress)
        raise RuntimeError("enough")

    monkeypatch.setattr(checkpoint, "load", remember)
    for listening in (contextlib.nullcontext(), startup.told_to(lambda stage, what: None)):
        with listening, pytest.raises(RuntimeError, match="enough"):
            Engine.from_pretrained(str(tiny), max_model_len=32)
    assert asked == [True, False]


@pytest.mark.parametrize("name", ["tiny-llada2", *sorted(f"families/{each.name}" for each in (GOLDEN.parent / "families").glob("*/"))])
def test_halves_of_a_leaf_come_from_halves_of_its_tensors(name):
    """What a device needs of a tensor is what is put into its part of the leaf, and no byte more."""
    model, rng = checkpoint.load_model(GOLDEN.parent / name), np.random.default_rng(0)
    halved = {"kv_heads", "vocab", "mlp", "expert"}
    schema, size, read = leaves(model.schema), 0, 0
    whole, parts = ({path: np.zeros(param.shape, np.float32) for path, param in schema.items()} for _ in range(2))
    mine = {
        path: tuple(slice(n // 2, n) if axis in halved else slice(None) for n, axis in zip(p.shape, p.axes, strict=True))
        for path, p in schema.items()
    }
    for tensor in model.tensors:
        array = rng.normal(size=tensor.shape).astype(np.float32)
        for part in tensor.parts:
            names.put(whole[part.leaf], part, array)
            found = names.within(part, [mine[part.leaf]], leaf=schema[part.leaf].shape, tensor=tensor.shape)
            if found is not None:
                names.put(parts[part.leaf], found[0], array[found[1]])
                read += array[found[1]].size
    for path, region in mine.items():
        np.testing.assert_array_equal(parts[path][region], whole[path][region])
        size += whole[path][region].size
    assert read == size


def test_the_mesh_has_the_parameters(tiny):
    """One table maps logical axes to the mesh; every parameter is placed by it."""
    shutil.copytree(tiny, tiny.parent / "copy")
    mesh = make_mesh()
    _, params = checkpoint.load(tiny.parent / "copy", mesh)
    for leaf in jax.tree.leaves(params):
        assert leaf.sharding.mesh == mesh
    with pytest.raises(ValueError, match="a 1x1x2 mesh needs 2 devices; there are 1"):
        make_mesh(jax.devices()[:1], tensor=2)
