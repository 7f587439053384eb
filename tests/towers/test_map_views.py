import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.config import MapViewsConfig
from trimtab.towers.map_views import NUMBERS, draw_numbers, make_map_views


def drawn(count: int, seed: int = 0) -> np.ndarray:
    return draw_numbers(np.random.default_rng(seed), (count,))


def some_maps(count: int = 6, rows: int = 5, columns: int = 7) -> Tensor:
    return torch.randn(count, 3, rows, columns, generator=torch.Generator().manual_seed(1))


def test_without_changes_maps_are_left_alone() -> None:
    maps = some_maps()
    assert make_map_views(maps, drawn(6), MapViewsConfig()) is maps


def test_every_other_map_is_mirrored() -> None:
    maps, numbers = some_maps(64), drawn(64)
    views = make_map_views(maps, numbers, MapViewsConfig(flip=True))
    mirrored = [bool(torch.allclose(view, one.flip(-1), atol=1e-5)) for view, one in zip(views, maps, strict=True)]
    same = [bool(torch.allclose(view, one, atol=1e-5)) for view, one in zip(views, maps, strict=True)]
    assert [not one for one in mirrored] == same
    assert 20 < sum(mirrored) < 44


def test_a_crop_shows_a_part_as_large_as_it_may_be() -> None:
    # A map that rises by 1 from cell to cell: its range tells how much of the width and height is seen.
    rows, columns = 40, 40
    ramp = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).float()
    views = make_map_views(ramp.expand(200, 2, rows, columns), drawn(200), MapViewsConfig(crop_min=0.5))
    spread = views.flatten(2).amax(2) - views.flatten(2).amin(2) + 1  # (B, 2): height and width
    area = (spread / 40).prod(1)
    assert 0.44 < area.min() < 0.55
    assert area.max() > 0.9
    middle = views.flatten(2).mean(2)
    assert middle.std(0).min() > 1  # not always the same part


def test_a_rectangle_is_erased_with_the_mean() -> None:
    maps = some_maps(300, 10, 10)
    views = make_map_views(maps, drawn(300), MapViewsConfig(erase=0.5))
    changed = (views != maps).any(1)  # (B, H, W)
    touched = changed.flatten(1).any(1)
    assert 110 < int(touched.sum()) < 190
    for view, one, where in zip(views[touched], maps[touched], changed[touched], strict=True):
        height, width = int(where.any(1).sum()), int(where.any(0).sum())
        assert int(where.sum()) == height * width <= 30
        torch.testing.assert_close(view[:, where], one.mean((1, 2))[:, None].expand(-1, height * width))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 1), st.booleans(), st.floats(0, 1))
def test_a_view_depends_on_its_own_numbers_alone_and_adds_no_extremes(
    count: int, rows: int, columns: int, crop: float, flip: bool, erase: float
) -> None:
    maps, numbers, options = some_maps(count, rows, columns), drawn(count), MapViewsConfig(crop, flip, erase)
    views = make_map_views(maps, numbers, options)
    assert views.shape == maps.shape
    assert views.isfinite().all()
    assert views.amax() <= maps.amax() + 1e-4
    assert views.amin() >= maps.amin() - 1e-4
    for row in range(count):
        alone = make_map_views(maps[row : row + 1], numbers[row : row + 1], options)
        torch.testing.assert_close(alone, views[row : row + 1])


@pytest.mark.parametrize("shape", [(4,), (3, 2)])
def test_numbers_are_drawn_by_the_generator_alone(shape: tuple[int, ...]) -> None:
    first, second = (draw_numbers(np.random.default_rng(5), shape) for _ in range(2))
    assert first.shape == (*shape, NUMBERS)
    assert np.array_equal(first, second)
    assert 0 <= first.min() < first.max() < 1
