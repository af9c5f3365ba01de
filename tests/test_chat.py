"""`mha2mla chat`: answers side by side, and one after the other."""

import io
import os
import re
from itertools import pairwise

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla.cli import chat
from mha2mla.cli.columns import Columns, width_of, wrap
from mha2mla.cli.main import main
from mha2mla.evaluation.chat import Speaker, answer_together, readable

PROMPT = "w5 w6 w7"


@pytest.fixture
def folders(save_source, calibration_file, tmp_path):
    source, out = save_source("gqa"), tmp_path / "small"
    options = ("--cache-ratio", 0.3, "--data", calibration_file, "--samples", 4, "--length", 16, "--refine-steps", 1)
    assert main(["convert", *map(str, (source, out, *options))]) == 0
    return [str(source), str(out)]


def speaker(folder: str) -> Speaker:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Speaker(folder, model, AutoTokenizer.from_pretrained(folder))


def test_answers_are_those_of_generate(folders):
    for folder in folders:
        one = speaker(folder)
        *_, last = one.answer(PROMPT, 8)
        ids = one.tokenizer(PROMPT, return_tensors="pt")["input_ids"]  # which is all that the pico template says
        tokens = one.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert last.text == one.tokenizer.decode(tokens, skip_special_tokens=True) and last.text
        assert last.cache_tokens == ids.shape[1] + len(tokens) - 1
        assert [message["role"] for message in one.messages] == ["user", "assistant"]
        *_, second = one.answer(PROMPT, 8)  # the conversation goes on
        assert second.cache_tokens > last.cache_tokens and second.cache_bytes > last.cache_bytes


def test_both_sides_grow_until_both_are_complete(folders):
    both = [speaker(folder) for folder in folders]
    steps = list(answer_together(both, PROMPT, 6))
    assert 1 < len(steps) <= 6 + 1
    for before, after in pairwise(steps):
        assert all(later.text.startswith(earlier.text) for earlier, later in zip(before, after, strict=True))
    assert [answer.text for answer in steps[-1]] == [one.messages[-1]["content"] for one in both]


def test_a_conversation_beyond_the_context_ends_in_a_sentence(folders, capsys):
    assert main(["chat", *folders, "--prompt", " ".join(["w5"] * 40)]) == 2
    assert "The conversation has 40 tokens, and" in capsys.readouterr().err


@pytest.mark.parametrize(
    "template, prompt, message",
    [
        (None, "", "The prompt has no token for"),
        (None, "w5 extra", "knows vocab_size=96 tokens"),
        ("{{ raise_exception('system first') }}", "w5", "refuses the conversation: system first"),
    ],
)
def test_what_a_model_cannot_read_is_told(template, prompt, message, folders):
    one = speaker(folders[1])
    one.tokenizer.chat_template = template
    one.tokenizer.add_tokens(["extra"])
    with pytest.raises(ValueError, match=message):
        next(one.answer(prompt, 2))


def test_a_prompt_of_half_characters_is_refused(folders, capsys):
    assert main(["chat", *folders, "--prompt", "a\udcff"]) == 2
    assert r"The prompt 'a\udcff' holds what is no character" in capsys.readouterr().err


def test_prompts_are_read_until_an_empty_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    assert list(chat.prompts(None)) == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one"))
    assert list(chat.prompts(None)) == ["one"]
    assert list(chat.prompts("this")) == ["this"]


def test_plain_output_names_both_and_their_caches(folders, capsys):
    assert main(["chat", *folders, "--prompt", PROMPT, "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    assert f"{folders[0]} (original):" in printed and f"{folders[1]}:" in printed
    before, after = (int(n.replace(",", "")) for n in re.findall(r"cache: ([\d,]+) bytes", printed))
    assert after < before and "(29.17 % per token)" in printed  # 14 of 48 values
    # The original is found by the record.
    assert main(["chat", folders[1], "--prompt", PROMPT, "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == printed


class Terminal(io.StringIO):
    """What is on a terminal, lines that have left the screen included."""

    def isatty(self) -> bool:
        return True

    def screen(self, height: int = 24) -> list[str]:
        lines, at = [""], 0
        for part in re.findall(r"\x1b\[\d*[AJ]|\n|[^\x1b\n]+", self.getvalue()):
            if part == "\n":
                at += 1
                lines += [""] * (at == len(lines))
            elif part.endswith("A") and part.startswith("\x1b"):
                up = int(part[2:-1])
                assert up < height, "above the screen"
                at -= up
            elif part == "\x1b[J":
                lines[at:] = [""]
            else:
                lines[at] += part
        return lines


def test_side_by_side_on_a_terminal(folders, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((80, 24)))
    assert main(["chat", *folders, "--prompt", PROMPT, "--max-new-tokens", "12"]) == 0
    *_, last = speaker(folders[0]).answer(PROMPT, 12)
    lines = terminal.screen()
    left = [line.split("│")[0].rstrip() for line in lines]
    assert set(wrap(last.text, 38)) <= set(left)
    assert f"cache: {last.cache_bytes:,} bytes" in left and " % per token)" in lines[-2]
    assert max(map(width_of, lines)) <= 80

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((50, 24)))
    assert main(["chat", *folders, "--prompt", PROMPT, "--max-new-tokens", "3"]) == 0
    assert "│" not in terminal.getvalue() and "(original):" in terminal.getvalue()


@pytest.mark.parametrize("ends", [(40, 40), (4, 40), (40, 0)])
def test_columns_are_longer_than_the_screen(ends):
    """Whatever is drawn in between, the end is the same as if it had been drawn once."""
    text = [" ".join(f"{side}{i}" for i in range(300)) for side in "ab"]
    terminal, once = Terminal(), Terminal()
    columns = Columns(terminal, 2, 60, 10)
    for step in range(0, 41):
        shown = [t[: 30 * min(step, end)] for t, end in zip(text, ends, strict=True)]
        columns.draw(shown, ["x", "y"])
    Columns(once, 2, 60, 10).draw(shown, ["x", "y"])
    assert terminal.screen(10) == once.screen(10)


def test_lines_are_broken_by_cells():
    assert wrap("one two three", 7) == ["one two", "three"]
    assert wrap("    return x\n  y", 40) == ["    return x", "  y"]
    assert wrap("  abcdef g", 4) == ["  ab", "cdef", "g"]
    assert wrap("abcdefghij k", 4) == ["abcd", "efgh", "ij k"]
    assert wrap("日本語です\n\nx", 4) == ["日本", "語で", "す", "", "x"]
    assert readable("Hi \ufffd\ufffd\ufffd") == "Hi "  # an emoji whose last byte is to come
    assert readable("a\x1b[2J\tb\ufffd") == "a[2J    b"  # nothing that a terminal obeys
