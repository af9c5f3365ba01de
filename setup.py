"""The README as PyPI shows it, with links that lead to GitHub; all else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "https://github.com/mha2mla/mha2mla/blob/main/"
PICTURES = "https://raw.githubusercontent.com/mha2mla/mha2mla/main/"


def with_full_links(markdown: str) -> str:
    links = re.compile(r"(!?\[[^]]*\])\((?!https?://|#)([^)]+)\)")
    return links.sub(lambda link: f"{link[1]}({PICTURES if link[1][0] == '!' else REPOSITORY}{link[2]})", markdown)


if __name__ == "__main__":
    readme = Path("README.md").read_text(encoding="utf-8")
    setup(long_description=with_full_links(readme), long_description_content_type="text/markdown")
