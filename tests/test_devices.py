"""The same algorithm on every device: with a GPU on it, without one on a pretended GPU."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gpicl_minimal_replication as gpicl

VARIANTS = [dict(), dict(RIDGE_ATTENTION=False), dict(COMPARE_IMAGES=False), dict(NUM_TASKS=4),
            dict(TOKEN_FORMAT="paper"), dict(BIASED_FRACTION=0.5), dict(OPTIMIZER="adamw"),
            dict(ARCHITECTURE="outer_lstm"), dict(ARCHITECTURE="deltanet"),
            dict(ARCHITECTURE="mlp"), dict(ARCHITECTURE="vsml"), dict(ARCHITECTURE="vsml_free")]


def numbers(tensor, *_, **__):
    """Stand in for the values of a pretended tensor, which has a shape, a type and a device."""
    return np.ones(tuple(tensor.shape), np.float32 if tensor.is_floating_point() else np.int64)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Make "cuda" tensors without values. An operation that mixes devices raises."""
    monkeypatch.setattr(gpicl, "stream", lambda device, *key: None)      # generators need a GPU
    for name in ("numpy", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, numbers)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: numbers(self).item())
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: numbers(self).tolist())
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: False)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False,
                        raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with FakeTensorMode():
        try:
            torch.ones(2, device="cuda").uniform_() + 1
        except RuntimeError as error:
            pytest.skip(f"this build of torch can't pretend to have a GPU: {error}")
        yield


# Not the LSTM, which asks for cuDNN's version, nor MAML, whose forward pass differentiates.
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: str(changes or "default"))
def test_training_and_testing_mix_no_devices(pretended_gpu, monkeypatch, tiny, changes, precision):
    settings = tiny(AVERAGED_PASSES=2, **changes)
    dataset = gpicl.Dataset("blobs", torch.randn(80, 40, device="cuda"),
                            torch.ones(80, dtype=torch.long, device="cuda"), 10)
    with torch.device("cuda"):
        model = gpicl.make_model(settings)

    def backward(loss):                                  # autograd needs a GPU
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    optimizers = gpicl.make_optimizers(model, settings, precision)
    for step in range(2):
        x, y = gpicl.training_batch(dataset, step, settings, precision)
        assert x.device.type == y.device.type == "cuda"
        gpicl.update(model, optimizers, x, y, step, settings, precision)
    curves, _ = gpicl.evaluate(model, dataset, settings, precision)
    assert "mean of 2 passes" in curves and set(gpicl.CLASSICAL) < set(curves)


def test_a_pretended_gpu_notices_mixed_devices(pretended_gpu):
    x = torch.ones(1, 5, 5, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        gpicl.ridge_weights(x, 1, gpicl.causal_mask(5, 1, "cpu"))


@pytest.mark.skipif(not (torch.cuda.is_available() or torch.backends.mps.is_available()),
                    reason="needs a GPU")
def test_a_step_on_a_gpu_is_the_step_on_the_cpu(tiny, blobs):
    device = gpicl.choose_device("auto")[0]
    assert device.type != "cpu"
    losses, weights = [], []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        settings = tiny(LEARNING_RATE=1e-3)
        model = gpicl.make_model(settings).to(place)
        optimizers = gpicl.make_optimizers(model, settings, "fp32")
        for step in range(3):                            # the random numbers differ by device
            x, y = gpicl.training_batch(blobs, step, settings, "fp32")
            loss = gpicl.update(model, optimizers, x.to(place), y.to(place), step, settings, "fp32")
        losses.append(loss)
        weights.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(weights[1], weights[0], atol=1e-3, rtol=1e-2)
    curves, _ = gpicl.evaluate(model, blobs._replace(x=blobs.x.to(device), y=blobs.y.to(device)),
                               settings, "fp32")
    assert len(curves["Transformer"]["accuracy"]) == settings.NUM_EXAMPLES
