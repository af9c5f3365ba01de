"""The decode kernel against an fp64 reference: in Triton's interpreter where there is no GPU, else on the GPU."""

import random

import pytest
import torch

from mha2mla.modeling import CACHE_ARGUMENT, latent_module, latent_quantized_cache, quantized_cache
from mha2mla.modeling import latent_decode as decode
from mha2mla.modeling.latent_decode import (
    PackedTiles,
    Part,
    Tiles,
    WideTiles,
    choose_wide_tiles,
    decode_attention,
)
from mha2mla.modeling.latent_quantization import CODE_BITS, dequantize, pack, quantize, unpack
from pico import LAYOUTS, make_mla, tokens

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def interpreter_multiplies_bf16(monkeypatch):
    """The interpreter keeps bf16 as 16-bit integers, and its `dot` multiplies those."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *args):
        widened = [
            interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), triton.language.float32)
            if x.dtype == triton.language.bfloat16
            else x
            for x in (a, b)
        ]
        return original(self, *widened, d, *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def reference(query, entries, rank, scaling, seen) -> torch.Tensor:
    """[B, M, R] in fp64; `seen` is [B, M, S] and boolean."""
    query, entries = query.double(), entries.double()
    scores = (query @ entries.transpose(1, 2) * scaling).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ entries[..., :rank]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def visible(num_rows: int, num_queries: int, num_tokens: int, length: int) -> torch.Tensor:
    """Causal: the queries are the last tokens, [1, M, S]."""
    query_token = torch.arange(num_rows) % num_queries
    return (torch.arange(num_tokens)[None, :] <= (length - num_queries + query_token)[:, None])[None]


def check_a_random_case(draw: random.Random, dtype: torch.dtype, rank: int, rope: int, longest: int, tiles) -> None:
    """Random heads, query tokens, lengths, strides and masks."""
    batch, heads, queries = draw.choice([1, 2, 3]), draw.choice([1, 4, 5, 9, 12]), draw.choice([1, 1, 2, 5])
    rows, tokens = heads * queries, draw.randint(queries, longest)
    query = torch.randn(batch, rows, rank + rope).to(dtype)
    room = torch.randn(batch, tokens + 7, rank + rope + draw.choice([0, 3])).to(dtype)
    entries = room[:, :tokens, : rank + rope]  # a view, as dynamic and static buffers give
    kind = draw.choice(["none", "boolean", "additive", "length"])
    length, mask, seen = None, None, visible(rows, queries, tokens, tokens).expand(batch, -1, -1)
    if kind == "length":  # a static cache: what lies behind the length must not even be looked at
        count = draw.randint(queries, tokens)
        entries[:, count:] = torch.nan
        length, seen = torch.tensor(count), visible(rows, queries, tokens, count).expand(batch, -1, -1)
    elif kind != "none":  # left padding
        starts = torch.tensor([draw.randint(0, tokens - queries) for _ in range(batch)])
        seen = seen & (torch.arange(tokens) >= starts[:, None, None])
        mask = seen[:, None, :queries]  # rows of the first head
        if kind == "additive":
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    on = lambda x: None if x is None else x.to(DEVICE)  # noqa: E731
    part = Part(on(room)[:, :tokens, : rank + rope], on(mask), on(length))
    scaling = 2 * (rank + rope) ** -0.5
    got = decode_attention(on(query), [part], rank, queries, scaling, tiles).cpu()
    expected = reference(query, entries.nan_to_num(), rank, scaling, seen)
    assert error(got, expected) < TOLERANCE[dtype], (kind, dtype)


@pytest.mark.parametrize("seed", range(20))
def test_any_shape_gives_the_reference(seed):
    """Random sizes and tiles, from dtypes of all kinds."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
    rank, rope = draw.choice([3, 16, 80, 100, 520]), draw.choice([2, 6, 40, 136])
    tiles = Tiles(block_n=draw.choice([16, 32]), num_splits=draw.choice([None, 1, 3]), num_warps=4)
    check_a_random_case(draw, dtype, rank, rope, 150, tiles)


@pytest.mark.parametrize("seed", range(20))
def test_any_wide_shape_gives_the_reference(seed):
    """The kernel for R > 1,024, on a GPU as it is used, in the interpreter with small groups."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    if DEVICE == "cuda":
        dtype = draw.choice([torch.float16, torch.bfloat16])
        rank, rope = draw.choice([(1056, 40), (1500, 100), (2000, 100), (2048, 512), (2048, 64), (2432, 128)])
        if choose_wide_tiles(rank, rank + rope, 2, torch.device("cuda", 0)) is None:
            pytest.skip("this GPU has no room for two tiles")
        return check_a_random_case(draw, dtype, rank, rope, 3000, None)
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
    rank, rope = draw.choice([3, 16, 80, 100, 130]), draw.choice([2, 6, 40, 136])
    tiles = WideTiles(draw.choice([4, 16]), 16, draw.choice([4, 8]), draw.choice([None, 1, 3]))
    while tiles.columns < rank + rope:
        tiles.block_rest *= 2
    check_a_random_case(draw, dtype, rank, rope, 150, tiles)


def test_wide_tiles_hold_all_columns_or_are_refused():
    for rank in (1025, 1100, 1500, 2000, 2048, 2432, 2560):
        for rope in (2, 64, 128, 512):
            tiles = choose_wide_tiles(rank, rank + rope, 2, torch.device("cpu"))
            assert (tiles is None) == (rank + rope > 2560), (rank, rope)
            assert tiles is None or rank + rope <= tiles.columns <= 2560


def test_the_question_whether_a_kernel_runs_does_not_break_a_graph():
    entries = torch.zeros(2, 2560)
    fits = torch.compile(
        lambda x: x + decode.wide_tiles_fit(2048, x.shape[-1], x.device), fullgraph=True, backend="eager"
    )
    assert fits(entries).eq(1).all()


def packed_part(numbers, rank, form, group=None, mask=None, length=None) -> tuple[Part, torch.Tensor]:
    """Numbers [B, S, W] quantised, and what they are remembered as."""
    sections, nbits = numbers.split([rank, numbers.shape[-1] - rank], -1), CODE_BITS[form]
    groups = [group or section.shape[-1] for section in sections]
    made = [quantize(x, form, g) for x, g in zip(sections, groups, strict=True)]
    codes = torch.cat([pack(c, nbits) for c, _ in made], -1)
    scales = torch.cat([s for _, s in made], -1)
    remembered = [
        dequantize(unpack(pack(c, nbits), nbits, c.shape[-1]), s, form, g)
        for (c, s), g in zip(made, groups, strict=True)
    ]
    on = lambda x: None if x is None else x.to(DEVICE)  # noqa: E731
    return Part(on(codes), on(mask), on(length), False, form, on(scales), *groups), torch.cat(remembered, -1)


@pytest.mark.parametrize("form", CODE_BITS)
@pytest.mark.parametrize("rank, rope, group", [(80, 40, None), (33, 7, 8), (520, 136, 64), (200, 7, None)])
def test_packed_entries_and_a_window(form, rank, rope, group):
    """Two parts: packed tokens, then tokens in full precision, under one softmax."""
    torch.manual_seed(0)
    batch, rows, tokens, recent = 2, 9, 70, 5
    numbers = torch.randn(batch, tokens, rank + rope)
    window = torch.randn(batch, recent, rank + rope)
    query = torch.randn(batch, rows, rank + rope)
    seen = torch.rand(batch, 1, tokens + recent) > 0.3
    mask = seen[:, None]
    packed, remembered = packed_part(numbers, rank, form, group, mask[..., :tokens])
    assert (remembered - numbers).abs().max() < dict(int4=0.7, int8=0.05, fp8=0.3)[form]
    parts = [packed, Part(window.to(DEVICE), mask[..., tokens:].to(DEVICE))]
    got = decode_attention(query.to(DEVICE), parts, rank, 1, 0.2, Tiles(block_n=16, num_warps=4)).cpu()
    expected = reference(query, torch.cat((remembered, window), 1), rank, 0.2, seen.expand(-1, rows, -1))
    assert error(got, expected) < (1e-5 if DEVICE == "cpu" else 1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_any_packed_shape_gives_the_reference(seed):
    """Random heads, query tokens, sizes, lengths, masks and tiles; fp16, as on a GPU."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    form, dtype = draw.choice(list(CODE_BITS)), draw.choice([torch.float16, torch.bfloat16])
    rank, rope = draw.choice([(80, 40), (66, 6), (130, 128)] + [(512, 64), (1024, 64)] * (DEVICE == "cuda"))
    batch, heads, queries = draw.choice([1, 3]), draw.choice([4, 9, 32, 40]), draw.choice([1, 1, 3])
    tokens = draw.randint(queries, 3000 if DEVICE == "cuda" else 90)
    kind = draw.choice(["none", "boolean", "additive", "length"])
    rows, count = heads * queries, draw.randint(queries, tokens) if kind == "length" else tokens
    seen, mask = visible(rows, queries, tokens, count).expand(batch, -1, -1), None
    if kind in ("boolean", "additive"):  # left padding
        starts = torch.tensor([draw.randint(0, tokens - queries) for _ in range(batch)])
        seen = seen & (torch.arange(tokens) >= starts[:, None, None])
        mask = seen[:, None, :queries]
        if kind == "additive":
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    length = torch.tensor(count) if kind == "length" else None
    numbers = torch.randn(batch, tokens, rank + rope) * draw.choice([0.01, 1.0, 30.0])
    query = (torch.randn(batch, rows, rank + rope) * draw.choice([0.01, 1.0]) / numbers.std()).to(dtype)
    part, remembered = packed_part(numbers, rank, form, None, mask, length)
    tiles = None
    if DEVICE == "cpu":
        tiles = PackedTiles(16, draw.choice([16, 32]), draw.choice([16, 32]), 4, 1, draw.choice([None, 1, 3]))
    scaling = 2 * (rank + rope) ** -0.5
    got = decode_attention(query.to(DEVICE), [part], rank, queries, scaling, tiles).cpu()
    assert error(got, reference(query, remembered, rank, scaling, seen)) < 1e-2, (form, kind, dtype)


@pytest.mark.parametrize("count", [1, 3, 8, 9, 10, 25])
def test_a_ring_is_read_in_the_order_of_its_tokens(count):
    """The first token and the newest seven of `count`."""
    batch, rows, size, width = 2, 5, 7, 24
    entries = torch.randn(batch, count, width)
    window = torch.full((batch, 1 + size, width), torch.nan)
    window[:, 0] = entries[:, 0]
    kept = [0, *range(max(1, count - size), count)]
    for position in kept[1:]:
        window[:, 1 + (position - 1) % size] = entries[:, position]
    seen = torch.rand(batch, 1, count) > 0.3
    seen[..., 0] = True
    query = torch.randn(batch, rows, width)
    for mask in (None, torch.nn.functional.pad(seen, (0, 6))[:, None]):
        part = Part(
            window.to(DEVICE), None if mask is None else mask.to(DEVICE), torch.tensor(count, device=DEVICE), True
        )
        got = decode_attention(query.to(DEVICE), [part], 16, 1, 0.2).cpu()
        visible_now = torch.ones(batch, rows, len(kept), dtype=torch.bool) if mask is None else seen[..., kept]
        expected = reference(query, entries[:, kept], 16, 0.2, visible_now.expand(-1, rows, -1))
        assert error(got, expected) < 1e-5


def test_rows_that_see_nothing_give_zeros_not_nan():
    query, entries = torch.randn(1, 4, 20, device=DEVICE), torch.randn(1, 40, 20, device=DEVICE)
    mask = torch.zeros(1, 1, 1, 40, dtype=torch.bool, device=DEVICE)
    for tiles in (None, WideTiles(16, 16)):
        assert decode_attention(query, [Part(entries, mask)], 16, 1, 0.2, tiles).eq(0).all()


def test_every_split_count_wastes_little_of_the_last_wave():
    for programs in (1, 8, 16, 24, 100, 128, 300):
        splits = decode.choose_splits(programs, 16384, 64, torch.device("cpu"))  # 4 processors
        waves = -(-programs * splits // 4)
        assert programs * splits / (4 * waves) > 0.9


MODES = {
    "dynamic": {},
    "static": dict(cache_implementation="static", disable_compile=True),
    "beam": dict(num_beams=2),
    "prompt-lookup": dict(prompt_lookup_num_tokens=3),  # several query tokens in a step
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_generation_through_the_kernel(monkeypatch, layout, mode):
    """The same tokens as without a cache; on the CPU the model is told that the interpreter is a GPU."""
    model = make_mla(layout).to(DEVICE)
    calls = []
    monkeypatch.setattr(latent_module, "kernel_can_run", lambda *_: True)
    monkeypatch.setattr(latent_module, "decode_attention", lambda *a: calls.append(1) or decode_attention(*a))
    ids = tokens(1, 4).repeat(1, 3).to(DEVICE) if mode == "prompt-lookup" else tokens(2, 9).to(DEVICE)
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    if mode != "prompt-lookup":
        settings["attention_mask"] = torch.ones_like(ids)
        settings["attention_mask"][0, :4] = 0
    beams = {name: value for name, value in MODES[mode].items() if name == "num_beams"}
    expected = model.generate(ids, use_cache=False, **beams, **settings)
    assert model.generate(ids, **MODES[mode], **settings).tolist() == expected.tolist()
    assert calls


def test_quantised_cache_through_the_kernel(monkeypatch):
    """What the kernel reads packed is what torch makes numbers of first."""
    model = make_mla("shared").to(DEVICE)
    ids = tokens(2, 12).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    monkeypatch.setattr(latent_quantized_cache, "MEAN_TOKENS", 2)

    def logits():
        cache = quantized_cache(model, nbits=4, residual_length=4)
        steps = []
        with torch.no_grad():
            for end in range(8, 13):
                given = ids[:, :8] if end == 8 else ids[:, end - 1 : end]
                out = model(given, attention_mask=mask[:, :end], **{CACHE_ARGUMENT: cache})
                steps.append(out.logits[:, -1])
        assert cache.layers[0].codes.length > 0
        return torch.stack(steps)

    expected = logits()
    monkeypatch.setattr(latent_module, "kernel_can_run", lambda *_: True)
    torch.testing.assert_close(logits(), expected, rtol=1e-3, atol=1e-4)


def test_a_compiled_step_is_one_graph(monkeypatch):
    """The kernel is a node of the graph, whatever the length."""
    from transformers import StaticCache

    torch._dynamo.reset()
    model = make_mla("shared").to(DEVICE)
    monkeypatch.setattr(latent_module, "kernel_can_run", lambda *_: True)
    ids = tokens(2, 10).to(DEVICE)
    graphs = []
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(ids[:, :6], **{CACHE_ARGUMENT: cache})
        compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
        for i in range(6, 10):
            position = torch.full((2, 1), i, device=DEVICE)
            got = compiled(ids[:, i : i + 1], position_ids=position, **{CACHE_ARGUMENT: cache}).logits
        expected = model(ids, use_cache=False).logits[:, -1:]
    assert len(graphs) == 1
    assert sum("mha2mla.decode_attention" in str(node.target) for node in graphs[0].graph.nodes) == 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
