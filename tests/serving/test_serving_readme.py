"""Every example of diffulex_jax/async_serving/README.md that Python or curl can run is run, against a server of the embedded model."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess

import pytest
from running import EMBEDDED, serving


TEXT = (pathlib.Path(__file__).parent.parent.parent / "diffulex_jax" / "async_serving" / "README.md").read_text()
HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server(compiled):
    with serving("embedded", "--strategy", "dmax", *EMBEDDED, cache=compiled) as server:
        yield server


@pytest.mark.sweep
def test_python_examples_answer(server, capsys):
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example.replace(HERE, server.url), {})
    assert capsys.readouterr().out.count("So the answer is 42.") == 2


def test_curl_examples_answer(server):
    examples = re.findall(r"```bash\n(curl.*?)```", TEXT, re.DOTALL)
    assert len(examples) == 3
    chat, extras, stream = (
        subprocess.run(["bash", "-c", e.replace(HERE, server.url)], capture_output=True, text=True, check=True).stdout for e in examples
    )
    assert json.loads(chat)["choices"][0]["message"]["content"].endswith("the answer is 42.")
    assert json.loads(extras)["usage"]["completion_tokens_details"]["tokens_per_forward"] > 1
    assert json.loads(extras)["choices"][0]["step_map"]
    assert stream.count('"event":"buffer_snapshot"') >= 2 and stream.endswith("data: [DONE]\n\n")


def test_the_options_named_are_options_with_these_defaults():
    from diffulex_jax.async_serving.settings import ServerSettings

    rows = dict(re.findall(r"^\| `(--[a-z-]+)` \| ([^|]*) \|", TEXT, re.MULTILINE))
    settings = ServerSettings()
    for name in ("max_queue", "max_queue_tokens", "drain_seconds", "ping_seconds"):
        assert float(rows[f"--{name.replace('_', '-')}"].replace(" ", "")) == getattr(settings, name)
    named = {
        name for names in re.findall(r"^\| ((?:`--[a-z-]+`(?:, )?)+) \|", TEXT, re.MULTILINE) for name in re.findall(r"--([a-z-]+)", names)
    }
    assert {name.replace("_", "-") for name in vars(settings)} <= named


def test_the_metrics_named_are_those_there_are(server):
    server.post("/generate", prompt="What is 1 + 1?")
    named = set(re.findall(r"`([a-z0-9_]+)(?:\{[a-z_,]+\})?`", TEXT.split("## Metrics")[1].split("## lm-eval")[0]))
    there = {
        line.split()[2].removeprefix("diffulex:") for line in server.client.get("/metrics").text.splitlines() if line.startswith("# TYPE")
    }
    assert named == {name for name in there if not name.endswith("_created")}
