"""Convert a Llama-type checkpoint to Multi-head Latent Attention.

    mha2mla convert meta-llama/Llama-2-7b-hf llama-2-7b-mla --cache-ratio 0.3125 \\
        --calibration-data HuggingFaceFW/fineweb-edu --calibration-subset sample-10BT
    mha2mla convert ./my-llama ./my-llama-mla --kv-lora-rank 512 --qk-rope-head-dim 16 --preset paper \\
        --rope-selection uniform
"""

from dataclasses import dataclass, field

from mha2mla.conversion import ConversionConfig, convert
from mha2mla.conversion.cache_plan import CacheSizes
from mha2mla.conversion.config import CalibrationText, OutputOptions
from mha2mla.conversion.presets import preset_classes

from .parsing import Positionals, parse_given

POSITIONALS: Positionals = {
    "source": dict(help="Local folder, .gguf file, or name on the Hub."),
    "output": dict(help="Folder to write."),
}


@dataclass(kw_only=True)
class ConvertArguments:
    """Which checkpoint, and how."""

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a source on the Hub."})
    gguf_file: str | None = field(default=None, metadata={"help": "Name of a GGUF file in the source."})
    preset: str = field(
        default="calibrated",
        metadata={"help": "How the MLA weights are made.", "choices": tuple(preset_classes())},
    )


def main(argv: list[str]) -> None:
    # Options of another preset than the chosen one are seen by what was given.
    given = parse_given(
        argv,
        "mha2mla convert",
        ConvertArguments,
        CacheSizes,
        CalibrationText,
        OutputOptions,
        *preset_classes().values(),
        description=__doc__,
        positionals=POSITIONALS,
    )
    source, output, revision, gguf_file = (
        given.pop(name, None) for name in ("source", "output", "revision", "gguf_file")
    )
    assert source is not None and output is not None
    convert(source, output, ConversionConfig.from_dict(given), revision=revision, gguf_file=gguf_file)
