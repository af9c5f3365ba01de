"""Arrows: cli -> {training, evaluation, conversion}, serving -> {modeling, common}; no circle of files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "cli": {"training", "evaluation", "conversion", "modeling", "common"},
    "training": {"modeling", "common"},
    "evaluation": {"modeling", "common"},
    "conversion": {"modeling", "common"},
    "serving": {"modeling", "common"},
    "modeling": set(),
    "common": set(),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("mha2mla", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_name(path): path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")}


def imported(name: str) -> set[str]:
    """Modules of this repository that one imports, wherever in the file it does."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return {module for module in found if module in MODULES and module != name}


GRAPH = {name: imported(name) for name in MODULES}


def test_every_package_is_looked_at():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)
    assert "mha2mla.common.files" in GRAPH["mha2mla.common.records"]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_arrow_upward_or_sideways(package):
    wrong = [
        f"{name} -> {module}"
        for name, modules in GRAPH.items()
        for module in modules
        if name.split(".")[1] == package and module.split(".")[1] not in MAY_IMPORT[package] | {package}
    ]
    assert not wrong, wrong


def test_files_that_go_to_the_hub_import_siblings_only():
    for name, path in MODULES.items():
        if name.split(".")[1] == "modeling":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert node.level < 2 and not (node.level and (node.module is None or "." in node.module)), name
                    assert not (node.module or "").startswith("mha2mla"), name


def test_no_circle_between_files():
    # A package's __init__ gathers what its files hold; a file that imports from its own package's __init__ closes a
    # circle, and is found as one.
    state: dict[str, int] = {}

    def walk(name: str, path: list[str]) -> None:
        state[name] = 1
        for module in sorted(GRAPH[name]):
            assert state.get(module) != 1, " -> ".join([*path[path.index(module) :], module])
            if module not in state:
                walk(module, [*path, module])
        state[name] = 2

    for name in MODULES:
        if name not in state:
            walk(name, [name])
