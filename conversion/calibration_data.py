"""Calibration text as blocks of tokens."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

# Builder of the `datasets` library for each kind of local file.
FILE_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SHUFFLE_BUFFER = 10_000


def iterate_texts(
    data: str, column: str = "text", subset: str | None = None, split: str = "train", seed: int = 0
) -> Iterator[str]:
    """
    Documents of a data set or a local file, streamed, in an order drawn from `seed`.

    Args:
        data (`str`): A name on the Hub, or a .txt (paragraphs are the documents), .jsonl, .json or .parquet file,
            compressed or not.
        column (`str`): The column of the text; .txt files have "text".

    Raises:
        ValueError: If the file or the column is not there.
    """
    path = Path(data)
    suffixes = [s for s in path.suffixes if s in FILE_BUILDERS]
    if path.is_file():
        if not suffixes:
            raise ValueError(f"{data}: calibration files must end in {', '.join(FILE_BUILDERS)} (or with .gz behind).")
        builder = FILE_BUILDERS[suffixes[-1]]
        options = {"sample_by": "paragraph"} if builder == "text" else {}
        dataset = load_dataset(builder, data_files=data, split="train", streaming=True, **options)
    elif suffixes:
        raise ValueError(f"Calibration file {data} does not exist.")
    else:
        dataset = load_dataset(data, subset, split=split, streaming=True)
    for row in dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER):
        if column not in row:
            raise ValueError(f"{data} has no column {column!r}; it has {', '.join(row)}. Set --calibration-column.")
        yield row[column]


def pack_blocks(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, num_blocks: int, length: int
) -> torch.Tensor:
    """
    Tokenise documents one after another, each behind an end-of-sequence token, and cut the stream into blocks.

    A document gives at most one block's worth of tokens, so that few long documents do not crowd out the others.

    Returns:
        Token ids, [num_blocks, length].

    Raises:
        ValueError: If the text is too short.
    """
    needed = num_blocks * length
    stream: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        # A long document is cut before it is tokenised; a token has a character at least, and rarely more than 16.
        tokens = tokenizer(text[: 16 * length], add_special_tokens=False)["input_ids"]
        stream += tokens[: length - len(separator)] + separator
        if len(stream) >= needed:
            return torch.tensor(stream[:needed]).view(num_blocks, length)
    raise ValueError(
        f"The calibration text gives {len(stream) // length} blocks of {length} tokens, {num_blocks} are asked for. "
        "Lower --calibration-samples or --calibration-length, or give more text."
    )


def load_calibration_blocks(
    tokenizer_folder: Path,
    data: str,
    num_blocks: int,
    length: int,
    column: str = "text",
    subset: str | None = None,
    split: str = "train",
    seed: int = 0,
) -> torch.Tensor:
    """Token blocks [num_blocks, length] from [`iterate_texts`], with the tokenizer of the checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return pack_blocks(iterate_texts(data, column, subset, split, seed), tokenizer, num_blocks, length)
