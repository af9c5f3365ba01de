"""Convert a checkpoint's attention to Multi-head Latent Attention.

    mha2mla convert meta-llama/Llama-2-7b-hf llama-2-7b-mla --cache-ratio 0.3125 \\
        --data HuggingFaceFW/fineweb-edu --subset sample-10BT
    mha2mla convert ./my-llama ./my-llama-mla --kv-lora-rank 512 --qk-rope-head-dim 16 --preset paper \\
        --rope-selection uniform
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from mha2mla.conversion.cache_sizes import CacheSizes
from mha2mla.conversion.config import CalibrationText, OutputOptions, ServingOptions, refuse_foreign_options
from mha2mla.conversion.presets import preset_classes
from mha2mla.conversion.presets.calibrated import Calibrated

from .parsing import CommandParser, Positionals, peek, read_options

POSITIONALS: Positionals = {
    "source": dict(help="Local folder, .gguf file, or name on the Hub."),
    "output": dict(help="Folder to write."),
}


@dataclass
class ConvertArguments:
    """What is converted, and how."""

    preset: str = field(
        default=Calibrated.name,
        metadata={"choices": tuple(preset_classes()), "help": "How the MLA weights are made."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a source on the Hub."})
    gguf_file: str | None = field(default=None, metadata={"help": "Name of a GGUF file in the source."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the source brings along for its tokenizer."}
    )


def main(argv: list[str]) -> None:
    presets = preset_classes()
    wanted = list(presets.values())  # --help tells the options of all
    if not {"-h", "--help"} & set(argv):
        chosen = peek(argv, "preset") or Calibrated.name
        wanted = [presets[chosen]] if chosen in list(presets) else []  # the parser refuses an unknown one
        if wanted:
            refuse_foreign_options(sorted(given_options(argv)), chosen)
    parser = CommandParser(
        "mha2mla convert",
        (ConvertArguments, CacheSizes, ServingOptions, CalibrationText, OutputOptions, *wanted),
        description=__doc__,
        positionals=POSITIONALS,
    )
    arguments, *common, preset, given = parser.parse(argv)

    from mha2mla.conversion import ConversionConfig, convert

    values = {f.name: getattr(part, f.name) for part in common for f in fields(part)}
    convert(
        given.source,
        given.output,
        ConversionConfig(preset=preset, **values),
        revision=arguments.revision,
        gguf_file=arguments.gguf_file,
        trust_remote_code=arguments.trust_remote_code,
    )


def given_options(argv: list[str]) -> set[str]:
    """Names of the options on the command line and in the file."""
    file = peek(argv, "config")
    words = [word.lstrip("-").split("=")[0] for word in argv if word.startswith("--")]
    return {str(word).replace("-", "_") for word in (*words, *(read_options(Path(file)) if file else ()))}
