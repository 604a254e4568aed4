"""What frozen features say about classes: logistic regression and nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

_MOST_STEPS = 500


def linear_probe(train: Tensor, labels: Tensor, dev: Tensor, classes: int) -> Tensor:
    """Classes that multinomial logistic regression gives, fitted by L-BFGS until it stands still.

    It minimises the summed cross-entropy plus half the squared norm of the weights; the bias is free. Features are
    taken as they are.

    Args:
        train: float64 [n, features].
        labels: int64 [n], below `classes`.
        dev: float64 [m, features].
        classes: at least 2.
    Returns:
        int64 [m].
    """
    weight = torch.zeros(classes, train.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_MOST_STEPS, tolerance_grad=1e-5, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(train @ weight.T + bias, labels, reduction="sum") + 0.5 * (weight**2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return (dev @ weight.T + bias).argmax(-1)


def nearest_neighbours(train: Tensor, labels: Tensor, dev: Tensor, classes: int, k: int = 10) -> Tensor:
    """Classes of the majority among the k rows of the largest cosine; the lowest class wins a tie.

    Args:
        train: float64 [n, features].
        labels: int64 [n], below `classes`.
        dev: float64 [m, features].
        classes: how many.
        k: neighbours, as many as there are at most.
    Returns:
        int64 [m].
    """
    near = (normalize(dev) @ normalize(train).T).topk(min(k, train.shape[0]), dim=-1).indices
    votes = torch.zeros(dev.shape[0], classes, dtype=torch.int64)
    votes.scatter_add_(1, labels[near], torch.ones_like(near))
    return votes.argmax(-1)
