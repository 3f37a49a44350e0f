"""Hugging Face directories: ``config.json`` and safetensors, read and written tensor by tensor, without torch.

No tensor is taken from a file that does not belong to the model, and whatever is wrong is one line that names the file, the tensor
and what would be right. What a directory's files may be is in ``weights.folder``.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
from typing import Any, cast

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file
from tqdm import tqdm

from diffulex_jax.errors import SettingError
from diffulex_jax.models import hf_config, names
from diffulex_jax.models.base import Model, Params, leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import check_split
from diffulex_jax.weights import assembly, formats, placed
from diffulex_jax.weights.folder import SMALL, check_pointer, read_json, tokenizer_end_ids
from diffulex_jax.weights.quantise import check_groups, form_of, keep, store, what_is_quantised
from diffulex_jax.weights.source import Read, open_source
from pallas_kernels import REFERENCE, Kernels
from pallas_kernels.quantised import Form


_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # of a model on the hub that are fetched
EMBEDDED = pathlib.Path(__file__).parent.parent / "embedded"
SHARD_BYTES = 2 * 2**30
"""Most bytes of a file that :func:`save` writes."""

_BAR: dict[str, Any] = {"desc": "loading", "unit": "tensor", "delay": 2.0, "leave": False}


def resolve(model: str) -> pathlib.Path:
    """The local directory of a model: a path, ``"embedded"``, or a hub id (fetched with ``huggingface_hub``).

    Raises:
      ValueError: when it is none of these, or the directory holds no ``config.json``, or pointers for files.
    """
    if model == "embedded":
        path = EMBEDDED
    elif pathlib.Path(model).is_dir():
        path = pathlib.Path(model)
    elif pathlib.Path(model).is_file():
        raise ValueError(f"model {model!r} is a file; give the directory that holds it and its config.json")
    else:
        import huggingface_hub  # late: most models are directories

        try:
            path = pathlib.Path(huggingface_hub.snapshot_download(model, allow_patterns=_FILES))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model {model!r} is neither a directory, nor 'embedded', nor a hub id that could be fetched: {error}"
            ) from error
    if not (path / "config.json").is_file():
        found = sorted(config.parent for config in path.glob("snapshots/*/config.json"))
        hint = f"; it is a folder of the hub's cache, and the model is in {found[-1]}" if found else ""
        raise ValueError(f"model {model!r}: {path} holds no config.json{hint}")
    for name in SMALL:
        if (path / name).is_file():
            check_pointer(path / name)
    return path


def load_model(path: str | pathlib.Path) -> Model:
    """The network that ``config.json`` of a model directory describes.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    path = pathlib.Path(path)
    raw = read_json(path / "config.json")
    try:
        formats.scheme_of(raw)
        return model_of({key: value for key, value in raw.items() if key != formats.KEY}, name=str(path.name))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def form_in(path: str | pathlib.Path, weights: str | None = None) -> Form | None:
    """The form in which an engine holds what it may quantise of a directory: ``weights``, else that of its files, if it is one of ours.

    Raises:
      SettingError: where the files have it in one form, and ``weights`` names another.
      ValueError: naming a file and what is wrong with it.
    """
    model, scheme = load_model(path), formats.scheme_of(read_json(pathlib.Path(path) / "config.json"))
    schema = leaves(model.schema)
    ours = [tensor.name for tensor in model.tensors if schema[tensor.parts[0].leaf].quantisable]
    whole = scheme is not None and all(scheme.covers(name.removesuffix(".weight")) for name in ours)
    found = scheme.form if scheme is not None and whole else None
    if found is not None and weights not in (None, found):
        what = what_is_quantised(model)
        raise SettingError("weights", f"weights={weights!r}, but the {what} of {path} are quantised already, as {found!r}; leave it out")
    return found or cast(Form | None, weights)


def load_end_ids(path: str | pathlib.Path) -> tuple[int, ...]:
    """The tokens that end an output: those that the config, ``generation_config.json`` and the tokenizer name, together.

    Raises:
      ValueError: naming the file, where an id is not one of the vocabulary, or the file is broken.
    """
    path = pathlib.Path(path)
    spec = load_model(path).spec
    named: list[tuple[pathlib.Path, Any]] = list(tokenizer_end_ids(path))
    if (path / "generation_config.json").is_file():
        entry = read_json(path / "generation_config.json").get("eos_token_id")
        named += [(path / "generation_config.json", id_) for id_ in hf_config.end_ids(entry)]
    for file, id_ in named:
        if isinstance(id_, bool) or not isinstance(id_, int) or not 0 <= id_ < spec.vocab_size:
            raise ValueError(f"{file}: the end-of-sequence token {hf_config.shown(id_)} is not an id of [0, {spec.vocab_size})")
    ids = {*spec.eos_ids, *(id_ for _, id_ in named)}
    return tuple(sorted(ids - {spec.mask_id}))


def load(
    path: str | pathlib.Path,
    mesh: Mesh,
    *,
    dtype: Any = jnp.float32,
    weights: Form | None = None,
    kernels: Kernels = REFERENCE,
    progress: bool = False,
) -> tuple[Model, Params]:
    """Reads a model directory and places its parameters on ``mesh``.

    The host holds a piece or two of one leaf at a time, and as much of the mapped files. A piece has :data:`assembly.HOST_BYTES`, or one
    expert where that is more, or a layer where there are none or devices share them. It reads no part of a tensor that only other hosts'
    devices hold.

    Args:
      path: the directory; one that :mod:`placed` wrote too.
      mesh: where the parameters go.
      dtype: of all parameters but those whose :class:`Param` names another.
      weights: how the leaves that may be are quantised, ``"int8"``, ``"int4"`` or ``"fp8"``, in the form that ``kernels`` read: piece by
        piece on the device, which never holds such a leaf whole in ``dtype``. None: as they are in the files, if that is one of these
        forms; else not at all. All other matrices that the files hold quantised are made plain, one after the other.
      progress: show a progress bar over tensors where stderr is a terminal and it takes some seconds.

    Raises:
      ValueError: naming every weight that is missing, unexpected, misshapen or of a type that is not read, a file that is broken, or
        an axis that the mesh's devices do not divide.
    """
    path = pathlib.Path(path)
    model = load_model(path)
    params = leaves(model.schema)
    for leaf, param in params.items():
        check_split(mesh, param.shape, param.axes, leaf[-1])
    if placed.is_placed(path):
        return model, placed.restore(path, model, mesh, dtype=dtype, weights=weights, kernels=kernels)
    there, weights = form_in(path), form_in(path, weights)
    if there is None:
        check_groups(model, weights, mesh)
    source = open_source(path, model, host_bytes=assembly.HOST_BYTES)
    parts: dict[names.Path, list[tuple[names.Tensor, names.Part]]] = collections.defaultdict(list)
    for tensor in model.tensors:
        for part in tensor.parts:
            parts[part.leaf].append((tensor, part))
    tree: Params = {}
    with tqdm(total=sum(map(len, parts.values())), **_BAR, disable=None if progress else True) as bar:
        # What is no stack is on the host whole, beside its copy: it goes first, while there is little else.
        for leaf, param in sorted(params.items(), key=lambda item: item[1].axes[0] == "layer"):
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), leaf[:-1], tree)
            if there is not None and param.quantisable:
                groups = assembly.groups(parts[leaf], source, form=there)
                made = keep(param, there, groups=groups, kernels=kernels, dtype=dtype, mesh=mesh)
                kept = assembly.stored(param, source, form=there, groups=groups, keep=made)
            else:
                planes, how = [(param.shape, np.dtype(param.dtype or dtype))], {"kernels": kernels, "dtype": dtype, "mesh": mesh}
                kept = assembly.Kept(planes, lambda *of: (source.read(*of),), store(param, weights, **how))
            node[leaf[-1]] = assembly.built(param, parts[leaf], kept, mesh, step=bar.update)
    return model, tree


def reader(path: pathlib.Path, model: Model) -> Read:
    """What reads the tensors of a model directory by their names, quantised ones made plain, in little memory.

    Raises:
      ValueError: naming every tensor that is not what the model needs.
    """
    return open_source(path, model, host_bytes=assembly.HOST_BYTES).read


def save(path: str | pathlib.Path, model: Model, params: Params, *, dtype: str = "bfloat16") -> None:
    """Writes ``config.json`` and safetensors in the names and layout that :func:`load` (and torch) read.

    The host holds one layer and one file's tensors at a time; files have at most :data:`SHARD_BYTES`.

    Raises:
      ValueError: for quantised parameters, of which there is no such file.
    """
    if (form := form_of(params)) is not None:
        raise ValueError(f"the parameters are quantised, as {form!r}, and only plain ones are saved; save those that they were made from")
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
