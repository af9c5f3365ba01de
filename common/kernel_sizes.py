"""Inference engines, and the sizes of latent attention that their kernels are made for (measured or read:
docs/dev/serving.md)."""

from dataclasses import dataclass

KERNEL_RANKS = (256, 512)  # latents on a GPU; on a CPU, and in SGLang, the last
KERNEL_ROPE_DIM = 64
KERNEL_HEAD_DIM = 128  # of un-rotated keys, and of values


@dataclass(frozen=True)
class Engine:
    """
    Attributes:
        title (`str`): For a person.
        kernel_ranks (`tuple[int, ...]`): Latents that its kernels are made for, with 64 rotary dims and heads of at
            most 128, the largest first; empty if it takes any size.
        knows_step (`bool`): Whether it has yarn's step, see [`RopeTable`].
    """

    title: str
    kernel_ranks: tuple[int, ...] = ()
    knows_step: bool = True


ENGINES = {
    "transformers": Engine("transformers"),
    "vllm": Engine("vLLM on a GPU", (512, 256)),
    "vllm-cpu": Engine("vLLM on a CPU", (512,)),
    "sglang": Engine("SGLang", (512,)),
    "llama.cpp": Engine("llama.cpp", knows_step=False),
}
