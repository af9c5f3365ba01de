"""For mkdocs: types of arguments as transformers' docstrings write them (`str`, *optional*), without their marks."""

import re


def on_page_content(html: str, **_) -> str:
    return re.sub(r"<code>(`.*?)</code>", lambda found: f"<code>{re.sub('[`*]', '', found[1])}</code>", html)
