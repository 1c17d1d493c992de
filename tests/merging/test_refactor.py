"""An adapter at another rank: the truncated SVD of every layer's update."""

import pytest
import torch

from qrlora.adapter import (
    adapter_of,
)
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank
from qrlora.merging import refactor
from tests.adapter_forms import shake, with_form
from tests.adapters_of_data import dense


class TestRefactor:
    def test_it_is_the_truncated_svd_and_reports_its_error(self) -> None:
        denoiser = with_form("both", "unet")
        shake(denoiser)
        adapter = adapter_of(denoiser, "content")
        for rank in (1, 3, 8, 50):
            small, error = refactor(adapter, rank)
            lost = total = 0.0
            for layer in adapter.layers:
                U, S, V = torch.linalg.svd(dense(adapter, layer), full_matrices=False)
                best = U[:, :rank] @ torch.diag(S[:rank]) @ V[:rank]
                assert float((dense(small, layer) - best).norm()) < 1e-5 * float(S.norm())
                assert small.layers[layer].rank <= min(rank, 8)
                lost, total = lost + float(S[rank:].square().sum()), total + float(S.square().sum())
            assert error == pytest.approx((lost / total) ** 0.5, abs=1e-6)
            assert small.header is not None
            assert (small.header.method, small.header.form, small.header.basis) == ("refactor", None, None)
        assert error == pytest.approx(0, abs=1e-6)

    def test_edges(self) -> None:
        zero = Adapter({"x.y": LowRank(torch.zeros(4, 2), torch.ones(2, 3))})
        small, error = refactor(zero, 1)
        assert error == 0
        assert not dense(small, "x.y").any()
        with pytest.raises(QrloraError, match="at least 1"):
            refactor(zero, 0)
