"""Model cards: what the README.md of a converted and of a trained checkpoint have in common."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from .hub import on_hub
from .loading import find_file

CARD_NAME = "README.md"
RESULTS_FOLDER = ".eval_results"  # what the Hub shows beside a card: https://huggingface.co/docs/hub/eval-results
TAGS = ("mla", "multi-head-latent-attention", "kv-cache-compression", "mha2mla")
# What a model made of another takes over from its card: the licence binds it, and it speaks the same languages.
INHERITED = ("license", "license_name", "license_link", "language")

TEMPLATE = """---
{metadata}
---

# {title}

{body}

[mha2mla]: https://arxiv.org/abs/2502.14837
"""

USAGE = """```python
{imports}

model = {model_class}.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```"""

FINE_TUNING = """## Fine-tuning

LoRA needs the names of this model's attention layers. peft has them only where the package mha2mla is imported.

```python
from peft import LoraConfig, get_peft_model

targets = {targets}
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
```"""


def read_metadata(checkpoint: str, revision: str | None = None) -> dict[str, Any]:
    """The front matter of a checkpoint's card; empty where there is no card, or none that can be read."""
    path = find_file(checkpoint, CARD_NAME, revision)
    if path is None:
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, yaml.YAMLError):
        return {}


def as_list(value: Any) -> list[str]:
    """A field of a card that may hold one name or several."""
    return [value] if isinstance(value, str) else [str(each) for each in value or []]


def card_metadata(
    base: str,
    relation: Literal["finetune", "adapter"] = "finetune",
    datasets: Iterable[str] = (),
    tags: Iterable[str] = (),
    library_name: str = "transformers",
    revision: str | None = None,
) -> ModelCardData:
    """
    The front matter of a card.

    Args:
        base (`str`): The checkpoint that the model was made of: a folder, or OWNER/NAME on the Hub. Licence, languages
            and data sets are taken over from its card. A folder is not named, as nobody else has it: what its card
            names as base model is, except by an adapter, which fits no other model.
        relation (`str`): How the Hub is to show the model beside its base.
        datasets (`Iterable[str]`): Data sets on the Hub that the model was made with.
        tags (`Iterable[str]`): Beside those of all cards.
        library_name (`str`): What loads the model.
        revision (`str`, *optional*): Branch, tag or commit of a base on the Hub.
    """
    source = read_metadata(base, revision)
    bases = [base] if on_hub(base) else as_list(source.get("base_model")) if relation == "finetune" else []
    fields: dict[str, Any] = {name: source[name] for name in INHERITED if source.get(name)}
    if bases:
        fields |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": relation}
    return ModelCardData(
        library_name=library_name,
        pipeline_tag="text-generation",
        tags=[*TAGS, *tags],
        datasets=list(dict.fromkeys([*as_list(source.get("datasets")), *datasets])) or None,
        **fields,
    )


def usage(name: str, adapter: bool = False) -> str:
    """A block of code that loads the model of that name and generates, as it stands."""
    imports, model_class = "from transformers import AutoModelForCausalLM, AutoTokenizer", "AutoModelForCausalLM"
    if adapter:
        model_class = "AutoPeftModelForCausalLM"
        imports = f"from peft import {model_class}\nfrom transformers import AutoTokenizer"
    return USAGE.format(name=name, imports=imports, model_class=model_class)


def fine_tuning(targets: Iterable[str]) -> str:
    """A section on adapters of a model whose attention has these linear layers; its code follows that of [`usage`]."""
    targets = list(targets)
    section = FINE_TUNING.format(targets=json.dumps(targets))
    absent = [f"`{name}`" for name in ("k_proj", "v_proj") if name not in targets]
    if absent:
        section += f"\n\nThere is no {' and no '.join(absent)}: peft passes over such names without a word."
    return section


def table(rows: Mapping[str, Any]) -> str:
    """A table of two columns without names."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def write_card(path: Path, title: str, metadata: ModelCardData, body: str) -> None:
    """Write a card; its body may link to [mha2mla]."""
    ModelCard(TEMPLATE.format(metadata=metadata.to_yaml(), title=title, body=body)).save(path)
