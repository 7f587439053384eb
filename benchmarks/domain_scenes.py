"""Training pictures of scenes of their own, to hold out: what a few hundred validation pictures cannot tell.

Pictures of one product were mostly taken in a few places, one after another, so that a random part of them has its
twins among the rest. Here the pictures of each class are grouped by what the frozen base sees, and the group that is
least like the others is held out.
"""

from __future__ import annotations

import numpy as np

_SHARE = (0.12, 0.4)  # of a class's pictures, held out
_MOST_GROUPS = 9


def held_out(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which pictures (N,) are held out; none of a class that is too small or all alike.

    Args:
        features: (N, D) of unit norm.
        labels: (N,) classes.
    """
    out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        cosines = features[members] @ features[members].T
        found = [group for groups in partitions(cosines) for group in groups if _SHARE[0] <= group.mean() <= _SHARE[1]]
        if found:
            out[members[min(found, key=lambda group: float(cosines[np.ix_(group, ~group)].max(1).mean()))]] = True
    return out


def partitions(cosines: np.ndarray) -> list[list[np.ndarray]]:
    """Into 2 to `_MOST_GROUPS` groups (M,) bool each, by average linkage on cosines (M, M)."""
    groups = list(np.eye(len(cosines), dtype=bool))
    between = np.array(cosines, dtype=np.float64)
    np.fill_diagonal(between, -np.inf)
    found = []
    while len(groups) > 1:
        if len(groups) <= _MOST_GROUPS:
            found.append([group.copy() for group in groups])
        kept, gone = sorted(divmod(int(between.argmax()), len(groups)))
        sizes = groups[kept].sum(), groups[gone].sum()
        merged = (sizes[0] * between[kept] + sizes[1] * between[gone]) / sum(sizes)
        between[kept], between[:, kept] = merged, merged
        between[kept, kept] = -np.inf
        between = np.delete(np.delete(between, gone, 0), gone, 1)
        groups[kept] |= groups.pop(gone)
    return found
