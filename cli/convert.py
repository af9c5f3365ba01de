"""Convert a Llama-type checkpoint to Multi-head Latent Attention.

    mha2mla convert meta-llama/Llama-2-7b-hf llama-2-7b-mla --cache-ratio 0.3125 \\
        --calibration-data HuggingFaceFW/fineweb-edu --calibration-subset sample-10BT
    mha2mla convert ./my-llama ./my-llama-mla --kv-lora-rank 512 --qk-rope-head-dim 16 --preset paper \\
        --rope-selection uniform
"""

from argparse import RawDescriptionHelpFormatter
from dataclasses import fields

from transformers import HfArgumentParser

from mha2mla.conversion import ConversionConfig, convert
from mha2mla.conversion.cache_plan import CacheSizes
from mha2mla.conversion.config import CalibrationText, OutputOptions
from mha2mla.conversion.presets import preset_classes


def main(argv: list[str]) -> None:
    presets = preset_classes()
    options = [CacheSizes, CalibrationText, OutputOptions, *presets.values()]
    parser = HfArgumentParser(
        options,
        prog="mha2mla convert",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        conflict_handler="resolve",  # presets may share an option
    )
    parser.add_argument("source", help="Local folder, .gguf file, or name on the Hub.")
    parser.add_argument("output", help="Folder to write.")
    parser.add_argument("--revision", help="Branch, tag or commit of a source on the Hub.")
    parser.add_argument("--gguf-file", help="Name of a GGUF file in the source.")
    parser.add_argument("--preset", choices=presets, help="How the MLA weights are made; calibrated is the default.")
    # What is not given is left out, so that options of another preset than the chosen one are seen.
    parser.set_defaults(**{field.name: None for option in options for field in fields(option)})
    args = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    source, output, revision, gguf_file = (args.pop(k, None) for k in ("source", "output", "revision", "gguf_file"))
    convert(source, output, ConversionConfig.from_dict(args), revision=revision, gguf_file=gguf_file)
