"""Hugging Face directories: ``config.json`` and safetensors, read and written tensor by tensor, without torch.

A directory is untrusted input. No file outside it is opened, no tensor is taken from a file that does not belong to the model, and
whatever is wrong is one line that names the file, the tensor and what would be right.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from diffulex_jax.models import names
from diffulex_jax.models.base import Model, Param, Params, leaves
from diffulex_jax.models.hf_config import end_ids
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import check_split, sharding


EMBEDDED = pathlib.Path(__file__).parent.parent / "embedded"
HOST_BYTES = 256 * 2**20
"""A leaf is put together on the host in pieces of about so many bytes, at least one layer each."""
SHARD_BYTES = 2 * 2**30
"""Most bytes of a file that :func:`save` writes."""

_READABLE = ("F64", "F32", "F16", "BF16")
Read = Callable[[str], np.ndarray]

_BUFFERS = (".rotary_emb.inv_freq",)  # of old checkpoints: computed, not read


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
        found = sorted(config.parent for config in path.glob("snapshots/*/config.json"))
        hint = f"; it is a folder of the hub's cache, and the model is in {found[-1]}" if found else ""
        raise ValueError(f"model {model!r}: {path} holds no config.json{hint}")
    return path


def load_model(path: str | pathlib.Path) -> Model:
    """The network that ``config.json`` of a model directory describes.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    path = pathlib.Path(path)
    return model_of(_read_json(path / "config.json"), name=str(path.name))


def load_end_ids(path: str | pathlib.Path) -> tuple[int, ...]:
    """The tokens that end an output: those that the config, ``generation_config.json`` and the tokenizer name, together.

    Raises:
      ValueError: naming the file, where an id is not one of the vocabulary.
    """
    path = pathlib.Path(path)
    spec = load_model(path).spec
    ids = set(spec.eos_ids) | _tokenizer_end_ids(path)
    if (path / "generation_config.json").is_file():
        for id_ in end_ids(_read_json(path / "generation_config.json").get("eos_token_id")):
            if isinstance(id_, bool) or not isinstance(id_, int) or not 0 <= id_ < spec.vocab_size:
                raise ValueError(f"{path / 'generation_config.json'}: eos_token_id={id_!r} is not an id of [0, {spec.vocab_size})")
            ids.add(id_)
    return tuple(sorted(ids - {spec.mask_id}))


def load(path: str | pathlib.Path, mesh: Mesh, *, dtype: Any = jnp.float32, progress: bool = False) -> tuple[Model, Params]:
    """Reads a model directory and places its parameters on ``mesh``.

    The host holds one piece of one leaf at a time: :data:`HOST_BYTES`, or a layer where that is more.

    Args:
      path: the directory.
      mesh: where the parameters go.
      dtype: of all parameters but those whose :class:`Param` names another.
      progress: show a progress bar over tensors.

    Raises:
      ValueError: naming every weight that is missing, unexpected, misshapen or of a type that is not read, a file that is broken, or
        an axis that the mesh's devices do not divide.
    """
    path = pathlib.Path(path)
    model = load_model(path)
    params = leaves(model.schema)
    for leaf, param in params.items():
        check_split(mesh, param.shape, param.axes, leaf[-1])
    read = _reader(path, model)
    parts: dict[names.Path, list[tuple[str, names.Part]]] = collections.defaultdict(list)
    for tensor in model.tensors:
        for part in tensor.parts:
            parts[part.leaf].append((tensor.name, part))
    tree: Params = {}
    with tqdm(total=sum(map(len, parts.values())), disable=not progress, desc="loading", unit="tensor") as bar:
        for leaf, param in params.items():
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), leaf[:-1], tree)
            node[leaf[-1]] = _built(param, parts[leaf], read, mesh, dtype=np.dtype(param.dtype or dtype), step=bar.update)
    return model, tree


def save(path: str | pathlib.Path, model: Model, params: Params, *, dtype: str = "bfloat16") -> None:
    """Writes ``config.json`` and safetensors in the names and layout that :func:`load` (and torch) read.

    The host holds one layer and one file's tensors at a time; files have at most :data:`SHARD_BYTES`.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    schema = leaves(model.schema)

    def kind_of(tensor: names.Tensor) -> np.dtype:
        return np.dtype(schema[tensor.parts[0].leaf].dtype or kind)

    shards: list[list[names.Tensor]] = [[]]
    room = SHARD_BYTES
    for tensor in model.tensors:
        size = int(np.prod(tensor.shape)) * kind_of(tensor).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= size

    held: dict[names.Path, tuple[int, np.ndarray]] = {}  # of each leaf the layer last asked for

    def part_of(part: names.Part) -> tuple[np.ndarray, names.Part]:
        array: Any = functools.reduce(lambda node, key: node[key], part.leaf, params)
        if schema[part.leaf].axes[0] != "layer":
            return np.asarray(array), part
        layer = part.at[0]
        assert isinstance(layer, int)
        if part.leaf not in held or held[part.leaf][0] != layer:
            held[part.leaf] = layer, np.asarray(array[layer])
        return held[part.leaf][1], part._replace(at=part.at[1:])

    where = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        made = {}
        for tensor in shard:
            made[tensor.name] = np.empty(tensor.shape, kind_of(tensor))
            where[tensor.name] = file
            for part in tensor.parts:
                array, inside = part_of(part)
                names.take(array, inside, made[tensor.name])
        save_file(made, path / file, metadata={"format": "pt"})
    if len(shards) > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=2) + "\n")
    (path / "config.json").write_text(json.dumps(model.config.to_hf(dtype=dtype), indent=2) + "\n")


def _built(
    param: Param, parts: list[tuple[str, names.Part]], read: Read, mesh: Mesh, *, dtype: np.dtype, step: Callable[[int], Any]
) -> jax.Array:
    """A leaf on ``mesh``, put together piece by piece: runs of layers that the host has room for."""
    where = sharding(mesh, param.axes)
    stacked = param.axes[0] == "layer"
    count = param.shape[0] if stacked else 1
    layer_bytes = int(np.prod(param.shape)) * dtype.itemsize // count
    at_once = min(count, max(1, HOST_BYTES // max(1, layer_bytes)))
    of_layer: dict[int, list[tuple[str, names.Part]]] = collections.defaultdict(list)
    for name, part in parts:
        layer = part.at[0] if stacked else 0
        assert isinstance(layer, int)
        of_layer[layer].append((name, part))

    def piece(first: int) -> np.ndarray:
        layers = range(first, min(first + at_once, count))
        host = np.empty((len(layers), *param.shape[1:]) if stacked else param.shape, dtype)
        for layer in layers:
            tensor, held = None, ""
            for name, part in of_layer[layer]:
                if name != held:  # the parts of a tensor follow each other
                    tensor, held = read(name), name
                assert tensor is not None
                names.put(host[layer - first] if stacked else host, part._replace(at=part.at[stacked:]), tensor)
                step(1)
        return host

    if at_once == count:
        return jax.device_put(piece(0), where)
    with jax.set_mesh(mesh):
        leaf = jax.jit(lambda: jnp.zeros(param.shape, dtype), out_shardings=where)()
        put = jax.jit(lambda leaf, piece, at: lax.dynamic_update_slice_in_dim(leaf, piece, at, 0), donate_argnums=0, out_shardings=where)
        for first in range(0, count, at_once):
            leaf = put(leaf, jax.device_put(piece(first), where), first)
    return leaf


def _reader(path: pathlib.Path, model: Model) -> Read:
    """What reads a tensor by its name, once all of them were found to be what the model needs."""
    files = _files(path)
    expected = {tensor.name: tensor.shape for tensor in model.tensors}
    found = {name for name in files if not name.endswith(_BUFFERS)}
    problems = [f"missing {name}" for name in sorted(expected.keys() - found)]
    problems += [f"unexpected {name} in {files[name].name}" for name in sorted(found - expected.keys())]
    if problems:
        raise ValueError(f"{path}: {_few(problems)}")
    opened = {file: _opened(file) for file in sorted(set(files.values()))}
    for name, shape in expected.items():
        if name not in opened[files[name]].keys():
            raise ValueError(
                f"{path}: the index says that {name} is in {files[name].name}, which does not hold it; download the model anew"
            )
        stored = opened[files[name]].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            problems.append(f"{name} in {files[name].name} has shape {tuple(stored.get_shape())}, expected {shape}")
        elif stored.get_dtype() not in _READABLE:
            problems.append(f"{name} in {files[name].name} is stored as {stored.get_dtype()}; only {', '.join(_READABLE)} are read")
    if problems:
        raise ValueError(f"{path}: {_few(problems)}")

    return lambda name: opened[files[name]].get_tensor(name)


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Weight name -> the safetensors file that holds it: what the index says, else what the files do."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        where = _read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise ValueError(f"{index}: weight_map is missing or empty; download the model anew")
        for name, file in where.items():
            if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{index}: {name} is said to be in {file!r}, which is no safetensors file of this folder")
            if not (path / file).is_file():
                raise ValueError(f"{index}: {name} is said to be in {file}, which is not there; download the model anew")
        return {name: path / file for name, file in where.items()}
    single = path / "model.safetensors"
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no safetensors file")
    found: dict[str, pathlib.Path] = {}
    for file in files:
        for name in _opened(file).keys():
            if name in found:
                raise ValueError(f"{path}: {name} is in both {found[name].name} and {file.name}; remove the file that does not belong")
            found[name] = file
    return found


def _opened(file: pathlib.Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        with open(file, "rb") as raw:
            pointer = raw.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise ValueError(f"{file} is a git-LFS pointer, not the weights; run 'git lfs pull' in {file.parent}") from error
        raise ValueError(f"{file} is no whole safetensors file ({error}); download it anew") from error


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found


def _tokenizer_end_ids(path: pathlib.Path) -> set[int]:
    """The id of the tokenizer's ``eos_token``, where its files name one."""
    settings, vocabulary = path / "tokenizer_config.json", path / "tokenizer.json"
    if not settings.is_file() or not vocabulary.is_file():
        return set()
    token = _read_json(settings).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return {added["id"] for added in _read_json(vocabulary).get("added_tokens", []) if added["content"] == text}


def _few(problems: list[str], most: int = 8) -> str:
    return "; ".join(problems[:most]) + (f"; and {len(problems) - most} more" if len(problems) > most else "")
