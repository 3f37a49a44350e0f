"""Parameters as they are read onto a mesh: from checkpoints, by one host of several, as Orbax wrote them, quantised."""

from __future__ import annotations

import collections
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from models import MODEL, random_weights

import pallas_kernels
from diffulex_jax.bench.shapes import SHAPES
from diffulex_jax.engine import programs
from diffulex_jax.models.base import leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import add_up, first_index, make_mesh, sharding, spec, spread
from diffulex_jax.weights import assembly, checkpoint
from diffulex_jax.weights.convert import convert
from pallas_kernels import grouped_matmul, linear


def loads(meshes):
    """What :func:`loaded` finds for each mesh, read layer by layer and at once."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, MODEL, random_weights(), dtype="float32")
        sizes = {"by layer": 1, "at once": 2**30}
        return {name: {size: loaded(make_mesh(**axes), folder, most) for size, most in sizes.items()} for name, axes in meshes.items()}


def loaded(mesh, folder, host_bytes):
    """(same values as written, each leaf where the table says, the share of all parameters that the fullest device holds)."""
    with mock.patch.object(assembly, "HOST_BYTES", host_bytes):
        model, params = checkpoint.load(folder, mesh)
    want = leaves(random_weights())
    got, schema = leaves(params), leaves(model.schema)
    same = got.keys() == want.keys() and all(np.array_equal(got[path], want[path]) for path in want)
    placed = all(got[path].sharding.is_equivalent_to(sharding(mesh, schema[path].axes), got[path].ndim) for path in got)
    held = collections.Counter()
    for leaf in got.values():
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.size
    return {"same": same, "placed": placed, "held": max(held.values()) / sum(leaf.size for leaf in want.values())}


def placed_again(before, axes):
    """Whether parameters that Orbax wrote on one mesh, given as text, are on another what is read there from the checkpoint itself, each
    in its place, plain ones and quantised ones."""
    over = make_mesh(**axes)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(f"{folder}/plain", MODEL, random_weights(), dtype="float32")
        convert(f"{folder}/plain", f"{folder}/placed", mesh=before, dtype=jnp.float32, weights="int4")
        machine = {"kernels": pallas_kernels.choose(over.devices.flat[0])}
        model, want = checkpoint.load(f"{folder}/plain", over, weights="int4", **machine)
        again, got = checkpoint.load(f"{folder}/placed", over, **machine)
    pairs = list(zip(*(map(jax.tree.leaves, (got, want))), strict=True))
    return {
        "model": again == model and jax.tree.structure(got) == jax.tree.structure(want),
        "same": all(np.array_equal(a, b) for a, b in pairs),
        "placed": all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs),
    }


def read_by_one_host(axes):
    """What the first half of a mesh's devices has where they are all that a host has, and the bytes read for it and held by it."""
    mesh, read = make_mesh(**axes), []
    mine = set(mesh.devices.flat[: mesh.size // 2])
    reader, written = checkpoint.open_source, random_weights()

    def counted(path, model, **options):
        real = reader(path, model, **options)

        def of(name, region):
            tensor = real.read(name, region)
            read.append(tensor.nbytes)
            return tensor

        return real._replace(read=of)

    def held_here(where, shape):
        return [region for device, region in where.devices_indices_map(shape).items() if device in mine]

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, MODEL, written, dtype="float32")
        with mock.patch.object(checkpoint, "open_source", counted), mock.patch.object(assembly, "_held_here", held_here):
            _, params = checkpoint.load(folder, mesh)
    same, held = True, 0
    for path, leaf in leaves(params).items():
        regions = {str(shard.index): shard for shard in leaf.addressable_shards if shard.device in mine}
        same &= all(np.array_equal(shard.data, leaves(written)[path][shard.index]) for shard in regions.values())
        held += sum(shard.data.nbytes for shard in regions.values())
    return {"same": same, "read": sum(read), "held": held, "all": sum(leaf.nbytes for leaf in jax.tree.leaves(written))}


def quantised_layers(axes):
    """Of matrices of layers that are quantised onto a mesh: whether they are those of one device and compute the same, and how much of
    each array a device holds."""
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    model = model_of(SHAPES["sdar-8b"] | sizes | {"num_hidden_layers": 2, "vocab_size": 64, "mask_token_id": 63, "eos_token_id": 62})
    mesh = make_mesh(**axes)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, model, random_weights(model), dtype="float32")
        one, shared = (checkpoint.load(folder, at, weights="int4")[1] for at in (make_mesh(), mesh))

    def run(x, p):
        heads = linear.linear(x, p["qkv"], 1)
        x += add_up(linear.linear(heads[..., :-2, :], p["out"], 1), "kv_heads")
        return x + add_up(linear.mlp(x, p["mlp_gate_up"], p["mlp_down"], 1), "mlp")

    x, every = np.random.default_rng(0).standard_normal((1, 3, 64)).astype(np.float32), PartitionSpec()
    with jax.set_mesh(mesh):
        got = jax.jit(spread(run, (every, programs.param_specs(model, shared)["dense"]), every))(x, shared["dense"])
    got, want = np.asarray(got), np.asarray(run(x, one["dense"]))
    arrays = [jax.tree.leaves(each) for each in (one, shared)]
    held = {name: [a.addressable_shards[0].data.size / a.size for a in jax.tree.leaves(leaf)] for name, leaf in shared["dense"].items()}
    return {
        "same": all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True)),
        "held": {name: parts for name, parts in held.items() if len(parts) > 1},
        "computed": bool(np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)),
    }


def quantised(axes):
    """Whether experts quantised onto a mesh are those of one device, each device with its share, and whether they compute the same."""
    mesh, split = make_mesh(**axes), spec(*leaves(MODEL.schema)["moe", "experts_down"].axes)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, MODEL, random_weights(), dtype="float32")
        one, shared = (checkpoint.load(folder, at, weights="int4")[1]["moe"] for at in (make_mesh(), mesh))
    stacks = [[params[name] for name in ("experts_gate_up", "experts_down")] for params in (one, shared)]
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((5, 32)).astype(np.float32), rng.random((5, 2), np.float32)
    ids = np.stack([rng.permutation(8)[:2] for _ in range(5)]).astype(np.int32)

    def run(x, ids, weights, *stacks):
        first = first_index("expert", stacks[1].shape[1])
        return add_up(grouped_matmul.expert_mlp(x, ids, weights, *stacks, layer=1, first_expert=first), "expert")

    with jax.set_mesh(mesh):
        every = PartitionSpec()
        got = jax.jit(spread(run, (every, every, every, split, split), every))(x, ids, weights, *stacks[1])
    want = grouped_matmul.expert_mlp(x, ids, weights, *stacks[0], layer=1)
    arrays = [jax.tree.leaves(each) for each in stacks]
    return {
        "same": all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True)),
        "held": max(a.addressable_shards[0].data.size / a.size for a in arrays[1]),
        "computed": bool(np.allclose(got, want, rtol=1e-5, atol=1e-5)),
    }
