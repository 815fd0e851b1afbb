import pytest
import torch

from families import tiny_model
from papertrial.lm.icl import (
    gd_weights,
    gdpp_weights,
    implicit_weights,
    linear_prediction,
    mean_cosine,
    ols_weights,
    prediction_distance,
    prompt_loss,
    query_loss,
    ridge_weights,
    sensitivities,
    squared_prediction_difference,
)
from papertrial.lm.icl_decoder import InContextDecoder
from papertrial.lm.worlds.regression import IndependentInputs, LinearRegression


def prompts(batch=6, dim_x=4, n=7, dim_y=2, n_query=3, noise=0.2, dtype=torch.float64):
    world = LinearRegression(IndependentInputs(dim_x), n, dim_y=dim_y, n_query=n_query, noise_std=noise)
    return world.sample(batch, torch.Generator().manual_seed(0)).to(dtype=dtype)


def as_predictor(weights_of):
    return lambda x, y, x_query: linear_prediction(weights_of(x, y), x_query)


def test_ols_is_least_squares_and_the_shortest_solution_where_there_are_many():
    many, few = prompts(n=9), prompts(n=2)
    oracle = torch.linalg.lstsq(many.x, many.y).solution.mT
    torch.testing.assert_close(ols_weights(many.x, many.y), oracle)
    short = ols_weights(few.x, few.y)
    torch.testing.assert_close(linear_prediction(short, few.x), few.y)  # interpolates
    # the shortest solution lies in the span of the inputs
    projector = few.x.mT @ torch.linalg.inv(few.x @ few.x.mT) @ few.x
    torch.testing.assert_close(short @ projector, short)


def test_ridge_agrees_with_scikit_learn_where_it_is_installed():
    linear_model = pytest.importorskip("sklearn.linear_model")
    batch = prompts()
    ours = ridge_weights(batch.x, batch.y, 0.7)
    for row in range(len(batch)):
        peer = linear_model.Ridge(alpha=0.7, fit_intercept=False).fit(batch.x[row].numpy(), batch.y[row].numpy())
        torch.testing.assert_close(ours[row], torch.from_numpy(peer.coef_))


def test_ridge_is_stationary_for_its_objective_and_tends_to_ols():
    batch = prompts(n=9)
    weights = ridge_weights(batch.x, batch.y, 0.5).requires_grad_()
    objective = (batch.x @ weights.mT - batch.y).square().sum() + 0.5 * weights.square().sum()
    assert torch.autograd.grad(objective, weights)[0].abs().max() < 1e-12
    torch.testing.assert_close(ridge_weights(batch.x, batch.y, 1e-12), ols_weights(batch.x, batch.y), atol=1e-9, rtol=0)


def test_gradient_descent_follows_autograd_step_by_step():
    batch = prompts()
    start = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rates = (0.4, 0.9, 0.2)
    weights = start.expand(6, -1, -1)
    for rate in rates:
        weights = weights.detach().requires_grad_()
        loss = (batch.x @ weights.mT - batch.y).square().sum() / (2 * batch.n_context)
        weights = weights - rate * torch.autograd.grad(loss, weights)[0]
    torch.testing.assert_close(gd_weights(batch.x, batch.y, rates, 3, start), weights.detach())


def test_one_step_from_zero_has_no_hidden_factor():
    batch = prompts(n_query=1)
    direct = torch.zeros(6, 1, 2, dtype=torch.float64)
    for i in range(batch.n_context):
        direct += batch.y[:, i : i + 1] * (batch.x[:, i : i + 1] * batch.x_query).sum(-1, keepdim=True)
    torch.testing.assert_close(
        linear_prediction(gd_weights(batch.x, batch.y, 0.3), batch.x_query), 0.3 / batch.n_context * direct
    )


def test_many_steps_reach_least_squares():
    batch = prompts(n=30)
    torch.testing.assert_close(
        gd_weights(batch.x, batch.y, 1.0, 2000), ols_weights(batch.x, batch.y), atol=1e-8, rtol=0
    )


def naive_gdpp(x, y, x_query, lr, gamma, steps):
    """The definition, token by token, for one prompt: move every target and every input."""
    n = len(x)
    x, y, q, answer = x.clone(), y.clone(), x_query.clone(), torch.zeros(y.shape[1], dtype=y.dtype)
    for _ in range(steps):
        change = sum(torch.outer(y[i], x[i]) for i in range(n)) * lr / n
        gram = sum(torch.outer(x[i], x[i]) for i in range(n))
        answer = answer + change @ q
        y = torch.stack([y[j] - change @ x[j] for j in range(n)])
        x = torch.stack([x[j] - gamma * gram @ x[j] for j in range(n)])
        q = q - gamma * gram @ q
    return answer


def test_gdpp_weights_equal_the_token_by_token_definition():
    batch = prompts(n_query=1)
    weights = gdpp_weights(batch.x, batch.y, 1.1, 0.07, 4)
    ours = linear_prediction(weights, batch.x_query)[:, 0]
    for row in range(len(batch)):
        naive = naive_gdpp(batch.x[row], batch.y[row], batch.x_query[row, 0], 1.1, 0.07, 4)
        torch.testing.assert_close(ours[row], naive)


def test_gdpp_without_transformation_is_gradient_descent():
    batch = prompts()
    torch.testing.assert_close(gdpp_weights(batch.x, batch.y, 0.8, 0.0, 3), gd_weights(batch.x, batch.y, 0.8, 3))


def test_an_empty_context_gives_the_prior_mean():
    batch = prompts().first(0)
    start = torch.ones(2, 4, dtype=torch.float64)
    for weights in (
        ols_weights(batch.x, batch.y),
        ridge_weights(batch.x, batch.y, 1.0),
        gd_weights(batch.x, batch.y, 1.0),
    ):
        assert torch.equal(weights, torch.zeros(6, 2, 4, dtype=torch.float64))
    assert torch.equal(gd_weights(batch.x, batch.y, 1.0, start=start), start.expand(6, -1, -1))


def test_sensitivities_of_a_linear_predictor_are_its_weights():
    batch = prompts()
    found = sensitivities(as_predictor(ols_weights), batch)
    torch.testing.assert_close(found, ols_weights(batch.x, batch.y)[:, None].expand(-1, 3, -1, -1))


def test_sensitivities_do_not_mix_queries():
    batch = prompts(dim_y=1)

    def mixing(x, y, x_query):  # a predictor that wrongly lets queries see each other
        return x_query.sum(1, keepdim=True).expand_as(x_query)[..., :1] * 2

    expected = torch.zeros(6, 3, 1, 4, dtype=torch.float64)
    expected[..., 0] = 2
    torch.testing.assert_close(sensitivities(mixing, batch), expected)


def test_losses_and_distances_are_the_means_they_say():
    batch = prompts()
    zero = lambda x, y, x_query: x_query.new_zeros(*x_query.shape[:2], 2)  # noqa: E731
    one = lambda x, y, x_query: x_query.new_ones(*x_query.shape[:2], 2)  # noqa: E731
    by_hand = sum(0.5 * float(t @ t) for row in batch.y_query for t in row) / 18
    assert query_loss(zero, batch) == pytest.approx(by_hand)
    assert prompt_loss(zero, batch).item() == pytest.approx(by_hand)
    assert prediction_distance(zero, one, batch) == pytest.approx(2**0.5)
    assert squared_prediction_difference(zero, one, batch) == pytest.approx(2.0)
    assert squared_prediction_difference(one, one, batch) == 0


def test_mean_cosine_is_one_for_positive_multiples_and_zero_for_nothing():
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    assert mean_cosine(rows, rows * torch.tensor([[5.0], [1e-20]])) == pytest.approx(1.0)
    assert mean_cosine(rows, -rows) == pytest.approx(-1.0)
    assert mean_cosine(rows, torch.zeros(2, 2)) == 0


def test_implicit_weights_recover_a_linear_predictor_and_expose_one_that_is_not():
    batch = prompts(dim_y=1)
    probes = torch.rand(6, 40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    weights, r2 = implicit_weights(as_predictor(ols_weights), batch.x, batch.y, probes)
    torch.testing.assert_close(weights, ols_weights(batch.x, batch.y))
    torch.testing.assert_close(r2, torch.ones_like(r2))

    def nearest(x, y, x_query):
        index = torch.cdist(x_query, x).argmin(-1)
        return y.gather(1, index[..., None])

    assert (implicit_weights(nearest, batch.x, batch.y, probes)[1] < 0.98).all()
    with pytest.raises(ValueError, match="probes"):
        implicit_weights(nearest, batch.x, batch.y, probes[:, :4])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda b: ridge_weights(b.x, b.y, 0.0), "penalty"),
        (lambda b: gd_weights(b.x, b.y, 0.1, 0), "steps"),
        (lambda b: gd_weights(b.x, b.y, (0.1, 0.2), 3), "lr"),
        (lambda b: gd_weights(b.x, b.y, float("inf")), "lr"),
        (lambda b: gdpp_weights(b.x, b.y, 0.1, float("nan"), 2), "gamma"),
        (lambda b: gd_weights(b.x, b.y, 0.1, start=torch.zeros(4, 2)), "start"),
        (lambda b: ols_weights(b.x, b.y[:, :-1]), "shapes"),
        (lambda b: sensitivities(lambda x, y, q: q[..., :1], b), "shape"),
        (lambda b: sensitivities(lambda x, y, q: torch.zeros(len(q), 1, 2), b), "differentiably"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call(prompts())


# -- decoders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["gpt2", "llama", "qwen2", "mistral"])
def decoder(request):
    return InContextDecoder(tiny_model(request.param), dim_x=4, dim_y=2, generator=torch.Generator().manual_seed(0))


def test_a_decoders_curve_never_sees_the_answer_or_what_follows(decoder):
    batch = prompts(dtype=torch.float32)
    with torch.no_grad():
        before = decoder.curve(batch.x, batch.y)
        for k in range(batch.n_context):
            x, y = batch.x.clone(), batch.y.clone()
            y[:, k:] += 5.0
            x[:, k + 1 :] -= 3.0
            after = decoder.curve(x, y)
            # 1e-5: rows are computed in one matrix product with others whose values changed
            torch.testing.assert_close(after[:, : k + 1], before[:, : k + 1], atol=1e-5, rtol=0)
            if k + 1 < batch.n_context:
                assert (after[:, k + 1 :] - before[:, k + 1 :]).abs().amax() > 1e-3


def test_asking_a_decoder_equals_the_point_of_its_curve(decoder):
    batch = prompts(dtype=torch.float32)
    with torch.no_grad():
        curve = decoder.curve(batch.x, batch.y)
        for k in (0, 3, 6):
            asked = decoder(batch.x[:, :k], batch.y[:, :k], batch.x[:, k : k + 2])
            torch.testing.assert_close(asked[:, 0], curve[:, k], atol=1e-5, rtol=1e-4)
            alone = decoder(batch.x[:, :k], batch.y[:, :k], batch.x[:, k + 1 : k + 2]) if k < 6 else asked[:, :1]
            torch.testing.assert_close(asked[:, -1:], alone, atol=1e-5, rtol=1e-4)


def test_a_decoder_is_differentiable_in_the_query_and_trains(decoder):
    batch = prompts(dtype=torch.float32)
    assert sensitivities(decoder, batch).abs().amax() > 1e-4
    loss = prompt_loss(decoder, batch)
    loss.backward()
    assert decoder.read_in.weight.grad.abs().amax() > 0
    assert all(
        p.grad is not None for n, p in decoder.decoder.named_parameters() if "embed_tokens" not in n and "wte" not in n
    )


def test_an_encoder_is_refused():
    with pytest.raises(ValueError, match="not causal"):
        InContextDecoder(tiny_model("bert"), dim_x=4)


def test_a_decoder_names_what_does_not_fit(decoder):
    batch = prompts(n=40, dtype=torch.float32)
    with pytest.raises(ValueError, match="81 tokens"):
        decoder(batch.x, batch.y, batch.x_query)
    with pytest.raises(ValueError, match="dim_x 4"):
        decoder(batch.x[..., :3], batch.y, batch.x_query[..., :3])
    with pytest.raises(ValueError, match="dim_y 2"):
        decoder(batch.x, batch.y[..., :1], batch.x_query)
    with pytest.raises(ValueError, match="dim_x"):
        InContextDecoder(tiny_model("gpt2"), dim_x=0)
