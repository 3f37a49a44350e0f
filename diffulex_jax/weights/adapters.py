"""LoRA adapters (arXiv 2106.09685): a transform of a parameter tree, and PEFT's files, which others read and write.

A matrix ``W [out, in]`` of the checkpoint becomes ``W + alpha / rank B A`` with ``A [rank, in]`` and ``B [out, rank]``. Adapters know the
tensors of the checkpoint, not the leaves of the tree, which may hold several of them side by side: so what is trained here fits the
model wherever else it runs.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import pathlib
import re
from collections.abc import Collection
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import Model, Params, leaves
from diffulex_jax.models.names import Path, Tensor
from pallas_kernels.quantised.matrices import is_quantised


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names

Adapters = dict[str, dict[str, jax.Array]]
"""Of each :class:`Site` by its name: ``{"a": [n, rank, in], "b": [n, out, rank]}``, n matrices."""


class Lora(NamedTuple):
    """What is adapted, and how.

    Attributes:
      rank: columns of B and rows of A.
      alpha: ``alpha / rank`` scales the product.
      targets: leaves of the parameter tree, by their last name (``"qkv"``, in all kinds of layers) or their path (``"moe.qkv"``).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("qkv", "out")


class Site(NamedTuple):
    """Matrices of one shape that lie at the same place of every layer: module ``name`` of each, and the tensors."""

    name: str
    tensors: tuple[Tensor, ...]


def init(model: Model, lora: Lora, key: jax.Array) -> Adapters:
    """Fresh float32 adapters: A uniform in ±1/sqrt(in), as PEFT's, and B zero, so that nothing is changed yet.

    Raises:
      SettingError: for a rank that is not positive, or a target that no leaf is called or that holds no matrices.
    """
    found: Adapters = {}
    places = sites(model, lora)
    for site, own in zip(places, jax.random.split(key, len(places)), strict=True):
        (wide, deep), n = site.tensors[0].shape, len(site.tensors)
        a = jax.random.uniform(own, (n, lora.rank, deep), minval=-1, maxval=1) / math.sqrt(deep)
        found[site.name] = {"a": a, "b": jnp.zeros((n, wide, lora.rank))}
    return found


def merge(model: Model, lora: Lora, params: Params, adapters: Adapters, *, but: Collection[Path] = ()) -> Params:
    """``params`` with the adapters' products added: a new tree, whose other leaves are the same arrays. It can be differentiated. The
    leaves ``but`` stay as they are.

    Raises:
      SettingError: for a target whose leaf is quantised.
    """
    flat = dict(leaves(params))
    for site in sites(model, lora):
        delta = lora.alpha / lora.rank * jnp.einsum("nor,nri->noi", adapters[site.name]["b"], adapters[site.name]["a"])
        layers = np.array([tensor.parts[0].at[0] for tensor in site.tensors])
        for part in site.tensors[0].parts:
            leaf = flat[part.leaf]
            if part.leaf in but:
                continue
            if is_quantised(leaf):
                raise SettingError("targets", f"targets: {'.'.join(part.leaf)} is quantised, and only plain leaves are adapted")
            one = functools.partial(einops.rearrange, pattern=part.pattern, **part.sizes)
            change = jax.vmap(lambda d, one=one, rows=part.rows: one(d[rows]))(delta)
            flat[part.leaf] = leaf.at[(layers, *part.at[1:])].add(change.astype(leaf.dtype))
    tree: Params = {}
    for path, leaf in flat.items():
        functools.reduce(lambda node, name: node.setdefault(name, {}), path[:-1], tree)[path[-1]] = leaf
    return tree


def sites(model: Model, lora: Lora) -> list[Site]:
    """The matrices that ``lora`` adapts, in the order of a checkpoint.

    Raises:
      SettingError: for a rank that is not positive, or a target that no leaf is called or that holds no matrices.
    """
    if lora.rank < 1:
        raise SettingError("rank", f"rank={lora.rank} must be positive")
    schema = leaves(model.schema)
    stacks = {path for path, param in schema.items() if param.axes[0] == "layer"}
    matrices = [t for t in model.tensors if len(t.shape) == 2 and {part.leaf for part in t.parts} <= stacks]
    known = {name for t in matrices for part in t.parts for name in (part.leaf[-1], ".".join(part.leaf))}
    for target in lora.targets:
        if target not in known:
            raise SettingError("targets", f"targets: {target!r} is no leaf of matrices; choose of {', '.join(sorted(known))}")
    found: dict[Any, list[Tensor]] = collections.defaultdict(list)
    for tensor in matrices:
        if {tensor.parts[0].leaf[-1], ".".join(tensor.parts[0].leaf)} & set(lora.targets):
            name = re.sub(r"\.\d+\.", ".*.", _module(tensor), count=1)  # without the number of the layer
            found[name, tensor.parts[0].leaf].append(tensor)
    return [Site(f"{leaf[0]}.{name}", tuple(tensors)) for (name, leaf), tensors in found.items()]


def save(path: str | pathlib.Path, model: Model, lora: Lora, adapters: Adapters, *, base: str = "") -> None:
    """Writes adapters as PEFT does, for PEFT and :func:`load`.

    Args:
      path: directory to write to.
      model, lora, adapters: what :func:`init` was given and gave, trained.
      base: name of the model that they adapt.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors, modules = {}, set()
    for site in sites(model, lora):
        for i, tensor in enumerate(site.tensors):
            module = _module(tensor)
            modules.add(module.rsplit(".", 1)[-1])
            for letter, array in adapters[site.name].items():
                tensors[f"{PREFIX}{module}.lora_{letter.upper()}.weight"] = np.asarray(array[i], np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load(path: str | pathlib.Path, model: Model) -> tuple[Lora, Adapters]:
    """Reads adapters that PEFT or :func:`save` wrote. Matrices of a site that the files leave out have zeros.

    Raises:
      ValueError: naming the file, and a key that asks for what is not done here, a tensor that fits nothing in the model, or one that
        is missing or misshapen.
    """
    path = pathlib.Path(path)
    config = _config(path / CONFIG)
    rank = config["r"]
    alpha = config["lora_alpha"] * (math.sqrt(rank) if config.get("use_rslora") else 1)
    try:
        stored = load_file(path / WEIGHTS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / WEIGHTS} cannot be read: {error}") from error
    modules = {_module(tensor): tensor for tensor in model.tensors}
    touched: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    for name, array in stored.items():
        module, _, letter = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if module not in modules or letter not in ("A", "B"):
            raise ValueError(f"{path / WEIGHTS}: {name} fits nothing in this model")
        wide, deep = modules[module].shape
        if array.shape != (shape := {"A": (rank, deep), "B": (wide, rank)}[letter]):
            raise ValueError(f"{path / WEIGHTS}: {name} has shape {array.shape}, expected {shape}")
        touched[module][letter] = array.astype(np.float32)
    for module, pair in touched.items():
        if len(pair) < 2:
            raise ValueError(f"{path / WEIGHTS}: {module} has lora_{min(pair)} alone")
    lora = Lora(rank, alpha, tuple(sorted({".".join(modules[module].parts[0].leaf) for module in touched})))
    found = {}
    for site in sites(model, lora):
        (wide, deep), n = site.tensors[0].shape, len(site.tensors)
        a, b = np.zeros((n, rank, deep), np.float32), np.zeros((n, wide, rank), np.float32)
        for i, tensor in enumerate(site.tensors):
            if _module(tensor) in touched:
                a[i], b[i] = (touched[_module(tensor)][letter] for letter in ("A", "B"))
        found[site.name] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return lora, found


_ONLY = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False}
_EMPTY = ("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "target_parameters")


def _config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for key, value in _ONLY.items():
        if config.get(key, value) not in (value, None):
            raise ValueError(f"{path}: {key}={config[key]!r} is not done here, only {value!r}")
    for key in _EMPTY:
        if config.get(key):
            raise ValueError(f"{path}: {key}={config[key]!r} is not done here")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0 or (key == "r" and not isinstance(value, int)):
            raise ValueError(f"{path}: {key}={value!r} must be a positive number")
    return config


def _module(tensor: Tensor) -> str:
    """The module of a tensor: its name without ``.weight``."""
    return tensor.name.removesuffix(".weight")
