"""What lies in a checkout and not in the package: optional groups of dependencies (pyproject.toml), and recipes."""

EXAMPLES = "https://github.com/mha2mla/mha2mla/tree/main/docs/examples"


def installing(extra: str) -> str:
    """For a person: the command. It takes a checkout, as the package is in no index yet."""
    return f"`pip install '.[{extra}]'` in a checkout of mha2mla"
