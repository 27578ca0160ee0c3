"""Muon: its steps are those of torch's own, and it gets the matrices of the layers."""

import pytest
import torch
from conftest import gpicl

from experiments.muon import Muon, MuonTransformer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_steps_as_torch_does(precision):
    """In bf16, as torch's always is, and in fp32 up to bf16's rounding."""
    start = [torch.randn(shape) for shape in ((8, 24), (24, 8), (8, 24))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = (Muon(ours, 0.1, precision),
                  torch.optim.Muon(theirs, 0.1, 0.0, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - p).norm()


def test_muon_has_the_layers_matrices_and_all_follow_the_rate(blobs, tiny):
    settings = tiny(STEPS=100, WARMUP_STEPS=10)
    model = MuonTransformer(settings)
    adam, muon = optimizers = gpicl.make_optimizers(model, settings, "fp32")
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups
            for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    matrices = {id(p) for p in model.layers.parameters() if p.ndim == 2}
    assert {id(p) for p in muon.param_groups[0]["params"]} == matrices
    x, y = gpicl.draw_sequences(blobs, 8, settings, ("train", 0, 4))
    gpicl.train_step(model, optimizers, x, y, 4, settings, "fp32")
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {
        gpicl.learning_rate(4, settings)}


def test_a_run_with_muon_is_resumed_exactly(tiny_flags, tmp_path, run_folder, monkeypatch):
    assert gpicl.main(["plain", *tiny_flags(OUT_DIR=tmp_path / "whole")]) == 0
    train_step = gpicl.train_step

    def stopped(*arguments):
        monkeypatch.setattr(gpicl, "train_step", train_step)
        raise KeyboardInterrupt

    save_checkpoint = gpicl.save_checkpoint

    def save_then_stop(*arguments, **more):
        save_checkpoint(*arguments, **more)
        monkeypatch.setattr(gpicl, "save_checkpoint", save_checkpoint)
        monkeypatch.setattr(gpicl, "train_step", stopped)

    monkeypatch.setattr(gpicl, "save_checkpoint", save_then_stop)
    assert gpicl.main(["plain", *tiny_flags()]) == 130
    assert gpicl.main(["plain", *tiny_flags()]) == 0
    one, other = (gpicl.load_checkpoint(run_folder(name) / "model.pt")["model"]
                  for name in ("whole", "runs"))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
