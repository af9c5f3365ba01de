"""Perplexity of texts, agreement with the original, and long context, against computations written out here."""

import math

import pytest
import torch
from conftest import pico_tokenizer
from transformers import GenerationConfig

from mha2mla.evaluation import measure_multiple_choice, measure_perplexity, measure_text_perplexity
from mha2mla.evaluation.measures.agreement import (
    greedy_continuation,
    kl_divergence,
    matching_prefix,
    measure_agreement,
)
from mha2mla.evaluation.measures.generated import continue_greedily
from mha2mla.evaluation.measures.long_context import measure_position_perplexity, measure_retrieval
from mha2mla.evaluation.measures.perplexity import text_tokens, text_windows, token_losses
from mha2mla.evaluation.progress import Progress
from mha2mla.evaluation.settings import EvaluationSettings
from pico import exact_model, make_mla, make_source, tokens

TOKENIZER = pico_tokenizer()


def text_of(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def random_texts(*sizes: int) -> list[str]:
    return [text_of(tokens(size, seed=size).clamp(min=4).tolist()) for size in sizes]


@pytest.fixture(params=["source", "per-head", "shared"])
def model(request):
    return make_source() if request.param == "source" else make_mla(request.param)


def losses_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(ids[None, :-1], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("num_tokens", [2, 8, 9, 10, 30])
def test_windows_predict_every_token_once(num_tokens, stride):
    predicted = []
    for begin, end, first in text_windows(num_tokens, 8, stride):
        assert 0 <= begin < first <= end and end - begin <= 8
        assert begin == 0 or end - begin == 8  # as much context as fits
        predicted += range(first, end + 1)
    assert predicted == list(range(1, num_tokens))


def test_text_perplexity_counts_every_token_and_byte(model):
    texts = random_texts(20, 1, 9)
    sliding = measure_text_perplexity(model, TOKENIZER, texts, length=8, stride=1)
    expected = []
    for text in texts:
        ids = text_tokens(TOKENIZER, text)
        assert ids[0] == TOKENIZER.bos_token_id
        # With stride 1 every token is the last of a window of its own, but for those of the first window.
        expected += losses_of(model, ids[:9]).tolist()
        expected += [losses_of(model, ids[end - 7 : end + 2])[-1].item() for end in range(8, len(ids) - 1)]
    assert sliding.num_tokens == len(expected) == 30
    assert sliding.loss == pytest.approx(sum(expected) / 30, abs=1e-4)
    assert sliding.num_bytes == sum(len(text.encode()) for text in texts)
    assert sliding.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / sliding.num_bytes, abs=1e-4)
    whole = measure_text_perplexity(model, TOKENIZER, texts[:1], length=32)
    assert whole.loss == pytest.approx(losses_of(model, text_tokens(TOKENIZER, texts[0])).mean().item(), abs=1e-4)
    assert math.isnan(whole.loss_stderr)


def test_text_perplexity_is_that_of_lm_evaluation_harness(model):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = random_texts(30, 5, 16)
    harness = HFLM(pretrained=model, tokenizer=TOKENIZER, max_length=12)
    instances = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=i, metadata=("test", i, 1))
        for i, text in enumerate(texts)
    ]
    theirs = harness.loglikelihood_rolling(instances, disable_tqdm=True)
    ours = measure_text_perplexity(model, TOKENIZER, texts, length=12)
    assert ours.loss * ours.num_tokens == pytest.approx(-sum(theirs), abs=1e-3)


def test_block_perplexity_has_the_standard_error_of_block_means(model):
    blocks = tokens(4, 10)
    result = measure_perplexity(model, blocks)
    means = torch.stack([losses_of(model, block).mean() for block in blocks])
    assert result.loss == pytest.approx(means.mean().item(), abs=1e-5)
    assert result.loss_stderr == pytest.approx(means.std().item() / 2, abs=1e-5)
    assert result.num_tokens == 36
    assert math.isnan(result.bits_per_byte)


def test_chunked_losses_are_those_of_one_pass(model):
    ids = tokens(25)
    torch.testing.assert_close(token_losses(model, ids, chunk=7), losses_of(model, ids), atol=1e-4, rtol=1e-4)


def test_kl_in_chunks_is_kl_at_once():
    source, other, ids = make_source(), make_mla(), tokens(25)
    divergence, same = kl_divergence(source.requires_grad_(False), other.requires_grad_(False), ids, chunk=6)
    p, q = (m(ids[None]).logits[0].log_softmax(-1) for m in (source, other))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence, expected, atol=1e-4, rtol=1e-4)
    assert same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


def test_agreement_of_an_exact_conversion_is_full_and_of_another_model_is_not():
    source, texts = make_source(), random_texts(20, 12)
    sizes = dict(length=16, prompt_length=8, new_tokens=6)
    exact = measure_agreement(source, exact_model(source, "shared"), TOKENIZER, texts, **sizes)
    assert abs(exact.kl) < 1e-5
    assert (exact.top1, exact.identical, exact.num_texts, exact.num_tokens) == (1.0, 1.0, 2, 29)
    assert exact.matched_tokens == sum(
        len(greedy_continuation(source, text_tokens(TOKENIZER, text)[:8], 6)) for text in texts
    ) / len(texts)
    other = measure_agreement(source, make_mla(), TOKENIZER, texts, **sizes)
    assert other.kl > 0.1 and other.top1 < 1 and other.identical < 1
    with pytest.raises(ValueError, match="needs 512 tokens, the model takes 32"):
        measure_agreement(source, source, TOKENIZER, texts)
    with pytest.raises(ValueError, match="no text"):
        measure_agreement(source, source, TOKENIZER, [], **sizes)


def test_greedy_is_argmax_whatever_the_checkpoint_says_of_generation(model):
    ids = text_tokens(TOKENIZER, random_texts(12)[0])
    expected = ids.tolist()
    while len(expected) < len(ids) + 12 and expected[-1] != model.generation_config.eos_token_id:
        with torch.no_grad():
            expected.append(model(torch.tensor([expected]), use_cache=False).logits[0, -1].argmax().item())
    own = GenerationConfig(
        do_sample=True,
        num_beams=3,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=2,
        suppress_tokens=expected[len(ids) :],
        cache_implementation="static",
        eos_token_id=2,
        pad_token_id=0,
    )
    model.generation_config = own
    assert greedy_continuation(model, ids, 12) == expected[len(ids) :]
    (written,) = continue_greedily(model, TOKENIZER, [ids.tolist()], 12)
    assert written == TOKENIZER.decode(expected[len(ids) :], skip_special_tokens=True)
    assert model.generation_config is own


def measure_choices(model, texts):
    measure_multiple_choice(model, TOKENIZER, [{"context": texts[0], "choices": ["w5", "w6"], "answer": 0}])


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (measure_choices, "Item 0: the log-likelihoods are NaN"),
        (lambda m, texts: measure_text_perplexity(m, TOKENIZER, texts, length=8), "Text 1: the log-likelihoods"),
        (lambda m, texts: measure_position_perplexity(m, TOKENIZER, texts, length=8), "Document 1 of 8 tokens"),
        (lambda m, texts: measure_agreement(make_source(), m, TOKENIZER, texts, 8, 4, 2), "Text 1: the divergences"),
        (lambda m, texts: continue_greedily(m, TOKENIZER, [[1, 5]], 2), "The logits of a continuation are NaN"),
    ],
)
def test_logits_that_are_nan_are_told(measure, message):
    model = make_mla()
    model.lm_head.weight.data[7] = math.nan
    with pytest.raises(ValueError, match=f"{message}.*--dtype float32"):
        measure(model, random_texts(12, 9))


def test_a_padded_token_that_the_model_rules_out_is_no_nan():
    """The shorter choice is padded with token 0, whose logit is -inf here."""
    model = make_mla()
    forward = model.forward

    def ruled_out(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., 0] = -math.inf
        return output

    model.forward = ruled_out
    measure_multiple_choice(model, TOKENIZER, [{"context": "w9", "choices": ["w5", "w6 w7"], "answer": 0}])


def test_matching_prefix():
    assert matching_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert matching_prefix([1, 2], [1, 2, 4]) == 2
    assert matching_prefix([], [1]) == 0


def test_retrieval_is_what_greedy_decoding_writes_by_length_and_depth(model):
    items = []
    for number, (length, depth) in enumerate([(8, 0.1), (8, 0.9), (12, 0.1), (12, 1.0)]):
        context = text_of(tokens(length, seed=number).clamp(min=4).tolist())
        written = model.generate(
            torch.tensor([TOKENIZER.encode(context)]), max_new_tokens=2, min_new_tokens=2, do_sample=False
        )[0, -2:].tolist()
        if number == 3:
            written[1] = 4 if written[1] != 4 else 5
        target = " " + TOKENIZER.decode(written)
        items.append({"id": str(number), "context": context, "target": target, "length": length, "depth": depth})
    long = items[0] | {"id": "long", "context": text_of([5] * 40)}
    result = measure_retrieval(model, TOKENIZER, [*items, long])
    assert (result.num_items, result.num_too_long) == (4, 1)
    assert [(c.length, c.depth, c.accuracy, c.num_items) for c in result.cells] == [
        (8, 0.1, 1.0, 1),
        (8, 0.9, 1.0, 1),
        (12, 0.1, 1.0, 1),
        (12, 0.9, 0.0, 1),
    ]
    assert result.accuracy == 0.75
    with pytest.raises(ValueError, match="None of the 1 items fits"):
        measure_retrieval(model, TOKENIZER, [long])
    plain = {key: value for key, value in long.items() if key not in ("length", "depth")}
    with pytest.raises(ValueError, match="Item long: context and continuation need"):
        measure_retrieval(model, TOKENIZER, [plain])
    assert measure_retrieval(model, TOKENIZER, [items[0] | {"id": "x"}]).accuracy == 1.0


def test_perplexity_by_position():
    model = make_mla(max_position_embeddings=300)
    texts = random_texts(280, 290, 20)
    ranges = measure_position_perplexity(model, TOKENIZER, texts, length=270)
    assert [(r.begin, r.end) for r in ranges] == [(1, 128), (128, 256), (256, 270)]
    losses = torch.stack([losses_of(model, text_tokens(TOKENIZER, text)[:270]) for text in texts[:2]])
    for r in ranges:
        assert r.perplexity.loss == pytest.approx(losses[:, r.begin - 1 : r.end - 1].mean().item(), abs=1e-4)
        assert r.perplexity.num_tokens == 2 * (r.end - r.begin)
    with pytest.raises(ValueError, match="None of the 3 documents has 300 tokens"):
        measure_position_perplexity(model, TOKENIZER, texts, length=300)
    with pytest.raises(ValueError, match="2 to 300 tokens"):
        measure_position_perplexity(model, TOKENIZER, texts, length=301)


def test_text_perplexity_refuses_what_it_cannot_measure():
    model = make_mla()
    with pytest.raises(ValueError, match=r"1 to 32 tokens .*got 33"):
        measure_text_perplexity(model, TOKENIZER, ["w4"], length=33)
    with pytest.raises(ValueError, match=r"stride must be 1 to 8 tokens .*got 9"):
        measure_text_perplexity(model, TOKENIZER, ["w4"], length=8, stride=9)
    with pytest.raises(ValueError, match="no text"):
        measure_text_perplexity(model, TOKENIZER, [], length=8)


def test_the_time_left_is_over_all_that_is_to_be_measured():
    progress = Progress(["a", "b", "c", "a", "b"])
    assert progress.describe() == "measurement 1 of 5"
    progress.done("a", 10.0)
    assert progress.describe() == "measurement 2 of 5, about 40 s left"  # b and c as long as a took
    progress.done("b", 130.0)
    assert progress.describe() == "measurement 3 of 5, about 4 min left"  # c 70, a 10, b 130
    progress.done("c", 20_000.0)
    progress.done("a", 10.0)
    assert progress.describe() == "measurement 5 of 5, about 2 min left"


def test_one_string_is_no_list_of_texts():
    with pytest.raises(ValueError, match=r"got one string \('w5 w6' ...\). Give \[text\]"):
        measure_text_perplexity(make_mla(), TOKENIZER, "w5 w6", length=8)
    with pytest.raises(ValueError, match="got one string"):
        measure_agreement(make_source(), make_mla(), TOKENIZER, "w5 w6")


def test_items_need_no_name_but_their_parts():
    item = {"context": "w5 w6", "target": " w7"}
    assert measure_retrieval(make_mla(), TOKENIZER, [item]).num_items == 1
    with pytest.raises(ValueError, match="Item 0 has no target"):
        measure_retrieval(make_mla(), TOKENIZER, [{"context": "w5"}])


@pytest.mark.parametrize("given", [{"limit": "3"}, {"length": 10.5}])
def test_settings_of_another_type_are_refused(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"{name}={given[name]!r} must be of type int, got"):
        EvaluationSettings(**given)
