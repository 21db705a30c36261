"""From activations of one text to what a query asks: pure functions of tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from midiscover.errors import UserError
from midiscover.saes import LoadedSae
from serve.exchange import Found, Query

ROWS = 512
"""Rows encoded at once: codes of 20,480 features take 80 KB a row."""


def answer_query(query: Query, sae: LoadedSae | None, x: Tensor) -> Found:
    """What a query finds in activations x [t, d_in]. UserError for a feature or a token that is not there."""
    codes = _codes(query, sae, x)
    if query.skip_first:
        codes[0] = 0
    if query.kind == "values" or sae is None:
        wanted = torch.tensor(query.features if sae is not None else (0,), dtype=torch.long, device=codes.device)
        if wanted.numel() and int(wanted.max()) >= codes.shape[1]:
            raise UserError(f"{query.sae} has no feature {int(wanted.max())}; it has {codes.shape[1]}.")
        return _found(*_nothing(), wanted, codes)
    nobody = torch.zeros(0, dtype=torch.long, device=codes.device)
    if query.kind == "active":
        token, feature = codes.nonzero(as_tuple=True)
        return _found(token, feature, codes[token, feature], nobody, codes)
    entries = _per_token(codes, query.k) if query.per_token else _nothing()
    return _found(*entries, _strongest(codes, query) if query.per_text else nobody, codes)


def nearest_rows(rows: Tensor, direction: Tensor, top: int, besides: int | None) -> list[tuple[int, float]]:
    """The `top` of rows [n, d] that are nearest to a direction [d], each with its cosine; row `besides` is left out."""
    found = torch.nn.functional.cosine_similarity(rows.float(), direction[None].float(), dim=1)
    if besides is not None:
        found[besides] = -2
    best = found.topk(min(top, len(found)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(row, cosine) for row, cosine in pairs if cosine > -2]


def _codes(query: Query, sae: LoadedSae | None, x: Tensor) -> Tensor:
    """[t, d_sae] float32, a tensor of its own."""
    if sae is None:
        direction = torch.tensor(query.vector, device=x.device)
        if direction.shape != x.shape[1:]:
            raise UserError(f"The vector has {len(query.vector)} numbers; '{query.hook}' has {x.shape[1]}.")
        return (x.float() @ direction)[:, None]
    return torch.cat([sae.encode(part).float() for part in x.split(ROWS)])


def _per_token(codes: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values, features = codes.topk(min(k, codes.shape[1]), dim=1)
    token, place = (values > 0).nonzero(as_tuple=True)
    return token, features[token, place], values[token, place]


def _strongest(codes: Tensor, query: Query) -> Tensor:
    """Features that fire, by their maximum or by their sum over some tokens; of equal ones the first."""
    if query.rank_at:
        if max(query.rank_at) >= len(codes) or min(query.rank_at) < 0:
            raise UserError(f"There is no token {max(query.rank_at)}; the text has {len(codes)}.")
        score = codes[list(query.rank_at)].sum(0)
    else:
        score = codes.max(0).values
    # topk does not say which of equal values it takes: one more decides by index.
    count = min(query.k, len(score))
    best = score.topk(count)
    least = best.values[-1]
    sure = (score > least).nonzero()[:, 0]
    rest = (score == least).nonzero()[: count - len(sure), 0]
    chosen = torch.cat([sure, rest])
    order = score[chosen].argsort(descending=True, stable=True)
    chosen = chosen[order]
    return chosen[score[chosen] > 0]


def _found(token: Tensor, feature: Tensor, value: Tensor, strongest: Tensor, codes: Tensor) -> Found:
    values = codes[:, strongest]
    return Found(
        token=token.int().cpu().numpy(),
        feature=feature.int().cpu().numpy(),
        value=value.float().cpu().numpy(),
        strongest=strongest.int().cpu().numpy(),
        values=np.ascontiguousarray(values.T.cpu().numpy()),
        mean=values.mean(0).cpu().numpy(),
    )


def _nothing() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(0), torch.zeros(0), torch.zeros(0)
