"""Bytes of cache a token against what they cost: KL to the original on text, and accuracy on multiple-choice sets.

    python benchmarks/pareto.py run pareto.jsonl --source SmolLM2-135M-Instruct --model mla-31=recovered-31 \\
        --text corpus=validation.jsonl.gz --text wikitext=wikitext2_valid.jsonl:raw --sets ../shared/data/eval \\
        --device cuda
    python benchmarks/pareto.py table pareto.jsonl

A row is a model with one form of cache. Every entry is rounded as it is written, the newest too and, except in `fp8`,
all but the first token's, so that a whole text in one pass reads what decoding would read: no window in full precision
flatters a cache, and accuracy on short questions is that of the rounded cache (the real ones leave 32 recent tokens as
they are, and ours texts of up to 128). Bytes are counted, not measured: codes, scales and zeros of a token, without a
window. Forms of the original's keys and values:

- `int8`, `int4`, `int2`: groups of 64 numbers of a token, as quanto and HQQ have them in transformers;
- `int4-channel`, `int2-channel`: keys by channel over 32 tokens, values by token in groups of 32, as in KIVI
  (arXiv 2402.02750). Groups of a short piece of text are smaller, which is finer than KIVI;
- `int4-rotated`, `int3-rotated`, `int2-rotated`: each head rotated and rounded as our own latents are;
- `fp8`: e4m3 with a scale of 1, the first token too, as vLLM has it by default.

A conversion's latents: `int8`, `int4` and `fp8-rotated` (this package's format), and `fp8` as vLLM has it.
Rows in the file are not measured again.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conversion_ablation import read_blocks
from recovery_table import ORIGINAL, SETS, read_results
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mha2mla.common.loading import keys_values_width
from mha2mla.evaluation import MultipleChoice, choice_bytes, read_items
from mha2mla.evaluation.caches import VLLM, CacheKind
from mha2mla.evaluation.measures.multiple_choice import mean_stderr, paired_difference
from mha2mla.evaluation.measures.scoring import encode_request, score_requests
from mha2mla.modeling import CACHE_ARGUMENT, LatentConfigMixin
from mha2mla.modeling.latent_cache import LatentDynamicLayer
from mha2mla.modeling.latent_quantization import quantize_integers, random_rotation, round_fp8
from mha2mla.modeling.latent_quantized_cache import LatentQuantizedLayer

Rounding = Callable[[torch.Tensor], torch.Tensor]  # of numbers [..., tokens, C]
PLAIN = "bf16"
GROUP = 64  # numbers of a token that share a scale in quanto's and HQQ's caches
KIVI = 32  # tokens, or numbers of a token


def round_groups(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Each `group` consecutive numbers of the last dimension to 2**bits levels between their least and greatest."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % group), mode="constant", value=math.nan)
    groups = padded.unflatten(-1, (-1, group))
    low = groups.nan_to_num(math.inf).amin(-1, keepdim=True)
    high = groups.nan_to_num(-math.inf).amax(-1, keepdim=True)
    low, step = (value.to(x.dtype).float() for value in (low, (high - low) / (2**bits - 1)))
    codes = ((groups - low) / step.clamp(min=1e-20)).round().clamp(0, 2**bits - 1)
    return (codes * step + low).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def round_channels(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Each channel over groups of tokens."""
    return round_groups(x.transpose(-1, -2), bits, KIVI).transpose(-1, -2)


def round_rotated(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Each head of a token by itself, in the basis and the format of our latents."""
    rotation = random_rotation(x.shape[-1]).to(x.device)
    codes, exponents, zeros = quantize_integers(x.float() @ rotation, bits)
    numbers = (codes - zeros * ((2**bits - 1) / 255)) * torch.exp2(exponents / 8 - 20)
    return (numbers @ rotation.T).to(x.dtype)


@dataclass(frozen=True)
class Form:
    """How keys and values are rounded, and the bits that a number takes, scales and zeros (16 bits each) included."""

    keys: Rounding
    values: Rounding
    bits: float


def by_token(bits: int) -> Form:
    def rounding(x: torch.Tensor) -> torch.Tensor:
        return round_groups(x, bits, GROUP)

    return Form(rounding, rounding, bits + 32 / GROUP)


def by_channel(bits: int) -> Form:
    return Form(lambda x: round_channels(x, bits), lambda x: round_groups(x, bits, KIVI), bits + 32 / KIVI)


def rotated(bits: int, head_dim: int = 64) -> Form:
    def rounding(x: torch.Tensor) -> torch.Tensor:
        return round_rotated(x, bits)

    return Form(rounding, rounding, bits + 16 / head_dim)  # a scale and a zero of a byte each


def unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


FORMS = (
    {PLAIN: Form(unchanged, unchanged, 16), "fp8": Form(round_fp8, round_fp8, 8)}
    | {f"int{bits}": by_token(bits) for bits in (8, 4, 2)}
    | {f"int{bits}-channel": by_channel(bits) for bits in (4, 2)}
    | {f"int{bits}-rotated": rotated(bits) for bits in (4, 3, 2)}
)
LATENT_BITS = {PLAIN: None, "fp8": None, "fp8-rotated": 8, "int8": 8, "int4": 4}
LATENT_SCALES = 4  # bytes of a token and layer: a scale and a zero of the latent, and of the rotary keys


def but_first(rounding: Rounding, x: torch.Tensor, begins: bool) -> torch.Tensor:
    """Rounded, but for a text's first token, on which attention rests."""
    return torch.cat((x[..., :1, :], rounding(x[..., 1:, :])), dim=-2) if begins else rounding(x)


class RoundedLayer(DynamicLayer):
    """Keys and values, rounded as they are written."""

    def __init__(self, form: Form):
        super().__init__()
        self.form = form

    def update(self, key_states, value_states, *args, **kwargs):
        begins = self.get_seq_length() == 0
        keys, values = but_first(self.form.keys, key_states, begins), but_first(self.form.values, value_states, begins)
        return super().update(keys, values, *args, **kwargs)


class RoundedLatents(LatentDynamicLayer):
    """Entries, rounded as they are written."""

    _layer_type = None  # or transformers would take it for the layer of every latent cache

    def __init__(self, rounding: Rounding):
        super().__init__()
        self.rounding = rounding

    def append(self, entries: torch.Tensor) -> None:
        super().append(but_first(self.rounding, entries, self.get_seq_length() == 0))


@dataclass(frozen=True)
class Rounded(CacheKind):
    """A cache of a model in one of the forms above, for whatever takes a `CacheKind`."""

    roundings: list[Rounding] = field(default_factory=list)  # of latents, by layer; empty for keys and values

    def make(self, model: PreTrainedModel, length: int | None = None) -> Cache:
        if self.roundings:
            return Cache(layers=[RoundedLatents(rounding) for rounding in self.roundings])
        return Cache(layers=[RoundedLayer(FORMS[self.name]) for _ in range(model.config.num_hidden_layers)])


def latent_rounding(factors, form: str, entries: torch.Tensor) -> Rounding:
    """That of one layer in this package's format; the mean of the rotary keys is that of a text's entries
    [1, 1, tokens, W]."""
    layer = LatentQuantizedLayer(*factors, form=form)
    layer.lazy_initialization(entries, entries)
    mean = layer.rotate(entries).float().mean(dim=2, keepdim=True).to(entries.dtype)
    mean[..., : layer.sizes[0]] = 0

    def rounding(x: torch.Tensor) -> torch.Tensor:
        numbers = layer.decode(*layer.encode(layer.rotate(x) - mean))
        return layer.unrotate(numbers.to(x.dtype) + mean)

    return rounding


@torch.no_grad()
def cache_form(name: str, model: PreTrainedModel, ids: torch.Tensor) -> tuple[CacheKind, float]:
    """The cache of a model by its form, and its bytes a token. `ids` [1, tokens] is a text."""
    config = model.config
    if not isinstance(config, LatentConfigMixin):
        numbers = keys_values_width(config) * config.num_hidden_layers
        kind = CacheKind(name, 8, VLLM) if name == "fp8" else Rounded(name)
        return kind, numbers * FORMS[name].bits / 8
    width, nbits = config.latent_cache_dim, LATENT_BITS[name]
    if nbits is None:
        form, layers = FORMS[name], config.num_hidden_layers
        kind = CacheKind(name, 8, VLLM) if name == "fp8" else Rounded(name, roundings=[form.keys] * layers)
        return kind, width * form.bits / 8 * layers
    cache = DynamicCache(config=config)
    model(ids, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    attentions = [layer.self_attn for layer in model.base_model.layers]
    roundings = [
        latent_rounding(attention.channel_factors(model.dtype), name.removesuffix("-rotated"), layer.keys)
        for attention, layer in zip(attentions, cache.layers, strict=True)
    ]
    return Rounded(name, roundings=roundings), (width * nbits / 8 + LATENT_SCALES) * config.num_hidden_layers


@torch.no_grad()
def compare(
    original: PreTrainedModel, model: PreTrainedModel, blocks: torch.Tensor, kind: CacheKind, batch_size: int
) -> dict:
    """KL(original, model) in nats a token, share of equal likeliest tokens, and the model's loss; means and standard
    errors over blocks [blocks, tokens]."""
    rows: dict[str, list[float]] = {"kl": [], "top1": [], "loss": []}
    for part in blocks.to(model.device).split(batch_size):
        expected = original(part, use_cache=False).logits.float().log_softmax(-1)
        found = model(part, **{CACHE_ARGUMENT: kind.make(model)}).logits.float().log_softmax(-1)
        rows["kl"] += (expected.exp() * (expected - found)).sum(-1).mean(-1).tolist()
        rows["top1"] += (expected.argmax(-1) == found.argmax(-1)).float().mean(-1).tolist()
        rows["loss"] += (-found[:, :-1].gather(-1, part[:, 1:, None])).mean((1, 2)).tolist()
    return {name: [sum(values) / len(values), mean_stderr(values)] for name, values in rows.items()}


def measure_sets(model, sets: dict, requests: dict, kind: CacheKind, batch_size: int) -> dict:
    """Which items of each set are right, by log-likelihood over length; and the sets' chance levels."""
    right = {}
    for name, items in sets.items():
        scored = score_requests(model, requests[name], batch_size, name, kind)
        values = [[score.log_likelihood for score in scores] for scores in scored]
        right[name] = MultipleChoice.from_scores(values, choice_bytes(items), [i["answer"] for i in items]).right_norm
    chance = {name: sum(1 / len(item["choices"]) for item in items) / len(items) for name, items in sets.items()}
    return {"right": right, "chance": chance}


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    done = {(row["model"], row["cache"]) for row in read_results(args.results)} if args.results.is_file() else set()
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    texts = {name: read_blocks(spec, tokenizer, args.blocks) for name, spec in (t.split("=", 1) for t in args.text)}
    sets, requests = {}, {}
    for name in args.only_sets if args.sets else ():
        sets[name] = items = read_items(args.sets / f"{name}.jsonl")[: args.limit]
        requests[name] = [
            encode_request(tokenizer, i["id"], i["context"], [" " + c for c in i["choices"]], 8192) for i in items
        ]

    def load(folder: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype).to(args.device).eval()

    original = load(args.source)
    for name, folder in {ORIGINAL: args.source, **dict(named.split("=", 1) for named in args.model)}.items():
        every = FORMS if name == ORIGINAL else LATENT_BITS
        forms = [form for form in every if re.search(args.only, f"{name}/{form}") and (name, form) not in done]
        model = original if name == ORIGINAL or not forms else load(folder)
        for form in forms:
            begin = time.perf_counter()
            if begin - started > args.seconds:
                print(f"{name}, {form}: no time left", flush=True)
                continue
            kind, size = cache_form(form, model, next(iter(texts.values()))[:1].to(args.device))
            row = {"model": name, "cache": form, "bytes": size}
            row["text"] = {t: compare(original, model, ids, kind, args.text_batch_size) for t, ids in texts.items()}
            row |= measure_sets(model, sets, requests, kind, args.batch_size)
            row |= {"dtype": args.dtype, "blocks": args.blocks, "seconds": round(time.perf_counter() - begin, 1)}
            row["device"] = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}, {form}: {size:,.0f} bytes, {row['seconds']} s, {row['text']}", flush=True)


def points_lost(row: dict, original: dict, names: list[str]) -> tuple[float, float]:
    """Points of accuracy against the original on the same items, mean over sets, and its standard error."""
    if not names:
        return math.nan, math.nan
    pairs = [paired_difference(row["right"][name], original["right"][name]) for name in names]
    lost = -100 * sum(difference for difference, _ in pairs) / len(pairs)
    return lost, 100 * math.hypot(*(error for _, error in pairs)) / len(pairs)


def sets_above_chance(original: dict) -> list[str]:
    """Those in which the original is more than two standard errors better than chance."""
    known = []
    for name, right in original["right"].items():
        hits = [float(hit) for hit in right]
        if sum(hits) / len(hits) - original["chance"][name] > 2 * mean_stderr(hits):
            known.append(name)
    return known


def write_table(args: argparse.Namespace) -> None:
    rows = sorted(read_results(args.results), key=lambda row: -row["bytes"])
    original = next(row for row in rows if (row["model"], row["cache"]) == (ORIGINAL, PLAIN))
    texts, every, known = list(original["text"]), list(original["right"]), sets_above_chance(original)
    names = ["model", "cache", "bytes/token", *(f"KL, {text}" for text in texts)]
    names += [f"points lost, {len(every)} sets", f"the {len(known)} above chance"] if every else []
    print("| " + " | ".join([*names, "measured on"]) + " |\n|" + "---|" * (len(names) + 1))
    for row in rows:
        cells = [row["model"], row["cache"], f"{row['bytes']:,.0f}"]
        cells += ["{:.4f} ± {:.4f}".format(*row["text"][text]["kl"]) if text in row["text"] else "" for text in texts]
        for chosen in (every, known) if every else ():
            cells.append("{:.2f} ± {:.2f}".format(*points_lost(row, original, chosen)) if row["right"] else "")
        print("| " + " | ".join([*cells, f"{row['device']}, {row['blocks']} blocks"]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measure = commands.add_parser("run", help="Measure what the results file does not hold yet.")
    measure.add_argument("results", type=Path)
    measure.add_argument("--source", required=True, help="The original model.")
    measure.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="A conversion.")
    measure.add_argument("--only", default="", help="Rows in whose name, like original/int4, this is found.")
    measure.add_argument("--text", action="append", required=True, metavar="NAME=FILE[:FIELD]")
    measure.add_argument("--blocks", type=int, default=32, help="Of each text, 1,024 tokens each.")
    measure.add_argument("--sets", type=Path, help="Folder of the sets; by default no accuracy.")
    measure.add_argument("--only-sets", nargs="+", default=SETS, help="Which of them.")
    measure.add_argument("--limit", type=int, help="Items of each set at most.")
    measure.add_argument("--batch-size", type=int, default=64, help="Items at a time.")
    measure.add_argument("--text-batch-size", type=int, default=4, help="Blocks at a time.")
    measure.add_argument("--device", default="cpu")
    measure.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    measure.add_argument("--seconds", type=float, default=math.inf, help="Begin no row after so long.")
    measure.set_defaults(call=run)
    table = commands.add_parser("table", help="Print the table.")
    table.add_argument("results", type=Path)
    table.set_defaults(call=write_table)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
