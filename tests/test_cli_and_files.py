"""Command line, files, messages: every mistake gets one sentence and a non-zero exit code."""

import csv
import gzip
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, gpicl
from matplotlib.figure import Figure

SCRIPT = ROOT / "gpicl_minimal_replication.py"


# ------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("flag, expected", [
    ("--STEPZ=5", "did you mean STEPS?"),
    ("--__class__=5", "there is no setting"),
    ("--steps=5", "did you mean STEPS?"),
    ("--XYZZY=5", "expected one of SEED, DEVICE"),
    ("quik", "did you mean quick?"),
    ("--STEPS", "write --STEPS=value"),
    ("--STEPS=many", "expected a whole number, 1 or more"),
    ("--STEPS=1.5", "expected a whole number"),
    ("--STEPS=__import__('os')", "expected a whole number"),
    ("--STEPS=9**99", "expected a whole number"),
    ("--STEPS=0", "expected a whole number, 1 or more"),
    ("--BATCH_SIZE=-1", "expected a whole number, 1 or more"),
    ("--LEARNING_RATE=fast", "expected a number"),
    ("--LEARNING_RATE=nan", "expected a number from 0 to 1e30"),
    ("--LEARNING_RATE=inf", "expected a number from 0 to 1e30"),
    ("--COMPARE_IMAGES=maybe", "expected True or False"),
    ("--BIASED_FRACTION=1.5", "from 0 to 1"),
    ("--TOKEN_FORMAT=triples", "expected one of pairs, paper"),
    ("--OPTIMIZER=sgdd", "expected one of muon, adamw"),
    ("--DEVICE=tpu", "expected one of auto, cuda, mps, cpu"),
    ("--MODEL_SIZE=100", "a multiple of NUM_HEADS"),
    ("--NUM_EXAMPLES=1", "expected a whole number, 2 or more"),
    ("--ADAM_BETA2=1", "below 1"),
    ("--ADAM_EPSILON=0", "expected a number above 0"),
    ("--TRAIN_DATASET=RenderedDigit", "did you mean RenderedDigits?"),
    ("--TRAIN_DATASET=mnist", "did you mean MNIST?"),
])
def test_wrong_settings(flag, expected, fails):
    arguments = [flag, "--NUM_HEADS=8"] if "MODEL_SIZE" in flag else [flag]
    assert expected in fails(arguments)


def test_numbers_are_read_and_nothing_is_evaluated():
    preset, settings, flags = gpicl.read_settings([
        "quick", "--NUM_TASKS=2**16", "--LEARNING_RATE=1e-3", "--STEPS=1e3",
        "--COMPARE_IMAGES=false", "--SEED=7"])
    assert preset == "quick" and flags[0] == "NUM_TASKS"
    assert settings.NUM_TASKS == 65536 and settings.LEARNING_RATE == 1e-3
    assert settings.STEPS == 1000 and type(settings.STEPS) is int
    assert settings.COMPARE_IMAGES is False and settings.SEED == 7


def test_torchrun_is_for_training_on_as_many_gpus_as_there_are(fails, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for word in ("evaluate", "classify", "phases"):
        assert f"{word} is not for several processes" in fails([word])
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "use --nproc-per-node=2 at most" in fails([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "can't share MPS; use --DEVICE=cpu" in fails([])


def test_another_process_that_stops_is_no_traceback(fails, monkeypatch):
    def run(*_):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4")
    monkeypatch.setattr(gpicl, "run", run)
    assert "another process of torchrun has stopped" in fails([])


def test_a_missing_package_is_named(fails, monkeypatch):
    def run(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'")
    monkeypatch.setattr(gpicl, "run", run)
    error = fails([])
    assert "No module named 'matplotlib'" in error and "pip install -r requirements.txt" in error


def test_every_preset_is_valid_and_overridden_by_flags():
    for preset in gpicl.PRESETS:
        assert gpicl.read_settings([preset, "--STEPS=11"])[1].STEPS == 11


def test_it_runs_where_standard_output_is_no_terminal_or_file(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())    # as in a notebook's %run
    assert gpicl.main(["--help"]) == 0 and "Presets" in sys.stdout.getvalue()


def test_help_shows_every_setting_and_preset_with_its_comment(capsys):
    assert gpicl.main(["--help"]) == 0
    text = capsys.readouterr().out
    comments = gpicl.setting_comments()
    assert {"SEED", "DEVICE", "DATA_DIR", "OUT_DIR", "TRAIN_DATASET", "EVAL_DATASETS",
            "IMAGE_SIZE", "NUM_TASKS", "NUM_EXAMPLES", "BIASED_FRACTION", "TOKEN_FORMAT",
            "BATCH_SIZE", "STEPS", "EVAL_SEQUENCES"} <= set(comments)
    for name, comment in comments.items():
        shown = re.escape(f"{name}={getattr(gpicl, name)}") + " +" + re.escape(comment) + "$"
        assert re.search(shown, text, re.MULTILINE), name
    assert all(preset in text for preset in gpicl.PRESETS)


def test_a_reader_who_leaves_gets_no_traceback():
    """As `--help | head` does: here the reading end is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, SCRIPT, "--help"], stdout=writing,
                          stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == "" and done.returncode == 141


def test_every_constant_at_the_top_is_a_setting_with_a_comment():
    source = SCRIPT.read_text()
    block = source[source.index("- settings\n"):source.index("PRESETS = {")]
    assert re.findall(r"^([A-Z_0-9]+) =", block, re.MULTILINE) == list(gpicl.setting_comments())


def test_edited_constants_are_of_their_settings_kind():
    assert all(type(getattr(gpicl, name)) is gpicl.KINDS.get(name, gpicl.OTHERS)[0]
               for name in gpicl.setting_comments())
    edited = gpicl.default_settings(STEPS=1e4, WEIGHT_DECAY=0, LEARNING_RATE=1)
    gpicl.check_settings(edited)
    assert repr((edited.STEPS, edited.WEIGHT_DECAY, edited.LEARNING_RATE)) == "(10000, 0.0, 1.0)"
    for name, value, words in (
            ("COMPARE_IMAGES", "False", "True or False"), ("COMPARE_IMAGES", 0, "True or False"),
            ("STEPS", "3", "a whole number"), ("STEPS", None, "a whole number"),
            ("STEPS", math.nan, "a whole number"), ("STEPS", True, "a whole number"),
            ("LEARNING_RATE", 10**400, "a number from 0"), ("SHOTS", 5, "a text in quotes"),
            ("EVAL_DATASETS", ["MNIST"], "a text"), ("OUT_DIR", ROOT, "a text in quotes")):
        with pytest.raises(gpicl.UserError, match=f"^{name} is .*; expected {words}"):
            gpicl.check_settings(gpicl.default_settings(**{name: value}))


def test_a_constant_stays_a_setting_without_its_comment(tmp_path):
    text = SCRIPT.read_text()
    for i, line in enumerate(("STEPS = 7", "STEPS=7 # mine", "STEPS  =  7   #")):
        path = tmp_path / f"edited{i}.py"
        path.write_text(re.sub("^STEPS = .*$", line, text, count=1, flags=re.MULTILINE))
        spec = importlib.util.spec_from_file_location(f"edited{i}", path)
        edited = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(edited)
        assert edited.read_settings(["--BATCH_SIZE=3"])[1].STEPS == 7
        assert [*edited.setting_comments()] == [*gpicl.setting_comments()]


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file.csv").write_text("")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    for path in ("file.csv/p.csv", "n" * 300 + ".csv", "loop.csv", "none/p.csv"):
        with pytest.raises(gpicl.UserError, match="can't write THIS: "):
            gpicl.write_csv(tmp_path / path, [["a"]], "THIS")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.csv", "loop.csv"]


def test_names_of_files_that_are_no_text_can_be_written(blobs):
    name = os.fsdecode(b"caf\xe9")
    assert gpicl.as_dataset(name, blobs.x.numpy(), blobs.y.numpy(), 8, "cpu").name == "caf?"


def test_unavailable_device(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "DEVICE=cuda is not available here" in fails(["--DEVICE=cuda"])


# ----------------------------------------------------------------------------------- data files
def no_network(monkeypatch):
    """Make every download fail at once, as it does without a network."""
    from torchvision.datasets import mnist

    def refuse(*arguments, **more):
        raise RuntimeError("Error downloading: no network in this test")
    monkeypatch.setattr(mnist, "download_and_extract_archive", refuse)


def test_without_mnist_the_default_says_so_and_renders(tiny_flags, tmp_path, monkeypatch, capsys):
    no_network(monkeypatch)
    flags = tiny_flags(TRAIN_DATASET="auto", EVAL_DATASETS="auto")
    assert gpicl.main(flags) == 0
    output = capsys.readouterr().out
    assert "*** NOTICE: MNIST can't be had" in output and "no network in this test" in output
    assert str(tmp_path / "data" / "MNIST") in output          # where the files belong
    assert re.search(r"^RenderedDigits@11: \d+\.\d ± \d+\.\d$", output, re.MULTILINE)
    assert re.search(r"^RenderedLetters@11: \d+\.\d ± \d+\.\d$", output, re.MULTILINE)
    assert "the paper" not in output[output.index("Accuracy (%) after"):]
    results = json.loads(next(tmp_path.glob("runs/*/results.json")).read_text())
    assert results["trained_on"] == "RenderedDigits"
    assert list(results["data_sets"]) == ["RenderedDigits", "RenderedLetters"]
    assert not any(entry["paper"] for entry in results["data_sets"].values())


@pytest.mark.parametrize("setting", ["TRAIN_DATASET", "EVAL_DATASETS"])
def test_a_named_data_set_is_never_substituted(setting, tiny_flags, fails, monkeypatch):
    no_network(monkeypatch)
    assert "FashionMNIST can't be had" in fails(tiny_flags(**{setting: "FashionMNIST"}))


def test_an_evaluation_set_that_cannot_be_had_is_named_and_left_out(
        tiny_flags, monkeypatch, capsys):
    no_network(monkeypatch)
    assert gpicl.main(tiny_flags(EVAL_DATASETS="auto")) == 0
    output = capsys.readouterr().out
    assert "*** NOTICE: FashionMNIST can't be had" in output and "left out" in output
    assert "blobs@11" in output and "FashionMNIST@" not in output
    x, y = np.random.default_rng(0).normal(size=(90, 40)), np.arange(90) % 10
    monkeypatch.setattr(gpicl, "torchvision_arrays", lambda *arguments: (x, y))
    # when it can be had, it is tested on
    for last in ("Finished, ", "This run was finished before"):
        assert gpicl.main(tiny_flags(EVAL_DATASETS="auto")) == 0
        output = capsys.readouterr().out
        assert "FashionMNIST@11" in output and last in output and "validation images" not in output


def test_unknown_and_unusable_data_sets(tiny_flags, fails, tmp_path, blobs):
    def error(file=None, train="bad.npz", **arrays):
        if arrays:
            np.savez(tmp_path / train, **arrays)
        return fails(tiny_flags(TRAIN_DATASET=tmp_path / train if train == "bad.npz" else train))
    x, y = blobs.x.numpy(), blobs.y.numpy()
    assert "did you mean FashionMNIST?" in error(train="FashonMNIST")
    assert "there is no file" in error()
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4 not really")
    assert "can't be read as an .npz file" in error()
    assert "has no array" in error(x=x)
    assert "one row of x per label" in error(x=x, y=y[:-1])
    assert "30 classes" in error(x=x, y=np.arange(600) % 30)
    assert "1 classes" in error(x=x, y=0 * y)
    assert "NaN" in error(x=np.where(x > 2, np.nan, x), y=y)
    assert "constant" in error(x=0 * x, y=y)
    assert "huge values" in error(x=1e36 * x, y=y)
    assert "x has shape" in error(x=x[..., :0], y=y)
    assert "can't be read" in error(x=np.array([{}] * 600, object), y=y)
    assert "expected numbers" in error(x=np.full((600, 4), "a"), y=y)
    assert "7 images to train on and 12 for" in error(x=x[:20], y=y[:20])
    assert "row 3 has NaN" in error(x=x, y=np.where(np.arange(600) == 2, np.nan, y))


def test_a_run_on_other_contents_of_a_file_is_another(tiny, tmp_path):
    """The folder's name tells the contents of a data file, whatever the file is called."""
    file, folders = tmp_path / "a,b", []
    for name in ("TRAIN_DATASET", "EVAL_DATASETS", "FEATURES_FILE"):
        settings = tiny(**{name: str(file).replace("a,b", "ab") if name == "EVAL_DATASETS"
                           else str(file)}, OUT_DIR=str(tmp_path / "runs"))
        for text in ("1", "2", "1"):
            file.write_text(text)
            file.with_name("ab").write_text(text)
            folders.append(gpicl.run_folder(settings, name))
        assert folders[-3] == folders[-1] != folders[-2]


def test_a_terminal_without_the_letters_and_any_folder_name(tiny_flags, tmp_path, monkeypatch):
    folder, terminal = tmp_path / os.fsdecode(b"\xff"), io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert gpicl.main(tiny_flags(OUT_DIR=folder)) == 0
    terminal.flush()
    assert rb"blobs@11: " in terminal.buffer.getvalue() and rb"\xb1" in terminal.buffer.getvalue()


def test_a_name_with_dollars_is_no_mathematics(tiny_flags, tiny, blobs_file, tmp_path):
    file = blobs_file.rename(tmp_path / "of_$5_to_$9^.npz")
    assert gpicl.main(tiny_flags(TRAIN_DATASET=file, EVAL_DATASETS=file)) == 0
    data = gpicl.load_dataset(str(file), "unseen", tiny(), "cpu"), None, {}
    rows = gpicl.measure_features(tiny(FEATURES_FILE=str(file), WAYS=2, SHOTS="1"), data, "fp32")
    figure = Figure()                                    # the experiments draw names, too
    gpicl.report_features(rows, figure)
    figure.savefig(tmp_path / "features.png")


def test_two_data_sets_of_one_name_get_a_row_each(tiny, blobs_file, tmp_path):
    other = tmp_path / "other" / "blobs.npz"
    other.parent.mkdir()
    other.write_bytes(blobs_file.read_bytes())
    settings = tiny(EVAL_DATASETS=f"{blobs_file},{blobs_file},{other}")
    assert [*gpicl.load_tests("none", settings, "cpu", [])] == ["blobs", str(other)]
    points = tmp_path / "Random.npz"
    points.write_bytes(blobs_file.read_bytes())
    for wanted in (f"{points},Random?", f"Random,{points}"):
        tests = gpicl.load_tests("none", tiny(EVAL_DATASETS=wanted), "cpu", [])
        assert len(tests) == 2 and len(tests[str(points)][0].y) == 600


def test_odd_paths_of_data_sets(tiny, blobs_file, tiny_flags, tmp_path, fails):
    """Rows named after paths are drawn and written; a link to itself is no file."""
    other = tmp_path / "to $^$" / "blobs.npz"
    other.parent.mkdir()
    other.write_bytes(blobs_file.read_bytes())
    assert gpicl.main(tiny_flags(EVAL_DATASETS=f"{blobs_file},{other}")) == 0
    assert len(gpicl.load_tests("none", tiny(EVAL_DATASETS=f"{other}?,{other}"), "cpu", [])) == 1
    loop = tmp_path / "loop.npz"
    loop.symlink_to(loop)
    assert f"can't read {loop}: " in fails(tiny_flags(EVAL_DATASETS=loop))
    assert "can't write PREDICTIONS_FILE" in fails([
        "classify", f"--OUT_DIR={tmp_path / 'runs'}", f"--PREDICTIONS_FILE={loop}",
        f"--TRAIN_FILE={blobs_file}", f"--TEST_FILE={blobs_file}"])


def test_numbers_far_from_zero_keep_their_differences(blobs):
    x, y = blobs.x.double().numpy(), blobs.y.numpy()
    near, far = (gpicl.as_dataset("x", x + offset, y, 28, "cpu").x for offset in (0, 1e8))
    assert torch.allclose(near, far, atol=1e-5)
    whole = (100 * x).astype(np.int32)
    near, far = (gpicl.as_dataset("x", whole + np.int32(offset), y, 28, "cpu").x
                 for offset in (0, 10**9))
    assert torch.allclose(near, far, atol=1e-4)
    with pytest.raises(gpicl.UserError, match="constant"):
        gpicl.as_dataset("x", np.full((len(y), 8), 0.1, np.float32), y, 28, "cpu")


def test_a_damaged_mnist_is_named(tiny_flags, fails, tmp_path, monkeypatch):
    no_network(monkeypatch)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03 not the whole file")
    for name in ("MNIST", "auto"):
        assert "delete its files" in fails(tiny_flags(TRAIN_DATASET=name))
    for file in raw.iterdir():
        with gzip.open(file.with_name(file.name + ".gz"), "w") as zipped:
            zipped.write(b"x")
        file.write_bytes(b"")
    assert "delete its files" in fails(tiny_flags(TRAIN_DATASET="MNIST"))


def test_torchvision_of_another_build_gets_a_clear_sentence(tiny_flags, fails, monkeypatch):
    class Broken:
        def find_spec(self, name, *rest):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    error = fails(tiny_flags(TRAIN_DATASET="MNIST"))
    assert "torchvision does not fit torch" in error and "pip install" in error


@pytest.mark.parametrize("name", ["OUT_DIR", "DATA_DIR"])
def test_folders_that_cannot_be_written(name, tiny_flags, fails, tmp_path, monkeypatch):
    no_network(monkeypatch)
    (tmp_path / "file").write_text("in the way")
    flags = tiny_flags(**{name: tmp_path / "file" / "below"}, TRAIN_DATASET="RenderedDigits")
    assert "can't write to" in fails(flags) and name in fails(flags)


@pytest.mark.parametrize("kind", ["npz images", "npz colour", "npz strings"])
def test_npz_of_many_kinds_is_a_data_set(kind, tiny_flags, tmp_path, blobs, capsys):
    """Images (n, h, w) and (n, h, w, c) of any size, and labels of any kind, few classes."""
    x = blobs.x.numpy()[:, :36].reshape(600, 6, 6)
    x = np.repeat(x[..., None], 3, -1) if "colour" in kind else x
    y = np.array(["cat", "dog", "owl"])[blobs.y % 3] if "strings" in kind else blobs.y.numpy()
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    assert gpicl.main(tiny_flags(EVAL_DATASETS=tmp_path / "mine.npz", IMAGE_SIZE=5)) == 0
    assert "mine@11: " in capsys.readouterr().out
    results = json.loads(next(tmp_path.glob("runs/*/results.json")).read_text())
    assert results["data_sets"]["mine"]["classes"] == (3 if "strings" in kind else 10)


def test_rows_of_different_widths_are_projected_to_one(tiny_flags, tmp_path, blobs, capsys):
    np.savez(tmp_path / "narrow.npz", x=blobs.x[:, :7], y=blobs.y)
    assert gpicl.main(tiny_flags(EVAL_DATASETS=tmp_path / "narrow.npz")) == 0
    assert "narrow@11: " in capsys.readouterr().out


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_are_standardised_and_channels_may_come_last(channels):
    x, y = np.random.default_rng(0).normal(3, 7, (60, 6, 6, channels)), np.arange(60) % 3
    last, first = (gpicl.as_dataset("x", a, y, 6, "cpu").x for a in (x, x.transpose(0, 3, 1, 2)))
    assert torch.equal(last, first) and abs(last.mean()) < 1e-5
    assert last.std().item() == pytest.approx(1, abs=1e-3)


def test_no_row_is_both_trained_and_tested_on(tiny, tmp_path):
    path = tmp_path / "rows.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(700, 5)), y=np.arange(700) % 3)
    training, validation, tests, _ = gpicl.load_all(
        tiny(TRAIN_DATASET=str(path), EVAL_DATASETS=str(path)), "cpu")
    rows = [tuple(row) for part in (training, validation, tests["rows"][0])
            for row in part.x.tolist()]
    assert len(rows) == len(set(rows)) == 700


def test_rows_keep_their_side_when_others_are_added(tiny, tmp_path):
    random, path, sides = np.random.default_rng(0), str(tmp_path / "rows.npz"), []
    x = random.integers(0, 99, (1400, 4)).astype(float)
    for some in (x[:700], random.permutation(x), x[:700]):
        np.savez(path, x=some, y=np.arange(len(some)) % 3)
        scale = (some - some.mean()).std(ddof=1)
        sides.append([{tuple(row) for row in (gpicl.load_dataset(
            path, split, tiny(), "cpu").x * scale + some.mean()).round().tolist()}
            for split in ("train", "test")])
    (train, test), (more_train, more_test), again = sides
    assert train <= more_train and test <= more_test and not more_train & more_test
    assert again == [train, test] and len(train | test) == len({*map(tuple, x[:700])})
    assert 60 < len(test) < 140 and 140 < len(more_test) < 260
    assert len(gpicl.load_dataset(path, "unseen", tiny(), "cpu").y) == 700
    np.savez(path, x=x, y=np.repeat([0, 1], 700))        # sorted by class: neither side is
    labels = gpicl.load_dataset(path, "train", tiny(), "cpu").y.double()
    assert 0.4 < labels[:300].mean() < 0.6


def test_test_images_are_not_training_images(tmp_path, monkeypatch):
    from torchvision import datasets

    class Fake:
        def __init__(self, root, train=True, download=False):
            self.data, self.targets = np.full((9, 2), train), np.arange(9)

    class Splits(Fake):                                  # as torchvision's EMNIST
        def __init__(self, root, split, **others):
            assert split == "digits"
            super().__init__(root, **others)

    monkeypatch.setattr(datasets, "MNIST", Fake)
    monkeypatch.setattr(datasets, "EMNIST", Splits)
    monkeypatch.setattr(gpicl, "render_characters", lambda characters, n, seed: (
        np.full((9, 2), seed), np.arange(9)))
    for name, arrays in (("MNIST", gpicl.torchvision_arrays), ("Random", gpicl.random_arrays),
                         ("EMNIST", gpicl.torchvision_arrays),
                         ("RenderedDigits", gpicl.rendered_arrays)):
        train, test = (arrays(name, kind, tmp_path)[0] for kind in (True, False))
        assert not (train == test).any(), name


# ----------------------------------------------------------------------- run folder, checkpoints
def test_output_files(tiny_flags, tmp_path, capsys, blobs_file):
    assert gpicl.main(tiny_flags(NUM_TASKS="2**3", AVERAGED_PASSES=2)) == 0
    output = capsys.readouterr().out
    folder = next((tmp_path / "runs").iterdir())
    assert folder.name.startswith("blobs-default-") and "DEVICE=cpu" in folder.name
    results = json.loads((folder / "results.json").read_text())
    assert set(results["data_sets"]) == {"blobs, seen tasks", "blobs"}
    assert results["settings"]["NUM_TASKS"] == 8 and results["steps"] == 6
    for key in ("versions", "machine", "device", "training_seconds", "total_seconds"):
        assert results[key]
    assert 1e8 < results["peak_memory_bytes"] < 1e11
    curve = results["data_sets"]["blobs"]["curves"]["Transformer"]
    assert len(curve["accuracy"]) == 12 and curve["sequences"] == 64
    rows = list(csv.DictReader((folder / "curves.csv").open()))
    assert float(rows[0]["accuracy"]) == results["data_sets"]["blobs, seen tasks"]["curves"][
        "Transformer"]["accuracy"][0]
    assert len(rows) == 1 + 2 * (12 + 5 * len(results["context_lengths"][1:]))
    assert (folder / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()
    assert (folder / "accuracy_by_examples.png").read_bytes()[1:4] == b"PNG"
    assert (folder / "log.txt").read_text().strip() in output.strip()
    low, accuracy, high = (100 * curve[name][-1] for name in ("low", "accuracy", "high"))
    assert output.strip().splitlines()[-1] == (
        f"blobs@11: {accuracy:.1f} ± {max(high - accuracy, accuracy - low):.1f}")
    assert "chance" in output and "1-nearest neighbour" in output and "seconds" in output


def test_only_files_are_replaced(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with gpicl.replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(gpicl.UserError, match="is not a file"), gpicl.replacing(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_broken_and_foreign_checkpoints(tiny_flags, tmp_path, fails):
    flags = tiny_flags()
    assert gpicl.main(flags) == 0
    folder = next((tmp_path / "runs").iterdir())
    whole = json.loads((folder / "results.json").read_text())
    for broken in (b"{", b"[1]", b"{}", b"\xff"):        # tested again, not trained again
        (folder / "results.json").write_bytes(broken)
        assert gpicl.main(flags) == 0
        again = json.loads((folder / "results.json").read_text())
        assert again["data_sets"] == whole["data_sets"]
    (folder / "results.json").unlink()
    model = (folder / "model.pt").read_bytes()
    half = len(model) // 2                               # among the weights
    flipped = model[:half] + bytes([model[half] ^ 1]) + model[half + 1:]
    for broken in (model[:half], b"", b"hello", flipped):
        (folder / "model.pt").write_bytes(broken)
        assert "truncated or not a checkpoint" in fails(flags)
    torch.save({"some": "thing"}, folder / "model.pt")
    assert "not a checkpoint of this program" in fails(flags)
    torch.save(dict(format=gpicl.FORMAT, settings=dict(SEED=9), model={}), folder / "model.pt")
    assert "with these settings" in fails(flags)
    torch.save(dict(format="gpicl-1"), folder / "model.pt")
    other = fails(["evaluate", f"--CHECKPOINT={folder}/model.pt"])
    assert "not a checkpoint of this version of the program." in other


@pytest.mark.parametrize("limit", [20_000, 400_000])     # less than the source, than the model
def test_a_full_disk_gets_a_clear_sentence(limit, tiny_flags, tmp_path):
    """A limit on the size of files stands for the disk; without it the same command goes on."""
    pytest.importorskip("resource")
    flags = tiny_flags(STEPS=3, MODEL_SIZE=128)
    command = [sys.executable, "-c", "import resource, sys, gpicl_minimal_replication as g\n"
               f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
               "sys.exit(g.main(sys.argv[1:]))", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "can't write" in done.stderr and "room on its disk" in done.stderr
    folder = next((tmp_path / "runs").iterdir())
    assert {path.name for path in folder.iterdir()} <= {"log.txt", SCRIPT.name}    # none by half
    assert (limit > 20_000) == (folder / SCRIPT.name).exists()
    assert gpicl.main(flags) == 0 and (folder / "model.pt").exists()


@pytest.mark.parametrize("place, words", [("machine", "a folder gone"), ("speed", "can't write")])
def test_a_folder_that_goes_away(place, words, tiny_flags, tmp_path, fails, monkeypatch):
    def gone(*_):
        shutil.rmtree(tmp_path / "runs")
        return {}

    monkeypatch.setattr(gpicl, place, gone)
    assert words in fails(tiny_flags())


def test_too_few_validation_images(fails, blobs_file):
    assert "50 for validation, see VALIDATION_IMAGES" in fails(
        [f"--TRAIN_DATASET={blobs_file}", "--VALIDATION_IMAGES=50"])


def test_too_little_memory_gets_a_clear_sentence(tiny_flags, fails):
    assert "too little memory" in fails(tiny_flags(MODEL_SIZE=2**22))    # 200 TB
    for size in (2**50, 2**61):                          # the latter more than can be counted
        assert "too little memory" in fails(tiny_flags(BATCH_SIZE=size))
    assert "too little memory" in fails(tiny_flags(ARCHITECTURE="vsml", CELL_SIZE=2**62))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(format=gpicl.FORMAT, settings=Evil()), "evil.pt")
    with pytest.raises(gpicl.UserError, match="not a checkpoint"):
        gpicl.load_checkpoint(Path("evil.pt"))
    assert not Path("evil").exists()


def test_a_checkpoint_of_other_settings_is_refused(tiny, tmp_path):
    model = gpicl.InContextModel(tiny())
    gpicl.save_checkpoint(tmp_path / "model.pt", tiny(), model)
    gpicl.load_checkpoint(tmp_path / "model.pt", tiny(DATA_DIR="elsewhere"))
    for other in (dict(WEIGHT_DECAY=0.1), dict(SEED=1)):
        with pytest.raises(gpicl.UserError, match="with these settings"):
            gpicl.load_checkpoint(tmp_path / "model.pt", tiny(**other))


def test_a_checkpoint_of_before_merged_classes_had_none(tiny, tmp_path):
    settings = tiny()
    del settings.MERGED_FRACTION
    gpicl.save_checkpoint(tmp_path / "model.pt", settings, gpicl.InContextModel(tiny()))
    saved = gpicl.load_checkpoint(tmp_path / "model.pt")
    assert saved["settings"]["MERGED_FRACTION"] == 0


def test_a_model_that_is_tested_again_keeps_where_it_was_trained(tiny_flags, tmp_path, capsys):
    flags = tiny_flags(NUM_TASKS=4)
    assert gpicl.main(flags) == 0 and "seen tasks" in capsys.readouterr().out
    folder = next((tmp_path / "runs").iterdir())
    saved = torch.load(folder / "model.pt")
    torch.save({**saved, "device": "cuda"}, folder / "model.pt")
    (folder / "results.json").unlink()
    assert gpicl.main(flags) == 0
    assert torch.load(folder / "model.pt")["device"] == "cuda"
    capsys.readouterr()                                  # its fixed tasks were other ones, then
    assert gpicl.main(["evaluate", f"--CHECKPOINT={folder}/model.pt", "--DEVICE=cpu",
                       f"--OUT_DIR={tmp_path}/runs", f"--EVAL_DATASETS={tmp_path}/blobs.npz"]) == 0
    printed = capsys.readouterr().out
    assert "blobs@11: " in printed and "seen tasks" not in printed


def test_the_table_tells_chance_and_the_paper_only_where_comparable(
        tiny_flags, tmp_path, blobs, capsys):
    few = tmp_path / "MNIST.npz"
    np.savez(few, x=np.concatenate([blobs.x] * 4), y=np.concatenate([blobs.y % 4] * 4))
    for examples in (12, 100):                           # a file of that name is not MNIST
        assert gpicl.main(tiny_flags(TRAIN_DATASET=few, EVAL_DATASETS=few, STEPS=1,
                                     NUM_EXAMPLES=examples, VALIDATION_IMAGES=100)) == 0
        out = capsys.readouterr().out
        assert "the paper" not in out and re.search("chance +25.0", out)


def test_a_file_called_as_a_data_set_is_not_compared_with_the_paper(
        tiny_flags, tmp_path, blobs, capsys, monkeypatch):
    mnist = blobs.x.numpy(), blobs.y.numpy()
    monkeypatch.setattr(gpicl, "torchvision_arrays", lambda *arguments: mnist)
    np.savez(tmp_path / "FashionMNIST.npz", x=mnist[0], y=mnist[1])
    assert gpicl.main(tiny_flags(
        TRAIN_DATASET="MNIST", EVAL_DATASETS=f"MNIST,{tmp_path}/FashionMNIST.npz", STEPS=1,
        NUM_EXAMPLES=100, VALIDATION_IMAGES=100)) == 0
    out = capsys.readouterr().out
    assert "GPICL 73.7" in out and "GPICL 62.24" not in out and "FashionMNIST.npz@99: " in out


# ------------------------------------------------------------------------------- the file itself
def test_import_does_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import sys, gpicl_minimal_replication as g; print(sorted(m for m "
         "in ('matplotlib', 'torchvision') if m in sys.modules))"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "[]\n" and done.stderr == "" and not list(tmp_path.iterdir())


def test_pep_723_block_equals_requirements():
    block = re.search(r"^# /// script\n((?:# .*\n)+?)# ///$", SCRIPT.read_text(), re.MULTILINE)[1]
    asked = json.loads(re.search(r"dependencies = (\[.*\])", block)[1])
    assert asked == (ROOT / "requirements.txt").read_text().split()


def test_lines_and_functions_are_short():
    lines = SCRIPT.read_text().splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) <= 2999
    import ast
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_commands_of_the_readme_are_valid():
    """The two commands stand there as CI runs them, and every flag and preset there exists."""
    readme = (ROOT / "README.md").read_text()
    assert "pip install -r requirements.txt && python gpicl_minimal_replication.py\n" in readme
    assert "pip install -r tests/requirements.txt && python -m pytest tests\n" in readme
    for section in ("Install and run", "Results", "What to expect", "What the script does",
                    "Use it on your own data", "Differences from the paper", "Open questions",
                    "Records", "Citation"):
        assert f"\n## {section}\n" in readme
    commands = re.findall(r"^(?:\S+ )*python gpicl_minimal_replication.py(.*)$", readme, re.M)
    assert len(commands) >= 3
    for words in commands:
        words = words.split("#")[0].split()
        if "--help" not in words:
            gpicl.read_settings(words)
    for name in re.findall(r"`([a-z]+/[\w./-]+)`", readme):
        if name.startswith(("results/", "tests/")):
            assert (ROOT / name).exists(), name


def test_a_whole_run_from_the_shell_in_a_log_file(tiny_flags, tmp_path):
    """Output that is no terminal holds the rows and no progress bar."""
    done = subprocess.run([sys.executable, SCRIPT, *tiny_flags()], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    assert len(re.findall(r"^ +\d+ +\d+ +\d\.\d{3} ", done.stdout, re.MULTILINE)) == (
        TINY["STEPS"] // TINY["ROW_EVERY"])
