"""What a teacher does to the outputs of its modules before they count. Granite multiplies them by numbers of its
config, which conversion puts into the model's weights; no other source has any."""

from transformers import PreTrainedConfig


def attention_factor(config: PreTrainedConfig) -> float:
    """By which the output of `self_attn` is multiplied on its way into the residual stream."""
    return getattr(config, "residual_multiplier", 1.0)


def logits_factor(config: PreTrainedConfig) -> float:
    """By which the output of `lm_head` is multiplied to be logits."""
    return 1 / getattr(config, "logits_scaling", 1.0)
