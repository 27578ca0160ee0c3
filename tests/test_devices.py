"""The same algorithm on every device: with a GPU on it, without one on a pretended GPU."""

import numpy as np
import pytest
import torch
from conftest import gpicl
from torch._subclasses.fake_tensor import FakeTensorMode

MODELS = ["transformer", "experiments.muon:MuonTransformer", "experiments.guided:GuidedTransformer",
          "experiments.guided:GuidedWithoutRidge", "experiments.architectures:DeltaNetModel",
          "experiments.architectures:OuterProductLSTMModel", "experiments.architectures:VSML",
          "experiments.architectures:VSMLAsymmetric"]
VARIANTS = [*(dict(MODEL=model) for model in MODELS), dict(IMAGE_QUERIES=False),
            dict(TOKEN_FORMAT="paper"), dict(NUM_TASKS=4), dict(BIASED_FRACTION=0.5),
            dict(NUM_EXAMPLES=12)]


def numbers(tensor, *_, **__):
    """Stand in for the values of a pretended tensor, which has a shape, a type and a device."""
    return np.ones(tuple(tensor.shape), np.float32 if tensor.is_floating_point() else np.int64)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Make "cuda" tensors without values. An operation that mixes devices raises."""
    monkeypatch.setattr(gpicl, "random_stream", lambda device, *key: None)       # needs a GPU
    for name in ("numpy", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, numbers)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: numbers(self).item())
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: numbers(self).tolist())
    for name in ("__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: 1)
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
@pytest.mark.parametrize("changes, precision", [
    *((changes, "bf16") for changes in VARIANTS), (VARIANTS[0], "fp32"),
    (VARIANTS[2], "fp32")], ids=str)
def test_training_and_testing_mix_no_devices(pretended_gpu, monkeypatch, tiny, changes, precision):
    settings = tiny(**{**dict(NUM_EXAMPLES=5, STEPS=2, EVAL_SEQUENCES=8), **changes})
    dataset = gpicl.Dataset("blobs", torch.randn(80, 40, device="cuda"),
                            torch.ones(80, dtype=torch.long, device="cuda"), 10)
    with torch.device("cuda"):
        model = gpicl.make_model(settings)

    def backward(loss):                                  # autograd needs a GPU
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    optimizers = gpicl.make_optimizers(model, settings, precision)
    for _ in gpicl.training_steps(model, optimizers, dataset, settings, precision):
        pass
    x, y = gpicl.draw_sequences(dataset, 8, settings, ("k",), settings.NUM_TASKS, 0.5, 0.5)
    assert x.device.type == y.device.type == "cuda"
    curves = gpicl.meta_test(model, dataset, settings, precision, settings.NUM_TASKS)
    assert set(curves) == {"in-context", *gpicl.BASELINES}


def test_a_pretended_gpu_notices_mixed_devices(pretended_gpu, tiny):
    with torch.device("cuda"):
        model = gpicl.make_model(tiny())
        x, codes = torch.ones(1, 5, 32), torch.ones(1, 5, 10)
    with pytest.raises(RuntimeError, match="same device"):
        model.predict(x, x, codes, gpicl.causal_mask(5, "cpu"))


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
            x, y = gpicl.draw_sequences(blobs, 8, settings, ("train", 0, step))
            loss = gpicl.train_step(model, optimizers, x.to(place), y.to(place), step, settings,
                                    "fp32")
        losses.append(loss)
        weights.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(weights[1], weights[0], atol=1e-3, rtol=1e-2)


@pytest.mark.skipif(not (torch.cuda.is_available() or torch.backends.mps.is_available()),
                    reason="needs a GPU")
def test_a_whole_run_on_a_gpu(tiny_flags, run_folder):
    assert gpicl.main(tiny_flags(DEVICE="auto", NUM_TASKS=4)) == 0
    saved = torch.load(run_folder() / "model.pt", weights_only=True, map_location="cpu")
    assert all(weight.isfinite().all() for weight in saved["model"].values())
