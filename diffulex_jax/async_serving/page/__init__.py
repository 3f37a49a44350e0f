"""The page at ``/``: type a prompt and watch it denoise. ``index.html``, ``page.css`` and the scripts become one document that asks no
other host for anything."""

from __future__ import annotations

import base64
import hashlib
import pathlib
import re


_HERE = pathlib.Path(__file__).parent


def document() -> tuple[str, str]:
    """The page as one HTML text, and the content-security policy that lets exactly its own style and scripts run."""
    parts: dict[str, list[str]] = {"style": [], "script": []}

    def inline(match: re.Match[str]) -> str:
        name = match["style"] or match["script"]
        kind, text = "style" if match["style"] else "script", (_HERE / name).read_text("utf-8")
        parts[kind].append("'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'")
        return f"<{kind}>{text}</{kind}>"

    pattern = r'<link rel="stylesheet" href="(?P<style>[\w.]+)">|<script src="(?P<script>[\w.]+)"></script>'
    html = re.sub(pattern, inline, (_HERE / "index.html").read_text("utf-8"))
    sources = "; ".join(f"{kind}-src {' '.join(hashes)}" for kind, hashes in parts.items())
    closed = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return html, f"{closed}; connect-src 'self'; img-src data:; {sources}"
