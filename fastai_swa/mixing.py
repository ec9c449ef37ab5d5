"""Sums of the weights of several models: their mean, model stock, and how alike their updates are.

Plain PyTorch, on state dicts of the same names and shapes; a tensor at a time, in float64. The order of the models does
not matter, to the last bit.
"""

from itertools import combinations

import torch

__all__ = ['mean_of', 'stock_of', 'stock_share', 'mean_cosine']


def mean_of(members: list[dict], rest: dict) -> dict:
    """The mean of `members`: the uniform soup (Wortsman et al. 2022, arXiv 2203.05482).

    Integers and what is no tensor have no mean: they are those of the state dict `rest`, unless all members have the
    same.
    """
    res = {}
    for name, first in members[0].items():
        values = [m[name] for m in members]
        if is_inexact(first):
            res[name] = _as(_mean([_exact(v) for v in values]), first)
        else:
            res[name] = first if _are_equal(values) else rest[name]
    return res


def stock_of(members: list[dict], anchor: dict, rest: dict, names: set[str]) -> dict:
    """Model stock (Jang et al. 2024, arXiv 2403.19522): of each tensor, t times the members' mean and 1 - t times the
    `anchor`'s, the weights before fine-tuning. t follows from how alike the members' updates of that tensor are, see
    `stock_share`. A tensor that no member has moved is the anchor's.

    - `names`: of the parameters. What else there is, and `rest`: as for `mean_of`.
    """
    res = mean_of(members, rest)
    for name in res:
        if name not in names or not is_inexact(res[name]):
            continue
        before = _exact(anchor[name])
        values = [_exact(m[name]) for m in members]
        updates = [v - before for v in values]
        if not any(update.any() for update in updates):
            res[name] = anchor[name].clone()
            continue
        share = stock_share(_mean_cosine(_products(updates)), len(members))
        res[name] = _as(share * _mean(values) + (1 - share) * before, anchor[name])
    return res


def stock_share(cosine: float, n: int) -> float:
    "t of `n` models whose updates have this mean cosine: n cos / (1 + (n - 1) cos), within [0, 1]."
    if cosine <= 0:
        return 0.0
    return min(1.0, n * cosine / (1 + (n - 1) * cosine))


def mean_cosine(members: list[dict], anchor: dict, names: set[str]) -> float:
    """The cosine between two members' updates from the `anchor`, over all parameters `names`; its mean over the pairs,
    0 where one has not moved. Near 0 they have next to nothing in common: they were trained apart.
    """
    total = torch.zeros(len(members), len(members), dtype=torch.float64)
    for name, value in anchor.items():
        if name in names and is_inexact(value):
            before = _exact(value)
            total += _products([_exact(m[name]) - before for m in members])
    return _mean_cosine(total)


def is_inexact(value) -> bool:
    "Is it a tensor of numbers that have a mean?"
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _mean(values: list) -> torch.Tensor:
    # sorted, element by element: else their order would show in the last bit
    return torch.stack(values).sort(0).values.sum(0) / len(values)


def _products(updates: list) -> torch.Tensor:
    "Of all pairs, each of a vector with itself included; shape (n, n)."
    flat = [update.flatten() for update in updates]
    res = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for i in range(len(flat)):
        for j in range(i, len(flat)):
            res[i, j] = res[j, i] = torch.dot(flat[i], flat[j])
    return res


def _mean_cosine(products: torch.Tensor) -> float:
    lengths = products.diagonal().sqrt().tolist()
    cosines = []
    for i, j in combinations(range(len(lengths)), 2):
        both = lengths[i] * lengths[j]
        cosines.append(float(products[i, j]) / both if both else 0.0)
    return sum(sorted(cosines)) / len(cosines)


def _exact(t: torch.Tensor) -> torch.Tensor:
    "In float64; complex numbers as pairs of real ones."
    t = t.detach()
    return (torch.view_as_real(t) if t.is_complex() else t).double()


def _as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    "What `_exact` made, in the dtype of `like` again."
    return torch.view_as_complex(value).to(like.dtype) if like.is_complex() else value.to(like.dtype)


def _are_equal(values: list) -> bool:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return all(torch.equal(first, v) for v in values[1:])
    return all(first == v for v in values[1:])
