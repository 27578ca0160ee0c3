"""Phases: what is measured on which tasks, and what is said of it."""

import numpy as np
from conftest import gpicl
from matplotlib.figure import Figure
from test_sweep import read_csv, sweep_flags

from experiments import phases, sweep


def rows_of_mlp(improvements):
    """Return rows of one kind of model: {number of tasks: an improvement for each seed}."""
    return [dict(phases.KINDS["MLP, which sees no context"], MODEL_SIZE=32, NUM_TASKS=n, last=0.5,
                 SEED=seed, tested_on="unseen tasks", improvement=improvement)
            for n, of_seeds in improvements.items() for seed, improvement in enumerate(of_seeds)]


def all_rows():
    return [{**cell, "tested_on": kind, "improvement": 0.2, "last": 0.5} for cell in phases.CELLS
            for kind in ("training tasks", "unseen tasks", "FashionMNIST")]


def test_the_smallest_form(blobs_file, tmp_path):
    assert sweep.main("phases", sweep_flags(blobs_file, tmp_path, NUM_TASKS=4)) == 0
    rows = read_csv(tmp_path / "results" / "phases.csv")
    assert len(rows) == 3 * 2 * 2 and {row["SEED"] for row in rows} == {"0", "1"}
    assert {row["tested_on"] for row in rows} == {"training tasks", "unseen tasks"}
    assert {row["NUM_TASKS"] for row in rows} == {"4"}   # a flag fixes it
    assert all(float(row["improvement"]) == float(row["last"]) - float(row["first"])
               for row in rows)


def test_tasks_and_data_sets_that_are_tested(blobs, tiny, monkeypatch):
    tested = []

    def count_correct(model, dataset, n, settings, precision, num_tasks):
        tested.append((dataset.name, num_tasks))
        return {"in-context": np.arange(12)}

    monkeypatch.setattr(sweep, "trained_model", lambda *_: None)
    monkeypatch.setattr(gpicl, "count_correct", count_correct)
    data = blobs, None, {"blobs": blobs, "other": blobs._replace(name="other")}
    rows = phases.measure(tiny(NUM_TASKS=8), data, "fp32")
    assert tested == [("blobs", 8), ("blobs", 0), ("other", 0)]
    assert [row["tested_on"] for row in rows] == ["training tasks", "unseen tasks", "other"]
    assert rows[0]["last"] == 11 / 64                    # of 12 examples the last tenth is one
    rows = phases.measure(tiny(NUM_TASKS=0), data, "fp32")
    assert [row["tested_on"] for row in rows] == ["unseen tasks", "other"]    # none to train on
    rows = phases.measure(tiny(NUM_TASKS=8), (blobs, None, {"other": blobs}), "fp32")
    assert [row["tested_on"] for row in rows] == ["other"]


def test_an_improvement_counts_where_the_whole_interval_is_above_ten_points():
    lines = phases.clear_improvements(rows_of_mlp({8: (0.11, 0.2), 2048: (0.3, 0.31)}))
    assert lines == ["  unseen tasks: 95 % interval above 10 points with 2,048 tasks"]
    lines = phases.clear_improvements(rows_of_mlp({8: (0.01, 0.02)}))
    assert lines == ["  unseen tasks: 95 % interval above 10 points nowhere"]


def test_figure_shows_all_in_words():
    figure = Figure()
    lines = phases.report(all_rows(), figure)
    panels = figure.axes
    assert len(panels) == 9 and not any(panel.get_legend() for panel in panels)
    assert {panel.get_xlabel() for panel in panels} == {"number of training tasks"}
    assert {panel.get_ylabel() for panel in panels} == {"improvement (points)", "model size"}
    assert sum("model size 128: improvement" in line for line in lines) == 3
    rows = [row for row in all_rows() if row["MODEL"] != "transformer"]
    low, high = rows_of_mlp({8: (-0.2,), 16: (0.9,)})
    figure = Figure()
    phases.report([row for row in all_rows() if row["MODEL"] != low["MODEL"]] + [low, high], figure)
    bottom, top = figure.axes[6].get_ylim()
    assert bottom < -20 and top > 90                     # nothing is cut off
