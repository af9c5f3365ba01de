"""How fast a model generates, and with how much cache."""

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import Cache

from mha2mla.common.loading import keys_values_width
from mha2mla.evaluation.caches import CacheKind
from mha2mla.modeling import CACHE_ARGUMENT, LatentConfigMixin, cache_nbytes
from mha2mla.modeling.latent_cache import round_up

from .timing import synchronize

FILL_TOKENS = 2**17  # put in a cache at once: a large batch leaves little memory
PREFILLS = 3  # before the one that is decoded behind; the first of them warms up and does not count
WARM_UP_STEPS = 3  # a compiled step is recorded as a CUDA graph in the second and third run


@dataclass
class Speed:
    """
    One model, cache, batch and context.

    Attributes:
        first_token_s (`float`, *optional*): Seconds from the prompt to the first token, median of a few; none if the
            cache was filled with random numbers instead of a prompt.
        step_ms (`float`): Milliseconds a decoding step, median of the repetitions.
        tokens_per_s (`float`): Of the whole batch, while decoding.
        formula_bytes (`int`): Numbers cached per token and layer * tokens * batch * layers * element size.
        cache_bytes (`int`): What the cache's entries occupy after the last step.
        allocated_bytes (`int`): What its memory occupies, room for more tokens included.
        peak_bytes (`int`, *optional*): Most memory in use on the GPU, weights included; none on a CPU.
    """

    model: str
    cache: str
    batch: int
    context: int
    first_token_s: float | None
    step_ms: float
    tokens_per_s: float
    formula_bytes: int
    cache_bytes: int
    allocated_bytes: int
    peak_bytes: int | None


def numbers_per_token(config) -> int:
    """Numbers cached per token and layer."""
    if isinstance(config, LatentConfigMixin):
        return config.latent_cache_dim
    return keys_values_width(config)


def allocated_nbytes(cache: Cache) -> int:
    """Bytes of the distinct memory that a cache's tensors lie in, room for more tokens included."""
    found: dict[int, int] = {}

    def visit(holder) -> None:
        if isinstance(holder, torch.Tensor):
            storage = holder.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(holder, (list, tuple)):
            for part in holder:
                visit(part)
        elif hasattr(holder, "data") and hasattr(holder, "length"):  # GrowingBuffer
            visit(holder.data)

    for layer in cache.layers:
        for name, value in vars(layer).items():
            if name not in ("factors", "to_rotated", "from_rotated"):  # weights rather than cache
                visit(value)
    return sum(found.values())


@torch.no_grad()
def fill(model, cache: Cache, batch: int, context: int) -> None:
    """Put `context` random tokens in the cache, as a prompt would, without the time and the memory of a prompt."""
    config = model.config
    for index, layer in enumerate(cache.layers):
        piece = max(1, min(512, FILL_TOKENS // batch))
        for start in range(0, context, piece):
            count = min(piece, context - start)
            if isinstance(config, LatentConfigMixin):
                shape = (batch, 1, count, config.latent_cache_dim)
            else:
                heads = config.num_key_value_heads
                shape = (batch, heads, count, numbers_per_token(config) // 2 // heads)
            keys = torch.randn(shape, dtype=model.dtype, device=model.device)
            if getattr(layer, "packed", False):
                layer.append(keys)  # update() would make numbers of the whole history each time
            else:
                cache.update(keys, keys[..., : getattr(config, "kv_lora_rank", shape[-1])], index)


@torch.no_grad()
def read_prompt(model, cache: Cache, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The likeliest token behind prompts [batch, tokens], [batch, 1], and the seconds that it took."""
    synchronize(ids.device)
    started = time.perf_counter()
    logits = model(ids, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits
    token = logits[:, -1:].argmax(-1)
    synchronize(ids.device)
    return token, time.perf_counter() - started


@torch.no_grad()
def measure_speed(
    model, name: str, kind: CacheKind, batch: int, context: int, steps: int, repetitions: int = 3, prefill: bool = True
) -> Speed:
    """
    Greedy decoding of `batch` sequences after `context` tokens.

    Args:
        name (`str`): Of the model, for the table.
        kind (`CacheKind`): "static-compiled" compiles the step with mode "reduce-overhead", which on a GPU is one CUDA
            graph.
        steps (`int`): Tokens a repetition.
        prefill (`bool`): Make the history from a random prompt, and time that; or fill the cache with random numbers.
    """
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    tokens = context + WARM_UP_STEPS + steps * repetitions
    if kind.is_static:
        tokens = round_up(tokens)  # the original's too: the same room for both
    ids = torch.randint(3, model.config.vocab_size, (batch, context), device=device)
    first_token = None
    if prefill:
        # Each cache is gone before the next is made: a second one would show in the peak of memory.
        _, *before = [read_prompt(model, kind.make(model, tokens), ids)[1] for _ in range(PREFILLS)]
        cache = kind.make(model, tokens)
        token, last = read_prompt(model, cache, ids)
        first_token = statistics.median([*before, last])
    else:
        cache = kind.make(model, tokens)
        fill(model, cache, batch, context)
        token = ids[:, -1:].clone()
    position = torch.full((batch, 1), context, device=device)
    forward = torch.compile(model, mode="reduce-overhead", fullgraph=True) if kind.is_compiled else model

    def step() -> None:
        logits = forward(token, position_ids=position, **{CACHE_ARGUMENT: cache}).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    def run(count: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(device)
        return (time.perf_counter() - started) / count

    run(WARM_UP_STEPS)
    seconds = statistics.median(run(steps) for _ in range(repetitions))
    return Speed(
        model=name,
        cache=kind.name,
        batch=batch,
        context=context,
        first_token_s=first_token,
        step_ms=seconds * 1000,
        tokens_per_s=batch / seconds,
        formula_bytes=numbers_per_token(model.config)
        * tokens
        * batch
        * model.config.num_hidden_layers
        * model.dtype.itemsize,
        cache_bytes=cache_nbytes(cache),
        allocated_bytes=allocated_nbytes(cache),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )
