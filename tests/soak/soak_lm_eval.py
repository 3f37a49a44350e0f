"""lm-eval's own API clients finish a task against the server."""

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


TASK = pathlib.Path(__file__).parent / "lm_eval" / "arithmetic.yaml"
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
    shutil.copy(TASK, tmp_path)
    lines = [json.dumps({"question": p.question, "final": p.final}) for p in held_out(PROBLEMS)]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    arguments = f"model=embedded,base_url={server.url}/v1/{route},num_concurrent=4,tokenized_requests=False,tokenizer_backend=None"
    command = [sys.executable, "-m", "lm_eval", "--model", client, "--model_args", arguments, *options]
    command += ["--tasks", "arithmetic_words", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    figures = json.loads(results.read_text())["results"]["arithmetic_words"]
    show(f"lm-eval, {client}", figures)
    assert figures["exact_match,final-number"] >= 0.95
