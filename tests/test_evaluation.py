"""Evaluation: intervals by simulation, classical learners against scikit-learn."""

import numpy as np
import pytest
import torch
from conftest import gpicl
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid


def test_interval_covers_the_truth_95_times_in_100():
    random = np.random.default_rng(0)
    for p in (0.05, 0.5, 0.75, 0.98):
        low, high = gpicl.interval(random.binomial(512, p, 20000), 512)
        assert ((low <= p) & (p <= high)).mean() == pytest.approx(0.95, abs=0.015)
    low, high = gpicl.interval(np.array([0, 512]), 512)
    assert low[0] == pytest.approx(0, abs=1e-9) and high[1] == pytest.approx(1, abs=1e-9)
    assert high[0] > 0 and low[1] < 1


@pytest.fixture(scope="module")
def problems(blobs):
    """Return x (40, 31, 8) of unit length, y (40, 31) of hard tasks: the query is the last."""
    settings = gpicl.default_settings(NUM_EXAMPLES=31, PROJECTION_SIZE=8)
    x, y = gpicl.draw_sequences(blobs, 40, settings, ("classical",))
    return torch.nn.functional.normalize(x, dim=-1), y


def ours(name, x, y):
    """Return the scores (B, C) of our classical learner, absent classes masked as in count_hits."""
    targets = torch.nn.functional.one_hot(y[:, :-1], 10).float()
    scores = gpicl.CLASSICAL[name](gpicl.cosines_of(x @ x.mT), targets)[:, 0]
    return scores.masked_fill(targets.sum(1) == 0, -np.inf)


@pytest.mark.parametrize("name, reference", [
    ("1-nearest neighbour", KNeighborsClassifier(1)), ("nearest centroid", NearestCentroid())])
def test_neighbours_and_centroids_match_scikit_learn(name, reference, problems):
    x, y = problems
    expected = [reference.fit(a[:-1], b[:-1]).predict(a[-1:])[0]
                for a, b in zip(x.numpy(), y.numpy())]
    assert ours(name, x, y).argmax(-1).tolist() == expected


def test_ridge_and_kernel_ridge_match_scikit_learn(problems):
    x, y = problems
    for a, b, ridge, kernel in zip(x.double().numpy(), y, ours("ridge regression", x, y),
                                   ours("kernel ridge", x, y)):
        seen, query, labels = a[:-1], a[-1:], torch.eye(10)[b[:-1]].numpy()
        present = labels.sum(0) > 0
        model = Ridge(0.3, fit_intercept=False).fit(seen, labels)
        assert np.allclose(ridge[present], model.predict(query)[0, present], atol=1e-3)
        # (cosine - 1) / 0.5 is minus the squared distance of unit vectors
        model = KernelRidge(alpha=0.01, kernel="rbf", gamma=1).fit(seen, labels - 0.1)
        assert np.allclose(kernel[present], model.predict(query)[0, present], atol=1e-3)


def test_sgd_matches_autograd_on_explicit_weights(problems):
    x, y = problems
    for a, b, scores in zip(x[:5], y[:5], gpicl.sgd(x @ x.mT, torch.eye(10)[y[:, :-1]])[:5, 0]):
        weights = torch.zeros(10, 8, requires_grad=True)
        for _ in range(10):
            for example, label in zip(a[:-1], b[:-1]):
                loss = torch.nn.functional.cross_entropy(weights @ example, label)
                with torch.no_grad():
                    weights -= torch.autograd.grad(loss, weights)[0]
        assert torch.allclose(scores, weights @ a[-1], atol=1e-3)


def test_classical_learners_compare_images_at_unit_length(problems):
    x, y = problems
    length = torch.rand(40, 31, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    long, gram = x * length, x @ x.mT
    expected = {name: ours(name, x, y).argmax(-1) for name in gpicl.CLASSICAL}
    for name, labels in gpicl.classical_labels(long @ long.mT, y[:, :-1]).items():
        assert (labels == expected[name]).float().mean() > 0.95          # but for rounding
    assert torch.allclose(gpicl.cosines_of(long @ long.mT), gram, atol=1e-5)
    assert gpicl.cosines_of(torch.zeros(1, 2, 2)).tolist() == [[[0, 0], [0, 0]]]


def test_all_learners_see_the_same_sequences_and_curves_add_up(blobs, tiny):
    settings = tiny(EVAL_SEQUENCES=100, AVERAGED_PASSES=8)
    model = gpicl.InContextModel(settings)
    curves, _ = gpicl.evaluate(model, blobs, settings, "fp32")
    assert set(curves) == {"Transformer", *gpicl.CLASSICAL, "mean of 8 passes"}
    assert curves["Transformer"]["examples"] == list(range(12))
    x, y = (torch.cat(part) for part in zip(*gpicl.evaluation_batches(blobs, 100, settings)))
    expected = (gpicl.logits_of(model, x, y, "fp32").argmax(-1) == y).float().mean(0)
    assert np.allclose(curves["Transformer"]["accuracy"], expected)
    for k, accuracy in zip(*map(curves["nearest centroid"].get, ("examples", "accuracy"))):
        right = ours("nearest centroid", x[:, :k + 1], y[:, :k + 1]).argmax(-1) == y[:, k]
        assert accuracy == pytest.approx(right.float().mean().item())
    for curve in curves.values():
        assert len(curve["examples"]) == len(curve["accuracy"]) == len(curve["low"])
        assert all(a <= b <= c for a, b, c in zip(curve["low"], curve["accuracy"], curve["high"]))


def test_evaluation_does_not_depend_on_the_training_seed(blobs, tiny):
    one, other = (next(gpicl.evaluation_batches(blobs, 8, tiny(SEED=seed))) for seed in (0, 1))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


class Neighbour(torch.nn.Module):
    """Predicts the label of the nearest earlier example; the labels' order doesn't matter to it."""

    def forward(self, x, y):
        near = torch.cdist(x, x) + torch.full(x.shape[1:2] * 2, 1e9).triu()
        return 50 * torch.nn.functional.one_hot(y.gather(1, near.argmin(-1)), 10).float()


def test_averaging_undoes_its_permutations_and_beats_one_noisy_pass(blobs, tiny):
    """With few outputs one projection is noisy; the mean over several must win clearly."""
    settings = tiny(EVAL_SEQUENCES=400, PROJECTION_SIZE=6, AVERAGED_PASSES=8)
    single = gpicl.count_hits(Neighbour(), blobs, 400, settings, "fp32")[0]["in-context"][-1]
    one, eight = (gpicl.count_averaged_hits(
        Neighbour(), blobs, 400, tiny(PROJECTION_SIZE=6, AVERAGED_PASSES=n), "fp32")
        for n in (1, 8))
    assert abs(one - single) < 70                        # the same kind of guess: 3 std of chance
    assert eight > max(one, single) + 20
    assert eight == gpicl.count_averaged_hits(Neighbour(), blobs, 400, settings, "fp32")


def test_flops_are_those_of_the_matrix_products(tiny):
    settings = tiny(PROJECTION_SIZE=32)
    model = gpicl.InContextModel(settings)
    x, y = torch.randn(2, 12, 32), torch.randint(10, (2, 12))
    found = gpicl.flops(model, x, y)
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p.shape[1] > 4)
    assert 4 * weights * 24 < found < 6 * weights * 24 * 1.6          # attention comes on top
    assert gpicl.matmul_rate(torch.device("cpu"), "fp32", 256) > 1e8
    assert all(p.grad is None for p in model.parameters())


def test_seeds_names_and_fixed_tasks_give_other_test_sequences(blobs, tiny):
    def first(dataset=blobs, num_tasks=0, **more):
        return next(gpicl.evaluation_batches(dataset, 64, tiny(**more), num_tasks))[0]
    one, two = (x for x, _ in gpicl.evaluation_batches(blobs, 128, tiny()))
    others = two, first(EVAL_SEED=1), first(blobs._replace(name="other")), first(num_tasks=4)
    assert torch.equal(one, first()) and not any(torch.equal(one, x) for x in others)


class Loud(torch.nn.Module):
    """Knows the labels, but every third call is very sure of a wrong one."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, y):
        self.seen.append((y[:, :-1] == y[:, -1:]).sum(1))
        wrong = len(self.seen) % 3 == 0
        return (100 if wrong else 10) * torch.nn.functional.one_hot((y + wrong) % 10, 10).float()


def test_averaged_are_the_probabilities_for_the_same_sequences(blobs, tiny):
    model = Loud()
    assert gpicl.count_averaged_hits(model, blobs, 64, tiny(AVERAGED_PASSES=3), "fp32") == 64
    (_, y), = gpicl.evaluation_batches(blobs, 64, tiny())
    assert all(torch.equal(some, (y[:, :-1] == y[:, -1:]).sum(1)) for some in model.seen)


def test_every_averaged_pass_has_labels_and_an_order_of_its_own(blobs, tiny):
    model, seen = gpicl.InContextModel(tiny()), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    gpicl.count_averaged_hits(model, blobs, 64, tiny(AVERAGED_PASSES=2), "fp32")
    one, other = seen
    assert not torch.equal(one[:, -1], other[:, -1])     # the query's label
    alike, too = (y[:, :, None] == y[:, None] for y in seen)             # whatever the names
    assert not torch.equal(alike, too)


def test_logits_that_are_not_finite_are_told_in_every_test(blobs, tiny):
    settings = tiny(AVERAGED_PASSES=2)
    model = gpicl.InContextModel(settings)
    torch.nn.init.constant_(model.head.weight, torch.nan)
    x, y = gpicl.draw_sequences(blobs, 4, settings, ("test",))
    for ask in (lambda: gpicl.count_hits(model, blobs, 8, settings, "fp32"),
                lambda: gpicl.count_averaged_hits(model, blobs, 8, settings, "fp32"),
                lambda: gpicl.last_predictions(model, x, y, "fp32")):
        with pytest.raises(gpicl.UserError, match="logits are not finite"):
            ask()


def test_a_printed_interval_covers_the_curves_own(tiny):
    """Near 0 and 100 % intervals are one-sided."""
    low, high = gpicl.interval(np.array([0, 64]), 64)
    curve = dict(examples=[0, 1], accuracy=[0.0, 1.0], low=low.tolist(), high=high.tolist())
    lines = gpicl.result_table(dict(
        context_lengths=[0, 1], settings=dict(ARCHITECTURE="transformer"),
        data_sets=dict(blobs=dict(curves=dict(Transformer=curve), classes=10, paper={}))))
    assert "  95 % interval, ±                       5.7   5.7" in lines
    assert lines[-1] == "blobs@1: 100.0 ± 5.7"
