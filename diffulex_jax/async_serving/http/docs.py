"""``/docs``: the routes and every field of their requests, read off ``/openapi.json``, as one HTML document that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from typing import Any


_STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; }
h2 { margin: 2rem 0 .3rem; font-size: 1.15rem; } code { font-size: .92em; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { padding: .3rem .8rem .3rem 0; border-top: 1px solid #dfe3e8; text-align: left; vertical-align: top; }
@media (prefers-color-scheme: dark) {
  body { color: #e4e9ee; background: #0f1318; } a { color: #7db8f0; } td, th { border-color: #2a323c; }
}
"""

POLICY = f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"


def document(openapi: dict[str, Any]) -> str:
    """The page of an OpenAPI description."""
    schemas = openapi["components"]["schemas"]
    forms, routes = [], []
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            form = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            takes = f": {_kind(form)}" if form else ""
            says = _prose(operation.get("description", ""))
            routes.append(f"<li><code>{method.upper()} {html.escape(path)}</code>{takes} {says}</li>")
            forms += [name for name in _named(form, schemas) if name not in forms]
    tables = "".join(_table(name, schemas[name]) for name in forms)
    title = f"{html.escape(openapi['info']['title'])} {html.escape(openapi['info']['version'])}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    body = f'<h1>{title}</h1><p>The same for programs: <a href="openapi.json">openapi.json</a></p><ul>{"".join(routes)}</ul>{tables}'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'


def _named(schema: Any, schemas: dict[str, Any]) -> list[str]:
    """Names of the schemas that one refers to, and of those that these refer to."""
    names: list[str] = []
    waiting = [schema]
    while waiting:
        for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(waiting.pop())):
            if name not in names:
                names.append(name)
                waiting.append(schemas[name])
    return names


def _table(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{field}</code>{' (required)' if field in required else ''}</td><td>{_kind(of)}</td>"
        f"<td>{_prose(of.get('description', ''))}</td></tr>"
        for field, of in schema.get("properties", {}).items()
    )
    return f'<h2 id="{name}">{name}</h2><p>{_prose(schema.get("description", ""))}</p><table>{rows}</table>'


def _kind(schema: dict[str, Any]) -> str:
    """A type in words, as HTML."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    if several := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_kind(one) for one in several if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{html.escape(json.dumps(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def _prose(text: str) -> str:
    return re.sub(r"``?([^`]+)``?", r"<code>\1</code>", html.escape(" ".join(text.split()), quote=False))
