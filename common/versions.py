"""What something was made with, for records and cards."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version


def versions(*packages: str) -> dict[str, str]:
    """Versions by package; those that are not installed are left out. Our own is known in a source tree, too, and
    torch's says for which device it was built, which its package does not always."""
    found = {}
    for package in packages:
        try:
            tells = package in ("mha2mla", "torch")
            found[package] = str(import_module(package).__version__) if tells else version(package)
        except PackageNotFoundError:
            continue
    return found


def made_with() -> str:
    """The row of a model card."""
    return ", ".join(f"{name} {number}" for name, number in versions("mha2mla", "torch", "transformers").items())
