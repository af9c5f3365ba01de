"""SmolLM3: Llama's block, every fourth layer without RoPE. There rotary keys are zero, and all is in the latent."""

from .base import Architecture


class SmolLM3(Architecture):
    model_type = "smollm3"
