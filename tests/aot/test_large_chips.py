"""The whole denoise loop of LLaDA2-mini, compiled for the chips of large pods that are not there."""

from __future__ import annotations

import pytest
from checks import KERNELS, MINI, check

from diffulex_jax.bench import aot


pytestmark = pytest.mark.usefixtures("least_effort")


def test_fourth_generation():
    check(aot.compile_denoise("v4:2x2x1", MINI))


def test_fifth_generation_with_soft_tokens():
    check(aot.compile_denoise("v5p:2x2x1", MINI, strategy="dmax"), kernels=KERNELS | {"token_merge": 2, "remask_decide": 0})


def test_seventh_generation_copies_weights_into_larger_tiles():
    # XLA multiplies experts in tiles of 16 rows there, and takes parameters in tiles of 8 only; it fits all the same.
    check(aot.compile_denoise("tpu7x:2x2x1", MINI), temporaries=8.5)
