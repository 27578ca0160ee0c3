"""Means and intervals over the seeds, tables and figures of the experiments."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from experiments import figures


def test_mean_and_interval_are_students():
    values = [0.3, 0.5, 0.45, 0.7]
    mean, half = figures.mean_interval([dict(p=value) for value in values], "p")
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert mean == pytest.approx(np.mean(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-3)
    for freedom in (1, 5, 10, 11, 20, 100):
        assert figures.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)
    assert math.isnan(figures.mean_interval([dict(p=0.5)], "p")[1])


def test_rank_correlation_is_spearmans():
    generator = np.random.default_rng(0)
    for _ in range(3):
        x, y = generator.integers(6, size=20), generator.standard_normal(20)
        value, low, high = figures.rank_correlation(x, y)
        assert value == pytest.approx(stats.spearmanr(x, y).statistic) and low < value < high


def test_every_name_has_its_tick_and_no_legend_lies_on_a_curve():
    names, figure = list("abcdefghijkl"), Figure(layout="constrained")
    for panel in figure.subplots(1, 2):
        figures.draw_curves(panel, [dict(x=name, y=1.0, by="one") for name in names], "x", "y",
                            "by", "names", "values")
        assert [label.get_text() for label in panel.get_xticklabels()] == names
        assert panel.get_legend() is None
    figures.add_legend(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one"]
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().y1 < min(
        panel.get_tightbbox().y0 for panel in figure.axes)


def test_a_table_has_means_intervals_and_gaps():
    rows = [dict(n=n, kind=kind, p=p) for n, kind, p in (
        (10, "a", 0.5), (10, "a", 0.5), (5, "a", 0.25), (10, "b", 1.0))]
    lines = figures.table_lines(rows, "n", "p", "kind", "Title")
    assert lines[:2] == ["", "Title"] and lines[2].split() == ["5", "10"]
    assert [line.split() for line in lines[3:]] == [
        ["a", "25.0", "50.0", "±0.0"], ["b", "-", "100.0"]]
