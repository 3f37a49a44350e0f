"""Hugging Face directories of LLaDA2-MoE: reading and writing ``config.json`` + safetensors without torch."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file

from diffulex_jax.config import ModelConfig
from diffulex_jax.models import llada2
from diffulex_jax.parallel.mesh import check_split, sharding


EMBEDDED = pathlib.Path(__file__).parent.parent / "embedded"
Read = Callable[[str, tuple[int, ...]], np.ndarray]


def resolve(model: str) -> pathlib.Path:
    """The local directory of a model: a path, ``"embedded"``, or a hub id (fetched with ``huggingface_hub``).

    Raises:
      ValueError: when it is none of these, or the directory holds no ``config.json``.
    """
    if model == "embedded":
        path = EMBEDDED
    elif pathlib.Path(model).is_dir():
        path = pathlib.Path(model)
    else:
        try:
            path = pathlib.Path(huggingface_hub.snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model {model!r} is neither a directory, nor 'embedded', nor a hub id that could be fetched: {error}"
            ) from error
    if not (path / "config.json").is_file():
        raise ValueError(f"model {model!r}: {path} holds no config.json")
    return path


def load_config(path: str | pathlib.Path) -> ModelConfig:
    """Reads ``config.json`` of a model directory."""
    return ModelConfig.from_hf(json.loads((pathlib.Path(path) / "config.json").read_text()))


def load_eos_ids(path: str | pathlib.Path) -> tuple[int, ...]:
    """The tokens that end an output: those of ``generation_config.json`` where there is one, and the config's."""
    path = pathlib.Path(path)
    ids = {load_config(path).eos_token_id}
    generation = path / "generation_config.json"
    if generation.is_file():
        more = json.loads(generation.read_text()).get("eos_token_id")
        ids |= set(more if isinstance(more, list) else [] if more is None else [more])
    return tuple(sorted(ids))


def load(path: str | pathlib.Path, mesh: Mesh, *, dtype: Any = jnp.float32) -> tuple[ModelConfig, llada2.Params]:
    """Reads a model directory and places its parameters on ``mesh`` in ``dtype`` (the router bias stays float32).

    Raises:
      ValueError: naming every weight that is missing, unexpected or misshapen, or one that the mesh's devices do not divide.
    """
    path = pathlib.Path(path)
    config = load_config(path)
    for leaf, (shape, axes) in _leaves(config).items():
        check_split(mesh, shape, axes, leaf[-1])
    where = _index(path)
    names = {leaf: dict(_weights(leaf, config)) for leaf in _leaves(config)}
    expected = {name for weights in names.values() for name in weights}
    problems = [f"missing {name}" for name in sorted(expected - where.keys())]
    problems += [f"unexpected {name}" for name in sorted(where.keys() - expected)]
    if problems:
        raise ValueError(f"{path}: {_few(problems)}")
    files = {file: safe_open(file, framework="numpy") for file in set(where.values())}
    for weights in names.values():
        for name, (shape, _) in weights.items():
            found = tuple(files[where[name]].get_slice(name).get_shape())
            if found != shape:
                problems.append(f"{name} has shape {found}, expected {shape}")
    if problems:
        raise ValueError(f"{path}: {_few(problems)}")

    def build(leaf: tuple[str, ...], shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
        kind = np.dtype(np.float32) if leaf[-1] == "router_bias" else np.dtype(dtype)
        out = np.empty(shape, kind)
        for name, (_, put) in names[leaf].items():
            put(out, files[where[name]].get_tensor(name).astype(kind))
        return jax.device_put(out, sharding(mesh, axes))

    return config, _unflatten({leaf: build(leaf, *spec) for leaf, spec in _leaves(config).items()})


def save(path: str | pathlib.Path, config: ModelConfig, params: llada2.Params, *, dtype: str = "bfloat16") -> None:
    """Writes ``config.json`` and ``model.safetensors`` in the names and layout that :func:`load` (and torch) read."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensors = {}
    for leaf in _leaves(config):
        array = params
        for key in leaf:
            array = array[key]
        stacked = np.array(array, np.float32)
        for name, (shape, put) in _weights(leaf, config):
            # `put` writes a checkpoint tensor into a view of the stacked array; numbering the elements inverts it.
            order = np.full(stacked.shape, -1, np.int64)
            put(order, np.arange(np.prod(shape), dtype=np.int64).reshape(shape))
            flat = np.empty(np.prod(shape), np.float32)
            flat[order[order >= 0]] = stacked[order >= 0]
            tensors[name] = flat.reshape(shape).astype(np.float32 if leaf[-1] == "router_bias" else kind)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config.to_hf(dtype=dtype), indent=2) + "\n")


def _index(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Weight name -> the safetensors file that holds it."""
    shards = path / "model.safetensors.index.json"
    if shards.is_file():
        return {name: path / file for name, file in json.loads(shards.read_text())["weight_map"].items()}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no safetensors file")
    return {name: file for file in files for name in safe_open(file, framework="numpy").keys()}


def _leaves(config: ModelConfig) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[str | None, ...]]]:
    flat, _ = jax.tree.flatten_with_path(llada2.schema(config), is_leaf=llada2.is_leaf)
    return {tuple(key.key for key in path): leaf for path, leaf in flat}


def _unflatten(flat: dict[tuple[str, ...], jax.Array]) -> llada2.Params:
    tree: llada2.Params = {}
    for (*parents, last), value in flat.items():
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def _few(problems: list[str], most: int = 8) -> str:
    return "; ".join(problems[:most]) + (f"; and {len(problems) - most} more" if len(problems) > most else "")


Put = Callable[[np.ndarray, np.ndarray], None]


def _weights(leaf: tuple[str, ...], config: ModelConfig) -> Iterator[tuple[str, tuple[tuple[int, ...], Put]]]:
    """The checkpoint tensors of one stacked leaf: ``name, (shape, put)``; ``put(stacked, tensor)`` writes it in place."""
    c, name = config, leaf[-1]
    embed, kv, group, head = c.hidden_size, c.num_key_value_heads, c.queries_per_kv, c.head_dim
    heads = c.num_attention_heads

    def put_same(out: np.ndarray, w: np.ndarray) -> None:
        out[...] = w

    if len(leaf) == 1:
        hf = {"embed": "model.word_embeddings.weight", "lm_head": "lm_head.weight", "norm": "model.norm.weight"}[name]
        shape: tuple[int, ...] = (embed,) if name == "norm" else (c.vocab_size, embed)
        yield hf, (shape, put_same)
        return

    def put_qkv(out: np.ndarray, w: np.ndarray) -> None:
        w = w.reshape(heads + 2 * kv, head, embed)
        out[:, :, :group] = w[:heads].reshape(kv, group, head, embed).transpose(3, 0, 1, 2)
        out[:, :, group] = w[heads : heads + kv].transpose(2, 0, 1)
        out[:, :, group + 1] = w[heads + kv :].transpose(2, 0, 1)

    def put_out(out: np.ndarray, w: np.ndarray) -> None:
        out[...] = w.T.reshape(kv, group, head, embed)

    def put_transposed(out: np.ndarray, w: np.ndarray) -> None:
        out[...] = w.T

    def into(put: Put, *at: Any) -> Put:
        """``put`` for one part of the stacked leaf."""

        def part(out: np.ndarray, w: np.ndarray) -> None:
            for key in at:
                out = out[key]
            put(out, w)

        return part

    start, count = (0, c.num_dense_layers) if leaf[0] == "dense" else (c.num_dense_layers, c.num_moe_layers)
    width, shared = c.moe_intermediate_size, c.moe_intermediate_size * c.num_shared_experts
    inner = {"mlp": c.intermediate_size, "shared": shared, "experts": width}
    simple: dict[str, tuple[str, tuple[int, ...], Put]] = {
        "attn_norm": ("input_layernorm.weight", (embed,), put_same),
        "mlp_norm": ("post_attention_layernorm.weight", (embed,), put_same),
        "q_norm": ("attention.query_layernorm.weight", (head,), put_same),
        "k_norm": ("attention.key_layernorm.weight", (head,), put_same),
        "qkv": ("attention.query_key_value.weight", ((heads + 2 * kv) * head, embed), put_qkv),
        "out": ("attention.dense.weight", (embed, heads * head), put_out),
        "router": ("mlp.gate.weight", (c.num_experts, embed), put_transposed),
        "router_bias": ("mlp.gate.expert_bias", (c.num_experts,), put_same),
    }
    for i in range(count):
        prefix = f"model.layers.{start + i}."
        if name in simple:
            hf, shape, put = simple[name]
            yield prefix + hf, (shape, into(put, i))
            continue
        kind, part = name.split("_", 1)
        f = inner[kind]
        for e in range(c.num_experts) if kind == "experts" else (None,):
            at = (i,) if e is None else (i, e)
            base = prefix + {"mlp": "mlp.", "shared": "mlp.shared_experts.", "experts": f"mlp.experts.{e}."}[kind]
            if part == "down":
                yield base + "down_proj.weight", ((embed, f), into(put_transposed, at))
                continue
            for half, hf in enumerate(("gate_proj", "up_proj")):
                columns = (slice(None), slice(half * f, (half + 1) * f)) if kind == "experts" else (slice(None), half)
                yield base + f"{hf}.weight", ((f, embed), into(put_transposed, at, columns))
