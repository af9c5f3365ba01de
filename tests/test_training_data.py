"""Rows hold every token once, keep documents apart, and come from the sources by weight."""

import gzip
import json
import random

import pytest
import torch
from conftest import pico_tokenizer
from datasets import load_dataset

from mha2mla.common.text_sources import RECIPES, find_sources, load_source, read_recipe
from mha2mla.training import DataArguments, collate_packed, data, pack_documents
from mha2mla.training.data import load_rows, reading_rows
from mha2mla.training.packing import tokenize
from pico import LAYOUTS, make_mla, make_source, tokens


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # After a stream of parquet, datasets waits ten seconds for pyarrow's threads.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def write_texts(path, texts, column="text"):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps({column: text}) + "\n" for text in texts)
    return str(path)


def words(first, count):
    return " ".join(f"w{i}" for i in range(first, first + count))


@pytest.mark.parametrize("length", [2, 3, 7, 16])
def test_packing_against_brute_force(length):
    generator = random.Random(length)
    documents = [[generator.randrange(9) for _ in range(generator.randrange(20))] for _ in range(40)]
    packed = pack_documents(documents, length)
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    count = len(stream) // length
    assert packed["input_ids"] == [[t for t, _ in stream[i * length : (i + 1) * length]] for i in range(count)]
    for row, lengths in enumerate(packed["lengths"]):
        owners = [number for _, number in stream[row * length : (row + 1) * length]]
        assert lengths == [owners.count(number) for number in dict.fromkeys(owners)]


def test_rows_are_cut_to_short_documents_in_turn():
    documents = [list(range(n)) for n in (9, 1, 30, 5, 3)]
    whole, short, shorter = (pack_documents(documents, 12, sizes) for sizes in ((), (4,), (4, 6)))
    assert short["input_ids"] == shorter["input_ids"] == whole["input_ids"]
    assert whole["lengths"] == [[9, 1, 2], [12], [12], [4, 5, 3]]
    assert short["lengths"] == [[4, 4, 1, 1, 2], [12], [4, 4, 4], [4, 5, 3]]
    assert shorter["lengths"] == [[4, 4, 1, 1, 2], [6, 6], [12], [4, 4, 1, 3]]
    later = pack_documents(documents, 12, (4, 6), first_row=5)
    assert later["lengths"] == [[9, 1, 2], [4, 4, 4], [6, 6], [4, 5, 3]]


def test_turns_come_evenly_where_a_batch_has_one_row(tmp_path, monkeypatch):
    """Counted from its first row in every batch, all of them would be cut to 2."""
    monkeypatch.setattr(data, "DOCUMENTS_PER_BATCH", 2)
    monkeypatch.setattr(data, "ROWS_PER_BATCH", 1)
    path = write_texts(tmp_path / "a.jsonl", [words(4 + i % 80, 9) for i in range(800)])
    arguments = DataArguments(path, length=20, short_lengths=[2, 5])
    rows, _ = load_rows(arguments, pico_tokenizer(), seed=0)
    longest = [max(lengths) for lengths in rows["lengths"]]
    assert len(rows) == 400 and all(100 < longest.count(size) < 170 for size in (2, 5, 10))


@pytest.mark.parametrize("streaming", [False, True])
def test_short_documents_lose_next_to_nothing_behind_the_last_row_of_a_batch(streaming, tmp_path):
    write_texts(tmp_path / "texts.jsonl", ["w5 w6 w7"] * 20_000)  # four tokens each, with the end
    rows, _ = load_rows(
        DataArguments(data=str(tmp_path / "texts.jsonl"), length=4096, streaming=streaming), pico_tokenizer(), seed=0
    )
    assert 0.95 * 80_000 < sum(len(row["input_ids"]) for row in rows) <= 80_000  # of 1,000 at a time it were none


def test_short_lengths_are_for_what_is_trained_on_only(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", [words(0, 8)] * 12)
    arguments = DataArguments(path, eval_data=path, length=6, short_lengths=[2])
    rows, held_out = load_rows(arguments, pico_tokenizer(), seed=0)
    assert sorted(map(max, rows["lengths"])) != sorted(map(max, held_out["lengths"]))
    assert len(rows) == 18 and sum(max(lengths) <= 2 for lengths in rows["lengths"]) == 9
    assert all(max(lengths) > 2 for lengths in held_out["lengths"])
    with pytest.raises(ValueError, match=r"short_lengths=\[2, 7\] must lie between 2 and length=6"):
        DataArguments(path, length=6, short_lengths=[2, 7])
    with pytest.raises(ValueError, match=r"short_lengths=2 must be a list, such as \[2\]"):
        DataArguments(path, length=6, short_lengths=2)


def test_first_token_of_a_document_does_not_count_and_its_eos_does():
    rows = [
        {"input_ids": [5, 6, 2, 7, 2, 8], "lengths": [3, 2, 1]},
        {"input_ids": [9, 2, 2, 9, 9, 2], "lengths": [2, 4]},
    ]
    batch = collate_packed(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    # eos is 2: kept where it ends a document (as it is where pad and eos are one token)
    assert batch["labels"].tolist() == [[-100, 6, 2, -100, 2, -100], [-100, 2, -100, 9, 9, 2]]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "source"])
@torch.compiler.set_stance("force_eager")  # flex attention compiles its masks for half a minute otherwise
def test_no_attention_across_documents(attention, layout):
    model = make_source() if layout == "source" else make_mla(layout)
    model.set_attn_implementation(attention)
    ids = tokens(2, 10).tolist()
    lengths = [[4, 1, 5], [10]]
    batch = collate_packed([{"input_ids": i, "lengths": n} for i, n in zip(ids, lengths, strict=True)])
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, pieces in enumerate(lengths):
            begin = 0
            for piece in pieces:
                alone = model(batch["input_ids"][row : row + 1, begin : begin + piece], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, begin : begin + piece], alone, rtol=1e-4, atol=1e-5)
                begin += piece


def test_text_keeps_the_tokenizers_tokens_and_ends_once():
    tokenizer = pico_tokenizer()
    assert tokenize(["w5 w6", "", "w7 </s>"], tokenizer) == [[5, 6, 2], [7, 2]]
    chat = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": " w7"}]
    assert tokenize([chat], tokenizer) == [[5, 6, 7]]  # what the template writes, no more


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet", "txt"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_every_kind_give_the_same_rows(ending, streaming, tmp_path):
    texts = [words(5 + i, 9) for i in range(8)]
    path = tmp_path / f"texts.{ending}"
    if ending == "txt":
        path.write_text("\n\n".join(texts))
    elif ending == "parquet":
        load_dataset("json", data_files=write_texts(tmp_path / "a.jsonl", texts), split="train").to_parquet(path)
    else:
        write_texts(path, texts)
    arguments = DataArguments(data=str(path), length=12, streaming=streaming, shuffle_buffer=1)
    rows, held_out = load_rows(arguments, pico_tokenizer(), seed=0)
    expected = pack_documents([[*range(5 + i, 14 + i), 2] for i in range(8)], 12)
    assert held_out is None
    got = sorted((row["input_ids"], row["lengths"]) for row in rows)
    assert got == sorted(zip(expected["input_ids"], expected["lengths"], strict=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_chats_go_through_the_template(streaming, tmp_path):
    chats = [
        [{"role": "user", "content": words(5 + i, 2)}, {"role": "assistant", "content": " w90"}] for i in range(4)
    ]
    data = write_texts(tmp_path / "chats.jsonl", chats, column="messages")
    arguments = DataArguments(data=data, column="messages", length=3, streaming=streaming)
    rows, _ = load_rows(arguments, pico_tokenizer(), seed=0)
    assert sorted(row["input_ids"] for row in rows) == [[5 + i, 6 + i, 90] for i in range(4)]


def test_weights_are_shares_of_the_rows(tmp_path):
    entries = []
    for name, first, weight in (("a", 10, 3), ("b", 50, 1)):
        data = write_texts(tmp_path / f"{name}.jsonl", [words(first, 20)] * 100)
        entries.append(f"- {{data: {data}, weight: {weight}}}\n")
    recipe = tmp_path / "mix.yaml"
    recipe.write_text("".join(entries))
    rows, _ = load_rows(DataArguments(data=str(recipe), length=10), pico_tokenizer(), seed=0)
    share = sum(max(row["input_ids"]) < 40 for row in rows) / len(rows)
    assert 0.68 < share < 0.82
    stream, _ = load_rows(DataArguments(data=str(recipe), length=10, streaming=True), pico_tokenizer(), seed=0)
    taken = [max(row["input_ids"]) < 40 for row in stream.take(300)]
    assert 0.68 < sum(taken) / len(taken) < 0.82
    assert all(len({token < 40 for token in row["input_ids"] if token != 2}) == 1 for row in rows)  # no row mixes


def test_held_out_documents_are_trained_on_by_nobody(tmp_path):
    data = write_texts(tmp_path / "texts.jsonl", [words(4 + i, 3) for i in range(80)])
    rows, held_out = load_rows(DataArguments(data=data, length=4, eval_fraction=0.25), pico_tokenizer(), seed=0)
    assert len(held_out) == 20 and len(rows) == 60  # a document is one row here
    assert not {tuple(r["input_ids"]) for r in rows} & {tuple(r["input_ids"]) for r in held_out}


def test_the_papers_recipe_is_ready():
    sources = read_recipe(RECIPES["paper"])
    assert [source.weight for source in sources] == [0.70, 0.15, 0.08, 0.06, 0.01]
    assert sources[0].data == "HuggingFaceTB/smollm-corpus" and sources[0].subset == "fineweb-edu-dedup"


@pytest.mark.parametrize(
    "content, message",
    [
        ("- {data: a/b, weight: 0}", "weight=0 must be a number above 0"),
        ("- {data: a/b, weight: -1}", "weight=-1 must be a number above 0"),
        ("- {data: a/b, wheight: 1}", "source 1 has 'wheight'"),
        ("- {weight: 1}", "source 1 has no `data`"),
        ("data: a/b", "must be a list of sources"),
        ("- [", "is not YAML"),
    ],
)
def test_recipe_errors_name_the_entry(content, message, tmp_path):
    (tmp_path / "mix.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "mix.yaml")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("text.jsonl", lambda text: text + b'{"text": "w', "text.jsonl:21 is not JSON"),
        ("text.jsonl", lambda text: text + '{"text": "é"}'.encode("latin-1"), "text.jsonl:21 is not UTF-8 text"),
        ("text.jsonl", lambda text: text + b'{"body": "w4"}', "text.jsonl cannot be read further: Couldn't cast"),
        ("text.jsonl.gz", lambda text: gzip.compress(text, 1)[:-300], "Is it complete"),
    ],
    ids=["torn", "latin-1", "column", "gzip"],
)
def test_a_stream_that_is_malformed_deep_inside(name, content, message, tmp_path):
    """Beyond what `datasets` reads at a time (10 MB), and so after training has begun."""
    line = json.dumps({"text": "".join(random.Random(0).choices("abcdefgh ", k=2**20))}).encode() + b"\n"
    (tmp_path / name).write_bytes(content(20 * line))
    arguments = DataArguments(data=str(tmp_path / name), streaming=True)
    with pytest.raises(ValueError, match=message), reading_rows(arguments):
        rows = iter(load_source(*find_sources(arguments.data), streaming=True))
        next(rows)
        list(rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_errors_of_ours_while_text_is_read_stay_what_they_are(streaming, tmp_path, monkeypatch):
    def fail(*_):
        raise TypeError("a bug")

    monkeypatch.setattr("mha2mla.training.data.pack_documents", fail)
    arguments = DataArguments(data=write_texts(tmp_path / "text.jsonl", [words(4, 20)]), length=8, streaming=streaming)
    with pytest.raises(TypeError, match="a bug"), reading_rows(arguments):
        load_rows(arguments, pico_tokenizer(), seed=0)


def test_data_errors_name_the_source_and_the_remedy(tmp_path):
    tokenizer = pico_tokenizer()
    texts = write_texts(tmp_path / "texts.jsonl", [words(5, 3)])
    empty = write_texts(tmp_path / "empty.jsonl", [])
    ids = write_texts(tmp_path / "ids.jsonl", ["0f3a"], column="blob_id")
    numbers = write_texts(tmp_path / "numbers.jsonl", [3])
    for arguments, message in (
        (dict(data="papr"), "is no recipe .there are paper."),
        (dict(data=str(tmp_path / "none.jsonl")), "There is no file .*none.jsonl. Check the path"),
        (dict(data=empty), "empty.jsonl: the file is there, but it is empty"),
        (dict(data=ids), "no column 'text'; it has blob_id. Set --column"),
        (dict(data=numbers), "holds neither text nor messages"),
        (dict(data=texts, length=16), "less than one row of length=16"),
        (dict(data=texts, eval_data=ids, length=2), "no column 'text'"),
        (dict(data=texts, eval_fraction=0.01), "is a single document.* Give --eval_data or more documents"),
    ):
        with pytest.raises(ValueError, match=message):
            load_rows(DataArguments(**arguments), tokenizer, seed=0)
    with pytest.raises(ValueError, match="holds messages, and the tokenizer has no chat template"):
        tokenizer.chat_template = None
        chat = write_texts(tmp_path / "chat.jsonl", [[{"role": "user", "content": "w5"}]])
        load_rows(DataArguments(data=chat), tokenizer, seed=0)
    with pytest.raises(ValueError, match="There is no file"):
        find_sources(str(tmp_path / "no.yaml"))
    with pytest.raises(ValueError, match="either eval_data or eval_fraction"):
        DataArguments(data=texts, eval_data=texts, eval_fraction=0.1)
    with pytest.raises(ValueError, match="eval_fraction needs all documents"):
        DataArguments(data=texts, streaming=True, eval_fraction=0.1)


def test_what_is_no_row_or_document_is_refused():
    for wrong in (dict(length=0), dict(length=4, short_lengths=[4, 0])):
        with pytest.raises(ValueError, match="must be at least 1"):
            pack_documents([[1, 2, 3]], **wrong)
    with pytest.raises(ValueError, match="Documents are token ids here, got text"):
        pack_documents(["We go."], 4)
    with pytest.raises(ValueError, match=r"Rows have input_ids and no lengths.*remove_unused_columns=False"):
        collate_packed([{"input_ids": [1, 2, 3]}])
