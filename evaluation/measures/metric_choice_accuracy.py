"""A metric module for `evaluate.load(path)`: accuracy of multiple choice from the log-likelihoods of the choices."""

from dataclasses import asdict

import datasets
import evaluate

from mha2mla.evaluation.measures.multiple_choice import MultipleChoice

KWARGS = """
Args:
    predictions: Log-likelihoods of the choices of each item, in nats.
    references: Index of the right choice of each item.
    num_bytes: Lengths of the choices in bytes (UTF-8), in the form of the predictions.

Returns:
    `accuracy`, `accuracy_norm` (log-likelihoods divided by lengths), their standard errors `stderr` and `stderr_norm`,
    and `num_items`.
"""


class ChoiceAccuracy(evaluate.Metric):
    def _info(self):
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="Accuracy of multiple choice by log-likelihood.",
            citation="",
            inputs_description=KWARGS,
            features=datasets.Features({"predictions": row, "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, num_bytes):
        return asdict(MultipleChoice.from_scores(predictions, num_bytes, references))
