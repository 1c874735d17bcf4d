"""Unit rows against torch's own normalisation, in value and gradient."""

import pytest
import torch
from torch.nn.functional import normalize

from recclr.kernels import unit_rows

pytestmark = pytest.mark.usefixtures("both_kernels")


def both(x, upstream):
    for function in (unit_rows, normalize):
        leaf = x.clone().requires_grad_()
        result = function(leaf)
        (result * upstream).sum().backward()
        yield result.detach(), leaf.grad


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e18])
def test_value_and_gradient_are_those_of_torch(scale):
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(17, 6, generator=draws) * scale
    upstream = torch.randn(17, 6, generator=draws)
    (found, gradient), (expected, expected_gradient) = both(x, upstream)
    torch.testing.assert_close(found, expected)
    largest = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6 * largest)


def test_a_row_of_zeros_stays_one_with_a_finite_gradient():
    x = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]]).requires_grad_()
    found = unit_rows(x)
    found.sum().backward()
    assert found.tolist() == [[0.0, 0.0, 0.0], [pytest.approx(0.6), 0.0, pytest.approx(0.8)]]
    assert x.grad.isfinite().all()


def test_no_row():
    assert unit_rows(torch.empty(0, 4)).shape == (0, 4)


def test_half_precision_is_scaled_in_float32_and_gets_its_own_gradient():
    x = torch.full((5, 3), 200.0, dtype=torch.bfloat16).requires_grad_()
    found = unit_rows(x)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx([3**-0.5] * 15)
    found[:, 0].sum().backward()
    assert x.grad.dtype == torch.bfloat16
