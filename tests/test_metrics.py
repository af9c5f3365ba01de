"""The metric modules load through `evaluate`, also inside the Trainer; lm-evaluation-harness gives our accuracies."""

import json
import math

import pytest
import torch
from conftest import pico_tokenizer
from transformers import Trainer, TrainingArguments

from mha2mla.evaluation import measure_multiple_choice, measure_perplexity
from mha2mla.evaluation.measures.scoring import token_log_likelihoods
from pico import make_mla, tokens


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """The package, with a cache of its own for the modules that it copies."""
    package = pytest.importorskip("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        yield package


def test_trainer_reports_perplexity_through_the_metric(evaluate, tmp_path):
    from mha2mla.evaluation.measures import metric_token_perplexity

    metric = evaluate.load(metric_token_perplexity.__file__, cache_dir=str(tmp_path))
    model, blocks = make_mla(), tokens(5, 12)
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), report_to=[], per_device_eval_batch_size=2, use_cpu=True),
        eval_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        preprocess_logits_for_metrics=token_log_likelihoods,
        compute_metrics=lambda p: metric.compute(predictions=p.predictions, references=p.label_ids, num_bytes=200),
    )
    numbers = trainer.evaluate()
    expected = measure_perplexity(model.eval(), blocks)
    assert numbers["eval_perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert numbers["eval_stderr"] == pytest.approx(expected.stderr, rel=1e-3)
    assert numbers["eval_num_tokens"] == expected.num_tokens == 55
    assert numbers["eval_bits_per_byte"] == pytest.approx(expected.loss * 55 / 200 / 0.693147, rel=1e-4)


def test_labels_that_do_not_count_are_left_out(evaluate, tmp_path):
    from mha2mla.evaluation.measures import metric_token_perplexity

    metric = evaluate.load(metric_token_perplexity.__file__, cache_dir=str(tmp_path))
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[1, 2, -100, 3], [-100, -100, -100, -100]])
    values = token_log_likelihoods(logits, labels)
    result = metric.compute(predictions=values, references=labels)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert result["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert result["num_tokens"] == 2
    with pytest.raises(ValueError, match="No label counts"):
        metric.compute(predictions=values[1:], references=labels[1:])


def test_choice_accuracy_is_ours(evaluate, tmp_path):
    from mha2mla.evaluation.measures import metric_choice_accuracy

    metric = evaluate.load(metric_choice_accuracy.__file__, cache_dir=str(tmp_path))
    result = metric.compute(
        predictions=[[-3.0, -2.0], [-1.0, -4.0, -5.0]], references=[1, 1], num_bytes=[[1, 1], [1, 8, 1]]
    )
    assert (result["accuracy"], result["accuracy_norm"], result["num_items"]) == (0.5, 1.0, 2)


def test_harness_task_gives_our_accuracies(tmp_path):
    pytest.importorskip("lm_eval")
    from mha2mla.evaluation.measures.harness import measure_harness, require_harness_task

    model, tokenizer = make_mla(max_position_embeddings=64), pico_tokenizer()
    words = [" ".join(f"w{i}" for i in row) for row in tokens(30, 4).clamp(min=4).tolist()]
    items = [
        {"id": str(i), "context": words[i], "choices": [words[i + 10], words[i + 20][:5], "w8"], "answer": i % 3}
        for i in range(10)
    ]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": "pico_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}],
    }
    theirs = measure_harness(model, tokenizer, task)
    ours = measure_multiple_choice(model, tokenizer, items)
    assert theirs["accuracy"] == pytest.approx(ours.accuracy)
    assert theirs["stderr"] == pytest.approx(ours.stderr)
    assert theirs["acc_bytes,none"] == pytest.approx(ours.accuracy_norm)
    assert 0 < ours.accuracy < 1  # something to agree on
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    with pytest.raises(ValueError, match=r"pico_choice: the logits are NaN or infinite\. Try --dtype float32"):
        measure_harness(model, tokenizer, task)
    assert not model._forward_hooks
    for name in ("mmlu", "arc_easy", "arc_challenge", "piqa", "hellaswag", "openbookqa", "winogrande"):
        require_harness_task(name)
    with pytest.raises(ValueError, match="lm-evaluation-harness has no task 'no_such_task'"):
        require_harness_task("no_such_task")


def test_harness_tasks_that_generate(tmp_path):
    """As LongBench's do: greedy text after a prompt, judged by the task's own function."""
    pytest.importorskip("lm_eval")
    from mha2mla.evaluation.measures.harness import collect_numbers, measure_harness, require_harness_task

    model, tokenizer = make_mla(max_position_embeddings=64), pico_tokenizer()
    prompts = [" ".join(f"w{i}" for i in row) for row in tokens(4, 6).clamp(min=4).tolist()]
    written = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        written.append(tokenizer.decode(out[0, ids.shape[1] :]).strip())
    file = tmp_path / "items.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": p, "answer": w}) + "\n" for p, w in zip(prompts, written, strict=True))
    )
    task = {
        "task": "pico_generation",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_gen_toks": 5, "until": [], "do_sample": False},
        "process_results": lambda doc, results: {"score": float(results[0].strip()[:8] == doc["answer"][:8])},
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
    }
    assert measure_harness(model, tokenizer, task, batch_size=1)["score,none"] == 1
    for name in ("longbench_qasper", "longbench_single_tasks"):
        require_harness_task(name)
    of_a_tag = {"a": {"score,none": 1.0, "alias": "a"}, "b": {"score,none": 0.5}}
    assert collect_numbers(of_a_tag, "tag") == {"a score,none": 1.0, "b score,none": 0.5}
