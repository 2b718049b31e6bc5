"""A plain transcription of the paper's equations for multi-head attention: per-token head sums, np.polyfit for each
output dimension, no covariance tricks. It is slow and needs memory in proportion to tokens x heads x hidden size.

Tests hold the package against it, and ``slimllm benchmark`` measures how much faster the package is.
"""

import numpy as np
import torch
from torch import nn


@torch.no_grad()
def prune(model, ids, pruning_ratio, pruned_layers, alpha, keep_lowest=0.01):
    """Prunes a Llama model in place. Returns (cosines [L], {layer: (kept heads, kept channels)})."""
    layers = model.model.layers
    states = []  # input of each layer, then the output of the last

    def remember(layer, args, kwargs, output):
        states.append(args[0] if args else kwargs["hidden_states"])
        if layer is layers[-1]:
            states.append(output)

    hooks = [layer.register_forward_hook(remember, with_kwargs=True) for layer in layers]
    model.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    cosine = [torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in zip(states, states[1:])]
    chosen = np.argsort(-np.array(cosine), kind="stable")[:pruned_layers]
    weights = np.exp(alpha * np.array(cosine)[chosen])
    ratios = dict(zip(chosen.tolist(), pruning_ratio * pruned_layers * weights / weights.sum()))

    hidden, kept = states[0], {}
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    for index, layer in enumerate(layers):
        if index in ratios:
            normed = layer.input_layernorm(hidden)
            heads = prune_heads(layer.self_attn, normed, rotary, ratios[index])
            after = hidden + layer.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
            channels = prune_channels(layer.mlp, layer.post_attention_layernorm(after), ratios[index], keep_lowest)
            kept[index] = heads, channels
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
    return cosine, kept


def similarity(head_outputs, keep, full):
    """Sum over output dimensions of |Pearson correlation over tokens|; head_outputs [H, T, D], full [T, D]."""
    kept = head_outputs[keep].sum(0)
    kept, full = kept - kept.mean(0), full - full.mean(0)
    return ((kept * full).sum(0) / (kept.norm(dim=0) * full.norm(dim=0))).abs().sum().item()


def prune_heads(attention, normed, rotary, ratio):
    x = {}
    hook = attention.o_proj.register_forward_hook(lambda _, args, output: x.update(x=args[0].flatten(0, 1), y=output.flatten(0, 1)))
    attention(normed, position_embeddings=rotary, attention_mask=None)
    hook.remove()
    width, heads = attention.head_dim, attention.o_proj.in_features // attention.head_dim
    weight = attention.o_proj.weight
    outputs = torch.stack([x["x"][:, i * width : (i + 1) * width] @ weight[:, i * width : (i + 1) * width].T for i in range(heads)])
    full = outputs.sum(0)
    scores = [similarity(outputs, [j for j in range(heads) if j != i], full) for i in range(heads)]
    pruned = sorted(range(heads), key=lambda i: -scores[i])[: min(round(ratio * heads), heads - 1)]
    keep = [i for i in range(heads) if i not in pruned]
    best = similarity(outputs, keep, full)
    for head in pruned:
        tried = [similarity(outputs, [head if j == k else j for j in keep], full) for k in keep]
        if max(tried) > best:
            best = max(tried)
            keep[int(np.argmax(tried))] = head
    keep = sorted(keep)
    columns = torch.cat([torch.arange(i * width, (i + 1) * width) for i in keep])
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        slice_rows(linear, columns)
    fit_output(attention.o_proj, columns, x["x"], x["y"])
    return keep


def prune_channels(mlp, normed, ratio, keep_lowest):
    a = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    a, normed = a.flatten(0, 1), normed.flatten(0, 1)
    y = a @ mlp.down_proj.weight.T
    eigenvalues, vectors = np.linalg.eigh(np.cov(y.numpy(), rowvar=False))
    vectors, weights = torch.tensor(vectors).float(), torch.sigmoid(torch.tensor(eigenvalues / eigenvalues.mean())).float()
    norms = normed.norm(dim=0)
    score = ((mlp.down_proj.weight.T @ vectors) * weights).norm(dim=1) * a.norm(dim=0)
    score += (mlp.gate_proj.weight * norms).norm(dim=1) + (mlp.up_proj.weight * norms).norm(dim=1)
    order, size = score.argsort(), len(score)
    spared, removed = round(keep_lowest * size), round(ratio * size)
    keep = torch.cat([order[:spared], order[spared + removed :]]).sort().values
    for linear in (mlp.gate_proj, mlp.up_proj):
        slice_rows(linear, keep)
    fit_output(mlp.down_proj, keep, a, y)
    return keep.tolist()


def slice_rows(linear, rows):
    linear.weight = nn.Parameter(linear.weight[rows])
    linear.out_features = len(rows)


def fit_output(linear, columns, x, y):
    """Scales each kept weight row and adds a bias so that the pruned output fits y best, one output dimension at a time."""
    weight = linear.weight[:, columns]
    pruned = (x[:, columns] @ weight.T).numpy()
    target = y.numpy()
    fits = np.array([np.polyfit(pruned[:, d], target[:, d], 1) for d in range(target.shape[1])])
    linear.weight = nn.Parameter(weight * torch.tensor(fits[:, :1], dtype=weight.dtype))
    linear.bias = nn.Parameter(torch.tensor(fits[:, 1], dtype=weight.dtype))
    linear.in_features = len(columns)
