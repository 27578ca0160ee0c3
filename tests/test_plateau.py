"""Plateau: its length, when a run may end, and a model that starts by looking back."""

import math

import numpy as np
import pytest
import torch
from conftest import gpicl
from matplotlib.figure import Figure
from scipy import stats
from test_sweep import read_csv, sweep_flags

from experiments import plateau, sweep


def test_the_smallest_form(blobs_file, tmp_path, capsys):
    flags = sweep_flags(blobs_file, tmp_path, **dict.fromkeys(plateau.BASE), SEEDS=1, STEPS=1,
                        MODEL_SIZE=16)
    assert sweep.main("plateau", flags) == 0
    rows = read_csv(tmp_path / "results" / "plateau.csv")
    assert {row["tested_on"] for row in rows} == {"training tasks", "unseen tasks"}
    assert {"BATCH_SIZE", "NUM_TASKS", "ADAM_EPSILON", "length", "left", "steps"} <= {*rows[0]}
    assert {row["left"] for row in rows} == {"False"}
    assert "unseen tasks more than 1, left in 0 of 1 runs" in capsys.readouterr().out


def test_a_factor_cannot_be_fixed(blobs_file, tmp_path, capsys):
    assert sweep.main("plateau", sweep_flags(blobs_file, tmp_path, BATCH_SIZE=4,
                                              PROJECTION_SIZE=None)) == 2
    assert "BATCH_SIZE: runs are compared by it" in capsys.readouterr().err


def test_plateau_ends_where_the_loss_leaves_for_good():
    guess, steps = math.log(10), [10, 20, 30, 40, 50]
    assert plateau.plateau_length(steps, [guess, guess, 2.1, 2.0, 1.9]) == 30
    assert plateau.plateau_length(steps, [guess, 2.1, guess, 2.0, 1.9]) == 40
    assert plateau.plateau_length(steps, [2.0] * 5) == 10
    assert plateau.plateau_length(steps, [guess] * 5) is None
    assert plateau.plateau_length(steps, [2.0, 2.0, 2.0, 2.0, math.nan]) is None


def test_power_law_is_least_squares_with_students_interval():
    x, y = np.array([16, 32, 64, 128, 256]), np.array([900, 520, 300, 190, 90])
    fit = stats.linregress(np.log(x), np.log(y))
    assert plateau.power_law(x, y) == pytest.approx(
        (fit.slope, stats.t.ppf(0.975, 3) * fit.stderr), rel=2e-3)
    exponent, half = plateau.power_law(x, 5000 * x**-0.7)
    assert exponent == pytest.approx(-0.7) and half < 1e-6


@pytest.mark.parametrize("knows_all, expected", [
    (False, [("unseen tasks", None, False, 200), ("training tasks", 20, True, 200)]),
    (True, [("unseen tasks", 20, True, 60), ("training tasks", 20, True, 60)])])
def test_a_run_ends_when_all_kinds_of_tasks_have_left_the_plateau(
        knows_all, expected, blobs, tiny, monkeypatch):
    """A model that knows the training tasks from the start, and fresh ones or not."""
    monkeypatch.setattr(sweep, "training_run", lambda *_: ((None, i + 1) for i in range(200)))
    monkeypatch.setattr(gpicl, "draw_sequences", lambda dataset, n, settings, key, tasks: (
        torch.full((1, 1, 1), 9.0 * (knows_all or tasks > 0)), torch.zeros(1, 1).long()))
    monkeypatch.setattr(gpicl, "compute_logits", lambda model, x, *_: x * torch.eye(10)[0])
    rows = plateau.measure(tiny(NUM_TASKS=8, STEPS=200), (blobs, blobs, {}), "fp32")
    assert [tuple(row[key] for key in ("tested_on", "length", "left", "steps"))
            for row in rows] == expected
    rows = plateau.measure(tiny(NUM_TASKS=0, STEPS=200), (blobs, blobs, {}), "fp32")
    assert [row["tested_on"] for row in rows] == ["unseen tasks"]        # fresh ones to train on


def test_it_is_measured_on_validation_images(blobs, tiny, monkeypatch):
    drawn, draw_sequences = set(), gpicl.draw_sequences
    monkeypatch.setattr(gpicl, "draw_sequences", lambda dataset, n, settings, key, *rest: (
        drawn.add((key[0], dataset.name, n)), draw_sequences(dataset, n, settings, key, *rest))[1])
    data = blobs, blobs._replace(name="validation"), {}
    plateau.measure(tiny(STEPS=1), data, "fp32")
    assert drawn == {("plateau", "validation", 64), ("train", "blobs", 8)}


def rows_of_all_cells(length):
    cells = [cell for i, cell in enumerate(plateau.CELLS) if cell not in plateau.CELLS[:i]]
    return [dict(cell, SEED=seed, tested_on="unseen tasks", length=length(cell),
                 left=length(cell) is not None, steps=60) for cell in cells for seed in (0, 1)]


def test_every_factor_is_reported_and_drawn():
    figure = Figure()
    lines = plateau.report(rows_of_all_cells(lambda cell: 40 + 640 // cell["BATCH_SIZE"]), figure)
    ticks = [label.get_text().replace("\n", " ") for panel in figure.axes
             for label in panel.get_xticklabels()]
    values = [value for cells in plateau.FACTORS.values() for value in cells]
    assert ticks == values and not any(panel.get_legend() for panel in figure.axes)
    assert all(any(line.startswith(f"  {value} ") for line in lines) for value in values)
    assert [panel.get_xlabel() for panel in figure.axes] == list(plateau.FACTORS)
    assert "  64                       unseen tasks 50 ± 0, left in 2 of 2 runs" in lines
    assert "from 10 runs" in lines[-1]


def test_runs_that_stayed_on_the_plateau_are_told_and_not_fitted():
    rows = rows_of_all_cells(lambda cell: None if cell["BATCH_SIZE"] == 16 or
                             cell["TOKEN_FORMAT"] == "paper" else 40)
    figure = Figure()
    lines = plateau.report(rows, figure)
    assert "  16                       unseen tasks more than 60, left in 0 of 2 runs" in lines
    assert "from 8 runs" in lines[-1]
    hollow = [line for line in figure.axes[0].get_lines() if line.get_fillstyle() == "none"]
    assert [line.get_ydata().tolist() for line in hollow] == [[60, 60]]
