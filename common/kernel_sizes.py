"""Sizes of latent attention that kernels of serving engines are made for (measured or read: docs/dev/serving.md)."""

KERNEL_RANKS = (256, 512)  # latents on a GPU; on a CPU, and in SGLang, the last
KERNEL_ROPE_DIM = 64
KERNEL_HEAD_DIM = 128  # of un-rotated keys, and of values
