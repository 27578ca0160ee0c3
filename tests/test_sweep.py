"""Sweeps: what they write, and that they go on where they stopped."""

import csv
import functools
import importlib.util
import json
import runpy
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, gpicl, wait_until

from experiments import sweep

EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py")
                     if "\nif __name__" in path.read_text())
TINY_SWEEP = dict(NUM_EXAMPLES=6, PROJECTION_SIZE=16, MODEL_SIZE=8, NUM_HEADS=2, MLP_SIZE=8,
                  STEPS=2, BATCH_SIZE=4, EVAL_SEQUENCES=16, VALIDATION_IMAGES=50, WARMUP_STEPS=1,
                  DEVICE="cpu", PRECISION="fp32", SEEDS=2, WORKERS=1)
TOY = '''"""A toy: nothing is trained."""
import torch

import gpicl_minimal_replication as gpicl

FACTOR = 3                   # what numbers are multiplied by
FILE = ""                    # any file

TITLE = "A toy"
SETTINGS = dict(STEPS=7)
CELLS = [dict(NUM_TASKS=1), dict(NUM_TASKS=2, LEARNING_RATE=0.5)]
COMPARED = ("MODEL",)
made = []
during = []


def check(settings, data):
    if settings.FACTOR > 9:
        raise gpicl.UserError("FACTOR is too large.")


def measure(settings, data, precision):
    made.append((settings.NUM_TASKS, settings.SEED, settings.EVAL_SEED))
    if during:
        during.pop()()
    return [dict(part=part, threads=torch.get_num_threads(), steps=settings.STEPS,
                 value=settings.FACTOR * settings.NUM_TASKS + settings.SEED / 3)
            for part in ("head", "tail")]


def report(rows, figure):
    figure.subplots().plot([row["value"] for row in rows], label="values")
    return [f"{len(rows)} rows"]
'''


def sweep_flags(data, folder, **more):
    """Return flags that make any experiment a matter of seconds; None leaves one out."""
    flags = {**TINY_SWEEP, "TRAIN_DATASET": data, "EVAL_DATASETS": data, "DATA_DIR": folder,
             "OUT_DIR": folder / "runs", "RESULTS_DIR": folder / "results", **more}
    return [f"--{key}={value}" for key, value in flags.items() if value is not None]


@pytest.fixture
def flags(blobs_file, tmp_path):
    return functools.partial(sweep_flags, blobs_file, tmp_path)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Return the experiment TOY, as a module that was imported."""
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    spec = importlib.util.spec_from_file_location("experiments.toy", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "experiments.toy", module)
    spec.loader.exec_module(module)
    return module


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def runs_file(tmp_path):
    path, = (tmp_path / "runs").glob("*/runs.txt")
    return path


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_answers_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    assert not ended.value.code and f"python -m experiments.{name}" in capsys.readouterr().out


def test_a_sweep_ends_in_rows_a_record_and_a_figure(toy, flags, tmp_path, capsys):
    assert sweep.main("toy", flags(STEPS=None, NUM_TASKS=None)) == 0
    rows = read_csv(tmp_path / "results" / "toy.csv")
    assert [(row["NUM_TASKS"], row["SEED"], row["part"], row["steps"]) for row in rows] == [
        (tasks, seed, part, "7") for seed in "01" for tasks in "12" for part in ("head", "tail")]
    record = json.loads((tmp_path / "results" / "toy.json").read_text())
    assert record["table"] == ["8 rows"] and record["runs"] == 4
    assert record["settings"]["FACTOR"] == 3 and "NUM_TASKS" not in record["settings"]
    assert record["torch"] == torch.__version__ and record["run_seconds"] > 0
    assert (tmp_path / "results" / "toy.png").stat().st_size > 5000
    assert "4 runs, 0 of them made before" in capsys.readouterr().out
    assert {made[1:] for made in toy.made} == {(0, 0), (1, 1)}           # EVAL_SEED goes with SEED


def test_a_flag_fixes_what_runs_would_differ_in(toy, flags):
    assert sweep.main("toy", flags(NUM_TASKS=5, LEARNING_RATE=0.5, SEEDS=1, SEED=4)) == 0
    assert toy.made == [(5, 4, 4), (5, 4, 4)]            # one cell has the rate, one has not


def test_runs_of_before_are_kept_and_seeds_can_be_added(toy, flags, tmp_path):
    sweep.main("toy", flags())
    rows = read_csv(tmp_path / "results" / "toy.csv")
    sweep.main("toy", flags(SEEDS=3))
    assert len(toy.made) == 6 and read_csv(tmp_path / "results" / "toy.csv")[:len(rows)] == rows
    sweep.main("toy", flags(FACTOR=4))                   # not the same runs
    assert len(toy.made) == 10


@pytest.mark.parametrize("damage", [
    lambda line: line.replace(b"head", b"hfad"), lambda line: line[:-20], lambda line: b"{}",
    lambda line: b"[]", lambda line: b"\xff\xfe" + line])
def test_a_damaged_line_is_a_run_that_is_made_again(damage, toy, flags, tmp_path):
    sweep.main("toy", flags())
    rows, path = read_csv(tmp_path / "results" / "toy.csv"), runs_file(tmp_path)
    lines = path.read_bytes().strip().split(b"\n")
    lines[1] = damage(lines[1])
    path.write_bytes(b"\n".join(lines))
    assert sweep.main("toy", flags()) == 0
    assert len(toy.made) == 5 and read_csv(tmp_path / "results" / "toy.csv") == rows
    sweep.main("toy", flags())
    assert len(toy.made) == 5                            # that line is good now


def test_two_copies_of_a_command_do_not_disturb_each_other(toy, flags, tmp_path):
    toy.during.append(lambda: sweep.main("toy", flags()))
    assert sweep.main("toy", flags()) == 0
    assert len(toy.made) == 8 and len(read_csv(tmp_path / "results" / "toy.csv")) == 8
    assert len(sweep.read_runs(runs_file(tmp_path))) == 4


def test_every_run_has_one_thread(toy, flags, tmp_path, monkeypatch):
    """Their number decides how sums are rounded: it must not depend on how many runs are left."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        sweep.main("toy", flags())
    finally:
        torch.set_num_threads(threads)
    assert {row["threads"] for row in read_csv(tmp_path / "results" / "toy.csv")} == {"1"}


def test_a_file_that_changed_makes_new_runs(toy, flags, tmp_path):
    for content in ("a", "a", "b"):
        (tmp_path / "file").write_text(content)
        sweep.main("toy", flags(FILE=tmp_path / "file", SEEDS=1))
    assert len(toy.made) == 4


@pytest.mark.parametrize("more, expected", [
    (dict(MODEL="transformer"), "MODEL: runs are compared by it"),
    (dict(SEEDS=2.5), "SEEDS is 2.5"), (dict(SEEDS=0), "SEEDS is 0"),
    (dict(FACTOR="many"), "FACTOR"), (dict(FACTOR=10), "FACTOR is too large"),
    (dict(STEPZ=3), "--STEPZ=3"), (dict(LOG_EVERY=3), "--LOG_EVERY"),
    (dict(MODEL_SIZE=31), "MODEL_SIZE=31"), (dict(TRAIN_DATASET="none.npz"), "none.npz"),
])
def test_wrong_use_is_one_sentence_before_the_first_run(more, expected, toy, flags, capsys):
    assert sweep.main("toy", flags(**more)) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("error: ") and error.count("\n") == 1
    assert not toy.made


def test_an_error_names_its_run(flags, capsys):
    assert sweep.main("phases", flags(LEARNING_RATE=1e18, STEPS=9, NUM_TASKS=4)) == 2
    assert "(in the run {'MODEL': " in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_keeps_its_runs_and_leaves_no_process(number, flags, tmp_path):
    """What was stopped, of two workers, goes on with one, and gives what one alone gives."""
    settings = dict(NUM_TASKS=4, WORKERS=2, SEEDS=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.phases", *flags(**{**settings, "SEEDS": 500})],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_until(lambda: any(path.stat().st_size for path in (
        tmp_path / "runs").glob("*/runs.txt")), process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)     # the pipes close as the last worker ends
    assert "Traceback" not in errors
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert (number == signal.SIGKILL) or output.rstrip().split("\n")[-1].startswith("Stopped;")
    assert sweep.read_runs(runs_file(tmp_path))
    assert sweep.main("phases", flags(**{**settings, "WORKERS": 1})) == 0
    rows = read_csv(tmp_path / "results" / "phases.csv")
    sweep.main("phases", flags(**{**settings, "WORKERS": 1, "OUT_DIR": tmp_path / "other"}))
    assert read_csv(tmp_path / "results" / "phases.csv") == rows


# ------------------------------------------------------------------------------ data and training
def test_data_are_read_once_and_are_the_test_images(blobs_file, flags, monkeypatch, toy):
    loaded, load_dataset = [], gpicl.load_dataset
    monkeypatch.setattr(gpicl, "load_dataset", lambda name, split, *rest: (
        loaded.append(split), load_dataset(name, split, *rest))[1])
    sweep.read_data.cache_clear()
    sweep.main("toy", flags())
    assert loaded == ["train", "test"]


def test_a_file_called_as_another_data_set_is_what_is_measured(blobs, tmp_path, monkeypatch):
    arrays, path = (blobs.x.numpy(), blobs.y.numpy()), str(tmp_path / "FashionMNIST.npz")
    np.savez(path, x=arrays[0], y=arrays[1])
    monkeypatch.setattr(gpicl, "torchvision_arrays", lambda *_: arrays)
    values = dict(DATA_DIR="", TRAIN_DATASET=path, EVAL_DATASETS="auto", IMAGE_SIZE=8,
                  VALIDATION_IMAGES=50, NUM_EXAMPLES=6)
    training, _, tests = sweep.read_data(
        torch.device("cpu"), tuple(values[key] for key in sweep.DATA_SETTINGS))
    assert training.name == path and [*tests] == [path, "FashionMNIST"]


def test_another_seed_is_another_model(blobs, tiny):
    one, same, other = (sweep.trained_model(tiny(SEED=seed, STEPS=2), blobs, "fp32").state_dict()
                        for seed in (0, 0, 1))
    assert torch.equal(one["embed_image.weight"], same["embed_image.weight"])
    assert not torch.equal(one["embed_image.weight"], other["embed_image.weight"])


def test_accuracy_of_the_first_and_of_the_last_tenth(blobs, tiny, monkeypatch):
    monkeypatch.setattr(gpicl, "count_correct", lambda *_: {"in-context": np.arange(40)})
    assert sweep.first_and_last(None, blobs, tiny(EVAL_SEQUENCES=100), "fp32") == (0, 0.375)
