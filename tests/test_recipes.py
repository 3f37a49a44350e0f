"""Recipes and the trainer: a run that was ended goes on to the same bits, adapters, data of a file, and what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_training import TINY
from typer.testing import CliRunner

from diffulex_jax import cli
from diffulex_jax.cli.train import RECIPE_NAMES
from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import init, leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.training import data, objective, recipe, run, trainer
from diffulex_jax.training.arithmetic import tokenizer
from diffulex_jax.training.arithmetic.export import plain
from diffulex_jax.training.data import Examples
from diffulex_jax.training.layout import Batch
from diffulex_jax.training.recipe import About, Recipe, Term, changed, find
from diffulex_jax.weights import adapters, checkpoint
from diffulex_jax.weights.adapters import Lora


MASKED = (Term("masked", objective.masked),)
RNG = np.random.default_rng(0)
EXAMPLES = Examples(RNG.integers(0, 500, (6, 32)), np.full(6, 5), np.full(6, 20))


def six(about):
    return data.shuffled(EXAMPLES, rows=about.rows, seed=about.seed)


SDAR = {"model_type": "sdar", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SDAR |= {"num_key_value_heads": 2, "intermediate_size": 16, "eos_token_id": 62, "mask_token_id": 63}
SHORT = Recipe(model=TINY, data=six, objectives=MASKED, steps=6, rows=2, warmup=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face directory of random weights, large enough that adapters show."""
    path = tmp_path_factory.mktemp("tiny")
    checkpoint.save(path, TINY, init(TINY, jax.random.key(1), scale=0.2), dtype="float32")
    tokenizer.save(path, tokenizer.build())
    return path


def same(a, b):
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return all(np.array_equal(x, y) for x, y in pairs)


# Runs.


def test_a_run_that_is_ended_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHUNK", 2)
    whole = run.run(SHORT, tmp_path / "whole", save_every=2)
    assert not (tmp_path / "whole" / run.STATES).exists()

    real, calls = trainer.run_steps, []

    def ended(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    parts = tmp_path / "parts"
    monkeypatch.setattr(trainer, "run_steps", ended)
    with pytest.raises(KeyboardInterrupt):
        run.run(SHORT, parts, save_every=4)  # the state of step 4 is kept, and the third dispatch does not come back
    monkeypatch.setattr(trainer, "run_steps", real)

    for other, message in ((changed(SHORT, seed=1), "holds a run with seed=0, not 1"), (SHORT, "holds a run or a model already")):
        with pytest.raises(ValueError, match=message):
            run.run(other, parts, resume=other is not SHORT, save_every=4)
    resumed = run.run(SHORT, parts, resume=True, save_every=4)
    assert same(resumed.params, whole.params)
    strip = [[{k: v for k, v in entry.items() if k != "seconds"} for entry in made.history] for made in (whole, resumed)]
    assert strip[0] == strip[1]
    assert [entry["step"] for entry in strip[0]] == [2, 4, 6]
    loaded = checkpoint.load(parts, make_mesh())
    assert loaded[0] == TINY
    with pytest.raises(ValueError, match="it is done, or kept no state"):
        run.run(SHORT, parts, resume=True)
    with pytest.raises(ValueError, match="save_every=3 must be a multiple of 2, or 0"):
        run.run(SHORT, tmp_path / "other", save_every=3)


def test_batches_are_new_permutations_that_can_be_asked_for_in_any_order():
    batches = data.shuffled(EXAMPLES, rows=4, seed=7)
    later, first = batches(4), batches(0)
    again = data.shuffled(EXAMPLES, rows=4, seed=7)
    seen = np.concatenate([again(step).tokens for step in range(3)])
    assert same(first, again(0)) and same(later, again(4))
    for of_pass in (seen[:6], seen[6:]):
        assert sorted(map(tuple, of_pass)) == sorted(map(tuple, EXAMPLES.tokens))
    assert not np.array_equal(seen[:6], seen[6:])


def test_a_dataset_that_is_asked_by_index_gives_batches():
    rows = [{"tokens": [[step]], "start": [0], "end": [1]} for step in range(3)]
    assert [data.random_access(rows)(step).tokens[0, 0] for step in (2, 0)] == [2, 0]


@pytest.mark.sweep_but("0", "40")
@pytest.mark.parametrize("experts", [0, 4, 40])
def test_models_of_the_qwen3_family_can_be_trained(experts):
    """Dense ones, and mixtures of few and of many experts: the gradient has the shape of the parameters. Nothing is compiled."""
    more = {"model_type": "sdar_moe", "num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 8} if experts else {}
    model = model_of(SDAR | more)
    params = jax.eval_shape(functools.partial(init, model), jax.random.key(0))
    batch = Batch(jnp.zeros((2, 16), jnp.int32), jnp.ones(2, jnp.int32), jnp.full(2, 9))
    for term in (objective.masked, objective.uniform, objective.on_policy, objective.multi_block):
        gradient = jax.grad(lambda params, term=term: term(params, model, batch, jax.random.key(0), balance=0.1)[0])
        assert jax.tree.map(lambda a: a.shape, jax.eval_shape(gradient, params)) == jax.tree.map(lambda a: a.shape, params)


# Adapters.


@pytest.mark.sweep_but("sdar")
@pytest.mark.parametrize(
    ("model", "targets", "modules"),
    [
        (
            TINY,
            {"qkv": 1, "moe.out": 1, "shared_gate_up": 2, "experts_down": 4},
            ["dense", "down_proj", "gate_proj", "query_key_value", "up_proj"],
        ),
        (model_of(SDAR), {"qkv": 6, "mlp_down": 2}, ["down_proj", "k_proj", "q_proj", "v_proj"]),
    ],
    ids=["llada2", "sdar"],
)
def test_adapters_add_their_products_to_the_tensors_of_the_checkpoint(tmp_path, model, targets, modules):
    params, lora = init(model, jax.random.key(1), scale=0.2), Lora(rank=3, alpha=6, targets=tuple(targets))
    fresh = adapters.init(model, lora, jax.random.key(0))
    assert same(adapters.merge(model, lora, params, fresh), params)  # B is zero

    trained = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(a.size).normal(size=a.shape), jnp.float32), fresh)
    adapters.save(tmp_path, model, lora, trained, base="somewhere")
    checkpoint.save(tmp_path / "base", model, params, dtype="float32")
    tensors, stored = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / adapters.WEIGHTS)
    for name in [name.removesuffix(".lora_A.weight") for name in stored if ".lora_A." in name]:
        product = stored[f"{name}.lora_B.weight"] @ stored[f"{name}.lora_A.weight"]
        tensors[f"{name.removeprefix('base_model.model.')}.weight"] += 6 / 3 * product
    assert len(stored) == 2 * sum(targets.values())
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    want = leaves(checkpoint.load(tmp_path / "base", make_mesh())[1])
    for path, leaf in leaves(adapters.merge(model, lora, params, trained)).items():
        np.testing.assert_allclose(leaf, want[path], rtol=1e-4, atol=1e-5)

    again, read = adapters.load(tmp_path, model)
    assert (again.rank, again.alpha) == (3, 6)
    assert same(adapters.merge(model, again, params, read), adapters.merge(model, lora, params, trained))
    config = json.loads((tmp_path / adapters.CONFIG).read_text())
    assert (config["peft_type"], config["target_modules"]) == ("LORA", modules)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not done here, only False"),
        ({"rank_pattern": {"q": 4}}, "rank_pattern=.* is not done here"),
        ({"r": 0}, "r=0 must be a positive number"),
        ({"r": 4}, "has shape .*, expected"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path, change, message):
    lora = Lora(2, 4, ("out",))
    adapters.save(tmp_path, TINY, lora, adapters.init(TINY, lora, jax.random.key(0)))
    config = json.loads((tmp_path / adapters.CONFIG).read_text())
    (tmp_path / adapters.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        adapters.load(tmp_path, TINY)


def test_adapters_of_another_model_are_refused(tmp_path):
    adapters.save(tmp_path, TINY, Lora(2, 4, ("out",)), adapters.init(TINY, Lora(2, 4, ("out",)), jax.random.key(0)))
    stored = load_file(tmp_path / adapters.WEIGHTS)
    name = next(name for name in stored if ".lora_A." in name)
    save_file({k: v for k, v in stored.items() if k != name}, tmp_path / adapters.WEIGHTS)
    with pytest.raises(ValueError, match="has lora_B alone"):
        adapters.load(tmp_path, TINY)
    save_file(stored | {name.replace("dense", "o_proj"): stored[name]}, tmp_path / adapters.WEIGHTS)
    with pytest.raises(ValueError, match="o_proj.* fits nothing in this model"):
        adapters.load(tmp_path, TINY)


def test_scales_of_rslora_are_read(tmp_path):
    lora = Lora(4, 4, ("out",))
    adapters.save(tmp_path, TINY, lora, adapters.init(TINY, lora, jax.random.key(0)))
    config = json.loads((tmp_path / adapters.CONFIG).read_text())
    (tmp_path / adapters.CONFIG).write_text(json.dumps(config | {"use_rslora": True}))
    found, _ = adapters.load(tmp_path, TINY)
    assert found.alpha / found.rank == 4 / 4**0.5


@pytest.mark.parametrize(("lora", "message"), [(Lora(0), "rank=0"), (Lora(targets=("query",)), "targets: 'query' is no leaf of matrices")])
def test_targets_and_ranks_that_will_not_do(lora, message):
    with pytest.raises(SettingError, match=message):
        adapters.init(TINY, lora, jax.random.key(0))


@pytest.mark.sweep
def test_adapters_alone_are_trained_over_quantised_experts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHUNK", 2)
    sevens = EXAMPLES._replace(tokens=np.full((6, 32), 7))
    quick = {"model": str(folder), "learning_rate": 0.05, "data": lambda about: data.shuffled(sevens, rows=about.rows, seed=0)}
    adapted = changed(SHORT, lora=Lora(2, 4), weights="int8", **quick)
    trained = run.run(adapted, tmp_path, save_every=0)
    assert trained.history[-1]["masked"] < trained.history[0]["masked"] - 1
    lora, read = adapters.load(tmp_path, TINY)
    assert same(read, {name: trained.params[name] for name in read}) and lora.alpha == 4
    assert all(np.abs(site["b"]).max() > 0 for site in read.values())
    assert not (tmp_path / "model.safetensors").exists()
    base = checkpoint.load(folder, make_mesh(), weights="int8")[1]
    with pytest.raises(SettingError, match="targets: moe.experts_down is quantised"):
        other = Lora(2, 4, ("experts_down",))
        adapters.merge(TINY, other, base, adapters.init(TINY, other, jax.random.key(0)))


# Data of a file.


def batch_of(folder, path, lines, length=32):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data.from_file(path, length=length)(About(TINY, folder, 2, 0))(0)


def test_answers_of_a_file_are_what_is_learnt(folder, tmp_path):
    lines = [
        {"prompt": "What is 1 + 2?", "completion": "So the answer is 3."},
        {"messages": [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "So the answer is 3."}]},
        {"prompt": "What is 1 + 2?", "completion": "So the answer is 3." * 9},  # does not fit
    ]
    batch = batch_of(folder, tmp_path / "answers.jsonl", lines)
    coder = tokenizer.build()
    prompts = {coder.decode(row[:at].tolist(), skip_special_tokens=False) for row, at in zip(batch.tokens, batch.start, strict=True)}
    assert prompts == {"What is 1 + 2?", tokenizer.chat("What is 1 + 2?")}
    for row, start, end in zip(*batch, strict=True):
        assert coder.decode(row[start:end].tolist()) == "So the answer is 3."
        assert (row[end:] == TINY.spec.eos_ids[0]).all() and end < 32


def test_a_canvas_is_as_long_as_the_longest_answer_takes(folder, tmp_path):
    """Memory grows with its square: short answers do not pay for room that nobody fills."""
    line = {"prompt": "a", "completion": "b"}
    short = batch_of(folder, tmp_path / "short.jsonl", [line], length=None)
    assert short.tokens.shape[1] == TINY.spec.block_size
    long = batch_of(folder, tmp_path / "long.jsonl", [line, line | {"completion": "b " * 50}], length=None)
    assert long.tokens.shape[1] % TINY.spec.block_size == 0
    assert 0 <= long.tokens.shape[1] - long.end.max() - 1 < TINY.spec.block_size


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, "line 1: must be"),
        ({"prompt": "a", "completion": 3}, "line 1: prompt and completion must be texts"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 1: messages must end with one of role assistant"),
        ({"prompt": "a", "completion": "b " * 50}, "none of its 1 examples fits a canvas of 32 tokens"),
    ],
)
def test_lines_that_will_not_do(folder, tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        batch_of(folder, tmp_path / "answers.jsonl", [line])


def test_a_file_needs_whole_blocks_and_a_tokenizer(folder, tmp_path):
    with pytest.raises(ValueError, match="length=33 must be a multiple of the model's block size 32"):
        batch_of(folder, tmp_path / "answers.jsonl", [], length=33)
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        batch_of(None, tmp_path / "answers.jsonl", [])


# What is refused, and the command line.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1.0}, "unknown setting 'learning_rat' of a recipe"),
        ({"steps": 0}, "steps=0 must be positive"),
        ({"warmup": 6}, "warmup=6 must be less than steps=6"),
        ({"dtype": "float16"}, "dtype='float16' must be"),
        ({"weights": "int8"}, "needs lora"),
        ({"lora": Lora()}, "begins with random weights"),
        ({"objectives": MASKED * 2}, "each with a name of its own"),
        ({"objectives": (Term("a", objective.masked, 1), Term("b", objective.masked, 2))}, "rows=2 cannot be shared out"),
    ],
)
def test_settings_of_a_recipe_that_will_not_do(settings, message):
    with pytest.raises(SettingError, match=message):
        changed(SHORT, **settings)


def test_names_lead_to_recipes():
    assert tuple(recipe.BUILT_IN) == RECIPE_NAMES
    for name in RECIPE_NAMES:
        json.dumps(recipe.described(find(name)))
    for name, message in (("embeded", "unknown recipe 'embeded'"), ("nowhere:R", "No module named"), ("json:loads", "must be a Recipe")):
        with pytest.raises(ValueError, match=message):
            find(name)


def test_options_change_the_recipe(monkeypatch, tmp_path):
    asked = {}

    def note(chosen, out, **settings):
        asked.update(recipe=chosen, out=out, **settings)
        return trainer.Trained(chosen, TINY, None, {}, [], "cpu", 1.0)

    monkeypatch.setattr(run, "run", note)
    options = "--steps 50 --rows 4 --seed 3 --learning-rate 0.5 --warmup 2 --weight-decay 0.25 --dtype float32 --data answers.jsonl"
    options += (
        " --length 64 --lora-rank 4 --lora-alpha 8 --lora-target out --weights int4 --model here --mesh data=1 --save-every 0 --resume"
    )
    result = CliRunner().invoke(cli.app, ["train", "sft", "--out", str(tmp_path), *options.split()])
    assert result.exit_code == 0, result.output
    changes = {"steps": 50, "rows": 4, "seed": 3, "learning_rate": 0.5, "warmup": 2, "weight_decay": 0.25, "dtype": "float32"}
    changes |= {"model": "here", "weights": "int4", "lora": Lora(4, 8.0, ("out",))}
    assert changes.items() <= vars(asked["recipe"]).items()
    assert asked["recipe"].data.keywords == {"path": "answers.jsonl", "length": 64}
    assert (asked["mesh"], asked["save_every"], asked["resume"]) == ("data=1", 0, True)
    refused = CliRunner().invoke(cli.app, ["train", "sft", "--out", str(tmp_path), "--lora-target", "out"])
    assert refused.exit_code == 2 and "error: --lora-target goes with --lora-rank" in refused.output


def test_without_optax_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = CliRunner().invoke(cli.app, ["train", "sft", "--out", str(tmp_path)])
    assert refused.exit_code == 2 and "error: training needs optax: pip install 'diffulex-jax[train]'" in refused.output


def test_a_recipe_of_generated_problems_writes_a_tokenizer(tmp_path):
    made = trainer.Trained(SHORT, TINY, None, init(TINY, jax.random.key(0)), [], "cpu", 1.0)
    run.write(tmp_path, made._replace(recipe=changed(SHORT, finish=plain)))
    assert {file.name for file in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
