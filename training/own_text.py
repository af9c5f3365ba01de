"""Text that a model writes itself, for its conversion to be recovered on.

Recovery asks the original what it would say next, and its own text shows the conversion what the original says. No
data set is needed for it (Liu et al., LLM-QAT, arXiv 2305.17888). Texts begin as any page of advice might; of chats
the model writes both sides, from nothing but its template (Xu et al., Magpie, arXiv 2406.08464).
"""

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mha2mla.common.loading import load_config
from mha2mla.common.options import SEEDS, check_between, check_least

OPENINGS: Sequence[str] = (
    "How to",
    "How do I",
    "How do you",
    "How can I",
    "What should I do when",
    "What is the best way to",
    "The easiest way to",
    "Steps to",
    "Tips for",
    "Why do",
    "You will need:",
    "To",
)
TOP_P = 0.95
QUESTION_TEMPERATURE = 1.0  # nothing but the template stands before a question, so it must not be the likeliest
ROUND = 500_000  # tokens, roughly, that are written out at a time
ROOM = 512  # tokens that a chat template may put around a question
FILLED = 0.8  # of `length`, by experience: what a text has
DOCUMENT_START = "<|endoftext|>"  # between documents in pretraining, where a tokenizer puts nothing before a text


class Prompt(NamedTuple):
    """Token ids that are continued, at which temperature, and the text, if any, behind which nothing is wanted."""

    ids: list[int]
    temperature: float
    stop: str = ""


class Written(NamedTuple):
    """What was written behind a prompt, the end-of-sequence token included, and whether it ended by itself."""

    ids: list[int]
    ended: bool


Writer: TypeAlias = Callable[[list[Prompt]], Sequence[Written]]


@dataclass(frozen=True)
class OwnTextConfig:
    """
    What is written.

    Args:
        tokens (`float`, *optional*, defaults to 20e6): To be written, roughly.
        chats (`float`, *optional*): Share of the texts that are chats; by default 0.3, or 0 without a chat template.
        length (`int`, *optional*, defaults to 320): Tokens of a text, and of each side of a chat, at most.
        temperature (`float`, *optional*, defaults to 0.8): Of texts and answers; questions have 1.
        openings (`Sequence[str]`, *optional*): With what texts begin.
        seed (`int`, *optional*, defaults to 0): Of what is drawn.
    """

    tokens: float = 20e6
    chats: float | None = None
    length: int = 320
    temperature: float = 0.8
    openings: Sequence[str] = OPENINGS
    seed: int = 0

    def __post_init__(self):
        check_least(self, tokens=1, length=1)
        check_between(self, seed=SEEDS, chats=(0, 1))
        for name in ("tokens", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number above 0.")
        if not self.openings or not all(opening.strip() for opening in self.openings):
            raise ValueError("There must be openings, and none may be empty.")

    def share_of_chats(self, tokenizer: PreTrainedTokenizerBase) -> float:
        """
        Raises:
            ValueError: If chats are asked for that the tokenizer has no template for.
        """
        if self.chats is None:
            return 0.3 if tokenizer.chat_template else 0.0
        if self.chats > 0 and not tokenizer.chat_template:
            raise ValueError(f"chats={self.chats}: the tokenizer has no chat template. Give 0, for a base model.")
        return self.chats


def first_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """What stands before a text when the model reads it, and whether the tokenizer puts it there."""
    bare, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    if whole[: len(bare)] != bare:
        return whole[: whole.index(bare[0])], True
    vocabulary = tokenizer.get_vocab()
    starts = (DOCUMENT_START, tokenizer.bos_token, tokenizer.eos_token)
    return [vocabulary[start] for start in starts if start in vocabulary][:1], False


def render(tokenizer: PreTrainedTokenizerBase, question: str, answered: bool, thinking: bool = True) -> str:
    """A chat of one question, and what the template puts before the answer, if that is to follow. Without `thinking`,
    templates that know `enable_thinking` (Qwen3's) are asked for none; others pass over it."""
    chat = [{"role": "user", "content": question}]
    how = {} if thinking else {"enable_thinking": False}
    try:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=answered, tokenize=False, **how)
    except TemplateError as error:
        raise ValueError(f"The chat template refuses a single question: {error} Give chats=0.") from error


def around_question(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts before a user's first message, and the text behind which that has ended. A space
    before the message belongs to its first word."""
    marker = "\x00"
    head, ends = "", []
    for answered in (False, True):
        head, _, end = render(tokenizer, marker, answered).partition(marker)
        ends.append(end.strip())
    return head.rstrip(" "), ends[0] or ends[1]


def without(ids: list[int], start: list[int]) -> list[int]:
    return ids[len(start) :] if ids[: len(start)] == start else ids


def end_question(tokenizer: PreTrainedTokenizerBase, written: Written, end: str) -> str:
    """A question up to where the template ends it, or the model; "" where neither did."""
    text = tokenizer.decode(written.ids)
    if end and end in text:
        return text.partition(end)[0].strip()
    return tokenizer.decode(written.ids, skip_special_tokens=True).strip() if written.ended else ""


def write_own_text(
    tokenizer: PreTrainedTokenizerBase, write: Writer, config: OwnTextConfig
) -> Iterator[tuple[list[str], int]]:
    """
    Write texts in rounds: openings continued, questions, and answers to the questions of the round before, so that few
    wait for the longest.

    Args:
        write (`Callable`): Continues a list of [`Prompt`], in their order, with at most `config.length` tokens each.

    Yields:
        The texts of a round, chats with the markers of their template as they are, and how many tokens have been
        written. What did not end by itself is kept, cut off; a question that did not, or is empty, is left out.
    """
    chats, draw = config.share_of_chats(tokenizer), random.Random(config.seed)
    start, given = first_ids(tokenizer)
    head, end = around_question(tokenizer) if chats > 0 else ("", "")
    asking = Prompt(tokenizer(head, add_special_tokens=False)["input_ids"], QUESTION_TEMPERATURE, end)
    questions: list[str] = []
    num_written = 0
    while num_written < config.tokens or questions:
        count = math.ceil(min(ROUND, max(0, config.tokens - num_written)) / (FILLED * config.length))
        num_questions = round(count * chats)
        openings = [draw.choice(config.openings) for _ in range(count - num_questions)]
        bodies = [tokenizer(opening, add_special_tokens=False)["input_ids"] for opening in openings]
        # Thoughts rarely end within `length`, so that every second answer is to be without.
        heads = [render(tokenizer, question, True, index % 2 == 0) for index, question in enumerate(questions)]
        answered = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in heads]
        prompts = [Prompt([*start, *body], config.temperature) for body in bodies]
        prompts += [Prompt(body, config.temperature) for body in answered]
        prompts += [asking] * num_questions
        written = write(prompts)
        first, num_written = num_written == 0, num_written + sum(len(one.ids) for one in written)
        # What the tokenizer puts before every text would stand there twice when it reads this one.
        begun = [*bodies, *(without(body, start) if given else body for body in answered)]
        texts = [tokenizer.decode([*body, *one.ids]) for body, one in zip(begun, written, strict=False)]
        asked = [end_question(tokenizer, one, end) for one in written[len(begun) :]]
        questions = [question for question in asked if question]
        if num_written == 0 or (first and num_questions > 0 and not questions):
            raise ValueError("The model wrote nothing, or no question that ended. Give a larger length, or chats=0.")
        draw.shuffle(texts)
        yield texts, num_written


def vllm_writer(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    config: OwnTextConfig,
    cache_gib: float | None = None,
    trust_remote_code: bool = False,
) -> Writer:
    """
    A writer by vLLM, in bfloat16.

    Args:
        cache_gib (`float`, *optional*): GiB of its cache, where others use the GPU, too; by default what is free.
    """
    context = load_config(model, "model", trust_remote_code).get_text_config().max_position_embeddings
    needed = 2 * config.length + ROOM
    if needed > context:
        raise ValueError(
            f"length={config.length}: a chat may have {needed} tokens, and the context of {model} has {context}. Give "
            f"{(context - ROOM) // 2} or less."
        )
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # errors of another process are far from their cause
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # which compiles at the first use of top_p
    from vllm import LLM, SamplingParams  # takes seconds

    # With a size of its own for the cache, what else has to be free at the start is next to nothing.
    memory = (
        {} if cache_gib is None else dict(kv_cache_memory_bytes=int(cache_gib * 2**30), gpu_memory_utilization=0.05)
    )
    llm = LLM(
        model=model,
        dtype="bfloat16",
        seed=config.seed,
        max_model_len=needed,
        max_num_seqs=1024,
        trust_remote_code=trust_remote_code,
        **memory,
    )
    start, _ = first_ids(tokenizer)  # where a model writes that, another document begins

    def write(prompts: list[Prompt]) -> list[Written]:
        ids = [{"prompt_token_ids": prompt.ids} for prompt in prompts]
        sampling = [
            SamplingParams(
                temperature=prompt.temperature,
                top_p=TOP_P,
                max_tokens=config.length,
                stop_token_ids=start[-1:],
                stop=[prompt.stop] if prompt.stop else [],
                include_stop_str_in_output=True,
                skip_special_tokens=False,
            )
            for prompt in prompts
        ]
        outputs = [output.outputs[0] for output in llm.generate(ids, sampling, use_tqdm=False)]
        return [
            Written([i for i in output.token_ids if i not in start], output.finish_reason == "stop")
            for output in outputs
        ]

    return write
