"""Ranks of the right answer among many candidates, both ways at once, in bounded memory.

A candidate is never the winner of a tie: the rank of a right answer counts every wrong candidate whose score
is equal or higher. So a model that gives everything the same vector scores nothing, whatever the order of the
data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from trimtab.evaluation.embedding import check_embeddings, spans

Hubness = Literal["none", "csls", "dual_softmax"]

# Equal vectors can give dot products that differ in the last bits, depending on where in a block they stand.
# Cosines closer than this are a tie, so results do not depend on `chunk`.
TIE = 1e-6
CHUNK = 4096
CSLS_NEIGHBOURS = 10


@dataclass(frozen=True)
class Ranks:
    """Rank (1 is best) of the best right answer; 0 for a query that has none, which is not counted.

    Attributes:
        rows: (N,) of each row among the columns.
        columns: (M,) of each column among the rows.
    """

    rows: np.ndarray
    columns: np.ndarray


def rank_embeddings(
    rows: np.ndarray,
    columns: np.ndarray,
    positives: np.ndarray,
    *,
    hubness: Hubness = "none",
    logit_scale: float = 100.0,
    chunk: int = CHUNK,
) -> Ranks:
    """Rank by cosine without ever holding the (N, M) matrix.

    Args:
        rows: (N, D) unit norm.
        columns: (M, D) unit norm.
        positives: (P, 2) pairs (row, column) that belong together.
        hubness: see `hubness_offsets`.
        logit_scale: for "dual_softmax".
        chunk: memory is chunk x chunk floats, a few times over.

    Raises:
        ValueError: for positives out of range, none at all, or an unknown `hubness`.
        ModelError: when a value is not finite.
    """
    rows, columns = np.asarray(rows, np.float32), np.asarray(columns, np.float32)
    check_embeddings(rows, len(rows), "rows")
    check_embeddings(columns, len(columns), "columns")
    positives = check_positives(positives, len(rows), len(columns))
    of_rows, of_columns = hubness_offsets(rows, columns, hubness, logit_scale=logit_scale, chunk=chunk)

    best_row = np.full(len(rows), -np.inf)
    best_column = np.full(len(columns), -np.inf)
    for part in spans(len(positives), 1 << 16):
        row, column = positives[part, 0], positives[part, 1]
        cosine = np.einsum("pd,pd->p", rows[row], columns[column]).astype(np.float64)
        np.maximum.at(best_row, row, cosine - of_columns[column])
        np.maximum.at(best_column, column, cosine - of_rows[row])

    above_row = np.zeros(len(rows), np.int64)
    above_column = np.zeros(len(columns), np.int64)
    bounds = np.searchsorted(positives[:, 0], np.arange(0, len(rows) + chunk, chunk))
    for number, across in enumerate(spans(len(rows), chunk)):
        here = positives[bounds[number] : bounds[number + 1]]
        for down in spans(len(columns), chunk):
            cosine = rows[across] @ columns[down].T
            inside = here[(here[:, 1] >= down.start) & (here[:, 1] < down.stop)]
            inside = inside - (across.start, down.start)
            above_row[across] += _wrong_above(cosine, of_columns[down], best_row[across], inside)
            above_column[down] += _wrong_above(cosine.T, of_rows[across], best_column[down], inside[:, ::-1])
    return Ranks(
        np.where(np.isfinite(best_row), above_row + 1, 0),
        np.where(np.isfinite(best_column), above_column + 1, 0),
    )


def rank_similarity(similarity: np.ndarray, positives: np.ndarray) -> Ranks:
    """Rank by a given (N, M) matrix; scores are compared exactly.

    Raises:
        ValueError: for NaN, and for positives out of range or none at all.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or np.isnan(similarity).any():
        raise ValueError(f"similarity {similarity.shape} must be a matrix without NaN")
    positives = check_positives(positives, *similarity.shape)
    ranks = []
    for matrix, pairs in ((similarity, positives), (similarity.T, positives[:, ::-1])):
        best = np.full(len(matrix), -np.inf)
        np.maximum.at(best, pairs[:, 0], matrix[pairs[:, 0], pairs[:, 1]])
        above = np.count_nonzero(matrix >= best[:, None], axis=1)
        right = pairs[matrix[pairs[:, 0], pairs[:, 1]] >= best[pairs[:, 0]], 0]
        has_answer = np.bincount(pairs[:, 0], minlength=len(matrix)) > 0
        ranks.append(np.where(has_answer, above - np.bincount(right, minlength=len(matrix)) + 1, 0))
    return Ranks(*ranks)


def hubness_offsets(
    rows: np.ndarray,
    columns: np.ndarray,
    method: Hubness,
    *,
    logit_scale: float = 100.0,
    chunk: int = CHUNK,
) -> tuple[np.ndarray, np.ndarray]:
    """How much to take off the cosine of a candidate that is near to everything (a hub).

    Both methods look at the whole set of queries before they answer one, so their figures are transductive:
    they do not tell what a single query in production would find. "csls" takes off half the mean cosine with
    the 10 nearest queries (Conneau et al. 2018, arXiv:1710.04087); "dual_softmax" multiplies the softmax over
    candidates by the softmax over queries (Cheng et al. 2021, arXiv:2109.04290), here in logarithms and
    divided by twice the logit scale.

    Returns:
        (N,) for the rows as candidates and (M,) for the columns as candidates.

    Raises:
        ValueError: for an unknown method.
    """
    if method not in get_args(Hubness):
        raise ValueError(f"hubness is {method!r}; it must be one of {', '.join(get_args(Hubness))}")
    if method == "none":
        return np.zeros(len(rows)), np.zeros(len(columns))
    if method == "csls":
        return _mean_nearest(rows, columns, chunk) / 2, _mean_nearest(columns, rows, chunk) / 2
    of_rows, of_columns = _log_sum_exp(rows, columns, logit_scale, chunk)
    return of_rows / (2 * logit_scale), of_columns / (2 * logit_scale)


def nearest(
    queries: np.ndarray, candidates: np.ndarray, k: int, *, chunk: int = CHUNK
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` best candidates of each query, best first; of equal ones the earlier first.

    Args:
        queries: (N, D) unit norm.
        candidates: (M, D) unit norm.
        k: at most M are returned.
        chunk: memory is chunk x chunk floats, a few times over.

    Returns:
        positions (N, k) int64 and cosines (N, k) float32.
    """
    k = min(k, len(candidates))
    places = np.zeros((len(queries), k), np.int64)
    scores = np.zeros((len(queries), k), np.float32)
    for some in spans(len(queries), chunk):
        best_places = np.zeros((some.stop - some.start, 0), np.int64)
        best_scores = np.zeros((some.stop - some.start, 0), np.float32)
        for part in spans(len(candidates), chunk):
            cosine = queries[some] @ candidates[part].T
            place = np.broadcast_to(np.arange(part.start, part.stop), cosine.shape)
            best_scores = np.concatenate([best_scores, cosine], axis=1)
            best_places = np.concatenate([best_places, place], axis=1)
            order = np.argsort(-best_scores, axis=1, kind="stable")[:, :k]
            best_scores = np.take_along_axis(best_scores, order, axis=1)
            best_places = np.take_along_axis(best_places, order, axis=1)
        places[some], scores[some] = best_places, best_scores
    return places, scores


def check_positives(positives: np.ndarray | Sequence[tuple[int, int]], rows: int, columns: int) -> np.ndarray:
    """(P, 2) int64, each pair once, sorted.

    Raises:
        ValueError: when there are none, or one is out of range.
    """
    pairs = np.asarray(positives, np.int64).reshape(-1, 2)
    if not len(pairs):
        raise ValueError("there are no positives: nothing belongs together")
    if (pairs < 0).any() or (pairs >= (rows, columns)).any():
        raise ValueError(f"a positive is out of range: there are {rows} rows and {columns} columns")
    return np.unique(pairs, axis=0)


def _wrong_above(cosine: np.ndarray, offsets: np.ndarray, best: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Per query (first axis), wrong candidates at or above the best right one; `positives` index the block."""
    score = cosine - offsets.astype(np.float32) if offsets.any() else cosine
    bar = (best - TIE).astype(np.float32)
    above = np.count_nonzero(score >= bar[:, None], axis=1)
    query, candidate = positives[:, 0], positives[:, 1]
    right = query[score[query, candidate] >= bar[query]]
    return above - np.bincount(right, minlength=len(cosine))


def _mean_nearest(candidates: np.ndarray, queries: np.ndarray, chunk: int) -> np.ndarray:
    k = min(CSLS_NEIGHBOURS, len(queries))
    means = np.zeros(len(candidates))
    for some in spans(len(candidates), chunk):
        best = np.zeros((some.stop - some.start, 0), np.float32)
        for part in spans(len(queries), chunk):
            best = np.concatenate([best, candidates[some] @ queries[part].T], axis=1)
            best = np.partition(best, best.shape[1] - k, axis=1)[:, -k:] if best.shape[1] > k else best
        means[some] = np.sort(best, axis=1).mean(axis=1, dtype=np.float64)
    return means


def _log_sum_exp(rows: np.ndarray, columns: np.ndarray, scale: float, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Of scale * cosine, over the columns for each row (N,) and over the rows for each column (M,)."""
    # Cosines are at most 1, so exp(scale * (cosine - 1)) cannot overflow; float64 keeps the small ones.
    of_rows, of_columns = np.zeros(len(rows)), np.zeros(len(columns))
    for across in spans(len(rows), chunk):
        for down in spans(len(columns), chunk):
            terms = (rows[across] @ columns[down].T).astype(np.float64)
            terms -= 1  # in place, as a block is large
            terms *= scale
            np.exp(terms, out=terms)
            of_rows[across] += terms.sum(axis=1)
            of_columns[down] += terms.sum(axis=0)
    return np.log(np.maximum(of_rows, 1e-300)) + scale, np.log(np.maximum(of_columns, 1e-300)) + scale
