"""What lies in the folders of presets, rules, low-rank methods and architectures is found by itself."""

import sys

import pytest

from mha2mla.common.discovery import NamedModules, defined_classes
from mha2mla.conversion.architectures import architecture_classes
from mha2mla.conversion.presets import preset_classes
from mha2mla.conversion.presets.paper.low_rank import METHODS
from mha2mla.conversion.presets.paper.rope_selection import RULES


def test_what_is_there_is_found():
    assert {"llama", "mistral", "qwen2"} <= {architecture.model_type for architecture in architecture_classes()}
    assert {"calibrated", "paper"} <= preset_classes().keys()
    assert {"2-norm", "high", "low", "uniform"} <= RULES.keys()
    assert {"joint", "split", "none"} <= METHODS.keys()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a file, a file that imports its class, and a folder."""
    folder = tmp_path / "toys"
    (folder / "large").mkdir(parents=True)
    (folder / "__init__.py").write_text("class Toy: ...\n")
    (folder / "small.py").write_text("from toys import Toy\nNAME = 'a-small-one'\nclass Small(Toy): ...\n")
    (folder / "tiny.py").write_text("from toys.small import Small\nNAME = '1'\nclass Tiny(Small): ...\n")
    (folder / "large" / "__init__.py").write_text("from .inside import Large\nNAME = 'large'\n")
    (folder / "large" / "inside.py").write_text("from toys import Toy\nclass Large(Toy): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "toys", [str(folder)]
    for name in [name for name in sys.modules if name.split(".")[0] == "toys"]:
        del sys.modules[name]


def test_a_file_that_is_added_is_found(package):
    import toys

    assert list(NamedModules(*package)) == ["1", "a-small-one", "large"]
    found = defined_classes(*package, toys.Toy)
    assert [cls.__name__ for cls in found] == ["Large", "Small", "Tiny"]  # each where it is defined, and once
