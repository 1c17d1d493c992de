"""The statistics of pictures, where they can be counted by hand."""

import numpy as np
import pytest
import torch

from qrlora.evaluation import picture_statistics


def test_each_histogram_is_of_shares_that_sum_to_one() -> None:
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))
    squares = picture_statistics(pictures).square()
    sizes = [64, 512, 8, 8, 64, 64, 8, 64, 64]
    assert squares.shape == (3, sum(sizes))
    for part in squares.split(sizes, dim=1):
        torch.testing.assert_close(part.sum(dim=1), torch.ones(3))


def test_half_black_half_white() -> None:
    picture = np.zeros((1, 8, 8, 3), np.uint8)
    picture[:, :, 4:] = 255
    coarse, fine, gradients, *_ = picture_statistics(torch.from_numpy(picture)).square()[0].split([64, 512, 8, 272])
    assert [coarse[0], coarse[63], fine[0], fine[511]] == pytest.approx([0.5] * 4)
    assert [gradients[0], gradients[7]] == pytest.approx([6 / 7, 1 / 7]), "seven columns of differences, one an edge"


def test_mirroring_changes_nothing_but_the_order_of_pairs() -> None:
    pictures = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    torch.testing.assert_close(picture_statistics(pictures)[:, :576], picture_statistics(pictures.flip(1, 2))[:, :576])
