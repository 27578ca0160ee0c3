"""Features: the same model on three kinds of input, and files that are missing."""

import numpy as np
import pytest
from conftest import gpicl
from matplotlib.figure import Figure
from test_sweep import read_csv, sweep_flags

from experiments import features, sweep


@pytest.fixture
def files(tmp_path):
    """Return flags that name a file of features and one of colour images."""
    random, y = np.random.default_rng(0), np.arange(60) % 10
    features_file, pixels_file = tmp_path / "features.npz", tmp_path / "pixels.npz"
    np.savez(features_file, x=random.standard_normal((60, 50)).astype(np.float16), y=y)
    np.savez(pixels_file, x=random.integers(256, size=(60, 32, 32, 3)).astype(np.uint8), y=y)
    return dict(FEATURES_FILE=features_file, PIXELS_FILE=pixels_file)


def test_the_smallest_form(blobs_file, files, tmp_path):
    assert sweep.main("features", sweep_flags(blobs_file, tmp_path, MODEL_SIZE=16, **files)) == 0
    rows = read_csv(tmp_path / "results" / "features.csv")
    learners = [*features.IN_CONTEXT, *gpicl.BASELINES]
    inputs = ["CIFAR10, ImageNet features", "CIFAR10, pixels", "blobs"]
    assert len(rows) == 2 * len(inputs) * len(learners) * 3
    assert {(row["inputs"], row["learner"], row["examples"]) for row in rows} == {
        (kind, learner, n) for kind in inputs for learner in learners for n in "125"}
    assert (tmp_path / "results" / "features.png").stat().st_size > 10000


@pytest.mark.parametrize("missing", ["FEATURES_FILE", "PIXELS_FILE"])
def test_a_missing_file_is_named_before_training(
        missing, blobs_file, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "trained_model", None)    # would be called in vain
    files[missing] = "nowhere.npz"
    assert sweep.main("features", sweep_flags(blobs_file, tmp_path, **files)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {missing}: there is no file nowhere.npz; put an .npz file")
    assert error.count("\n") == 1


@pytest.mark.parametrize("more, words", [
    (dict(SHOTS=999999), "--SHOTS=999999"), (dict(NUM_EXAMPLES=61, VALIDATION_IMAGES=99),
                                     "has 60 rows")])
def test_what_cannot_work_is_refused_before_training(
        more, words, blobs_file, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "trained_model", None)
    assert sweep.main("features", sweep_flags(blobs_file, tmp_path, **files, **more)) == 2
    assert words in capsys.readouterr().err


def test_all_learners_are_measured_after_the_same_numbers_of_examples(
        tiny, files, blobs, monkeypatch):
    def count_correct(model, dataset, n, settings, precision, lengths):
        return {"in-context": np.arange(12), **({"ridge": np.array(lengths)} if lengths else {})}

    monkeypatch.setattr(sweep, "trained_model", lambda *_: None)
    monkeypatch.setattr(gpicl, "count_correct", count_correct)
    settings = tiny(**{key: str(path) for key, path in files.items()})
    data = blobs, None, {"blobs": blobs}
    rows = features.measure(settings, data, "fp32")
    assert {row["learner"] for row in rows} == {"in-context, default", "ridge"}
    assert all(row["accuracy"] == row["examples"] / 64 for row in rows)
    settings.MODEL = "experiments.guided:GuidedTransformer"
    rows = features.measure(settings, data, "fp32")      # the baselines stand beside the default
    assert {row["learner"] for row in rows} == {"in-context, guided"}


def test_both_models_stand_first_and_every_input_has_a_panel():
    rows = [dict(inputs=kind, learner=learner, examples=n, accuracy=0.5)
            for kind in ("features", "pixels")
            for learner in ("in-context, default", "ridge", "in-context, guided") for n in (1, 5)]
    figure = Figure()
    lines = features.report(rows, figure)
    assert [panel.get_title() for panel in figure.axes] == ["features", "pixels"]
    assert {panel.get_xlabel() for panel in figure.axes} == {"examples in context"}
    learners = "in-context, default", "in-context, guided", "ridge"
    assert all(line.startswith(name) for line, name in zip(lines[3:6], learners))
