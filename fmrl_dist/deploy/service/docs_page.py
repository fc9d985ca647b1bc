"""The page of the API: its OpenAPI description as plain HTML, without a script, a font or a picture from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 0; overflow-wrap: anywhere; }
code, pre { font: 0.85rem/1.4 ui-monospace, monospace; }
pre { overflow-x: auto; padding: 0.75rem; border: 1px solid; border-radius: 4px; }
"""


def docs_page(schema: Mapping[str, Any]) -> str:
    """The page of an OpenAPI description."""
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        f"<head><meta charset=utf-8><title>{escape(schema['info']['title'])}</title>",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body><main>",
        f"<h1>{escape(schema['info']['title'])} {escape(schema['info']['version'])}</h1>",
        f"<p>{escape(schema['info']['description'])} The same for programs: ",
        '<a href="openapi.json">openapi.json</a>.</p>',
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            shown = {name: operation[name] for name in ("parameters", "requestBody") if name in operation}
            for status, answer in operation["responses"].items():
                if status.startswith("2"):
                    shown[f"answer {status}"] = answer.get("content", {})
            parts.append(_details("request and answer", shown))
    parts.append("<h2>What bodies hold</h2>")
    parts += [_details(name, described) for name, described in schema["components"]["schemas"].items()]
    return "\n".join([*parts, "</main></body></html>"])


def _details(summary: str, value: Any) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(json.dumps(value, indent=2))}</pre></details>"
