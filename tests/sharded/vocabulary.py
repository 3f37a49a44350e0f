"""Devices that share the vocabulary find together what one finds alone."""

from __future__ import annotations

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from diffulex_jax.parallel.mesh import make_mesh
from pallas_kernels import prediction


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
