"""Documents to tokens, to rows of one length without padding, to batches that keep documents apart."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from mha2mla.common.text_sources import is_chat, render_chats

IGNORED = -100  # a label that does not count


def tokenize(documents: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """
    Token ids of documents: text with the tokenizer's own special tokens and an end-of-sequence token behind it; a chat
    as the tokenizer's template writes it, which brings its own. Empty documents are left out.
    """
    if documents and is_chat(documents[0]):
        return [ids for ids in render_chats(documents, tokenizer) if ids]
    encoded = tokenizer([text for text in documents if text])["input_ids"] if any(documents) else []
    end = tokenizer.eos_token_id
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoded]


def cut(pieces: Sequence[int], most: int) -> list[int]:
    """Sizes of pieces of at most so many tokens that the given pieces are cut into."""
    return [min(most, piece - begin) for piece in pieces for begin in range(0, piece, most)]


def pack_documents(
    documents: Sequence[Sequence[int]], length: int, short_lengths: Sequence[int] = (), first_row: int = 0
) -> dict[str, list[list[int]]]:
    """
    Documents end to end, cut into rows. A document that reaches over a row's end is cut there, and its two pieces are
    documents of their own; what does not fill the last row is dropped.

    Args:
        documents (`Sequence`): Token ids of each document.
        length (`int`): Tokens of a row.
        short_lengths (`Sequence[int]`, *optional*): Row by row in turn, documents are cut into pieces of so many
            tokens, and then a row is left whole: with [256], they are cut in every second row.
        first_row (`int`): From which number on rows take their turns.

    Returns:
        `input_ids`, a list of `length` ids for each row, and `lengths`, the sizes of each row's pieces, in order.

    Raises:
        ValueError: If a length is below 1, or a document is text.
    """
    for name, value in (("length", length), *(("short_lengths", size) for size in short_lengths)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if any(isinstance(document, str) for document in documents):
        raise ValueError("Documents are token ids here, got text: give tokenizer(texts)['input_ids'].")
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
    every = len(short_lengths) + 1
    for turn, size in enumerate(short_lengths):
        mine = slice((turn - first_row) % every, None, every)
        lengths[mine] = [cut(pieces, size) for pieces in lengths[mine]]
    return {"input_ids": input_ids, "lengths": lengths}


def collate_packed(rows: Sequence[dict[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """
    Rows of [`pack_documents`] as a batch of `input_ids`, `position_ids` and `labels`, each [B, T].

    Positions start again with each document, which keeps documents apart (see [`packed_inputs`]). Labels are the
    tokens themselves, end-of-sequence tokens included. The first token of a document counts for nothing: what stands
    before it is another document, which must not predict it.

    Raises:
        ValueError: If rows lack the lengths of their documents.
    """
    if "lengths" not in rows[0]:
        raise ValueError(
            f"Rows have {', '.join(rows[0])} and no lengths, by which documents are kept apart: a Trainer drops what "
            "the model does not take. Give TrainingArguments(remove_unused_columns=False)."
        )
    input_ids = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows])
    position_ids = torch.stack([torch.cat([torch.arange(int(n)) for n in row["lengths"]]) for row in rows])
    labels = input_ids.masked_fill(position_ids == 0, IGNORED)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def packed_inputs(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor | None
) -> dict[str, Any]:
    """
    What a model's decoder is called with, so that no token attends to another document.

    transformers' masks follow from positions that start again, given that there is neither an attention mask nor a
    cache. Flash attention has no mask, and for it transformers looks for documents in a batch of one row only; told
    where they begin, it takes any batch as one row of documents.

    Args:
        input_ids, position_ids (`torch.Tensor`): [B, T], as [`collate_packed`] gives them.
    """
    inputs: dict[str, Any] = dict(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    if position_ids is not None and "flash" in model.config._attn_implementation:
        (begins, _), (longest, _) = prepare_fa_kwargs_from_position_ids(position_ids)
        inputs |= dict(cu_seq_lens_q=begins, cu_seq_lens_k=begins)
        inputs |= dict(max_length_q=int(longest), max_length_k=int(longest))  # flash attention 4 refuses tensors
    return inputs
