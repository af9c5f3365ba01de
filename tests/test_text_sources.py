"""One reader of text for calibration, training and evaluation: what a name means, and errors that say where."""

import gzip
import json

import pytest
from conftest import pico_tokenizer

from mha2mla.common.text import load_blocks, mix_pieces
from mha2mla.common.text_sources import TextSource, check_source, find_sources
from mha2mla.training import DataArguments
from mha2mla.training.data import load_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(tmp_path):
    pico_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write_lines(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(10, 30)]
CHATS = [
    {"messages": [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": " w90"}]}
    for i in range(10, 30)
]


def test_a_column_of_chats_is_found_and_chats_stay_whole(tokenizer, tmp_path):
    data = write_lines(tmp_path / "chats.jsonl", CHATS)
    assert check_source(*find_sources(data), pico_tokenizer()) == "messages"
    blocks = load_blocks(tokenizer, data, 10, 3)  # a block is a chat: nothing closes it but its template
    assert sorted(blocks.tolist())[0][1:] == [sorted(blocks.tolist())[0][0] + 1, 90]
    assert all(second == first + 1 and last == 90 for first, second, last in blocks.tolist())
    rows, _ = load_rows(DataArguments(data=data, length=3), pico_tokenizer(), seed=0)
    assert {tuple(row["input_ids"]) for row in rows} >= {tuple(block) for block in blocks.tolist()}


def test_a_recipe_mixes_calibration_text_by_weight(tmp_path):
    for name, word in (("a", "w10"), ("b", "w20")):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": word}] * 1000)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(f"- {{data: {tmp_path}/a.jsonl, weight: 3}}\n- {{data: {tmp_path}/b.jsonl, weight: 1}}\n")
    pieces = list(mix_pieces(find_sources(str(recipe)), pico_tokenizer(), 0, 128))
    assert 0.70 < pieces.count("w10") / len(pieces) < 0.80 and len(pieces) > 1000
    assert pieces == list(mix_pieces(find_sources(str(recipe)), pico_tokenizer(), 0, 128))
    in_order = list(mix_pieces(find_sources(str(recipe)), pico_tokenizer(), None, 128))
    assert in_order == ["w10"] * 1000 + ["w20"] * 1000


def test_rows_without_text_are_passed_over(tokenizer, tmp_path):
    data = write_lines(tmp_path / "holes.jsonl", [{"text": None}, {"other": 1}, {"text": ""}, *GOOD])
    assert load_blocks(tokenizer, data, 8, 8, seed=None).flatten().tolist()[:4] == [10, 11, 12, 2]
    rows, _ = load_rows(DataArguments(data=data, length=4), pico_tokenizer(), seed=0)
    assert len(rows) == len(GOOD)


@pytest.mark.parametrize("reader", ["calibration", "training"])
@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("a.jsonl", [*GOOD, {"text": 5}], r"a\.jsonl:21: column 'text' holds neither text nor messages, but 5\."),
        ("b.jsonl", [GOOD[0], '{"text": "w\n', GOOD[1]], r"b\.jsonl:2 is not JSON: Invalid control character"),
        ("c.jsonl", [GOOD[0], "\n", "[1, 2]\n"], r"c\.jsonl:3 is no JSON object: \[1, 2\]\."),
        ("d.jsonl", [{"id": 1}], r"d\.jsonl has no column 'text'; it has id\. Set --column"),
        ("e.jsonl", [{"text": None}] * 3, r"e\.jsonl: column 'text' is empty in the first 3 rows\."),
        ("f.jsonl", [{"text": ["w4"]}], r"f\.jsonl:1: column 'text' holds neither text nor messages, but \['w4'\]"),
        ("g.jsonl", [], r"g\.jsonl: the file is there, but it is empty\."),
        ("h.jsonl", ["\n\n"], r"h\.jsonl.*(empty|cannot be read as json)"),
        ("i.parquet", ["no parquet\n"], r"i\.parquet cannot be read as text|i\.parquet cannot be read as parquet: "),
        ("j.csv", ["text\n"], r"j\.csv: files of text must end in \.txt, \.jsonl, \.json, \.parquet"),
        ("k.yaml", ["- {data: a/b, weight: .nan}\n"], r"k\.yaml: source 1: a/b: weight=nan must be a number above 0"),
        ("l.yaml", ["- {data: 7}\n"], r"l\.yaml: source 1: 7: data=7 must be a string"),
        ("m.yaml", ["- data: a\n  - b\n"], r"m\.yaml:2 is not YAML: "),
    ],
)
def test_errors_say_where(reader, name, rows, message, tokenizer, tmp_path):
    data = write_lines(tmp_path / name, rows)
    with pytest.raises(ValueError, match=message):
        if reader == "calibration":
            load_blocks(tokenizer, data, 1000, 8)
        else:
            load_rows(DataArguments(data=data, length=8), pico_tokenizer(), seed=0)


def test_a_truncated_file_is_told(tokenizer, tmp_path):
    content = gzip.compress("".join(json.dumps({"text": f"w{i} " * 50}) + "\n" for i in range(10, 90)).encode())
    (tmp_path / "half.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.jsonl\.gz cannot be read after line \d+ .*Is it complete\?"):
        load_blocks(tokenizer, str(tmp_path / "half.jsonl.gz"), 1000, 8)


def test_what_a_name_means(tmp_path):
    assert find_sources("owner/name") == [TextSource("owner/name")]
    assert find_sources("owner/name", "body", "en", "test") == [TextSource("owner/name", "en", "test", "body")]
    assert len(find_sources("paper")) == 5
    for name in ("name", "a/b/c", "../texts", "/nowhere/texts", "owner/.name"):
        with pytest.raises(ValueError, match="no name on the Hub, which has the form OWNER/NAME"):
            find_sources(name)
    with pytest.raises(ValueError, match=r"no-such-\*\.txt does not exist"):
        find_sources(str(tmp_path / "no-such-*.txt"))[0].files()
