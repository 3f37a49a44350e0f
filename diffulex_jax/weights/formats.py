"""Checkpoints whose matrices are quantised already: what ``quantization_config`` says of them, and what their tensors mean.

Public layouts are read, those of GPTQ and AWQ as ``gptq`` has them. A matrix ``X.weight [N, K]`` is stored as

* compressed-tensors (https://github.com/vllm-project/compressed-tensors): ``X.weight`` in int8 or float8_e4m3fn and
  ``X.weight_scale [N, 1]``, ``[1]``, ``[N, K / g]`` or one for each block; or ``X.weight_packed`` int32 ``[N, K b / 32]``, numbers of b = 4
  or 8 bits, offset by ``2**(b - 1)``, the first of a word in its lowest bits, with ``X.weight_scale [N, K / g]`` and ``X.weight_shape``.
* block-wise FP8 (DeepSeek): ``X.weight`` in float8_e4m3fn and ``X.weight_scale_inv [N / 128, K / 128]``, which is multiplied by, too.

Activations are never quantised here, whatever a config says of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffulex_jax.models.hf_config import readable, shown
from diffulex_jax.weights import gptq
from pallas_kernels.quantised import Form


KEY = "quantization_config"
_LAYOUTS: dict[Form, tuple[str, str, int]] = {
    "int8": ("int-quantized", "int", 8),
    "int4": ("pack-quantized", "int", 4),
    "fp8": ("float-quantized", "float", 8),
}
_FORMS: dict[tuple[Any, Any, Any], Form] = {
    ("int", 8, "channel"): "int8",
    ("int", 4, "channel"): "int4",
    ("int", 4, "group"): "int4",
    ("float", 8, "channel"): "fp8",
}
_FORMATS = ("int-quantized", "float-quantized", "pack-quantized", "naive-quantized")
_REMEDY = "take a checkpoint in bfloat16, block-wise fp8, compressed-tensors, GPTQ or AWQ"
_BESIDE = ("weight_scale", "weight_scale_inv", "weight_packed", "weight_shape", "input_scale", *gptq.TENSORS)


class Scheme(NamedTuple):
    """What a config says of a checkpoint's quantised matrices.

    Attributes:
      form: the form of ``pallas_kernels.quantised`` that holds them as they are; None where they are made plain.
      block: rows and columns that share a scale, where a scale is one for a block.
      targets, ignore: names of modules: whole, or as regular expressions behind ``re:``; ``"Linear"`` is every one.
      words: how GPTQ or AWQ store them; None where it is neither.
    """

    form: Form | None
    block: tuple[int, int] | None
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    words: gptq.Words | None = None

    def covers(self, module: str) -> bool:
        """Whether the matrix of ``module`` is quantised."""
        return _named(module, self.targets) and not _named(module, self.ignore)


class Matrix(NamedTuple):
    """A quantised matrix: ``values [N, K]`` int8, int16 or float8, and ``scales`` ``[N / n, K / k]``, one for each block of them."""

    values: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """What the ``quantization_config`` of a ``config.json`` says; None where there is none.

    Raises:
      ValueError: naming what is not implemented.
    """
    said = config.get(KEY)
    if said is None:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else None
    if method == "fp8":
        block = said.get("weight_block_size")
        if not _is_block(block):
            raise _refused("weight_block_size", block, "only blocks, as in [128, 128], are")
        ignored = said.get("modules_to_not_convert") or said.get("ignored_layers") or []
        return Scheme(None, tuple(block), ("Linear",), _texts(ignored, "modules_to_not_convert"))
    if method in ("gptq", "awq"):
        return _words(said, method)
    if method != "compressed-tensors":
        raise _refused("quant_method", method, _REMEDY)
    return _compressed(said)


def matrix_names(name: str, there: Iterable[str] | Mapping[str, Any]) -> dict[str, str]:
    """The tensors that stand for the weight ``name`` among those that are ``there``, by what follows the module; {} where it is plain."""
    module = name.removesuffix(".weight")
    found = {suffix: f"{module}.{suffix}" for suffix in ("weight", *_BESIDE) if f"{module}.{suffix}" in there}
    return found if found.keys() & {"weight_scale", "weight_scale_inv", "weight_packed", "qweight"} else {}


def problem(name: str, shape: tuple[int, ...], found: Mapping[str, tuple[str, tuple[int, ...]]], scheme: Scheme) -> str | None:
    """What is wrong with the tensors of a weight, by dtype and shape of each; None where nothing is."""
    if scheme.words is not None:
        return gptq.problem(name, shape, found, scheme.words)
    scale = found.get("weight_scale") or found.get("weight_scale_inv")
    if scale is None or ("weight_packed" in found) == ("weight" in found) or found.keys() & set(gptq.TENSORS):
        return f"{name} is stored as {', '.join(sorted(found))}; a scale and either weight or weight_packed are needed"
    if scale[0] not in ("F32", "F16", "BF16"):
        return f"the scale of {name} is stored as {scale[0]}; only F32, F16 and BF16 are read"
    if "weight_packed" in found:
        dtype, packed = found["weight_packed"]
        if dtype != "I32" or len(packed) != 2 or packed[0] != shape[0] or packed[1] not in (-(-shape[1] // n) for n in (4, 8)):
            return f"{name} is packed as {dtype} {packed}; I32 of {shape[0]} rows of 4 or 8 bits for each of {shape[1]} are read"
    else:
        dtype, own = found["weight"]
        if dtype not in ("F8_E4M3", "I8") or own != shape:
            return f"{name} is stored as {dtype} {own}; F8_E4M3 or I8 {shape} is expected"
    try:
        block_of(shape, scale[1], scheme)
    except ValueError as error:
        return f"{name}: {error}"
    return None


def matrix(name: str, shape: tuple[int, ...], tensors: Mapping[str, np.ndarray], scheme: Scheme) -> Matrix:
    """The matrix ``name`` of ``shape [N, K]`` that :func:`problem` found nothing wrong with.

    Raises:
      ValueError: for numbers that mean something else than the config says, naming it.
    """
    if scheme.words is not None:
        values, scales = gptq.matrix(name, tensors, scheme.words)
        return Matrix(values, scales, (1, shape[1] // scales.shape[1]))
    scales = np.asarray(tensors["weight_scale"] if "weight_scale" in tensors else tensors["weight_scale_inv"])
    block = block_of(shape, scales.shape, scheme)
    values = _unpacked(tensors["weight_packed"], shape[1]) if "weight_packed" in tensors else tensors["weight"]
    return Matrix(values, scales.reshape(-(-shape[0] // block[0]), -(-shape[1] // block[1])), block)


def groups_of(shape: tuple[int, ...], found: Mapping[str, tuple[str, tuple[int, ...]]], scheme: Scheme) -> int | None:
    """In how many groups the scales of each row of a matrix ``[N, K]`` are; None where they are not of rows."""
    if scheme.words is not None:
        return found["scales"][1][0]
    rows, columns = block_of(shape, (found.get("weight_scale") or found["weight_scale_inv"])[1], scheme)
    return shape[1] // columns if rows == 1 else None


def form_of(shape: tuple[int, ...], found: Mapping[str, tuple[str, tuple[int, ...]]], scheme: Scheme) -> Form | None:
    """The form of the values of a matrix of ``shape [N, K]`` that :func:`problem` found nothing wrong with."""
    if scheme.words is not None:
        return scheme.form
    if "weight_packed" in found:
        return "int4" if _bits(found["weight_packed"][1][1], shape[1]) == 4 else "int8"
    return "int8" if found["weight"][0] == "I8" else "fp8"


def plain(m: Matrix) -> np.ndarray:
    """``[N, K]`` float32, exactly what is meant where scales are of 16 bits."""
    rows, columns = m.values.shape
    scales = np.repeat(np.repeat(m.scales.astype(np.float32), m.block[0], 0)[:rows], m.block[1], 1)[:, :columns]
    return m.values.astype(np.float32) * scales


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """``weight_packed``, int32 ``[N, K bits / 32]``, of integers ``[N, K]``."""
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % (32 // bits))))
    unsigned = (values.astype(np.int32) + 2 ** (bits - 1)).astype(np.uint32).reshape(len(values), -1, 32 // bits)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(unsigned << shifts, -1).astype(np.uint32).view(np.int32)


def config_of(form: Form, group: int, targets: tuple[str, ...]) -> dict[str, Any]:
    """The ``quantization_config`` of a compressed-tensors checkpoint of ``form``, with so many rows of ``[K]`` to a scale."""
    layout, kind, bits = _LAYOUTS[form]
    how: dict[str, Any] = {"strategy": "group", "group_size": group} if form == "int4" else {"strategy": "channel", "group_size": None}
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, "actorder": None, "block_structure": None, **how}
    groups = {"group_0": {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None}}
    said = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"}
    return said | {"config_groups": groups, "ignore": [], "kv_cache_scheme": None}


def _words(said: dict[str, Any], method: str) -> Scheme:
    """Of GPTQ or AWQ. Its linear layers are quantised, but for the output layer."""
    awq = method == "awq"
    bits: Any = said.get("bits")
    group: Any = said.get("group_size")
    if bits not in ((4,) if awq else (4, 8)) or isinstance(bits, bool):
        raise _refused("bits", bits, f"only {'4 is' if awq else '4 and 8 are'}")
    if not isinstance(group, int) or isinstance(group, bool) or (group < 1 and group != -1):
        raise _refused("group_size", group, "a number of rows, or -1 for all, is needed")
    layout = said.get("version", "gemm") if awq else said.get("checkpoint_format", "gptq")
    if layout not in (("gemm",) if awq else ("gptq", "gptq_v2")):
        raise _refused("version" if awq else "checkpoint_format", layout, f"only {'gemm is' if awq else 'gptq and gptq_v2 are'}")
    for key in ("dynamic", "desc_act"):
        if said.get(key):
            raise _refused(key, said[key], "leave it out")
    symmetric = not awq and said.get("sym") is True
    forms: dict[tuple[Any, bool], Form] = {(4, True): "int4", (4, False): "int4", (8, True): "int8"}
    form = forms.get((bits, group == -1)) if symmetric else None
    words = gptq.Words(awq, bits, None if group == -1 else group, int(layout == "gptq"), symmetric)
    ignored = _texts(said.get("modules_to_not_convert") or [], "modules_to_not_convert")
    return Scheme(form, None, ("Linear",), ignored, words)


def _compressed(said: dict[str, Any]) -> Scheme:
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise _refused("config_groups", groups, "an object of objects is needed")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if said.get(key):
            raise _refused(key, said[key], "leave it out")
    forms, blocks, targets = set[Form | None](), set[tuple[int, int] | None](), list[str]()
    for group in groups.values():
        layout, weights = group.get("format") or said.get("format"), group.get("weights")
        if layout not in _FORMATS:
            raise _refused("format", layout, f"only {', '.join(_FORMATS)} are")
        if not isinstance(weights, dict):
            raise _refused("weights", weights, "only groups with quantised weights are")
        bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
        if (bits, kind) not in ((8, "int"), (8, "float"), (4, "int")):
            raise _refused("num_bits", bits, f"type={shown(kind)}; only int of 4 and 8 bits and float of 8 are")
        if weights.get("symmetric", True) is not True:
            raise _refused("symmetric", weights["symmetric"], "only weights without zero points are")
        if weights.get("actorder") not in (None, False, "weight", "static"):  # these two order nothing in the file
            raise _refused("actorder", weights["actorder"], "only weights in their own order are")
        if strategy not in ("channel", "tensor", "group", "block"):
            raise _refused("strategy", strategy, "only channel, tensor, group and block are")
        forms.add(_FORMS.get((kind, bits, strategy)))
        block = weights.get("block_structure")
        if strategy == "block" and not _is_block(block):
            raise _refused("block_structure", block, "rows and columns, as in [128, 128], are needed")
        blocks.add((block[0], block[1]) if isinstance(block, list) and strategy == "block" else None)
        targets += _texts(group.get("targets") or [], "targets")
    # Groups of several kinds are told apart by their tensors, and made plain.
    form = forms.pop() if len(forms) == 1 else None
    if len(blocks - {None}) > 1:
        raise _refused("block_structure", sorted(filter(None, blocks)), "only one for all groups is")
    return Scheme(form, max(blocks, key=bool), tuple(targets), _texts(said.get("ignore") or [], "ignore"))


def block_of(shape: tuple[int, ...], scales: tuple[int, ...], scheme: Scheme) -> tuple[int, int]:
    """Rows and columns of a matrix that share a scale, by the shape of the scales."""
    rows, columns = shape
    if int(np.prod(scales)) == 1:
        return rows, columns
    if scheme.block is not None and scales == tuple(-(-n // b) for n, b in zip(shape, scheme.block, strict=True)):
        return scheme.block
    if len(scales) in (1, 2) and scales[0] == rows and columns % (groups := (*scales, 1)[1]) == 0:
        return 1, columns // groups
    raise ValueError(f"scales of shape {scales} are not one a matrix {shape}, one a row, one a group of a row or one a block")


def _bits(words: int, columns: int) -> int:
    """Of a number, where so many words hold a row of so many."""
    return 4 if words == -(-columns // 8) else 8


def _unpacked(words: np.ndarray, columns: int) -> np.ndarray:
    bits = _bits(words.shape[1], columns)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = (words.view(np.uint32)[..., None] >> shifts).astype(np.uint8) & np.uint8(2**bits - 1)
    return (numbers.reshape(len(words), -1)[:, :columns] - np.uint8(2 ** (bits - 1))).view(np.int8)


def _named(module: str, names: tuple[str, ...]) -> bool:
    def fits(name: str) -> bool:
        if name.startswith("re:"):
            return re.match(name[3:], module) is not None
        return name in ("Linear", module) or module.endswith("." + name)

    return any(map(fits, names))


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _refused(key, value, "a list of names is needed")
    for text in value:
        if text.startswith("re:"):
            try:
                re.compile(text[3:])
            except re.error as error:
                raise _refused(key, readable(text), f"it is no regular expression: {error}") from error
    return tuple(value)


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value)


def _refused(key: str, value: Any, why: str) -> ValueError:
    return ValueError(f"config: {KEY}.{key}={shown(value)} is not implemented: {why}")
