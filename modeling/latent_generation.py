"""What `generate` asks of a family's causal language model."""

from typing import Any, NoReturn

import torch

from .latent_cache import CACHE_ARGUMENT


class LatentGenerationMixin:
    """Goes before all other bases."""

    config: Any

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args, inputs_embeds: torch.Tensor | None = None, **kwargs
    ):  # `generate` looks here for the names of what it may be given
        """Beyond the length that the model was made for, longrope turns keys by another table, and those in the cache
        are of no use any more: the step that crosses it reads the whole text again, as transformers' Phi-3 does."""
        rope, cache = self.config.rope_parameters, kwargs.get(CACHE_ARGUMENT)
        if rope["rope_type"] == "longrope" and cache is not None:
            if 0 < cache.get_seq_length() <= rope["original_max_position_embeddings"] < input_ids.shape[1]:
                cache.reset()
                kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )

    def init_continuous_batching(self, *args, **kwargs) -> NoReturn:
        """Every way into continuous batching leads here (`generate_batch`, `cache_implementation="paged"`)."""
        raise ValueError(
            f"model_type={self.config.model_type!r}: continuous batching (generate_batch) has pages for keys and "
            "values, which this model does not cache. Give the prompts to generate() as one padded batch, or serve "
            "the model by vLLM: run `mha2mla export`, then `vllm serve` (docs/serving.md)."
        )
