"""Engines over meshes: what they generate, score and refuse, and adapters."""

from __future__ import annotations

import tempfile
from unittest import mock

import jax
import numpy as np
from models import BLOCK, MODEL, PROMPTS, random_weights

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.engine import build
from diffulex_jax.engine.executables import Programs
from diffulex_jax.weights import adapters, checkpoint
from diffulex_jax.weights.adapters import Lora
from pallas_kernels import Kernels, choose


def engines(meshes):
    """Whether engines over ``meshes``, given as text, generate what one on a single device does, and what is said of a bad one."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 90, n).tolist() for n in (*PROMPTS, *PROMPTS)]
    settings = [SamplingParams(max_tokens=20, ignore_eos=True), SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.8, seed=1)] * 4
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, MODEL, random_weights(), dtype="float32")
        sizes = {
            "strategy": "llada2_edit",
            "block_size": BLOCK,
            "force_block_size": True,
            "page_size": 8,
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
                engine.update_params(random_weights(seed=1))
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
        checkpoint.save(folder, MODEL, random_weights(), dtype="float32")
        lora, folders = Lora(2, 4.0, ("qkv", "out", "mlp_gate_up", "mlp_down", "shared_gate_up", "shared_down")), {}
        fresh = adapters.init(MODEL, lora, jax.random.key(0))
        for seed, name in enumerate(("a", "b")):
            folders[name] = f"{folder}/{name}"
            drawn = np.random.default_rng(seed)
            some = jax.tree.map(lambda a, drawn=drawn: 0.3 * drawn.standard_normal(a.shape, np.float32), fresh)
            adapters.save(folders[name], MODEL, lora, some)
        engines = [Engine.from_pretrained(folder, mesh=each, adapters=folders, **sizes) for each in (None, mesh)]
        one, many = ([o.token_ids for o in engine.generate(prompts, settings)] for engine in engines)
    down = engines[1]._device._params["adapters"]["moe"]["shared_down"].a
    return {
        "same": one == many,
        "answers": [one.index(tokens) for tokens in one],
        "held": down.addressable_shards[0].data.size / down.size,
    }


def mixed(mesh):
    """Whether an engine over ``mesh`` that mixes as on a GPU answers as on one device, which kinds of programs it calls, and the rows of a
    shard in its loops, by their names."""
    called, call = [], Programs.__call__
    kinds = {"host_drives_loops": True, "prefill_tokens": (32,), "free_tokens": 32, "rows_apart": False, "few_rows": (2,)}
    sizes = {"block_size": BLOCK, "force_block_size": True, "max_model_len": 32, "max_slots": 8, "warm_up": False}
    prompts, params = [list(range(1, 10)), list(range(20, 29)), [3, 4, 5]], SamplingParams(max_tokens=12, ignore_eos=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(build, "choose", lambda device: choose(device)._replace(**kinds)),
        mock.patch.object(Kernels, "for_layers", lambda self, dtype: self),
        mock.patch.object(Programs, "__call__", lambda self, name, *args: called.append(name) or call(self, name, *args)),
    ):
        checkpoint.save(folder, MODEL, random_weights(), dtype="float32")
        one, many = (Engine.from_pretrained(folder, mesh=each, **sizes) for each in (None, mesh))
        wanted = [o.token_ids for o in one.generate(prompts, params)]
        called.clear()
        same = [o.token_ids for o in many.generate(prompts, params)] == wanted
    return {
        "same": same,
        "kinds": sorted({name[0] for name in called}),
        "rows": sorted({name[-1] for name in called if name[0] == "denoise"}),
    }
