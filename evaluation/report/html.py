"""Pages that need no other file."""

import base64
import html
from collections.abc import Iterable

STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:100em;margin:2em auto;padding:0 1em}img{max-width:100%}"
    ".result{font-size:1.3em;font-weight:bold}"
    ".pictures{display:flex;flex-wrap:wrap;gap:0 1em}.pictures p{margin:.5em 0;flex:1 1 30em;max-width:60em}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}pre{overflow-x:auto}"
)


def html_picture(name: str, png: bytes) -> str:
    """A picture inside the page itself."""
    return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def html_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of plain text cells."""
    head = "".join(f"<th>{html.escape(cell)}" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def html_page(title: str, body: str) -> str:
    """A page that needs no other file."""
    title = html.escape(title)
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{body}\n"
