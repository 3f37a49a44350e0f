"""New parameters in a built engine: the answers are the new ones', and nothing is compiled for them."""

from __future__ import annotations

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import MODEL

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.models.base import init
from pallas_kernels.grouped_matmul import is_quantised


PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 4, 5]]
GREEDY = SamplingParams(max_tokens=7, ignore_eos=True, accept_threshold=0.2, logprobs=True)


def parameters(seed: int):
    return init(MODEL, jax.random.key(seed), scale=0.5)


def engine_over(params, **settings) -> Engine:
    sizes = {"block_size": 4, "page_size": 8, "max_slots": 2, "max_model_len": 16, "warm_up": False}
    return Engine(MODEL, params, **sizes, **settings)


def answers(engine: Engine):
    return [(output.token_ids, output.logprobs) for output in engine.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_over(parameters(0))


@pytest.fixture(scope="module")
def expected() -> dict[int, list]:
    return {seed: answers(engine_over(parameters(seed))) for seed in (0, 1)}


@pytest.fixture
def lowered():
    """Names of the programs that were made from here on."""
    names: list[str] = []

    def note(event: str, _seconds: float, **about) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            names.append(about.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_the_answers_are_those_of_the_new_parameters_and_nothing_is_compiled(engine, expected, lowered):
    """Prefixes that were cached with the old parameters would show."""
    assert answers(engine) == expected[0] != expected[1]
    first = engine.stats["prefix_cache_hits"]
    fresh = [jax.tree.map(np.asarray, parameters(1)), parameters(0), parameters(1), parameters(0)]
    del lowered[:]
    for seed, params, donate in zip((1, 0, 1, 0), fresh, (False, False, True, True), strict=True):
        engine.update_params(params, donate=donate)
        assert answers(engine) == expected[seed]
    assert lowered == []
    assert engine.stats["prefix_cache_hits"] == first
    answers(engine)
    assert engine.stats["prefix_cache_hits"] > first  # they would be found if they were kept


def test_a_trainer_may_donate_what_it_gave(engine, expected):
    params = parameters(1)
    engine.update_params(params)
    jax.tree.map(lambda leaf: leaf.delete(), params)
    assert answers(engine) == expected[1]
    engine.update_params(parameters(0))


@pytest.mark.sweep
def test_another_engine_over_the_same_parameters_keeps_them(expected):
    params = parameters(0)
    one, other = engine_over(params), engine_over(params)
    one.update_params(parameters(1))
    assert answers(one) == expected[1] and answers(other) == expected[0]
    assert "embed" in params


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"extra": p["norm"]}, "parameter extra is none of this model's"),
        (lambda p: {k: v for k, v in p.items() if k != "norm"}, "parameter norm is missing"),
        (lambda p: p | {"norm": p["norm"][:-1]}, r"parameter norm has shape \(7,\); it must be \(8,\)"),
        (lambda p: p | {"norm": p["norm"].astype(jnp.bfloat16)}, "parameter norm has dtype bfloat16; it must be float32"),
        (lambda p: p | {"norm": 1.0}, "parameter norm must be an array, not of type float"),
        (lambda p: p | {"norm": [p["norm"]]}, "parameter norm is given as a list; this engine holds it as a "),
        (lambda p: p | {"moe": {**p["moe"], "out": p["moe"]["out"][:, :0]}}, "parameter moe.out has shape"),
        (lambda p: list(p.values()), "parameters must be a tree of dicts like the model's schema, not of type list"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(engine, expected, change, message):
    with pytest.raises(ValueError, match=message):
        engine.update_params(change(parameters(1)))
    assert answers(engine) == expected[0]


def test_requests_under_way_and_snapshots_of_them_are_of_the_old_parameters(engine, expected):
    (id_,) = engine.add(PROMPTS[0], GREEDY)
    taken = engine.snapshot(id_)
    with pytest.raises(RuntimeError, match="1 requests are queued or running"):
        engine.update_params(parameters(1))
    while engine.has_work:
        engine.step()
    engine.update_params(parameters(0))
    with pytest.raises(ValueError, match="the snapshot is of update=.*; this engine has update="):
        engine.restore(taken)
    assert answers(engine) == expected[0]


@pytest.mark.sweep
def test_quantised_leaves_are_quantised_anew(lowered):
    engine = engine_over(parameters(0), weights="int8")
    want = answers(engine_over(parameters(1), weights="int8"))
    old = answers(engine)
    engine.update_params(parameters(1))
    assert answers(engine) == want != old
    held = engine._device._params
    del lowered[:]
    engine.update_params(parameters(0))
    assert answers(engine) == old
    assert lowered == []
    engine.update_params(held)  # as they are held
    assert answers(engine) == want
    assert is_quantised(held["moe"]["experts_down"])
    with pytest.raises(ValueError, match="parameter moe.experts_down is given as quantised int8; this engine holds it as a "):
        engine_over(parameters(0)).update_params(held)
