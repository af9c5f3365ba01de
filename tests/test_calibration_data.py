"""Blocks of calibration text: where they come from, and how large they are."""

import json

import pytest
from conftest import pico_tokenizer

from mha2mla.common.text import PIECE_LENGTH, load_blocks
from mha2mla.conversion import ConversionConfig

NUM_DOCUMENTS = 40  # each of one word, many times over


@pytest.fixture
def folder_and_file(tmp_path):
    pico_tokenizer().save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "documents.jsonl"
    # 4 characters a word and its space: a document is some four pieces long.
    lines = [json.dumps({"text": " ".join([f"w{10 + i}"] * (4 * PIECE_LENGTH))}) for i in range(NUM_DOCUMENTS)]
    file.write_text("\n".join(lines) + "\n")
    return tmp_path / "tokenizer", str(file)


def test_a_block_holds_pieces_of_several_documents(folder_and_file):
    blocks = load_blocks(*folder_and_file, 4, 4 * PIECE_LENGTH)
    assert blocks.shape == (4, 4 * PIECE_LENGTH)
    assert all(len(set(block.tolist())) >= 4 for block in blocks)
    assert not blocks.equal(load_blocks(*folder_and_file, 4, 4 * PIECE_LENGTH, seed=1))


def test_without_a_seed_text_keeps_its_order(folder_and_file):
    blocks = load_blocks(*folder_and_file, 3, 2 * PIECE_LENGTH, seed=None)
    end = pico_tokenizer().eos_token_id
    words = [token for token in blocks.flatten().tolist() if token != end]
    assert words == sorted(words) and len(set(words)) <= 2


def test_too_little_text_is_said(folder_and_file):
    with pytest.raises(ValueError, match="--samples"):
        load_blocks(*folder_and_file, 10_000, 512)


@pytest.mark.parametrize(
    ("given", "samples", "length"),
    [
        ({}, 64, 1024),
        (dict(device="cuda:0"), 32, 2048),
        (dict(length=4096, device="cuda"), 16, 4096),
        (dict(samples=12), 12, 1024),
        (dict(length=10**6), 1, 10**6),
    ],
)
def test_blocks_by_default_hold_as_many_tokens_and_are_longer_on_a_gpu(given, samples, length):
    config = ConversionConfig(cache_ratio=0.3, data="texts.jsonl", **given)
    assert (config.samples, config.length) == (samples, length)
    assert ConversionConfig.from_dict(config.to_dict()) == config
