"""A metric module for `evaluate.load(path)`: perplexity and bits per byte from the log-likelihoods of tokens.

With the `Trainer`, `preprocess_logits_for_metrics` keeps one number a token instead of the whole vocabulary:

    metric = evaluate.load(metric_token_perplexity.__file__)
    trainer = Trainer(
        ...,
        preprocess_logits_for_metrics=token_log_likelihoods,
        compute_metrics=lambda p: metric.compute(predictions=p.predictions, references=p.label_ids),
    )
"""

import datasets
import evaluate

from mha2mla.evaluation.measures.perplexity import Perplexity

IGNORED = -100

KWARGS = """
Args:
    predictions: Log-likelihoods in nats, [sequences, tokens]; entry t is that of the label at t, and what stands at 0
        does not count, since nothing predicts the first token.
    references: Labels, [sequences, tokens]; -100 where a token does not count.
    num_bytes (`int`, *optional*): Length of the text in bytes (UTF-8), for bits per byte.

Returns:
    `loss`, `loss_stderr` (over sequences), `perplexity`, `stderr`, `num_tokens`, and `bits_per_byte` if `num_bytes`
    is given.
"""


class TokenPerplexity(evaluate.Metric):
    def _info(self):
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="Perplexity of the tokens that count.",
            citation="",
            inputs_description=KWARGS,
            features=datasets.Features({"predictions": row, "references": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, predictions, references, num_bytes=None):
        sums, counts = [], []
        for values, labels in zip(predictions, references, strict=True):
            kept = [value for value, label in zip(values[1:], labels[1:], strict=True) if label != IGNORED]
            if kept:
                sums.append(-sum(kept))
                counts.append(len(kept))
        if not counts:
            raise ValueError("No label counts: all are -100.")
        result = Perplexity.from_sums(sums, counts, num_bytes)
        numbers = dict(
            loss=result.loss,
            loss_stderr=result.loss_stderr,
            perplexity=result.perplexity,
            stderr=result.stderr,
            num_tokens=result.num_tokens,
        )
        return numbers | ({"bits_per_byte": result.bits_per_byte} if num_bytes else {})
