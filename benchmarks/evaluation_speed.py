"""Items per second of our multiple-choice measurement and of lm-evaluation-harness: same model, same items, one run.

    python benchmarks/evaluation_speed.py SmolLM2-135M-Instruct SmolLM2-135M-Instruct-MLA --data arc_easy.jsonl

Each tool scores the items twice, in turn, and its better time counts; the largest difference between the
log-likelihoods is printed too. Needs the extra `eval`.
"""

import argparse
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import mha2mla.modeling  # noqa: F401  # registers the family
from mha2mla.evaluation import read_items
from mha2mla.evaluation.measures.scoring import encode_request, score_requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="Folders of checkpoints.")
    parser.add_argument("--data", type=Path, required=True, help="A .jsonl file of multiple-choice items.")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    items = read_items(args.data)[: args.limit]
    pairs = [(item["context"], " " + choice) for item in items for choice in item["choices"]]
    print(f"{len(items)} items, batch size {args.batch_size}, {torch.get_num_threads()} threads, {args.device}")
    for folder in args.models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype).to(args.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)

        def ours(model=model, tokenizer=tokenizer) -> list[float]:
            limit = model.config.max_position_embeddings
            requests = [
                encode_request(tokenizer, i["id"], i["context"], [" " + c for c in i["choices"]], limit) for i in items
            ]
            scores = score_requests(model, requests, args.batch_size, "ours")
            return [score.log_likelihood for scored in scores for score in scored]

        def theirs(harness=harness) -> list[float]:
            instances = [
                Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i, metadata=("", i, 1))
                for i, pair in enumerate(pairs)
            ]
            return [log_likelihood for log_likelihood, _ in harness.loglikelihood(instances, disable_tqdm=True)]

        best: dict[str, float] = {}
        values: dict[str, list[float]] = {}
        for _ in range(2):
            for name, measure in (("mha2mla", ours), ("lm-evaluation-harness", theirs)):
                start = time.perf_counter()
                values[name] = measure()
                best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
        difference = max(abs(a - b) for a, b in zip(*values.values(), strict=True))
        speeds = ", ".join(f"{name} {len(items) / seconds:.2f}" for name, seconds in best.items())
        print(f"{Path(folder).name}: items per second: {speeds}; largest difference {difference:.1e} nats")


if __name__ == "__main__":
    main()
