"""Text as blocks of tokens, to calibrate and to measure on."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .loading import load_tokenizer
from .text_sources import TextSource, check_source, clean_documents, find_sources, is_chat, load_source, reading

# Short pieces bring many documents into few blocks. At equal cost they convert better than long ones, also where a
# model is measured over longer contexts (docs/conversion.md).
PIECE_LENGTH = 128
SHUFFLE_BUFFER = 40_000  # pieces
CHARACTERS_PER_TOKEN = 4  # roughly, in English


def iterate_pieces(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, seed: int | None = 0, piece_length: int = PIECE_LENGTH
) -> Iterator[str | list[int]]:
    """
    Pieces of the documents of a source, streamed, in an order drawn from `seed`, or, with None, in the order they lie
    in.

    Documents are cut into pieces before they are shuffled, so that a block of text comes from anywhere in a document
    and a long document counts by its length. A chat stays whole: parts of a template mean nothing.

    Args:
        piece_length (`int`): Tokens of a piece, roughly.

    Yields:
        Text, or the token ids of a chat.

    Raises:
        ValueError: If the source cannot be read; with the line of the file, where it is known.
    """
    column = check_source(source, tokenizer)
    dataset = load_source(source, streaming=True)
    size = CHARACTERS_PER_TOKEN * piece_length

    def cut(batch: dict[str, list]) -> dict[str, list[str] | list[list[int]]]:
        documents = clean_documents(batch[column], source, column)
        if documents and is_chat(documents[0]):
            return {"piece": tokenizer.apply_chat_template(documents, tokenize=True, return_dict=True)["input_ids"]}
        return {"piece": [text[i : i + size] for text in documents for i in range(0, len(text), size)]}

    with reading(source):
        columns = list(next(iter(dataset)))
        pieces = dataset.map(cut, batched=True, remove_columns=columns)
        if seed is not None:
            pieces = pieces.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for row in pieces:
            yield row["piece"]


def mix_pieces(
    sources: list[TextSource], tokenizer: PreTrainedTokenizerBase, seed: int | None, piece_length: int
) -> Iterator[str | list[int]]:
    """Pieces of several sources, each drawn with the probability of its weight, until one is used up; without a seed
    one source after another."""
    streams = [iterate_pieces(source, tokenizer, seed, piece_length) for source in sources]
    if seed is None or len(sources) == 1:
        yield from chain.from_iterable(streams)
        return
    weights = np.array([source.weight for source in sources], dtype=float)
    generator = np.random.default_rng(seed)
    while True:
        piece = next(streams[generator.choice(len(streams), p=weights / weights.sum())], None)
        if piece is None:
            return
        yield piece


def pack_blocks(
    texts: Iterable[str | list[int]],
    tokenizer: PreTrainedTokenizerBase,
    num_blocks: int,
    length: int,
    num_more: int = 0,
) -> torch.Tensor:
    """
    Texts one after another, cut into blocks. Each is tokenised and closed by an end-of-sequence token; what is
    tokenised already is taken as it is.

    Args:
        num_more (`int`): Blocks to add behind the `num_blocks`, as far as the text goes.

    Returns:
        Token ids, [num_blocks to num_blocks + num_more, length].

    Raises:
        ValueError: If the text is too short.
    """
    most = (num_blocks + num_more) * length
    stream: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        if isinstance(text, str):
            text = tokenizer(text, add_special_tokens=False)["input_ids"] + separator
        stream += text
        if len(stream) >= most:
            break
    found = min(len(stream), most) // length
    if found >= num_blocks:
        return torch.tensor(stream[: found * length]).view(found, length)
    raise ValueError(
        f"The text gives {found} blocks of {length} tokens, {num_blocks} are asked for. Lower "
        "--samples or --length, or give more text."
    )


def load_blocks(
    tokenizer_folder: str | Path,
    data: str,
    num_blocks: int,
    length: int,
    column: str | None = None,
    subset: str | None = None,
    split: str = "train",
    seed: int | None = 0,
    trust_remote_code: bool = False,
    num_more: int = 0,
) -> torch.Tensor:
    """
    Token blocks [num_blocks, length] of what a user names as text (see [`find_sources`]), with the tokenizer of a
    checkpoint: of short pieces from all over the text, or, without a seed, of pieces of a block's length in the order
    of the text. Behind them come up to `num_more`, as far as the text goes.

    Raises:
        ValueError: If the text cannot be read, or is too short.
    """
    tokenizer = load_tokenizer(str(tokenizer_folder), "tokenizer", trust_remote_code)
    piece_length = length if seed is None else PIECE_LENGTH
    pieces = mix_pieces(find_sources(data, column, subset, split), tokenizer, seed, piece_length)
    return pack_blocks(pieces, tokenizer, num_blocks, length, num_more)
