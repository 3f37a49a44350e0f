"""Writes a model directory anew with its weights quantised, tensor by tensor, as compressed-tensors lays them out."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from diffulex_jax.models.base import Model, leaves
from diffulex_jax.models.names import Tensor
from diffulex_jax.weights import checkpoint, formats
from diffulex_jax.weights.folder import read_json
from diffulex_jax.weights.quantise import what_is_quantised
from pallas_kernels.quantised import Form
from pallas_kernels.quantised import quantise as quantised


FILE_BYTES = 2**30
"""Most bytes of a file of weights, which the host holds at a time."""

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".gguf")


def write(source: str | pathlib.Path, out: str | pathlib.Path, weights: Form, *, progress: bool = False) -> str:
    """Writes the model directory ``source`` to ``out`` with quantised matrices, which an engine then loads as they are: those of a
    mixture's experts, or, where there are none, of all layers.

    All other tensors are written in bfloat16, and the small files beside them copied. The values and scales are those that an engine
    with ``weights`` makes of ``source`` itself in bfloat16. The host holds one file of :data:`FILE_BYTES` at a time.

    Returns:
      What is quantised: "experts" or "matrices".

    Raises:
      ValueError: for a directory that is not a model's, or quantised already, and for an ``out`` that holds files.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    raw, model = read_json(source / "config.json"), checkpoint.load_model(source)
    if formats.scheme_of(raw) is not None:
        raise ValueError(f"{source} is quantised already; take the checkpoint that it was made from")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give a directory that is not, or is empty")
    read = checkpoint.reader(source, model)
    out.mkdir(parents=True, exist_ok=True)
    schema, held, room = leaves(model.schema), dict[str, np.ndarray](), FILE_BYTES
    where, files, groups = dict[str, int](), 0, set[int]()

    def write_file() -> None:
        nonlocal held, room, files
        files += 1
        save_file(held, out / _part(files), metadata={"format": "pt"})
        where.update(dict.fromkeys(held, files))
        held, room = {}, FILE_BYTES

    for tensor in tqdm(model.tensors, disable=not progress, desc=f"quantising to {weights}", unit="tensor"):
        param = schema[tensor.parts[0].leaf]
        if param.quantisable:
            made, group = _quantised(tensor, read(tensor.name, ()), weights)
            groups.add(group)
        else:
            made = {tensor.name: read(tensor.name, ()).astype(param.dtype or ml_dtypes.bfloat16)}
        size = sum(array.nbytes for array in made.values())
        if held and size > room:
            write_file()
        held |= made
        room -= size
    write_file()
    for number in range(1, files + 1):
        (out / _part(number)).rename(out / _whole(number, files))
    if files > 1:
        named = {name: _whole(number, files) for name, number in where.items()}
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}, indent=2) + "\n")
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != "config.json" and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, out / file.name)
    # Groups of several lengths are those of matrices whose depth the usual one does not divide: the file says the length by its shape.
    said = formats.config_of(weights, max(groups), targets=_targets(model))
    config = raw | {"torch_dtype": "bfloat16", formats.KEY: said}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # the last: without it, the directory is no model
    return what_is_quantised(model)


def _quantised(tensor: Tensor, weight: np.ndarray, form: Form) -> tuple[dict[str, np.ndarray], int]:
    """The tensors that stand for a matrix ``[N, K]``, and how many numbers of a row share a scale."""
    values, scales = map(np.asarray, _quantise(weight.astype(ml_dtypes.bfloat16), form=form))
    module, group = tensor.name.removesuffix(".weight"), weight.shape[1] // scales.shape[1]
    if form != "int4":
        return {tensor.name: values, f"{module}.weight_scale": scales}, group
    packed = formats.packed(values, 4)
    return {
        f"{module}.weight_packed": packed,
        f"{module}.weight_scale": scales,
        f"{module}.weight_shape": np.array(weight.shape, np.int64),
    }, group


@functools.partial(jax.jit, static_argnames="form")
def _quantise(weight: jax.Array, *, form: Form) -> tuple[jax.Array, jax.Array]:
    found = quantised(weight.T, form, dtype=jnp.int8 if form == "int4" else None)
    return found.values.T, found.scales.T


def _targets(model: Model) -> tuple[str, ...]:
    """The modules of what is quantised as regular expressions: their names without their numbers."""
    schema: dict[Any, Any] = leaves(model.schema)
    modules = [tensor.name.removesuffix(".weight") for tensor in model.tensors if schema[tensor.parts[0].leaf].quantisable]
    shapes = {".".join(r"\d+" if part.isdecimal() else part for part in module.split(".")) for module in modules}
    return tuple(f"re:^{shape.replace('.', chr(92) + '.')}$" for shape in sorted(shapes))


def _part(number: int) -> str:
    return f"part-{number:05}.safetensors"


def _whole(number: int, files: int) -> str:
    return "model.safetensors" if files == 1 else f"model-{number:05}-of-{files:05}.safetensors"
