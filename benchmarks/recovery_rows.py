"""Rows of tokens that recovery.py trains and measures on: packed once, into a file."""

import argparse
import gzip
import json
from collections.abc import Iterator
from glob import glob
from itertools import chain
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from mha2mla.training import pack_documents
from mha2mla.training.lookback import add_lookback
from mha2mla.training.packing import tokenize


class TokenRows(Dataset):
    """Packed rows of a file that `tokens` wrote, in an order drawn from a seed."""

    def __init__(self, path: Path, seed: int | None = None):
        with np.load(path) as file:
            self.input_ids, flat, counts = file["input_ids"], file["lengths"], file["counts"]
        self.lengths = np.split(flat, np.cumsum(counts)[:-1])
        size = len(self.input_ids)
        self.order = np.arange(size) if seed is None else np.random.default_rng(seed).permutation(size)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self.order[index]
        return {"input_ids": self.input_ids[row].astype(np.int64), "lengths": self.lengths[row]}


def iterate_documents(pattern: str) -> Iterator[str]:
    for path in sorted(glob(pattern)):
        with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
            for line in file:
                yield json.loads(line)["text"]


def write_tokens(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    assert len(tokenizer) <= 2**16, "uint16 holds no larger vocabulary"
    documents: list[list[int]] = []
    batch: list[str] = []
    for text in chain.from_iterable(map(iterate_documents, args.data)):
        batch.append(text)
        if len(batch) == 1000:
            documents += tokenize(batch, tokenizer)
            batch = []
    documents += tokenize(batch, tokenizer)
    packed = pack_documents(documents, args.length, args.short_lengths)
    add_lookback(packed, args.lookback_share, seed=0)
    counts = [len(lengths) for lengths in packed["lengths"]]
    np.savez(
        args.output,
        input_ids=np.array(packed["input_ids"], dtype=np.uint16),
        lengths=np.concatenate([np.array(lengths, dtype=np.int32) for lengths in packed["lengths"]]),
        counts=np.array(counts, dtype=np.int32),
    )
    print(f"{len(counts):,} rows of {args.length} tokens, {len(counts) * args.length:,} in all, in {args.output}")
