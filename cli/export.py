"""Write a converted model as a stock DeepSeek checkpoint (transformers, vLLM, SGLang) or a file for llama.cpp.

mha2mla export llama-mla llama-deepseek --pad 512
vllm serve llama-deepseek

mha2mla export llama-mla llama-mla.gguf --format gguf --dtype q8_0
mha2mla export llama-deepseek llama-mla-again --format mla-llama
"""

from dataclasses import dataclass, field

from mha2mla.conversion.export import ExportConfig

from .parsing import Positionals, parse

POSITIONALS: Positionals = {
    "model": dict(help="Folder or name on the Hub of a converted model, recovered or not."),
    "output": dict(help="Folder to write; for gguf, the file."),
}


@dataclass
class SourceArguments:
    """Which of a repository's models."""

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the Hub."})


def main(argv: list[str]) -> None:
    options, source, given = parse(
        argv, "mha2mla export", ExportConfig, SourceArguments, description=__doc__, positionals=POSITIONALS
    )

    from mha2mla.conversion.export import export

    export(given.model, given.output, options, revision=source.revision)
