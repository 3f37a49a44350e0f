"""What holds of the denoise loop of LLaDA2-mini on every slice of TPUs."""

from __future__ import annotations

from diffulex_jax.planning.plan import Plan


GIB = 2**30

# 20 layers: one dense, the others in a scan whose body counts once. The step stands there twice, with a block to be written before the
# window and without; with one, attention runs for either. Experts are multiplied twice, after one look at how many rows each has.
KERNELS = {"block_attention": 6, "write_blocks": 2, "prediction": 1, "remask_decide": 1, "ragged-dot-metadata": 2, "ragged-dot-none": 4}


def check(plan: Plan, *, kernels: dict[str, int] = KERNELS, temporaries: float = 0.5) -> None:
    assert plan.missing == 0 < plan.head_room
    compiled = plan.compiled
    assert compiled.aliased >= plan.pool > 0
    assert compiled.temporaries < temporaries * GIB
    assert {name: compiled.kernels.get(name, 0) for name in kernels} == kernels
    # A sum after attention and one after the experts in each of 20 layers; two on which all devices agree; the best tokens.
    shared = plan.mesh["expert"] * plan.mesh["tensor"] > 1
    assert {kind: e.count for kind, e in plan.exchanges.items()} == ({"all-reduce": 42, "all-gather": 1} if shared else {"all-reduce": 2})
    if shared:
        rows = plan.slots // plan.mesh["data"] * 32
        assert plan.exchanges["all-reduce"].bytes == 40 * rows * 2048 * 2 + 16
