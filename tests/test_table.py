"""The paper's table: what its learners compute, what is measured and how it is shown."""

import numpy as np
import pytest
import torch
from conftest import gpicl
from matplotlib.figure import Figure
from test_sweep import read_csv, sweep_flags

from experiments import sweep, table


@pytest.fixture
def colour_file(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "colour.npz"
    np.savez(path, x=random.integers(256, size=(40, 32, 32, 3)).astype(np.uint8),
             y=np.arange(40) % 10)
    return path


def test_the_smallest_form(blobs_file, colour_file, tmp_path, capsys):
    flags = sweep_flags(blobs_file, tmp_path, MODEL_SIZE=16, CIFAR10_FILE=colour_file)
    assert sweep.main("table", flags) == 0
    rows = read_csv(tmp_path / "results" / "table.csv")
    assert {(row["method"], row["tested_on"], row["SEED"]) for row in rows} == {
        (method, data_set, seed) for method in (*table.METHODS, "SGD (softmax)", "Adam, online")
        for data_set in ("blobs", "Random", "CIFAR10") for seed in "01"}
    assert not any(row["paper"] for row in rows)         # trained on blobs: nothing to compare with
    printed = capsys.readouterr().out
    assert all(f"\n{method:22}" in printed for method in table.METHODS) and "NOTICE" not in printed
    assert (tmp_path / "results" / "table.png").stat().st_size > 10000


def test_without_cifar10_the_column_is_left_out(blobs, tiny, capsys, monkeypatch):
    settings = tiny(CIFAR10_FILE="nowhere.npz")
    table.check(settings, (blobs, blobs, {}))
    assert "there is no file nowhere.npz (CIFAR10_FILE)" in capsys.readouterr().out
    monkeypatch.setattr(sweep, "trained_model", lambda settings, *_: gpicl.make_model(settings))
    rows = table.measure(settings, (blobs, blobs, {"blobs": blobs}), "fp32")
    assert {row["tested_on"] for row in rows} == {"blobs", "Random"}


def test_cifar10_is_in_colour_whatever_the_size_of_the_others(tiny, colour_file):
    settings = tiny(IMAGE_SIZE=8, CIFAR10_FILE=str(colour_file))
    dataset = table.more_tests(settings, "cpu")["CIFAR10"]
    assert dataset.name == "CIFAR10" and dataset.x.shape == (40, 32 * 32 * 3)
    x, _ = gpicl.draw_sequences(dataset, 2, settings, ("test",))
    assert x.shape == (2, settings.NUM_EXAMPLES, settings.PROJECTION_SIZE)


def test_random_points_are_learnt_by_heart(tiny):
    settings = tiny(NUM_EXAMPLES=100, IMAGE_SIZE=8)
    dataset = table.random_points(settings, "cpu")
    assert all(len(dataset.x[dataset.y == i].unique(dim=0)) == 1 for i in range(10))
    correct = gpicl.count_correct(gpicl.make_model(settings), dataset, 64, settings, "fp32",
                                  lengths=[99])
    assert correct["1-nearest neighbour"][0] >= 63


def test_a_damaged_cifar10_is_refused_before_training(blobs_file, tmp_path, capsys):
    path = tmp_path / "damaged.npz"
    path.write_text("not an archive")
    assert sweep.main("table", sweep_flags(blobs_file, tmp_path, CIFAR10_FILE=path)) == 2
    assert "could not be read as an .npz file" in capsys.readouterr().err


def test_online_adam_is_a_linear_layer_with_torchs_adam(blobs, tiny):
    settings = tiny(NUM_EXAMPLES=30)
    x, y = gpicl.draw_sequences(blobs, 16, settings, ("test",))
    expected = []
    for images, labels in zip(x, y):
        layer = torch.nn.Linear(x.shape[2], 10)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
        for image, label in zip(images[:-1], labels[:-1]):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(image), label).backward()
            optimizer.step()
        expected.append(layer(images[-1]).detach())
    with torch.no_grad():                                # as in the middle of a test
        logits = table.online_adam(x, y[:, :-1])
    assert torch.allclose(logits, torch.stack(expected), atol=1e-4)


def test_online_adam_is_counted_on_the_models_sequences(blobs, tiny):
    settings, correct = tiny(NUM_EXAMPLES=40), 0
    for x, y in gpicl.meta_test_batches(blobs, settings.EVAL_SEQUENCES, settings):
        correct += (table.online_adam(x, y[:, :-1]).argmax(-1) == y[:, -1]).sum().item()
    assert table.online_adam_correct(blobs, settings) == correct > settings.EVAL_SEQUENCES / 3


def test_the_papers_numbers_are_for_mnist_and_100_examples_only(blobs, tiny, monkeypatch):
    monkeypatch.setattr(sweep, "trained_model", lambda *_: None)
    monkeypatch.setattr(table, "more_tests", lambda *_: {})
    monkeypatch.setattr(gpicl, "count_correct", lambda *_, lengths: {
        "in-context": np.arange(5), **{name: np.arange(1) for name in gpicl.BASELINES if lengths}})
    monkeypatch.setattr(table, "online_adam_correct", lambda *_: 8)
    mnist = blobs._replace(name="MNIST")
    for training, examples, expected in ((mnist, 100, [73.70, 70.31, 70.31]),
                                         (mnist, 50, [None] * 3), (blobs, 100, [None] * 3)):
        settings = tiny(NUM_EXAMPLES=examples)
        rows = table.measure(settings, (training, None, {"MNIST": mnist}), "fp32")
        assert [row["paper"] for row in rows] == expected
        assert [row["accuracy"] for row in rows] == [4 / 64, 0, 8 / 64]
    settings.MODEL = table.METHODS["LSTM"]["MODEL"]      # not beside others than the default
    rows = table.measure(settings, (mnist, None, {"MNIST": mnist}), "fp32")
    assert [row["method"] for row in rows] == ["LSTM"]


def test_every_row_has_its_interval_and_the_papers_number():
    rows = [dict(method=method, tested_on=data_set, accuracy=accuracy, paper=paper)
            for method, paper in (("Adam, online", 70.31), ("in-context, default", 73.7))
            for data_set in ("MNIST", "other") for accuracy in (0.75, 0.77)]
    for row in rows:
        row["paper"] = row["paper"] if row["tested_on"] == "MNIST" else None
    figure = Figure()
    *_, head, default, adam = table.report(rows, figure)
    assert head.split() == ["MNIST", "other"]
    assert default.split() == "in-context, default 76.0 ± 12.7 (73.7) 76.0 ± 12.7".split()
    assert adam.split() == "Adam, online 76.0 ± 12.7 (70.3) 76.0 ± 12.7".split()
    panel, = figure.axes
    crosses = [line.get_ydata()[0] for line in panel.get_lines()
               if line.get_marker() == "x" and len(line.get_ydata())]
    assert crosses == [73.7, 70.31] and not panel.get_legend()


def test_methods_are_compared_and_no_flag_may_make_them_one(blobs_file, tmp_path, capsys):
    assert sweep.main("table", sweep_flags(blobs_file, tmp_path, MODEL="transformer")) == 2
    assert "MODEL" in capsys.readouterr().err
