"""A snapshot is continued by the rule that began it, and by no other; cached prefixes are shared whatever the rule."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from small import tiny_engine

from diffulex_jax import SamplingParams, Strategy, stateless
from diffulex_jax.engine.fingerprint import strategy_id
from diffulex_jax.engine.snapshot import Snapshot
from diffulex_jax.rules import chain, edit, remask, threshold
from diffulex_jax.strategies import dmax


LIMIT = 3


def take_one(prediction, state, *, most=1):
    open_ = state.masked & state.editable
    return state.fill(open_ & (jnp.cumsum(open_, -1) <= most), prediction.token, prediction.prob)


def take_limit(prediction, state):
    open_ = state.masked & state.editable
    return state.fill(open_ & (jnp.cumsum(open_, -1) <= LIMIT), prediction.token, prediction.prob)


def rule_of(most):
    def update(prediction, state):
        return take_one(prediction, state, most=most)

    return stateless(update)


def typed(text):
    """A rule from source that lies in no module, as a notebook or exec() has it."""
    names = {}
    exec(f"def update(prediction, state):\n    return state.fill(state.masked, prediction.token, {text})", names)
    return stateless(names["update"])


@dataclasses.dataclass
class Taker:
    most: int

    def __call__(self, prediction, state):
        return take_one(prediction, state, most=self.most)


class Other(Taker):
    def __call__(self, prediction, state):
        return take_one(prediction, state, most=self.most + 1)


SAME = [
    (lambda: typed("prediction.prob"), lambda: typed("prediction.prob")),
    (lambda: stateless(Taker(2)), lambda: stateless(Taker(2))),
    (lambda: stateless(jax.jit(take_one)), lambda: stateless(jax.jit(take_one))),
    (lambda: threshold(), lambda: threshold()),
    (lambda: rule_of(2), lambda: rule_of(2)),
    (lambda: stateless(functools.partial(take_one, most=2)), lambda: stateless(functools.partial(take_one, most=2))),
    (lambda: dmax(top_k=2), lambda: dmax(top_k=2)),
]
OTHER = [
    (lambda: typed("prediction.prob"), lambda: typed("prediction.prob + 1")),
    (lambda: stateless(Taker(1)), lambda: stateless(Taker(2))),
    (lambda: stateless(Taker(2)), lambda: stateless(Other(2))),
    (lambda: stateless(jax.jit(take_one)), lambda: stateless(jax.jit(take_limit))),
    (lambda: threshold(), lambda: edit()),
    (lambda: threshold(), lambda: chain(threshold())),
    (lambda: chain(threshold(), remask()), lambda: chain(remask(), threshold())),
    (lambda: dmax(), lambda: dmax(mode="fast")),
    (lambda: dmax(top_k=1), lambda: dmax(top_k=2)),
    (lambda: rule_of(1), lambda: rule_of(2)),
    (lambda: stateless(take_one), lambda: stateless(take_limit)),
    (lambda: stateless(functools.partial(take_one, most=1)), lambda: stateless(functools.partial(take_one, most=2))),
    (lambda: rule_of(jnp.array([1, 2])), lambda: rule_of(jnp.array([1, 3]))),
]


@pytest.mark.parametrize("pair", SAME)
def test_the_same_rule_has_the_same_id(pair):
    one, two = (strategy_id(Strategy("custom", make())) for make in pair)
    assert one == two and one.startswith("custom#")


@pytest.mark.parametrize("pair", OTHER)
def test_another_rule_has_another_id(pair):
    one, two = (strategy_id(Strategy("custom", make())) for make in pair)
    assert one != two


def test_what_belongs_to_the_strategy_counts(monkeypatch):
    rule = threshold()
    kinds = [Strategy("a", rule), Strategy("b", rule), Strategy("a", rule, draws="step"), Strategy("a", rule, confidence="tempered")]
    assert len({strategy_id(kind) for kind in kinds}) == 4
    limited = strategy_id(Strategy("a", stateless(take_limit)))
    monkeypatch.setitem(globals(), "LIMIT", 4)
    assert strategy_id(Strategy("a", stateless(take_limit))) != limited


def test_an_id_is_the_same_in_every_process():
    """Whatever the hash seed, and where the objects happen to lie."""
    code = """if True:
        import sys
        sys.path.insert(0, "tests")
        import test_fingerprint as t
        from diffulex_jax.strategies import STRATEGIES
        made = [make() for pair in t.SAME for make in pair]
        print([t.strategy_id(t.Strategy("a", rule)) for rule in (*made, *(s.rule for s in STRATEGIES.values()))])
    """
    seen = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, env=environment)
        seen.add(done.stdout)
    assert len(seen) == 1 and "a#" in seen.pop()


@pytest.mark.sweep
def test_a_snapshot_of_another_strategy_of_the_same_state_is_refused(tmp_path):
    strategies = [Strategy("one", rule_of(1)), Strategy("one", rule_of(2)), Strategy("two", rule_of(1))]
    first, *others = (tiny_engine(strategy=strategy) for strategy in strategies)
    assert len({engine._scheduler._root for engine in (first, *others)}) == 1  # their prefixes are alike
    (id_,) = first.add([1, 2], SamplingParams(max_tokens=9, ignore_eos=True, seed=2**60 + 3, temperature=0.5))
    first.step()
    first.snapshot(id_).save(tmp_path / "taken")
    first.abort(id_)
    for engine, name in zip(others, ("one", "two"), strict=True):
        taken = Snapshot.load(tmp_path / "taken", like=engine.saved_structure)
        with pytest.raises(ValueError, match=rf"the snapshot is of strategy='one#.*'; this engine has strategy='{name}#"):
            engine.restore(taken)
    again = first.restore(Snapshot.load(tmp_path / "taken", like=first.saved_structure))
    outputs = {}
    while first.has_work:
        outputs |= first.step()
    assert outputs[again].seed == 2**60 + 3
    alone = first.generate([[1, 2]], SamplingParams(max_tokens=9, ignore_eos=True, seed=2**60 + 3, temperature=0.5))[0]
    assert outputs[again].token_ids == alone.token_ids
