"""The sizes of latent attention, in one object, and how its tensors are laid out.

Letters in shapes, here and in every file of the family: B batch, T query tokens, S cached tokens (new ones included),
H query heads, G key/value heads, N un-rotated key heads (G or H), n rotary key heads (1 or G), R latent size, nope and
r un-rotated and rotary dims of a head, v dims of a value, W = R + n*r numbers cached per token and layer.
"""

from dataclasses import dataclass

import torch


def heads_first(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, T, heads * dim] as [B, heads, T, dim]. Of one token both lie alike, and a view does."""
    batch, num_tokens, width = x.shape
    if num_tokens == 1:
        return x.view(batch, num_heads, 1, width // num_heads)
    return x.view(batch, num_tokens, num_heads, width // num_heads).transpose(1, 2)


def heads_last(x: torch.Tensor) -> torch.Tensor:
    """The inverse of [`heads_first`]: [B, heads, T, dim] as [B, T, heads * dim]."""
    batch, num_heads, num_tokens, dim = x.shape
    return (x if num_tokens == 1 else x.transpose(1, 2)).reshape(batch, num_tokens, num_heads * dim)


@dataclass(frozen=True)
class LatentShape:
    """
    Sizes of a layer of latent attention. The config owns it (`config.latent_shape`); fields are named as there.

    Attributes:
        num_attention_heads (`int`): H.
        num_key_value_heads (`int`): G.
        num_nope_key_heads (`int`): N.
        num_rope_key_heads (`int`): n.
        kv_lora_rank (`int`): R.
        qk_nope_head_dim (`int`): nope.
        qk_rope_head_dim (`int`): r.
        v_head_dim (`int`): v.
    """

    num_attention_heads: int
    num_key_value_heads: int
    num_nope_key_heads: int
    num_rope_key_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """Dims of an expanded query or key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rope_width(self) -> int:
        """Numbers in all rotary keys of a token, n*r."""
        return self.num_rope_key_heads * self.qk_rope_head_dim

    @property
    def width(self) -> int:
        """W, the values cached per token and layer: a latent, then the rotary keys."""
        return self.kv_lora_rank + self.rope_width

    @property
    def expanded_keys_width(self) -> int:
        """Numbers in all un-rotated keys of a token, N*nope."""
        return self.num_nope_key_heads * self.qk_nope_head_dim

    @property
    def expanded_width(self) -> int:
        """Numbers expanded from a latent: un-rotated keys, then values, N*nope + G*v."""
        return self.expanded_keys_width + self.num_key_value_heads * self.v_head_dim

    def split_queries(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Un-rotated and rotary parts [B, H, T, nope] and [B, H, T, r] of queries [B, T, H * (nope + r)]."""
        heads = heads_first(queries, self.num_attention_heads)
        q_nope, q_rope = heads.split_with_sizes([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return q_nope, q_rope

    def split(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, 1, S, R] and rotary keys [B, n, S, r] of entries as a cache has them, [B, 1, S, W]."""
        latents, rope_keys = entries.split_with_sizes([self.kv_lora_rank, self.rope_width], dim=-1)
        if self.num_rope_key_heads > 1:
            rope_keys = heads_first(rope_keys.squeeze(1), self.num_rope_key_heads)
        return latents, rope_keys

    def join(self, latents: torch.Tensor, rope_keys: torch.Tensor) -> torch.Tensor:
        """The inverse of [`split`]: entries [B, 1, S, W]."""
        if self.num_rope_key_heads > 1:
            rope_keys = heads_last(rope_keys).unsqueeze(1)
        return torch.cat((latents, rope_keys), dim=-1)

    def split_expanded(self, expanded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Un-rotated keys [B, N, S, nope] and values [B, G, S, v] of what latents expand to, [B, S, N*nope + G*v]."""
        keys, values = expanded[..., : self.expanded_keys_width], expanded[..., self.expanded_keys_width :]
        return (
            keys.unflatten(-1, (self.num_nope_key_heads, self.qk_nope_head_dim)).transpose(1, 2),
            values.unflatten(-1, (self.num_key_value_heads, self.v_head_dim)).transpose(1, 2),
        )

    def split_up_projection(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix of each un-rotated key head [N, nope, R] and value head [G, v, R], of [N*nope + G*v, R]."""
        widths = [self.expanded_keys_width, self.num_key_value_heads * self.v_head_dim]
        keys, values = weight.split_with_sizes(widths)
        return (
            keys.view(self.num_nope_key_heads, self.qk_nope_head_dim, weight.shape[1]),
            values.view(self.num_key_value_heads, self.v_head_dim, weight.shape[1]),
        )
