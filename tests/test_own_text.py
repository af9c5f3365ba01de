"""Text that a model writes itself, by a stand-in for the engine."""

import json

import pytest
from conftest import pico_tokenizer
from tokenizers.processors import TemplateProcessing

from mha2mla.cli.main import main
from mha2mla.training import own_text
from mha2mla.training.own_text import OwnTextConfig, Written, around_question, first_ids, write_own_text

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] == 'user' and 'w10 ' or 'w11 ' }}{{ m['content'] }} "
    "{{ eos_token }} {% endfor %}{% if add_generation_prompt %}w11 {% endif %}"
)
USER, ASSISTANT, BOS, EOS = 10, 11, 1, 2


def chat_tokenizer(adds_bos: bool):
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = TEMPLATE
    if adds_bos:
        processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
        tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


class Engine:
    """Writes w20, w21, ...; questions end, and of the rest every second."""

    def __init__(self):
        self.rounds = []

    def __call__(self, prompts):
        self.rounds.append(prompts)
        return [
            Written([20 + i % 5, 21 + i % 5, EOS], True)
            if i % 2 or prompt.ids[-1] == USER
            else Written([20 + i % 5] * 4, False)
            for i, prompt in enumerate(prompts)
        ]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_texts_questions_and_then_answers(adds_bos):
    tokenizer, engine = chat_tokenizer(adds_bos), Engine()
    config = OwnTextConfig(tokens=60, chats=0.5, length=4, openings=["w5 w6", "w7"], seed=3)
    rounds = list(write_own_text(tokenizer, engine, config))
    first, second = engine.rounds[:2]
    openings = [prompt for prompt in first if prompt.ids[-1] != USER]
    assert {tuple(prompt.ids) for prompt in openings} == {(BOS, 5, 6), (BOS, 7)}
    assert {prompt.temperature for prompt in openings} == {0.8}
    heads = [prompt for prompt in first if prompt.ids[-1] == USER]
    assert len(heads) == round(len(first) / 2)
    assert {(tuple(prompt.ids), prompt.temperature) for prompt in heads} == {((BOS, USER), 1.0)}
    # Each question that ended is answered in the next round, behind the template as the model will be asked.
    answers = [prompt.ids for prompt in second if prompt.ids[-1] == ASSISTANT]
    assert len(answers) == len(heads)
    assert all(ids[:2] == [BOS, USER] and ids[-2:] == [EOS, ASSISTANT] for ids in answers)
    texts = [text for texts, _ in rounds for text in texts]
    assert len(texts) == sum(prompt.ids[-1] != USER for prompts in engine.rounds for prompt in prompts)
    counted = sum(len(written.ids) for prompts in engine.rounds for written in Engine()(prompts))
    assert rounds[-1][1] == counted >= config.tokens
    # Read again by the tokenizer, nothing stands there twice, and the markers are tokens.
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids.count(BOS) == (1 if adds_bos or USER in ids else 0)
        assert ids[-1] == EOS or len(set(ids[-4:])) == 1
    again = write_own_text(tokenizer, Engine(), config)
    assert [texts for texts, _ in again] == [texts for texts, _ in rounds]


def test_every_second_answer_is_without_thoughts():
    tokenizer, engine = chat_tokenizer(adds_bos=False), Engine()
    tokenizer.chat_template += "{% if add_generation_prompt and enable_thinking is false %}w12 {% endif %}"
    list(write_own_text(tokenizer, engine, OwnTextConfig(tokens=60, chats=0.5, length=4, seed=3)))
    last = [prompt.ids[-1] for prompt in engine.rounds[1] if prompt.ids[-1] in (ASSISTANT, 12)]
    assert len(last) > 2 and last == [ASSISTANT if i % 2 == 0 else 12 for i in range(len(last))]


def test_without_chats():
    tokenizer, engine = pico_tokenizer(), Engine()
    tokenizer.chat_template = None
    (*_, (texts, _)) = write_own_text(tokenizer, engine, OwnTextConfig(tokens=8, length=4, openings=["w9"]))
    assert texts and all(text.startswith("w9 w2") for text in texts)
    with pytest.raises(ValueError, match=r"chats=0.1: the tokenizer has no chat template. Give 0"):
        next(write_own_text(tokenizer, engine, OwnTextConfig(chats=0.1)))


def test_a_model_that_says_nothing():
    tokenizer = chat_tokenizer(False)
    written = write_own_text(tokenizer, lambda prompts: [Written([4], False)] * len(prompts), OwnTextConfig(chats=1))
    with pytest.raises(ValueError, match=r"no question that ended. Give a larger length"):
        list(written)
    silent = write_own_text(tokenizer, lambda prompts: [Written([], True)] * len(prompts), OwnTextConfig(chats=0))
    with pytest.raises(ValueError, match="The model wrote nothing"):
        list(silent)


def test_a_question_ends_where_the_template_ends_it():
    """As with Mistral's, behind which the model would go on with the answer."""
    tokenizer = chat_tokenizer(False)
    tokenizer.chat_template = "{% for m in messages %}w8 {{ m['content'] }} w9{% endfor %}"
    assert around_question(tokenizer) == ("w8", "w9")
    asked = []

    def write(prompts):
        asked.extend(prompts)
        return [Written([20, 21, 9, 30, EOS], True)] * len(prompts)

    list(write_own_text(tokenizer, write, OwnTextConfig(tokens=20, chats=1, length=8)))
    assert asked[0].stop == "w9"
    assert [8, 20, 21, 9] in [prompt.ids for prompt in asked]


def test_a_template_that_takes_no_single_question():
    tokenizer = chat_tokenizer(False)
    tokenizer.chat_template = "{{ raise_exception('first the system') }}"
    with pytest.raises(ValueError, match=r"refuses a single question: first the system Give chats=0"):
        around_question(tokenizer)


def test_what_stands_before_a_text():
    assert first_ids(chat_tokenizer(True)) == ([BOS], True)
    assert first_ids(chat_tokenizer(False)) == ([BOS], False)
    tokenizer = pico_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})  # as SmolLM2 and Qwen have it
    assert first_ids(tokenizer) == ([tokenizer.pad_token_id], False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("own.txt",), "own.txt must end in .jsonl"),
        (("old.jsonl",), "old.jsonl exists already. Choose another name, or remove it"),
        (("own.jsonl", "--openings", "none.txt"), "none.txt"),
        (("own.jsonl", "--openings", "blank.txt"), "--openings blank.txt has no line with text"),
        (("own.jsonl", "--chats", "2"), "chats=2.0 must lie between 0 and 1"),
        (("own.jsonl", "--tokens", "0"), "tokens=0.0 must be at least 1"),
        (("own.jsonl", "--temperature", "0"), "temperature=0.0 must be a number above 0"),
        (("own.jsonl", "--cache-gib", "0"), "--cache-gib 0.0 must be above 0"),
        (("own.jsonl", "--openings", "long.txt", "--length", "4"), "has 6 tokens: shorten it"),
        (("own.jsonl",), "The text is written by vLLM: `pip install '.[vllm]'` in a checkout"),
    ],
)
def test_mistakes_show_before_the_engine_starts(save_source, tmp_path, options, message, capsys, monkeypatch):
    model = str(save_source())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.jsonl").write_text("{}\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "long.txt").write_text("w1 w2\nw1 w2 w3 w4 w5 w6\n")
    assert main(["write", model, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "own.jsonl").exists()


def test_the_command(save_source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(own_text, "vllm_writer", lambda *args: Engine())
    monkeypatch.setattr("mha2mla.cli.write.find_spec", lambda name: name)
    output = tmp_path / "new" / "own.jsonl"
    assert main(["write", str(save_source()), str(output), "--tokens", "50", "--length", "4", "--chats", "0"]) == 0
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert f"Wrote {len(texts)} texts to " in capsys.readouterr().out and len(texts) > 10
