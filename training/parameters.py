"""Which parameters are trained."""

import re
from collections import Counter
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from mha2mla.modeling import FAMILIES, LatentConfigMixin

ATTENTION = r"\.self_attn\."
# Named choices beside `lora`; anything else is a regular expression of the user's.
NAMED_PATTERNS = {
    "all": "",
    # The paper's open question: MLP, embeddings and head keep what they know.
    "attention": rf"{ATTENTION}|norm\.weight$",
}
LORA = "lora"


def meta_model(config: LatentConfigMixin) -> nn.Module:
    """The model of a config without weights or memory: enough to know the names of its parameters."""
    try:
        with torch.device("meta"):
            return FAMILIES[config.model_type](config)  # from_config would shard it, if DeepSpeed ZeRO-3 is at work
    except Exception as error:  # whatever a malformed config makes of transformers and torch
        reason = shorten(str(error), 300, placeholder=" ...")
        raise ValueError(f"There is no model of such a config.json ({reason}). Mend it.") from error


def freeze_except(model: nn.Module, trainable: str) -> None:
    """
    Leave a gradient to some parameters only. The Trainer gives its optimizer those alone.

    Args:
        trainable (`str`): "all", "attention" (attention and norms), or a regular expression that is looked for in the
            names of the parameters.

    Raises:
        ValueError: If the expression is none, or is found in no name.
    """
    try:
        pattern = re.compile(NAMED_PATTERNS.get(trainable, trainable))
    except re.error as error:
        raise ValueError(f"trainable={trainable!r} is not a regular expression: {error}.") from None
    names = [name for name, _ in model.named_parameters()]
    if not any(pattern.search(name) for name in names):
        raise ValueError(
            f"trainable={trainable!r} is found in no parameter's name. Names are like {names[0]}, "
            f"{', '.join(sorted({without_layer(name) for name in names if '.layers.' in name}))}; "
            f"or choose {', '.join(NAMED_PATTERNS)} or {LORA}."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern.search(name) is not None)


def check_lora_targets(model: Any, targets: Sequence[str]) -> None:
    """Raise a `ValueError` if a target is the name of no linear layer (peft complains only if all are wrong), or has a
    weight in common with another module, into which a merged adapter would go, too (peft only warns)."""
    tied = {name.rsplit(".", 2)[-2] for pair in model.all_tied_weights_keys.items() for name in pair}
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if target not in linear:
            message = f"lora_targets: {target!r} is no linear layer; there are {', '.join(sorted(linear))}."
            if target in ("k_proj", "v_proj"):
                usual = " ".join(model.config.attention_projections)
                message += f" Keys and values come from kv_a_proj and kv_b_proj here: name {usual}."
            raise ValueError(message)
        if target in tied:
            raise ValueError(
                f"lora_targets: {target!r} has its weight in common with another module (this model ties "
                f"{' and '.join(sorted(tied))}), and a merged adapter would change both. Leave it out."
            )


def add_lora(model: Any, rank: int, alpha: int, dropout: float, targets: Sequence[str] | None) -> nn.Module:
    """Wrap the model with LoRA adapters (peft) on the linear layers named, by default those of attention; everything
    else is frozen."""
    from peft import LoraConfig, get_peft_model  # an optional dependency

    targets = targets or model.config.attention_projections
    check_lora_targets(model, targets)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def without_layer(name: str) -> str:
    """A parameter's name with a star for the number of its layer."""
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)


def describe_trainable(model: nn.Module) -> str:
    """What is trained and how much it is, for a person: a line for all, then one for each name."""
    sizes: Counter[str] = Counter()
    total = 0
    for name, parameter in model.named_parameters():
        # A parameter sharded by ZeRO-3 is empty here and keeps its size elsewhere.
        size = getattr(parameter, "ds_numel", parameter.numel())
        total += size
        if parameter.requires_grad:
            sizes[without_layer(name)] += size
    trained = sum(sizes.values())
    lines = [f"Training {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)"]
    return "\n".join(lines + [f"  {size:>13,}  {name}" for name, size in sizes.items()])
