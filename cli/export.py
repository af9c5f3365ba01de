"""Write a converted model as a stock DeepSeek checkpoint (transformers, vLLM, SGLang) or a file for llama.cpp.

mha2mla export llama-mla llama-deepseek --pad 512
vllm serve llama-deepseek

mha2mla export llama-mla llama-mla.gguf --format gguf --dtype q8_0
mha2mla export llama-deepseek llama-mla-again --format mla-llama
"""

from argparse import RawDescriptionHelpFormatter

from transformers import HfArgumentParser

from mha2mla.conversion.export import ExportConfig, export


def main(argv: list[str]) -> None:
    parser = HfArgumentParser(
        ExportConfig, prog="mha2mla export", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Folder or name on the Hub of a converted model, recovered or not.")
    parser.add_argument("output", help="Folder to write; for gguf, the file.")
    parser.add_argument("--revision", help="Branch, tag or commit of a model on the Hub.")
    args = vars(parser.parse_args(argv))
    model, output, revision = (args.pop(name) for name in ("model", "output", "revision"))
    export(model, output, ExportConfig(**args), revision=revision)
