"""How a strategy is found: by name, by import path, as a rule or a strategy of one's own."""

from __future__ import annotations

import multiprocessing
import pathlib
import pickle
import sys

import pytest

from diffulex_jax import Engine, SamplingParams, SettingError, Strategy
from diffulex_jax.engine.build import limits_of
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.rules import threshold
from diffulex_jax.strategies import STRATEGIES, resolve


GOLDEN = pathlib.Path(__file__).parent / "golden"
MODULE = '''
from diffulex_jax import Strategy, stateless
from diffulex_jax.rules import threshold

def leftmost_rule(prediction, state):
    """One mask a step, from the left."""
    import jax.numpy as jnp
    first = jnp.cumsum(state.masked.reshape(state.masked.shape[0], -1), 1).reshape(state.masked.shape) == 1
    return state.fill(state.masked & state.editable & first, prediction.token, prediction.prob)

leftmost = stateless(leftmost_rule)
greedy_two = Strategy("anything", threshold(), window=2, defaults={"accept_threshold": 0.25})
def made(): return leftmost
def narrow(width): return leftmost
def broken(): return 1 / 0
def nothing(): return 3
class Holder:
    rule = leftmost
number = 3
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A file in the current directory, as a user has one."""
    (tmp_path / "my_rules.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import no_such_dependency\n")
    (tmp_path / "my_typo.py").write_text("def rule(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield "my_rules"
    for name in ("my_rules", "my_broken", "my_typo"):
        sys.modules.pop(name, None)


def test_names_and_objects():
    for name, strategy in STRATEGIES.items():
        assert resolve(name) is strategy and strategy.name == name
    rule = threshold()
    assert resolve(rule) == Strategy("custom", rule)
    mine = Strategy("mine", rule, window=2)
    assert resolve(mine) is mine
    assert (STRATEGIES["multi_bd"].window, STRATEGIES["d2f"].window, STRATEGIES["d2f"].attention) == (2, 4, "prefix_full")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("embedded", "llada2"), ("tiny-llada2", "llada2"), ("families/tiny-sdar", "sdar"), ("families/tiny-sdar-moe", "sdar")),
        ("families/tiny-fast-dllm-v2", "fast_dllm_v2"),
    ],
)
def test_where_none_is_named_it_is_the_one_of_the_models_authors(model, name):
    folder = model if model == "embedded" else str(GOLDEN / model)
    assert limits_of(folder, None, EngineConfig())[1] is STRATEGIES[name]
    assert limits_of(folder, "dmax", EngineConfig())[1] is STRATEGIES["dmax"]
    with pytest.raises(SettingError, match="unknown strategy 'nothing'"):
        limits_of("no such model", "nothing", EngineConfig())  # before any model is looked for


def test_import_paths(module):
    assert resolve("my_rules:leftmost").rule.update is resolve("my_rules:made").rule.update is resolve("my_rules:Holder.rule").rule.update
    two = resolve("my_rules:greedy_two")
    assert (two.name, two.window, dict(two.defaults)) == ("my_rules:greedy_two", 2, {"accept_threshold": 0.25})


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("mdlm", "unknown strategy 'mdlm'; choose one of llada2, multi_bd, .*, or give the import path of a rule, my_module:my_rule"),
        ("no_such_module:rule", "strategy 'no_such_module:rule': there is no module 'no_such_module' in the current directory"),
        ("my_rules:wrong", "strategy 'my_rules:wrong': module 'my_rules' has no 'wrong'"),
        ("my_rules:number", "number must be a Rule, a Strategy, or a function without arguments that returns one, got int"),
        ("my_rules:nothing", "nothing must be a Rule, .*, got int"),
        ("my_rules:narrow", "narrow must be callable without arguments, but missing a required argument: 'width'"),
        ("my_rules:broken", r"calling broken\(\) failed: ZeroDivisionError: division by zero"),
        ("my_broken:rule", "importing my_broken failed: No module named 'no_such_dependency'"),
        ("my_typo:rule", "importing my_typo failed: SyntaxError: invalid syntax"),
        ("my_rules:", "an import path is my_module:my_rule"),
        (":leftmost", "an import path is my_module:my_rule"),
        ("my_rules.py:leftmost x", "an import path is my_module:my_rule"),
        (Strategy("", threshold()), "name must be a non-empty text"),
        (Strategy("a", 3), "strategy 'a': rule must be a Rule, got 3"),
        (Strategy("a", threshold(), window=0), "window=0 must be a positive integer"),
        (Strategy("a", threshold(), attention="none"), "attention='none' must be one of None, block_causal, prefix_full"),
        (Strategy("a", threshold(), draws="never"), "draws='never' must be one of position, step"),
        (Strategy("a", threshold(), confidence="none"), "confidence='none' must be one of model, tempered"),
        (Strategy("a", threshold(), defaults={"max_tokens": 3}), "defaults: 'max_tokens' is not one of temperature, "),
        (Strategy("a", threshold(), defaults={"top_p": 3}), "defaults: top_p=3.0 must be above 0 and at most 1"),
    ],
)
def test_what_leads_to_no_strategy(module, strategy, message):
    with pytest.raises(SettingError, match=message) as caught:
        resolve(strategy)
    assert caught.value.field == "strategy" and "\n" not in str(caught.value)


def test_another_type_is_refused():
    with pytest.raises(TypeError, match="strategy must be a name, an import path, a Rule or a Strategy, got 3"):
        resolve(3)


# Served


OPTIONS = {"block_size": 8, "max_slots": 2, "max_model_len": 64, "warm_up": False}
NAMES = ["llada2", "my_rules:leftmost", "my_rules:greedy_two"]
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)


def decode_in_a_process(model, names, pipe):
    engines = Engine.for_strategies(model, names, **OPTIONS)
    pipe.send({name: [(o.token_ids, o.nfe) for o in engine.generate([[1, 2, 3]], PARAMS)] for name, engine in engines.items()})


@pytest.mark.sweep
def test_rules_of_ones_own_side_by_side_here_and_in_a_process(module, golden_model):
    engines = Engine.for_strategies(golden_model, NAMES, **OPTIONS)
    assert [engine.strategy for engine in engines.values()] == list(engines) == NAMES
    assert engines["my_rules:greedy_two"].settings.buffer_size == 2
    here = {name: [(o.token_ids, o.nfe) for o in engine.generate([[1, 2, 3]], PARAMS)] for name, engine in engines.items()}
    assert here["my_rules:leftmost"][0][1] == 20  # a token a forward
    assert here["my_rules:greedy_two"][0][1] < here["llada2"][0][1]  # accepts above 0.25
    assert pickle.loads(pickle.dumps(NAMES)) == NAMES
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=decode_in_a_process, args=(golden_model, NAMES, theirs))
    process.start()
    assert ours.poll(300), process.exitcode
    assert ours.recv() == here
    process.join(30)
    assert process.exitcode == 0


@pytest.mark.sweep
def test_a_request_may_override_what_the_strategy_sets(module, golden_model):
    engine = Engine.from_pretrained(golden_model, strategy="my_rules:greedy_two", **OPTIONS)
    plain, same, slow = engine.generate(
        [[1, 2, 3]] * 3,
        [PARAMS, *(SamplingParams(max_tokens=20, ignore_eos=True, accept_threshold=accept) for accept in (0.25, 1.0))],
    )
    assert (plain.token_ids, plain.nfe) == (same.token_ids, same.nfe)
    assert slow.nfe > plain.nfe


def test_two_rules_without_a_name_are_told_to_take_one(golden_model):
    with pytest.raises(SettingError, match=r"each with a name of its own; got \['custom', 'custom'\]; give a rule of your own one with"):
        Engine.for_strategies(golden_model, [threshold(), threshold()])
