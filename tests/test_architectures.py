"""The other architectures: each against an independent reference."""

import math

import pytest
import torch
from conftest import gpicl
from test_model import lively_model

SEQUENCE_MODELS = ["lstm", "outer_lstm", "deltanet", "vsml", "vsml_free"]


@pytest.mark.parametrize("architecture", [*SEQUENCE_MODELS, "mlp"])
@pytest.mark.parametrize("token", ["pairs", "paper"])
def test_causality(architecture, token, tiny):
    """Changing example j, or label j, changes no prediction before j, nor that of label j."""
    model = lively_model(tiny(ARCHITECTURE=architecture, TOKEN_FORMAT=token))
    x, y = torch.randn(3, 12, 32), torch.randint(10, (3, 12))
    logits = model(x, y)
    assert logits.shape == (3, 12, 10)
    for j in range(12):
        other_x, other_y = x.clone(), y.clone()
        other_x[:, j:], other_y[:, j:] = torch.randn_like(x[:, j:]), 9 - y[:, j:]
        assert torch.allclose(model(other_x, y)[:, :j], logits[:, :j], atol=1e-5)
        assert torch.allclose(model(x, other_y)[:, :j + 1], logits[:, :j + 1], atol=1e-5)


@pytest.mark.parametrize("architecture", SEQUENCE_MODELS)
def test_the_first_example_is_still_known_at_the_end(architecture, tiny):
    model = lively_model(tiny(ARCHITECTURE=architecture))
    x, y = torch.randn(3, 12, 32), torch.randint(10, (3, 12))
    other = y.clone()
    other[:, 0] = 9 - y[:, 0]
    assert (model(x, other)[:, -1] - model(x, y)[:, -1]).abs().max() > 1e-5


def test_the_mlp_sees_only_its_own_token(tiny):
    model = lively_model(tiny(ARCHITECTURE="mlp", TOKEN_FORMAT="paper"))
    x, y = torch.randn(3, 12, 32), torch.randint(10, (3, 12))
    other_x, other_y = x.clone(), y.clone()
    other_x[:, :6], other_y[:, :5] = 0, 9 - y[:, :5]
    assert torch.allclose(model(other_x, other_y)[:, 6:], model(x, y)[:, 6:], atol=1e-5)


def test_lstm_equals_its_equations(tiny):
    torch.manual_seed(0)
    layer, x = gpicl.LSTM(tiny(), True), torch.randn(2, 7, 32)
    w = {name.removesuffix("_l0"): value for name, value in layer.lstm.named_parameters()}
    h = c = torch.zeros(2, 32)
    for t in range(7):
        z = x[:, t] @ w["weight_ih"].T + w["bias_ih"] + h @ w["weight_hh"].T + w["bias_hh"]
        i, f, g, o = z.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        assert torch.allclose(layer(x, None)[:, t], h, atol=1e-5)
    settings = tiny(ARCHITECTURE="lstm", NUM_LAYERS=3)
    assert gpicl.state_size(settings, 7) == 3 * (h[0].numel() + c[0].numel())


def test_guided_lstm_starts_as_nearest_centroid(tiny, blobs):
    """Untrained: for each class, the sum over its pairs of cells, the second of each with minus."""
    torch.manual_seed(0)
    settings = tiny(ARCHITECTURE="lstm", MODEL_SIZE=400, NUM_LAYERS=1, NUM_EXAMPLES=60)
    model = gpicl.make_model(settings)
    x, y = gpicl.draw_sequences(blobs, 64, settings, ("guided",))
    kept = []
    model.layers[0].attention.lstm.register_forward_hook(lambda *call: kept.append(call[2][0]))
    with torch.no_grad():
        model(x, y)
    pairs = kept[0].view(64, 60, 10, 20, 2)
    right = (pairs[..., 0] - pairs[..., 1]).sum(-1).argmax(-1) == y
    assert right[:, 40:].float().mean() > 0.7            # chance: 0.1
    assert right[:, 0].float().mean() < 0.3


@pytest.mark.parametrize("heads", [4, 16])
def test_guided_outer_product_lstm_starts_as_nearest_centroid(heads, tiny, blobs):
    """Untrained: the first ten rows of each head are the classes, or, of eight rows, eight."""
    torch.manual_seed(0)
    settings = tiny(ARCHITECTURE="outer_lstm", MODEL_SIZE=128, NUM_HEADS=heads, NUM_LAYERS=1,
                    NUM_EXAMPLES=60)
    model = gpicl.make_model(settings)
    x, y = gpicl.draw_sequences(blobs, 64, settings, ("guided",))
    kept = []
    model.layers[0].attention.register_forward_hook(lambda *call: kept.append(call[2]))
    with torch.no_grad():
        model(x, y)
    rows = min(10, 128 // heads)
    right = kept[0].view(64, 60, heads, -1)[..., :rows].sum(2).argmax(-1) == y
    assert right[:, 40:][y[:, 40:] < rows].float().mean() > 0.7          # chance: 0.1
    assert right[:, 0].float().mean() < 0.3


def test_outer_product_lstm_equals_a_plain_loop(tiny):
    torch.manual_seed(0)
    layer, x = gpicl.OuterProductLSTM(tiny(), True), torch.randn(2, 6, 32)
    found = layer(x, None)
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
            assert torch.allclose(found[b, t], out, atol=1e-5)
    settings = tiny(ARCHITECTURE="outer_lstm", NUM_LAYERS=1)
    assert gpicl.state_size(settings, 6) == out.numel() + sum(cell.numel() for cell in cells)


@pytest.mark.parametrize("chunk", [1, 4, 32, 50])
def test_delta_rule_in_chunks_equals_the_recurrence(chunk):
    torch.manual_seed(0)
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
    found = gpicl.delta_rule(q, unit, v, write, keep, chunk)
    assert torch.allclose(found, expected, atol=1e-9)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
                      for out in (found, expected))):
        assert torch.allclose(a, b, atol=1e-8)
    settings = gpicl.default_settings(ARCHITECTURE="deltanet", MODEL_SIZE=24, NUM_HEADS=3)
    assert gpicl.state_size(settings, 37) == settings.NUM_LAYERS * state[0].numel()


def test_gated_delta_net_equals_a_plain_loop(tiny):
    layer, h = gpicl.GatedDeltaNet(tiny(), True, chunk=4), torch.randn(2, 7, 32)
    assert layer.gates.bias[2:].tolist() == [5, 5]       # at first it remembers
    torch.nn.init.normal_(layer.out.weight, std=0.2)
    torch.nn.init.normal_(layer.gates.bias)
    with torch.no_grad():
        found = layer(h, None)
        for b in range(2):
            states = [torch.zeros(16, 16) for _ in range(2)]
            for t in range(7):
                (q, k, v), heads = layer.qkv(h[b, t]).view(3, 2, 16), []
                write, keep = layer.gates(h[b, t]).view(2, 2).sigmoid()
                for n in range(2):
                    key, kept = k[n] / k[n].norm(), keep[n] * states[n]
                    states[n] = kept + write[n] * torch.outer(v[n] - kept @ key, key)
                    heads.append(gpicl.norm(states[n] @ (q[n] / q[n].norm())))
                assert torch.allclose(found[b, t], layer.out(torch.cat(heads)), atol=1e-4)


def test_vsml_carries_a_cell_and_an_output_for_every_pair(tiny):
    assert gpicl.state_size(tiny(ARCHITECTURE="vsml"), 7) == 2 * 8 * 32 * 10
    assert gpicl.state_size(tiny(ARCHITECTURE="vsml_free"), 7) == 2 * 8 * 32 * 32


def test_vsml_is_blind_to_the_order_of_classes_and_inputs(tiny):
    x, y = torch.randn(2, 12, 32), torch.randint(10, (2, 12))
    rho, order = torch.randperm(10), torch.randperm(32)
    model = lively_model(tiny(ARCHITECTURE="vsml"))
    logits = model(x, y)
    assert torch.allclose(model(x, rho[y])[..., rho], logits, atol=1e-5)
    assert torch.allclose(model(x[..., order], y), logits, atol=1e-5)
    free = lively_model(tiny(ARCHITECTURE="vsml_free", GUIDED_START=False))
    assert not torch.allclose(free(x, rho[y])[..., rho], free(x, y), atol=1e-4)
    assert not torch.allclose(free(x[..., order], y), free(x, y), atol=1e-4)
    guided = gpicl.make_model(tiny(ARCHITECTURE="vsml_free"))            # starts as one of fewer
    assert torch.allclose(guided(x, rho[y])[..., rho], guided(x, y), atol=1e-5)
    images = torch.stack([x, gpicl.shift(x, 1)], -1)
    seen = guided.into(images.flatten(2)).view(2, 12, 32, 2)
    assert torch.allclose(gpicl.shift(seen[..., 0], 1), seen[..., 1], atol=1e-6)
    assert seen.std().item() == pytest.approx(1, abs=0.2)


def test_vsml_is_meta_trained_on_some_of_the_numbers_and_tested_on_all(tiny):
    model = lively_model(tiny(ARCHITECTURE="vsml", READ_SIZE=8))
    x, y = torch.randn(2, 12, 32), torch.randint(10, (2, 12))
    with torch.no_grad():
        every, some = model(x, y), model(x[..., :8], y)
    assert torch.equal(model(x, y), some) and not torch.allclose(every, some, atol=1e-3)


def test_vsml_equals_one_lstm_between_every_input_and_output(tiny):
    """torch's own LSTM cell, one for each pair (a, b), fed by hand."""
    torch.manual_seed(0)
    model = gpicl.VSML(tiny(ARCHITECTURE="vsml", CELL_SIZE=3))
    x, y = torch.randn(1, 5, 4), torch.randint(10, (1, 5))
    n = 3
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
        logits, found = torch.zeros(10), model(x, y)[0]
        for t in range(5):
            before, label = (x[0, t - 1], torch.eye(10)[y[0, t - 1]]) if t else (
                torch.zeros(4), torch.zeros(10))
            guess = logits.softmax(-1) if t else torch.zeros(10)
            for a, b in state:
                message = torch.stack([x[0, t, a], before[a], label[b], guess[b]])
                state[a, b] = cell(message[None], state[a, b])
            logits = torch.stack([sum(model.up(state[a, b][0])[0, 0] for a in range(4)) / 2
                                  for b in range(10)])
            assert torch.allclose(found[t], logits, atol=1e-5)


def test_maml_equals_descent_on_each_sequence_alone(tiny):
    torch.manual_seed(0)
    model = gpicl.MAML(tiny(ARCHITECTURE="maml"))
    x, y = torch.randn(3, 12, 32), torch.randint(10, (3, 12))
    with torch.no_grad():
        found = model(x, y)
    assert found[:, :-1].abs().max() == 0
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
        assert torch.allclose(found[b, -1], net(x[b, -1]), atol=1e-4)


def test_maml_differentiates_through_its_descent(tiny):
    model = gpicl.MAML(tiny(ARCHITECTURE="maml", MODEL_SIZE=8, PROJECTION_SIZE=4)).double()
    x, y = torch.randn(3, 12, 4).double(), torch.randint(10, (3, 12))

    def loss():
        return torch.nn.functional.cross_entropy(
            model(x, y)[:, -3:].flatten(0, 1), y[:, -3:].flatten())

    loss().backward()
    weight, ends = model.start[2], []
    way = torch.randn_like(weight)
    for move in (1e-6, -2e-6):
        weight.data += move * way
        ends.append(loss().item())
    slope = (ends[0] - ends[1]) / 2e-6
    assert (weight.grad * way).sum().item() == pytest.approx(slope, rel=1e-4)


def test_maml_learns_its_start_and_its_rates(tiny, blobs):
    settings = tiny(ARCHITECTURE="maml", NUM_EXAMPLES=40, STEPS=30, LEARNING_RATE=1e-2)
    torch.manual_seed(settings.SEED)
    untrained, model = gpicl.make_model(settings), gpicl.trained_model(settings, blobs, "fp32")
    for before, after in zip(untrained.parameters(), model.parameters(), strict=True):
        assert (before != after).all(-1).any()
    hits, *_ = gpicl.count_hits(model, blobs, 256, settings, "fp32")
    assert hits["in-context"][-1] / 256 > 0.5


@pytest.mark.parametrize("architecture", [*SEQUENCE_MODELS, "mlp"])
def test_every_parameter_gets_a_gradient_and_has_one_optimizer(architecture, tiny, blobs):
    settings = tiny(ARCHITECTURE=architecture)
    model = lively_model(settings)
    x, y = gpicl.draw_sequences(blobs, 8, settings, ("gradient",))
    loss = torch.nn.functional.cross_entropy(model(x, y).flatten(0, 1), y.flatten())
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    held = [id(p) for o in gpicl.make_optimizers(model, settings, "fp32")
            for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_paper_tokens_start_by_looking_one_token_back(tiny):
    torch.manual_seed(0)
    attention = gpicl.Attention(tiny(TOKEN_FORMAT="paper", OUTPUT_STD=1.0), True)
    with torch.no_grad():
        attention.qkv.weight[64:], attention.out.weight[:] = torch.eye(32), torch.eye(32)
    for queries in (1, 3):                               # side by side, all after example 9 - 3
        h, mask = torch.randn(2, 9, 32), gpicl.causal_mask(9, queries, "cpu")
        out = attention(h, gpicl.Surroundings(queries, mask, 1.0, None, None, None))
        for i in range(1, 9):
            before = min(i, 9 - queries) - 1
            assert torch.allclose(out[:, i], h[:, before], atol=0.02)


def test_a_transformer_carries_keys_and_values(tiny):
    assert gpicl.state_size(tiny(), 7) == 2 * 7 * (32 + 32)


def test_maml_learns_from_the_last_quarter(tiny):
    model = gpicl.make_model(tiny(ARCHITECTURE="maml"))
    logits = model(torch.randn(2, 12, 32), torch.randint(10, (2, 12)))
    assert (logits != 0).any(-1).sum(1).tolist() == [3, 3]


def test_a_block_is_pre_norm_and_a_residual(tiny):
    block, x = gpicl.Block(tiny(ARCHITECTURE="mlp"), True), torch.randn(3, 5, 32)
    torch.nn.init.normal_(block.down.weight)
    assert torch.allclose(block(100 * x, None) - 100 * x, block(x, None) - x, atol=1e-2)
