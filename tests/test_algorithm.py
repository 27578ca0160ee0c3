"""Which learner the model acts like: agreement beyond accuracy, on known cases."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import gpicl
from matplotlib.figure import Figure
from test_sweep import read_csv, sweep_flags

from experiments import algorithm, sweep


class Neighbour(torch.nn.Module):
    """Predicts the label of the most similar image before, by the cosine."""

    def forward(self, x, y):
        x = F.normalize(x, dim=-1)
        before = torch.ones(x.shape[1], x.shape[1]).tril(-1).bool()
        nearest = (x @ x.mT).masked_fill(~before, -2).argmax(-1)
        return F.one_hot(y.gather(1, nearest), gpicl.C).float()


def guesses(y, accuracy, random):
    """Return labels (n,) that are right as often as that, wrong ones spread evenly."""
    wrong = (y + random.integers(1, 10, size=len(y))) % 10
    return np.where(random.random(len(y)) < accuracy, y, wrong)


def test_the_smallest_form(blobs_file, tmp_path):
    flags = sweep_flags(blobs_file, tmp_path, MODEL_SIZE=16, EVAL_SEQUENCES=64)
    assert sweep.main("algorithm", flags) == 0
    rows = read_csv(tmp_path / "results" / "algorithm.csv")
    learners = ["in-context", *gpicl.BASELINES, algorithm.TWIN]
    assert {row["model"] for row in rows} == {*algorithm.IN_CONTEXT}
    assert {row["other"] for row in rows if row["learner"] == "in-context"} == {*learners[1:]}
    at_end = [row for row in rows if row["step"] == "2" and row["model"] == "in-context, default"]
    assert len(at_end) == 2 * 7 * 6 / 2                  # all pairs, for either seed
    assert {row["learner"] for row in rows if row["step"] == "1"} == {"in-context"}
    assert (tmp_path / "results" / "algorithm.png").stat().st_size > 10000


def test_agreement_beyond_accuracy():
    random = np.random.default_rng(0)
    y = random.integers(10, size=100000)
    a, b, ten = guesses(y, 0.7, random), guesses(y, 0.6, random), np.full(len(y), 10)
    independent = algorithm.agreement(a, b, y, ten)
    assert abs(independent["kappa"]) < 0.01 and abs(independent["same_mistake"] - 1 / 9) < 0.01
    assert independent["agreement"] == pytest.approx(independent["expected"], abs=0.01)
    same = algorithm.agreement(a, a, y, ten)
    assert same["kappa"] == 1 and same["same_mistake"] == 1
    assert math.isnan(algorithm.agreement(y, y, y, ten)["kappa"])        # nothing was left to agree
    half = algorithm.agreement(a, np.where(random.random(len(y)) < 0.5, a, b), y, ten)
    assert 0.4 < half["kappa"] < 0.6


def test_few_classes_are_no_agreement():
    """Guesses among the few classes of a context are the same more often, by chance."""
    random = np.random.default_rng(0)
    n_classes = random.integers(2, 11, size=100000)
    y, a, b = ((random.random(len(n_classes)) * n_classes).astype(int) for _ in range(3))
    assert abs(algorithm.agreement(a, b, y, n_classes)["kappa"]) < 0.05
    assert algorithm.agreement(a, b, y, np.full(len(y), 10))["kappa"] > 0.1


def test_queries_of_classes_that_are_not_in_the_context_do_not_count(monkeypatch):
    y = np.array([[0, 1, 0, 2], [0, 0, 0, 0], [3, 4, 4, 4]])     # unseen, only one, as it should be
    counted = []
    monkeypatch.setattr(algorithm, "agreement", lambda a, b, y, n_classes: counted.append(
        (a.tolist(), b.tolist(), y.tolist(), n_classes.tolist())) or {})
    predicted = dict(one=np.array([[5], [6], [7]]), two=np.array([[8], [9], [1]]))
    rows = algorithm.compare_all(predicted, y, [3], [("one", "two")])
    assert counted == [([7], [1], [4], [2])]
    assert rows == [dict(examples=3, learner="one", other="two")]


def test_a_model_that_looks_up_neighbours_agrees_with_1_nn(blobs, tiny, monkeypatch):
    seeds = []
    monkeypatch.setattr(sweep, "trained_model", lambda settings, *_: (
        seeds.append(settings.SEED), Neighbour())[1])
    monkeypatch.setattr(sweep, "training_run", lambda settings, *_: (
        (Neighbour(), step + 1) for step in range(settings.STEPS)))
    noisy = blobs._replace(x=blobs.x + torch.randn(blobs.x.shape))       # else all are always right
    data = blobs, None, {"noisy": noisy}
    rows = algorithm.measure(tiny(NUM_EXAMPLES=30, STEPS=7), data, "fp32")
    assert seeds == [1000]                               # the twin's
    for other in ("1-nearest neighbour", algorithm.TWIN):
        ours = [row for row in rows if (row["learner"], row["other"]) == ("in-context", other)]
        assert {(row["step"], row["examples"]) for row in ours} == {
            (step, n) for step in (1, 3, 7) for n in (10, 20, 29)}
        assert min(row["kappa"] for row in ours) > 0.95
    others = [row["kappa"] for row in rows if row["other"] == "nearest centroid"]
    assert max(others) < 0.95


def test_the_heat_map_has_every_pair_once_in_one_order():
    rows = [dict(learner=a, other=b, kappa=kappa) for a, b, kappa in (
        ("us", "nn", 0.1), ("us", "twin", 0.2), ("nn", "twin", 0.3))]
    pairs = algorithm.all_pairs(rows)
    assert [(row["learner"], row["other"], row["kappa"]) for row in pairs] == [
        ("us", "us", 1), ("us", "nn", 0.1), ("us", "twin", 0.2),
        ("nn", "us", 0.1), ("nn", "nn", 1), ("nn", "twin", 0.3),
        ("twin", "us", 0.2), ("twin", "nn", 0.3), ("twin", "twin", 1)]


def test_the_figure_is_in_words():
    rows = [dict(model=model, step=step, tested_on=data_set, examples=n, learner="in-context",
                 other=other, kappa=0.5) for model in ("default", "guided") for step in (1, 4)
            for data_set in ("MNIST", "other") for n in (10, 99) for other in ("nn", "twin")]
    figure = Figure()
    algorithm.report(rows, figure)
    assert len(figure.axes) == 12                        # three for each data set and model
    assert {panel.get_xlabel() for panel in figure.axes} == {
        "examples in context", "meta-training steps", ""}
    names = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    assert names == ["in-context", "nn", "twin"]


def test_a_context_of_one_example_has_no_choice(blobs_file, tmp_path, capsys):
    assert sweep.main("algorithm", sweep_flags(blobs_file, tmp_path, NUM_EXAMPLES=2)) == 2
    assert "use --NUM_EXAMPLES=3 or more" in capsys.readouterr().err
