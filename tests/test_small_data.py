"""Small data: the in-context classifier beside scikit-learn's."""

import json

import in_context_classifier
import numpy as np
import pytest
from conftest import gpicl

from experiments import small_data


@pytest.fixture
def weights(tiny, tmp_path, monkeypatch):
    """Put an untrained network in the place of the shipped weights."""
    settings = tiny()
    path = tmp_path / "weights.pt"
    gpicl.save_checkpoint(path, settings, gpicl.make_model(settings))
    monkeypatch.setattr(in_context_classifier, "WEIGHTS", path)


@pytest.fixture
def images(monkeypatch):
    """Put 150 images of ten classes in the place of MNIST and FashionMNIST."""
    random, y = np.random.default_rng(0), np.arange(150) % 10
    X = 3 * random.standard_normal((10, 4, 4))[y] + random.standard_normal((150, 4, 4))
    monkeypatch.setattr(small_data, "image_sets", lambda folder: iter(
        [("MNIST", X, y), ("FashionMNIST", X, y)]))


def command(*arguments):
    return gpicl.main([str(word) for word in arguments], small_data.run_command_line)


def test_the_smallest_form(weights, images, monkeypatch, tmp_path, capsys):
    random, y = np.random.default_rng(0), np.arange(120) % 3
    X = 3 * random.standard_normal((3, 5))[y] + random.standard_normal((120, 5))
    monkeypatch.setattr(small_data, "small_sets", lambda folder: iter([("table", X, y, False)]))
    assert command("--SPLITS=2", f"--RESULTS_DIR={tmp_path}") == 0
    record = json.loads((tmp_path / "small_data.json").read_text())
    accuracy = record["data_sets"]["table"]["accuracy"]
    assert [*accuracy] == [*small_data.make_learners(images=False)]
    assert all(0 <= value["mean"] <= 1 and value["half"] >= 0 for value in accuracy.values())
    assert accuracy["logistic regression"]["mean"] > 0.9 > accuracy["most frequent class"]["mean"]
    assert 0 <= record["data_sets"]["table"]["calibration_error"] <= 1
    assert record["seconds_10000_rows"] > 0 and record["splits"] == 2 and record["sklearn"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in accuracy)


def test_the_smallest_form_of_unequal_classes(weights, images, monkeypatch, tmp_path):
    names = [name for name, *_ in small_data.unequal_sets("")]
    assert names == ["MNIST skewed", "MNIST, 8 or not", "FashionMNIST skewed"]
    only = [data for data in small_data.unequal_sets("") if data[0] == "MNIST, 8 or not"]
    monkeypatch.setattr(small_data, "unequal_sets", lambda folder: iter(only))
    assert command("unequal", "--SPLITS=2", f"--RESULTS_DIR={tmp_path}") == 0
    record = json.loads((tmp_path / "small_data_unequal.json").read_text())
    assert [*record["data_sets"]] == ["MNIST, 8 or not"]


def test_skewed_classes_are_ever_rarer(images):
    (_, _, y, _), *_ = small_data.unequal_sets("")
    counts = np.bincount(y, minlength=10)
    assert 15 >= counts[0] > counts[3] > counts[8:].max()


def test_images_that_are_not_there_are_left_out(monkeypatch, capsys):
    def load_dataset(name, *rest):
        raise FileNotFoundError(f"{name} could not be loaded.")

    monkeypatch.setattr(gpicl, "load_dataset", load_dataset)
    assert [name for name, *_ in small_data.small_sets("")] == [
        "iris", "wine", "breast_cancer", "digits"]
    assert "NOTICE: FashionMNIST could not be loaded. It is left out." in capsys.readouterr().out


def test_calibration_error_on_known_cases():
    sure = np.tile([0.9, 0.1], (100, 1))
    assert small_data.calibration_error(sure, np.arange(100) < 90) == pytest.approx(0)
    assert small_data.calibration_error(sure, np.arange(100) < 50) == pytest.approx(0.4)
    both = np.concatenate([sure, np.tile([0.6, 0.4], (100, 1))])         # 10 and 20 points off
    correct = np.concatenate([np.arange(100) < 80, np.arange(100) < 80])
    assert small_data.calibration_error(both, correct) == pytest.approx(0.15)
    assert small_data.calibration_error(np.ones((5, 1)), np.ones(5)) == 0


def test_wrong_use_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(in_context_classifier, "WEIGHTS", tmp_path / "nowhere.pt")
    for arguments, words in ((["--SPLITS=1"], "use --SPLITS=2 or more"),
                             (["--SEED=1"], "--SEED=1"), (["equal"], "equal"),
                             (["--SPLITS=0"], "SPLITS"),
                             (["--SPLITS=2"], "nowhere.pt could not be read")):
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
