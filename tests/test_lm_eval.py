"""lm-evaluation-harness's model: what it is asked, and the numbers it gives. The harness itself runs it in ``tests/soak``."""

from __future__ import annotations

import types

import pytest

from diffulex_jax import MonteCarlo, SamplingParams
from diffulex_jax.evaluation import harness
from diffulex_jax.evaluation.harness import DiffusionModel


@pytest.fixture(scope="module")
def engine(engine_of):
    return engine_of("embedded", strategy="dmax", max_slots=4, max_model_len=128)


@pytest.fixture(scope="module")
def model(engine) -> DiffusionModel:
    return DiffusionModel(engine=engine, accept_threshold=0.5)


def requests(*args):
    return [types.SimpleNamespace(args=arg) for arg in args]


QUESTION = "What is 12 + 30?"


def test_answers_end_where_the_task_says(model, engine):
    asked = {"until": ["?", " So"], "max_gen_toks": 60, "do_sample": False, "temperature": 0.7}
    first, second = model.generate_until(requests((QUESTION, asked), (QUESTION, {"until": "the"})), disable_tqdm=True)
    (whole,) = engine.generate([QUESTION], SamplingParams(max_tokens=60, accept_threshold=0.5))
    assert "So the answer is 42." in whole.text
    assert first == whole.text.split(" So")[0] and second == whole.text.split("the")[0]


def test_a_context_that_is_too_long_keeps_its_end_and_is_told(model, engine, caplog):
    (answer,) = model.generate_until(requests(("7" * 200 + QUESTION, {"max_gen_toks": 40})), disable_tqdm=True)
    ids = engine.tokenizer.encode("7" * 200 + QUESTION)[-88:]
    assert answer == engine.generate([ids], SamplingParams(max_tokens=40, accept_threshold=0.5))[0].text
    assert "1 of 1 contexts lost their beginning: max_model_len=128" in caplog.text


def test_likelihoods_are_the_engines_scores(model, engine):
    found = model.loglikelihood(requests((QUESTION, " 42"), (QUESTION + " ", "42"), ("", "First"), (QUESTION, "")), disable_tqdm=True)
    encode = engine.tokenizer.encode
    ids = encode(QUESTION + " 42")[len(encode(QUESTION)) :]
    want = [float(scores.sum()) for scores in engine.score([encode(QUESTION), [510]], [ids, encode("First")])]
    assert [score for score, _ in found] == pytest.approx([want[0], want[0], want[1], 0.0])
    assert [greedy for _, greedy in found][-1] is True
    assert all(type(score) is float and type(greedy) is bool for score, greedy in found)


def test_what_greedy_decoding_gives_is_told(model, engine):
    (best,) = engine.generate([QUESTION], SamplingParams(max_tokens=5, ignore_eos=True, accept_threshold=0.5))
    text = engine.tokenizer.decode(best.token_ids)
    (right, wrong) = model.loglikelihood(requests((QUESTION, text), (QUESTION, text + " 7")))
    assert right[1] and not wrong[1]
    assert right[0] > wrong[0]


def test_long_texts_are_scored_in_pieces(model, engine):
    text = "What is 1 + 2? " * 20
    ids = engine.tokenizer.encode(text)
    assert len(ids) > 127
    want = engine.score([[510], [ids[126]]], [ids[:127], ids[127:254]])
    assert len(ids) <= 254
    (found, none) = model.loglikelihood_rolling(requests((text,), ("",)))
    assert found == pytest.approx(float(sum(scores.sum() for scores in want)), rel=1e-5) and none == 0


def test_the_estimator_is_chosen(engine):
    drawn = DiffusionModel(engine=engine, estimator="monte_carlo", samples=3)
    assert drawn.estimator == MonteCarlo(samples=3)
    (found,) = drawn.loglikelihood_rolling(requests((QUESTION,)))
    assert found == pytest.approx(float(engine.score([[510]], [QUESTION], MonteCarlo(samples=3))[0].sum()), rel=1e-5)


def test_conversations_become_prompts(model, engine):
    text = model.apply_chat_template([{"role": "user", "content": QUESTION}])
    assert engine.tokenizer.encode(text) == engine.tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}])
    assert not model.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=False).endswith("</role>")
    assert "ASSISTANT" in model.chat_template(True) and model.chat_template(False) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "exact"}, "estimator='exact' must be one of block, monte_carlo"),
        ({"samples": 3}, "samples=3 is for estimator=monte_carlo"),
        ({"accept_threshold": -1}, "accept_threshold"),
        ({"max_slots": 3}, "max_slots=3 is of no use beside engine="),
        ({"engine": None}, "say which model"),
        ({"engine": None, "model": "embedded", "slots": 3}, "slots is a setting of neither the engine nor requests"),
    ],
)
def test_arguments_that_will_not_do_are_named(engine, settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionModel(**{"engine": engine} | settings)


def test_a_setting_of_generation_that_is_unknown_is_named(model):
    with pytest.raises(ValueError, match="generation_kwargs: num_beams is none of until, max_gen_toks, do_sample, and no setting"):
        model.generate_until(requests((QUESTION, {"num_beams": 4})))


def test_it_is_registered_under_its_name(monkeypatch, engine):
    """As lm-eval 0.4.13 registers, and builds from ``--model_args`` and what it adds to them."""
    registered = {}

    class LM:
        def __init__(self):
            self.cache_hook = None

    def register_model(*names):
        return lambda made: registered.update(dict.fromkeys(names, made)) or made

    api = types.SimpleNamespace(LM=LM, register_model=register_model)
    monkeypatch.setattr(
        "sys.modules", __import__("sys").modules | {f"lm_eval{part}": api for part in ("", ".api", ".api.model", ".api.registry")}
    )
    made = harness.register()
    assert registered == {"diffulex_jax": made} and issubclass(made, LM)
    monkeypatch.setattr(harness.Engine, "from_pretrained", lambda name, **settings: seen.update(name=name, **settings) or engine)
    seen = {}
    lm = made(pretrained="embedded", strategy="dmax", temperature=0.5, batch_size="4", max_batch_size=None, device="cpu")
    assert seen == {"name": "embedded", "warm_up": False, "strategy": "dmax", "max_slots": 4}
    assert lm.params.temperature == 0.5 and hasattr(lm, "cache_hook")
