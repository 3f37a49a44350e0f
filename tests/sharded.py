"""Decoding on eight CPU devices against one; run by test_sharding in a process of its own, because a process has as many as it began with.

Takes one JSON object, ``{"programs": names of meshes, "engines": meshes as text}``: what to decode over.
Prints one: for each mesh what differs from a single device, which exchanges its program holds, and how a checkpoint is
read onto it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
from diffulex_jax import Engine, SamplingParams, decode, request_state
from diffulex_jax.bench import step
from diffulex_jax.bench.forward import step_bytes
from diffulex_jax.bench.shapes import SHAPES, random_params
from diffulex_jax.engine import programs
from diffulex_jax.models.base import init, leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import abstract_mesh, add_up, first_index, make_mesh, sharding, spec, spread
from diffulex_jax.rules.base import dims_for
from diffulex_jax.state import POOL_AXES, STATE_AXES, KVPool
from diffulex_jax.strategies import dmax, fast_dllm_v2
from diffulex_jax.training import objective
from diffulex_jax.training.data import Examples, shuffled
from diffulex_jax.training.recipe import Recipe, Term, changed
from diffulex_jax.training.trainer import train
from diffulex_jax.weights import adapters, assembly, checkpoint
from diffulex_jax.weights.adapters import Lora
from diffulex_jax.weights.convert import convert
from pallas_kernels import grouped_matmul, linear, prediction


SHAPE = {
    "model_type": "llada2_moe",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "mask_token_id": 95,
    "eos_token_id": 94,
    "max_position_embeddings": 256,
}
MODEL = model_of(SHAPE)
NEXT = model_of(  # biases, a head that is the embeddings, and outputs that speak of the next position
    {
        "model_type": "Fast_dLLM_Qwen",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "mask_token_id": 95,
        "eos_token_id": 94,
        "tie_word_embeddings": True,
    }
)
SLOTS, WINDOW, BLOCK, PAGES, STEPS = 4, 2, 4, 6, 24
MASK = MODEL.spec.mask_id
PROMPTS = (9, 3, 8, 11)  # tokens: two whole blocks, none, two and nothing else, two


def decoded(mesh, model=MODEL, rule=None):
    """(tokens, forwards, confidences, keys of the pool, the compiled program) of four requests, one of them sampled."""
    rule, alone = dmax() if rule is None else rule, model.spec.commit_alone
    sizes = {"slots": SLOTS, "window": WINDOW, "block": BLOCK, "page": BLOCK, "pages_per_slot": PAGES}
    dims = dims_for(rule, **sizes, mask_id=MASK, commit_alone=alone)
    program = decode.Program(model, dims, rule, pallas_kernels.REFERENCE)
    on_pool, on_slots, everywhere = (sharding(mesh, axes) for axes in (POOL_AXES, STATE_AXES, ()))
    placed = jax.tree.map(lambda split: NamedSharding(mesh, split), programs.param_specs(model))
    weights = jax.tree.map_with_path(
        lambda path, a: jax.random.normal(jax.random.key(1), a.shape) if path[-1].key == "qkv_bias" else a,
        init(model, jax.random.key(0), scale=0.3),
    )
    params = jax.device_put(weights, placed)
    layers = model.spec.layers
    shape = layers.count, SLOTS * PAGES, BLOCK, layers.kv_heads, layers.head_dim
    pool = jax.device_put(KVPool(jnp.zeros(shape), jnp.zeros(shape)), on_pool)
    state = jax.device_put(request_state.empty_state(dims, rule), on_slots)
    table, rng = np.arange(SLOTS * PAGES, dtype=np.int32).reshape(SLOTS, PAGES), np.random.default_rng(0)

    def jit(function, donated, out):
        return jax.jit(function, donate_argnums=donated, out_shardings=out)

    prefill = jit(functools.partial(programs.prefill, program), 1, (on_pool, on_slots))
    shards, per_shard = mesh.shape["data"], SLOTS // mesh.shape["data"]
    admit = jit(functools.partial(request_state.admit, dims, rule), 0, on_slots)
    out = on_pool, on_slots, everywhere, everywhere
    denoise = jit(functools.partial(programs.denoise, program, steps=STEPS), (1, 2), out)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        for slot, n in enumerate(PROMPTS):
            prompt, blocks = rng.integers(0, 90, n).astype(np.int32), n // BLOCK - (alone and n % BLOCK == 0)
            tokens = np.zeros((shards, 2, 1, BLOCK), np.int32)
            tokens[slot // per_shard, :blocks, 0] = prompt[: blocks * BLOCK].reshape(-1, BLOCK)
            there = (np.arange(2) < blocks) & (np.arange(shards) == slot // per_shard)[:, None]
            rows = {"start": np.tile(np.arange(2) * BLOCK, shards), "length": there * BLOCK, "written": there}
            rows = {name: a.reshape(2 * shards).astype(np.int32) for name, a in rows.items()} | {"written": there.reshape(-1, 1)}
            pool, _ = prefill(params, pool, tokens.reshape(-1, 1, BLOCK), **rows, page_table=table[[slot] * 2 * shards])
            hot = {"temperature": 0.8, "top_p": 0.9, "seed": 1} if slot == 1 else {}
            settings = SamplingParams(max_tokens=10, accept_threshold=0.6, **hot)
            packed = request_state.make_request(dims, prompt=prompt, params=settings, eos_ids=model.spec.eos_ids)
            state = admit(state, np.int32(slot), packed)
        args = params, pool, state
        plan = {"page_table": table, "known": np.zeros(SLOTS, np.int32), "max_steps": np.int32(STEPS), "stop_on_finish": np.bool_(False)}
        compiled = denoise.lower(*args, **plan).compile()
        pool, state, _, _ = compiled(*args, **plan)
    return *(np.asarray(a) for a in (state.sequence.tokens, state.nfe, state.sequence.confidence, pool.k)), compiled


def difference(one, many):
    exchanges = re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", many[-1].as_text())
    return {
        "tokens": int((one[0] != many[0]).sum()),
        "forwards": int((one[1] != many[1]).sum()),
        "confidence": float(np.abs(one[2] - many[2]).max()),
        "keys": float(np.abs(one[3] - many[3]).max()),
        "largest_key": float(np.abs(one[3]).max()),
        "exchanges": dict(collections.Counter(exchanges)),
    }


def shared_vocabulary():
    """Whether the TPU kernel (as plain XLA) finds on four devices that share the vocabulary what the reference finds on one."""
    rng, rows, vocab = np.random.default_rng(0), 12, 96
    hidden, lm_head = (jnp.asarray(rng.standard_normal((n, 16)), jnp.float32) for n in (rows, vocab))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(rows))
    at = jnp.arange(rows)
    sampling = prediction.Sampling(keys, jnp.where(at % 2, 0.9, 0.0), jnp.where(at % 3, 1.0, 0.7), jnp.zeros(rows, jnp.int32))
    current, options = jnp.asarray(rng.integers(0, vocab, rows), jnp.int32), {"forbidden_id": 95, "sampling": sampling, "top_k": 3}
    options |= {"tempered": True, "entropy": True}
    want = prediction.predict_from_hidden(hidden, lm_head, current, backend="reference", **options)

    def local(lm_head):
        return prediction.tpu.predict_from_hidden(hidden, lm_head, current, vocab_axes=("expert", "tensor"), interpret=True, **options)

    mesh = make_mesh(data=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        split = PartitionSpec(("expert", "tensor"))
        got = jax.jit(jax.shard_map(local, in_specs=split, out_specs=PartitionSpec(), check_vma=False))(lm_head)
    return all(np.allclose(a, b, rtol=1e-5) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def stats_of_vocabulary(hidden, lm_head, ids, *, forbidden_id):
    """What the Hopper kernel finds, in plain jnp, by the words of ``gpu.reduce_vocabulary``."""
    current, penalized, penalty, *banned = ids
    logits = jnp.einsum("rd,vd->rv", hidden, lm_head, preferred_element_type=jnp.float32)
    at = jnp.arange(len(lm_head))
    logits -= jnp.where(at == penalized[:, None], jax.lax.bitcast_convert_type(penalty, jnp.float32)[:, None], 0)
    out = functools.reduce(jnp.logical_or, [at == row[:, None] for row in banned], at == forbidden_id)
    logits = jnp.where(out, -jnp.inf, logits)
    peak = jnp.maximum(logits.max(1), -1e30)
    here = jnp.where(at == current[:, None], logits, -jnp.inf).max(1)
    return peak, jnp.exp(logits - peak[:, None]).sum(1), jnp.where(logits == peak[:, None], at, 2**31 - 1).min(1), here


def shared_by_gpus():
    """What the Hopper kernel's devices find together, its Pallas part as plain XLA, and the bytes they exchange.

    Four devices share 96 tokens: rows whose best is banned or penalised, two equal tokens on different devices, a device of which a row
    may have nothing, a row that is not a number.
    """
    rng, rows, vocab = np.random.default_rng(0), 12, 96
    hidden, lm_head = (jnp.asarray(rng.standard_normal((n, 64)), jnp.bfloat16) for n in (rows, vocab))
    lm_head = lm_head.at[70].set(lm_head[30])
    hidden = hidden.at[0].set(lm_head[30]).at[1].set(jnp.nan)
    logits = np.asarray(jnp.einsum("rd,vd->rv", hidden, lm_head, preferred_element_type=jnp.float32))
    best, row = logits.argmax(1), np.arange(rows)
    banned = np.full((rows, 26), -1)
    banned[2:4, 0], banned[4, :24], banned[5, 0] = best[2:4], np.arange(24, 48), vocab - 1
    options = {"forbidden_id": int(best[6]), "sampling": None, "top_k": 1, "banned": jnp.asarray(banned, jnp.int32)}
    options |= {"penalized": jnp.asarray(np.where(row > 8, best, -1), jnp.int32), "penalty": jnp.full(rows, 3.0)}
    current = jnp.asarray(np.where(row % 3, rng.integers(0, vocab, rows), best), jnp.int32)
    want = prediction.predict_from_hidden(hidden, lm_head, current, backend="reference", **options)

    def local(lm_head):
        return prediction.predict_from_hidden(hidden, lm_head, current, vocab_axes=("expert", "tensor"), backend="gpu", **options)

    split = PartitionSpec(("expert", "tensor"))
    with jax.set_mesh(make_mesh(data=2, expert=2, tensor=2)), mock.patch.object(prediction.gpu, "reduce_vocabulary", stats_of_vocabulary):
        share = jax.jit(jax.shard_map(local, in_specs=split, out_specs=PartitionSpec(), check_vma=False)).lower(lm_head).compile()
    found, number = share(lm_head), row != 1
    pairs = [(np.asarray(getattr(found, name)), np.asarray(getattr(want, name))) for name in want._fields[:5]]
    return {
        "same": all(np.allclose(a[number], b[number], rtol=1e-5) for a, b in pairs),
        "tie": int(found.token[0]),
        "no number": bool(np.isnan(found.prob[1])) and 0 <= int(found.token[1]) < vocab,
        "exchanged": re.findall(r"= (\S+?)\{\S* (all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", share.as_text()),
    }


def loaded(mesh, folder, host_bytes):
    """(same values as written, each leaf where the table says, the share of all parameters that the fullest device holds)."""
    with mock.patch.object(assembly, "HOST_BYTES", host_bytes):
        model, params = checkpoint.load(folder, mesh)
    want = leaves(init(MODEL, jax.random.key(0), scale=0.3))
    got, schema = leaves(params), leaves(model.schema)
    same = got.keys() == want.keys() and all(np.array_equal(got[path], want[path]) for path in want)
    placed = all(got[path].sharding.is_equivalent_to(sharding(mesh, schema[path].axes), got[path].ndim) for path in got)
    held = collections.Counter()
    for leaf in got.values():
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.size
    return {"same": same, "placed": placed, "held": max(held.values()) / sum(leaf.size for leaf in want.values())}


def loads(meshes):
    """What :func:`loaded` finds for each mesh, read layer by layer and at once."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, MODEL, init(MODEL, jax.random.key(0), scale=0.3), dtype="float32")
        sizes = {"by layer": 1, "at once": 2**30}
        return {name: {size: loaded(make_mesh(**axes), folder, most) for size, most in sizes.items()} for name, axes in meshes.items()}


def placed_again(before, axes):
    """Whether parameters that Orbax wrote on one mesh, given as text, are on another what is read there from the checkpoint itself, each
    in its place, plain ones and quantised ones."""
    over = make_mesh(**axes)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(f"{folder}/plain", MODEL, init(MODEL, jax.random.key(0), scale=0.3), dtype="float32")
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
    reader, written = checkpoint.open_source, init(MODEL, jax.random.key(0), scale=0.3)

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
        checkpoint.save(folder, model, init(model, jax.random.key(0), scale=0.3), dtype="float32")
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
        checkpoint.save(folder, MODEL, init(MODEL, jax.random.key(0), scale=0.3), dtype="float32")
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


def engines(meshes):
    """Whether engines over ``meshes``, given as text, generate what one on a single device does, and what is said of a bad one."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 90, n).tolist() for n in (*PROMPTS, *PROMPTS)]
    settings = [SamplingParams(max_tokens=20, ignore_eos=True), SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.8, seed=1)] * 4
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, MODEL, init(MODEL, jax.random.key(0), scale=0.3), dtype="float32")
        sizes = {
            "strategy": "llada2_edit",
            "block_size": BLOCK,
            "force_block_size": True,
            "max_model_len": 32,
            "max_slots": 8,
            "num_pages": 16,
            "warm_up": False,
        }

        preempted, scores, changed = {}, {}, {}

        def answers(mesh):
            engine = Engine.from_pretrained(folder, mesh=mesh, **sizes)
            outputs = [o.token_ids for o in engine.generate(prompts, settings)]
            preempted[mesh] = engine.stats["preemptions"]
            if mesh in (None, meshes[0]):
                engine.update_params(init(MODEL, jax.random.key(1), scale=0.3))
                scores[mesh] = np.concatenate(engine.score(prompts, [tokens[:6] for tokens in outputs]))
                changed[mesh] = [o.token_ids for o in engine.generate(prompts, settings)]
            return outputs

        def refused(mesh):
            try:
                Engine.from_pretrained(folder, mesh=mesh, **sizes)
            except ValueError as error:
                return str(error)

        single = answers(None)
        same = {mesh: answers(mesh) == single for mesh in meshes}
        refusals = {mesh: refused(mesh) for mesh in ("tensor=3", "data=3")}
        updated = {
            "same": changed[meshes[0]] == changed[None] != single,
            "scores": float(np.abs(scores[meshes[0]] - scores[None]).max()),
            "scored": len(scores[None]),
        }
        facts = {"same": same, "preempted": min(preempted.values()), "tokens": sum(map(len, single))}
        return facts | {"refused": refusals, "updated": updated}


def adapted(mesh):
    """Whether rows with adapters of their own decode over ``mesh`` as on one device, how many answers differ, and what a device holds."""
    rng, names = np.random.default_rng(0), ["a", None, "b", "a", None, "b", "a", "b"]
    prompts = [rng.integers(0, 90, 9).tolist()] * len(names)
    settings = [SamplingParams(max_tokens=12, ignore_eos=True, adapter_name=name) for name in names]
    sizes = {"block_size": BLOCK, "force_block_size": True, "max_model_len": 32, "max_slots": 8, "warm_up": False}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, MODEL, init(MODEL, jax.random.key(0), scale=0.3), dtype="float32")
        lora, folders = Lora(2, 4.0, ("qkv", "out", "mlp_gate_up", "mlp_down", "shared_gate_up", "shared_down")), {}
        fresh = adapters.init(MODEL, lora, jax.random.key(0))
        for seed, name in enumerate(("a", "b")):
            folders[name] = f"{folder}/{name}"
            some = jax.tree.map(lambda a, seed=seed: jax.random.normal(jax.random.key(a.size + seed), a.shape) * 0.3, fresh)
            adapters.save(folders[name], MODEL, lora, some)
        engines = [Engine.from_pretrained(folder, mesh=each, adapters=folders, **sizes) for each in (None, mesh)]
        one, many = ([o.token_ids for o in engine.generate(prompts, settings)] for engine in engines)
    down = engines[1]._device._params["adapters"]["moe"]["shared_down"].a
    return {
        "same": one == many,
        "answers": [one.index(tokens) for tokens in one],
        "held": down.addressable_shards[0].data.size / down.size,
    }


def bench(axes):
    """What the bench of a step finds on a mesh, how many times what a device must read it says, and whether random weights are shared."""
    mesh, schema = make_mesh(**axes), leaves(MODEL.schema)
    params = jax.device_put(
        init(MODEL, jax.random.key(0)), jax.tree.map(lambda split: NamedSharding(mesh, split), programs.param_specs(MODEL))
    )
    text = ",".join(f"{axis}={size}" for axis, size in axes.items())
    asked = {"shape": "own", "strategies": ["llada2"], "contexts": [32], "dtype": "float32", "repeats": 1, "mesh": text}
    with mock.patch.dict(SHAPES, own=SHAPE), mock.patch.object(step, "random_params", lambda *_, **__: params):
        report = step.run(batches=[2], **asked)
        try:
            step.run(batches=[1], **asked)
        except ValueError as error:
            refused = str(error)
    (figures,) = report["steps"]
    must = step_bytes(MODEL, 4, batch=1, context=64, experts=figures["experts_touched"], mesh=abstract_mesh(**axes))
    few = dataclasses.replace(MODEL, schema={"embed": MODEL.schema["embed"], "moe": {"experts_down": MODEL.schema["moe"]["experts_down"]}})
    one, shared = (leaves(random_params(few, jnp.float32, mesh=each)) for each in (make_mesh(), mesh))
    return {
        "counted": [figures[name] for name in ("exchanges", "experts_touched")],
        "read": figures["gigabytes"] * 1e9 / must,
        "timed": min(figures["ms_median"], figures["exchange_ms"]) > 0,
        "kernel_times": report["kernel_times"],
        "refused": refused,
        "same": all(np.allclose(one[path], shared[path], atol=1e-6) for path in one),
        "placed": all(a.sharding.is_equivalent_to(sharding(mesh, schema[path].axes), a.ndim) for path, a in shared.items()),
    }


def trained(axes):
    """How far two steps of training over a mesh are from those on one device, where its parameters are, and what is said of rows."""
    rng = np.random.default_rng(0)
    examples = Examples(rng.integers(0, 90, (4, 64)), np.full(4, 10), np.full(4, 50))
    terms = (Term("masked", objective.masked, 0.5), Term("multi_block", objective.multi_block, 0.5))
    settings = {"objectives": terms, "steps": 2, "rows": 4, "warmup": 1, "learning_rate": 0.01, "balance": 0.01, "dtype": "float32"}
    recipe = Recipe(model=MODEL, data=lambda about: shuffled(examples, rows=about.rows, seed=0), **settings)
    one, many = train(recipe), train(recipe, mesh=make_mesh(**axes))
    pairs = [[np.ravel(leaves(made.params)[path]) for path in leaves(MODEL.schema)] for made in (one, many)]
    try:
        train(changed(recipe, rows=6), mesh=make_mesh(data=4))
        refused = ""
    except ValueError as error:
        refused = str(error)
    schema = leaves(MODEL.schema)
    return {
        "losses": max(abs(one.history[0][name] - many.history[0][name]) for name in ("masked", "multi_block", "gradient_norm")),
        # Adam makes a step of each gradient, however small: what is rounding alone may go either way.
        "same": float(np.mean(np.abs(np.concatenate(pairs[0]) - np.concatenate(pairs[1])) < 1e-5)),
        "placed": all(
            leaf.sharding.is_equivalent_to(sharding(make_mesh(**axes), schema[path].axes), leaf.ndim)
            for path, leaf in leaves(many.params).items()
        ),
        "refused": refused,
    }


def programs_over(meshes, names):
    """For each of ``names``, a mesh, or a mesh and ", next" for the model of the next position, how it differs from a single device."""
    kinds, found = {"": (MODEL, dmax()), ", next": (NEXT, fast_dllm_v2())}, {}
    for suffix, (model, rule) in kinds.items():
        if chosen := {f"{name}{suffix}": axes for name, axes in meshes.items() if f"{name}{suffix}" in names}:
            single = decoded(make_mesh(), model, rule)
            found |= {name: difference(single, decoded(make_mesh(**axes), model, rule)) for name, axes in chosen.items()}
            found[f"generated{suffix}"] = int((single[0] != MASK).sum())
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    asked = json.loads(sys.argv[1])
    meshes = {"2x2x2": {"data": 2, "expert": 2, "tensor": 2}, "1x4x2": {"expert": 4, "tensor": 2}}
    found = programs_over(meshes, asked["programs"]) | {
        "adapted": adapted("data=2,expert=2,tensor=2"),
        "loads": loads(meshes),
        "one host": {name: read_by_one_host(axes) for name, axes in (meshes | {"2": {"tensor": 2}}).items()},
        "placed": placed_again("data=2,expert=2,tensor=2", meshes["1x4x2"]),
        "quantised": quantised(meshes["1x4x2"]),
        "quantised layers": quantised_layers(meshes["1x4x2"]),
        "bench": bench({"data": 2, "expert": 2}),
        "trained": trained({"data": 2, "tensor": 2}),
        "engines": engines(asked["engines"]),
        "shared_vocabulary": shared_vocabulary(),
        "shared_by_gpus": shared_by_gpus(),
    }
    print(json.dumps(found))
