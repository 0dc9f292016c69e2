"""What a layer with learned weights must compute, from the weights of the layer and of the file, in float64."""

import math

import torch

from tests import oracles
from tests.hosts.numbers import project


def biases(weights, which, heads):
    """The mediator layer's tables under the names that the oracle knows."""
    tables = {part: weights[f"mixer.{which}_bias.{part}"] for part in ("map", "row", "column")}
    grid = (tables["row"].shape[2], tables["column"].shape[2])
    out = oracles.bilinear(tables["map"], grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            out[:, :, i, j] += tables["row"][:, :, i].double() + tables["column"][:, :, j].double()
    return out.flatten(2)


def wanted_mediators(attn, method, weights, x, grid, size):
    """The output (B, N, C) of a layer of learned mediators, as in the class's formula."""

    def projected(name, module, tokens):
        own = f"projections.{name}"
        return oracles.linear(tokens, weights, own) if method.own_projections else project(module, tokens)

    query, key, value = (projected(n, getattr(attn, n), x) for n in ("to_q", "to_k", "to_v"))
    by_head = [oracles.split_heads(tokens, attn.heads) for tokens in (query, key, value)]
    out = torch.zeros_like(by_head[2])
    for h in range(attn.heads):
        scale = (query.shape[2] // attn.heads) ** -0.5
        one = [tokens[:, h : h + 1] for tokens in by_head]
        if method.maps == "heads":  # the scales stand before the maps, as their square roots on queries
            half = float(weights["log_broadcast"][h].double()) / 2
            rest = float(weights["log_aggregation"][h].double()) - half
            for i, (which, factor) in enumerate((("query_map", half), ("key_map", rest))):
                scaled = one[i] * math.exp(factor)
                one[i] = scaled + scaled @ weights[f"{which}.weight"][h].double() + weights[f"{which}.bias"][h].double()
        one.append(oracles.pool_tokens(one[0][:, 0], grid, size)[:, None])
        exponents = [0 if method.maps == "heads" else weights[n][h] for n in ("log_aggregation", "log_broadcast")]
        out[:, h : h + 1] = oracles.agent_attention(
            *one,
            scale=scale * math.exp(exponents[0]),
            broadcast_scale=scale * math.exp(exponents[1]),
            aggregation_bias=biases(weights, "aggregation", attn.heads)[h],
            broadcast_bias=biases(weights, "broadcast", attn.heads)[h].T,
        )
    mixed = oracles.join_heads(out)
    convolution = (grid, weights["mixer.dwc.weight"], weights["mixer.dwc.bias"])
    if method.convolution == "values":
        mixed = mixed + oracles.depthwise_conv(value, *convolution)
    else:
        convolved = oracles.depthwise_conv(x, *convolution)
        mixed = mixed + projected("to_v", attn.to_v, convolved) - projected("to_v", attn.to_v, 0 * convolved)
    return projected("to_out", attn.to_out[0], mixed)


def hedgehog(x):
    exponents = torch.exp(x)
    others = torch.exp(-x)
    return torch.cat([exponents / exponents.sum(-1, keepdim=True), others / others.sum(-1, keepdim=True)], -1)


def branch(weights, name, x):
    """W2 leaky_relu(layer_norm(W1 x)), LinFusion's network, by its numbered parts."""
    hidden = oracles.linear(x, weights, f"{name}.0")
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * weights[f"{name}.1.weight"].double() + weights[f"{name}.1.bias"].double()
    return oracles.linear(torch.where(normed > 0, normed, 0.01 * normed), weights, f"{name}.3")


def wanted_linear(attn, method, weights, x, grid):
    def projected(name, module, tokens):
        own = f"projections.{name}"
        return oracles.linear(tokens, weights, own) if method.own_projections else project(module, tokens)

    inputs = {"to_q": x.double(), "to_k": x.double(), "to_v": x.double()}
    if method.maps == "input":
        inputs["to_q"] = inputs["to_q"] + branch(weights, "query_map", x)
        inputs["to_k"] = inputs["to_k"] + branch(weights, "key_map", x)
    tokens = {n: projected(n, getattr(attn, n), value) for n, value in inputs.items()}
    query, key, value = (oracles.split_heads(tokens[n], attn.heads) for n in ("to_q", "to_k", "to_v"))
    if method.maps == "heads":
        for which, y in (("query_map", query), ("key_map", key)):
            weight, bias = weights[f"{which}.weight"].double(), weights[f"{which}.bias"].double()
            for h in range(attn.heads):
                y[:, h] = y[:, h] + y[:, h] @ weight[h] + bias[h]
    feature_map = hedgehog if method.feature_map == "hedgehog" else method.feature_map
    mixed = oracles.join_heads(oracles.linear_attention(query, key, value, feature_map, eps=method.eps))
    if method.convolution:
        mixed = mixed + oracles.depthwise_conv(tokens["to_v"], grid, weights["dwc.weight"], weights["dwc.bias"])
    return projected("to_out", attn.to_out[0], mixed)
