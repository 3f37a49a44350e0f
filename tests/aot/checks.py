"""What holds of the denoise loop of LLaDA2-mini on every slice of TPUs."""

from __future__ import annotations

from diffulex_jax.bench.aot import Compiled
from diffulex_jax.bench.shapes import shape_model


MINI = shape_model("llada2-mini")
GIB = 2**30

# 20 layers: one dense, the others in a scan whose body counts once. The step stands there twice, with a block to be written before the
# window and without; with one, attention runs for either. Experts are multiplied twice, after one look at how many rows each has.
KERNELS = {"block_attention": 6, "write_blocks": 2, "prediction": 1, "remask_decide": 1, "ragged-dot-metadata": 2, "ragged-dot-none": 4}


def check(compiled: Compiled, *, kernels: dict[str, int] = KERNELS, temporaries: float = 0.5) -> None:
    assert compiled.fits
    assert compiled.aliased >= compiled.pool > 0
    assert compiled.temporaries < temporaries * GIB
    assert {name: compiled.kernels.get(name, 0) for name in kernels} == kernels
    # A sum after attention and one after the experts in each of four loops over layers, and what all devices must agree on.
    assert compiled.collectives.keys() <= {"all-reduce", "all-gather"}
    assert 8 <= compiled.collectives["all-reduce"] <= 14
