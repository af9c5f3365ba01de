"""The README.md of a recovered checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from mha2mla.common.cards import CARD_NAME, card_metadata, fine_tuning, table, usage, write_card
from mha2mla.common.loading import keys_values_width
from mha2mla.common.versions import made_with
from mha2mla.modeling import LatentConfigMixin

BODY = """[mha2mla] converted the attention of a Llama-type model to Multi-head Latent Attention (MLA){cache}, and this
checkpoint is what recovery fine-tuning made of it.

{usage}

## Training

{training}"""


@dataclass(frozen=True)
class TrainingRecord:
    """
    What a card says of a run.

    Attributes:
        base (`str`): The converted checkpoint.
        data (`list[str]`): Sources and their shares.
        datasets (`list[str]`): Those on the Hub among them.
        trained (`str`): What was trained, and how much.
        objective (`str`): What was minimised.
        schedule (`str`): Optimiser and learning rate.
        steps, tokens (`int`): Of the whole run, resumed parts included.
        loss (`float`, *optional*): Last training loss in nats per token.
        held_out (`str`, *optional*): Held-out loss and perplexity.
    """

    base: str
    data: list[str]
    datasets: list[str]
    trained: str
    objective: str
    schedule: str
    steps: int
    tokens: int
    loss: float | None
    held_out: str | None

    def rows(self) -> dict[str, str]:
        rows = {
            "Converted checkpoint": Path(self.base).name if Path(self.base).is_dir() else self.base,
            "Data": "; ".join(self.data),
            "Trained": self.trained,
            "Objective": self.objective,
            "Schedule": self.schedule,
            "Steps": f"{self.steps:,}",
            "Tokens": f"{self.tokens:,}",
        }
        if self.loss is not None:
            rows["Training loss at the end"] = f"{self.loss:.4f}"
        if self.held_out is not None:
            rows["Held-out text"] = self.held_out
        return rows | {"Made with": made_with()}


def describe_cache(config: PreTrainedConfig) -> str:
    if not isinstance(config, LatentConfigMixin):
        return ""
    source = keys_values_width(config)
    return (
        f": its cache holds **{config.latent_cache_dim} values per token and layer instead of {source} "
        f"({100 * (config.latent_cache_dim / source - 1):+.2f} %)**"
    )


def write_model_card(
    folder: Path, title: str, record: TrainingRecord, config: PreTrainedConfig, adapter: bool
) -> None:
    """Write `README.md` of a trained model or, with `adapter`, of an adapter."""
    if adapter:
        metadata = card_metadata(record.base, "adapter", record.datasets, ("lora",), "peft")
    else:
        metadata = card_metadata(record.base, "finetune", record.datasets)
    how = usage(title, adapter)
    if not adapter and isinstance(config, LatentConfigMixin):
        how += "\n\n" + fine_tuning(config.attention_projections)
    body = BODY.format(cache=describe_cache(config), usage=how, training=table(record.rows()))
    write_card(folder / CARD_NAME, title, metadata, body)
