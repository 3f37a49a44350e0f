"""How near a model stays to itself when its experts, or its keys and values, are held in fewer bits.

Two comparisons, on problems whose answers are known: what an engine answers, and what the network says of masked positions of the reference
answers, over keys and values that were written as an engine writes them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from diffulex_jax import Engine
from diffulex_jax.bench.forward import program_of
from diffulex_jax.decode.forward import forward
from diffulex_jax.decode.program import Program
from diffulex_jax.decode.prompts import Prompts, prefill
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.device import empty
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import Params, logits
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.state import KVPool
from diffulex_jax.strategies import for_model
from diffulex_jax.training.arithmetic import data, evaluate, tasks, tokenizer
from diffulex_jax.weights import checkpoint
from diffulex_jax.weights.quantise import what_is_quantised
from pallas_kernels import choose
from pallas_kernels.block_attention import Keys
from pallas_kernels.quantised import Form


ROWS = 16
"""Canvases in a forward, and requests decoded together."""


class Said(NamedTuple):
    """What one setting made of the problems.

    Attributes:
      answers: the tokens of each.
      exact: share of them whose last number is right.
      tokens_per_forward: of all requests together.
      shares: ``[M, V]`` float32 probabilities at each masked position.
    """

    answers: list[list[int]]
    exact: float
    tokens_per_forward: float
    shares: np.ndarray


def run(
    *,
    model: str = "embedded",
    problems: int = 1000,
    strategy: str = "llada2",
    dtype: str = "float32",
    weights: Sequence[str] = ("int8", "int4", "fp8"),
    kv: Sequence[str] = ("int8", "fp8"),
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compares a model with itself, once with each form of ``weights`` and once with each of ``kv``.

    Args:
      model: a directory of a model of the arithmetic problems, or ``"embedded"``.
      problems: how many of the held-out ones.
      strategy: one of ``evaluate.SETTINGS``; its first settings are taken.
      dtype: of everything that is not quantised.
      weights, kv: as for ``EngineConfig``.
      progress: is given the report line by line as it comes.

    Returns:
      Plain data: what was compared on what; ``masked``, how many positions; ``settings``: by name, the model as it is first, the figures
      of :func:`figures`.

    Raises:
      ValueError: for a setting that will not do, naming it, or a model of another vocabulary.
    """
    if strategy not in evaluate.SETTINGS:
        raise SettingError("strategy", f"strategy={strategy!r} must be one of {', '.join(evaluate.SETTINGS)}")
    if problems < 1:
        raise ValueError(f"problems={problems} must be at least 1")
    sizes: dict[str, Any] = {"dtype": dtype, "max_slots": ROWS, "max_model_len": data.CANVAS, "warm_up": False}
    plain = EngineConfig(**sizes)
    path = checkpoint.resolve(model)
    network, compared = checkpoint.load_model(path), {dtype: plain}
    compared |= {f"{form} {what_is_quantised(network)}": dataclasses.replace(plain, weights=form) for form in weights}
    compared |= {f"{form} keys and values": dataclasses.replace(plain, kv=form) for form in kv}
    vocabulary = network.spec.vocab_size
    if vocabulary != tokenizer.build().get_vocab_size():
        raise ValueError(
            f"model {model!r} has {vocabulary} tokens, and is no model of the arithmetic problems; train one, or take 'embedded'"
        )
    asked = evaluate.held_out(problems)
    mode, _ = next(iter(evaluate.SETTINGS[strategy].items()))
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "model": model,
        "strategy": f"{strategy} {mode}",
        "problems": problems,
        "dtype": dtype,
        "device": device.device_kind,
        "jax": jax.__version__,
    }
    first: Said | None = None
    found: dict[str, Any] = {}
    for name, settings in compared.items():
        said = _said(path, strategy, settings, asked)
        if first is None:
            first, report["masked"] = said, len(said.shares)
            for line in head(report):
                progress(line)
        found[name] = figures(said, first)
        progress(row(name, found[name]))
    return report | {"settings": found}


def figures(said: Said, plain: Said) -> dict[str, float]:
    """A setting beside the model as it is.

    Returns:
      ``exact``; ``same``: share of answers that are the same tokens; ``tokens_per_forward``; ``argmax``: share of the masked positions
      whose likeliest token is the same; ``kl``: the mean divergence of what is said from what the model itself says there, in nats.
    """
    same = sum(a == b for a, b in zip(said.answers, plain.answers, strict=True)) / len(plain.answers)
    p, q = (np.maximum(s.shares.astype(np.float64), 1e-30) for s in (plain, said))
    return {
        "exact": said.exact,
        "same": same,
        "tokens_per_forward": said.tokens_per_forward,
        "argmax": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "kl": float((p * np.log(p / q)).sum(-1).mean()),
    }


def head(report: dict[str, Any]) -> list[str]:
    """What stands above the rows."""
    return [
        f"{report['model']}, {report['strategy']}: {report['problems']} held-out problems, {report['masked']} masked positions; "
        f"{report['device']}, JAX {report['jax']}",
        f"{'':22} {'exact':>7} {'same answer':>12} {'tokens/forward':>15} {'argmax':>8} {'KL, nats':>9}",
    ]


def row(name: str, f: dict[str, float]) -> str:
    """A setting and its :func:`figures`."""
    return f"{name:22} {f['exact']:7.1%} {f['same']:12.1%} {f['tokens_per_forward']:15.2f} {f['argmax']:8.2%} {f['kl']:9.5f}"


def _said(path: Any, strategy: str, settings: EngineConfig, problems: Sequence[tasks.Problem]) -> Said:
    kernels = choose(jax.devices()[0])
    options: dict[str, Any] = {"dtype": settings.jax_dtype, "weights": cast(Form | None, settings.weights), "kernels": kernels}
    model, params = checkpoint.load(path, make_mesh(), **options)
    program = program_of(model, for_model(model.spec, strategy), settings, kernels)
    shares = _shares(program, params, data.encode([p.question for p in problems], [p.answer for p in problems]))
    kept = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    ends = checkpoint.load_end_ids(path)
    engine = Engine(model, params, strategy=strategy, tokenizer=Tokenizer.load(path), eos_ids=ends, model_id=str(path), **kept)
    sampling = next(iter(evaluate.SETTINGS[strategy].values()))
    prompts = [encoding.ids for encoding in tokenizer.build().encode_batch([p.question for p in problems])]
    outputs = engine.generate(prompts, [dataclasses.replace(sampling, max_tokens=data.CANVAS - len(ids)) for ids in prompts])
    right = sum(tasks.is_correct(problem, output.text or "") for problem, output in zip(problems, outputs, strict=True))
    tokens, forwards = sum(len(o.token_ids) for o in outputs), sum(o.nfe for o in outputs)
    return Said([list(o.token_ids) for o in outputs], right / len(problems), tokens / forwards, shares)


def _shares(program: Program, params: Params, examples: data.Examples) -> np.ndarray:
    """``[M, V]`` float32 probabilities at the masked positions of :func:`_canvases`."""
    dims, dtype = program.dims, params["embed"].dtype
    pool, _ = jax.jit(functools.partial(empty, program, dtype, ROWS * dims.pages_per_slot))()
    jitted = jax.jit(functools.partial(_predict, program), donate_argnums=1)
    found = []
    for clean, noisy in _canvases(examples, program.model.spec.mask_id):
        pool, shares = jitted(params, pool, clean, noisy)
        found.append(np.asarray(shares)[noisy != clean])
    return np.concatenate(found)


def _canvases(examples: data.Examples, mask_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Canvases ``[ROWS, L]`` int32, and the same with a random share of every answer masked, the end of sequence included; always the
    same."""
    rng = np.random.default_rng(0)
    for begin in range(0, len(examples.tokens), ROWS):
        tokens, start, end = (column[begin : begin + ROWS] for column in examples)
        clean = np.zeros((ROWS, data.CANVAS), np.int32)
        clean[: len(tokens)] = tokens
        noisy = clean.copy()
        for i in range(len(tokens)):
            answer = noisy[i, start[i] : end[i] + 1]
            answer[rng.random(len(answer)) < rng.uniform()] = mask_id
        yield clean, noisy


def _predict(program: Program, params: Params, pool: KVPool, clean: jax.Array, noisy: jax.Array) -> tuple[KVPool, jax.Array]:
    """``[R, L, V]`` probabilities of noisy canvases ``[R, L]``, each block behind the clean ones before it, which ``pool`` holds."""
    dims, (rows, length) = program.dims, clean.shape
    blocks, block = length // dims.block, dims.block
    table = jnp.arange(rows * dims.pages_per_slot, dtype=jnp.int32).reshape(rows, -1)
    prompts = Prompts(
        clean.reshape(rows, blocks, block),
        start=jnp.zeros(rows, jnp.int32),
        length=jnp.full(rows, length, jnp.int32),
        written=jnp.ones((rows, blocks), bool),
        page_table=table,
    )
    pool, _ = prefill(program, params, pool, prompts)
    start = jnp.tile(jnp.arange(blocks, dtype=jnp.int32) * block, rows)
    keys = Keys(pool.k, pool.v, jnp.repeat(table, blocks, 0), start, jnp.ones((rows * blocks, 1), bool))
    x = params["embed"][noisy.reshape(rows * blocks, block)]
    hidden, _ = forward(program, params, x, start[:, None] + jnp.arange(block), keys=keys)
    z = logits(program.model, params, hidden).astype(jnp.float32).at[..., program.model.spec.mask_id].set(-jnp.inf)  # never written
    return pool, jax.nn.softmax(z).reshape(rows, length, -1)
