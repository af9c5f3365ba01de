"""The package as a whole: what `import mha2mla` gives and costs, and which part may import which."""

import ast
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import mha2mla

# What each part may import of the others; modeling is copied to the Hub and stands alone.
ARROWS = {
    "modeling": set(),
    "common": {"modeling"},
    "conversion": {"modeling", "common"},
    "training": {"modeling", "common"},
    "evaluation": {"modeling", "common"},
    "cli": {"modeling", "common", "conversion", "training", "evaluation"},
}


def imports(whole: bool) -> dict[str, set[str]]:
    """What every module imports of this package, by full names; `whole`: inside functions too."""
    root = Path(str(files("mha2mla")))
    found = {}
    for path in sorted(file for part in ARROWS for file in (root / part).rglob("*.py")):
        parts = ["mha2mla", *path.relative_to(root).with_suffix("").parts]
        package, parts = parts[:-1], parts if parts[-1] != "__init__" else parts[:-1]
        names = set()
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.FunctionDef) and not whole:
                continue
            for node in ast.walk(statement):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    base = package[: len(package) - node.level + 1] if node.level else []
                    base = ".".join([*base, *([node.module] if node.module else [])])
                    names |= {f"{base}.{alias.name}" for alias in node.names}
        found[".".join(parts)] = {name for name in names if name.startswith("mha2mla.")}
    return found


def test_import_is_cheap():
    """Neither torch nor transformers, which take seconds, until a name that needs them is asked for."""
    program = (
        "import sys, mha2mla; heavy = {'torch', 'transformers', 'datasets'}\n"
        "assert mha2mla.__version__ and 'convert' in dir(mha2mla)\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "mha2mla.MLALlamaConfig; assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_names():
    from mha2mla import conversion, modeling

    assert mha2mla.convert is conversion.convert and mha2mla.ConversionConfig is conversion.ConversionConfig
    for name in ("MLALlamaConfig", "MLALlamaModel", "MLALlamaForCausalLM"):
        assert getattr(mha2mla, name) is getattr(modeling, name)
    assert set(mha2mla.__all__) <= set(dir(mha2mla))
    with pytest.raises(AttributeError, match="has no attribute 'converted'"):
        mha2mla.converted  # noqa: B018


def test_type_checkers_may_trust_the_annotations():
    assert (files("mha2mla") / "py.typed").is_file()


def test_imports_follow_the_arrows():
    def part(module: str) -> str:
        return module.split(".")[1]

    wrong = [
        f"{name} imports {other}"
        for name, others in imports(whole=True).items()
        for other in sorted(others)
        if part(other) in ARROWS.keys() - ARROWS[part(name)] - {part(name)}
    ]
    assert not wrong


def test_no_module_imports_itself_through_others():
    found = imports(whole=False)
    # `from module import name` names a module or something in one.
    graph = {
        name: {other if other in found else other.rpartition(".")[0] for other in others} & found.keys() - {name}
        for name, others in found.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
