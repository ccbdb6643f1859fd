"""ATTEMPT's and CrossPT's prompts in float64 NumPy: one example at a time, one candidate after
another, as the formulas are written. What the vectorised methods are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Numbers = Mapping[str, np.ndarray]


def pooled(embedding: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """[H] the largest value of every feature over the embeddings of the tokens that are real."""
    real = [np.asarray(embedding[token], np.float64) for token in tokens if token != 0]
    return np.array([max(vector[h] for vector in real) for h in range(embedding.shape[1])])


def largest(prompt: np.ndarray) -> np.ndarray:
    """[H] of a prompt [P, H]: the largest value of every feature over its rows."""
    return np.array([max(row[h] for row in prompt) for h in range(prompt.shape[1])])


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def softmax(logits: Sequence[float] | np.ndarray) -> np.ndarray:
    powers = [np.exp(logit - max(logits)) for logit in logits]
    return np.array([power / sum(powers) for power in powers])


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """torch's: mean taken off, divided by the deviation (of n, not n - 1), epsilon 1e-5."""
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + bias


def attention_net(net: Numbers, group: int, x: np.ndarray) -> np.ndarray:
    """[H] what the net of a group makes of a pooled text: LN(W_up silu(W_down x))."""
    if "linear" in net:
        made = x @ net["linear"][group]
    else:
        narrow = x @ net["down"][group]
        made = np.array([value * sigmoid(value) for value in narrow]) @ net["up"][group]
    return layer_norm(made, net["norm_scale"][group], net["norm_bias"][group])


# --- ATTEMPT -------------------------------------------------------------------------------------


def attempt(
    method: Any, params: Numbers, group: int, row: int, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The weights [P, C] of every prompt row (rows are alike but for 'token'), and the prompt
    [P, H] of one example.

    Args:
        method: the settings `attention`, `temperature`, `attend_target`.
        params: of the whole bank.
        group, row: of the example.
        x: [H] its pooled text.
    """
    wide = {name: np.asarray(value, np.float64) for name, value in params.items()}
    target = wide["target"][row]
    candidates = [*wide["sources"], *([target] if method.attend_target else [])]
    weights = []
    for i in range(len(target)):
        logits = []
        for candidate in candidates:
            compared = candidate[i] if method.attention == "token" else largest(candidate)
            if method.attention == "constant":
                logits.append(0.0)
            elif method.attention == "dot":
                logits.append(compared @ x)
            else:
                logits.append(compared @ attention_net(wide, group, x) / method.temperature)
        weights.append(softmax(logits))
    prompt = target.copy()
    for i in range(len(target)):
        for j, candidate in enumerate(candidates):
            prompt[i] += weights[i][j] * candidate[i]
    return np.stack(weights), prompt


# --- CrossPT -------------------------------------------------------------------------------------


def reparametrised(params: Numbers, name: str) -> np.ndarray:
    """The prompts `name` [..., P, H]: as they are, or what their own two layers make of them."""
    prompts = np.asarray(params[name], np.float64)
    if f"{name}_kernel_in" not in params:
        return prompts
    kernel_in, bias_in, kernel_out, bias_out = (
        np.asarray(params[f"{name}_{part}"], np.float64)
        for part in ("kernel_in", "bias_in", "kernel_out", "bias_out")
    )
    made = np.zeros_like(prompts)
    for at in np.ndindex(prompts.shape[:-2]):
        hidden = np.maximum(prompts[at] @ kernel_in[at] + bias_in[at], 0)
        made[at] = hidden @ kernel_out[at] + bias_out[at]
    return made


def relaxed_bernoulli(logit: Any, uniform: Any, temperature: float) -> np.ndarray:
    """A draw between 0 and 1 from a uniform one."""
    return sigmoid((logit + np.log(uniform) - np.log1p(-uniform)) / temperature)


def selected(scores: np.ndarray, k: int | None) -> list[int]:
    """The indices of the k largest scores in the order of the sources; of equals, the first."""
    by_size = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return sorted(by_size[: k or len(scores)])


def crosspt_weights(
    method: Any,
    params: Numbers,
    group: int,
    row: int,
    x: np.ndarray | None = None,
) -> np.ndarray:
    """[S] the weight of each source where nothing is drawn.

    Args:
        method: the settings `router`, `normalise`, `top_k`, `temperature`.
        params: of the whole bank.
        group, row: of the example.
        x: [H] its pooled text, for the attention router.
    """
    sources = reparametrised(params, "sources")[group]
    wide = {
        name: np.asarray(value, np.float64)
        for name, value in params.items()
        if name in ("router", "down", "up", "norm_scale", "norm_bias")
    }
    if method.router == "uniform":
        scores = np.array([1 / len(sources) for _ in sources])
    elif method.router == "attention":
        assert x is not None
        h = attention_net(wide, group, x)
        scores = softmax([largest(s) @ h / method.temperature for s in sources])
    elif method.router == "softmax":
        scores = softmax(wide["router"][row])
    else:
        scores = sigmoid(wide["router"][row])
    chosen = selected(scores, method.top_k)
    total = sum(scores[j] for j in chosen)
    released = softmax([wide["router"][row][j] for j in chosen]) if "router" in wide else None
    weights = np.zeros(len(sources))
    for at, j in enumerate(chosen):
        if method.router == "relaxed_bernoulli" and method.normalise == "softmax":
            assert released is not None
            weights[j] = released[at]
        elif method.router == "relaxed_bernoulli":
            weights[j] = scores[j] / (total + 1e-8)
        elif method.router == "sigmoid":
            weights[j] = scores[j]
        else:
            weights[j] = scores[j] / total
    return weights


def crosspt(
    method: Any,
    params: Numbers,
    group: int,
    row: int,
    weights: np.ndarray,
    private_length: int | None = None,
) -> np.ndarray:
    """The prompt [P, H] of one example, where nothing is drawn.

    Args:
        method: the settings `compose_by`, `share`, `top_k`.
        params: of the whole bank.
        group, row: of the example.
        weights: [S] of the sources; those that top_k left out are zero.
        private_length: how many rows of the private prompt are the run's own; None for all.
    """
    if method.compose_by == "private":
        return reparametrised(params, "private")[row]
    sources = reparametrised(params, "sources")[group]
    pieces = [weight * source for weight, source in zip(weights, sources, strict=True)]
    soft = np.sum(pieces, axis=0)
    if method.compose_by == "sum":
        return soft
    if method.compose_by == "cat":
        count = method.top_k or len(sources)
        kept = np.flatnonzero(weights)
        assert len(kept) == count
        return np.concatenate([pieces[j] for j in kept])
    private = reparametrised(params, "private")[row][:private_length]
    if method.compose_by == "private_product":
        return soft * private
    if method.compose_by == "private_cat":
        return np.concatenate([soft, private])
    assert method.compose_by == "private_sum"
    if method.share == "add":
        return soft + private
    share = sigmoid(params["share"][row]) if method.share == "learned" else method.share
    return (1 - share) * soft + share * private
