"""Optional groups of dependencies (pyproject.toml), and how a user gets one."""


def installing(extra: str) -> str:
    """For a person: the command. It takes a checkout, as the package is in no index yet."""
    return f"`pip install '.[{extra}]'` in a checkout of mha2mla"
