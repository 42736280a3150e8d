"""Qwen-VL's vision encoder step by step over a state dict: one head at a time, no SDPA."""

import math

import torch
import torch.nn.functional as F


def encode_ref(state, image, *, heads, pool_heads, patch, eps=1e-6):
    """One image ``[3, h, w]`` to ``[n_queries, output_dim]``."""
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    kernel = state["conv1.weight"].flatten(1)
    tokens = []
    for i in range(rows):
        for j in range(columns):
            cell = image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens.append(kernel @ cell.flatten())
    x = torch.stack(tokens) + resize(state["positional_embedding"], rows, columns)
    x = norm(state, "ln_pre", x, eps)

    layers = {key.split(".")[2] for key in state if key.startswith("transformer.")}
    for layer in range(len(layers)):
        block = f"transformer.resblocks.{layer}"
        mixed = linear(state, f"{block}.attn.in_proj", norm(state, f"{block}.ln_1", x, eps))
        width = mixed.shape[1] // (3 * heads)
        heard = []
        for head in range(heads):
            start = 3 * width * head
            q = mixed[:, start : start + width]
            k = mixed[:, start + width : start + 2 * width]
            v = mixed[:, start + 2 * width : start + 3 * width]
            heard.append(attend(q, k, v))
        x = x + linear(state, f"{block}.attn.out_proj", torch.cat(heard, dim=1))
        h = linear(state, f"{block}.mlp.c_fc", norm(state, f"{block}.ln_2", x, eps))
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + linear(state, f"{block}.mlp.c_proj", h)

    if "attn_pool.kv_proj.weight" in state:
        x = x @ state["attn_pool.kv_proj.weight"].T
    y = norm(state, "attn_pool.ln_kv", x, eps)
    table = state["attn_pool.pos_embed"]
    query = norm(state, "attn_pool.ln_q", state["attn_pool.query"], eps) + table
    key = y + resize(table, rows, columns)
    weight, bias = state["attn_pool.attn.in_proj_weight"], state["attn_pool.attn.in_proj_bias"]
    dim = weight.shape[1]
    width = dim // pool_heads
    heard = []
    for head in range(pool_heads):
        part = slice(head * width, (head + 1) * width)
        q = query @ weight[:dim][part].T + bias[:dim][part]
        k = key @ weight[dim : 2 * dim][part].T + bias[dim : 2 * dim][part]
        v = y @ weight[2 * dim :][part].T + bias[2 * dim :][part]
        heard.append(attend(q, k, v))
    out = linear(state, "attn_pool.attn.out_proj", torch.cat(heard, dim=1))
    return norm(state, "ln_post", out, eps)


def attend(q, k, v):
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x, eps):
    centred = x - x.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    return centred * scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def resize(table, rows, columns):
    """Upstream resizes in fp32 whatever the dtype, and so does this."""
    side = math.isqrt(len(table))
    if (rows, columns) == (side, side):
        return table
    planes = table.float().T.reshape(1, -1, side, side)
    planes = F.interpolate(planes, (rows, columns), mode="bicubic", align_corners=False)
    return planes.reshape(-1, rows * columns).T.to(table.dtype)
