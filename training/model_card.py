"""The README.md of a recovered checkpoint."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from mha2mla.modeling import MLALlamaConfig

TEMPLATE = """---
{front_matter}
---

# {title}

[mha2mla] converted the attention of a Llama-type model to Multi-head Latent Attention (MLA){cache}, and this
checkpoint is what recovery fine-tuning made of it.

```python
{usage}
```

## Training

| | |
|---|---|
{rows}

[mha2mla]: https://arxiv.org/abs/2502.14837
"""

USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{title}")"""
ADAPTER_USAGE = USAGE.replace("from transformers import AutoModelForCausalLM, AutoTokenizer", "{imports}").replace(
    "AutoModelForCausalLM.", "AutoPeftModelForCausalLM."
)
ADAPTER_IMPORTS = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"


@dataclass(frozen=True)
class TrainingRecord:
    """
    What a card says of a run.

    Attributes:
        base (`str`): The converted checkpoint.
        data (`list[str]`): Sources and their shares.
        trained (`str`): What was trained, and how much.
        objective (`str`): What was minimised.
        schedule (`str`): Optimiser and learning rate.
        steps, tokens (`int`): Of the whole run, resumed parts included.
        loss (`float`, *optional*): Last training loss in nats per token.
        held_out (`str`, *optional*): Held-out loss and perplexity.
    """

    base: str
    data: list[str]
    trained: str
    objective: str
    schedule: str
    steps: int
    tokens: int
    loss: float | None
    held_out: str | None

    def rows(self) -> dict[str, str]:
        rows = {
            "Converted checkpoint": self.base,
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
        packages = ("mha2mla", "torch", "transformers")
        return rows | {"Made with": ", ".join(f"{name} {version(name)}" for name in packages)}


def describe_cache(config: PreTrainedConfig) -> str:
    if not isinstance(config, MLALlamaConfig):
        return ""
    source = 2 * config.num_key_value_heads * config.head_dim
    return (
        f": its cache holds **{config.latent_cache_dim} numbers per token and layer instead of {source} "
        f"({100 * (config.latent_cache_dim / source - 1):+.2f} %)**"
    )


def write_model_card(
    folder: Path, title: str, record: TrainingRecord, config: PreTrainedConfig, adapter: bool
) -> None:
    """Write `README.md`; a base model is named in its front matter only if it is a name on the Hub."""
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["mla", "multi-head-latent-attention", "kv-cache-compression", "mha2mla", *(["lora"] if adapter else [])],
        base_model=None if Path(record.base).exists() else record.base,
    )
    usage = ADAPTER_USAGE if adapter else USAGE
    text = TEMPLATE.format(
        front_matter=data.to_yaml(),
        title=title,
        cache=describe_cache(config),
        usage=usage.format(title=title, imports=ADAPTER_IMPORTS),
        rows="\n".join(f"| {name} | {value} |" for name, value in record.rows().items()),
    )
    ModelCard(text).save(folder / "README.md")
