"""Multi-head latent attention as pure tensor functions: rotation, expansion, and absorbed decoding.

The letters in shapes are those of `latent_shape.py`.
"""

from collections.abc import Callable
from typing import Any

import torch

from .latent_shape import LatentShape, heads_last

# The absorbed path holds the scores [B, H, T, S]. Decoding and speculative decoding ask for a handful of query tokens;
# for more (chunked prefill) the expanded path and its fused kernels are the better choice whatever the count says.
MAX_ABSORBED_QUERY_TOKENS = 64


def default_rope_frequencies(shape: LatentShape, head_dim: int) -> torch.Tensor:
    """Frequency index of each rotary pair before a conversion sets it, [n, r/2]: the highest ones, in turn, of the
    `head_dim / 2` in the model's rotary table."""
    pairs = torch.arange(shape.qk_rope_head_dim // 2) % (head_dim // 2)
    return pairs.repeat(shape.num_rope_key_heads, 1)


def rotary_table(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    The tables of transformers as one, from which every layer picks by one operation.

    Args:
        cos, sin (`torch.Tensor`): For all frequencies, [B, T, head_dim], their halves being equal.

    Returns:
        [B, T, 4, head_dim/2]: the cosine of both dims of a pair, then the sine, with the sign that the pair's other
        dim comes in with.
    """
    half, dtype = cos.shape[-1] // 2, cos.dtype
    wide = torch.promote_types(dtype, torch.float32)  # autocast to one type of 16 bits does not stack the other
    cos, sin = cos[..., :half].to(wide), sin[..., :half].to(wide)
    return torch.stack((cos, cos, -sin, sin), dim=2).to(dtype)


def select_frequencies(table: torch.Tensor, rope_frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pick from the model's full rotary table the frequencies that a layer's rotary keys use.

    Args:
        table (`torch.Tensor`): Of all frequencies, [B, T, 4, head_dim/2], from [`rotary_table`].
        rope_frequencies (`torch.Tensor`): Frequency index of each rotary pair, [n, r/2], in [0, head_dim/2).

    Returns:
        cos and signed sin of shape [B, n, T, r].
    """
    n, half = rope_frequencies.shape
    batch, num_queries = table.shape[:2]
    picked = table.index_select(-1, rope_frequencies.flatten())  # [B, T, 4, n*r/2]
    if n == 1:
        picked = picked.view(batch, 1, num_queries, 4 * half)
    else:
        picked = picked.unflatten(-1, (n, half)).permute(0, 3, 1, 2, 4).flatten(3)
    cos, sin = picked.chunk(2, dim=-1)
    return cos, sin


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Apply RoPE: pair j of x is the dims (j, j + r/2).

    Args:
        x (`torch.Tensor`): Queries or keys, [B, heads, T, r]; heads is a multiple of n and grouped by rotary key head.
        cos, sin (`torch.Tensor`): [B, n, T, r] from [`select_frequencies`], the first half of the sines negative.

    Returns:
        The rotated x, [B, heads, T, r].
    """
    n, half = cos.shape[1], cos.shape[-1] // 2
    if n > 1:
        x, cos, sin = x.unflatten(1, (n, -1)), cos.unsqueeze(2), sin.unsqueeze(2)  # [B, n, heads/n, T, r]
    rotated = x * cos + x.roll(half, -1) * sin
    return rotated.flatten(1, 2) if n > 1 else rotated


def rotate_both(
    queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`rotate`] of queries [B, H, T, r] and keys [B, n, T, r]. A shared key is one head more, so that an eager
    decoding step, which waits for the host, launches half as much; a compiler fuses them as they are."""
    if keys.shape[1] > 1 or torch.compiler.is_compiling():
        return rotate(queries, cos, sin), rotate(keys, cos, sin)
    rotated = rotate(torch.cat((queries, keys), dim=1), cos, sin)
    queries, keys = rotated.split_with_sizes([queries.shape[1], 1], dim=1)
    return queries, keys


def repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Repeat each head of x [B, heads, S, dim] so that there are `num_heads`; a multiple of heads."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def expand_keys_values(
    expanded: torch.Tensor, rope_keys: torch.Tensor, shape: LatentShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Full keys and values from what `kv_b_proj` makes of the latents.

    Args:
        expanded (`torch.Tensor`): [B, S, N*nope + G*v], un-rotated keys before values.
        rope_keys (`torch.Tensor`): Rotated keys, [B, n, S, r].

    Returns:
        Keys [B, N, S, nope + r] and values [B, N, S, v].
    """
    nope, values = shape.split_expanded(expanded)
    keys = torch.cat((nope, repeat_heads(rope_keys, shape.num_nope_key_heads)), dim=-1)
    return keys, repeat_heads(values, shape.num_nope_key_heads)


def absorbed_costs_less(num_queries: int, num_cached: int, shape: LatentShape) -> bool:
    """
    Whether absorbed attention needs fewer multiplications than expanding the whole history.

    Expanded: S*R*(N*nope + G*v) to expand, T*H*S*(nope + r + v) to attend.
    Absorbed: T*H*R*(nope + v) to move queries and outputs through the up-projections, T*H*S*(W + R) to attend.
    """
    query_heads = num_queries * shape.num_attention_heads
    expand = num_cached * shape.kv_lora_rank * shape.expanded_width
    attend_expanded = query_heads * num_cached * (shape.qk_head_dim + shape.v_head_dim)
    absorb = query_heads * shape.kv_lora_rank * (shape.qk_nope_head_dim + shape.v_head_dim)
    attend_absorbed = query_heads * num_cached * (shape.width + shape.kv_lora_rank)
    return absorb + attend_absorbed < expand + attend_expanded


def add_mask(scores: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Hide what queries must not see, whichever form of mask the attention implementation in use was given.

    Args:
        scores (`torch.Tensor`): [B, H, T, S].
        attention_mask (`torch.Tensor`, *optional*): sdpa's boolean or eager's additive mask, [B, 1, T, >= S]; or flash
            attention's padding mask [B, S], for which causality is added here, as it is for no mask at all: the T
            queries are then the last T of the S tokens.
    """
    num_queries, num_cached = scores.shape[-2:]
    hidden = torch.finfo(scores.dtype).min
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = attention_mask[..., :num_cached]
        if attention_mask.dtype == torch.bool:
            return scores.where(attention_mask, hidden)
        return scores + attention_mask
    if num_queries > 1:
        visible = torch.ones(num_queries, num_cached, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~visible.tril(num_cached - num_queries), hidden)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[:, None, None, -num_cached:].bool(), hidden)
    return scores


def first_visible(attention_mask: Any, num_tokens: int) -> torch.Tensor | None:
    """
    Where the text of each row begins, behind padding on the left: the first entry that the last query sees.

    Args:
        attention_mask (*optional*): Of a prompt, in any form that [`add_mask`] knows, or flex attention's.
        num_tokens (`int`): T, of the prompt.

    Returns:
        Positions [B] (or [1], of a mask for all rows), or None where every text begins at 0, or while a step is being
        compiled, which cannot ask.
    """
    if attention_mask is None or torch.compiler.is_compiling():
        return None
    if not isinstance(attention_mask, torch.Tensor):
        rows = torch.arange(attention_mask.shape[0], device=attention_mask.kv_num_blocks.device)[:, None]
        tokens = torch.arange(num_tokens, device=rows.device)
        seen = attention_mask.mask_mod(rows, torch.zeros_like(rows), tokens[-1:], tokens).expand(len(rows), -1)
    elif attention_mask.dim() == 4:
        seen = attention_mask[:, 0, -1, :num_tokens]
        seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    else:
        seen = attention_mask[:, -num_tokens:].bool()
    positions = seen.int().argmax(-1)
    return positions if positions.any() else None


def multiply_heads(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    x [B, heads, rows, K] by one matrix for each group of heads, [groups, K, L]: [B, heads, rows, L].

    `matmul` would copy the matrices for every sequence, which at a batch of 400 costs more than the attention.
    """
    batch, heads, rows, width = x.shape
    groups, _, out_width = weights.shape
    if batch == 1:
        return x.reshape(groups, heads // groups * rows, width).bmm(weights).view(1, heads, rows, out_width)
    flat = x.transpose(0, 1).reshape(groups, heads // groups * batch * rows, width).bmm(weights)
    return flat.view(heads, batch, rows, out_width).transpose(0, 1)


def absorb_query(q_nope: torch.Tensor, q_rope: torch.Tensor, w_uk: torch.Tensor, shape: LatentShape) -> torch.Tensor:
    """
    Queries that meet the cache as it lies.

    Args:
        q_nope (`torch.Tensor`): Un-rotated queries, [B, H, T, nope].
        q_rope (`torch.Tensor`): Rotated queries, [B, H, T, r].
        w_uk (`torch.Tensor`): Up-projections of keys, [N, nope, R].

    Returns:
        [B, H, T, W].
    """
    q_latent = multiply_heads(q_nope, w_uk)  # [B, H, T, R]
    n = shape.num_rope_key_heads
    if n > 1:
        # Every query head sees all rotary keys of an entry: its own slot holds the query, the others zeros.
        slots = torch.eye(n, dtype=q_rope.dtype, device=q_rope.device)
        q_rope = q_rope.unflatten(1, (n, -1)).unsqueeze(-2) * slots[:, None, None, :, None]
        q_rope = q_rope.flatten(-2).flatten(1, 2)  # [B, H, T, n*r]
    return torch.cat((q_latent, q_rope), dim=-1)


def expand_output(context: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """Values [B, T, H*v] from what heads see of the latents [B, H, T, R], by their up-projections `w_uv` [G, v, R]."""
    return heads_last(multiply_heads(context, w_uv.transpose(1, 2)))


def absorbed_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    entries: torch.Tensor,
    kv_b_weight: torch.Tensor,
    shape: LatentShape,
    scaling: float,
    attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention over the cache as it lies: the up-projections move to the query and to the output (DeepSeek-V2, arXiv
    2405.04434, section 2.1.2), which makes it multi-query attention with one key head of width W.

    Args:
        q_nope (`torch.Tensor`): Un-rotated queries, [B, H, T, nope].
        q_rope (`torch.Tensor`): Rotated queries, [B, H, T, r].
        entries (`torch.Tensor`): The cache, [B, 1, S, W]: latents, then n rotary keys of r dims.
        kv_b_weight (`torch.Tensor`): Up-projections, [N*nope + G*v, R].
        attention_mask (`torch.Tensor`, *optional*): See [`add_mask`].

    Returns:
        Output [B, T, H*v] and attention probabilities [B, H, T, S].
    """
    batch, num_heads, num_queries, _ = q_nope.shape
    w_uk, w_uv = shape.split_up_projection(kv_b_weight)
    query = absorb_query(q_nope, q_rope, w_uk, shape)  # [B, H, T, W]
    # For 16 bits on a CPU a batched product takes up to four times as long as a plain one.
    product: Callable[..., torch.Tensor] = torch.mm if batch == 1 else torch.bmm
    leading = [] if batch == 1 else [batch]
    query = query.view(*leading, num_heads * num_queries, shape.width)
    entries = entries.view(*leading, *entries.shape[2:])
    scores = product(query, entries.transpose(-2, -1)).mul_(scaling)  # [B, H*T, S]
    if attention_mask is not None or num_queries > 1:
        scores = add_mask(scores.view(batch, num_heads, num_queries, -1), attention_mask).reshape(scores.shape)
    weights = scores.softmax(dim=-1).to(q_nope.dtype)  # torch computes it in fp32
    context = product(weights, entries[..., : shape.kv_lora_rank]).view(batch, num_heads, num_queries, -1)
    return expand_output(context, w_uv), weights.view(batch, num_heads, num_queries, -1)
