"""``bench quality``: what it compares, on the embedded model, and what it refuses."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from diffulex_jax.bench import quality
from diffulex_jax.bench.forward import program_of
from diffulex_jax.cli.commands import app
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.strategies import for_model
from diffulex_jax.training import objective
from diffulex_jax.training.arithmetic import data, evaluate
from diffulex_jax.weights import checkpoint
from pallas_kernels import choose


TINY = pathlib.Path(__file__).parent / "golden" / "tiny-llada2"


def bench(*args: str):
    return CliRunner().invoke(app, ["bench", "quality", *args])


def test_figures_by_hand():
    plain = quality.Said([[1, 2], [3]], 1.0, 3.0, np.array([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]], np.float32))
    other = quality.Said([[1, 2], [4]], 0.5, 2.0, np.array([[0.25, 0.75, 0.0], [0.9, 0.1, 0.0]], np.float32))
    assert quality.figures(plain, plain) == {"exact": 1.0, "same": 1.0, "tokens_per_forward": 3.0, "argmax": 1.0, "kl": 0.0}
    found = quality.figures(other, plain)
    assert found.pop("kl") == pytest.approx(0.5 * np.log(4 / 3) / 2)  # of the first: (log 2 + log 2/3) / 2
    assert found == {"exact": 0.5, "same": 0.5, "tokens_per_forward": 2.0, "argmax": 0.5}
    assert quality.row("int8 experts", found | {"kl": 0.25}).split() == ["int8", "experts", "50.0%", "50.0%", "2.00", "50.00%", "0.25000"]


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setattr(quality, "ROWS", 8)


def test_shares_are_those_of_the_objective_that_the_model_was_trained_with():
    """Blocks behind the clean ones before them, which the pool holds: as the trainer's layout of both has it, by other operations."""
    model, params = checkpoint.load(checkpoint.EMBEDDED, make_mesh())
    problems = evaluate.held_out(10)
    examples = data.encode([p.question for p in problems], [p.answer for p in problems])
    settings = EngineConfig(max_slots=8, max_model_len=data.CANVAS, warm_up=False)
    program = program_of(model, for_model(model.spec, "dmax"), settings, choose(jax.devices()[0]))
    got = quality._shares(program, params, examples)
    clean, noisy = (np.concatenate(arrays)[:10] for arrays in zip(*quality._canvases(examples, model.spec.mask_id), strict=True))
    np.testing.assert_array_equal(clean, examples.tokens)
    at, masked = np.arange(data.CANVAS), noisy == model.spec.mask_id
    assert 0 < masked.sum() == len(got)
    assert not (masked & ((at < examples.start[:, None]) | (at > examples.end[:, None]))).any()
    want = jax.nn.softmax(jax.jit(objective.predict, static_argnums=1)(params, model, noisy, clean))
    np.testing.assert_allclose(got, np.asarray(want)[masked], atol=2e-5)


@pytest.mark.sweep
def test_a_report_of_the_model_beside_itself():
    told = bench("--problems", "10", "--strategy", "dmax", "--weights", "int4", "--kv", "", "--json")
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert (report["model"], report["strategy"], report["problems"], report["dtype"]) == ("embedded", "dmax 0.5", 10, "float32")
    plain, four = report["settings"]["float32"], report["settings"]["int4 experts"]
    assert len(report["settings"]) == 2
    assert (plain["same"], plain["argmax"], plain["kl"]) == (1, 1, 0) and plain["tokens_per_forward"] > 1
    assert 1e-7 < four["kl"] < 1e-2 and four["argmax"] > 0.9
    assert quality.head(report)[0].startswith("embedded, dmax 0.5: 10 held-out problems, ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--strategy", "sdar"], "strategy='sdar' must be one of llada2, llada2_edit, dmax"),
        (["--problems", "0"], "problems=0 must be at least 1"),
        (["--weights", "int8,int3"], "weights='int3' must be one of None, int8, int4, fp8"),
        (["--kv", "int4"], "kv='int4' must be one of"),
        (["--model", str(TINY)], "tokens, and is no model of the arithmetic problems; train one, or take 'embedded'"),
    ],
)
def test_what_will_not_do_is_refused_by_name(args, message):
    told = bench(*args)
    assert told.exit_code == 2 and message in told.stderr
