"""The exponential of matrices: its derivatives are torch's, and linear in what arrives."""

from __future__ import annotations

import pytest
import torch

from neuralode_coupled.evolution.exponential import exponential

DTYPES = [torch.float64, torch.complex128]


def matrices(dtype=torch.float64, *shape):
    return torch.randn(*(shape or (2, 3, 3)), dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives_of_both_orders_in_both_directions(dtype):
    a = matrices(dtype)
    assert torch.equal(exponential(a), torch.linalg.matrix_exp(a))
    assert torch.autograd.gradcheck(exponential, a, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(exponential, a, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.jacfwd,
        torch.func.hessian,
        lambda f: torch.func.jacrev(torch.func.jacrev(f)),
        lambda f: torch.func.vmap(torch.func.grad(f)),
        lambda f: torch.func.vmap(torch.func.hessian(f)),
    ],
)
def test_transforms(transform):
    a = matrices().detach()
    ours = transform(lambda a: exponential(a).square().sum())(a)
    assert torch.allclose(ours, transform(lambda a: torch.linalg.matrix_exp(a).square().sum())(a), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("size", [0.0, 1e-5, 1e-3, 0.1, 1.0])
def test_the_derivative_has_the_same_relative_error_at_any_scale(dtype, size):
    a = (size * matrices(dtype, 4, 9, 9).detach()).requires_grad_()
    arriving = torch.randn_like(a)
    double = a.detach().to(torch.promote_types(dtype, torch.float64)).requires_grad_()
    (wanted,) = torch.autograd.grad(exponential(double), double, arriving.to(double.dtype))
    (found,) = torch.autograd.grad(exponential(a), a, arriving)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    for scale in (2.0**-40, 2.0**16, 2.0**60):
        (scaled,) = torch.autograd.grad(exponential(a), a, scale * arriving)
        assert torch.equal(scaled / scale, found)
    _, tangent = torch.func.jvp(exponential, (a.detach(),), (arriving,))
    _, scaled = torch.func.jvp(exponential, (a.detach(),), (2.0**16 * arriving,))
    assert torch.equal(scaled / 2**16, tangent)


def test_gradients_of_zero_and_such_that_are_not_finite():
    """Each is its own matrix's affair; overflow shows, as gradient scaling needs it."""
    a = torch.zeros(4, 2, 2, requires_grad=True)
    arriving = torch.ones(4, 2, 2)
    arriving[1, 0, 0], arriving[2], arriving[3] = torch.inf, 0.0, torch.finfo(torch.float32).max
    (found,) = torch.autograd.grad(exponential(a), a, arriving)
    assert torch.equal(found[0], torch.ones(2, 2))
    assert found[1].isnan().all()
    assert torch.equal(found[2], torch.zeros(2, 2))
    assert found[3].isfinite().all()


def test_the_second_derivative_at_a_gradient_of_zero_is_there():
    a = matrices()
    zero = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(exponential(a), a, zero, create_graph=True)
    (found,) = torch.autograd.grad(gradient.sum(), zero)
    wanted = torch.func.jvp(torch.linalg.matrix_exp, (a.detach(),), (torch.ones_like(a),))[1]
    assert torch.allclose(found, wanted)


def test_it_compiles_as_one_graph():
    a = matrices()
    run = torch.compile(exponential, fullgraph=True, backend="aot_eager")
    (compiled,) = torch.autograd.grad(run(a).square().sum(), a)
    assert torch.allclose(compiled, torch.autograd.grad(exponential(a).square().sum(), a)[0])
