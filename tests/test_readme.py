"""Every Python snippet of the README runs as written."""

from __future__ import annotations

import pathlib
import re

from diffulex_jax.weights.checkpoint import EMBEDDED


README = pathlib.Path(__file__).parent.parent / "README.md"


def test_snippets_run(tmp_path, monkeypatch, capsys):
    """In order, in one namespace, where ``path/to/LLaDA2.0-mini`` is a checkpoint."""
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/LLaDA2.0-mini").symlink_to(EMBEDDED)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 3
    namespace: dict = {}
    for snippet in snippets:
        exec(snippet, namespace)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("the answer is 42.") and shown[-1].endswith("the answer is 42.")


def test_the_picture_exists():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (README.parent / path).is_file()
