"""The other architectures, each against an independent reference, and their experiment."""

import math

import pytest
import torch
from conftest import gpicl, lively_model, train
from matplotlib.figure import Figure
from test_sweep import read_csv, sweep_flags

from experiments import architectures, recurrent, sweep

OWN, TRANSFORMER = architectures.OWN, next(iter(architectures.LABELS))
WITH_A_STATE = [f"{OWN}{name}" for name in (
    "LSTMModel", "OuterProductLSTMModel", "DeltaNetModel", "VSML", "VSMLAsymmetric")]


# ---------------------------------------------------------------------------------------- all alike
@pytest.mark.parametrize("name", [*WITH_A_STATE, f"{OWN}MLPModel"])
@pytest.mark.parametrize("token", ["pairs", "paper"])
def test_causality(name, token, tiny):
    """Changing example j, or label j, changes no prediction before j, nor that of label j."""
    model = lively_model(tiny(MODEL=name, TOKEN_FORMAT=token))
    x, y = torch.randn(3, 12, 32), torch.randint(10, (3, 12))
    logits = model(x, y)
    assert logits.shape == (3, 12, 10)
    for j in range(12):
        other_x, other_y = x.clone(), y.clone()
        other_x[:, j:], other_y[:, j:] = torch.randn_like(x[:, j:]), 9 - y[:, j:]
        assert torch.allclose(model(other_x, y)[:, :j], logits[:, :j], atol=1e-5)
        assert torch.allclose(model(x, other_y)[:, :j + 1], logits[:, :j + 1], atol=1e-5)


@pytest.mark.parametrize("name", WITH_A_STATE)
def test_the_first_example_is_still_known_at_the_end(name, tiny):
    model = lively_model(tiny(MODEL=name))
    x, y = torch.randn(3, 12, 32), torch.randint(10, (3, 12))
    other = y.clone()
    other[:, 0] = 9 - y[:, 0]
    assert (model(x, other)[:, -1] - model(x, y)[:, -1]).abs().max() > 1e-5


@pytest.mark.parametrize("name", [*WITH_A_STATE, f"{OWN}MLPModel"])
def test_every_parameter_gets_a_gradient_and_has_one_optimizer(name, tiny, blobs):
    settings = tiny(MODEL=name)
    model = lively_model(settings)
    x, y = gpicl.draw_sequences(blobs, 8, settings, ("gradient",))
    loss = torch.nn.functional.cross_entropy(model(x, y).flatten(0, 1), y.flatten())
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    held = [id(p) for optimizer in gpicl.make_optimizers(model, settings, "fp32")
            for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_the_mlp_sees_only_its_own_token(tiny):
    model = lively_model(tiny(MODEL=f"{OWN}MLPModel", TOKEN_FORMAT="paper"))
    x, y = torch.randn(3, 12, 32), torch.randint(10, (3, 12))
    other_x, other_y = x.clone(), y.clone()
    other_x[:, :6], other_y[:, :5] = 0, 9 - y[:, :5]
    assert torch.allclose(model(other_x, other_y)[:, 6:], model(x, y)[:, 6:], atol=1e-5)


def test_a_model_with_a_state_refuses_a_cache(tiny):
    x, y = torch.randn(1, 5, 32), torch.zeros(1, 5, 10)
    with pytest.raises(gpicl.UserError, match="LSTMModel"):
        gpicl.make_model(tiny(MODEL=f"{OWN}LSTMModel")).predict(
            x, x, y, gpicl.causal_mask(5, "cpu"), lambda owner, *tensors: tensors)


# -------------------------------------------------------------------------------------------- LSTMs
def test_outer_product_lstm_equals_a_plain_loop(tiny):
    layer, x = recurrent.OuterProductLSTM(tiny(), True), torch.randn(2, 6, 32)
    result = layer(x)
    for b in range(2):
        out, cells = torch.zeros(32), [torch.zeros(16, 16) for _ in range(2)]
        for t in range(6):
            z = layer.input(x[b, t]) + layer.recurrent(out)
            heads = []
            for n in range(2):
                f, i, o, k, v, q = (z[32 * part + 16 * n:32 * part + 16 * n + 16]
                                    for part in range(6))
                write = torch.outer(i.sigmoid() * v.tanh(), k.tanh())
                cells[n] = f.sigmoid()[:, None] * cells[n] + write
                heads.append(o.sigmoid() * (cells[n] @ q.tanh()))
            out = torch.cat(heads)
            assert torch.allclose(result[b, t], out, atol=1e-5)


def outputs_of_layer_1(model, x, y):
    """Return what the first layer's recurrent part gives out before anything was learnt."""
    kept = []
    model.layers[0].mixer.register_forward_hook(lambda *call: kept.append(call[2]))
    with torch.no_grad():
        model(x, y)
    return kept[0]


def test_the_lstm_starts_as_nearest_centroid(tiny, blobs):
    """For each class, the sum over its pairs of cells, the second of each with minus."""
    settings = tiny(MODEL=f"{OWN}LSTMModel", MODEL_SIZE=400, NUM_LAYERS=1, NUM_EXAMPLES=60)
    x, y = gpicl.draw_sequences(blobs, 64, settings, ("start",))
    pairs = outputs_of_layer_1(gpicl.make_model(settings), x, y).view(64, 60, 10, 20, 2)
    correct = (pairs[..., 0] - pairs[..., 1]).sum(-1).argmax(-1) == y
    assert correct[:, 40:].float().mean() > 0.7          # chance: 0.1
    assert correct[:, 0].float().mean() < 0.3


@pytest.mark.parametrize("heads", [4, 16])
def test_the_outer_product_lstm_starts_as_nearest_centroid(heads, tiny, blobs):
    """The first ten rows of each head are the classes, or, of eight rows, eight."""
    settings = tiny(MODEL=f"{OWN}OuterProductLSTMModel", MODEL_SIZE=128, NUM_HEADS=heads,
                    NUM_LAYERS=1, NUM_EXAMPLES=60)
    x, y = gpicl.draw_sequences(blobs, 64, settings, ("start",))
    rows = min(10, 128 // heads)
    outputs = outputs_of_layer_1(gpicl.make_model(settings), x, y).view(64, 60, heads, -1)
    correct = outputs[..., :rows].sum(2).argmax(-1) == y
    assert correct[:, 40:][y[:, 40:] < rows].float().mean() > 0.7        # chance: 0.1
    assert correct[:, 0].float().mean() < 0.3


# ----------------------------------------------------------------------------------- gated DeltaNet
@pytest.mark.parametrize("chunk", [1, 4, 32, 50])
def test_delta_rule_in_chunks_equals_the_recurrence(chunk):
    q, k, v = (torch.randn(2, 3, 37, 8, dtype=torch.float64, requires_grad=True)
               for _ in range(3))
    unit = torch.nn.functional.normalize(k, dim=-1)
    write, keep = torch.rand(2, 3, 37).double(), -torch.rand(2, 3, 37).double()
    state, expected = torch.zeros(2, 3, 8, 8).double(), []
    for t in range(37):
        a, b = keep[..., t, None, None].exp(), write[..., t, None, None]
        key, value = unit[..., t, :, None], v[..., t, :, None]
        state = a * state + b * (value - a * state @ key) @ key.mT
        expected.append((state @ q[..., t, :, None])[..., 0])
    expected = torch.stack(expected, -2)
    result = recurrent.delta_rule(q, unit, v, write, keep, chunk)
    assert torch.allclose(result, expected, atol=1e-9)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
                      for out in (result, expected))):
        assert torch.allclose(a, b, atol=1e-8)


def test_gated_delta_net_equals_a_plain_loop(tiny):
    layer, h = recurrent.GatedDeltaNet(tiny(), True, chunk=4), torch.randn(2, 7, 32)
    assert layer.gates.bias[2:].tolist() == [5, 5]       # at first it remembers
    torch.nn.init.normal_(layer.out.weight, std=0.2)
    torch.nn.init.normal_(layer.gates.bias)
    with torch.no_grad():
        result = layer(h)
        for b in range(2):
            states = [torch.zeros(16, 16) for _ in range(2)]
            for t in range(7):
                (q, k, v), heads = layer.qkv(h[b, t]).view(3, 2, 16), []
                write, keep = layer.gates(h[b, t]).view(2, 2).sigmoid()
                for n in range(2):
                    key, kept = k[n] / k[n].norm(), keep[n] * states[n]
                    states[n] = kept + write[n] * torch.outer(v[n] - kept @ key, key)
                    heads.append(gpicl.norm(states[n] @ (q[n] / q[n].norm())))
                assert torch.allclose(result[b, t], layer.out(torch.cat(heads)), atol=1e-4)


# --------------------------------------------------------------------------------------------- VSML
def test_vsml_is_blind_to_the_order_of_classes_and_inputs(tiny):
    x, y = torch.randn(2, 12, 32), torch.randint(10, (2, 12))
    rho, order = torch.randperm(10), torch.randperm(32)
    model = lively_model(tiny(MODEL=f"{OWN}VSML"))
    logits = model(x, y)
    assert torch.allclose(model(x, rho[y])[..., rho], logits, atol=1e-5)
    assert torch.allclose(model(x[..., order], y), logits, atol=1e-5)


def test_vsml_without_its_symmetries_starts_with_them_and_can_lose_them(tiny):
    x, y = torch.randn(2, 12, 32), torch.randint(10, (2, 12))
    rho, order = torch.randperm(10), torch.randperm(32)
    model = gpicl.make_model(tiny(MODEL=f"{OWN}VSMLAsymmetric"))
    assert torch.allclose(model(x, rho[y])[..., rho], model(x, y), atol=1e-5)
    with torch.no_grad():
        for layer in (model.read_images, model.read_labels, model.head):
            layer.weight += 0.3 * torch.randn_like(layer.weight)
    assert not torch.allclose(model(x, rho[y])[..., rho], model(x, y), atol=1e-4)
    assert not torch.allclose(model(x[..., order], y), model(x, y), atol=1e-4)


def test_vsml_is_meta_trained_on_some_of_the_numbers_and_tested_on_all(tiny):
    model = lively_model(tiny(MODEL=f"{OWN}VSML"))
    x, y = torch.randn(2, 12, 80), torch.randint(10, (2, 12))
    with torch.no_grad():
        of_all, of_some = model(x, y), model(x[..., :64], y)
    assert torch.equal(model(x, y), of_some) and not torch.allclose(of_all, of_some, atol=1e-3)


def test_vsml_equals_one_lstm_between_every_input_and_output(tiny):
    """torch's own LSTM cell, one for each pair (a, b), fed by hand."""
    model = architectures.VSML(tiny())
    x, y = torch.randn(1, 5, 4), torch.randint(10, (1, 5))
    n = model.cell_size
    cell = torch.nn.LSTMCell(4, n)                       # torch's order of gates: i, f, new, o
    order = torch.cat([torch.arange(n, 2 * n), torch.arange(n), torch.arange(3 * n, 4 * n),
                       torch.arange(2 * n, 3 * n)])
    with torch.no_grad():
        into = torch.cat([model.forward_message.weight, model.backward_message.weight], 1)
        bias = model.forward_message.bias + model.backward_message.bias
        bias = bias + torch.cat([torch.full((n,), 2.0), torch.zeros(3 * n)])     # keeps at first
        cell.weight_ih[order], cell.weight_hh[order] = into, model.recurrent.weight
        cell.bias_ih[order], cell.bias_hh[:] = bias, 0
        state = {(a, b): (torch.zeros(1, n), torch.zeros(1, n)) for a in range(4)
                 for b in range(10)}
        logits, result = torch.zeros(10), model(x, y)[0]
        for t in range(5):
            before, label = (x[0, t - 1], torch.eye(10)[y[0, t - 1]]) if t else (
                torch.zeros(4), torch.zeros(10))
            guess = logits.softmax(-1) if t else torch.zeros(10)
            for a, b in state:
                message = torch.stack([x[0, t, a], before[a], label[b], guess[b]])
                state[a, b] = cell(message[None], state[a, b])
            logits = torch.stack([sum(model.up(state[a, b][0])[0, 0] for a in range(4)) / 2
                                  for b in range(10)])
            assert torch.allclose(result[t], logits, atol=1e-5)


# --------------------------------------------------------------------------------------------- MAML
def test_maml_equals_descent_on_each_sequence_alone(tiny):
    model = architectures.MAML(tiny())
    x, y = torch.randn(3, 12, 32), torch.randint(10, (3, 12))
    with torch.no_grad():
        result = model(x, y)
    assert result[:, :-1].abs().max() == 0
    for b in range(3):
        net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(),
                                  torch.nn.Linear(32, 10))
        for parameter, start in zip(net.parameters(), (
                model.start[0].T, model.start[1][0], model.start[2].T, model.start[3][0])):
            parameter.data = start.detach().clone()
        for rates in model.log_rates.exp():
            net.zero_grad()
            torch.nn.functional.cross_entropy(net(x[b, :-1]), y[b, :-1]).backward()
            for parameter, rate in zip(net.parameters(), rates.tolist()):
                parameter.data -= rate * parameter.grad
        assert torch.allclose(result[b, -1], net(x[b, -1]), atol=1e-4)


def test_maml_differentiates_through_its_descent(tiny):
    model = architectures.MAML(tiny(MODEL_SIZE=8, PROJECTION_SIZE=4)).double()
    x, y = torch.randn(3, 12, 4).double(), torch.randint(10, (3, 12))

    def loss():
        return torch.nn.functional.cross_entropy(
            model(x, y)[:, -3:].flatten(0, 1), y[:, -3:].flatten())

    loss().backward()
    weight, ends = model.start[2], []
    direction = torch.randn_like(weight)
    for move in (1e-6, -2e-6):
        weight.data += move * direction
        ends.append(loss().item())
    slope = (ends[0] - ends[1]) / 2e-6
    assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4)


def test_maml_learns_its_start_and_its_rates(tiny, blobs):
    settings = tiny(MODEL=f"{OWN}MAML", NUM_EXAMPLES=40, STEPS=30, LEARNING_RATE=1e-2)
    model = gpicl.make_model(settings)
    before = [p.clone() for p in model.parameters()]
    logits = model(torch.randn(2, 12, 32), torch.randint(10, (2, 12)))
    assert (logits != 0).any(-1).sum(1).tolist() == [3, 3]               # the last quarter
    train(model, blobs, settings)
    for old, new in zip(before, model.parameters(), strict=True):
        assert (old != new).all(-1).any()
    correct = gpicl.count_correct(model, blobs, 256, settings, "fp32")["in-context"]
    assert correct[-1] / 256 > 0.5


# ----------------------------------------------------------------------------------- the experiment
def test_architectures_in_their_smallest_form(blobs_file, tmp_path, capsys):
    flags = sweep_flags(blobs_file, tmp_path, MODEL_SIZE=None, NUM_HEADS=None, SEEDS=1)
    assert sweep.main("architectures", flags) == 0
    rows = read_csv(tmp_path / "results" / "architectures.csv")
    assert len(rows) == len(architectures.CELLS) == 16
    assert len({row["MODEL"] for row in rows}) == 7
    assert "16 models: rank correlation with parameters" in capsys.readouterr().out


@pytest.mark.parametrize("model, expected", [
    (TRANSFORMER, 2 * 2 * 12 * 32), (f"{OWN}LSTMModel", 2 * 2 * 32),
    (f"{OWN}DeltaNetModel", 2 * 2 * 16 * 16),
    (f"{OWN}OuterProductLSTMModel", 2 * (2 * 16 * 16 + 32)), (f"{OWN}VSML", 2 * 8 * 32 * 10),
    (f"{OWN}SmallVSML", 2 * 4 * 32 * 10), (f"{OWN}VSMLAsymmetric", 2 * 8 * 32 * 32)])
def test_state_is_counted(model, expected, tiny):
    settings = tiny(MODEL=model)
    assert architectures.state_size(gpicl.make_model(settings), settings) == expected


def test_a_mark_for_each_model_whatever_its_seeds():
    rows = [dict(MODEL=model, SEED=seed, tested_on="MNIST", state=state, parameters=9 * state,
                 accuracy=state / 10)
            for model in (TRANSFORMER, f"{OWN}LSTMModel")
            for state in (1, 3) for seed in (0, 1)]
    figure = Figure()
    lines = architectures.report(rows, figure)
    assert ["10.0 ± 0.0" in line for line in lines] == [True, False, True, False, False, False]
    for panel in figure.axes:
        assert [bars[0].get_ydata().tolist() for bars in panel.containers] == [[10, 30], [10, 30]]
