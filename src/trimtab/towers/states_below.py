"""What lies below a cut, kept while several models of one base, or one at several settings, see the same pictures."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from trimtab.towers.layers import TowerCut

_MOST_BYTES = 1 << 30


class StatesBelow:
    """States of pictures by their pixels: what one model computed, the next one looks up.

    Nothing here is for training, whose states lie in the cache on disk.

    Args:
        most_bytes: states beyond these are computed each time.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self._known: dict[bytes, dict[str, Tensor]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    @torch.no_grad()
    def lower(self, cut: TowerCut, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `TowerCut.lower`; a picture (a row of `inputs`) that was seen at this cut is not passed again."""
        where = f"{cut.base.fingerprint} {cut.tower} {cut.site}"
        rows = len(next(iter(inputs.values())))
        keys = [_key(where, {name: one[row] for name, one in inputs.items()}) for row in range(rows)]
        found = {key: self._known[key] for key in keys if key in self._known}
        missing = {key: row for row, key in enumerate(keys) if key not in found}
        if missing:
            states = cut.lower({name: one[list(missing.values())] for name, one in inputs.items()})
            for at, key in enumerate(missing):
                # A copy: a row of a batch would keep the whole batch.
                found[key] = {name: one[at].clone() for name, one in states.items()}
                size = sum(one.nbytes for one in found[key].values())
                if self._bytes + size <= self.most_bytes:
                    self._known[key] = found[key]
                    self._bytes += size
        return {name: torch.stack([found[key][name] for key in keys]) for name in found[keys[0]]}


def _key(where: str, row: dict[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(where.encode(), digest_size=20)
    for name, one in row.items():
        digest.update(f"{name} {one.dtype} {tuple(one.shape)}".encode())
        digest.update(one.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.digest()
