"""Multiple choice: the same log-likelihoods as one forward pass per choice, and as lm-evaluation-harness."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mha2mla.evaluation import choice_bytes, measure_multiple_choice, preference_error, score_choices
from mha2mla.evaluation.measures.items import read_items
from mha2mla.evaluation.measures.multiple_choice import paired_difference
from mha2mla.evaluation.measures.scoring import encode_request, score_requests
from mha2mla.evaluation.tasks import TaskData
from pico import VOCAB, make_mla, make_source

WORDS = "the cat sat on a mat and saw that the other cat was not there at all"
ITEMS = [
    {"id": "a", "context": "the cat sat on", "choices": ["a mat", "the other cat at all", "that"], "answer": 0},
    {"id": "b", "context": "the other", "choices": ["cat", "mat"], "answer": 0},
    {"id": "c", "context": "was not there ", "choices": ["at all", "cat was"], "answer": 1},
    {"id": "d", "context": "", "choices": ["the cat", "sat"], "answer": 1},
    {"id": "e", "context": "a cat and a mat", "choices": ["was", "that é was", "not", "sat on", "all"], "answer": 3},
]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE that joins letters across words' ends only behind a space, as real ones do."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    alphabet = sorted(set(ByteLevel(add_prefix_space=False).pre_tokenize_str(WORDS + "é")[0][0] + "abcdehlmnostuwĠÃ©"))
    trainer = BpeTrainer(vocab_size=VOCAB, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([WORDS] * 20, trainer)
    assert bpe.get_vocab_size() <= VOCAB
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(params=["source", "per-head", "shared"])
def model(request):
    return make_source() if request.param == "source" else make_mla(request.param)


def requests_of(items, tokenizer):
    return [encode_request(tokenizer, i["id"], i["context"], [" " + c for c in i["choices"]], 32) for i in items]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_are_those_of_one_forward_pass_per_choice(model, tokenizer, batch_size):
    requests = requests_of(ITEMS, tokenizer)
    model.train()
    scores = score_requests(model, requests, batch_size, "test")
    assert model.training  # put back
    model.eval()
    for request, scored in zip(requests, scores, strict=True):
        for ids, score in zip(request.continuations, scored, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([request.context + ids]), use_cache=False).logits[0]
            rows = logits[len(request.context) - 1 : -1].log_softmax(-1)
            expected = rows.gather(-1, torch.tensor(ids)[:, None]).sum().item()
            assert score.log_likelihood == pytest.approx(expected, abs=2e-4)
            assert score.greedy == (rows.argmax(-1).tolist() == ids)


def test_paired_difference_against_a_formula():
    """Two models that differ in two of eight items, whatever they share."""
    difference, stderr = paired_difference("11010001", "11011000")
    assert difference == pytest.approx((1 - 1) / 8)
    assert stderr == pytest.approx(math.sqrt(2 / 7) / math.sqrt(8))
    assert paired_difference("1101", "1001") == (pytest.approx(0.25), pytest.approx(0.25))
    with pytest.raises(ValueError):
        paired_difference("11", "110")


def test_preference_error_against_a_formula():
    """Two items; what raises all choices of an item alike is no preference."""
    sizes, wanted = [[1, 2], [1, 1, 4]], [[-1.0, -6.0], [-3.0, -1.0, -8.0]]
    assert preference_error(wanted, wanted, sizes) == 0
    raised = [[-1.5, -7.0], [-2.0, 0.0, -4.0]]  # by -0.5 and +1 per byte
    assert preference_error(raised, wanted, sizes) == pytest.approx(0)
    indifferent = [[-1.0, -2.0], [-2.0, -2.0, -8.0]]
    assert preference_error(indifferent, wanted, sizes) == pytest.approx(1)
    # Per byte -1, -3 and -3, -1, -2, so preferences of 1, -1 and -1, 1, 0; the first choice is now 1 likelier.
    changed = [[0.0, -6.0], wanted[1]]
    assert preference_error(changed, wanted, sizes) == pytest.approx((0.5**2 + 0.5**2) / 4)
    assert math.isnan(preference_error(wanted, indifferent, sizes))


def test_scores_are_what_accuracy_is_made_of(tokenizer):
    model = make_mla()
    scores = score_choices(model, tokenizer, ITEMS, batch_size=2)
    result = measure_multiple_choice(model, tokenizer, ITEMS, batch_size=2)
    best = [max(range(len(values)), key=values.__getitem__) for values in scores]
    assert result.right == "".join(str(int(b == item["answer"])) for b, item in zip(best, ITEMS, strict=True))
    assert choice_bytes(ITEMS)[4] == [3, 11, 3, 6, 3]


def test_accuracies_and_standard_errors(tokenizer):
    model = make_mla()
    result = measure_multiple_choice(model, tokenizer, ITEMS, batch_size=2)
    right, right_norm = [], []
    for item, scored in zip(ITEMS, score_requests(model, requests_of(ITEMS, tokenizer), 8, "test"), strict=True):
        values = torch.tensor([s.log_likelihood for s in scored])
        sizes = torch.tensor([len(c.encode()) for c in item["choices"]])
        right.append(float(values.argmax() == item["answer"]))
        right_norm.append(float((values / sizes).argmax() == item["answer"]))
    assert result.num_items == 5
    assert (result.right, result.right_norm) == tuple("".join(str(int(x)) for x in y) for y in (right, right_norm))
    assert result.accuracy == pytest.approx(sum(right) / 5)
    assert result.accuracy_norm == pytest.approx(sum(right_norm) / 5)
    assert result.stderr == pytest.approx(torch.tensor(right).std().item() / math.sqrt(5))
    assert result.stderr_norm == pytest.approx(torch.tensor(right_norm).std().item() / math.sqrt(5))
    assert math.isnan(measure_multiple_choice(model, tokenizer, ITEMS[:1]).stderr)


def test_same_numbers_as_lm_evaluation_harness(model, tokenizer):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=32)
    pairs = [(item["context"], " " + choice) for item in ITEMS for choice in item["choices"]]
    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i, metadata=("test", i, 1))
        for i, pair in enumerate(pairs)
    ]
    theirs = harness.loglikelihood(instances, disable_tqdm=True)
    ours = [s for scored in score_requests(model, requests_of(ITEMS, tokenizer), 4, "test") for s in scored]
    for score, (log_likelihood, greedy) in zip(ours, theirs, strict=True):
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=2e-4)
        assert score.greedy == greedy


GOOD = {"context": "a", "choices": ["b", "c"], "answer": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"items.jsonl:3 is not JSON"),
        ("[1]", r"items.jsonl:3: an item must be a JSON object, got list"),
        (json.dumps({"question": "a"}), r"items.jsonl:3: an item needs `text`.*this one has question"),
        (json.dumps(GOOD | {"answer": 2}), r"items.jsonl:3: `answer` must be the index of a choice, 0 to 1, got 2"),
        (json.dumps(GOOD | {"answer": True}), r"items.jsonl:3: `answer` must be the index"),
        (json.dumps(GOOD | {"choices": ["b"]}), r"items.jsonl:3: `choices` must be a list of at least two strings"),
        (json.dumps(GOOD | {"choices": ["b", ["c"]]}), r"items.jsonl:3: every choice must be a string.*got \['c'\]"),
        (json.dumps(GOOD | {"context": 3}), r"items.jsonl:3: `context` must be a string, got 3"),
        (json.dumps({"context": "a", "target": ""}), r"items.jsonl:3: `target` must be a string that is not empty"),
        (json.dumps({"context": "a", "target": "b", "depth": 0.5}), r"items.jsonl:3: `length` and `depth`"),
        (json.dumps({"text": "a"}), r"items.jsonl:3: a text item, but .*items.jsonl:1 is a choice item"),
    ],
)
def test_malformed_items_are_refused_with_their_line(tmp_path, line, message):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_items(path)


def test_items_of_both_kinds_of_file(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"id": "x", "context": "\u2028"}, ensure_ascii=False))
    assert [item["id"] for item in read_items(path)] == ["1", "x"]
    as_list = tmp_path / "items.json"
    as_list.write_text(json.dumps([GOOD, GOOD]))
    assert [item["id"] for item in read_items(as_list)] == ["1", "2"]
    as_list.write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match="must hold a list of items"):
        read_items(as_list)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no items"):
        read_items(path)


def test_two_files_of_one_task_are_refused(tmp_path):
    for name in ("a.json", "a.json.json", "a.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"has a.json and a.jsonl, and both would be the task a. Rename one"):
        TaskData(str(tmp_path)).sources()


def test_items_that_cannot_be_scored_are_refused_by_name(tokenizer):
    model = make_mla()
    long = {"id": "long", "context": "the cat " * 20, "choices": ["a", "b"], "answer": 0}
    with pytest.raises(ValueError, match=r"Item long: context and continuation need .* tokens, the model takes 32"):
        measure_multiple_choice(model, tokenizer, [*ITEMS, long])
    with pytest.raises(ValueError, match="Item q: `answer` must be the index"):
        measure_multiple_choice(model, tokenizer, [GOOD | {"id": "q", "answer": 5}])
    with pytest.raises(ValueError, match="no items"):
        measure_multiple_choice(model, tokenizer, [])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        measure_multiple_choice(model, tokenizer, ITEMS, batch_size=0)
