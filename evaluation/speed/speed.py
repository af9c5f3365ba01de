"""How fast a model generates, and with how much cache: the measurements behind `mha2mla bench`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from mha2mla.evaluation.report.tables import Table
from mha2mla.modeling import (
    CACHE_ARGUMENT,
    LatentQuantizedLayer,
    MLALlamaConfig,
    MLALlamaForCausalLM,
    cache_nbytes,
    quantized_cache,
)
from mha2mla.modeling.latent_cache import round_up
from mha2mla.modeling.latent_decode import Part, decode_attention, kernel_can_run

CACHES = ("dynamic", "static", "static-compiled", "int8", "int4")
WARM_UP_STEPS = 3  # a compiled step is recorded as a CUDA graph in the second and third run

DIMENSIONS = {
    "llama-2-7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=65536,
    ),
    "smollm2-135m": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "pico": dict(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=4096,
    ),
}


@dataclass
class Speed:
    """
    One model, cache, batch and context.

    Attributes:
        first_token_s (`float`, *optional*): Seconds from the prompt to the first token; none if the cache was filled
            with random numbers instead of a prompt.
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


def random_models(
    name: str, dtype: torch.dtype, device: str, rank: int, rope_dim: int, num_rope_key_heads: int
) -> dict[str, Callable[[], nn.Module]]:
    """Makers of the original and the converted model of these [`DIMENSIONS`] with random weights, one at a time."""
    if name not in DIMENSIONS:
        raise ValueError(f"Dimensions are known for {', '.join(DIMENSIONS)}, not for {name!r}.")
    sizes = DIMENSIONS[name]
    latent = dict(kv_lora_rank=rank, qk_rope_head_dim=rope_dim, num_rope_key_heads=num_rope_key_heads)
    latent |= dict(qk_nope_head_dim=sizes["head_dim"], v_head_dim=sizes["head_dim"])

    def make(config, model_class) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            default = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                return model_class(config).eval()
            finally:
                torch.set_default_dtype(default)

    return {
        "original": lambda: make(LlamaConfig(**sizes), LlamaForCausalLM),
        "converted": lambda: make(MLALlamaConfig(**sizes, **latent), MLALlamaForCausalLM),
    }


def numbers_per_token(config) -> int:
    """Numbers cached per token and layer."""
    if isinstance(config, MLALlamaConfig):
        return config.latent_cache_dim
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_key_value_heads * head_dim


def make_cache(model, kind: str, length: int) -> Cache:
    """An empty cache of one of [`CACHES`] for up to `length` tokens."""
    if kind.startswith("static"):
        return StaticCache(config=model.config, max_cache_len=length)
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if not isinstance(model.config, MLALlamaConfig):
        raise ValueError(
            f"The cache {kind!r} is for converted models; the original's are transformers' quanto and hqq."
        )
    return quantized_cache(model, nbits=8 if kind == "int8" else 4)


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
        for start in range(0, context, 512):
            count = min(512, context - start)
            if isinstance(config, MLALlamaConfig):
                shape = (batch, 1, count, config.latent_cache_dim)
            else:
                heads = config.num_key_value_heads
                shape = (batch, heads, count, numbers_per_token(config) // 2 // heads)
            keys = torch.randn(shape, dtype=model.dtype, device=model.device)
            if isinstance(layer, LatentQuantizedLayer):
                layer.append(keys)  # update() would make numbers of the whole history each time
            else:
                cache.update(keys, keys[..., : getattr(config, "kv_lora_rank", shape[-1])], index)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure_speed(
    model, name: str, kind: str, batch: int, context: int, steps: int, repetitions: int = 3, prefill: bool = True
) -> Speed:
    """
    Greedy decoding of `batch` sequences behind `context` tokens.

    Args:
        kind (`str`): One of [`CACHES`]. "static-compiled" compiles the step with mode "reduce-overhead", which on a
            GPU is one CUDA graph.
        steps (`int`): Tokens a repetition.
        prefill (`bool`): Make the history from a random prompt, and time that; or fill the cache with random numbers.
    """
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    tokens = context + WARM_UP_STEPS + steps * repetitions
    if kind.startswith("static"):
        tokens = round_up(tokens)  # the original's too: the same room for both
    cache = make_cache(model, kind, tokens)
    ids = torch.randint(3, model.config.vocab_size, (batch, context), device=device)
    first_token = None
    if prefill:
        synchronize(device)
        started = time.perf_counter()
        logits = model(ids, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits
        token = logits[:, -1:].argmax(-1)
        synchronize(device)
        first_token = time.perf_counter() - started
    else:
        fill(model, cache, batch, context)
        token = ids[:, -1:].clone()
    position = torch.full((batch, 1), context, device=device)
    forward = torch.compile(model, mode="reduce-overhead", fullgraph=True) if kind == "static-compiled" else model

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
        cache=kind,
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


def time_calls(call: Callable[[], object], device: torch.device, seconds: float = 0.3) -> float:
    """
    Median seconds of a call, for about `seconds` in all. On a GPU eight calls are recorded as a CUDA graph and its
    replays are timed with events: the time the host takes to launch a call is not in it.
    """
    for _ in range(3):
        call()
    synchronize(device)
    if device.type == "cuda":
        calls, graph = 8, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        graph.replay()
    times: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times) < 5:
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000 / calls)
        else:
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy: what a memory-bound kernel is measured against."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # An addition, as the copies of a CUDA graph are not done by the multiprocessors.
    return 2 * source.numel() * 4 / time_calls(lambda: torch.add(source, 1, out=target), device)


@torch.no_grad()
def attention_bandwidth(config: MLALlamaConfig, batch: int, context: int, dtype, device: torch.device) -> float:
    """Bytes of entries that one layer's decoding attention gets through in a second: by the kernel where it runs, else
    by torch's absorbed attention."""
    entries = torch.randn(batch, context, config.latent_cache_dim, dtype=dtype, device=device)
    query = torch.randn(batch, config.num_attention_heads, config.latent_cache_dim, dtype=dtype, device=device)
    rank, scaling = config.kv_lora_rank, config.head_dim**-0.5

    def absorbed() -> torch.Tensor:
        weights = (query @ entries.transpose(1, 2) * scaling).softmax(-1, dtype=torch.float32).to(dtype)
        return weights @ entries[..., :rank]

    def kernel() -> torch.Tensor:
        return decode_attention(query, [Part(entries)], rank, 1, scaling)

    seconds = time_calls(kernel if kernel_can_run(entries, rank) else absorbed, device)
    return entries.numel() * entries.element_size() / seconds


def speed_table(measured: list[Speed], title: str) -> Table:
    header = ["model", "cache", "batch", "context", "first token s", "ms a step", "tokens/s", "cache MB (formula)"]
    header += ["cache MB", "allocated MB", "peak GB"]

    def megabytes(count: int) -> str:
        return f"{count / 1e6:,.2f}"

    rows = [
        [
            *(m.model, m.cache, str(m.batch), str(m.context)),
            "-" if m.first_token_s is None else f"{m.first_token_s:.3f}",
            f"{m.step_ms:.2f}",
            f"{m.tokens_per_s:,.1f}",
            *map(megabytes, (m.formula_bytes, m.cache_bytes, m.allocated_bytes)),
            "-" if m.peak_bytes is None else f"{m.peak_bytes / 1e9:.2f}",
        ]
        for m in measured
    ]
    return Table(title, header, rows)


def plot_speed(measured: list[Speed]) -> Figure:
    """Tokens per second and cache bytes against the context, a line for each model, cache and batch."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for key in dict.fromkeys((m.model, m.cache, m.batch) for m in measured):
        points = sorted((m for m in measured if (m.model, m.cache, m.batch) == key), key=lambda m: m.context)
        label = f"{key[0]}, {key[1]}, batch {key[2]}"
        contexts = [m.context for m in points]
        axes[0].plot(contexts, [m.tokens_per_s for m in points], marker="o", label=label)
        axes[1].plot(contexts, [m.cache_bytes / 1e6 for m in points], marker="o", label=label)
    axes[0].set(xlabel="context, tokens", ylabel="tokens per second", xscale="log", ylim=(0, None))
    axes[1].set(xlabel="context, tokens", ylabel="cache, MB", xscale="log", yscale="log")
    axes[1].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    return figure
