"""The page at ``/``: type a prompt and watch it denoise; and the same viewer as a file. ``index.html``, ``page.css`` and the scripts become
one document that asks no other host for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import pathlib
import re
from typing import Any


_HERE = pathlib.Path(__file__).parent


def document() -> tuple[str, str]:
    """The page as one HTML text, and the content-security policy that lets exactly its own style and scripts run."""
    page, sources = _assembled("filed")
    return page, f"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; connect-src 'self'; {sources}"


def replay(lanes: list[dict[str, Any]], *, block_size: int) -> str:
    """A file that plays outputs on the page's canvases, side by side: one HTML text, which may reach no host at all.

    Args:
      lanes: for each output its ``name``, what was ``asked`` (the ``parts`` of ``/detokenize``), and ``records``: those of a stream,
        ``buffer_snapshot`` for each forward and then ``final``.
      block_size: tokens between two lines of the canvas.
    """
    page, sources = _assembled("served")
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; {sources}"
    meta = f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">'
    records = json.dumps({"block_size": block_size, "lanes": lanes}, separators=(",", ":"), allow_nan=False)
    records = records.replace("<", "\\u003c")  # no text may end the script that holds it
    return page.replace("<meta charset", f"{meta}\n<meta charset", 1).replace("<!--records-->", records, 1)


def _assembled(without: str) -> tuple[str, str]:
    """The page without parts of a mark, styles and scripts in place, and the policy's sources for them."""
    parts: dict[str, list[str]] = {"style": [], "script": []}

    def inline(match: re.Match[str]) -> str:
        name = match["style"] or match["script"]
        kind, text = "style" if match["style"] else "script", (_HERE / name).read_text("utf-8")
        parts[kind].append("'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'")
        return f"<{kind}>{text}</{kind}>"

    page = (_HERE / "index.html").read_text("utf-8")
    page = re.sub(f"<!--{without}-->.*?<!--/{without}-->\\n?", "", page, flags=re.DOTALL)
    page = re.sub("<!--/?(served|filed)-->\\n?", "", page)
    pattern = r'<link rel="stylesheet" href="(?P<style>[\w.]+)">|<script src="(?P<script>[\w.]+)"></script>'
    page = re.sub(pattern, inline, page)
    return page, "; ".join(["img-src data:", *(f"{kind}-src {' '.join(hashes)}" for kind, hashes in parts.items())])
