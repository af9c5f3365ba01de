"""Models that answer the same prompts, token by token, with the bytes of their caches."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mha2mla.common.tokenizer import check_known
from mha2mla.modeling import CACHE_ARGUMENT, cache_nbytes

from .caches import DYNAMIC
from .measures.scoring import inference


@dataclass(frozen=True)
class Answer:
    """
    An answer so far.

    Attributes:
        text (`str`): What can be read of it.
        cache_bytes (`int`): Of the whole conversation.
        cache_tokens (`int`): That these bytes hold.
    """

    text: str
    cache_bytes: int
    cache_tokens: int


@dataclass
class Speaker:
    """
    One side of a conversation.

    Attributes:
        name (`str`): For a person.
        messages (`list[dict]`): What was said, as chat templates take it.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt_ids(self) -> torch.Tensor:
        """The conversation so far in the tokenizer's chat template, [1, T]; without one, the last message as a text to
        be continued."""
        if self.tokenizer.chat_template is None:
            encoded = self.tokenizer(self.messages[-1]["content"], return_tensors="pt")
        else:
            try:
                encoded = self.tokenizer.apply_chat_template(
                    self.messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
            except TemplateError as error:
                raise ValueError(f"The chat template of {self.name} refuses the conversation: {error}") from error
        ids = encoded["input_ids"]
        if ids.shape[1] == 0:
            raise ValueError(f"The prompt has no token for {self.name}, which has no chat template: write something.")
        check_known(f"The prompt for {self.name}", int(ids.max()), self.model.config.vocab_size)
        return ids.to(self.model.device)

    def end_tokens(self) -> set[int]:
        """Any of which ends an answer."""
        ends = self.model.generation_config.eos_token_id
        several = ends if isinstance(ends, list) else [ends]
        return {token for token in (*several, self.tokenizer.eos_token_id) if token is not None}

    def answer(self, prompt: str, max_new_tokens: int) -> Iterator[Answer]:
        """
        Greedy decoding of the answer to a prompt; it joins the messages when it is complete.

        Raises:
            ValueError: If the conversation is longer than the model's context, or the prompt none that it can read.
        """
        self.messages.append({"role": "user", "content": prompt})
        ids = self.prompt_ids()
        room = self.model.config.max_position_embeddings - ids.shape[1]
        if room < 1:
            raise ValueError(
                f"The conversation has {ids.shape[1]} tokens, and {self.name} takes "
                f"{self.model.config.max_position_embeddings}. Begin a new one."
            )
        cache, ends, said, text = DYNAMIC.make(self.model), self.end_tokens(), [], ""
        for _ in range(min(max_new_tokens, room)):
            with inference(self.model):
                logits = self.model(ids, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits
            token = int(logits[0, -1].argmax())
            if token not in ends:
                said.append(token)
                text = readable(self.tokenizer.decode(said, skip_special_tokens=True))
            yield Answer(text, cache_nbytes(cache), cache.get_seq_length())
            if token in ends:
                break
            ids = torch.tensor([[token]], device=self.model.device)
        self.messages.append({"role": "assistant", "content": text})


def readable(text: str) -> str:
    """Without a last letter that is not complete yet (some tokenizers give a sign for each of its bytes), and without
    what a terminal would obey."""
    text = text.rstrip("\ufffd").replace("\t", "    ")
    return "".join(letter for letter in text if letter == "\n" or letter.isprintable())


def answer_together(speakers: list[Speaker], prompt: str, max_new_tokens: int) -> Iterator[list[Answer]]:
    """Answers of all speakers so far, a token of each at a time, until all are complete."""
    streams = [speaker.answer(prompt, max_new_tokens) for speaker in speakers]
    answers = [next(stream) for stream in streams]
    going = set(range(len(streams)))
    while going:
        yield list(answers)
        for index in sorted(going):
            following = next(streams[index], None)
            if following is None:
                going.discard(index)
            else:
                answers[index] = following
