"""Ways to run the same requests that must not change an answer."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffulex_jax import Engine, SamplingParams


Request = tuple[list[int], SamplingParams]


def requests(
    count: int, temperatures: Sequence[float], *, longest: int = 150, most: int = 100, vocab: int = 1000, seed: int = 0
) -> list[Request]:
    """``count`` prompts of up to ``longest`` random tokens, each at every temperature, for up to ``most`` more; a third begin alike."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, vocab, longest).tolist()
    made = []
    for i in range(count):
        prompt = rng.integers(0, vocab, int(rng.integers(1, longest))).tolist()
        if i % 3 == 2:
            prompt[: len(prompt) // 2] = shared[: len(prompt) // 2]
        for t in temperatures:
            params = SamplingParams(
                max_tokens=int(rng.integers(most // 5, most)), temperature=t, seed=i, accept_threshold=0.6, ignore_eos=True
            )
            made.append((prompt, params))
    return made


def alone(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    return [engine.generate([prompt], params)[0].token_ids for prompt, params in requests]


def together(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    prompts, params = zip(*requests, strict=True)
    return [output.token_ids for output in engine.generate(prompts, params)]


def arriving(engine: Engine, requests: Sequence[Request], *, at_once: int, seed: int = 1) -> list[list[int]]:
    """Up to ``at_once`` requests together; they come in at random moments."""
    rng, outputs, ids, left = np.random.default_rng(seed), {}, {}, list(range(len(requests)))
    while len(outputs) < len(requests):
        for _ in range(int(rng.integers(0, 3))):
            if left and len(ids) - len(outputs) < at_once:
                i = left.pop(0)
                ids[engine.add(*requests[i])[0]] = i
        outputs.update({ids[id_]: output.token_ids for id_, output in engine.step().items()})
    return [outputs[i] for i in range(len(requests))]


def preempted(engine: Engine, requests: Sequence[Request], *, every: int) -> list[list[int]]:
    """One of the running requests is set aside after every ``every``-th single step."""
    scheduler, steps = engine._scheduler, engine._scheduler.steps_per_dispatch
    scheduler.steps_per_dispatch = 1
    ids, outputs, count, before = [engine.add(*request)[0] for request in requests], {}, 0, scheduler.preemptions
    while len(outputs) < len(ids):
        outputs |= engine.step()
        count += 1
        running = list(scheduler.running.values())
        if running and count % every == 0:
            scheduler.preempt(running[count % len(running)])
    assert scheduler.preemptions > before
    scheduler.steps_per_dispatch = steps
    return [outputs[id_].token_ids for id_ in ids]


_RESTORE = """
import json, pickle, sys, jax
from diffulex_jax import Engine
from diffulex_jax.engine.snapshot import Snapshot
from diffulex_jax.rules import levenshtein
paths, options, cache = pickle.load(sys.stdin.buffer)
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
if isinstance(options["strategy"], dict):
    options["strategy"] = levenshtein(**options["strategy"])
engine, outputs = Engine.from_pretrained(**options), {}
ids = [engine.restore(Snapshot.load(path, like=engine.saved_structure)) for path in paths]
while engine.has_work:
    outputs |= engine.step()
print(json.dumps([outputs[id_].token_ids for id_ in ids]))
"""


def restored(engine: Engine, requests: Sequence[Request], *, options: dict[str, Any], steps: int, folder, cache: str) -> list[list[int]]:
    """Every request is taken after ``steps`` single steps, and finished by an engine in another process.

    ``options`` are the engine's; a ``strategy`` that is a dict stands for ``levenshtein`` with these arguments.
    """
    scheduler, before = engine._scheduler, engine._scheduler.steps_per_dispatch
    scheduler.steps_per_dispatch = 1
    paths = []
    for i, request in enumerate(requests):
        (id_,) = engine.add(*request)
        for _ in range(steps):
            assert not engine.step()
        paths.append(str(folder / f"{i}.safetensors"))
        engine.snapshot(id_).save(paths[-1])
        engine.abort(id_)
    scheduler.steps_per_dispatch = before
    job = pickle.dumps((paths, options, cache))
    done = subprocess.run([sys.executable, "-c", _RESTORE], input=job, capture_output=True, check=True)
    return json.loads(done.stdout)
