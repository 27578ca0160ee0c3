"""Meta-training: it learns, and a run that was stopped goes on exactly."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, gpicl, train

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------------- optimising
def test_every_parameter_is_learnt_by_exactly_one_optimizer(tiny, blobs):
    for model_settings in (dict(), dict(TOKEN_FORMAT="paper"), dict(IMAGE_QUERIES=False)):
        settings = tiny(WARMUP_STEPS=0, **model_settings)
        model = gpicl.make_model(settings)
        held = [id(p) for optimizer in gpicl.make_optimizers(model, settings, "fp32")
                for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        before = [p.clone() for p in model.parameters()]
        train(model, blobs, settings)
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_rate_warms_up_and_falls_to_zero(tiny):
    settings = tiny(STEPS=100, WARMUP_STEPS=10, DECAY_FRACTION=0.5, LEARNING_RATE=1.0)
    rates = [gpicl.learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)
    constant = tiny(STEPS=100, WARMUP_STEPS=0, DECAY_FRACTION=0, LEARNING_RATE=0.3)
    assert {gpicl.learning_rate(step, constant) for step in range(100)} == {0.3}


def test_a_step_is_as_long_as_rate_and_clipped_gradient(tiny, blobs):
    settings = tiny(GRADIENT_CLIP=1e-3, STEPS=100, WARMUP_STEPS=10, LEARNING_RATE=1.0)
    model = gpicl.make_model(settings)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()
    x, y = gpicl.draw_sequences(blobs, 8, settings, ("train", 0, 0))
    gpicl.train_step(model, [torch.optim.SGD(model.parameters(), 9)], x, y, 4, settings, "fp32")
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()
    assert (after - before).norm().item() == pytest.approx(0.5 * 1e-3, rel=0.01)
    assert all(p.grad is None for p in model.parameters())               # for the next step


@pytest.mark.parametrize("change", [
    dict(SEED=1), dict(BATCH_SIZE=4), dict(LEARNING_RATE=1e-3), dict(WARMUP_STEPS=1),
    dict(DECAY_FRACTION=0.9), dict(ADAM_BETA2=0.9), dict(ADAM_EPSILON=1e-3),
    dict(GRADIENT_CLIP=1e-3), dict(STEPS=7)], ids=str)
def test_every_setting_of_training_matters(change, tiny, blobs):
    weights = []
    for settings in (tiny(), tiny(**change)):
        torch.manual_seed(0)
        model = gpicl.make_model(settings)
        train(model, blobs, settings)
        weights.append(model.head.weight)
    assert not torch.equal(*weights)


# --------------------------------------------------------------------------------------- learning
@pytest.mark.parametrize("form", [dict(), dict(TOKEN_FORMAT="paper"), dict(IMAGE_QUERIES=False)])
def test_one_fixed_task_is_memorised_within_a_few_steps(form, tiny, blobs):
    """With one task, even the first label of a sequence can be known: from the weights."""
    settings = tiny(NUM_TASKS=1, STEPS=60, BATCH_SIZE=16, LEARNING_RATE=5e-3, **form)
    model = gpicl.make_model(settings)
    train(model, blobs, settings)
    x, y = gpicl.draw_sequences(blobs, 200, settings, ("other images",), 1)
    correct = gpicl.compute_logits(model, x, y, "fp32").argmax(-1) == y
    assert correct[:, 0].float().mean() > 0.8


def test_it_learns_to_learn(tiny):
    """On unseen tasks of digits, and of letters for digits, many examples beat few by far."""
    settings = tiny(NUM_EXAMPLES=40, PROJECTION_SIZE=196, IMAGE_SIZE=14, MODEL_SIZE=64,
                    MLP_SIZE=128, STEPS=120, BATCH_SIZE=16, EVAL_SEQUENCES=512, WARMUP_STEPS=10,
                    LEARNING_RATE=3e-3)
    digits = gpicl.load_dataset("RenderedDigits", "train", settings, "cpu")
    model = gpicl.make_model(settings)
    train(model, digits, settings)
    for name in ("RenderedDigits", "RenderedLetters"):
        dataset = gpicl.load_dataset(name, "test", settings, "cpu")
        curve = gpicl.meta_test(model, dataset, settings, "fp32")["in-context"]
        assert curve["low"][-1] > curve["high"][2] + 0.15, curve["accuracy"]
        assert curve["high"][0] < 0.15                   # without examples: chance


def test_rows_of_the_progress_table_are_of_validation_images(tiny, blobs, tmp_path, monkeypatch):
    asked, count_correct = [], gpicl.count_correct
    monkeypatch.setattr(gpicl, "count_correct", lambda model, dataset, *rest: (
        asked.append(dataset.name), count_correct(model, dataset, *rest))[1])
    progress = gpicl.meta_train(gpicl.make_model(tiny()), blobs, blobs._replace(name="validation"),
                                tiny(STEPS=7), tmp_path, "fp32", lambda *texts: None)
    assert asked == 3 * ["validation"]
    assert [row["step"] for row in progress["rows"]] == [3, 6, 7]        # and the last one


# ------------------------------------------------------------------------------- stopping, resuming
def model_and_results(folder):
    """Return the weights of a finished run, its curves, and the rows of its progress table."""
    results = json.loads((folder / "results.json").read_text())
    rows = [(row["step"], row["loss"], row["accuracy"]) for row in results["progress"]]
    return gpicl.load_checkpoint(folder / "model.pt")["model"], results["data_sets"], rows


def assert_the_same_run(one, other):
    (weights, *numbers), (other_weights, *other_numbers) = map(model_and_results, (one, other))
    assert numbers == other_numbers
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())
    assert (other / "accuracy_by_examples.png").exists() and not (other / "checkpoint.pt").exists()


KILL_OFTEN = """import os, random, sys, time
import gpicl_minimal_replication as gpicl

def attempt(flags, seconds=None):
    began, child = time.time(), os.fork()
    if not child:
        os._exit(gpicl.main(flags))
    if seconds:
        time.sleep(seconds)
        os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.time() - began

code, seconds = attempt(WHOLE)
codes = [code]
for _ in range(5):
    codes.append(attempt(KILLED, random.uniform(0.1, 0.6) * seconds)[0])
codes.append(attempt(KILLED)[0])
print("exit codes:", *codes)
"""


def test_resume_after_kill_9_at_random_moments_is_bit_identical(tiny_flags, tmp_path, run_folder):
    steps = dict(STEPS=100, CHECKPOINT_SECONDS=0, LOG_EVERY=20, EVAL_SEQUENCES=256)
    whole, killed = (tiny_flags(OUT_DIR=tmp_path / name, **steps) for name in ("whole", "killed"))
    program = KILL_OFTEN.replace("WHOLE", repr(whole)).replace("KILLED", repr(killed))
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=200)
    codes = re.search("exit codes: (.*)", done.stdout)[1].split()
    assert codes[0] == codes[-1] == "0" and codes.count("-9") >= 2, done.stderr
    assert_the_same_run(run_folder("whole"), run_folder("killed"))


def stop_at(step, monkeypatch, number):
    """Make training receive a signal in this step, and none when it goes on."""
    train_step = gpicl.train_step

    def interrupted(model, optimizers, x, y, number_of_step, *rest):
        if number_of_step + 1 == step:
            monkeypatch.setattr(gpicl, "train_step", train_step)
            os.kill(os.getpid(), number)
        return train_step(model, optimizers, x, y, number_of_step, *rest)
    monkeypatch.setattr(gpicl, "train_step", interrupted)


@pytest.mark.parametrize("step", [1, 4, 6])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_the_same_command_goes_on(
        number, step, tiny_flags, tmp_path, run_folder, capsys, monkeypatch):
    assert gpicl.main(tiny_flags(OUT_DIR=tmp_path / "whole")) == 0
    stop_at(step, monkeypatch, number)
    assert gpicl.main(tiny_flags()) == 130
    assert f"after step {step}" in capsys.readouterr().out
    folder = run_folder()
    assert gpicl.load_checkpoint(folder / "checkpoint.pt")["progress"]["step"] == step
    assert (folder / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()    # what trains
    assert gpicl.main(tiny_flags()) == 0
    assert_the_same_run(run_folder("whole"), folder)


def test_a_signal_from_outside_stops_the_process(tiny_flags, run_folder, tmp_path):
    process = subprocess.Popen([sys.executable, SCRIPT, *tiny_flags(STEPS=10**6, LOG_EVERY=3)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("      3 "):                  # the first row of the table
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130 and process.stderr.read() == ""
    assert gpicl.load_checkpoint(run_folder() / "checkpoint.pt")["progress"]["step"] >= 3


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tiny_flags):
    process = subprocess.Popen([sys.executable, SCRIPT, *tiny_flags(STEPS=10**6)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(0.7)                                      # later than that it is trained
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "" and "Stopped" in output


@pytest.mark.parametrize("place, number", [
    ("baseline_labels", signal.SIGINT), ("baseline_labels", signal.SIGTERM),
    ("plot", signal.SIGINT)])
def test_a_stop_in_the_test_goes_on_with_the_test(
        place, number, tiny_flags, tmp_path, run_folder, monkeypatch):
    assert gpicl.main(tiny_flags(OUT_DIR=tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(gpicl, place, lambda *_: os.kill(os.getpid(), number))
        assert gpicl.main(tiny_flags()) == 130
    monkeypatch.setattr(gpicl, "train_step", lambda *_: pytest.fail("it trains again"))
    assert gpicl.main(tiny_flags()) == 0
    assert_the_same_run(run_folder("whole"), run_folder())


def test_same_seed_same_result_and_a_finished_run_is_not_repeated(
        tiny_flags, tmp_path, capsys, monkeypatch):
    def table(out_dir, **more):
        assert gpicl.main(tiny_flags(OUT_DIR=tmp_path / out_dir, **more)) == 0
        out = capsys.readouterr().out
        return out[out.index("Accuracy (%) after so many examples"):]
    first = table("a")
    assert first == table("b") != table("c", SEED=1)
    with monkeypatch.context() as patch:
        patch.setattr(gpicl, "train_step", lambda *_: pytest.fail("it trains again"))
        again = table("a")
    assert again.startswith(first.rstrip()) and "delete" in again
    assert len([*(tmp_path / "a").iterdir()]) == 1
    table("a", STEPS=7)                                  # and other settings, another folder
    assert len([*(tmp_path / "a").iterdir()]) == 2


def test_a_loss_that_is_not_finite_stops_with_a_sentence_and_keeps_the_checkpoint(
        tiny_flags, run_folder, fails, monkeypatch):
    train_step = gpicl.train_step

    def poisoned(model, optimizers, x, y, step, *rest):
        return train_step(model, optimizers, x * (np.nan if step == 4 else 1), y, step, *rest)
    monkeypatch.setattr(gpicl, "train_step", poisoned)
    assert "not finite at step 5" in fails(tiny_flags(CHECKPOINT_SECONDS=0))
    saved = gpicl.load_checkpoint(run_folder() / "checkpoint.pt")
    assert saved["progress"]["step"] == 4
    assert all(value.isfinite().all() for value in saved["model"].values())


# -------------------------------------------------------------------------------- several processes
STOP_ONE = f"""import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import gpicl_minimal_replication as gpicl
train_step = gpicl.train_step

def stopped(model, optimizers, x, y, step, *rest):
    if step == 20 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(model, optimizers, x, y, step, *rest)

gpicl.train_step = stopped
sys.exit(gpicl.main(sys.argv[1:]))
"""


def test_two_processes_do_what_one_does_even_if_one_is_stopped_on_the_way(
        tiny_flags, tmp_path, run_folder):
    """torchrun with gloo: the same weights and curves to float tolerance."""
    steps = dict(STEPS=30, LOG_EVERY=10, PRECISION="fp32", LEARNING_RATE=1e-3, OUTPUT_STD=1.0,
                 ADAM_EPSILON=1e-4)                      # else Adam makes steps of mere rounding

    def torchrun(script):
        return subprocess.run([
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            script, *tiny_flags(**steps)],
            capture_output=True, text=True, env=ENVIRONMENT, timeout=200)

    (tmp_path / "stopped.py").write_text(STOP_ONE)
    assert torchrun(tmp_path / "stopped.py").returncode != 0
    reached = gpicl.load_checkpoint(run_folder() / "checkpoint.pt")["progress"]["step"]
    assert reached == 21 and not (run_folder() / "model.pt").exists()
    done = torchrun(SCRIPT)
    assert done.returncode == 0 and done.stdout.count("Run folder") == 1, done.stderr
    assert gpicl.main(tiny_flags(OUT_DIR=tmp_path / "one", **steps)) == 0
    (weights, curves, rows), (other_weights, other_curves, other_rows) = map(
        model_and_results, (run_folder(), run_folder("one")))
    for name, weight in weights.items():
        assert (weight - other_weights[name]).abs().max() < 1e-4, name
    for (step, loss, _), (other_step, other_loss, _) in zip(rows, other_rows, strict=True):
        assert step == other_step and loss == pytest.approx(other_loss, abs=1e-3)
    curve, other_curve = (data_sets["blobs"]["curves"]["in-context"]["accuracy"]
                          for data_sets in (curves, other_curves))
    assert curve == pytest.approx(other_curve, abs=0.05)


def test_a_batch_must_divide_among_the_processes(tiny_flags, fails, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "BATCH_SIZE=8 can't be split evenly over 3 processes" in fails(tiny_flags())


def test_another_process_that_stops_is_no_traceback(fails, monkeypatch):
    def run(*_):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4")
    monkeypatch.setattr(gpicl, "run", run)
    assert "Connection closed by peer" in fails([])
