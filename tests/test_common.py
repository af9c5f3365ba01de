"""What packages share: small files, records, names of checkpoints, and errors in one sentence."""

import gzip
import json
from unittest.mock import Mock

import pytest
from conftest import pico_tokenizer
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mha2mla.common import hub
from mha2mla.common.files import read_json_lines, read_json_object, read_yaml
from mha2mla.common.hub import is_hub_name, on_hub
from mha2mla.common.loading import (
    copy_notices,
    distinct_names,
    find_file,
    head_dim,
    load_config,
    load_model,
    load_tokenizer,
)
from mha2mla.common.records import RECORD_NAME, copy_record, read_record, recorded_preset
from mha2mla.common.text_sources import TextSource, load_source
from mha2mla.conversion.source import local_checkpoint
from pico import SOURCES, make_mla, make_source


@pytest.mark.parametrize(
    "content, message",
    [
        ("a: [", r"file:1 is not YAML: "),
        ("a: 1\nb: c: d\n", r"file:2 is not YAML: mapping values are not allowed here\."),
        (b"\xff\xfe", r"file is not UTF-8 text: byte 0"),
    ],
)
def test_yaml_errors_say_where(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "file")


def test_json_errors_say_where(tmp_path):
    for content, message in (('{"a": 1,\n}', r"file:2 is not JSON: "), ("[1]", "must hold a JSON object, got list")):
        (tmp_path / "file").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json_object(tmp_path / "file")
    with pytest.raises(ValueError, match="There is no file"):
        read_json_object(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"There is no file .*/flie\.json\. Did you mean .*/file\.json\?"):
        (tmp_path / "file.json").touch()
        read_json_object(tmp_path / "flie.json")
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n\n[2]\n{"a\n'))
    lines = read_json_lines(tmp_path / "lines.jsonl.gz")
    assert [next(lines), next(lines)] == [(1, {"a": 1}), (3, [2])]
    with pytest.raises(ValueError, match=r"lines\.jsonl\.gz:4 is not JSON"):
        next(lines)


def test_records(tmp_path):
    with pytest.raises(ValueError, match=r"has no conversion\.json: give a folder that `mha2mla convert` wrote"):
        read_record(tmp_path)
    assert recorded_preset(tmp_path) is None and recorded_preset("owner/model") is None
    (tmp_path / RECORD_NAME).write_text(json.dumps({"options": {"preset": "paper"}}))
    assert recorded_preset(tmp_path) == "paper" and read_record(tmp_path)["options"] == {"preset": "paper"}
    (tmp_path / "LICENSE.txt").write_text("free")
    (tmp_path / "USE_POLICY.md").write_text("good")
    (tmp_path / "out").mkdir()
    for copy in (copy_record, copy_notices):
        copy(str(tmp_path), tmp_path / "out")
        copy("owner/model", tmp_path / "out")  # which cannot be reached, and is not needed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {RECORD_NAME, "LICENSE.txt", "USE_POLICY.md"}
    (tmp_path / RECORD_NAME).write_text("{}")
    with pytest.raises(ValueError, match="has no `options` with a `preset`"):
        recorded_preset(tmp_path)


def test_what_a_hub_name_is(tmp_path, monkeypatch):
    assert all(map(is_hub_name, ("owner/name", "meta-llama/Llama-2-7b-hf", "a/b.c_d-e")))
    names = ("name", "./name", "../name", "/owner/name", "a/b/c", "owner/", "", "owner/na me", "~/model", "a//b")
    assert not any(map(is_hub_name, names))
    monkeypatch.chdir(tmp_path)
    assert on_hub("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not on_hub("owner/name")  # the folder goes before


class ConnectTimeout(Exception):
    """As of the library that the Hub is talked to through."""

    __module__ = "httpx"


def refused(error, monkeypatch):
    """Let the Hub answer with an error; gives the list of what it was asked for."""
    asked = []

    def answer(url, timeout):
        asked.append(url)
        raise error

    monkeypatch.setattr(hub, "get_hf_file_metadata", answer)
    monkeypatch.setattr(hub, "PAUSES", (0, 0))
    return asked


def of_hub(kind):
    return kind("long", response=Mock(status_code=404, headers={}))


@pytest.mark.parametrize(
    "error, tries, message",
    [
        (OfflineModeIsEnabled(), 1, r"o/n would have to be downloaded, and HF_HUB_OFFLINE is set\. Unset it"),
        (
            of_hub(GatedRepoError),
            1,
            r"o/n is gated\. Ask for access at https://huggingface\.co/o/n, .*`hf auth login`",
        ),
        (of_hub(RepositoryNotFoundError), 1, r"o/n is not on the Hub, or private\. .*`hf auth login`"),
        (of_hub(RevisionNotFoundError), 1, r"o/n has no revision 'v2' on the Hub\."),
        (ConnectTimeout("slow"), 3, r"o/n cannot be downloaded: the Hub is out of reach \(slow\)\. Check"),
    ],
)
def test_what_the_hub_refuses_is_said_at_once(error, tries, message, monkeypatch):
    asked = refused(error, monkeypatch)
    with pytest.raises(ValueError, match=f"teacher: {message}"):
        load_config("o/n", "teacher", revision="v2")
    assert asked == ["https://huggingface.co/o/n/resolve/v2/config.json"] * tries
    for gguf_file in (None, "n.gguf"):
        with pytest.raises(ValueError, match=f"source: {message}"), local_checkpoint("o/n", "v2", gguf_file):
            pass
    assert asked[-1].endswith("/n.gguf")
    assert find_file("o/n", "conversion.json", "v2") is None
    if "revision" not in message:
        with pytest.raises(ValueError, match=message.replace("co/o/n", "co/datasets/o/n")):
            load_source(TextSource("o/n"), streaming=True)


def test_a_network_that_fails_now_and_then_is_asked_again(monkeypatch):
    monkeypatch.setattr(hub, "PAUSES", (0, 0))
    answers = Mock(side_effect=[ConnectTimeout("slow"), ConnectTimeout("slow"), None])
    monkeypatch.setattr(hub, "get_hf_file_metadata", answers)
    assert hub.hub_trouble("o/n", "config.json") is None and answers.call_count == 3


def test_what_the_hub_has_is_left_to_libraries(monkeypatch):
    refused(of_hub(RemoteEntryNotFoundError), monkeypatch)  # no such file in it, or an error of the server
    assert hub.hub_trouble("o/n", "config.json") is None
    asked = refused(ConnectTimeout("slow"), monkeypatch)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    hub.check_on_hub("o/n", "model")
    assert asked == []  # what was downloaded before needs no network
    refused(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        hub.hub_trouble("o/n", "config.json")


def test_loading_errors_are_one_sentence(tmp_path):
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(ValueError, match=r"teacher: there is no folder 'nowhere', and a name on the Hub has the"):
            load("nowhere", "teacher")
    with pytest.raises(ValueError, match=r"source: .* has no config\.json: it is not a transformers checkpoint\."):
        load_config(str(tmp_path), "source")
    make_source().save_pretrained(tmp_path)
    pico_tokenizer().save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).hidden_size == load_model(str(tmp_path), dtype="bfloat16").config.hidden_size
    assert load_tokenizer(str(tmp_path))("w5")["input_ids"] == [5]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
    with pytest.raises(ValueError, match=r"model: the config\.json of .* is not valid \(.*hidden_size.*\)\. Mend"):
        load_config(str(tmp_path))


def test_one_head_dim_for_every_source():
    dims = {kind: head_dim(config) for kind, config in SOURCES.items()}
    assert dims == {kind: 16 if kind in ("head-dim", "qwen3") else 12 for kind in SOURCES}


def test_a_model_with_frequencies_that_there_are_not_is_refused(tmp_path):
    model = make_mla()
    model.model.layers[1].self_attn.rope_frequencies[0, 1] = 6
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.rope_frequencies of .* has 6, .* 0 to 5"):
        load_model(str(tmp_path))


def test_names_tell_checkpoints_apart():
    names = distinct_names(["run/a/merged", "run/b/merged", "source", "me/source", "me/other"])
    assert list(names.values()) == ["a/merged", "b/merged", "source", "me/source", "other"]
