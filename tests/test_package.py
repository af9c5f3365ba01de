"""What `import mha2mla` gives, what it costs, and what a release says of itself."""

import re
import runpy
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import mha2mla

REPOSITORY = Path(__file__).parents[1]


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
    assert mha2mla.Calibrated is conversion.Calibrated and mha2mla.Paper is conversion.Paper
    for name in ("MLALlamaConfig", "MLALlamaModel", "MLALlamaForCausalLM"):
        assert getattr(mha2mla, name) is getattr(modeling, name)
    assert set(mha2mla.__all__) <= set(dir(mha2mla))
    with pytest.raises(AttributeError, match="has no attribute 'converted'"):
        mha2mla.converted  # noqa: B018


def test_type_checkers_may_trust_the_annotations():
    assert (files("mha2mla") / "py.typed").is_file()


def test_the_readme_leads_somewhere_on_pypi():
    pytest.importorskip("setuptools")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = runpy.run_path(str(REPOSITORY / "setup.py"))["with_full_links"](readme)
    links = re.findall(r"\]\(([^)]*)\)", shown)
    assert len(links) == len(re.findall(r"\]\(", readme))
    assert all(link.startswith("https://") for link in links)
    assert "(https://raw.githubusercontent.com/mha2mla/mha2mla/main/docs/cache.svg)" in shown


def test_one_version():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.*?)\]", changelog, re.MULTILINE)[0] == mha2mla.__version__
    assert f"\nversion: {mha2mla.__version__}\n" in citation


def test_optional_dependencies_are_installed_from_a_checkout():
    """There is no package of that name in an index, so one function says the command, of groups that there are."""
    modules = (REPOSITORY / "src" / "mha2mla").glob("*/**/*.py")
    code = "".join(path.read_text(encoding="utf-8") for path in modules)
    named = set(re.findall(r"installing\(['\"](\w+)['\"]\)", code))
    assert "mha2mla[" not in code
    groups = (
        (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    )
    assert named == {"eval", "gguf", "train", "vllm"} and all(f"\n{name} = [" in groups for name in named)
