"""Sophia: the update against a plain oracle, the estimators against exact curvature, and real models."""

import copy
import io
import itertools
import json
import math
import socket

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from families import CORE, random_ids, tiny_model
from papertrial.lm.optim import SignSGD, grid_settings
from papertrial.lm.optimizer_study import LanguageModelTask, LossCurve, decoder
from papertrial.lm.toy_losses import LogCosh, TwoCoordinates
from papertrial.lm.training import train
from papertrial.papers.optimization.sophia import experiment, mechanism, pretraining, tuning
from papertrial.papers.optimization.sophia.method import (
    Sophia,
    SophiaG,
    SophiaH,
    all_reduce_mean,
    gnb_loss,
    hutchinson_diagonal,
    refresh_hessian,
    train_step,
)
from papertrial.papers.optimization.sophia.method.optimizer import PIECE


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameter(*values: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


class PlainSophia:
    """Algorithm 3, one coordinate at a time in Python floats."""

    def __init__(self, theta: list[float], lr: float, b1: float, b2: float, rho: float, wd: float, eps: float) -> None:
        self.theta, self.m, self.h = list(theta), [0.0] * len(theta), [0.0] * len(theta)
        self.lr, self.b1, self.b2, self.rho, self.wd, self.eps = lr, b1, b2, rho, wd, eps

    def fold_in(self, estimate: list[float]) -> None:
        self.h = [self.b2 * h + (1 - self.b2) * e for h, e in zip(self.h, estimate, strict=True)]

    def step(self, gradient: list[float]) -> None:
        for i, g in enumerate(gradient):
            self.m[i] = self.b1 * self.m[i] + (1 - self.b1) * g
            quotient = self.m[i] / max(self.rho * self.h[i], self.eps)
            self.theta[i] -= self.lr * self.wd * self.theta[i]
            self.theta[i] -= self.lr * min(1.0, max(-1.0, quotient))


# -- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [True, False])
def test_update_equals_the_plain_oracle_with_groups_and_missing_gradients(foreach: bool) -> None:
    g = generator(1)
    shapes, settings = [(3, 4), (5,), (2, 2)], [(0.01, 0.9, 0.95, 0.3, 0.1), (0.02, 0.5, 0.8, 0.0, 0.0)]
    params = [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in shapes]
    frozen = nn.Parameter(torch.ones(2, dtype=torch.float64))
    groups = [params[:2], params[2:]]
    optimizer = Sophia(
        [
            {
                "params": [*ps, *([frozen] if i == 0 else [])],
                "lr": lr,
                "betas": (b1, b2),
                "rho": rho,
                "weight_decay": wd,
            }
            for i, (ps, (lr, b1, b2, rho, wd)) in enumerate(zip(groups, settings, strict=True))
        ],
        foreach=foreach,
    )
    oracles = [
        PlainSophia(p.flatten().tolist(), lr, b1, b2, rho, wd, 1e-12)
        for ps, (lr, b1, b2, rho, wd) in zip(groups, settings, strict=True)
        for p in ps
    ]
    for step in range(12):
        if step % 3 == 0:
            estimates = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in params]  # also negative
            optimizer.fold_in([estimates[0], estimates[1], None, estimates[2]])
            for oracle, e in zip(oracles, estimates, strict=True):
                oracle.fold_in(e.flatten().tolist())
        for p, oracle in zip(params, oracles, strict=True):
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
            oracle.step(p.grad.flatten().tolist())
        optimizer.step()
    for p, oracle in zip(params, oracles, strict=True):
        # same float64 operations, but for the order of one subtraction
        torch.testing.assert_close(p.flatten(), torch.tensor(oracle.theta, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(frozen, torch.ones(2, dtype=torch.float64))
    assert not optimizer.state[frozen]


def test_large_tensors_cut_into_cache_sized_pieces_give_the_same_bits() -> None:
    def result(foreach: bool) -> list[torch.Tensor]:
        g = generator(20)
        params = [
            nn.Parameter(torch.randn(PIECE + 7, generator=g)),
            nn.Parameter(torch.randn(3, generator=g)),
            nn.Parameter(torch.randn(500, 600, generator=g).T),  # not contiguous: taken whole
            nn.Parameter(torch.randn(2, PIECE, generator=g)),
        ]
        optimizer = SophiaG(params, lr=0.1, foreach=foreach)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g)
            optimizer.update_hessian(3)
            optimizer.step()
        return [*params, *(optimizer.state[p][name] for p in params for name in ("exp_avg", "hessian"))]

    assert all(torch.equal(a, b) for a, b in zip(result(True), result(False), strict=True))


def test_foreach_and_single_paths_are_bit_equal_on_a_transformer() -> None:
    runs = []
    for foreach in (True, False):
        model = tiny_model("llama")
        optimizer = SophiaG(model.parameters(), lr=1e-2, foreach=foreach)
        ids = random_ids(2, 12)
        for step in range(4):
            train_step(model, {"input_ids": ids, "labels": ids}, optimizer, step, k=2, generator=generator(step))
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


def test_three_steps_by_hand() -> None:
    x = parameter(1.0)
    optimizer = SophiaG([x], lr=0.1, betas=(0.5, 0.5), rho=0.5, weight_decay=0.1)
    # refresh: g_hat = 2, B = 3 -> h_hat = 12, h = 6, rho h = 3
    x.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.update_hessian(3)
    # step 1: m = 1, 1/3 unclipped; 1 * 0.99 - 0.1/3
    optimizer.step()
    assert x.item() == pytest.approx(0.99 - 0.1 / 3, abs=1e-15)
    # step 2: m = 0.5 + 4 = 4.5, 4.5/3 clipped to 1
    x.grad = torch.tensor([8.0], dtype=torch.float64)
    before = x.item()
    optimizer.step()
    assert x.item() == pytest.approx(before * 0.99 - 0.1, abs=1e-15)
    # step 3: no refresh, m = 2.25 - 3 = -0.75, -0.25 unclipped
    x.grad = torch.tensor([-6.0], dtype=torch.float64)
    before = x.item()
    optimizer.step()
    assert x.item() == pytest.approx(before * 0.99 + 0.025, abs=1e-15)
    assert optimizer.state[x]["hessian"].item() == 6.0


def test_constant_token_count_gives_the_official_parametrisation() -> None:
    """There h averages squared gradients and the token count multiplies it at every step."""
    g, bs, lr, rho = generator(2), 640, 3e-3, 0.04
    start = torch.randn(50, generator=g, dtype=torch.float64)
    x = nn.Parameter(start.clone())
    optimizer = SophiaG([x], lr=lr, betas=(0.9, 0.7), rho=rho, weight_decay=0.2)
    theta, m, h = start.clone(), torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    for step in range(20):
        if step % 5 == 0:
            sampled = torch.randn(50, generator=g, dtype=torch.float64) * 0.1
            x.grad = sampled.clone()
            optimizer.update_hessian(bs)
            h = 0.7 * h + 0.3 * sampled**2
        gradient = torch.randn(50, generator=g, dtype=torch.float64)
        x.grad = gradient.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient
        theta = theta * (1 - lr * 0.2) - lr * m.sign() * (m.abs() / (rho * bs * h + 1e-15)).clamp(max=1)
    torch.testing.assert_close(x.detach(), theta, rtol=0, atol=1e-13)


def test_unclipped_limit_is_lr_m_over_rho_bs() -> None:
    x = parameter(*[0.0] * 4, dtype=torch.float32)
    optimizer = SophiaG([x], lr=0.1, betas=(0.0, 0.0), rho=100.0, weight_decay=0.0)
    x.grad = torch.ones(4)
    optimizer.update_hessian(7)
    x.grad = torch.tensor([3.0, -2.0, 0.5, 0.0])
    optimizer.step()
    torch.testing.assert_close(x.detach(), -0.1 * x.grad / 700, rtol=1e-6, atol=0)
    assert optimizer.win_rate() == 1.0


def test_rho_zero_is_sign_momentum_exactly() -> None:
    g = generator(3)
    a = nn.Parameter(torch.randn(64, generator=g))
    b = nn.Parameter(a.detach().clone())
    sophia = SophiaG([a], lr=0.01, betas=(0.9, 0.9), rho=0.0, weight_decay=0.1)
    signum = SignSGD([b], lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(10):
        a.grad = torch.randn(64, generator=g)
        b.grad = a.grad.clone()
        sophia.update_hessian(5)
        sophia.step()
        signum.step()
        assert sophia.win_rate() == 0.0
    assert torch.equal(a, b)


def test_no_coordinate_moves_by_more_than_lr_whatever_gradient_and_curvature() -> None:
    extremes = [0.0, -0.0, 1e-38, -1e-20, 1.0, -1e5, 1e30, -3e38]
    pairs = list(itertools.product(extremes, extremes))
    gradient, curvature = torch.tensor(pairs).unbind(1)
    x = nn.Parameter(torch.zeros(len(pairs)))
    optimizer = Sophia([x], lr=0.25, betas=(0.0, 0.0), rho=1.0, weight_decay=0.0)
    optimizer.fold_in([curvature])
    x.grad = gradient
    optimizer.step()
    assert torch.isfinite(x).all()
    assert x.abs().max() <= 0.25
    no_curvature = (curvature <= 0) & (gradient.abs() > 1e-12)
    assert torch.equal(x[no_curvature].detach(), -0.25 * gradient[no_curvature].sign())
    assert torch.equal(x[gradient == 0].detach(), torch.zeros_like(x[gradient == 0]))


def test_exact_curvature_without_momentum_or_clip_is_newtons_method() -> None:
    a, c = torch.tensor([1e-3, 1.0, 50.0], dtype=torch.float64), torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)
    x = parameter(0.0, 0.0, 0.0)
    optimizer = Sophia([x], lr=1.0, betas=(0.0, 0.0), rho=1.0, weight_decay=0.0)
    optimizer.fold_in([a])
    x.grad = a * (x.detach() - c)
    optimizer.step()
    torch.testing.assert_close(x.detach(), c, rtol=1e-14, atol=0)


def test_decay_comes_before_the_step_and_is_not_clipped() -> None:
    x = parameter(100.0)
    optimizer = Sophia([x], lr=0.1, betas=(0.0, 0.0), rho=1.0, weight_decay=0.5)
    x.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()
    assert x.item() == pytest.approx(100 * 0.95 - 0.1, abs=1e-12)


def test_closure_is_evaluated_with_gradients() -> None:
    x = parameter(2.0)
    optimizer = Sophia([x], lr=0.1, weight_decay=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert x.item() == pytest.approx(1.9)


def test_win_rate_counts_unclipped_coordinates() -> None:
    x = parameter(0.0, 0.0, 0.0, 0.0)
    optimizer = Sophia([x], lr=0.1, betas=(0.0, 0.0), rho=0.5, weight_decay=0.0)
    with pytest.raises(RuntimeError, match="at least one step"):
        optimizer.win_rate()
    optimizer.fold_in([torch.tensor([4.0, 4.0, -1.0, 0.0], dtype=torch.float64)])  # rho h = 2, 2, -0.5, 0
    x.grad = torch.tensor([1.9, 2.1, 0.1, 0.0], dtype=torch.float64)
    optimizer.step()
    assert optimizer.win_rate() == 0.5  # 1.9 < 2, and the zero gradient; not 2.1, not the negative curvature


# -- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_from_a_saved_state_is_bit_identical(dtype: torch.dtype) -> None:
    def advance(x: nn.Parameter, optimizer: SophiaG, steps: range) -> None:
        for step in steps:
            g = generator(step)
            if step % 3 == 0:
                x.grad = (torch.randn(40, generator=g) * 1e-3).to(dtype)
                optimizer.update_hessian(11)
            x.grad = torch.randn(40, generator=g).to(dtype)
            optimizer.step()

    def fresh() -> tuple[nn.Parameter, SophiaG]:
        x = nn.Parameter(torch.randn(40, generator=generator(9)).to(dtype))
        return x, SophiaG([x], lr=0.02, rho=0.5)

    whole, optimizer = fresh()
    advance(whole, optimizer, range(20))
    half, optimizer = fresh()
    advance(half, optimizer, range(10))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = nn.Parameter(half.detach().clone())
    other = SophiaG([resumed], lr=9.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["lr"] == 0.02
    assert other.state[resumed]["hessian"].dtype == torch.float32
    advance(resumed, other, range(10, 20))
    assert torch.equal(resumed, whole)


def test_a_copied_optimiser_keeps_its_options_and_its_trajectory() -> None:
    x = parameter(1.0, -2.0)
    optimizer = SophiaG([x], lr=0.1, reduce=all_reduce_mean, foreach=False)
    x.grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.reduce is all_reduce_mean
    assert twin.foreach is False
    (y,) = twin.parameters()
    y.grad = x.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(x, y)
    assert x is not y


def test_half_precision_curvature_does_not_underflow() -> None:
    x = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    optimizer = SophiaG([x], betas=(0.0, 0.5))
    x.grad = torch.full((3,), 1e-5, dtype=torch.float16)  # its square, 1e-10, is 0 in float16
    optimizer.update_hessian(4)
    expected = 2 * x.grad.float().square()
    torch.testing.assert_close(optimizer.state[x]["hessian"], expected, rtol=1e-6, atol=0)


def test_learning_rate_schedulers_drive_it() -> None:
    x = parameter(0.0)
    optimizer = Sophia([x], lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(3):
        x.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        scheduler.step()
    assert x.item() == -1.75


# -- Hutchinson ------------------------------------------------------------------------------------------------------


def test_rademacher_probe_is_exact_on_a_diagonal_quadratic_for_every_sign_pattern() -> None:
    a = torch.tensor([1.0, -3.0, 0.25], dtype=torch.float64)
    x = parameter(0.3, -1.0, 2.0)
    for seed in range(40):  # 8 patterns: 40 draws see them all
        (estimate,) = hutchinson_diagonal((a * x**2).sum() / 2, [x], generator(seed), "rademacher")
        torch.testing.assert_close(estimate, a, rtol=1e-15, atol=0)


def test_gaussian_probe_is_unbiased_against_the_exact_hessian_of_a_network() -> None:
    g = generator(4)
    inputs, targets = torch.randn(6, 2, generator=g), torch.randint(0, 3, (6,), generator=g)
    w1 = nn.Parameter(torch.randn(4, 2, generator=g))
    w2 = nn.Parameter(torch.randn(3, 4, generator=g))

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.tanh(inputs @ a.T) @ b.T, targets)

    blocks = torch.autograd.functional.hessian(loss, (w1.detach(), w2.detach()))
    exact = torch.cat([blocks[0][0].reshape(8, 8).diagonal(), blocks[1][1].reshape(12, 12).diagonal()])
    draws = torch.stack(
        [torch.cat([e.flatten() for e in hutchinson_diagonal(loss(w1, w2), [w1, w2], g)]) for _ in range(3000)]
    )
    standard_error = draws.std(0) / math.sqrt(len(draws))
    # 20 coordinates at 4.5 standard errors: a false alarm once in 7,000 seeds, and this one is fixed
    assert ((draws.mean(0) - exact).abs() < 4.5 * standard_error).all()
    assert (exact < 0).any(), "the example should contain negative curvature"


def test_hessian_vector_product_of_a_transformer_matches_a_finite_difference() -> None:
    model = tiny_model("gpt2").double()
    ids = random_ids(2, 10)
    params = list(model.parameters())

    def loss(network: nn.Module) -> torch.Tensor:
        # not the model's own loss, which rounds to float32
        return F.cross_entropy(network(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    with sdpa_kernel(SDPBackend.MATH):
        estimates = hutchinson_diagonal(loss(model), params, generator(5))
    g = generator(5)
    probes = [torch.randn(p.shape, generator=g).double() for p in params]
    shifted = []
    for sign in (1e-5, -1e-5):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, u in zip(moved.parameters(), probes, strict=True):
                p.add_(u, alpha=sign)
        loss(moved).backward()
        shifted.append([p.grad for p in moved.parameters()])
    optimizer = SophiaH(params, betas=(0.9, 0.0))
    refresh_hessian(model, {"input_ids": ids, "labels": ids}, optimizer, generator=generator(5))
    for p, u, estimate, up, down in zip(params, probes, estimates, *shifted, strict=True):
        # central difference: truncation 1e-10 times a third derivative summed over 8,000 coordinates
        torch.testing.assert_close(estimate, u * (up - down) / 2e-5, rtol=1e-4, atol=1e-6)
        assert p.grad is None
        # the same through the model's own float32 loss
        torch.testing.assert_close(optimizer.state[p]["hessian"], estimate, rtol=1e-3, atol=1e-5)


def test_a_linear_loss_has_zero_curvature_and_untouched_parameters_have_none() -> None:
    x, y, z = parameter(1.0), parameter(2.0), parameter(3.0)
    estimates = hutchinson_diagonal((3 * x + y**2).sum(), [x, y, z], generator(), "rademacher")
    assert estimates[0].item() == 0.0
    assert estimates[1].item() == 2.0
    assert estimates[2] is None
    assert hutchinson_diagonal((3 * x).sum(), [x], generator())[0].item() == 0.0


# -- Gauss-Newton-Bartlett -------------------------------------------------------------------------------------------


def softmax_regression() -> tuple[torch.Tensor, nn.Parameter, torch.Tensor]:
    """Two inputs, a 3 x 2 weight, and the exact diagonal of the Gauss-Newton matrix of the mean loss."""
    inputs = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)
    weight = nn.Parameter(torch.tensor([[0.2, -0.4], [0.7, 0.1], [-0.3, 0.5]], dtype=torch.float64))
    p = (inputs @ weight.detach().T).softmax(-1)  # (2, 3)
    exact = ((p * (1 - p)).T @ inputs.square()) / 2  # d2/dW_vj2 = mean_b p_v (1 - p_v) x_j^2
    return inputs, weight, exact


def test_gnb_expectation_over_all_labels_is_the_gauss_newton_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weight, exact = softmax_regression()
    p = (inputs @ weight.detach().T).softmax(-1)
    expected = torch.zeros_like(exact)
    for labels in itertools.product(range(3), repeat=2):
        monkeypatch.setattr(torch, "multinomial", lambda *_, labels=labels, **__: torch.tensor(labels)[:, None])
        optimizer = SophiaG([weight], betas=(0.9, 0.0))
        sampled = gnb_loss(inputs @ weight.T)
        optimizer.update_hessian(sampled.tokens, sampled.loss)
        expected += p[0, labels[0]] * p[1, labels[1]] * optimizer.state[weight]["hessian"]
    torch.testing.assert_close(expected, exact, rtol=1e-12, atol=0)


def test_gnb_mean_over_draws_is_the_gauss_newton_diagonal() -> None:
    inputs, weight, exact = softmax_regression()
    g, draws = generator(6), []
    for _ in range(3000):
        sampled = gnb_loss(inputs @ weight.T, generator=g)
        (gradient,) = torch.autograd.grad(sampled.loss, weight)
        draws.append(sampled.tokens * gradient**2)
    stacked = torch.stack(draws)
    standard_error = stacked.std(0) / math.sqrt(len(draws))
    assert ((stacked.mean(0) - exact).abs() < 4 * standard_error).all()  # fixed seed; 6 coordinates at 4 sigma


def test_data_labels_would_estimate_another_matrix() -> None:
    """Guards the test above: with fixed labels the same formula is off by far more than its tolerance."""
    inputs, weight, exact = softmax_regression()
    (gradient,) = torch.autograd.grad(F.cross_entropy(inputs @ weight.T, torch.tensor([0, 0])), weight)
    assert ((2 * gradient**2 - exact).abs() / exact).max() > 0.3


def test_ignored_positions_do_not_exist_for_gnb() -> None:
    logits = torch.randn(2, 5, 7, generator=generator(7), requires_grad=True)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = mask[1, 0] = True
    masked = gnb_loss(logits, mask, generator(8))
    alone = gnb_loss(logits[~mask], None, generator(8))
    assert masked.tokens == alone.tokens == 7
    assert masked.loss == alone.loss
    (gradient,) = torch.autograd.grad(masked.loss, logits)
    assert (gradient[mask] == 0).all()
    assert (gradient[~mask].abs().sum(-1) > 0).all()


def test_padding_in_a_batch_does_not_change_the_estimate() -> None:
    model = tiny_model("llama")
    ids = random_ids(2, 9)
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], 1)
    labels = torch.cat([ids, torch.full((2, 4), -100)], 1)
    states = []
    for batch in ({"input_ids": ids, "labels": ids}, {"input_ids": padded, "labels": labels}):
        optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0))
        refresh_hessian(model, batch, optimizer, generator=generator(10))
        states.append([optimizer.state[p]["hessian"] for p in model.parameters()])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)  # sums over other lengths in float32, then squared


def test_accumulated_and_direct_gradients_give_one_estimate() -> None:
    model = tiny_model("gpt2")
    ids = random_ids(4, 8)
    direct = SophiaG(model.parameters())
    sampled = gnb_loss(model(ids).logits[:, :-1], generator=generator(11))
    direct.update_hessian(sampled.tokens, sampled.loss)
    assert all(p.grad is None for p in model.parameters())
    accumulated = SophiaG(model.parameters())
    sampled = gnb_loss(model(ids).logits[:, :-1], generator=generator(11))
    sampled.loss.backward()
    accumulated.update_hessian(sampled.tokens)
    for p in model.parameters():
        assert torch.equal(direct.state[p]["hessian"], accumulated.state[p]["hessian"])
        assert (direct.state[p]["hessian"] >= 0).all()


# -- data parallel ---------------------------------------------------------------------------------------------------


def test_reducing_before_squaring_equals_one_worker_with_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = random_ids(4, 8)
    labels = torch.randint(0, 67, (4 * 7,), generator=generator(12))

    def gradient_of(rows: slice) -> list[torch.Tensor]:
        part = labels.reshape(4, 7)[rows].flatten()
        monkeypatch.setattr(torch, "multinomial", lambda *_, **__: part[:, None])
        return list(torch.autograd.grad(gnb_loss(model(ids[rows]).logits[:, :-1]).loss, list(model.parameters())))

    other = gradient_of(slice(2, 4))

    def average_with_the_other_worker(tensors: list[torch.Tensor]) -> None:
        for tensor, theirs in zip(tensors, other, strict=True):
            tensor.add_(theirs).div_(2)

    alone = SophiaG(model.parameters())
    for p, g in zip(model.parameters(), gradient_of(slice(0, 4)), strict=True):
        p.grad = g
    alone.update_hessian(28)
    worker = SophiaG(model.parameters(), reduce=average_with_the_other_worker)
    for p, g in zip(model.parameters(), gradient_of(slice(0, 2)), strict=True):
        p.grad = g.clone()
    worker.update_hessian(28)
    for p in model.parameters():
        # two halves summed in another order, in float32
        torch.testing.assert_close(worker.state[p]["hessian"], alone.state[p]["hessian"], rtol=1e-3, atol=1e-8)


def _average_in_a_process(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tensors = [torch.full((3,), float(rank)), torch.tensor([[10.0 * (rank + 1)]])]
    all_reduce_mean(tensors)
    torch.save(tensors, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_reduce_mean_averages_over_two_processes(tmp_path) -> None:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    except OSError:
        pytest.skip("no sockets here")
    torch.multiprocessing.spawn(_average_in_a_process, (port, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        first, second = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert first.tolist() == [0.5] * 3
        assert second.tolist() == [[15.0]]


def test_all_reduce_mean_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="process group"):
        all_reduce_mean([torch.ones(1)])


# -- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
@pytest.mark.parametrize("family", CORE)
def test_trains_every_family(family: str, kind: type[Sophia]) -> None:
    model = tiny_model(family)
    ids = random_ids(4, 12)
    batch = {"input_ids": ids, "labels": ids}
    optimizer = kind(model.parameters(), lr=5e-3, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    losses = [train_step(model, batch, optimizer, step, k=5, generator=generator(step)).loss for step in range(30)]
    assert losses[-1] < losses[0] - 0.5
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert 0.0 < optimizer.win_rate() < 1.0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_tied_matrix_is_one_parameter_and_stays_tied(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    optimizer = SophiaG(model.parameters(), lr=1e-3, weight_decay=0.0)
    ids = random_ids(2, 8)
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    train_step(model, {"input_ids": ids, "labels": ids}, optimizer, 0, generator=generator())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(p is table for p in optimizer.parameters()) == 1
    assert (table - before).abs().max() <= 1e-3 * (1 + 1e-4)  # one step, not two; float32 rounding


def test_masked_language_models_are_not_shifted() -> None:
    model = tiny_model("bert")
    ids = random_ids(2, 10)
    labels = torch.full_like(ids, -100)
    labels[:, 0] = ids[:, 0]  # the shifted reading would find no label at all
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0))
    refresh_hessian(model, {"input_ids": ids, "labels": labels}, optimizer, generator=generator(), shifted=False)
    assert any((optimizer.state[p]["hessian"] > 0).any() for p in model.parameters() if optimizer.state[p])
    with pytest.raises(ValueError, match="all are -100"):
        refresh_hessian(model, {"input_ids": ids, "labels": labels}, optimizer, generator=generator())


def test_curvature_changes_only_every_k_steps() -> None:
    model = tiny_model("llama")
    ids = random_ids(2, 8)
    optimizer = SophiaG(model.parameters(), lr=1e-3)
    refreshed, changed, last = [], [], None
    for step in range(9):
        outcome = train_step(model, {"input_ids": ids, "labels": ids}, optimizer, step, k=4, generator=generator(step))
        h = torch.cat([optimizer.state[p]["hessian"].flatten() for p in optimizer.parameters()])
        refreshed.append(outcome.refreshed)
        changed.append(last is None or not torch.equal(h, last))
        last = h.clone()
    assert refreshed == changed == [step % 4 == 0 for step in range(9)]


def test_first_refresh_happens_before_the_first_update_and_at_the_same_point() -> None:
    model = tiny_model("llama")
    ids = random_ids(2, 8)
    batch = {"input_ids": ids, "labels": ids}
    twin = copy.deepcopy(model)
    reference = SophiaG(twin.parameters())
    refresh_hessian(twin, batch, reference, generator=generator(1))
    optimizer = SophiaG(model.parameters(), lr=0.05)
    train_step(model, batch, optimizer, 0, generator=generator(1))
    for p, q in zip(optimizer.parameters(), reference.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["hessian"], reference.state[q]["hessian"])


def test_works_inside_the_shared_training_loop() -> None:
    model = tiny_model("qwen3")
    ids = random_ids(4, 12)
    optimizer = SophiaG(model.parameters(), lr=5e-3, weight_decay=0.0)
    g = generator()

    def refresh(step: int) -> None:
        if step % 5 == 0:
            refresh_hessian(model, {"input_ids": ids, "labels": ids}, optimizer, generator=g)

    report = train(model, [ids], steps=20, optimizer=optimizer, before_update=refresh)
    assert report.losses[-1] < report.losses[0] - 0.3


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"lr": float("nan")}, "lr must"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"rho": -0.1}, "rho must be >= 0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"eps": 0.0}, "eps must be"),
    ],
)
def test_bad_settings_are_refused_also_per_group(setting: dict, message: str) -> None:
    for kind in (Sophia, SophiaG, SophiaH):
        with pytest.raises(ValueError, match=message):
            kind([parameter(1.0)], **setting)
        with pytest.raises(ValueError, match=message):
            kind([{"params": [parameter(1.0)], **setting}])


def test_parameters_must_be_real_and_dense() -> None:
    with pytest.raises(TypeError, match="complex"):
        Sophia([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = SophiaG(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.update_hessian(4)


@pytest.mark.parametrize(("bs", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)])
def test_token_count_must_be_a_positive_integer(bs: object, error: type[Exception]) -> None:
    x = parameter(1.0)
    x.grad = torch.ones(1, dtype=torch.float64)
    with pytest.raises(error, match="tokens"):
        SophiaG([x]).update_hessian(bs)


def test_curvature_needs_a_backward_pass_or_a_graph() -> None:
    x = parameter(1.0)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        SophiaG([x]).update_hessian(1)
    with pytest.raises(RuntimeError, match="no graph"):
        SophiaG([x]).update_hessian(1, torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="no graph"):
        SophiaH([x]).update_hessian(torch.tensor(1.0))
    with pytest.raises(ValueError, match="scalar"):
        SophiaH([x]).update_hessian(torch.stack([x, x]))
    with pytest.raises(ValueError, match="noise"):
        SophiaH([x]).update_hessian(x.sum(), noise="uniform")


def test_a_broken_estimate_is_refused_and_changes_nothing() -> None:
    x, y = parameter(1.0, 2.0), parameter(3.0)
    optimizer = Sophia([x, y])
    optimizer.fold_in([torch.ones(2), torch.ones(1)])
    before = [optimizer.state[p]["hessian"].clone() for p in (x, y)]
    with pytest.raises(RuntimeError, match="1 of 2 curvature estimates"):
        optimizer.fold_in([torch.ones(2), torch.tensor([float("nan")])])
    with pytest.raises(ValueError, match=r"one per parameter \(2\), got 1"):
        optimizer.fold_in([torch.ones(2)])
    with pytest.raises(ValueError, match="shape"):
        optimizer.fold_in([torch.ones(3), torch.ones(1)])
    with pytest.raises(ValueError, match="all None"):
        optimizer.fold_in([None, None])
    assert all(torch.equal(optimizer.state[p]["hessian"], b) for p, b in zip((x, y), before, strict=True))


def test_gnb_loss_names_what_is_wrong() -> None:
    logits = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match="no position counts"):
        gnb_loss(logits, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ignore_mask is \(2, 2\)"):
        gnb_loss(logits, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool"):
        gnb_loss(logits, torch.zeros(2, 3))
    with pytest.raises(TypeError, match="floating"):
        gnb_loss(logits.long())
    with pytest.raises(ValueError, match="V >= 2"):
        gnb_loss(torch.zeros(5))
    logits[1, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        gnb_loss(logits)


def test_train_step_checks_its_arguments_and_stops_at_a_broken_loss() -> None:
    model = tiny_model("llama")
    ids = random_ids(2, 8)
    batch = {"input_ids": ids, "labels": ids}
    optimizer = SophiaG(model.parameters())
    with pytest.raises(ValueError, match="k >= 1"):
        train_step(model, batch, optimizer, 0, k=0)
    with pytest.raises(ValueError, match="clip_norm"):
        train_step(model, batch, optimizer, 0, clip_norm=0.0)
    with pytest.raises(ValueError, match="labels"):
        refresh_hessian(model, {"input_ids": ids}, optimizer)
    with pytest.raises(TypeError, match="SophiaG or SophiaH"):
        refresh_hessian(model, batch, Sophia(model.parameters()))
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="lower lr or raise rho"):
        train_step(model, batch, optimizer, 0)
    assert optimizer.state_dict() == before


# -- the experiment --------------------------------------------------------------------------------------------------


def test_settings_in_use_are_the_best_of_the_recorded_grid_search() -> None:
    scale = experiment.SCALES["small"]
    table = json.loads(tuning.RESULTS.read_text())
    assert {key: scale[key] for key in table["setup"]} == table["setup"], "tuned for another set-up"
    assert set(table["runs"]) == set(scale["grids"]) == set(scale["settings"])
    for name, rows in table["runs"].items():
        assert [row["setting"] for row in rows] == list(grid_settings(scale["grids"][name]))
        first = sorted(rows, key=lambda row: sum(row["losses"][: len(tuning.SEEDS)]))
        finalists, others = first[: tuning.FINALISTS], first[tuning.FINALISTS :]
        assert all(len(row["losses"]) == len(table["seeds"]) for row in finalists)
        assert all(len(row["losses"]) >= len(tuning.SEEDS) for row in others)
        assert scale["settings"][name] == tuning.chosen(rows)["setting"]
    assert len(table["runs"]["adamw"]) >= max(len(rows) for rows in table["runs"].values()), "AdamW is tuned as widely"


def test_toy_arms_take_the_steps_that_their_formulas_say() -> None:
    """One step from (3, -2) on a_i log cosh x_i with a = (1, 100), learning rate 0.1."""
    a, x = torch.tensor([1.0, 100.0]).double(), torch.tensor([[3.0, -2.0]]).double()
    problem = LogCosh(a, torch.zeros(2).double())
    g, h = a * torch.tanh(x[0]), a / torch.cosh(x[0]) ** 2
    expected = {
        "gradient_descent": x[0] - 0.1 * g,
        "sign_descent": x[0] - 0.1 * g.sign(),
        "adam": x[0] - 0.1 * g.sign(),  # its first step, up to eps
        "newton": x[0] - 0.1 * g / h,
        "sophia_exact": x[0] - (0.5 * g / h).clamp(-0.1, 0.1),
    }
    assert set(expected) == set(mechanism.OPTIMIZERS)
    for arm, point in expected.items():
        found = mechanism.descend(arm, problem, x, [0.1], steps=1, target=-1.0)
        torch.testing.assert_close(found.points[0, 0], point, rtol=1e-7, atol=1e-7)
        assert found.steps.isinf().all()


def test_toy_steps_are_counted_per_rate_and_problem() -> None:
    problem = LogCosh(torch.ones(2, 2).double(), torch.zeros(2, 2).double())
    start = torch.tensor([[0.0, 0.0], [0.5, 0.5]]).double()
    found = mechanism.descend("sign_descent", problem, start, [0.25, 0.1], steps=20, target=1e-6)
    assert found.steps[:, 0].tolist() == [0, 0]  # starts at the minimum
    assert found.steps[0, 1] == 2
    assert found.taken == 2  # solved at one rate: the best is known
    found = mechanism.descend("sign_descent", problem, start, [0.25, 0.1], steps=20, target=1e-6, stop_early=False)
    assert found.steps[:, 1].tolist() == [2, 5]
    assert found.taken == 20


def test_newton_finds_the_maximum_where_sophia_finds_a_minimum() -> None:
    loss = TwoCoordinates()
    start = torch.tensor([[0.2, 3.0]]).double()
    newton = mechanism.descend("newton", loss, start, [1.0], steps=50, target=0.0, stop_early=False)
    sophia = mechanism.descend("sophia_exact", loss, start, [0.1], steps=200, target=0.0, stop_early=False)
    torch.testing.assert_close(newton.points[0, 0], torch.tensor([0.0, 4.0]).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(sophia.points[0, 0], torch.tensor([1.0, 4.0]).double(), rtol=0, atol=1e-6)
    assert mechanism.at_a_minimum(loss, sophia.points, 1e-4).item()
    assert not mechanism.at_a_minimum(loss, newton.points, 1e-4).item()


def arm_run(points: list[tuple[float, float]], cost: float = 0.0, every: int = 1) -> pretraining.ArmRun:
    return pretraining.ArmRun(LossCurve(points=points, train_loss=1.0), None, [], cost, every)


def test_gradient_evaluations_charge_every_curvature_pass() -> None:
    run = arm_run([(10.0, 1.0)], cost=0.5, every=5)
    assert [run.evaluations(s) for s in (0, 1, 5, 6, 10, 11)] == [0, 1.5, 5.5, 7, 11, 12.5]


def test_steps_to_the_baseline_take_the_better_of_two_runs_and_the_full_budget_where_there_is_none() -> None:
    runs = {
        "adamw": arm_run([(5.0, 4.0), (10.0, 3.0)]),
        "sophia_g": arm_run([(5.0, 3.5), (10.0, 2.5)], cost=1.0, every=5),
        "sophia_g_half": arm_run([(2.5, 4.0), (5.0, 2.0)], cost=1.0, every=5),
        "sign_momentum": arm_run([(5.0, 4.0), (10.0, 3.1)]),
    }
    metrics = {name: experiment._measured(name, runs, 10) for name in runs}
    assert metrics["adamw"]["steps_to_adamw_loss"] == 10
    assert metrics["sophia_g"]["steps_to_adamw_loss"] == 3.75
    assert metrics["sophia_g"]["gradient_evaluations_to_adamw_loss"] == 4.75
    assert metrics["sign_momentum"]["steps_to_adamw_loss"] == 10
    runs["sophia_g_half"] = arm_run([(2.5, 4.0), (5.0, 3.9)], cost=1.0, every=5)
    assert experiment._measured("sophia_g", runs, 10)["steps_to_adamw_loss"] == 7.5
    assert experiment._measured("sophia_g_half", runs, 10)["steps_to_adamw_loss"] == 10, "not its own half"


def test_all_arms_share_start_and_batches_and_weight_decay_spares_vectors() -> None:
    tokens = torch.randint(0, 40, (400,), generator=generator())
    task = LanguageModelTask({"train": tokens, "test": tokens[:48].view(4, 12)}, 40, 2, 12)
    model = {"family": "llama", "width": 16, "layers": 1, "heads": 2}
    scale = {
        "model": model, "warmup": 0.5, "floor": 0.1, "evaluate_every": 1, "precision": "fp32", "k": 1,
        "curvature_rows": {"sophia_g": 1, "sophia_h": 1},
    }  # fmt: skip
    setting = {"lr": 0.0, "beta1": 0.5, "beta2": 0.5, "rho": 1.0, "weight_decay": 0.3}
    losses = set()
    for arm in ("adamw", "sophia_g", "sophia_h", "sign_momentum"):
        run = pretraining.train_arm(
            arm, setting, scale, task, tuning.tuning_streams(3), steps=3, split="test", device=torch.device("cpu")
        )
        losses.add((run.curve.final, run.curve.train_loss))
        for group in run.optimizer.param_groups:
            assert group["weight_decay"] == (0.3 if group["params"][0].ndim >= 2 else 0.0)
            assert len({p.ndim >= 2 for p in group["params"]}) == 1
    assert len(losses) == 1, "at lr 0 every arm sees the same model and the same batches"
    with pytest.raises(ValueError, match="unknown arm 'sgd'"):
        pretraining.make_optimizer("sgd", decoder(task, generator(), **model), setting)


def test_task_reports_divergence_instead_of_raising_and_checks_its_arguments() -> None:
    tokens = torch.randint(0, 40, (400,), generator=generator())
    task = LanguageModelTask({"train": tokens, "valid": tokens[:48].view(4, 12)}, 40, 2, 12)
    model = decoder(task, generator(), family="gpt2", width=16, layers=1, heads=2)
    uniform = task.evaluate(model, "valid")
    assert uniform == pytest.approx(math.log(40), abs=0.1)
    assert task.tokens_per_step == 22
    arguments = {"steps": 5, "schedule": lambda step: 1.0, "split": "valid", "evaluate_every": 2}
    curve = task.run(model, torch.optim.SGD(model.parameters(), lr=1e20), generator(), **arguments)
    assert curve.diverged_at is not None
    assert curve.final == math.inf
    with pytest.raises(ValueError, match="split"):
        task.run(model, torch.optim.SGD(model.parameters()), generator(), **{**arguments, "split": "train"})
    with pytest.raises(ValueError, match="evaluate_every"):
        task.run(model, torch.optim.SGD(model.parameters()), generator(), **{**arguments, "evaluate_every": 0})
    with pytest.raises(ValueError, match="family"):
        decoder(task, generator(), family="mamba", width=16, layers=1, heads=2)
    a, b = (decoder(task, generator(4), family="llama", width=16, layers=1, heads=2) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
