"""Generated tasks of long context: what is asked is in the text, lengths are those asked for, answers are found."""

import random
import re

import pytest
from conftest import pico_tokenizer

from mha2mla.evaluation.long_tasks import TASKS
from mha2mla.evaluation.measures import generated
from mha2mla.evaluation.measures.generated import continue_greedily, measure_generated, score_answer
from mha2mla.evaluation.prompts import Example, filler, fit_length, scatter
from mha2mla.evaluation.tasks import TaskData, find_tasks
from pico import make_mla, make_source, tokens

TOKENIZER = pico_tokenizer()


def words_of(example: Example) -> int:
    return len(example.prompt.split())


def test_there_are_five_in_the_manner_of_ruler_and_the_passkey():
    assert {"passkey", "needles", "variables", "common-words", "counting", "questions"} <= TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_an_example_follows_from_its_seed_and_holds_its_answer(name):
    make = TASKS[name].make
    for seed in range(20):
        example = make(random.Random(seed), 30)
        assert example == make(random.Random(seed), 30)
        assert example.prompt == example.prompt.rstrip()  # tokenizers join a space to the next word
        assert 1 <= len(set(example.answers)) == len(example.answers)
        text = set(re.findall(r"\w+", example.prompt))
        assert all(re.fullmatch(r"\w+", answer) and answer in text for answer in example.answers)
        assert 0 <= example.chance < 0.5
        assert example.depth is None or 0 <= example.depth <= 1
    assert len({make(random.Random(seed), 30).prompt for seed in range(20)}) == 20


def test_answers_are_those_that_reading_the_text_gives():
    for seed in range(20):
        listed = TASKS["common-words"].make(random.Random(seed), 60)
        last = listed.prompt.split("Words: ")[-1].split(".")[0].split(", ")
        assert [max(set(last), key=last.count)] == [*listed.answers] and last.count(listed.answers[0]) == 30

        votes = TASKS["counting"].make(random.Random(seed), 40)
        cast = votes.prompt.split("Votes: ")[-1].split(".")[0].split(", ")
        assert max(set(cast), key=cast.count) == votes.answers[0] and len(cast) == 40

        variables = TASKS["variables"].make(random.Random(seed), 5)
        values = dict(re.findall(r"value of (\w+) is now (\d+)\.", variables.prompt))  # the last of each
        assert variables.answers == (values[variables.prompt.split()[-3]],)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [200, 900])
def test_prompts_have_the_length_asked_for(name, length):
    for seed in ("0", "1"):
        example = fit_length(TASKS[name].make, seed, length, words_of)
        assert length - 25 <= words_of(example) <= length


def test_a_length_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"smallest prompt of this task has .* tokens: 10 are too few"):
        fit_length(TASKS["passkey"].make, "0", 10, words_of)


def test_sentences_are_scattered_in_their_order():
    rng = random.Random(0)
    text, places = scatter(rng, ["First.", "Second."], filler(rng, 50))
    assert text.index("First.") < text.index("Second.") and places == sorted(places)
    assert all(0 <= place <= 1 for place in places)


@pytest.mark.parametrize(
    "continuation, answers, score",
    [
        (" 4821. The number", ("4821",), 1),
        (" 4821, 17", ("17",), 0),  # the first word alone
        ("\n 4821\n17", ("4821",), 1),
        (" 48210", ("4821",), 0),
        (" wolf, river and apple, tree", ("apple", "wolf", "tree"), 2 / 3),
        (" wolf, wolf, wolf", ("wolf", "tree"), 1 / 2),
        ("", ("wolf",), 0),
    ],
)
def test_as_many_words_count_as_there_are_answers(continuation, answers, score):
    assert score_answer(continuation, answers) == pytest.approx(score)


@pytest.mark.parametrize("make_model", [make_source, lambda: make_mla("shared"), lambda: make_mla("per-head")])
def test_prompts_in_a_batch_are_continued_as_if_alone(make_model):
    model = make_model()
    prompts = [tokens(size, seed=size).clamp(min=4).tolist() for size in (3, 9, 6)]
    together = continue_greedily(model, TOKENIZER, prompts, 5)
    assert together == [continue_greedily(model, TOKENIZER, [ids], 5)[0] for ids in prompts]
    assert len(set(together)) > 1


def long_model():
    model = make_source()
    model.config.max_position_embeddings = 200
    return model


def test_scores_by_length_and_depth(monkeypatch):
    (task,) = find_tasks(["long:passkey"], TaskData(), 4, (120, 180, 300), seed=7)
    assert [item["length"] for item in task.items] == [120] * 4 + [180] * 4 + [300] * 4
    right = {
        example.prompt: example.answers[0]
        for item in task.items[:6]  # all of the first length, half of the second
        for example in [fit_length(TASKS["passkey"].make, item["seed"], item["length"], count)]
    }

    def answer(model, tokenizer, prompts, new_tokens, cache_kind):
        return [f" {by_ids.get(tuple(ids), 'nothing')}." for ids in prompts]

    by_ids = {tuple(TOKENIZER.encode(prompt)): key for prompt, key in right.items()}
    monkeypatch.setattr(generated, "continue_greedily", answer)
    result = measure_generated(long_model(), TOKENIZER, TASKS["passkey"], task.items, batch_size=3)
    assert [(part.length, part.score) for part in result.lengths] == [(120, 1.0), (180, 0.5)]
    assert result.lengths[1].scores == [1.0, 1.0, 0.0, 0.0]
    assert result.num_too_long == 4
    assert sum(cell.num_items for cell in result.cells) == 8


def count(example: Example) -> int:
    return len(TOKENIZER.encode(example.prompt)) + generated.NEW_TOKENS


def test_mistakes_are_told():
    with pytest.raises(ValueError, match=r"Unknown task 'long:nothing': there are .*long:needles"):
        find_tasks(["long:nothing"], TaskData(), None)
    (task,) = find_tasks(["long:passkey"], TaskData(), 1, (8192,))
    with pytest.raises(ValueError, match="longer than the model's context of 200 tokens"):
        measure_generated(long_model(), TOKENIZER, TASKS["passkey"], task.items)


def test_other_lengths_or_seeds_are_other_items():
    digests = {
        find_tasks(["long:passkey"], TaskData(), 2, contexts, seed)[0].digest
        for contexts, seed in (((128,), 0), ((256,), 0), ((128,), 1), ((128,), 0))
    }
    assert len(digests) == 3
