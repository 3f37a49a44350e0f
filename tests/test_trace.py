"""``diffulex-jax trace``: a file that plays what strategies made of prompts."""

from __future__ import annotations

import json
import pathlib

import pytest
from typer.testing import CliRunner

from diffulex_jax import cli
from diffulex_jax.weights import checkpoint


MODEL = str(pathlib.Path(__file__).parent / "golden" / "tiny-llada2-trained")
SMALL = ["--model", MODEL, "--block-size", "8", "--max-model-len", "64", "--max-tokens", "12", "--ignore-eos", "--prompt-ids", "216,206,72"]


@pytest.mark.sweep
def test_strategies_are_played_side_by_side(tmp_path):
    file = tmp_path / "race.html"
    result = CliRunner().invoke(cli.app, ["trace", *SMALL, "--strategy", "llada2", "--strategy", "dmax", "--html", str(file)])
    assert result.exit_code == 0, result.output
    records = json.loads(file.read_text("utf-8").split('id="records">')[1].split("</script>")[0])
    finals = {lane["name"]: lane["records"][-1] for lane in records["lanes"]}
    assert list(finals) == ["llada2", "dmax"] and records["block_size"] == 8
    for lane, line in zip(records["lanes"], result.stdout.splitlines(), strict=False):
        final, patches = lane["records"][-1], lane["records"][:-1]
        canvas: dict[int, int] = {}
        for patch in patches:
            canvas |= dict(enumerate(patch["token_ids"], patch["token_offset"]))
        assert len(patches) == final["nfe"] and [canvas[i] for i in range(12)] == final["token_ids"]
        assert line.startswith(f"{lane['name']}: 12 tokens in {final['nfe']} forwards")
    assert result.stdout.splitlines()[-1] == f"{file}: {file.stat().st_size} bytes"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--html", "/no/such/folder/a.html"], "--html /no/such/folder/a.html: there is no directory /no/such/folder"),
        (["--html", "a.html", "--strategy", "dmax", "--strategy", "nope"], "unknown strategy 'nope'"),
        (["--html", "a.html", "--chat"], "--chat takes prompts as text"),
    ],
)
def test_wrong_input_is_one_line_before_a_weight_is_read(args, message, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *args, **settings: pytest.fail("loads"))
    result = CliRunner().invoke(cli.app, ["trace", *SMALL, *args])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1) and message in result.stderr
