"""Write an HTML page and pictures about a conversion.

    mha2mla report llama-mla-31 llama-mla-19 llama-mla-paper --data wikitext.jsonl --column raw

The page is about the first folder; the others, and the source where it can be found, stand beside it in the main
picture, perplexity against cache size.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mha2mla.common.records import read_record
from mha2mla.common.text import load_blocks
from mha2mla.evaluation import measure_perplexity
from mha2mla.evaluation.report.conversion_page import write_report
from mha2mla.evaluation.report.pictures import ORIGINAL, Measured


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="mha2mla report", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Output of `mha2mla convert`.")
    parser.add_argument("others", type=Path, nargs="*", help="Other conversions to compare it with.")
    parser.add_argument("--data", required=True, help="Text to measure on: a `datasets` name or a text file.")
    parser.add_argument("--column", default="text", help="Column that holds the text.")
    parser.add_argument("--subset", help="Configuration of the data set, if any.")
    parser.add_argument("--split", default="train", help="Split of a data set from the Hub.")
    parser.add_argument("--blocks", type=int, default=16, help="Blocks of text to measure on.")
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a block.")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    records = {folder: read_record(folder) for folder in (args.folder, *args.others)}
    blocks = load_blocks(
        args.folder, args.data, args.blocks, args.length, args.column, args.subset, args.split, seed=None
    )
    first = records[args.folder]
    measured = []
    source = Path(first["source"])
    if source.is_dir():
        measured.append(measure(ORIGINAL, ORIGINAL, first["source_cache_width"], source, blocks, args.device))
    for folder, record in records.items():
        name, preset = folder.name, record["options"]["preset"]
        measured.append(measure(name, preset, record["cache_width"], folder, blocks, args.device))
    name = Path(args.data).name
    page = write_report(args.folder, first, measured, name)
    for m in measured:
        print(f"{m.name}: {m.cache:g} numbers per token and layer, perplexity {m.value:.2f} ± {m.stderr:.2f}")
    print(f"Wrote {page}")


def measure(name: str, preset: str, width: int, folder: Path, blocks: torch.Tensor, device: str) -> Measured:
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    perplexity = measure_perplexity(model, blocks)
    return Measured(name, preset, width, perplexity.perplexity, perplexity.stderr)
