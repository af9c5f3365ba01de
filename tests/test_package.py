"""What `import mha2mla` gives, and what it costs."""

import subprocess
import sys
from importlib.resources import files

import pytest

import mha2mla


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
