"""The table of pods: ``python -m diffulex_jax.planning.table`` compiles every row and prints ``diffulex_jax/planning/pods.md``."""

from __future__ import annotations

import importlib.metadata
import os
import sys

from diffulex_jax.planning.plan import Plan, plan


ROWS = (
    ("llada2-mini", "v5e:4x4", 64),
    ("llada2-mini", "v5e:16x16", 1024),
    ("llada2-mini", "v6e:4x4", 64),
    ("llada2-mini", "v6e:16x16", 1024),
    ("llada2-mini", "v5p:4x4x4", 256),
    ("llada2-mini", "tpu7x:4x4x4", 512),
    ("llada2-flash", "v5e:4x4", 64),
    ("llada2-flash", "v5e:4x4", 8),
    ("llada2-flash", "v5e:16x16", 256),
    ("llada2-flash", "v6e:4x4", 64),
    ("llada2-flash", "v6e:16x16", 1024),
    ("llada2-flash", "v5p:4x4x4", 256),
    ("llada2-flash", "tpu7x:4x4x4", 512),
)
"""Model, topology and slots; each slot has 4096 positions."""

COLUMNS = (
    *("model", "slice", "mesh", "slots", "weights", "pool", "temporaries", "head-room"),
    *("seconds", "exchanges", "megabytes", "floor", "predicted", "tokens/s"),
)

_PAGE = """# Pods

LLaDA2-mini and LLaDA2-flash in bfloat16 on slices of TPUs, as `diffulex-jax plan` plans them: the denoise program of an engine, strategy
`llada2`, slots of 4096 positions, 8 steps a dispatch, compiled for the slice on a machine without one, by JAX {jax} and libtpu {libtpu}.
No TPU has run any of it: the last three columns are arithmetic on data sheets, and `plan` prints what they assume.

- Meshes are those that `plan` proposes: `d4 e1 t4` is data 4 x expert 1 x tensor 4.
- Weights, pool, temporaries and head-room are GiB of one device; `seconds` is what tracing and compiling took here.
- Exchanges and megabytes are those of one step: two sums of hidden states a layer, what all devices agree on, and the best tokens.
- `floor` is milliseconds to read what a step must at the data sheet's bandwidth, `predicted` those of a step, and `tokens/s` is of all
  slots together at one token a slot and step.
- A row without temporaries does not fit, and its head-room is what is missing.

{table}

`python -m diffulex_jax.planning.table > diffulex_jax/planning/pods.md` makes this page; `make test-pods` compiles every row anew and
compares, `make test` a few of them.
"""


def row(made: Plan) -> list[str]:
    """The cells of a plan, in the order of the table's columns."""
    compiled = made.compiled
    return [
        *(made.model, made.topology, " ".join(f"{axis[0]}{n}" for axis, n in made.mesh.items()), str(made.slots)),
        *(f"{size / 2**30:.2f}" for size in (made.weights, made.pool)),
        f"{compiled.temporaries / 2**30:.2f}" if compiled else "–",
        f"{made.head_room / 2**30:.2f}",
        f"{compiled.seconds:.0f}" if compiled else "–",
        ", ".join(f"{e.count} {kind}" for kind, e in made.exchanges.items()) or "none",
        f"{sum(e.bytes for e in made.exchanges.values()) / 1e6:.1f}",
        *(f"{figure:.1f}" for figure in (made.floor_ms, made.step_ms)),
        f"{made.tokens_per_second:.0f}",
    ]


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for devices: none is used
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for model, topology, slots in ROWS:
        lines.append(row(plan(model, topology, slots=slots)))
        print(*lines[-1], file=sys.stderr)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    print(_PAGE.format(table=table, **versions), end="")


if __name__ == "__main__":
    main()
