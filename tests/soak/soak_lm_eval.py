"""lm-eval finishes tasks: its own API clients against the server, and the model that it finds by name."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from running import serving
from soak_serving import show

from diffulex_jax.training.arithmetic.evaluate import held_out


TASKS = pathlib.Path(__file__).parent / "lm_eval"
PROBLEMS = 50


@pytest.fixture(scope="module")
def server(compiled):
    with serving("embedded", "--max-model-len", "256", "--strategy", "dmax", cache=compiled) as server:
        yield server


@pytest.mark.parametrize(
    ("client", "route", "options"),
    [("local-completions", "completions", []), ("local-chat-completions", "chat/completions", ["--apply_chat_template"])],
)
def test_lm_eval_finishes_a_task(server, tmp_path, client, route, options):
    arguments = f"model=embedded,base_url={server.url}/v1/{route},num_concurrent=4,tokenized_requests=False,tokenizer_backend=None"
    figures = evaluated(tmp_path, "lm_eval", ["--model", client, "--model_args", arguments, *options])
    show(f"lm-eval, {client}", figures["arithmetic_words"])
    assert figures["arithmetic_words"]["exact_match,final-number"] >= 0.95


@pytest.mark.parametrize("estimator", ["block", "monte_carlo"])
def test_lm_eval_finds_the_model_by_its_name(tmp_path, estimator):
    """And ranks right answers above wrong ones by their likelihood, which untrained weights would not: of four, one in four by chance."""
    arguments = f"model=embedded,strategy=dmax,accept_threshold=0.5,max_model_len=256,max_slots=16,estimator={estimator}"
    command = ["--model", "diffulex_jax", "--model_args", arguments]
    figures = evaluated(tmp_path, "diffulex_jax.evaluation.harness", command, "arithmetic_words,arithmetic_choice,arithmetic_text")
    show(f"lm-eval, diffulex_jax, {estimator}", figures)
    assert figures["arithmetic_words"]["exact_match,final-number"] >= 0.95
    assert figures["arithmetic_choice"]["acc,none"] >= 0.8
    assert 1 < figures["arithmetic_text"]["byte_perplexity,none"] < 1000  # the model was never taught questions


def evaluated(folder: pathlib.Path, module: str, arguments: list[str], tasks: str = "arithmetic_words") -> dict:
    """lm-eval's figures by task."""
    for task in TASKS.glob("*.yaml"):
        shutil.copy(task, folder)
    lines = []
    for i, p in enumerate(held_out(PROBLEMS)):
        right = f" {p.answer}"
        wrong = [right.replace(f"is {p.final}.", f"is {p.final + off}.") for off in (1, 10, 7)]
        choices = [*wrong[: i % 4], right, *wrong[i % 4 :]]
        lines.append(json.dumps({"question": p.question, "final": p.final, "choices": choices, "right": i % 4}))
    (folder / "problems.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", module, *arguments, "--tasks", tasks, "--include_path", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    command += ["--output_path", str(folder / "results")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "results").rglob("results_*.json")
    return json.loads(results.read_text())["results"]
