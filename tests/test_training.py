"""The trainer of the embedded model: problems, tokenizer, losses, a few steps, and the model that came of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from diffulex_jax.models import checkpoint, llada2
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.training import data, evaluate, export, losses, tasks, tokenizer, train
from pallas_kernels import grouped_matmul


TINY = dataclasses.replace(
    train.CONFIG,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    moe_intermediate_size=16,
)
ONE_LAYER = dataclasses.replace(TINY, num_hidden_layers=1, first_k_dense_replace=0)


@pytest.fixture(scope="module")
def params():
    return llada2.init(TINY, jax.random.key(0), scale=0.1)


# Problems.


def test_the_same_seed_gives_the_same_problems_and_another_does_not():
    assert tasks.generate("train", 50, seed=3) == tasks.generate("train", 50, seed=3)
    assert tasks.generate("train", 50, seed=3) != tasks.generate("train", 50, seed=4)


def test_training_and_test_problems_are_disjoint():
    train_keys = {p.key for p in tasks.generate("train", 5000, seed=0)}
    test_keys = [p.key for p in tasks.generate("test", 1000, seed=0, unique=True)]
    assert len(set(test_keys)) == 1000
    assert not train_keys & set(test_keys)
    assert all(tasks.split_of(key) == "test" for key in test_keys)


def test_a_commuted_problem_has_the_same_key():
    family = next(f for f in tasks.FAMILIES if f.name == "add")
    keys = {p.key for p in tasks._draw(family, np.random.default_rng(0), "train", 200)}
    assert all(int(a) <= int(b) for a, b in (key.split()[1:] for key in keys))


def test_every_equation_holds_and_the_last_one_is_the_answer():
    compute = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__, "/": lambda a, b: a / b}
    for problem in tasks.generate("train", 500, seed=1):
        for equation in tasks.equations(problem.answer):
            left, operator, right, _, result = equation.split()
            assert compute[operator](int(left), int(right)) == int(result)
        assert int(result) == problem.final == tasks.final_number(problem.answer)


def test_the_last_stated_answer_decides():
    problem = tasks.Problem("What is 12 + 30?", "", 42, "add 12 30")
    assert tasks.is_correct(problem, "So the answer is 41. No, the answer is 42.")
    assert not tasks.is_correct(problem, "So the answer is 421.")
    assert not tasks.is_correct(problem, "42")


# Tokenizer.


@pytest.mark.parametrize("text", ["What is 12 + 30?", "  two  spaces\n\ttab", "naïve 日本 🎉", "<role>HUMAN</role>zebra<|mask|>", ""])
def test_any_text_round_trips(text):
    coder = tokenizer.build()
    assert coder.decode(coder.encode(text).ids, skip_special_tokens=False) == text


def test_digits_and_task_words_are_single_tokens():
    assert tokenizer.build().encode("Tom has 120 apples.").tokens == ["Tom", "Ġhas", "Ġ", "1", "2", "0", "Ġapples", "."]


def test_the_chat_template_writes_what_training_saw(tmp_path):
    tokenizer.save(tmp_path, tokenizer.build())
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 1 + 2?"}]
    assert loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == tokenizer.chat(
        "What is 1 + 2?", system="Be kind."
    )
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.mask_token_id) == (510, 510, 511)


def test_canvases_hold_prompt_answer_and_end_of_sequence():
    examples = data.encode(["What is 1 + 2?"], ["So the answer is 3."], canvas=32)
    tokens, start, end = (x[0] for x in examples)
    assert (start, end) == (8, 16)
    assert tokenizer.build().decode(tokens[:end].tolist()) == "What is 1 + 2?So the answer is 3."
    assert (tokens[end:] == train.CONFIG.eos_token_id).all()
    assert len(data.encode(["What is 1 + 2?"], ["So the answer is 3."], canvas=16).tokens) == 0


# Losses.


def test_attention_mask_of_two_blocks_of_one_token():
    # Layout: noisy 0, noisy 1, clean 0, clean 1.
    expected = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(losses.attention_mask(2, block=1), np.array(expected, bool))


def test_the_response_is_scored_up_to_32_end_of_sequence_tokens():
    batch = losses.Batch(jnp.zeros((1, 64), jnp.int32), jnp.array([5]), jnp.array([9]))
    assert np.flatnonzero(losses.scored(batch)[0]).tolist() == list(range(5, 9 + 32))


def test_the_noisy_half_sees_what_a_decoder_sees(params):
    clean = jax.random.randint(jax.random.key(1), (2, 96), 0, 500)
    noisy = jnp.full_like(clean, TINY.mask_token_id)
    trained = jax.nn.softmax(losses.predict(params, TINY, noisy, clean)).max(-1)
    for block in range(3):
        canvas = jnp.where(jnp.arange(96) < 32 * block, clean, noisy)
        _, p = evaluate._guess(params, TINY, llada2.embed(params, canvas), jnp.arange(96)[None] // 32)
        here = slice(32 * block, 32 * block + 32)
        np.testing.assert_allclose(trained[:, here], p[:, here], rtol=1e-4)


def test_dense_experts_agree_with_the_kernel_and_balance_changes_only_gradients(params):
    x = jax.random.normal(jax.random.key(2), (6, 32))
    ids, weights = llada2.route(x, params["moe"]["router"][0], params["moe"]["router_bias"][0], TINY)
    stack = (params["moe"]["experts_gate_up"], params["moe"]["experts_down"])
    reference = grouped_matmul.expert_mlp(x, ids, weights, *stack, layer=0, backend="dense")

    def total(weights, balance):
        return losses.dense_experts(x, ids, weights, *stack, layer=0, balance=balance).sum()

    np.testing.assert_allclose(losses.dense_experts(x, ids, weights, *stack, layer=0, balance=1.0), reference, rtol=1e-4, atol=1e-5)
    added = jax.grad(total)(weights, 1.0) - jax.grad(total)(weights, 0.0)
    load = np.bincount(np.ravel(ids), minlength=4) / ids.size
    np.testing.assert_allclose(added, 4 * (load[np.asarray(ids)] - 1 / 4) / 6, rtol=1e-3, atol=1e-6)


def test_a_few_steps_lower_both_losses():
    recipe = train.Recipe(steps=100, rows=4, examples=64, warmup=1, learning_rate=1e-2)
    problems = tasks.generate("train", 64, seed=0)
    examples = losses.Batch(*data.encode([p.question for p in problems], [p.answer for p in problems]))
    index, state = train.order(recipe, len(examples.start)), train.init(ONE_LAYER, recipe)
    state, first = train.run_steps(state, examples, index[:5], config=ONE_LAYER, recipe=recipe)
    state, _ = train.run_steps(state, examples, index[5:10], config=ONE_LAYER, recipe=recipe)
    state, last = train.run_steps(state, examples, index[10:15], config=ONE_LAYER, recipe=recipe)
    assert int(state.step) == 15
    for name in ("masked", "on_policy"):
        assert last[name] < first[name] - 1


# The embedded model.


def test_the_embedded_model_is_small_and_its_metrics_hold_the_claims():
    assert (checkpoint.EMBEDDED / "model.safetensors").stat().st_size <= export.LARGEST_BYTES
    for table in json.loads((checkpoint.EMBEDDED / "metrics.json").read_text())["held_out"].values():
        assert table["llada2 0.95"]["exact"] >= 0.95
        assert table["dmax 0.5"]["exact"] >= table["llada2 0.95"]["exact"] - 0.01
        assert table["dmax 0.5"]["tpf"] >= 2 * table["llada2 0.95"]["tpf"]


def test_the_embedded_tokenizer_is_the_one_that_is_built():
    assert json.loads((checkpoint.EMBEDDED / "tokenizer.json").read_text()) == json.loads(tokenizer.build().to_str())


@pytest.mark.parametrize("form", ["raw", "chat"])
def test_the_embedded_model_answers_held_out_problems(form):
    config, params = checkpoint.load(checkpoint.EMBEDDED, make_mesh())
    problems = [p for p in tasks.generate("test", 40, seed=7, unique=True) if len(tasks.equations(p.answer)) <= 2][:6]
    metrics = evaluate.evaluate(params, config, problems, rules={"dmax": evaluate.RULES["dmax 0.5"]}, form=form)
    assert metrics["dmax"]["exact"] == 1
