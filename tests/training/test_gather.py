"""Rows of all ranks with gradient: two processes with half a batch each take the steps of one with all of it."""

from __future__ import annotations

import pytest
import torch

import tiny_ranks
from tiny_ranks import ALONE, CASES
from trimtab.training.distributed import gather_rows

Results = dict[str, list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return tiny_ranks.run_ranks(
        "gather,gradients,trained,unlike,stopped,unlike_devices,joined", tmp_path_factory.mktemp("ranks")
    )


def test_one_process_gets_its_own_tensor():
    rows = torch.zeros(2, 3)
    assert gather_rows(rows, ALONE) is rows


def test_rows_of_uneven_ranks_come_in_rank_order(two_ranks: Results):
    for result in two_ranks["gather"]:
        assert result["rows"].tolist() == [[0, 1], [2, 3], [4, 5], [10, 11]]
        assert result["numbers"].tolist() == [0, 1, 2, 100]
        assert result["flags"].tolist() == [True, True, True, False]
        assert result["empty"].tolist() == [[0, 1], [2, 3], [4, 5]]  # the second rank had none
        assert result["quiet"].tolist() == [False, True]


def test_gradients_of_all_ranks_losses_are_added_up(two_ranks: Results):
    first, second = two_ranks["gather"]
    # Row i counts i + 1 in the first rank's loss and 2 (i + 1) in the second's.
    assert first["gradient"].tolist() == [[3, 3], [6, 6], [9, 9]]
    assert second["gradient"].tolist() == [[12, 12]]
    assert first["half_gradient"].dtype == torch.bfloat16
    assert first["half_gradient"].tolist() == [[2, 2]] * 3


def test_ranks_with_different_data_are_refused(two_ranks: Results):
    for result in two_ranks["unlike"]:
        assert bytes(result["message"].tolist()).decode().startswith("process 1 reads another recipe, other data")


def test_all_ranks_train_in_one_precision(two_ranks: Results):
    for result in two_ranks["unlike_devices"]:
        *found, message = bytes(result["found"].tolist()).decode().splitlines()
        assert found == ["fp32", "bf16", "fp32", "bf16"]
        assert "[[2, 2, 0], [2, 2, 0]]; in torch." in message


def test_a_process_group_of_the_callers_is_warned_of(two_ranks: Results):
    first, second = two_ranks["joined"]
    assert "the process group was made before trimtab" in bytes(first["said"].tolist()).decode()
    assert not second["said"].numel()


def test_ranks_are_stopped_together_and_one_says_so(two_ranks: Results):
    first, second = two_ranks["stopped"]
    assert [bool(first["told"]), bool(second["told"])] == [False, True]
    for result in (first, second):
        message = bytes(result["message"].tolist()).decode()
        assert "interrupted at step 2 of 6" in message
        assert "step-00000002.safetensors" in message  # of the rank that does not write it too


def test_ranks_that_disagree_are_told_and_not_left_waiting(two_ranks: Results):
    for result in two_ranks["gather"]:
        messages = bytes(result["messages"].tolist()).decode().splitlines()
        assert len(messages) == 2
        assert "[[2, 2, 0], [2, 3, 0]]" in messages[0]
        assert "[[2, 2, 1], [2, 2, 0]]" in messages[1]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(two_ranks: Results, case: str, tmp_path):
    alone = tiny_ranks.gradients(ALONE, tmp_path)
    names = [name for name in alone if name.startswith(f"{case}/")]
    assert len(names) == 8  # the loss, and a gradient for each of seven parameters
    for result in two_ranks["gradients"]:
        for name in names:
            if name == "fewer rows than ranks/loss":  # each image comes twice as a candidate
                continue
            torch.testing.assert_close(result[name], alone[name], atol=1e-6, rtol=1e-5)
    assert any(alone[name].abs().max() > 1e-3 for name in names if not name.endswith("/loss"))


def test_the_loop_ends_where_one_process_does(two_ranks: Results, tmp_path):
    alone = tiny_ranks.trained(ALONE, tmp_path)
    start = tiny_ranks.TwoTowers(ALONE, CASES["plain"]).state_dict()
    first, second = two_ranks["trained"]
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-4)
        assert (tensor - start[name]).abs().max() > 1e-3
