"""Rows in which passages return: their form, that each passage really stood before, and that the seed decides."""

import json

import numpy as np
import pytest
from conftest import pico_tokenizer

from mha2mla.training import DataArguments, pack_documents
from mha2mla.training.data import load_rows
from mha2mla.training.lookback import LONGEST, SHORTEST, SPACING, add_lookback, lookback_document


def find_passages(document: list[int], size: int) -> list[int]:
    """By brute force: sizes of the passages that the last `size` tokens consist of, each found word by word before."""
    text, back = document[: len(document) - size], document[len(document) - size :]
    spans = {tuple(text[i : i + n]) for n in range(SHORTEST, LONGEST + 1) for i in range(len(text) - n + 1)}
    ways: list[list[int] | None] = [[]] + [None] * size
    for end in range(1, size + 1):
        for n in range(SHORTEST, min(LONGEST, end) + 1):
            if ways[end - n] is not None and tuple(back[end - n : end]) in spans:
                ways[end] = [*ways[end - n], n]
                break
    assert ways[size] is not None
    return ways[size]


@pytest.mark.parametrize("length", [SPACING, SPACING + 1, 500, 2048])
def test_passages_of_the_text_return_at_its_end(length):
    ids = list(range(length))
    document = lookback_document(ids, np.random.default_rng(0))
    count = length // SPACING
    assert len(document) == length
    sizes = np.random.default_rng(0).integers(SHORTEST, LONGEST + 1, count)
    assert sum(find_passages(document, int(sizes.sum()))) == sizes.sum()
    text = document[: length - sizes.sum()]
    moved = np.array(text) != ids[: len(text)]
    assert 0 < moved.sum() <= sizes[::3].sum()  # the scrambled ones, where they stand first
    assert set(document) <= set(ids)


def test_too_short_a_text_stays_as_it_is():
    ids = list(range(SPACING - 1))
    assert lookback_document(ids, np.random.default_rng(0)) == ids


def rows_of(number: int, length: int) -> dict[str, list[list[int]]]:
    return pack_documents([[*range(i, i + 50)] for i in range(number * length // 50 + 1)], length)


@pytest.mark.parametrize(("share", "changed"), [(0.0, 0), (0.125, 2), (0.5, 8), (1.0, 16)])
def test_a_share_of_the_rows_looks_back(share, changed):
    rows, plain = rows_of(16, 800), rows_of(16, 800)
    add_lookback(rows, share, seed=0, first_row=5)  # 16 rows are whole turns, wherever they begin
    pairs = zip(rows["input_ids"], plain["input_ids"], strict=True)
    assert sum(now != before for now, before in pairs) == changed
    for ids, lengths, old in zip(rows["input_ids"], rows["lengths"], plain["lengths"], strict=True):
        assert len(ids) == sum(lengths) == 800
        assert lengths == old or lengths in ([800], [400] * 2, [200] * 4, [100] * 8)


def test_row_and_seed_decide_what_is_drawn():
    drawn = []
    for seed in (0, 0, 1):
        rows = rows_of(4, 800)
        add_lookback(rows, 1.0, seed)
        drawn.append(rows)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(lengths) for lengths in drawn[0]["lengths"]}) > 1


def test_lookback_is_for_what_is_trained_on_only(tmp_path):
    path = tmp_path / "text.jsonl"
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in draw.integers(5, 60, 600)) for _ in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = pico_tokenizer()
    common = dict(data=str(path), eval_data=str(path), length=800)
    plain, held_out = load_rows(DataArguments(**common), tokenizer, seed=0)
    rows, same = load_rows(DataArguments(**common, lookback_share=0.5), tokenizer, seed=0)
    changed = sum(now != before for now, before in zip(rows, plain, strict=True))
    assert len(rows) // 2 - 1 <= changed <= len(rows) // 2 + 1
    assert held_out["input_ids"][:] == same["input_ids"][:]


def test_a_share_above_one_is_refused():
    with pytest.raises(ValueError, match="lookback_share=2 must lie between 0 and 1"):
        DataArguments(data="text.txt", lookback_share=2)
