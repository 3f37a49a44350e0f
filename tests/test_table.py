"""The table of training against decoding: what is trained from what, how cells of seeds come together, and that every decoder is one."""

import itertools
import json
import pathlib

import jax
import pytest

from diffulex_jax import Output, SamplingParams
from diffulex_jax.models.base import init
from diffulex_jax.strategies import for_model
from diffulex_jax.training import reversal
from diffulex_jax.training.arithmetic import tasks, tokenizer
from diffulex_jax.training.recipe import About, Trained
from diffulex_jax.training.recipes import table
from diffulex_jax.training.reversal import MODEL


TRAINING = pathlib.Path(table.__file__).parent.parent


def output(ids, forwards):
    return Output("", ids, "stop", forwards, 0, 0, [], 1.0, 0.0, 0.1, 0)


def test_a_cell_counts_right_answers_tokens_and_forwards():
    class Engine:
        def generate(self, prompts, params):
            self.asked = list(zip(prompts, params, strict=True))
            return [output([7, 8], 3), output([7], 4)]

    engine, questions = Engine(), [table.Question([1, 2, 3], [7, 8].__eq__)] * 2
    figures = table.measure(engine, questions, params=SamplingParams(accept_threshold=0.5), canvas=10)
    assert figures == {"exact": 1, "tokens": 3, "forwards": 7}
    prompt, params = engine.asked[0]
    assert (prompt, params.max_tokens, params.accept_threshold) == ([1, 2, 3], 7, 0.5)


def test_an_answer_of_arithmetic_ends_in_the_right_number():
    coder = tokenizer.build()
    problem = tasks.generate("test", 1, seed=table.TEST_SEED, unique=True)[0]
    ((prompt, right),) = table.TASKS["arithmetic"].questions(1)
    assert coder.decode(prompt) == problem.question
    assert right(coder.encode(problem.answer).ids) and not right(coder.encode("So the answer is 1000.").ids)


def test_an_answer_of_reversal_is_the_digits_backwards_between_words():
    trained, asked = reversal.examples(50, seed=0), table.TASKS["reversal"].questions(50)
    assert not {tuple(prompt) for prompt, _ in asked} & {tuple(row[: reversal.DIGITS].tolist()) for row in trained.tokens}
    for row, start, end in zip(*trained, strict=True):
        prompt, answer = row[:start].tolist(), row[start:end].tolist()
        assert reversal.is_correct(prompt, answer)
        assert not reversal.is_correct(prompt, answer[:-1]) and not reversal.is_correct(prompt, [answer[1], *answer[1:]])
        assert (row[end:] == reversal.END).all()
    assert reversal.is_correct([1, 2], [10, 2, 11, 1]) and not reversal.is_correct([1, 2], [10, 1, 11, 2])


def test_variants_begin_with_what_was_pre_trained_and_every_one_is_told_at_once(tmp_path, monkeypatch):
    begun = []

    def train(recipe):
        begun.append((recipe.model if isinstance(recipe.model, str) else "random", recipe.seed))
        assert recipe.data(About(MODEL, None, recipe.rows, recipe.seed))(0).tokens.shape == (4, reversal.CANVAS)
        return Trained(recipe, MODEL, None, init(MODEL, jax.random.key(0)), [{"step": recipe.steps}], "cpu", 1.0)

    exact = iter((1, 2, 4, 4))
    monkeypatch.setattr(table, "train", train)
    monkeypatch.setattr(table, "decode", lambda *_: {"dmax": {"0.5": {"exact": next(exact), "tokens": 30, "forwards": 10}}})
    monkeypatch.setattr(table, "VARIANTS", dict(list(table.VARIANTS.items())[:2]))
    for seed in ("0", "5"):
        options = f"--out {tmp_path} --task reversal --seeds {seed} --steps 8 --more 4 --rows 4 --examples 8 --problems 4"
        monkeypatch.setattr("sys.argv", ["table", *options.split()])
        table.main()
    models, seeds = zip(*begun, strict=True)
    assert seeds == (0, 1000, 1000, 5, 1005, 1005)
    assert models[0] == models[3] == "random" and models[1] == models[2] != models[4] == models[5]
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["seed"] == [0, 5] and found["problems"] == 4
    assert found["cells"]["pre-trained"]["dmax"]["0.5"] == {"exact": [0.25, 1.0], "tokens_per_forward": [3.0, 3.0]}
    assert [found["recipes"]["+ uniform"][name] for name in ("steps", "warmup", "rows", "learning_rate")] == [4, 1, 4, 2e-3]
    assert [found["recipes"]["pre-training"][name] for name in ("steps", "warmup", "rows", "learning_rate")] == [8, 2, 4, 4e-3]
    assert found["recipes"]["pre-training"]["data"]["function"] == "diffulex_jax.training.recipes.table:_shuffled"
    assert found["recipes"]["+ uniform"]["objectives"][1]["function"] == "diffulex_jax.training.objective:uniform"
    text = (tmp_path / "table.md").read_text()
    assert text.splitlines()[2] == "| dmax | 0.5 | 62.5 ± 37.5 % at 3.00 ± 0.00 | 75.0 ± 25.0 % at 3.00 ± 0.00 |"
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_sheets_must_be_of_the_same_problems():
    with pytest.raises(ValueError, match="all of the same number of problems"):
        table.gather([{"problems": 4}, {"problems": 5}])


@pytest.mark.parametrize("file", sorted((TRAINING / "results").glob("*.json")), ids=lambda file: file.stem)
def test_the_readme_has_the_table_that_was_measured(file):
    measured = json.loads(file.read_text())
    assert table.text(measured) in (TRAINING / "README.md").read_text()
    assert len(measured["seed"]) == 3 and list(measured["cells"]) == list(table.VARIANTS)
    for decoders in measured["cells"].values():
        assert {name: list(of) for name, of in decoders.items()} == {name: list(of.settings) for name, of in table.DECODERS.items()}


def test_decoders_are_for_models_of_blocks():
    for decoder, task in itertools.product(table.DECODERS.values(), table.TASKS.values()):
        assert for_model(task.model.spec, decoder.strategy).canvas == "block_causal"
    assert {decoder.window for decoder in table.DECODERS.values()} == {1, 2, 4}
