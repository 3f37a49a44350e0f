"""Every notebook runs from clean, and is stored with the outputs of such a run, to be read where it is hosted."""

from __future__ import annotations

import base64
import importlib.util
import os
import pathlib
import re
import tomllib

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from traitlets.config import Config


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


@pytest.mark.parametrize(
    ("plugin", "extra"), [("jax_cuda12_plugin", "cuda12"), ("jax_cuda13_plugin", "cuda"), ("libtpu", "tpu"), ("", "cpu")]
)
@pytest.mark.parametrize("name", ["01_quickstart", "02_colab_16gb", "02_decoding_rule", "03_on_policy_training", "05_rl_rollout"])
def test_jax_is_installed_for_the_device_that_the_jax_there_is_for(name, plugin, extra, monkeypatch):
    """A newer JAX does not use the plugins of an older one, and computes on the CPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module == plugin or None)
    monkeypatch.setitem(os.environ, "TQDM_DISABLE", "")  # the cell may set it
    shell, asked = InteractiveShell(config=Config(HistoryManager={"enabled": False})), []  # it would write into the user's home
    monkeypatch.setattr(shell, "run_line_magic", lambda magic, line, **_: asked.append((magic, shell.var_expand(line))))
    shell.run_cell(load(f"{name}.ipynb").cells[1].source).raise_error()
    ((magic, line),) = asked
    extras = re.fullmatch(r'install -q "diffulex-jax\[(.*)\]"', line)
    assert magic == "pip" and extras is not None and extra in extras[1].split(",")
    project = tomllib.loads((NOTEBOOKS.parent / "pyproject.toml").read_text())["project"]
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


def test_each_is_run():
    run = set(re.findall(r'executed\("(.*?)"\)', pathlib.Path(__file__).read_text()))
    assert run == {path.name for path in NOTEBOOKS.glob("*.ipynb")}


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


def test_decoding_rule(executed):
    """A rule that the notebook writes down is served over HTTP with what the notebook says alone."""
    install, rule, canvas, events, race, plot, comparison, served, ended = executed("02_decoding_rule.ipynb")
    assert not text(install) and "my_rules.py" in text(rule)
    answer = text(canvas).strip()
    assert answer.endswith("the answer is 156.")
    rows = [line.split() for line in text(race).splitlines()[1:]]
    assert [row[:2] for row in rows] == [[name, threshold] for name in ("dmax", "draft_and_repair") for threshold in ("0.9", "0.5", "0.0")]
    right, rates = [int(row[2].rstrip("%")) for row in rows], [float(row[3]) for row in rows]
    assert min(right) >= 90 and rates[3] < rates[4] <= rates[5] and rates[5] > 8
    for outputs in (canvas, events, plot, comparison):
        (picture,) = pictures(outputs)
        assert len(picture) > 5000
    assert text(served).splitlines() == [answer, "as above: True"]
    assert text(ended) == "the server has ended\n"


def test_plan_a_pod(executed, monkeypatch):
    monkeypatch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")  # two thirds of the time, and larger temporaries
    install, sizes, memory, compiled, roofline, rates = executed("04_plan_a_pod.ipynb")
    stored = [cell.outputs for cell in load("04_plan_a_pod.ipynb").cells if cell.cell_type == "code"]
    assert text(sizes) == text(stored[1]) and text(rates) == text(stored[5])
    assert not text(install) and text(sizes).splitlines()[1].split()[0] == "v5e:4x4"
    assert "temporaries" in text(compiled) and "all-reduce" in text(compiled)
    for outputs in (memory, roofline):
        (picture,) = pictures(outputs)
        assert len(picture) > 5000


def test_on_policy_training(executed):
    install, task, trained, before, after, plot, *canvases = executed("03_on_policy_training.ipynb")
    assert not text(install) and text(task) and text(trained)
    waits, drafts = measured(text(before))
    assert measured(text(after))[0] == drafts and drafts[0] < 20
    right, rate = measured(text(after))[-1]
    assert right >= 80 and rate > 1.3 * max(waits[1], drafts[1])
    for outputs in (plot, *canvases):
        (picture,) = pictures(outputs)
        assert len(picture) > 5000


def measured(lines: str) -> list[tuple[int, float]]:
    return [(int(right), float(rate)) for right, rate in re.findall(r"(\d+)% right, (\d+\.\d) tokens per forward", lines)]


def test_colab_16gb(executed):
    """Without a large chip: the same cells with the small model."""
    outputs = executed("02_colab_16gb.ipynb")
    stored = [cell.outputs for cell in load("02_colab_16gb.ipynb").cells if cell.cell_type == "code"]
    assert list(map(text, outputs)) == list(map(text, stored))
    install, chip, loaded, answer, answers = map(text, outputs)
    assert not install and chip == "cpu: embedded\n"
    assert float(loaded.split(" GiB")[0]) < 0.1
    assert "the answer is 57." in answer
    assert [re.search(r"the answer is (\d+)\.", line)[1] for line in answers.splitlines()[1::2]] == ["33", "69", "153", "156"]


def test_rl_rollout(executed):
    install, before, trained, plot, after = executed("05_rl_rollout.ipynb")
    first, last = map(float, re.findall(r"\d\.\d\d", text(trained)))
    assert not text(install) and last > first + 0.3

    def quick(outputs):
        lines = text(outputs).splitlines()[1:]
        assert len(lines) == 4 and all(float(line.split()[0]) < 0 for line in lines)
        return sum("quickly" in line for line in lines)

    assert quick(before) < quick(after)
    (picture,) = pictures(plot)
    assert len(picture) > 5000
