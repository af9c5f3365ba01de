"""One reader of text for calibration, training and evaluation: what a name means, and errors that say where."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import pico_tokenizer

from mha2mla.common.errors import is_message
from mha2mla.common.text import Piece, load_blocks, mix_pieces, pack_blocks, split_chat
from mha2mla.common.text_sources import TextSource, check_source, find_sources, read_recipe, render_chats
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
    lines = (json.dumps(row) + "\n" if isinstance(row, dict) else row for row in rows)
    path.write_bytes(b"".join(line.encode() if isinstance(line, str) else line for line in lines))
    return str(path)


GOOD = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(10, 30)]
CHATS = [
    {"messages": [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": " w90"}]}
    for i in range(10, 30)
]


@pytest.mark.parametrize("number", ["1e-1", "1E-01", "+1e-1", "0.1", "1.0e-1"])
def test_a_power_of_ten_is_a_number_in_yaml(number, tmp_path):
    (tmp_path / "mix.yaml").write_text(f"- {{data: a/b, weight: {number}, subset: 1234567e8}}\n")
    (source,) = find_sources(str(tmp_path / "mix.yaml"))
    assert (source.weight, source.subset) == (0.1, "1234567e8")


def test_a_column_of_chats_is_found_and_chats_stay_whole(tokenizer, tmp_path):
    data = write_lines(tmp_path / "chats.jsonl", CHATS)
    assert check_source(*find_sources(data), pico_tokenizer()) == ("messages", True)
    blocks = load_blocks(tokenizer, data, 10, 3)  # a block is a chat: nothing closes it but its template
    assert sorted(blocks.tolist())[0][1:] == [sorted(blocks.tolist())[0][0] + 1, 90]
    assert all(second == first + 1 and last == 90 for first, second, last in blocks.tolist())
    rows, _ = load_rows(DataArguments(data=data, length=3), pico_tokenizer(), seed=0)
    assert {tuple(row["input_ids"]) for row in rows} >= {tuple(block) for block in blocks.tolist()}


def test_a_recipe_mixes_prose_and_chats_by_tokens(tokenizer, tmp_path, caplog):
    write_lines(tmp_path / "prose.jsonl", [{"text": "w10"}] * 1000)  # 2 tokens each, a chat has 3
    write_lines(tmp_path / "chats.jsonl", CHATS * 20)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(
        f"- {{data: {tmp_path}/prose.jsonl, weight: 3}}\n- {{data: {tmp_path}/chats.jsonl, weight: 1}}\n"
    )
    blocks = load_blocks(tokenizer, str(recipe), 2, 300)
    prose = (blocks == 10).sum() + (blocks == pico_tokenizer().eos_token_id).sum()
    assert 0.72 < prose / blocks.numel() < 0.78
    assert blocks.equal(load_blocks(tokenizer, str(recipe), 2, 300)) and "no chats" not in caplog.text
    in_order = load_blocks(tokenizer, str(recipe), 2, 1000, seed=None)
    assert in_order.flatten().tolist() == [10, 2] * 1000


def test_a_source_that_is_used_up_ends_a_mixture():
    streams = [iter([Piece([i] * n)] * 4) for i, n in ((1, 2), (2, 4))]
    assert [piece.ids[0] for piece in mix_pieces(streams, [1, 1])] == [1, 2, 1, 1, 2, 1]


def test_a_chat_begins_again_rather_than_being_torn():
    chats = [Piece([i] * n, whole=True) for i, n in ((1, 3), (2, 3), (3, 6), (4, 1))]
    assert pack_blocks(chats, 3, 4).tolist() == [[1, 1, 1, 2], [2, 2, 2, 3], [3, 3, 3, 3]]


def test_a_long_chat_is_cut_in_front_of_the_user():
    system, *turns = ({"role": role, "content": "w" * 8} for role in ("system", *["user", "assistant"] * 3))
    assert split_chat([system, *turns], 20) == [[system, *turns[:4]], [system, *turns[4:]]]
    assert split_chat(turns, 1) == [turns[:2], turns[2:4], turns[4:]]
    assert split_chat(turns, 1000) == [turns]


def test_a_template_that_refuses_a_chat_is_said():
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="template refuses a chat: roles must alternate"):
        render_chats([CHATS[0]["messages"]], tokenizer)


@pytest.mark.parametrize("reader", ["calibration", "training", "stream", "processes"])
def test_a_template_that_cannot_take_a_chat_is_blamed_and_not_the_file(reader, tmp_path):
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ 'w4 ' + m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    parts = [{"role": "user", "content": [{"type": "text", "text": "w5 w6"}]}]
    data = write_lines(tmp_path / "chats.jsonl", 20 * [{"messages": parts}])
    with pytest.raises(ValueError, match="chat template cannot render the content of a chat: can only") as raised:
        if reader == "calibration":
            load_blocks(tmp_path / "tokenizer", data, 2, 8)
        else:
            how = {"stream": {"streaming": True}, "processes": {"num_proc": 2}}.get(reader, {})
            load_rows(DataArguments(data=data, length=8, **how), tokenizer, seed=0)
    assert is_message(raised.value)


def test_the_shipped_mixture_is_read():
    sources = read_recipe(Path(__file__).parents[1] / "docs" / "examples" / "prose-and-chats.yaml")
    assert all(source.builder is None for source in sources)  # names on the Hub
    assert sum(source.weight for source in sources) == 1


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
        ("e.jsonl", [{"text": None}] * 3, r"e\.jsonl: column 'text' is empty in the first 3 rows\. Remove the rows"),
        ("f.jsonl", [{"text": ["w4"]}], r"f\.jsonl:1: column 'text' holds neither text nor messages, but \['w4'\]"),
        ("g.jsonl", [], r"g\.jsonl: the file is there, but it is empty\."),
        ("h.jsonl", ["\n\n"], r"h\.jsonl.*(empty|cannot be read as json)"),
        ("i.parquet", ["no parquet\n"], r"i\.parquet cannot be read as text|i\.parquet cannot be read as parquet: "),
        ("j.csv", ["text\n"], r"j\.csv: files of text must end in \.txt, \.jsonl, \.json, \.parquet"),
        ("k.yaml", ["- {data: a/b, weight: .nan}\n"], r"k\.yaml: source 1: a/b: weight=nan must be a number above 0"),
        ("l.yaml", ["- {data: 7}\n"], r"l\.yaml: source 1: 7: data=7 must be a string"),
        ("m.yaml", ["- data: a\n  - b\n"], r"m\.yaml:2 is not YAML: "),
        ("n.jsonl", [*GOOD, '{"text": "w4 \\ud83d"}\n'], r"n\.jsonl:21 holds \\ud83d, which is half .* Remove it\."),
        ("o.txt", ["w4\n\n", b"caf\xe9\n"], r"o\.txt:3 is not UTF-8 text\. Save the file as UTF-8\."),
        ("p.jsonl", ['{"text": "w4"}\n', b'{"text": "caf\xe9"}\n'], r"p\.jsonl:2 is not UTF-8 text\. Save the file"),
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
    with pytest.raises(ValueError, match=r"There is no file .*no-such-\*\.txt"):
        find_sources(str(tmp_path / "no-such-*.txt"))[0].files()


@pytest.mark.parametrize("name", ["t[1].jsonl", "[a]*?.jsonl"])
def test_a_name_may_hold_the_characters_of_a_pattern(name, tokenizer, tmp_path, monkeypatch):
    """So may the folder that a relative name lies in."""
    (tmp_path / "[x]").mkdir()
    monkeypatch.chdir(tmp_path / "[x]")
    write_lines(tmp_path / "[x]" / name, GOOD)
    write_lines(tmp_path / "[x]" / "t1.jsonl", [{"text": "w90"}] * 50)
    assert load_blocks(tokenizer, name, 8, 8, seed=None).flatten().tolist()[:4] == [10, 11, 12, 2]
    assert len(load_rows(DataArguments(data=name, length=4), pico_tokenizer(), seed=0)[0]) == len(GOOD)
    assert load_blocks(tokenizer, "t[0-9].jsonl", 8, 8, seed=None).flatten().tolist()[:4] == [90, 2, 90, 2]


@pytest.mark.parametrize("option", [{"column": "messages"}, {"subset": "all"}, {"split": "test"}])
def test_options_of_one_source_are_refused_with_a_recipe(option, tmp_path):
    (tmp_path / "mix.yaml").write_text("- data: someone/texts\n  weight: 1\n")
    (name,) = option
    with pytest.raises(ValueError, match=rf"{name}='{option[name]}': each source of the recipe"):
        find_sources(str(tmp_path / "mix.yaml"), **option)
