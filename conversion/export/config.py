"""What the user chooses for an export."""

from dataclasses import dataclass, field
from typing import Literal

from mha2mla.common.kernel_sizes import KERNEL_RANKS
from mha2mla.common.options import settle_types, shard_bytes

CPU_BLOCK = 32  # numbers that llama.cpp's CPU code takes at a time (64 with AVX-512); what is left over goes singly
# Types of weights that each format can hold, the first being what `auto` makes of any other.
DTYPES = {
    "deepseek-v3": ("bfloat16", "float32"),
    "gguf": ("bfloat16", "float16", "float32", "q8_0"),
    "mla-llama": ("bfloat16", "float16", "float32"),
}


@dataclass
class ExportConfig:
    """Options of an export."""

    format: Literal["deepseek-v3", "gguf", "mla-llama"] = field(
        default="deepseek-v3",
        metadata={
            "help": "deepseek-v3: a folder for transformers, vLLM and SGLang; gguf: a file for llama.cpp; mla-llama: "
            "from such a folder back to our family, to train it further."
        },
    )
    pad: int | None = field(
        default=None,
        metadata={
            "help": "Pad with zeros. Exact, but the cache grows. deepseek-v3: to the sizes of GPU kernels, with this "
            "latent, 256 or 512; 64 rotary dims; heads of 128 + 64 and 128. gguf: to whole blocks of 32, which "
            "is faster on a CPU, with this latent."
        },
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32", "q8_0"] = field(
        default="auto", metadata={"help": "Type of the weights; auto: the model's, if the format has it."}
    )
    max_shard_size: str = field(default="2GB", metadata={"help": "Largest weights file; bounds the memory needed."})
    overwrite: bool = field(default=False, metadata={"help": "Replace OUTPUT if an earlier export made it."})

    def __post_init__(self):
        settle_types(self)
        shard_bytes(self.max_shard_size)
        if self.format not in DTYPES:
            raise ValueError(f"format={self.format!r} must be one of {', '.join(DTYPES)}.")
        if self.dtype not in ("auto", *DTYPES[self.format]):
            reason = ""
            if (self.format, self.dtype) == ("deepseek-v3", "float16"):
                reason = " What makes the stock norm on latents do nothing is too small for float16."
            raise ValueError(
                f"dtype={self.dtype!r} with format={self.format!r} must be one of auto, "
                f"{', '.join(DTYPES[self.format])}.{reason}"
            )
        if self.pad is None:
            return
        if self.format == "mla-llama":
            raise ValueError(f"pad={self.pad} is for engines; format='mla-llama' takes padding away.")
        if self.format == "deepseek-v3" and self.pad not in KERNEL_RANKS:
            raise ValueError(f"pad={self.pad!r} must be one of {', '.join(map(str, KERNEL_RANKS))}.")
        if self.format == "gguf" and (self.pad < 1 or self.pad % CPU_BLOCK):
            raise ValueError(f"pad={self.pad} must be a multiple of {CPU_BLOCK} with format='gguf'.")
