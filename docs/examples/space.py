"""A demo for the browser, as for a Space on the Hub: a model and its conversion answer side by side, with the bytes of
their caches.

    pip install gradio
    python docs/examples/space.py                        # SmolLM2-135M-Instruct, as `make demo` converts it
    python docs/examples/space.py ./my-llama my-llama-mla --device cuda

For a Space, copy this file as `app.py`, name your two models on the Hub in the last line, and list `mha2mla` in
`requirements.txt`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla.cli.chat import cache_line
from mha2mla.conversion import convert
from mha2mla.evaluation.chat import Speaker, answer_together

QUESTIONS = ["What does the for statement do in Python?", "What is a list?", "Explain what an exception is."]


def demo_models() -> tuple[Path, Path]:
    """The demo's original and its conversion, made here where `make demo` has not run."""
    from demo import QUICK, demo_config, fetch_source, write_texts

    cache, converted = Path(".cache"), Path("out/SmolLM2-135M-Instruct-MLA-calibrated")
    cache.mkdir(exist_ok=True)
    source = fetch_source(cache)
    if not converted.is_dir():
        convert(str(source), converted, demo_config(QUICK, write_texts(cache)[0]))
    return source, converted


class Pair:
    """The two models, loaded once. Every question begins a new conversation."""

    def __init__(self, original: str, converted: str, device: str = "cpu"):
        self.sides = []
        for name, path in (("Original", original), ("Converted", converted)):
            model = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
            self.sides.append((f"{name}: {Path(path).name}", model, AutoTokenizer.from_pretrained(path)))

    @property
    def titles(self) -> list[str]:
        return [title for title, _, _ in self.sides]

    def answer(self, question: str, max_new_tokens: int) -> Iterator[list[str]]:
        """Both answers so far, and under each what its cache holds: what is shown, from left to right."""
        speakers = [Speaker(*side) for side in self.sides]
        for answers in answer_together(speakers, question, max_new_tokens):
            texts = [answer.text for answer in answers]
            yield [*texts, *(cache_line(answer, answers[0]) for answer in answers)]


def page(pair: Pair):
    """The page, a `gradio.Blocks`."""
    import gradio

    with gradio.Blocks(title="Multi-head Latent Attention") as blocks:
        gradio.Markdown(
            "# Multi-head Latent Attention\nThe same question to a model and to its conversion, which caches a small "
            "latent vector per token in place of keys and values. Both answer greedily. A conversion that has not "
            "been trained yet soon repeats itself."
        )
        question = gradio.Textbox(label="Question", value=QUESTIONS[0])
        length = gradio.Slider(16, 256, value=96, step=16, label="Most tokens of an answer")
        ask = gradio.Button("Ask both", variant="primary")
        texts, caches = [], []
        with gradio.Row():
            for title in pair.titles:
                with gradio.Column():
                    texts.append(gradio.Textbox(label=title, lines=10, interactive=False))
                    caches.append(gradio.Textbox(label="Cache", interactive=False))
        gradio.Examples(QUESTIONS, question)
        gradio.on([ask.click, question.submit], pair.answer, [question, length], [*texts, *caches])
    return blocks


def main(*models: str, device: str = "cpu") -> None:
    page(Pair(*(models or map(str, demo_models())), device=device)).launch()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="The original and its conversion: folders, or names on the Hub.")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    main(*options.models, device=options.device)
