"""Every Python snippet of the README runs as written."""

from __future__ import annotations

import functools
import pathlib
import re

from diffulex_jax import Engine
from diffulex_jax.weights.checkpoint import EMBEDDED


README = pathlib.Path(__file__).parent.parent / "README.md"


def test_snippets_run(tmp_path, monkeypatch, capsys):
    """In order, in one namespace, where ``path/to/LLaDA2.0-mini`` is a checkpoint. No engine compiles what its snippet does not use."""
    monkeypatch.setattr(Engine, "from_pretrained", functools.partial(Engine.from_pretrained, warm_up=False))
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/LLaDA2.0-mini").symlink_to(EMBEDDED)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 6
    namespace: dict = {}
    for snippet in snippets:
        exec(snippet, namespace)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("the answer is 42.") and shown[-2].endswith("the answer is 42.")
    assert shown[-1] == f"True {shown[-2]}"


def test_the_picture_exists():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (README.parent / path).is_file()


def test_what_contributing_names_is_there():
    """Files and folders in backquotes, from the root or from ``diffulex_jax``."""
    root, text = README.parent, (README.parent / "CONTRIBUTING.md").read_text()
    paths = [name for name in re.findall(r"`([\w./]+)`", text) if "/" in name or name.endswith((".py", ".md"))]
    assert len(paths) > 15
    for path in paths:
        inside = [root, root / "diffulex_jax", root / "pallas_kernels", root / "pallas_kernels" / "prediction"]
        assert any((folder / path).exists() for folder in inside), path
