"""lm-evaluation-harness gives an export the same score by its `vllm` backend as by its `hf` backend."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from engines import SERVE_PYTHON, VLLM_ENVIRONMENT
from mha2mla.conversion.export.check import TEXT

TASK = """task: items
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
"""


def test_the_same_score_by_both_backends(exports, tmp_path):
    words = TEXT.split()
    items = [
        {"question": " ".join(words[i : i + 9]), "choices": [words[i + 9], words[2 * i], words[3 * i]], "label": i % 3}
        for i in range(24)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "items.yaml").write_text(TASK.format(items=tmp_path / "items.jsonl"))
    results = {}
    for backend in ("vllm", "hf"):
        result = tmp_path / f"{backend}.json"
        script = Path(__file__).with_name("score.py")
        done = subprocess.run(
            [SERVE_PYTHON, str(script), backend, str(exports.folder), str(tmp_path), str(result)],
            env={**os.environ, **VLLM_ENVIRONMENT},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results[backend] = json.loads(result.read_text())
    assert results["vllm"]["acc"] == results["hf"]["acc"]
    for vllm, hf in zip(results["vllm"]["likelihoods"], results["hf"]["likelihoods"], strict=True):
        assert vllm == pytest.approx(hf, abs=1e-2)
