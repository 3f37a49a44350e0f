"""Every TPU kernel compiled for every generation, at sizes that no tile divides; and programs that must not compile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.planning.chips import slice_of
from diffulex_jax.planning.compiling import _missing
from pallas_kernels import block_attention, grouped_matmul, linear, prediction, remask, token_merge
from pallas_kernels.block_attention.tpu import POOL_ORDER
from pallas_kernels.quantised import GROUP, Quantised, dtype_of
from pallas_kernels.quantised.matrices import Matrices


GENERATIONS = ["v5e:2x2", "tpu7x:2x2x1", *(pytest.param(there, marks=pytest.mark.pods) for there in ("v6e:2x2", "v5p:2x2x1", "v4:2x2x1"))]
ROWS, VOCAB, EMBED = 250, 157_201, 2048  # no tile divides them
POOL = (20, 512, 32, 4, 128)


def compile_for(topology, function, *args, pools=0, returns_pool=False, **options):
    """``function`` of arrays of these shapes and dtypes, for one chip; the first ``pools`` lie as the kernels read them."""
    mesh = make_mesh(slice_of(topology).devices)
    where = NamedSharding(mesh, PartitionSpec())
    lies = Format(Layout(major_to_minor=POOL_ORDER), where)
    shapes = [jax.ShapeDtypeStruct(*arg, sharding=lies if i < pools else where) for i, arg in enumerate(args)]
    with jax.set_mesh(mesh):
        return jax.jit(function, out_shardings=lies if returns_pool else where, **options).lower(*shapes).compile()


def kernels(compiled):
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


# The others compile it in the denoise loop.
@pytest.mark.sweep
@pytest.mark.parametrize("topology, dtype", [("v5e:2x2", jnp.float32), ("v5p:2x2x1", jnp.bfloat16)])
def test_prediction(topology, dtype):
    def predict(hidden, lm_head, current, key, temperature, top_p, cut, penalized, penalty, banned):
        sampling = prediction.Sampling(jax.random.wrap_key_data(key), temperature, top_p, cut)
        options = {"penalized": penalized, "penalty": penalty, "banned": banned, "top_k": 5}
        options |= {"tempered": dtype == jnp.float32, "entropy": dtype == jnp.float32}
        return prediction.predict_from_hidden(hidden, lm_head, current, forbidden_id=7, sampling=sampling, **options)

    rows = [((ROWS,), kind) for kind in (jnp.float32, jnp.float32, jnp.int32, jnp.int32, jnp.float32)]
    args = ((ROWS, EMBED), dtype), ((VOCAB, EMBED), dtype), ((ROWS,), jnp.int32), ((ROWS, 2), jnp.uint32), *rows, ((ROWS, 8), jnp.int32)
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        compiled = compile_for(topology, predict, *args)
    assert kernels(compiled) == 1
    # Logits are made for the rows that top-p or top-k ask for, 32 at a time; those of all rows would take 150 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < ROWS * VOCAB * 4 / 2


@pytest.mark.parametrize("topology", GENERATIONS)
def test_decision(topology):
    shape = 9, 3, 32
    kinds = {"tokens": jnp.int32, "masked": jnp.bool_, "confidence": jnp.float32, "editable": jnp.bool_, "times": jnp.int32}
    kinds |= {"token": jnp.int32, "prob": jnp.float32, "current_prob": jnp.float32}
    named = {name: (shape, kind) for name, kind in kinds.items()} | {"least": (shape[:2], jnp.int32)}
    named |= dict.fromkeys(("accept_threshold", "edit_threshold", "remask_threshold"), (shape[:1], jnp.float32))
    compiled = compile_for(topology, lambda *a: remask.decide(**dict(zip(named, a, strict=True)), max_per_position=2), *named.values())
    assert kernels(compiled) == 1


def attend(pool_k, pool_v, heads, layer, table, length, lanes):
    keys = block_attention.Keys(pool_k, pool_v, table, length, lanes)
    return block_attention.block_attention(heads, keys, layer=layer, block=heads.shape[1] // lanes.shape[1])


@pytest.mark.parametrize("topology", GENERATIONS)
def test_attention_reads_the_pool_where_it_lies(topology):
    args = (POOL, jnp.bfloat16), (POOL, jnp.bfloat16), ((5, 96, 4, 6, 128), jnp.bfloat16), ((), jnp.int32)
    args += ((5, 63), jnp.int32), ((5,), jnp.int32), ((5, 3), jnp.bool_)
    compiled = compile_for(topology, attend, *args, pools=2)
    assert kernels(compiled) == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 8 << 20  # a pool has 320 MiB


@pytest.mark.sweep_but("4-32-0-v5e:2x2", "8-32-1-tpu7x:2x2x1", "32-16-1-tpu7x:2x2x1")
@pytest.mark.parametrize("topology", ["v5e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(("block", "page", "written_by_kernels"), [(4, 32, 0), (8, 32, 1), (32, 64, 1), (32, 16, 1)])
def test_pages_that_are_no_blocks(topology, block, page, written_by_kernels):
    """SDAR's blocks of 4 too: read by the kernel, written by XLA, and no pool is copied."""
    pool, width = ((20, 512, page, 4, 128), jnp.bfloat16), 3 * block
    args = pool, pool, ((5, width, 4, 6, 128), jnp.bfloat16), ((), jnp.int32), ((5, 63), jnp.int32), ((5,), jnp.int32), ((5, 3), jnp.bool_)
    read = compile_for(topology, attend, *args, pools=2)
    assert kernels(read) == 1
    parts = (block // page,) if block > page else ()
    blocks = ((20, 5, block, 4, 128), jnp.bfloat16), ((5, *parts), jnp.int32), ((5,), jnp.int32)
    wrote = compile_for(topology, block_attention.write_blocks, pool, *blocks, pools=1, returns_pool=True, donate_argnums=0)
    assert kernels(wrote) == written_by_kernels
    assert wrote.memory_analysis().alias_size_in_bytes >= 20 * 512 * page * 4 * 128 * 2
    assert max(c.memory_analysis().temp_size_in_bytes for c in (read, wrote)) < 8 << 20


BLOCKS = ((20, 5, 32, 4, 128), jnp.bfloat16), ((5,), jnp.int32), ((5,), jnp.int32)
POOL_BYTES = 20 * 512 * 32 * 4 * 128 * 2


@pytest.mark.parametrize("topology", GENERATIONS)
def test_blocks_are_written_in_place(topology):
    compiled = compile_for(
        topology, block_attention.write_blocks, (POOL, jnp.bfloat16), *BLOCKS, pools=1, returns_pool=True, donate_argnums=0
    )
    assert kernels(compiled) == 1
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= POOL_BYTES
    assert memory.temp_size_in_bytes < 8 << 20


def test_a_pool_that_is_not_given_away_is_copied():
    compiled = compile_for("v5e:2x2", block_attention.write_blocks, (POOL, jnp.bfloat16), *BLOCKS, pools=1, returns_pool=True)
    assert compiled.memory_analysis().alias_size_in_bytes == 0


@pytest.mark.parametrize("topology", GENERATIONS)
@pytest.mark.parametrize("mode, top_k", [("dmax_topk", 1), ("iter_smooth_topk", 3)])
def test_token_merge(topology, mode, top_k):
    spec, shape = token_merge.MergeSpec(mode=mode, top_k=top_k), (5, 29)

    def merge(table, tokens, ids, probs, soft):
        return token_merge.merge(table, tokens, mask_id=7, ids=ids, probs=probs, soft=soft, spec=spec)

    soft = ((*shape, top_k), jnp.int32), ((*shape, top_k), jnp.float32), (shape, jnp.bool_)
    compiled = compile_for(topology, merge, ((VOCAB, EMBED), jnp.bfloat16), (shape, jnp.int32), *soft)
    assert kernels(compiled) == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 8 << 20  # the table has 614 MiB


@pytest.mark.sweep
def test_a_block_larger_than_vmem_is_refused():
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] + 1

    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8192, 8192), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED.*vmem"):
        compile_for("v5e:2x2", call, ((8192, 8192), jnp.float32))


@pytest.mark.parametrize(
    ("topology", "form", "dtype", "backend"), [("v5e:2x2", "int8", jnp.int8, "ragged"), ("tpu7x:2x2x1", "fp8", jnp.float8_e4m3fn, "tpu")]
)
def test_quantised_experts_are_multiplied_as_they_are(topology, form, dtype, backend):
    """XLA widens silently what a device has no product for: a whole stack, to float32."""
    layers, experts, embed, width, tokens = 3, 32, 512, 256, 64

    def run(x, ids, weights, *arrays):
        gate_up, down = (Quantised(*arrays[i : i + 2], form) for i in (0, 2))

        def layer(x, i):
            return x + grouped_matmul.expert_mlp(x, ids, weights, gate_up, down, layer=i, backend=backend), None

        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    def stack(depth, columns):
        return ((layers, experts, depth, columns), dtype), ((layers, experts, 1, columns), jnp.bfloat16)

    rows = ((tokens, embed), jnp.bfloat16), ((tokens, 4), jnp.int32), ((tokens, 4), jnp.float32)
    memory = compile_for(topology, run, *rows, *stack(embed, 2 * width), *stack(width, embed)).memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 20


@pytest.mark.sweep
@pytest.mark.parametrize(("topology", "form", "backend"), [("v5e:2x2", "int4", "ragged"), ("tpu7x:2x2x1", "int4", "tpu")])
def test_no_layer_of_quantised_experts_is_made_plain(topology, form, backend):
    layers, experts, embed, width, tokens = 3, 128, 512, 512, 64

    def run(x, ids, weights, *arrays):
        gate_up, down = (Quantised(*arrays[i : i + 2], form) for i in (0, 2))

        def layer(x, i):
            return x + grouped_matmul.expert_mlp(x, ids, weights, gate_up, down, layer=i, backend=backend), None

        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    def stack(depth, columns):
        groups = depth // GROUP if form == "int4" else 1
        return ((layers, experts, depth, columns), dtype_of(form)), ((layers, experts, groups, columns), jnp.bfloat16)

    rows = ((tokens, embed), jnp.bfloat16), ((tokens, 4), jnp.int32), ((tokens, 4), jnp.float32)
    memory = compile_for(topology, run, *rows, *stack(embed, 2 * width), *stack(width, embed)).memory_analysis()
    assert memory.temp_size_in_bytes < 2 * experts * embed * 3 * width / 2  # of bfloat16


@pytest.mark.sweep_but("v5e:2x2-int4")
@pytest.mark.parametrize(("topology", "form"), [("v5e:2x2", "int8"), ("v5e:2x2", "int4"), ("tpu7x:2x2x1", "fp8"), ("tpu7x:2x2x1", "int4")])
def test_quantised_layers_are_made_plain_inside_the_product(topology, form):
    """Neither the stack, nor one layer of it."""
    layers, embed, width, tokens = 4, 1024, 2048, 64

    def run(x, *arrays):
        qkv, gate_up, down = (Matrices(*arrays[i : i + 2], form, packed=False) for i in (0, 2, 4))

        def layer(x, i):
            x += linear.linear(x, qkv, i)[..., 0, :]
            return x + linear.mlp(x, gate_up, down, i), None

        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    def stack(depth, *columns):
        groups = depth // GROUP if form == "int4" else 1
        return ((layers, depth, *columns), dtype_of(form)), ((layers, groups, *columns), jnp.bfloat16)

    arrays = *stack(embed, 3, embed), *stack(embed, 2, width), *stack(width, embed)
    memory = compile_for(topology, run, ((1, tokens, embed), jnp.bfloat16), *arrays).memory_analysis()
    assert memory.temp_size_in_bytes < 2 * embed * width  # one matrix in bfloat16


def test_a_program_larger_than_the_memory_says_how_much_is_missing():
    with pytest.raises(jax.errors.JaxRuntimeError, match="exceeds available HBM") as refused:
        compile_for("v5e:2x2", lambda x: x + 1, ((9 << 10, 1 << 10, 1 << 8), jnp.float32))
    assert _missing(refused.value).missing == pytest.approx((18 - 15.75) * 2**30, abs=0.02 * 2**30)
    assert _missing(ValueError("something else")) is None
