"""Calibration text as blocks of tokens."""

from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

# Builder of the `datasets` library for each kind of local file.
FILE_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Short pieces bring many documents into few blocks. At equal cost they convert better than long ones, also where a
# model is measured over longer contexts (docs/conversion.md).
PIECE_LENGTH = 128
SHUFFLE_BUFFER = 40_000  # pieces
CHARACTERS_PER_TOKEN = 4  # roughly, in English


def iterate_texts(
    data: str,
    column: str = "text",
    subset: str | None = None,
    split: str = "train",
    seed: int | None = 0,
    piece_length: int = PIECE_LENGTH,
) -> Iterator[str]:
    """
    Pieces of the documents of a data set or of local files, streamed, in an order drawn from `seed`, or, with None,
    in the order they lie in.

    Documents are cut into pieces before they are shuffled, so that a block of text comes from anywhere in a document
    and a long document counts by its length.

    Args:
        data (`str`): A name on the Hub, or a .txt (paragraphs are the documents), .jsonl, .json or .parquet file,
            compressed or not; patterns such as `train-*.jsonl.gz` name several.
        column (`str`): The column of the text; .txt files have "text".
        piece_length (`int`): Tokens of a piece, roughly.

    Raises:
        ValueError: If the file or the column is not there.
    """
    from datasets import load_dataset  # slow to import, and what is tokenised already does without it

    suffixes = [s for s in Path(data).suffixes if s in FILE_BUILDERS]
    files = sorted(file for file in glob(data) if Path(file).is_file())
    if files:
        if not suffixes:
            raise ValueError(f"{data}: calibration files must end in {', '.join(FILE_BUILDERS)} (or with .gz behind).")
        builder = FILE_BUILDERS[suffixes[-1]]
        options = {"sample_by": "paragraph"} if builder == "text" else {}
        dataset = load_dataset(builder, data_files=files, split="train", streaming=True, **options)
    elif suffixes:
        raise ValueError(f"Calibration file {data} does not exist.")
    else:
        dataset = load_dataset(data, subset, split=split, streaming=True)
    size = CHARACTERS_PER_TOKEN * piece_length

    def cut(batch: dict[str, list]) -> dict[str, list[str]]:
        if column not in batch:
            raise ValueError(f"{data} has no column {column!r}; it has {', '.join(batch)}. Set --calibration-column.")
        return {"piece": [text[i : i + size] for text in batch[column] for i in range(0, len(text), size)]}

    columns = list(next(iter(dataset)))
    pieces = dataset.map(cut, batched=True, remove_columns=columns)
    if seed is not None:
        pieces = pieces.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    for row in pieces:
        yield row["piece"]


def pack_blocks(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, num_blocks: int, length: int
) -> torch.Tensor:
    """
    Tokenise texts one after another, each with an end-of-sequence token behind it, and cut the stream into blocks.

    Returns:
        Token ids, [num_blocks, length].

    Raises:
        ValueError: If the text is too short.
    """
    needed = num_blocks * length
    stream: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"] + separator
        if len(stream) >= needed:
            return torch.tensor(stream[:needed]).view(num_blocks, length)
    raise ValueError(
        f"The calibration text gives {len(stream) // length} blocks of {length} tokens, {num_blocks} are asked for. "
        "Lower --calibration-samples or --calibration-length, or give more text."
    )


def load_blocks(
    tokenizer_folder: Path,
    data: str,
    num_blocks: int,
    length: int,
    column: str = "text",
    subset: str | None = None,
    split: str = "train",
    seed: int | None = 0,
) -> torch.Tensor:
    """
    Token blocks [num_blocks, length] from [`iterate_texts`], with the tokenizer of the checkpoint: of short pieces
    from all over the text, or, without a seed, of pieces of a block's length in the order of the text.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    piece_length = length if seed is None else PIECE_LENGTH
    return pack_blocks(iterate_texts(data, column, subset, split, seed, piece_length), tokenizer, num_blocks, length)
