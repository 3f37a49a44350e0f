"""Matrices as GPTQ and AWQ store them: integers from 0 on in words, with the zero point and the scale of each group of rows.

``w[k, n] = (q[k, n] - zero[k // g, n]) * scale[k // g, n]`` of a weight ``X.weight [N, K]``, in b = 4 or 8 bits, c = 32 / b to a word:

* GPTQ: ``X.qweight`` int32 ``[K / c, N]``, row c r + j in the bits from b j on; ``X.qzeros`` int32 ``[K / g, N / c]``, columns alike,
  one less than the zero point where ``checkpoint_format`` is ``"gptq"``; ``X.scales`` ``[K / g, N]``; ``X.g_idx`` int32 ``[K]``, the group
  of each row.
* AWQ (version ``"gemm"``): ``X.qweight`` int32 ``[K, N / 8]`` and ``X.qzeros`` int32 ``[K / g, N / 8]``, of 4 bits, whose words hold the
  columns in the order 0 2 4 6 1 3 5 7; ``X.scales``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of AWQ's words


class Words(NamedTuple):
    """How a checkpoint's matrices are stored.

    Attributes:
      awq: by AWQ's tools, not by GPTQ's.
      bits: of a number.
      group: rows that share a scale; None: all of a column.
      less: what zero points are stored less by.
      symmetric: all zero points are the middle, which makes the numbers those of a quantised form.
    """

    awq: bool
    bits: int
    group: int | None
    less: int
    symmetric: bool


def problem(name: str, shape: tuple[int, ...], found: Mapping[str, tuple[str, tuple[int, ...]]], words: Words) -> str | None:
    """What is wrong with the tensors of a weight ``[N, K]``, by dtype and shape of each; None where nothing is."""
    columns, rows = shape
    per_word, group = 32 // words.bits, words.group or rows
    if rows % group or (columns if words.awq else rows) % per_word or columns % per_word:
        return f"{name} {shape} does not consist of whole groups of {group} and words of {per_word}"
    packed = (rows, columns // per_word) if words.awq else (rows // per_word, columns)
    wanted: dict[str, tuple[int, ...]] = {
        "qweight": packed,
        "qzeros": (rows // group, columns // per_word),
        "scales": (rows // group, columns),
    }
    wanted |= {"g_idx": (rows,)} if "g_idx" in found else {}
    if found.keys() != wanted.keys():
        return f"{name} is stored as {', '.join(sorted(found))}; {', '.join(wanted)} are needed"
    for part, size in wanted.items():
        dtype, own = found[part]
        if own != size or (dtype not in ("F32", "F16", "BF16") if part == "scales" else dtype != "I32"):
            kind = "F16" if part == "scales" else "I32"
            return f"{part} of {name} is stored as {dtype} {own}; {kind} {size} is expected"
    return None


def matrix(name: str, tensors: Mapping[str, np.ndarray], words: Words) -> tuple[np.ndarray, np.ndarray]:
    """Numbers ``[N, K]`` without their zero points, int8 or int16, and scales ``[N, K / g]``; :func:`problem` found nothing wrong.

    Raises:
      ValueError: for rows that are not in the order of their groups, and for zero points that the config says there are not.
    """
    axis = 1 if words.awq else 0
    numbers = _unpacked(tensors["qweight"], words, axis=axis)
    zeros = _unpacked(tensors["qzeros"], words, axis=1) + words.less
    rows, groups = len(numbers), len(zeros)
    if "g_idx" in tensors and not np.array_equal(tensors["g_idx"], np.arange(rows) // (rows // groups)):
        raise ValueError(f"the rows of {name} are in the order of their activations (g_idx), which is not implemented")
    if words.symmetric and not (zeros == 2 ** (words.bits - 1)).all():
        raise ValueError(f"{name} has zero points (qzeros), and the config says sym=true")
    plain = (numbers.reshape(groups, -1, numbers.shape[1]) - zeros[:, None]).reshape(numbers.shape)
    return plain.T.astype(np.int8 if words.symmetric or words.bits == 4 else np.int16), tensors["scales"].T


def _unpacked(packed: np.ndarray, words: Words, *, axis: int) -> np.ndarray:
    """int32 numbers, those of a word one after the other along ``axis``."""
    order = _COLUMNS if words.awq else tuple(range(32 // words.bits))
    shifts = np.empty(len(order), np.uint32)
    shifts[list(order)] = np.arange(len(order), dtype=np.uint32) * words.bits
    numbers = (np.expand_dims(packed.view(np.uint32), axis + 1) >> (shifts if axis else shifts[:, None])) & np.uint32(2**words.bits - 1)
    shape = (packed.shape[0], -1) if axis else (-1, packed.shape[1])
    return numbers.astype(np.int32).reshape(shape)
