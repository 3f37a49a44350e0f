"""The table of training against decoding: what is trained from what, how cells of seeds come together, and that every decoder is one."""

import json

import jax
import pytest
from test_training import TINY

from diffulex_jax import Output, SamplingParams
from diffulex_jax.models.base import init
from diffulex_jax.strategies import for_model
from diffulex_jax.training.arithmetic import data, tasks, tokenizer
from diffulex_jax.training.recipe import Trained
from diffulex_jax.training.recipes import table


def output(text, forwards):
    ids = tokenizer.build().encode(text).ids
    return Output(text, ids, "stop", forwards, 0, 0, [], 1.0, 0.0, 0.1, 0)


def test_a_cell_counts_right_answers_tokens_and_forwards():
    problems = [tasks.Problem("What is 12 + 30?", "", 42, "add 12 30")] * 2

    class Engine:
        def generate(self, prompts, params):
            self.asked = list(zip(prompts, params, strict=True))
            return [output("So the answer is 42.", 3), output("So the answer is 41.", 4)]

    engine = Engine()
    figures = table.measure(engine, problems, SamplingParams(accept_threshold=0.5))
    assert figures == {"exact": 1, "tokens": 2 * len(tokenizer.build().encode("So the answer is 42.").ids), "forwards": 7}
    prompt, params = engine.asked[0]
    assert (len(prompt) + params.max_tokens, params.accept_threshold) == (data.CANVAS, 0.5)


def test_variants_begin_with_what_was_pre_trained_and_every_one_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 64)
    begun = []

    def train(recipe):
        begun.append((recipe.model if isinstance(recipe.model, str) else "random", recipe.seed))
        return Trained(recipe, TINY, None, init(TINY, jax.random.key(0)), [{"step": recipe.steps}], "cpu", 1.0)

    exact = iter((1, 2, 4, 4))
    monkeypatch.setattr(table, "train", train)
    monkeypatch.setattr(table, "decode", lambda *_: {"dmax": {"0.5": {"exact": next(exact), "tokens": 30, "forwards": 10}}})
    monkeypatch.setattr(table, "VARIANTS", dict(list(table.VARIANTS.items())[:2]))
    for seed in ("0", "5"):
        options = f"--out {tmp_path} --seeds {seed} --steps 8 --more 4 --rows 4 --examples 8 --problems 4"
        monkeypatch.setattr("sys.argv", ["table", *options.split()])
        table.main()
    models, seeds = zip(*begun, strict=True)
    assert seeds == (0, 1000, 1000, 5, 1005, 1005)
    assert models[0] == models[3] == "random" and models[1] == models[2] != models[4] == models[5]
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["seed"] == [0, 5] and found["problems"] == 4
    assert found["cells"]["pre-trained"]["dmax"]["0.5"] == {"exact": [0.25, 1.0], "tokens_per_forward": [3.0, 3.0]}
    assert found["recipes"]["+ uniform"]["objectives"][1]["function"] == "diffulex_jax.training.objective:uniform"
    text = (tmp_path / "table.md").read_text()
    assert text.splitlines()[2] == "| dmax | 0.5 | 62.5 ± 37.5 % at 3.00 ± 0.00 | 75.0 ± 25.0 % at 3.00 ± 0.00 |"
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_sheets_must_be_of_the_same_problems():
    with pytest.raises(ValueError, match="all of the same number of problems"):
        table.gather([{"problems": 4}, {"problems": 5}])


def test_decoders_are_for_models_of_blocks():
    for decoder in table.DECODERS.values():
        assert for_model(table.MODEL.spec, decoder.strategy).canvas == "block_causal"
    assert {decoder.window for decoder in table.DECODERS.values()} == {1, 2, 4}
