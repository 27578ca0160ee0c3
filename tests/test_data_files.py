"""Data sets, and the files of a run: what is read, what is written, what is wrong with it."""

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, gpicl

NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k")
         for kind in ("images-idx3", "labels-idx1")]


@pytest.fixture
def no_network(monkeypatch):
    """Make every download fail at once, as it does without a network."""
    from torchvision.datasets import mnist

    def refuse(*arguments, **more):
        raise RuntimeError("Error downloading: no network in this test")
    monkeypatch.setattr(mnist, "download_and_extract_archive", refuse)


@pytest.fixture
def mnist(tmp_path, no_network):
    """Return a small MNIST's folder of four .gz files: classes are stripes, with noise."""
    raw, random = tmp_path / "data" / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for part, n in (("train", 300), ("t10k", 100)):
        y = (np.arange(n) % 10).astype(np.uint8)
        x = random.integers(0, 128, (n, 28, 28), np.uint8)
        x[np.arange(n), 2 * y] = 255
        for kind, array in (("images-idx3", x), ("labels-idx1", y)):
            head = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return raw


# ------------------------------------------------------------------------------- MNIST and its like
def load(name, split, settings):
    dataset = gpicl.load_dataset(name, split, settings, "cpu")
    return dataset.x, dataset.y


def test_mnist_is_read_from_its_files(mnist, tiny, tmp_path):
    settings = tiny(DATA_DIR=str(tmp_path / "data"))
    for split, n in (("train", 300), ("test", 100)):
        x, y = load("MNIST", split, settings)
        assert x.shape == (n, 784) and torch.equal(y, torch.arange(n) % 10)
        assert abs(x.mean()) < 1e-4 and x.std().item() == pytest.approx(1, abs=1e-3)
        assert torch.equal(x.view(n, 28, 28).mean(2).argmax(1), 2 * y)


def test_how_the_files_are_compressed_does_not_matter(mnist, tiny, tmp_path):
    settings = tiny(DATA_DIR=str(tmp_path / "data"))
    x, y = load("MNIST", "train", settings)
    for level in (1, 0, None):
        for path in [*mnist.iterdir()]:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix else content
            path.unlink()
            if level is None:
                path.with_suffix("").write_bytes(content)
            else:
                path.write_bytes(gzip.compress(content, level))
        again_x, again_y = load("MNIST", "train", settings)
        assert torch.equal(x, again_x) and torch.equal(y, again_y)


def test_good_files_are_read_where_nothing_may_be_written(mnist, tiny, tmp_path, monkeypatch):
    """Neither is anything written to the folder, nor is torchvision asked, which would."""
    settings = tiny(DATA_DIR=str(tmp_path / "data"))
    before = [(path, path.stat().st_mtime) for path in sorted(mnist.rglob("*"))]
    monkeypatch.setitem(sys.modules, "torchvision", None)
    mnist.chmod(0o555)
    try:
        load("MNIST", "train", settings), load("MNIST", "test", settings)
    finally:
        mnist.chmod(0o755)
    assert before == [(path, path.stat().st_mtime) for path in sorted(mnist.rglob("*"))]


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "half": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(
        path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:]),
    "empty": lambda path: path.write_bytes(b""),
    "not gzip": lambda path: path.write_bytes(b"<html>404 Not Found</html>"),
    "another array": lambda path: path.write_bytes(gzip.compress(b"\0\0\x08\x03 not the whole")),
    "missing": lambda path: path.unlink(),
    "Kaggle's name": lambda path: path.rename(path.with_name(
        path.name.replace("-idx", ".idx").removesuffix(".gz"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_is_named_and_nothing_stands_in_for_it(
        damage, name, mnist, tiny_flags, fails, capsys, tmp_path):
    DAMAGE[damage](mnist / f"{name}.gz")
    for wanted in ("auto", "MNIST"):
        error = fails(tiny_flags(TRAIN_DATASET=wanted, EVAL_DATASETS="MNIST"))
        assert name in error and str(mnist) in error
    assert "NOTICE" not in capsys.readouterr().out and not [*(tmp_path / "runs").glob("*/*.pt")]


def test_four_files_with_kaggles_names_are_not_taken_for_absent(mnist, tiny_flags, fails):
    for path in [*mnist.iterdir()]:
        DAMAGE["Kaggle's name"](path)
    error = fails(tiny_flags(TRAIN_DATASET="auto"))
    assert "train-images-idx3-ubyte" in error and str(mnist) in error


def test_damaged_evaluation_data_are_not_left_out(mnist, tiny_flags, fails, tmp_path):
    shutil.copytree(mnist, tmp_path / "data" / "FashionMNIST" / "raw")
    DAMAGE["truncated"](tmp_path / "data" / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte.gz")
    assert "t10k-images-idx3-ubyte.gz" in fails(
        tiny_flags(TRAIN_DATASET="MNIST", EVAL_DATASETS="auto"))


def test_real_images_are_read_as_they_are(real_data, tiny):
    """1-nearest neighbour on 99 examples has the accuracy that it has on MNIST."""
    settings = tiny(DATA_DIR=str(real_data), NUM_EXAMPLES=100, PROJECTION_SIZE=784)
    for name, low, high in (("MNIST", 0.65, 0.85), ("FashionMNIST", 0.55, 0.78)):
        dataset = gpicl.load_dataset(name, "test", settings, "cpu")
        assert dataset.x.shape == (10000, 784) and dataset.classes == 10
        correct = gpicl.count_correct(gpicl.make_model(settings), dataset, 256, settings, "fp32",
                                      lengths=[99])
        assert low < correct["1-nearest neighbour"][0] / 256 < high


# -------------------------------------------------------------------------------------- stand-ins
def test_without_mnist_the_default_says_so_and_renders(
        tiny_flags, run_folder, no_network, capsys):
    assert gpicl.main(tiny_flags(TRAIN_DATASET="auto", EVAL_DATASETS="auto")) == 0
    output = capsys.readouterr().out
    assert "NOTICE" in output and "no network in this test" in output
    assert re.search(r"^RenderedDigits@11: \d+\.\d ± \d+\.\d$", output, re.MULTILINE)
    assert re.search(r"^RenderedLetters@11: \d+\.\d ± \d+\.\d$", output, re.MULTILINE)
    results = json.loads((run_folder() / "results.json").read_text())
    assert results["trained_on"] == "RenderedDigits"
    assert list(results["data_sets"]) == ["RenderedDigits", "RenderedLetters"]
    assert not any(entry["paper"] for entry in results["data_sets"].values())


def test_rendered_data_are_as_hard_as_mnist(tiny):
    settings = tiny(NUM_EXAMPLES=100, PROJECTION_SIZE=784)
    train, test = (gpicl.load_dataset("RenderedDigits", split, settings, "cpu")
                   for split in ("train", "test"))
    assert train.x.shape == (20000, 784) and len(test.y.unique()) == 10
    images = [image.tobytes() for split in (True, False)
              for image in gpicl.rendered_arrays("RenderedDigits", split)[0]]
    assert len(images) == len({*images}) == 25000        # none is both trained and tested on
    correct = gpicl.count_correct(gpicl.make_model(settings), test, 256, settings, "fp32",
                                  lengths=[99])
    assert 0.6 < correct["1-nearest neighbour"][0] / 256 < 0.85


@pytest.mark.parametrize("setting", ["TRAIN_DATASET", "EVAL_DATASETS"])
def test_a_named_data_set_is_never_substituted(setting, tiny_flags, fails, no_network):
    assert "FashionMNIST" in fails(tiny_flags(**{setting: "FashionMNIST"}))


def test_an_evaluation_set_that_is_absent_is_left_out_unless_it_was_named(
        tiny_flags, mnist, capsys):
    assert gpicl.main(tiny_flags(TRAIN_DATASET="auto", EVAL_DATASETS="auto")) == 0
    output = capsys.readouterr().out
    assert "NOTICE" in output and "FashionMNIST" in output
    assert "MNIST@11" in output and "FashionMNIST@" not in output


# -------------------------------------------------------------------------------------- .npz files
@pytest.mark.parametrize("kind", ["images", "colour", "channels first", "words", "bool"])
def test_npz_of_many_kinds_is_a_data_set(kind, tiny_flags, tmp_path, run_folder, blobs, capsys):
    """Rows and images of any size, and labels of any kind, few classes; train on one, too."""
    x = blobs.x.numpy()[:, :36].reshape(600, 6, 6)
    x = np.repeat(x[..., None], 3, -1) if kind in ("colour", "channels first") else x
    x = x.transpose(0, 3, 1, 2) if kind == "channels first" else x > 0 if kind == "bool" else x
    y = np.array(["cat", "dog", "owl"])[blobs.y % 3] if kind == "words" else blobs.y.numpy() - 3.0
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    assert gpicl.main(tiny_flags(TRAIN_DATASET=tmp_path / "mine.npz", IMAGE_SIZE=5, EVAL_DATASETS=(
        f"{tmp_path}/mine.npz,{tmp_path}/blobs.npz"))) == 0
    output = capsys.readouterr().out
    assert "mine@11: " in output and "blobs@11: " in output
    results = json.loads((run_folder() / "results.json").read_text())
    assert results["data_sets"]["mine"]["classes"] == (3 if kind == "words" else 10)


def bad_files(x, y):
    """Return {words that the error must have: arrays of an .npz file}."""
    return {
        "x_train": dict(x_train=x, y_train=y), "not x and y": dict(x=x), "other": dict(other=x),
        "astype(str)": dict(x=x, y=np.array(["a", "b"] * 300, object)),
        "could not be read": dict(x=np.array([{}] * 600, object), y=y),
        "(599,)": dict(x=x, y=y[:-1]), "30 classes": dict(x=x, y=np.arange(600) % 30),
        "1 classes": dict(x=x, y=0 * y), "NaN": dict(x=np.where(x > 2, np.nan, x), y=y),
        "none of them NaN": dict(x=x, y=np.where(np.arange(600) == 2, np.nan, y)),
        "constant": dict(x=np.full((600, 8), 0.1, np.float32), y=y), "huge": dict(x=1e36 * x, y=y),
        "<U1": dict(x=np.full((600, 4), "a"), y=y), "(600,)": dict(x=x[:, 0], y=y),
        "NUM_EXAMPLES=12": dict(x=x[:12], y=y[:12]), "VALIDATION_IMAGES": dict(x=x[:50], y=y[:50])}


@pytest.mark.parametrize("words", bad_files(np.zeros((600, 2)), np.zeros(600)))
def test_an_unusable_file_is_named_with_what_is_wrong(words, tiny_flags, fails, tmp_path, blobs):
    path = tmp_path / "bad.npz"
    np.savez(path, **bad_files(blobs.x.numpy(), blobs.y.numpy())[words])
    error = fails(tiny_flags(TRAIN_DATASET=path))
    assert words in error and "bad" in error


def test_what_is_no_npz_file_is_named(tiny_flags, fails, tmp_path):
    path = tmp_path / "bad.npz"
    for content in (b"", b"PK\3\4 not really", b"\x93NUMPY"):
        path.write_bytes(content)
        assert "bad.npz" in fails(tiny_flags(EVAL_DATASETS=path))
    np.save(tmp_path / "array.npy", np.zeros(3))
    shutil.copy(tmp_path / "array.npy", path)
    assert "bad.npz" in fails(tiny_flags(TRAIN_DATASET=path))
    for name in ("a.csv", "array.npy", "none.parquet"):
        assert ".npz" in fails(tiny_flags(EVAL_DATASETS=tmp_path / name))


def test_numbers_far_from_zero_keep_their_differences(blobs):
    x, y = blobs.x.double().numpy(), blobs.y.numpy()
    near, far = (gpicl.as_dataset("x", x + offset, y, 28, "cpu").x for offset in (0, 1e8))
    assert torch.allclose(near, far, atol=1e-5)
    whole = (100 * x).astype(np.int32)
    near, far = (gpicl.as_dataset("x", whole + np.int32(offset), y, 28, "cpu").x
                 for offset in (0, 10**9))
    assert torch.allclose(near, far, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_may_come_last(channels):
    x, y = np.random.default_rng(0).normal(3, 7, (60, 6, 6, channels)), np.arange(60) % 3
    last, first = (gpicl.as_dataset("x", a, y, 6, "cpu").x for a in (x, x.transpose(0, 3, 1, 2)))
    assert torch.equal(last, first) and last.shape == (60, 36 * channels)


def test_two_data_sets_of_one_name_get_a_row_each(tiny, blobs_file, tmp_path):
    other = tmp_path / "other" / "blobs.npz"
    other.parent.mkdir()
    other.write_bytes(blobs_file.read_bytes())
    tests = gpicl.load_tests("none", tiny(EVAL_DATASETS=f"{blobs_file},{other}"), "cpu")
    assert [*tests] == ["blobs", str(other)]


def test_sequences_may_have_more_examples_than_there_are_features(tiny_flags, tmp_path, blobs):
    np.savez(tmp_path / "narrow.npz", x=blobs.x[:, :3], y=blobs.y)
    flags = tiny_flags(TRAIN_DATASET=tmp_path / "narrow.npz", NUM_EXAMPLES=50)
    assert gpicl.main(flags) == 0


# ------------------------------------------------------------------------- never tested on training
def test_no_row_is_both_trained_and_tested_on(tiny, tmp_path):
    path = str(tmp_path / "rows.npz")
    np.savez(path, x=np.random.default_rng(0).normal(size=(700, 5)), y=np.arange(700) % 3)
    settings = tiny(TRAIN_DATASET=path, EVAL_DATASETS=path)
    training, validation, name = gpicl.load_training(settings, "cpu")
    tests = gpicl.load_tests(name, settings, "cpu")
    rows = [tuple(row) for part in (training, validation, tests["rows"][0])
            for row in part.x.tolist()]
    assert len(rows) == len(set(rows)) == 700 and len(validation.y) == 50
    again = gpicl.load_training(settings, "cpu")
    assert torch.equal(training.x, again[0].x) and torch.equal(validation.x, again[1].x)
    unseen = gpicl.load_tests("another", settings, "cpu")["rows"][0]     # then all are test rows
    assert len(unseen.y) == 700


def test_training_is_on_training_images_validation_and_tests_on_others(
        mnist, tiny_flags, tmp_path, monkeypatch):
    """What sequences are drawn from, by what they are drawn for."""
    drawn, draw_sequences = {}, gpicl.draw_sequences
    monkeypatch.setattr(gpicl, "draw_sequences", lambda dataset, n, settings, key, *rest: (
        drawn.setdefault((key[0], dataset.x.data_ptr()), dataset),
        draw_sequences(dataset, n, settings, key, *rest))[1])
    assert gpicl.main(tiny_flags(TRAIN_DATASET="MNIST", EVAL_DATASETS="MNIST")) == 0
    (train, validation, test), kinds = drawn.values(), [kind for kind, _ in drawn]
    assert kinds == ["train", "meta-test", "meta-test"]
    x = gpicl.load_dataset("MNIST", "train", gpicl.default_settings(
        DATA_DIR=str(tmp_path / "data"), NUM_EXAMPLES=12), "cpu").x
    assert torch.equal(train.x, x[:250]) and torch.equal(validation.x, x[250:])
    assert len(test.y) == 100


# ------------------------------------------------------------------------------- files of a run
def test_output_files(tiny_flags, run_folder, capsys):
    assert gpicl.main(tiny_flags(NUM_TASKS="2**3")) == 0
    output, folder = capsys.readouterr().out, run_folder()
    assert {path.name for path in folder.iterdir()} == {
        "model.pt", "results.json", "curves.csv", "accuracy_by_examples.png", "log.txt",
        SCRIPT.name}
    assert folder.name.startswith("blobs-default-")
    results = json.loads((folder / "results.json").read_text())
    assert set(results["data_sets"]) == {"blobs, seen tasks", "blobs"}
    assert results["settings"]["NUM_TASKS"] == 8 and len(results["progress"]) == 2
    for key in ("torch", "machine", "device", "training_seconds", "test_seconds", "parameters"):
        assert results[key], key
    curve = results["data_sets"]["blobs"]["curves"]["in-context"]
    assert len(curve["accuracy"]) == 12 and curve["sequences"] == 64
    rows = list(csv.DictReader((folder / "curves.csv").open()))
    points = [(name, learner, *point) for name, entry in results["data_sets"].items()
              for learner, curve in entry["curves"].items() for point in zip(
                  *(curve[key] for key in ("examples", "accuracy", "low", "high")))]
    assert [(row["data_set"], row["learner"], int(row["examples"]), *(
        float(row[key]) for key in ("accuracy", "low", "high"))) for row in rows] == points
    assert (folder / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()
    assert (folder / "accuracy_by_examples.png").read_bytes()[1:4] == b"PNG"
    assert (folder / "log.txt").read_text().strip() == output.strip()
    accuracy = 100 * curve["accuracy"][-1]
    half = 50 * (curve["high"][-1] - curve["low"][-1])
    assert output.strip().splitlines()[-1] == f"blobs@11: {accuracy:.1f} ± {half:.1f}"
    assert all(name in output for name in ("chance", *gpicl.BASELINES))


def test_a_model_loads_without_running_code_and_is_the_one_that_was_tested(
        tiny_flags, run_folder, blobs_file):
    assert gpicl.main(tiny_flags()) == 0
    saved = torch.load(run_folder() / "model.pt", weights_only=True)
    assert saved["trained_on"] == "blobs" and saved["settings"]["STEPS"] == 6
    model, _ = gpicl.load_model(run_folder() / "model.pt", torch.device("cpu"))
    (dataset, _), = gpicl.load_tests(str(blobs_file), model.settings, "cpu").values()
    curves = gpicl.meta_test(model, dataset, model.settings, json.loads(
        (run_folder() / "results.json").read_text())["precision"])
    assert curves == json.loads((run_folder() / "results.json").read_text())[
        "data_sets"]["blobs"]["curves"]


def test_other_contents_of_a_file_make_another_run(tiny_flags, tmp_path, blobs):
    for x in (blobs.x, -blobs.x, blobs.x):
        np.savez(tmp_path / "blobs.npz", x=x, y=blobs.y)
        assert gpicl.main(tiny_flags(STEPS=1)) == 0
    assert len([*(tmp_path / "runs").iterdir()]) == 2


@pytest.mark.parametrize("place", ["train_step", "baseline_labels", "plot"])
def test_two_copies_of_a_command_do_not_disturb_each_other(
        place, tiny_flags, run_folder, monkeypatch):
    """One finishes while the other trains, tests, or draws its figure."""
    function, calls = getattr(gpicl, place), []

    def interrupted(*arguments):
        calls.append(place)
        if len(calls) == 2 - (place == "plot"):
            assert gpicl.main(tiny_flags()) == 0
        return function(*arguments)

    monkeypatch.setattr(gpicl, place, interrupted)
    assert gpicl.main(tiny_flags()) == 0
    assert (run_folder() / "results.json").exists() and (run_folder() / "model.pt").exists()


def test_only_its_own_temporary_file_is_removed(tmp_path):
    path, other = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.1.tmp.pt"
    other.write_text("of another process")
    with gpicl.atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    with pytest.raises(gpicl.UserError, match="checkpoint.pt"):
        with gpicl.atomic_write(path) as temporary:
            temporary.write_text("half")
            raise OSError("no space left")
    assert path.read_text() == "new" and {*tmp_path.iterdir()} == {path, other}


def test_broken_and_foreign_checkpoints(tiny_flags, run_folder, tmp_path, fails, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gpicl, "test_and_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gpicl.main(tiny_flags())
    path = run_folder() / "checkpoint.pt"
    whole, half = path.read_bytes(), path.stat().st_size // 2            # among the weights
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:]
    for broken in (whole[:half], b"", b"hello", flipped):
        path.write_bytes(broken)
        assert str(path) in fails(tiny_flags())
    for foreign in ({"some": "thing"}, [1, 2], dict(format="gpicl-1", settings={}, model={})):
        torch.save(foreign, path)
        assert str(path) in fails(tiny_flags())
        assert str(path) in fails(["evaluate", f"--CHECKPOINT={path}"])
    path.write_bytes(whole)
    assert gpicl.main(tiny_flags()) == 0


def test_a_checkpoint_of_a_model_that_was_edited_since_is_one_sentence(
        tiny_flags, run_folder, fails, monkeypatch):
    assert gpicl.main(tiny_flags()) == 0
    make_model = gpicl.make_model

    def edited(settings):
        model = make_model(settings)
        model.one_more_layer = torch.nn.Linear(2, 2)
        return model
    monkeypatch.setattr(gpicl, "make_model", edited)
    fails(["evaluate", f"--CHECKPOINT={run_folder()}/model.pt", "--DEVICE=cpu"])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(format=gpicl.FORMAT, settings=Evil()), "evil.pt")
    with pytest.raises(gpicl.UserError, match="evil.pt"):
        gpicl.load_checkpoint(Path("evil.pt"))
    assert not Path("evil").exists()


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(tiny_flags, run_folder):
    """A limit on the size of files stands for the disk."""
    pytest.importorskip("resource")
    flags = tiny_flags(STEPS=3, MODEL_SIZE=128)
    done = subprocess.run(
        [sys.executable, "-c", "import resource, sys, gpicl_minimal_replication as g\n"
         "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
         "sys.exit(g.main(sys.argv[1:]))", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "checkpoint.pt could not be written" in done.stderr
    assert {path.name for path in run_folder().iterdir()} == {"log.txt", SCRIPT.name}
    assert gpicl.main(flags) == 0 and (run_folder() / "model.pt").exists()


@pytest.mark.parametrize("place", ["OUT_DIR", "DATA_DIR"])
def test_a_file_where_a_folder_should_be(place, tiny_flags, fails, tmp_path, no_network):
    file, data = tmp_path / "file", dict(TRAIN_DATASET="MNIST") if place == "DATA_DIR" else {}
    file.write_text("in the way")
    assert str(file) in fails(tiny_flags(**{place: file / "below"}, **data))


def test_a_run_folder_that_goes_away_is_one_sentence(tiny_flags, tmp_path, fails, monkeypatch):
    train_step = gpicl.train_step
    monkeypatch.setattr(gpicl, "train_step", lambda *arguments: (
        shutil.rmtree(tmp_path / "runs", ignore_errors=True), train_step(*arguments))[1])
    assert "could not be written" in fails(tiny_flags())


# ------------------------------------------------------------------------------ what the table says
def test_the_paper_stands_only_where_it_can_be_compared_with(
        tiny_flags, tmp_path, blobs, capsys, monkeypatch):
    """It was trained on MNIST and tested after 99 examples; a file of that name is not MNIST."""
    arrays = blobs.x.numpy(), blobs.y.numpy()
    monkeypatch.setattr(gpicl, "torchvision_arrays", lambda *_: arrays)
    for name in ("MNIST", "FashionMNIST"):
        np.savez(tmp_path / f"{name}.npz", x=arrays[0], y=arrays[1])

    def table(train, test, examples=100):
        assert gpicl.main(tiny_flags(TRAIN_DATASET=train, EVAL_DATASETS=test, STEPS=1,
                                     NUM_EXAMPLES=examples, VALIDATION_IMAGES=100)) == 0
        return capsys.readouterr().out
    assert "73.7" in table("MNIST", "MNIST") and "62.2" in table("MNIST", "FashionMNIST")
    for output in (table("MNIST", "MNIST", 50), table("KMNIST", "MNIST"),
                   table("MNIST", f"{tmp_path}/FashionMNIST.npz"),
                   table(f"{tmp_path}/MNIST.npz", "FashionMNIST")):
        assert "the paper" not in output


def test_chance_is_one_of_the_classes_that_there_are(tiny_flags, tmp_path, blobs, capsys):
    np.savez(tmp_path / "four.npz", x=blobs.x, y=blobs.y % 4)
    assert gpicl.main(tiny_flags(EVAL_DATASETS=tmp_path / "four.npz")) == 0
    assert re.search("chance +25.0", capsys.readouterr().out)


def test_a_name_with_dollars_is_no_mathematics(tiny_flags, blobs_file, tmp_path):
    file = blobs_file.rename(tmp_path / "of_$5_to_$9^.npz")
    assert gpicl.main(tiny_flags(TRAIN_DATASET=file, EVAL_DATASETS=file)) == 0
