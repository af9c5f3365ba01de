"""Text as blocks of tokens, to calibrate and to measure on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .loading import load_tokenizer
from .text_sources import (
    TextSource,
    check_source,
    clean_documents,
    find_sources,
    is_chat,
    load_source,
    reading,
    render_chats,
)

# Short pieces bring many documents into few blocks. At equal cost they convert better than long ones, also where a
# model is measured over longer contexts (docs/dev/conversion.md).
PIECE_LENGTH = 128
SHUFFLE_BUFFER = 40_000  # pieces
CHARACTERS_PER_TOKEN = 4  # roughly, in English


@dataclass(frozen=True)
class Piece:
    """
    Part of a document.

    Attributes:
        ids (`list[int]`): Its tokens.
        whole (`bool`): A chat, which begins where its template begins and must not begin anywhere else.
    """

    ids: list[int]
    whole: bool = False


def tokenize_piece(text: str, tokenizer: PreTrainedTokenizerBase) -> Piece:
    """A piece of plain text, closed by an end-of-sequence token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Piece(tokenizer(text, add_special_tokens=False)["input_ids"] + end)


def split_chat(chat: Sequence[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """
    A chat as several, each of so many characters or a little more: cut in front of messages of the user, so that no
    turn is torn and every answer follows its question. All begin with the chat's system message, if it has one.
    """
    head = [message for message in chat[:1] if message["role"] == "system"]
    parts: list[list[dict[str, Any]]] = [[]]
    characters = 0
    for message in chat[len(head) :]:
        if message["role"] == "user" and characters >= size:
            parts.append([])
            characters = 0
        parts[-1].append(message)
        characters += len(str(message.get("content") or ""))
    return [[*head, *part] for part in parts]


def iterate_pieces(
    source: TextSource,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int | None = 0,
    piece_length: int = PIECE_LENGTH,
) -> Iterator[Piece]:
    """
    Pieces of the documents of a source, streamed, in an order drawn from `seed`, or, with None, in the order they lie
    in.

    Documents are cut into pieces before they are shuffled, so that a block of text comes from anywhere in a document
    and a long document counts by its length.

    Args:
        column (`str`): Where the documents are.
        piece_length (`int`): Tokens of a piece, roughly.

    Raises:
        ValueError: If the source cannot be read; with the line of the file, where it is known.
    """
    dataset = load_source(source, streaming=True)
    size = CHARACTERS_PER_TOKEN * piece_length

    def cut(batch: dict[str, list]) -> dict[str, list]:
        documents = clean_documents(batch[column], source, column)
        if documents and is_chat(documents[0]):
            return {"piece": [part for chat in documents for part in split_chat(chat, size)]}
        return {"piece": [text[i : i + size] for text in documents for i in range(0, len(text), size)]}

    with reading(source):
        columns = list(next(iter(dataset)))
        pieces = dataset.map(cut, batched=True, remove_columns=columns)
        if seed is not None:
            pieces = pieces.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for row in pieces:
            if isinstance(row["piece"], str):
                yield tokenize_piece(row["piece"], tokenizer)
            else:
                yield Piece(render_chats([row["piece"]], tokenizer)[0], whole=True)


def mix_pieces(streams: Sequence[Iterator[Piece]], weights: Sequence[float]) -> Iterator[Piece]:
    """Pieces of several sources until one is used up: the next is of the source whose share of the tokens is furthest
    behind its weight."""
    spent = [0] * len(streams)
    while True:
        behind = min(range(len(streams)), key=lambda i: spent[i] / weights[i])
        piece = next(streams[behind], None)
        if piece is None:
            return
        spent[behind] += len(piece.ids)
        yield piece


def pack_blocks(pieces: Iterable[Piece], num_blocks: int, length: int, num_more: int = 0) -> torch.Tensor:
    """
    Pieces one after another, cut into blocks.

    Plain text that reaches over a block's end goes on in the next block. A chat begins again there, so that no block
    begins in the midst of a turn and an answer always follows its question; what of it is longer than a block is
    dropped.

    Args:
        num_more (`int`): Blocks to add behind the `num_blocks`, as far as the text goes.

    Returns:
        Token ids, [num_blocks to num_blocks + num_more, length].

    Raises:
        ValueError: If the text is too short.
    """
    most = (num_blocks + num_more) * length
    stream: list[int] = []
    for piece in pieces:
        ids = piece.ids
        if piece.whole:
            room = -len(stream) % length
            ids = ids[:length] if len(ids) <= room else ids[:room] + ids[:length]
        stream += ids
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
    checkpoint: of short pieces from all over the text, sources mixed by weight, or, without a seed, of pieces of a
    block's length in the order of the text. Behind them come up to `num_more`, as far as the text goes.

    Raises:
        ValueError: If the text cannot be read, or is too short.
    """
    tokenizer = load_tokenizer(str(tokenizer_folder), "tokenizer", trust_remote_code)
    sources = find_sources(data, column, subset, split)
    columns = [check_source(source, tokenizer) for source in sources]
    piece_length = length if seed is None else PIECE_LENGTH
    streams = [
        iterate_pieces(source, column.name, tokenizer, seed, piece_length)
        for source, column in zip(sources, columns, strict=True)
    ]
    if seed is None:
        return pack_blocks(chain.from_iterable(streams), num_blocks, length, num_more)
    weights = [source.weight for source in sources]
    return pack_blocks(mix_pieces(streams, weights), num_blocks, length, num_more)
