"""Documents to tokens, to rows of one length without padding, to batches that keep documents apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that does not count


def is_chat(value: Any) -> bool:
    """Whether a document is a list of messages rather than text."""
    return isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)


def tokenize(documents: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """
    Token ids of documents: text with the tokenizer's own special tokens and an end-of-sequence token behind it; a chat
    as the tokenizer's template writes it, which brings its own. Empty documents are left out.
    """
    if documents and is_chat(documents[0]):
        encoded = tokenizer.apply_chat_template(list(documents), tokenize=True, return_dict=True)["input_ids"]
        return [ids for ids in encoded if ids]
    encoded = tokenizer([text for text in documents if text])["input_ids"] if any(documents) else []
    end = tokenizer.eos_token_id
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoded]


def cut(pieces: Sequence[int], most: int) -> list[int]:
    """Sizes of pieces of at most so many tokens that the given pieces are cut into."""
    return [min(most, piece - begin) for piece in pieces for begin in range(0, piece, most)]


def pack_documents(
    documents: Sequence[Sequence[int]], length: int, short_length: int | None = None
) -> dict[str, list[list[int]]]:
    """
    Documents end to end, cut into rows. A document that reaches over a row's end is cut there, and its two pieces are
    documents of their own; what does not fill the last row is dropped.

    Args:
        documents (`Sequence`): Token ids of each document.
        length (`int`): Tokens of a row.
        short_length (`int`, *optional*): In every second row documents are cut into pieces of so many tokens.

    Returns:
        `input_ids`, [rows][length], and `lengths`, [rows][pieces]: sizes of the pieces of each row, in order.
    """
    input_ids: list[list[int]] = []
    lengths: list[list[int]] = []
    row: list[int] = []
    pieces: list[int] = []
    for document in documents:
        begin = 0
        while begin < len(document):
            piece = document[begin : begin + length - len(row)]
            row.extend(piece)
            pieces.append(len(piece))
            begin += len(piece)
            if len(row) == length:
                input_ids.append(row)
                lengths.append(pieces)
                row, pieces = [], []
    if short_length is not None:
        lengths[::2] = [cut(pieces, short_length) for pieces in lengths[::2]]
    return {"input_ids": input_ids, "lengths": lengths}


@dataclass(frozen=True)
class PackedCollator:
    """
    Rows of [`pack_documents`] as a batch of `input_ids`, `position_ids` and `labels`, each [B, T].

    Positions start again with each document: transformers' masks keep documents apart by them, given that there is
    neither an attention mask nor a cache. Labels are the tokens themselves, end-of-sequence tokens included. The first
    token of a document counts for nothing: what stands before it is another document, which must not predict it.

    Attributes:
        flatten (`bool`): Put all rows behind one another, [1, B * T]. Flash attention looks for documents in a
            batch of one row only; for the other implementations a long row would cost a large mask.
    """

    flatten: bool = False

    def __call__(self, rows: Sequence[dict[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        input_ids = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows])
        position_ids = torch.stack([torch.cat([torch.arange(int(n)) for n in row["lengths"]]) for row in rows])
        labels = input_ids.masked_fill(position_ids == 0, IGNORED)
        batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: tensor.view(1, -1) for name, tensor in batch.items()} if self.flatten else batch
