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
            new = kwargs.get("next_sequence_length")
            new, original = input_ids.shape[1] if new is None else new, rope["original_max_position_embeddings"]
            mask = kwargs.get("attention_mask")
            if mask is None or mask.ndim != 2:  # nothing is padding
                columns = new + int(cache.get_seq_length())
                crossing = 0 < columns - new <= original < columns
            else:
                columns = mask.shape[1]
                crossing = columns > original and crosses(mask, new, original)
            if crossing:
                if input_ids.shape[1] < columns:
                    raise ValueError(
                        f"The text outgrows the {original} tokens of longrope's first table within a part of {new}, "
                        "and has to be read again as a whole, of which only that part was given. Leave out "
                        "prefill_chunk_size; give input_ids, not inputs_embeds, and all of them along with a cache."
                    )
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


def crosses(mask: torch.Tensor, new: int, length: int) -> bool:
    """
    Whether the longest text of a batch grows beyond a length by its newest tokens. The largest position chooses the
    rotary table, and padding has none.

    Args:
        mask (`torch.Tensor`): Which tokens are no padding, [batch, tokens].
        new (`int`): Tokens that are not in the cache yet.
    """
    ends = mask.shape[1] - new, mask.shape[1]
    read, seen = torch.stack([mask[:, :end].sum(-1).max() for end in ends]).tolist()
    return 0 < read <= length < seen
