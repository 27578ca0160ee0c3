"""Tiny settings and data for the tests: nothing here needs the network or real MNIST."""

import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import gpicl_minimal_replication as gpicl  # noqa: E402

SCRIPT = ROOT / "gpicl_minimal_replication.py"
TINY = dict(NUM_EXAMPLES=12, PROJECTION_SIZE=32, MODEL_SIZE=32, NUM_LAYERS=2, NUM_HEADS=2,
            MLP_SIZE=64, BATCH_SIZE=8, STEPS=6, WARMUP_STEPS=2, LOG_EVERY=3,
            VALIDATION_SEQUENCES=16, EVAL_SEQUENCES=64, VALIDATION_IMAGES=50, DEVICE="cpu")


def wait_until(done, process, seconds=120):
    """Wait until `done` returns something true, while the process lives, but not for ever."""
    end = time.time() + seconds
    while not done():
        assert process.poll() is None and time.time() < end
        time.sleep(0.01)


def train(model, dataset, settings):
    """Meta-train a model without files or reports; return the losses."""
    optimizers = gpicl.make_optimizers(model, settings, "fp32")
    return [loss for _, loss in gpicl.training_steps(model, optimizers, dataset, settings, "fp32")]


def lively_model(settings):
    """Return a model whose zero-initialised matrices are random, so that every path counts."""
    torch.manual_seed(0)
    model = gpicl.make_model(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.abs().max() == 0:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def tiny():
    """Return a function that makes tiny settings, with some of them replaced."""
    return lambda **overrides: gpicl.default_settings(**{**TINY, **overrides})


@pytest.fixture(scope="session")
def blobs():
    """Return a Dataset of ten well-separated Gaussian classes of 40 numbers each."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 40, generator=generator)
    y = torch.arange(600) % 10
    x = centres[y] + 0.7 * torch.randn(600, 40, generator=generator)
    return gpicl.Dataset("blobs", (x - x.mean()) / x.std(), y, 10)


@pytest.fixture
def blobs_file(blobs, tmp_path):
    path = tmp_path / "blobs.npz"
    np.savez(path, x=blobs.x.numpy(), y=blobs.y.numpy())
    return path


@pytest.fixture
def tiny_flags(blobs_file, tmp_path):
    """Return flags for a run of seconds on the blobs, writing below tmp_path."""
    flags = {**TINY, "TRAIN_DATASET": blobs_file, "EVAL_DATASETS": blobs_file,
             "DATA_DIR": tmp_path / "data", "OUT_DIR": tmp_path / "runs"}
    return lambda **more: [f"--{name}={value}" for name, value in {**flags, **more}.items()]


@pytest.fixture
def run_folder(tmp_path):
    """Return a function: the only run's folder below tmp_path."""
    def find(out_dir="runs"):
        folder, = (tmp_path / out_dir).iterdir()
        return folder
    return find


@pytest.fixture
def fails(capsys):
    """Return a function: the one line of error that a command line ends with."""
    def check(arguments):
        assert gpicl.main([str(word) for word in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error
    return check


@pytest.fixture(autouse=True)
def seeded():
    """Make every test's random numbers its own, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """Return a writable folder with the real MNIST and FashionMNIST, or skip."""
    for source in (ROOT / "data", ROOT.parent / "shared" / "data"):
        if all([*(source / name / "raw").glob("t10k-labels*")] for name in (
                "MNIST", "FashionMNIST")):
            folder = tmp_path_factory.mktemp("real")
            for name in ("MNIST", "FashionMNIST"):
                (folder / name / "raw").mkdir(parents=True)
                for file in (source / name / "raw").iterdir():
                    shutil.copyfile(file, folder / name / "raw" / file.name)
            return folder
    pytest.skip("no real MNIST and FashionMNIST in data/ or ../shared/data")
