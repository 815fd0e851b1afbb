"""Shared pieces of optimiser comparisons: baselines by hand, roles on real models, tuning, toy losses by autograd."""

import math

import pytest
import torch
from torch import nn

from families import CORE, tiny_model
from papertrial.lm.optim import Lion, SignSGD, first_crossing, grid_settings, parameter_roles, tune
from papertrial.lm.toy_losses import LogCosh, TwoCoordinates, log_spaced_scales


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_sign_descent_by_hand() -> None:
    x = parameter(1.0, -1.0, 5.0)
    optimizer = SignSGD([x], lr=0.1, momentum=0.5, weight_decay=0.5)
    x.grad = torch.tensor([3.0, -0.1, 0.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(x.detach(), torch.tensor([0.95 - 0.1, -0.95 + 0.1, 4.75], dtype=torch.float64))
    x.grad = torch.tensor([-2.0, -0.1, 0.0], dtype=torch.float64)  # m = 0.75 - 1 < 0
    optimizer.step()
    assert x[0].item() == pytest.approx(0.85 * 0.95 + 0.1)


def test_lion_by_hand() -> None:
    x = parameter(1.0)
    optimizer = Lion([x], lr=0.1, betas=(0.5, 0.9), weight_decay=0.5)
    x.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.step()  # c = 1 > 0, then m = 0.2
    assert x.item() == pytest.approx(0.95 - 0.1)
    assert optimizer.state[x]["exp_avg"].item() == pytest.approx(0.2)
    x.grad = torch.tensor([-0.1], dtype=torch.float64)
    optimizer.step()  # c = 0.1 - 0.05 > 0 although the gradient is negative
    assert x.item() == pytest.approx(0.85 * 0.95 - 0.1)
    assert optimizer.state[x]["exp_avg"].item() == pytest.approx(0.18 - 0.01)


@pytest.mark.parametrize("kind", [SignSGD, Lion])
def test_baselines_refuse_bad_settings_and_sparse_gradients(kind: type) -> None:
    with pytest.raises(ValueError, match="lr must be >= 0, got -1"):
        kind([parameter(1.0)], lr=-1.0)
    with pytest.raises(ValueError, match="weight_decay"):
        kind([{"params": [parameter(1.0)], "weight_decay": -1.0}])
    share = {"momentum": 1.0} if kind is SignSGD else {"betas": (0.9, 1.0)}
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1.0"):
        kind([parameter(1.0)], **share)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        kind(table.parameters()).step()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CORE)
def test_every_parameter_has_one_role(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    roles = parameter_roles(model)
    names = [*roles.hidden, *roles.embedding, *roles.other]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    tables = set(roles.embedding.values())
    assert model.get_input_embeddings().weight in tables
    assert model.get_output_embeddings().weight in tables
    assert len(roles.embedding) == (1 if tied else 2) + (family == "gpt2")  # GPT-2 learns its positions
    assert all(p.ndim == 2 for p in roles.hidden.values())
    assert all(p.ndim == 1 for p in roles.other.values())
    assert len(roles.hidden) == 2 * (4 if family == "gpt2" else 7)


def test_roles_leave_out_frozen_parameters_and_refuse_a_frozen_model() -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    assert not any("embed_tokens" in name for name in parameter_roles(model).embedding)
    with pytest.raises(ValueError, match="no trainable"):
        parameter_roles(model.requires_grad_(False))


def test_tuning_finds_the_minimum_counts_divergence_and_names_edges() -> None:
    def score(lr: float, rho: float) -> float:
        if lr == 1.0:
            raise ArithmeticError("diverged")
        return math.nan if rho == 9 else (math.log10(lr) + 2) ** 2 + rho

    grid = {"lr": [1e-3, 1e-2, 1e-1, 1.0], "rho": [0.5, 2, 9]}
    found = tune(score, grid)
    assert found.best == {"lr": 1e-2, "rho": 0.5}
    assert found.best_score == 0.5
    assert found.edges == ("rho",)
    assert len(found.scores) == 12
    assert sum(math.isinf(s) for _, s in found.scores) == 6
    assert next(iter(grid_settings(grid))) == {"lr": 1e-3, "rho": 0.5}


def test_tuning_refuses_an_empty_or_hopeless_grid() -> None:
    with pytest.raises(ValueError, match="no value for 'lr'"):
        tune(lambda lr: lr, {"lr": []})
    with pytest.raises(ValueError, match="every one of 2 settings diverged"):
        tune(lambda lr: math.inf, {"lr": [1, 2]})


def test_first_crossing_interpolates_and_takes_the_first() -> None:
    curve = [(10, 4.0), (20, 3.0), (30, 3.5), (40, 2.0)]
    assert first_crossing(curve, 3.5) == 15
    assert first_crossing(curve, 2.75) == 35
    assert first_crossing(curve, 5.0) == 10
    assert first_crossing(curve, 1.0) is None
    with pytest.raises(ValueError, match="increase"):
        first_crossing([(1, 1.0), (1, 2.0)], 0.5)
    with pytest.raises(ValueError, match="empty"):
        first_crossing([], 0.5)


def rotation(d: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q


@pytest.mark.parametrize(
    "problem",
    [
        LogCosh(torch.tensor([1.0, 10.0, 100.0]).double(), torch.tensor([0.5, -1.0, 2.0]).double()),
        LogCosh(torch.tensor([1.0, 10.0, 100.0]).double(), torch.zeros(3).double(), rotation(3)),
        TwoCoordinates(),
    ],
    ids=["log-cosh", "rotated", "two coordinates"],
)
def test_closed_form_derivatives_match_autograd(problem: LogCosh | TwoCoordinates) -> None:
    d = 2 if isinstance(problem, TwoCoordinates) else 3
    g = torch.Generator().manual_seed(2)
    for scale in (1e-3, 0.3, 2.0):
        x = torch.randn(d, generator=g, dtype=torch.float64) * scale
        gradient = torch.autograd.functional.jacobian(problem.value, x)
        hessian = torch.autograd.functional.hessian(problem.value, x)
        # values near the minimum come from a series with error z^6 / 45
        torch.testing.assert_close(problem.gradient(x), gradient, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(problem.hessian_diagonal(x), hessian.diagonal(), rtol=1e-5, atol=1e-7)


def test_log_cosh_agrees_with_the_plain_formula_and_does_not_overflow() -> None:
    loss = LogCosh(torch.ones(1).double(), torch.zeros(1).double())
    for z in (1e-4, 0.00999, 0.01, 0.5, 3.0, 20.0):
        assert loss.value(torch.tensor([z], dtype=torch.float64)).item() == pytest.approx(
            math.log(math.cosh(z)), rel=1e-9
        )
    far = torch.tensor([1e6]).double()
    assert loss.value(far).item() == pytest.approx(1e6 - math.log(2))
    assert loss.hessian_diagonal(far).item() == pytest.approx(0.0, abs=1e-30)


def test_two_coordinates_have_the_stationary_points_that_the_docstring_names() -> None:
    loss = TwoCoordinates()
    for u, curvature in ((1.0, 1), (0.0, -1), (-17 / 26, 1)):
        x = torch.tensor([u, 4.0], dtype=torch.float64)
        assert loss.gradient(x).abs().max() < 1e-12
        assert loss.hessian_diagonal(x)[0].sign() == curvature
    assert loss.value(torch.tensor([1.0, 4.0]).double()) == 0
    assert loss.value(torch.tensor([-17 / 26, 4.0], dtype=torch.float64)).item() == pytest.approx(5.43, abs=0.01)


def test_toy_losses_refuse_senseless_shapes() -> None:
    with pytest.raises(ValueError, match="positive"):
        LogCosh(torch.tensor([1.0, 0.0]), torch.zeros(2))
    with pytest.raises(ValueError, match="not orthogonal"):
        LogCosh(torch.ones(2), torch.zeros(2), 2 * torch.eye(2))
    with pytest.raises(ValueError, match=r"must be \(2, 2\)"):
        LogCosh(torch.ones(2), torch.zeros(2), torch.eye(3))
    with pytest.raises(ValueError, match="at least 2"):
        log_spaced_scales(torch.tensor([10.0]), 1)
    with pytest.raises(ValueError, match=">= 1"):
        log_spaced_scales(torch.tensor([0.5]), 4)
    scales = log_spaced_scales(torch.tensor([1.0, 100.0]), 3)
    torch.testing.assert_close(scales, torch.tensor([[1.0, 1.0, 1.0], [1.0, 10.0, 100.0]]))
