"""Meta-test: intervals, baselines against scikit-learn, and the same sequences for all."""

import numpy as np
import pytest
import torch
from conftest import gpicl, train
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid


# --------------------------------------------------------------------------------------- intervals
@pytest.mark.parametrize("successes, n, expected", [    # Newcombe 1998, table I, method 3
    (81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)),
    (1, 29, (0.0061, 0.1718)), (29, 29, (0.8830, 1))])
def test_wilson_intervals_are_those_of_the_literature(successes, n, expected):
    assert gpicl.wilson_interval(successes, n) == pytest.approx(expected, abs=1e-4)


def test_the_interval_covers_the_truth_95_times_in_100():
    random = np.random.default_rng(0)
    for p in (0.05, 0.5, 0.75, 0.98):
        low, high = gpicl.wilson_interval(random.binomial(512, p, 20000), 512)
        assert ((low <= p) & (p <= high)).mean() == pytest.approx(0.95, abs=0.015)


# --------------------------------------------------------------------------------------- baselines
@pytest.fixture(scope="module")
def problems(blobs):
    """Return x (40, 31, 8) of unit length, y (40, 31) of hard tasks: the query is the last."""
    settings = gpicl.default_settings(NUM_EXAMPLES=31, PROJECTION_SIZE=8)
    x, y = gpicl.draw_sequences(blobs, 40, settings, ("baselines",))
    return torch.nn.functional.normalize(x, dim=-1), y


def scores_of(name, x, y):
    """Return the scores (B, C) of a baseline for the last of x, given the labels of the others."""
    targets = torch.nn.functional.one_hot(y[:, :-1], 10).float()
    return gpicl.BASELINES[name](x @ x.mT, targets)[:, 0]


@pytest.mark.parametrize("name, reference", [
    ("1-nearest neighbour", KNeighborsClassifier(1)), ("nearest centroid", NearestCentroid())])
def test_neighbours_and_centroids_match_scikit_learn(name, reference, problems):
    x, y = problems
    expected = [reference.fit(a[:-1], b[:-1]).predict(a[-1:])[0]
                for a, b in zip(x.numpy(), y.numpy())]
    assert gpicl.baseline_labels(x, y[:, :-1])[name].tolist() == expected


def test_ridge_and_kernel_ridge_match_scikit_learn(problems):
    x, y = problems
    for a, b, ridge, kernel in zip(x.double().numpy(), y, scores_of("ridge regression", x, y),
                                   scores_of("kernel ridge", x, y)):
        context, query, labels = a[:-1], a[-1:], torch.eye(10)[b[:-1]].numpy()
        model = Ridge(0.3, fit_intercept=False).fit(context, labels)
        assert np.allclose(ridge, model.predict(query)[0], atol=1e-3)
        # (cosine - 1) / 0.5 is minus the squared distance of unit vectors
        model = KernelRidge(alpha=0.01, kernel="rbf", gamma=1).fit(context, labels - 0.1)
        assert np.allclose(kernel, model.predict(query)[0], atol=1e-3)


def test_sgd_matches_autograd_on_explicit_weights(problems):
    x, y = problems
    for a, b, scores in zip(x[:5], y[:5], scores_of("SGD (softmax)", x, y)):
        weights = torch.zeros(10, 8, requires_grad=True)
        for _ in range(10):
            for example, label in zip(a[:-1], b[:-1]):
                loss = torch.nn.functional.cross_entropy(weights @ example, label)
                with torch.no_grad():
                    weights -= torch.autograd.grad(loss, weights)[0]
        assert torch.allclose(scores, weights @ a[-1], atol=1e-3)


def test_baselines_compare_images_at_unit_length(problems):
    x, y = problems
    longer = x * (torch.rand(40, 31, 1, generator=torch.Generator().manual_seed(0)) + 0.1)
    expected = gpicl.baseline_labels(x, y[:, :-1])
    for name, labels in gpicl.baseline_labels(longer, y[:, :-1]).items():
        assert (labels == expected[name]).float().mean() > 0.95          # but for rounding


def test_a_class_without_an_example_is_never_predicted(problems):
    x, y = problems
    for n in (1, 2, 5, 30):
        for labels in gpicl.baseline_labels(x[:, -n - 1:], y[:, -n - 1:-1]).values():
            assert (labels[:, None] == y[:, -n - 1:-1]).any(1).all()


# ---------------------------------------------------------------------------------------- sequences
def test_the_sequences_are_the_same_for_all_seeds_and_models(blobs, tiny):
    def first(dataset=blobs, num_tasks=0, **more):
        return next(gpicl.meta_test_batches(dataset, 64, tiny(**more), num_tasks))[0]
    x = first()
    for same in (dict(SEED=1), dict(MODEL_SIZE=64), dict(BATCH_SIZE=3), dict(STEPS=9)):
        assert torch.equal(x, first(**same)), same
    batches = [x for x, _ in gpicl.meta_test_batches(blobs, 2048, tiny())]
    assert torch.equal(batches[0], next(gpicl.meta_test_batches(blobs, 4096, tiny()))[0])
    assert not torch.equal(batches[0], batches[1])
    for other in (first(EVAL_SEED=1), first(blobs._replace(name="other")),
                  first(num_tasks=4), gpicl.draw_sequences(blobs, 64, tiny(), ("train", 0, 0))[0]):
        assert not torch.equal(x, other)


@pytest.mark.parametrize("n", [1, 64, 129, 300])
def test_as_many_sequences_as_asked_for(n, blobs, tiny):
    batches = [*gpicl.meta_test_batches(blobs, n, tiny())]
    assert sum(len(y) for _, y in batches) == n
    assert len({row.sum().item() for x, _ in batches for row in x}) == n


def test_seen_tasks_are_those_of_training(blobs, tiny):
    """Fixed tasks are by SEED: a model that learnt the only one by heart still knows it."""
    settings = tiny(NUM_TASKS=1, SEED=3, STEPS=60, BATCH_SIZE=16, LEARNING_RATE=5e-3)
    model = gpicl.make_model(settings)
    train(model, blobs, settings)
    seen, unseen = (gpicl.meta_test(model, blobs, settings, "fp32", num_tasks)["in-context"]
                    for num_tasks in (1, 0))
    assert seen["accuracy"][0] > 0.8                     # the first label, from the weights
    assert unseen["accuracy"][0] < 0.3


# ------------------------------------------------------------------------------------------ curves
class Neighbour(torch.nn.Module):
    """Predicts the label of the nearest example before."""

    def forward(self, x, y):
        x = torch.nn.functional.normalize(x, dim=-1)
        near = torch.cdist(x, x) + torch.full(x.shape[1:2] * 2, 1e9).triu()
        return torch.nn.functional.one_hot(y.gather(1, near.argmin(-1)), 10).float()


def test_curves_count_what_the_model_and_the_baselines_get_right(blobs, tiny):
    settings = tiny(EVAL_SEQUENCES=100)
    curves = gpicl.meta_test(Neighbour(), blobs, settings, "fp32")
    assert set(curves) == {"in-context", *gpicl.BASELINES}
    model, baseline = curves["in-context"], curves["1-nearest neighbour"]
    assert model["examples"] == [*range(12)] and baseline["examples"] == [1, 2, 5, 10, 11]
    for n, accuracy in zip(baseline["examples"], baseline["accuracy"]):
        assert accuracy == pytest.approx(model["accuracy"][n], abs=0.011)
    x, y = (torch.cat(part) for part in zip(*gpicl.meta_test_batches(blobs, 100, settings)))
    expected = (Neighbour()(x, y).argmax(-1) == y).float().mean(0)
    assert np.allclose(model["accuracy"][1:], expected[1:])
    assert model["accuracy"][11] > model["accuracy"][1] + 0.2
    for n, accuracy in zip(*map(curves["nearest centroid"].get, ("examples", "accuracy"))):
        labels = gpicl.baseline_labels(x[:, :n + 1], y[:, :n])["nearest centroid"]
        assert accuracy == pytest.approx((labels == y[:, n]).float().mean().item())
    for curve in curves.values():
        assert curve["sequences"] == 100
        assert len(curve["examples"]) == len(curve["accuracy"]) == len(curve["low"])
        assert all(a <= b <= c for a, b, c in zip(curve["low"], curve["accuracy"], curve["high"]))


@pytest.mark.parametrize("n", [2, 3, 12, 100, 101, 777])
def test_tables_end_with_the_longest_context(n, tiny):
    lengths = gpicl.context_lengths(tiny(NUM_EXAMPLES=n))
    assert lengths[0] == 0 and lengths[-1] == n - 1 and lengths == sorted({*lengths})


def test_meta_test_leaves_the_model_as_it_was(blobs, tiny):
    model = gpicl.make_model(tiny())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    gpicl.meta_test(model, blobs, tiny(), "fp32")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
