"""Convert a Llama-type checkpoint to Multi-head Latent Attention.

    mha2mla convert meta-llama/Llama-2-7b-hf llama-2-7b-mla --cache-ratio 0.3125 \\
        --calibration-data HuggingFaceFW/fineweb-edu --calibration-subset sample-10BT
    mha2mla convert ./my-llama ./my-llama-mla --kv-lora-rank 512 --qk-rope-head-dim 16 --rope-selection uniform
"""

from argparse import RawDescriptionHelpFormatter

from transformers import HfArgumentParser

from mha2mla.conversion import ConversionConfig, convert


def main(argv: list[str]) -> None:
    parser = HfArgumentParser(
        ConversionConfig, prog="mha2mla convert", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="Local folder, .gguf file, or name on the Hub.")
    parser.add_argument("output", help="Folder to write.")
    parser.add_argument("--revision", help="Branch, tag or commit of a source on the Hub.")
    parser.add_argument("--gguf-file", help="Name of a GGUF file in the source.")
    args = vars(parser.parse_args(argv))
    source, output, revision, gguf_file = (args.pop(k) for k in ("source", "output", "revision", "gguf_file"))
    convert(source, output, ConversionConfig(**args), revision=revision, gguf_file=gguf_file)
