import math

import pytest
import torch

from papertrial.lm.worlds.regression import (
    GaussianInputs,
    IndependentInputs,
    LinearRegression,
    PromptBatch,
    SineRegression,
    prompt_stream,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_linear_answers_are_the_prompts_own_map_of_the_inputs():
    prompts = LinearRegression(IndependentInputs(4), n_context=6, dim_y=3, n_query=2).sample(5, generator())
    assert prompts.x.shape == (5, 6, 4)
    assert prompts.y_query.shape == (5, 2, 3)
    for row in range(5):
        torch.testing.assert_close(prompts.y[row], prompts.x[row] @ prompts.weights[row].T)
        torch.testing.assert_close(prompts.y_query[row], prompts.x_query[row] @ prompts.weights[row].T)


def test_every_prompt_has_a_function_of_its_own_and_batches_do_not_repeat():
    stream = prompt_stream(LinearRegression(IndependentInputs(3), 4), 50, generator())
    weights = torch.cat([next(stream).weights, next(stream).weights]).reshape(100, 3)
    assert torch.cdist(weights, weights).fill_diagonal_(1.0).min() > 0


def test_the_same_generator_gives_the_same_prompts_and_the_global_stream_is_untouched():
    world = SineRegression(4)
    before = torch.get_rng_state()
    first, second = world.sample(3, generator(7)), world.sample(3, generator(7))
    assert torch.equal(first.y, second.y)
    assert torch.equal(first.x_query, second.x_query)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("law", ["uniform", "normal", "laplace", "exponential"])
def test_input_moments_are_those_that_the_law_states(law):
    inputs = IndependentInputs(2, law, scale=1.5)
    x = inputs.sample(1, 400_000, generator()).double()
    # eight standard errors: the laws' eighth moments are up to 8! / (4!)^2 = 70 times the squared fourth
    assert x.square().mean() == pytest.approx(inputs.second_moment, rel=8 * math.sqrt(6 / 800_000))
    assert x.pow(4).mean() == pytest.approx(inputs.fourth_moment, rel=8 * math.sqrt(70 / 800_000))
    assert (x.min() >= 0) == (law == "exponential")


def test_gaussian_inputs_have_their_covariance():
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    x = GaussianInputs(covariance).sample(1, 200_000, generator())[0]
    torch.testing.assert_close(x.T @ x / len(x), covariance, atol=0.04, rtol=0)  # about six standard errors


def test_random_eigenvalues_are_shared_within_a_prompt_and_have_mean_one():
    x = GaussianInputs(torch.eye(3), random_eigenvalues=True).sample(4000, 64, generator())
    variances = x.square().mean(1)  # (4000, 3): exponential, blurred by 64 samples
    assert variances.mean().item() == pytest.approx(1.0, abs=0.06)  # five standard errors of 12,000 draws
    assert variances.var().item() == pytest.approx(1.0 + 4 / 64, abs=0.15)  # Var of l plus E[2 l^2] / 64


def test_noise_is_on_examples_and_queries_alike():
    prompts = LinearRegression(IndependentInputs(2), 50, n_query=50, noise_std=0.3).sample(200, generator())
    for x, y in ((prompts.x, prompts.y), (prompts.x_query, prompts.y_query)):
        assert (y - x @ prompts.weights.mT).std().item() == pytest.approx(0.3, rel=0.05)


def test_scaling_multiplies_the_same_draws():
    world = LinearRegression(IndependentInputs(3), 5)
    plain = world.sample(4, generator(1))
    wide = world.scaled(inputs=2.0).sample(4, generator(1))
    tall = world.scaled(targets=3.0).sample(4, generator(1))
    torch.testing.assert_close(wide.x, 2 * plain.x)
    torch.testing.assert_close(wide.y, 2 * plain.y)
    torch.testing.assert_close(tall.x, plain.x)
    torch.testing.assert_close(tall.y_query, 3 * plain.y_query)
    gaussian = LinearRegression(GaussianInputs(torch.eye(3)), 5)
    torch.testing.assert_close(
        gaussian.scaled(inputs=2.0).sample(4, generator(1)).x, 2 * gaussian.sample(4, generator(1)).x
    )


def test_sines_keep_to_their_bounds_and_are_sines():
    prompts = SineRegression(40, n_query=3).sample(300, generator())
    assert prompts.x.abs().max() <= 5
    assert prompts.y.abs().max() <= 0.5
    assert prompts.weights is None
    # y = a cos(p) sin x + a sin(p) cos x: two features explain every prompt exactly
    features = torch.cat([prompts.x.sin(), prompts.x.cos()], -1)
    solution = torch.linalg.lstsq(features, prompts.y).solution
    torch.testing.assert_close(features @ solution, prompts.y, atol=1e-5, rtol=0)
    amplitude = solution.norm(dim=1)
    assert 0.1 - 1e-4 <= amplitude.min() < amplitude.max() <= 0.5 + 1e-4
    assert (solution[:, 1] >= -1e-5).all()  # a phase in [0, pi] has a positive sine


def test_first_keeps_the_queries_and_drops_later_examples():
    prompts = LinearRegression(IndependentInputs(3), 5).sample(4, generator())
    assert torch.equal(prompts.first(2).x, prompts.x[:, :2])
    assert prompts.first(0).n_context == 0
    assert torch.equal(prompts.first(2).y_query, prompts.y_query)
    with pytest.raises(ValueError, match="examples"):
        prompts.first(6)


def test_rows_and_to_keep_every_part():
    prompts = LinearRegression(IndependentInputs(3), 5).sample(4, generator())
    part = prompts.rows(slice(1, 3)).to(dtype=torch.float64)
    assert len(part) == 2
    assert part.weights.dtype == part.y_query.dtype == torch.float64
    assert torch.equal(part.x, prompts.x[1:3].double())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: IndependentInputs(0), "dim"),
        (lambda: IndependentInputs(2, scale=0.0), "scale"),
        (lambda: IndependentInputs(2, "cauchy"), "cauchy"),
        (lambda: GaussianInputs(torch.zeros(2, 3)), "square"),
        (lambda: GaussianInputs(torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: GaussianInputs(torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "-1"),
        (lambda: LinearRegression(IndependentInputs(2), 0), "n_context"),
        (lambda: LinearRegression(IndependentInputs(2), 3, noise_std=-1.0), "noise_std"),
        (lambda: LinearRegression(IndependentInputs(2), 3, weight_std=float("nan")), "weight_std"),
        (lambda: LinearRegression(IndependentInputs(2), 3).scaled(inputs=-1.0), "inputs"),
        (lambda: LinearRegression(IndependentInputs(2), 3).sample(0, generator()), "batch"),
        (lambda: SineRegression(3, phase=(1.0, 1.0)), "phase"),
        (lambda: PromptBatch(*(torch.zeros(2, 3) for _ in range(4))), "x must have the shape"),
        (lambda: PromptBatch(*(torch.zeros(s) for s in ((2, 3, 1), (2, 4, 1), (2, 1, 1), (2, 1, 1)))), "same examples"),
        (lambda: PromptBatch(*(torch.zeros(s) for s in ((2, 3, 1), (2, 3, 1), (2, 1, 2), (2, 1, 1)))), "dim_x"),
    ],
)
def test_bad_settings_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_counts_must_be_whole_numbers():
    with pytest.raises(TypeError, match="n_context"):
        LinearRegression(IndependentInputs(2), 3.0)  # type: ignore[arg-type]
