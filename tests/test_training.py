"""The embedded model: its problems and tokenizer, a small run of its recipe, and the model that came of it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from diffulex_jax import Engine, Output, SamplingParams
from diffulex_jax.bench.shapes import shape_model
from diffulex_jax.models.registry import model_of
from diffulex_jax.training import layout, run
from diffulex_jax.training.arithmetic import data, evaluate, export, tasks, tokenizer
from diffulex_jax.training.recipe import changed
from diffulex_jax.training.recipes import embedded as recipe
from diffulex_jax.weights import checkpoint
from pallas_kernels import expert_choice, grouped_matmul


TINY = model_of(
    recipe.MODEL.config.to_hf()
    | {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rotary_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
)


@pytest.fixture(scope="module")
def embedded():
    return Engine.from_pretrained("embedded", strategy="dmax", max_slots=evaluate.SLOTS, max_model_len=data.CANVAS, warm_up=False)


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
    assert (tokens[end:] == recipe.MODEL.spec.eos_ids[0]).all()
    assert len(data.encode(["What is 1 + 2?"], ["So the answer is 3."], canvas=16).tokens) == 0


# Losses.


@pytest.mark.sweep
def test_the_noisy_half_sees_what_the_engine_sees(embedded):
    model, params = checkpoint.load(checkpoint.EMBEDDED, embedded.mesh)
    problem = evaluate.held_out(1)[0]
    clean = data.encode([tokenizer.chat(problem.question)], [problem.answer]).tokens[0].astype(np.int32)
    for length in (20, 32, 70):  # prompts that end inside the first block, after it, and inside the third
        fill_all = SamplingParams(max_tokens=data.CANVAS - length, accept_threshold=0.0, max_nfe=1, ignore_eos=True)
        (output,) = embedded.generate([clean[:length].tolist()], fill_all)
        noisy = np.where(np.arange(data.CANVAS) < length, clean, model.spec.mask_id)
        expected = layout.predict(params, model, noisy[None], clean[None])[0].argmax(-1)
        assert output.token_ids == expected[length : (length // 32 + 1) * 32].tolist()


def test_dense_experts_agree_with_the_kernel_and_balance_changes_only_gradients():
    rng = np.random.default_rng(2)
    x, matrix, gate_up, down = (jnp.array(rng.normal(size=s), jnp.float32) for s in ((6, 32), (32, 4), (1, 4, 32, 32), (1, 4, 16, 32)))
    router = expert_choice.Router(top_k=2, groups=2, kept=1, scale=2.5)
    ids, weights = expert_choice.choose(x, matrix / 10, jnp.zeros(4), router)
    stack = (gate_up / 10, down / 10)
    layer = [a[0] for a in stack]
    reference = grouped_matmul.expert_mlp(x, ids, weights, *stack, layer=0, backend="dense")

    def total(weights, balance):
        return layout.dense_experts(x, ids, weights, *layer, balance=balance).sum()

    np.testing.assert_allclose(layout.dense_experts(x, ids, weights, *layer, balance=1.0), reference, rtol=1e-4, atol=1e-5)
    added = jax.grad(total)(weights, 1.0) - jax.grad(total)(weights, 0.0)
    load = np.bincount(np.ravel(ids), minlength=4) / ids.size
    np.testing.assert_allclose(added, 4 * (load[np.asarray(ids)] - 1 / 4) / 6, rtol=1e-3, atol=1e-6)


def test_sorted_experts_and_their_gradients_are_those_of_dense_ones():
    rng = np.random.default_rng(2)
    x, gate_up, down, out = (jnp.array(rng.normal(size=s), jnp.float32) for s in ((7, 16), (6, 16, 16), (6, 8, 16), (7, 16)))
    ids = jnp.array([rng.permutation(6)[:2] for _ in range(7)], jnp.int32)
    weights = jnp.array(rng.random((7, 2)), jnp.float32)

    def total(compute, *arrays):
        x, weights, *stacks = arrays
        return (compute(x, ids, weights, *stacks, balance=1.0) * out).sum()

    found, wanted = (
        jax.value_and_grad(functools.partial(total, compute), (0, 1, 2, 3))(x, weights, gate_up, down)
        for compute in (layout.sorted_experts, layout.dense_experts)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), found, wanted)


# Evaluation and export.


class Canned:
    """Stands in for an engine: gives prepared outputs, and keeps what it was asked."""

    def __init__(self, *outputs):
        self.outputs = list(outputs)

    def warm_up(self, prompts, params):
        pass

    def generate(self, prompts, params, *, progress=False):
        self.asked = list(zip(prompts, params, strict=True))
        return self.outputs[: len(prompts)]


def test_figures_by_hand():
    problems = [tasks.Problem("What is 12 + 30?", "We find 12 + 30 = 42. So the answer is 42.", 42, "add 12 30")] * 3
    answers = ("I see 12 + 30 = 42. Thus the answer is 42.", "I see 12 + 31 = 42. Thus the answer is 42.", "the answer is 41.")
    spent, revised = (4, 5, 1), (3, 0, 2)
    engine = Canned(*(Output(a, [0] * 20, "stop", n, r, 0, [], 1.0, 0.0, 0.1, 0) for a, n, r in zip(answers, spent, revised, strict=True)))
    figures = evaluate.measure(engine, problems, [p.question for p in problems], SamplingParams.speed())
    speed = figures.pop("tokens_per_second")
    expected = {"exact": 2 / 3, "worked": 1 / 3, "tokens": 60, "forwards": 10, "revised": 5, "tokens_per_forward": 6}
    assert figures == pytest.approx(expected)
    assert speed > 0
    prompt, params = engine.asked[0]
    assert len(prompt) + params.max_tokens == data.CANVAS
    assert (params.accept_threshold, params.edit_threshold) == (0.5, 0.0)


def test_a_small_run_lowers_both_losses_and_is_exported_and_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "CHUNK", 5)
    monkeypatch.setattr(data, "SHARD", 64)
    monkeypatch.setattr(evaluate, "PROBLEMS", 2)
    monkeypatch.setattr(evaluate, "SETTINGS", {"dmax": {"short": SamplingParams(accept_threshold=0.0, max_nfe=2)}})
    problems = functools.partial(data.generated, count=64)
    small = changed(recipe.RECIPE, model=TINY, data=problems, steps=15, warmup=1, learning_rate=1e-2, rows=4)
    run.run(small, tmp_path, save_every=0)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    history, held_out = metrics["training"]["history"], metrics["held_out"]
    assert metrics["training"]["recipe"]["warmup"] == 1
    assert [entry["step"] for entry in history] == [5, 10, 15]
    assert history == [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    for name in ("masked", "on_policy"):
        assert history[-1][name] < history[0][name] - 1
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert held_out["problems"] == 2
    assert held_out["raw"]["dmax short"]["forwards"] == held_out["chat"]["dmax short"]["forwards"] == 2 * 2
    table = evaluate.report(held_out)
    assert table in capsys.readouterr().out
    assert table in (tmp_path / "README.md").read_text()
    assert checkpoint.load_model(tmp_path) == TINY


# The embedded model.


def test_the_embedded_model_is_small_and_its_metrics_hold_the_claims():
    assert (checkpoint.EMBEDDED / "model.safetensors").stat().st_size <= export.LARGEST_BYTES
    held_out = json.loads((checkpoint.EMBEDDED / "metrics.json").read_text())["held_out"]
    assert held_out["problems"] == 1000
    assert evaluate.report(held_out) in (checkpoint.EMBEDDED / "README.md").read_text()
    for form in ("raw", "chat"):
        assert list(held_out[form]) == [f"{strategy} {name}" for strategy, names in evaluate.SETTINGS.items() for name in names]
        slow, fast = held_out[form]["llada2 0.95"], held_out[form]["dmax 0.5"]
        assert slow["exact"] >= 0.95
        assert fast["exact"] >= slow["exact"] - 0.01
        assert fast["tokens_per_forward"] >= 2 * slow["tokens_per_forward"]


def test_the_embedded_tokenizer_is_the_one_that_is_built():
    assert json.loads((checkpoint.EMBEDDED / "tokenizer.json").read_text()) == json.loads(tokenizer.build().to_str())


@pytest.mark.sweep_but("chat")
@pytest.mark.parametrize("form", ["raw", "chat"])
def test_the_embedded_model_answers_held_out_problems(embedded, form):
    problems = [p for p in evaluate.held_out(60, seed=7) if len(tasks.equations(p.answer)) <= 2][:8]
    prompts = [evaluate.PROMPTS[form](p.question) for p in problems]
    figures = evaluate.measure(embedded, problems, prompts, SamplingParams(accept_threshold=0.5))
    assert figures["exact"] == 1
    assert figures["tokens_per_forward"] > 5


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("fast-dllm-v2-7b", "a model that predicts='next' cannot be trained here"),
        ("llada-8b", "a model that sees its whole canvas cannot be trained here"),
    ],
)
def test_a_model_that_no_objective_is_made_for_is_refused(shape, message):
    tokens = jnp.zeros((1, 32), jnp.int32)
    with pytest.raises(ValueError, match=message):
        layout.predict({}, shape_model(shape), tokens, tokens)
