"""Meta-training: it learns, and a killed run goes on exactly."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, gpicl, wait_until

SCRIPT = ROOT / "gpicl_minimal_replication.py"


def train(model, dataset, settings):
    """Train without files or reports; return the losses."""
    optimizers = gpicl.make_optimizers(model, settings, "fp32")
    return [loss for _, loss, *_ in gpicl.learning_steps(
        model, optimizers, dataset, settings, "fp32")]


def test_every_parameter_is_in_exactly_one_optimizer(tiny):
    for optimizer in ("muon", "adamw"):
        model = gpicl.InContextModel(tiny(OPTIMIZER=optimizer))
        held = [id(p) for o in gpicl.make_optimizers(model, tiny(OPTIMIZER=optimizer), "fp32")
                for group in o.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_muon_has_the_layers_matrices_and_all_follow_the_rate(blobs, tiny):
    settings = tiny(STEPS=100, WARMUP_STEPS=10)
    model = gpicl.InContextModel(settings)
    optimizers = gpicl.make_optimizers(model, settings, "fp32")
    names = {id(p): name.split(".", 2)[-1] for name, p in model.named_parameters()}
    assert {names[id(p)] for p in optimizers[1].param_groups[0]["params"]} == {
        "attention.qkv.weight", "attention.out.weight", "up.weight", "down.weight"}
    assert len(gpicl.make_optimizers(model, tiny(OPTIMIZER="adamw"), "fp32")) == 1
    gpicl.update(model, optimizers, *gpicl.training_batch(blobs, 4, settings, "fp32"), 4,
                 settings, "fp32")
    assert {group["lr"] for o in optimizers for group in o.param_groups} == {
        gpicl.learning_rate(4, settings)}
    assert all(p.grad is None for p in model.parameters())


def test_every_step_has_a_batch_of_its_own(blobs, tiny, monkeypatch):
    batches, true_batch = [], gpicl.training_batch
    monkeypatch.setattr(gpicl, "training_batch", lambda dataset, step, *rest: (
        batches.append((step, true_batch(dataset, step, *rest))), batches[-1][1])[1])
    assert len([*gpicl.training_steps(tiny(), blobs, "fp32")]) == 6
    assert [step for step, _ in batches] == [*range(6)]
    assert len({x.sum().item() for _, (x, _) in batches}) == 6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_steps_as_torch_does(precision):
    """In bf16, as torch's always is, and in fp32 up to bf16's rounding."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 24), (24, 8), (8, 24))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = (gpicl.Muon(ours, 0.1, 0.2, gpicl.DTYPES[precision]),
                  torch.optim.Muon(theirs, 0.1, 0.2, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - 0.98**3 * p).norm()


def test_rate_warms_up_and_falls_to_zero(tiny):
    settings = tiny(STEPS=100, WARMUP_STEPS=10, DECAY_FRACTION=0.5, LEARNING_RATE=1.0)
    rates = [gpicl.learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)


@pytest.mark.parametrize("form", [dict(), dict(TOKEN_FORMAT="paper"), dict(OPTIMIZER="adamw")])
def test_one_fixed_task_is_memorised_within_a_few_steps(form, tiny, blobs):
    """With one task, even the first label of a sequence can be known: from the weights."""
    torch.manual_seed(0)
    settings = tiny(NUM_TASKS=1, STEPS=60, BATCH_SIZE=16, LEARNING_RATE=5e-3, **form)
    model = gpicl.InContextModel(settings)
    train(model, blobs, settings)
    x, y = gpicl.draw_sequences(blobs, 200, settings, ("other images",), 1)
    right = gpicl.logits_of(model, x, y, "fp32").argmax(-1) == y
    assert right[:, 0].float().mean() > 0.8


def test_a_tiny_model_meta_learns_on_rendered_data(tiny, tmp_path):
    """On unseen tasks, and on letters for digits, many examples beat few: intervals apart."""
    torch.manual_seed(0)
    settings = tiny(NUM_EXAMPLES=50, PROJECTION_SIZE=256, MODEL_SIZE=64, MLP_SIZE=128, STEPS=120,
                    BATCH_SIZE=16, EVAL_SEQUENCES=1024, DATA_DIR=str(tmp_path), WARMUP_STEPS=10)
    digits = gpicl.load_dataset("RenderedDigits", "train", settings, "cpu")
    model = gpicl.InContextModel(settings)
    train(model, digits, settings)
    for name in ("RenderedDigits", "RenderedLetters"):
        dataset = gpicl.load_dataset(name, "test", settings, "cpu")
        curve = gpicl.evaluate(model, dataset, settings, "fp32")[0]["Transformer"]
        assert curve["low"][49] > curve["high"][2] + 0.2
        assert curve["high"][0] < 0.15                   # without examples: chance


def run(flags, **more):
    return subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True,
                          timeout=120, **more)


def at_step(step, action):
    """Return a program that does what the script does, and `action` after the checkpoint then."""
    return f"""import os, signal, sys, time, gpicl_minimal_replication as gpicl
true_save = gpicl.save_checkpoint

def save(*given, **more):
    true_save(*given, **more)
    if more["progress"]["step"] == {step}:
        {action}

gpicl.save_checkpoint = save
sys.exit(gpicl.main(sys.argv[1:]))"""


def test_resume_after_kill_9_is_bit_identical(tiny_flags, tmp_path):
    steps = dict(STEPS=60, CHECKPOINT_SECONDS=0, ROW_EVERY=20)
    whole = run(tiny_flags(OUT_DIR=tmp_path / "whole", **steps))
    assert whole.returncode == 0, whole.stderr
    flags = tiny_flags(OUT_DIR=tmp_path / "killed", **steps)
    program = at_step(20, "os.kill(os.getpid(), signal.SIGKILL)")
    killed = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    reached = gpicl.load_checkpoint(next((tmp_path / "killed").glob("*/checkpoint.pt")))
    assert reached["progress"]["step"] == 20
    for name in ("checkpoint.1.tmp.pt", "model.1.tmp.pt", "results.1.tmp.json"):
        half_written = next((tmp_path / "killed").iterdir()) / name
        half_written.write_bytes(b"a kill may come at any time")
    again = run(flags)
    assert again.returncode == 0 and "Continuing after step" in again.stdout
    a, b = (gpicl.load_checkpoint(next((tmp_path / name).glob("*/model.pt")))
            for name in ("whole", "killed"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert [r["accuracy"] for r in a["progress"]["rows"]] == [
        r["accuracy"] for r in b["progress"]["rows"]]
    files = {path.name for path in next((tmp_path / "killed").iterdir()).iterdir()}
    assert files == {"model.pt", "results.json", "curves.csv", "accuracy_by_examples.png",
                     "log.txt", SCRIPT.name}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_the_same_command_goes_on(number, tiny_flags, tmp_path):
    flags = tiny_flags(STEPS=3000, CHECKPOINT_SECONDS=0, ROW_EVERY=3000)
    process = subprocess.Popen([sys.executable, SCRIPT, *flags], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: [*(tmp_path / "runs").glob("*/checkpoint.pt")], process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    step = int(output.split("Stopped after step ")[1].split(";")[0])
    path = next((tmp_path / "runs").glob("*/checkpoint.pt"))
    assert gpicl.load_checkpoint(path)["progress"]["step"] == step
    assert (path.parent / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()     # what trains


def test_a_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), gpicl.stop_requests() as requests:
        signal.raise_signal(signal.SIGINT)
        assert requests
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_in_the_last_step_stops_before_the_test(tiny_flags, tmp_path, capsys, monkeypatch):
    true_count = gpicl.count_hits

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return true_count(*arguments)

    monkeypatch.setattr(gpicl, "count_hits", interrupted)
    assert gpicl.main(tiny_flags(ROW_EVERY=6)) == 130
    assert "Stopped after step 6" in capsys.readouterr().out
    monkeypatch.undo()
    assert gpicl.main(tiny_flags(ROW_EVERY=6)) == 0
    assert "Continuing after step 6" in capsys.readouterr().out


def test_same_seed_same_result_and_a_finished_run_says_so(tiny_flags, tmp_path, capsys):
    def table(out_dir, **more):
        assert gpicl.main(tiny_flags(OUT_DIR=tmp_path / out_dir, **more)) == 0
        out = capsys.readouterr().out
        return out[out.index("Accuracy (%) after so many examples"):]
    first = table("a")
    assert first == table("b") != table("c", SEED=1)
    again = table("a")
    assert again.startswith(first.rstrip()) and "To make it afresh, delete" in again
    assert len(list((tmp_path / "a").iterdir())) == 1    # and other settings, another folder
    table("a", STEPS=7)
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_not_finite_loss_stops_with_a_sentence_and_keeps_the_checkpoint(
        tiny_flags, tmp_path, capsys, monkeypatch):
    true_update, calls = gpicl.update, []

    def poisoned(model, optimizers, x, y, *rest):
        calls.append(1)
        return true_update(model, optimizers, x * (np.nan if len(calls) == 5 else 1), y, *rest)

    monkeypatch.setattr(gpicl, "update", poisoned)
    assert gpicl.main(tiny_flags(CHECKPOINT_SECONDS=0)) == 2
    assert "not finite at step 5" in capsys.readouterr().err
    saved = gpicl.load_checkpoint(next((tmp_path / "runs").glob("*/checkpoint.pt")))
    assert saved["progress"]["step"] == 4
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_model_that_the_last_step_spoils_is_not_kept(tiny_flags, fails, tmp_path, monkeypatch):
    true_update = gpicl.update

    def spoiling(model, *rest):
        loss = true_update(model, *rest)
        model.head.weight.data.fill_(np.inf)
        return loss

    monkeypatch.setattr(gpicl, "update", spoiling)
    assert "logits are not finite" in fails(tiny_flags(STEPS=1))
    assert not [*(tmp_path / "runs").glob("*/*.pt")]


def test_two_processes_do_what_one_does_and_go_on_after_a_stop(tiny_flags, tmp_path):
    """torchrun with gloo: the same weights to float tolerance; a stopped run ends the same."""
    steps = dict(STEPS=30, ROW_EVERY=30, PRECISION="fp32", LEARNING_RATE=1e-3)

    def torchrun(out_dir, script=SCRIPT, **more):
        return subprocess.Popen([
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            script, *tiny_flags(OUT_DIR=tmp_path / out_dir, **steps, **more)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})

    def weights(out_dir):
        return gpicl.load_checkpoint(next((tmp_path / out_dir).glob("*/model.pt")))["model"]

    assert run(tiny_flags(OUT_DIR=tmp_path / "one", **steps)).returncode == 0
    process = torchrun("two")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("Run folder") == 1               # one process speaks
    for name, weight in weights("one").items():
        difference = (weight - weights("two")[name]).abs()
        assert difference.mean() < 1e-4, name            # rounding decides Adam's tiniest steps
    (tmp_path / "stopped.py").write_text(at_step(
        20, "os.kill(os.getppid(), signal.SIGTERM), time.sleep(2)"))
    process = torchrun("stopped", tmp_path / "stopped.py", CHECKPOINT_SECONDS=0)
    process.communicate(timeout=120)
    assert not list((tmp_path / "stopped").glob("*/model.pt"))
    reached = gpicl.load_checkpoint(next((tmp_path / "stopped").glob("*/checkpoint.pt")))
    assert 20 <= reached["progress"]["step"] < 30
    process = torchrun("stopped", CHECKPOINT_SECONDS=0)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Continuing after step" in output, errors
    assert all(torch.equal(weight, weights("two")[name])
               for name, weight in weights("stopped").items())
    process = torchrun("odd", BATCH_SIZE=7)
    assert "can't be split evenly over 2 processes" in process.communicate(timeout=120)[1]


def test_real_mnist_is_far_above_chance_after_100_steps(real_data, tmp_path):
    """On MNIST, and on FashionMNIST, which was never trained on."""
    done = run(["quick", f"--DATA_DIR={real_data}", f"--OUT_DIR={tmp_path}", "--STEPS=100",
                "--BATCH_SIZE=16", "--EVAL_SEQUENCES=1024"])
    assert done.returncode == 0, done.stderr
    found = {line.split("@")[0]: float(line.split()[1]) for line in done.stdout.splitlines()
             if "@99: " in line}
    assert found["MNIST"] > 60 and found["FashionMNIST"] > 55
    assert "GPICL 73.7" in done.stdout


def test_optimizers_get_their_settings(tiny):
    settings = tiny(ADAM_BETA2=0.9, ADAM_EPSILON=1e-3, WEIGHT_DECAY=0.2)
    adam, muon = gpicl.make_optimizers(gpicl.InContextModel(settings), settings, "fp32")
    group = adam.param_groups[0]
    assert group["betas"] == (0.9, 0.9) and group["eps"] == 1e-3
    assert group["weight_decay"] == muon.param_groups[0]["weight_decay"] == 0.2


def test_a_step_is_as_long_as_rate_and_clipped_gradient(tiny, blobs):
    settings = tiny(GRADIENT_CLIP=1e-3, STEPS=100, WARMUP_STEPS=10, LEARNING_RATE=1.0)
    model = gpicl.InContextModel(settings)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()
    x, y = gpicl.training_batch(blobs, 0, settings, "fp32")
    gpicl.update(model, [torch.optim.SGD(model.parameters(), 9)], x, y, 4, settings, "fp32")
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()
    assert (after - before).norm().item() == pytest.approx(0.5 * 1e-3, rel=0.01)


def test_rows_of_the_progress_table_are_of_validation_images(tiny, blobs, tmp_path, monkeypatch):
    asked, true_count = [], gpicl.count_hits
    monkeypatch.setattr(gpicl, "count_hits", lambda model, dataset, *rest: (
        asked.append(dataset.name), true_count(model, dataset, *rest))[1])
    gpicl.meta_train(gpicl.InContextModel(tiny()), blobs, blobs._replace(name="validation"),
                     tiny(), tmp_path, "fp32", lambda *texts: None)
    assert set(asked) == {"validation"}
