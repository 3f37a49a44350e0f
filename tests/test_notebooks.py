"""Every notebook runs from clean, and is stored with the outputs of such a run, to be read where it is hosted."""

from __future__ import annotations

import base64
import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"


def load(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / name, as_version=4)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_stored_with_outputs(path):
    """As ``make notebooks`` leaves them: small, without errors, and without anything of the machine they ran on."""
    assert path.stat().st_size < 500_000
    first, *cells = [cell for cell in load(path.name).cells if cell.cell_type == "code"]
    assert not first.outputs  # it installs
    for cell in cells:
        assert cell.outputs and cell.execution_count
        assert {output.output_type for output in cell.outputs} <= {"stream", "display_data", "execute_result"}
        assert not [output for output in cell.outputs if output.output_type == "stream" and output.name == "stderr"]
        assert not re.search(r"(^|[\s\"'])/(home|root|tmp|usr|work)/", text(cell.outputs))


@pytest.fixture
def executed(tmp_path, pytestconfig, monkeypatch):
    """``executed(name)``: the outputs of each code cell of a notebook, run in a fresh kernel and an empty folder."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(pytestconfig.cache.mkdir("jax")))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    assert os.environ["JAX_PLATFORMS"] == "cpu"

    def run(name: str) -> list[list[nbformat.NotebookNode]]:
        notebook = load(name)
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
        return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]

    return run


def text(outputs: list[nbformat.NotebookNode]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(outputs: list[nbformat.NotebookNode]) -> list[bytes]:
    return [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


def test_quickstart(executed):
    outputs = executed("01_quickstart.ipynb")
    stored = [cell.outputs for cell in load("01_quickstart.ipynb").cells if cell.cell_type == "code"]
    assert list(map(text, outputs)) == list(map(text, stored))
    install, answer, canvas, strategies, comparison, rule = outputs
    assert not text(install)
    for outputs in (answer, rule):
        assert "the answer is 156." in text(outputs)
    for outputs in (canvas, comparison, rule):
        (picture,) = pictures(outputs)
        assert len(picture) > 5000
    rows = [line.split() for line in text(strategies).splitlines()[1:]]
    assert [row[0] for row in rows] == ["llada2", "llada2_edit", "dmax"]
    assert all(row[-1] == "156." for row in rows)
    forwards = {row[0]: int(row[2]) for row in rows}
    assert forwards["dmax"] * 2 <= forwards["llada2"]
