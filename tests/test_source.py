"""What of a source on the Hub is downloaded."""

import json
import shutil

import pytest
from huggingface_hub.utils import filter_repo_objects

from mha2mla.conversion import source as source_module
from mha2mla.conversion.source import local_checkpoint

TWICE = ("consolidated.safetensors", "consolidated.safetensors.index.json", "original/model.safetensors")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("weights", [("model.safetensors",), SHARDS])
def test_weights_that_lie_there_twice_are_downloaded_once(weights, tmp_path, monkeypatch):
    repo, cache = tmp_path / "repo", tmp_path / "cache"
    for name in (*weights, *TWICE, "config.json", "tokenizer.json"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text("{}")
    if weights == SHARDS:
        index = {"weight_map": {f"layer{i}": name for i, name in enumerate(weights)}}
        (repo / "model.safetensors.index.json").write_text(json.dumps(index))

    def snapshot_download(name, revision, allow_patterns):
        files = [path.relative_to(repo) for path in repo.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, key=str):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repo / file, cache / file)
        cache.mkdir(exist_ok=True)
        return str(cache)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source_module, "snapshot_download", snapshot_download)
    monkeypatch.setattr(source_module, "check_on_hub", lambda *_, **__: None)
    with local_checkpoint("owner/mistral") as folder:
        index = {"model.safetensors.index.json"} if weights == SHARDS else set()
        assert {path.name for path in folder.rglob("*")} == {*weights, *index, "config.json", "tokenizer.json"}
