"""The Transformer: what a token holds, causality, attention against a plain loop."""

import math

import pytest
import torch
from conftest import gpicl

FORMATS = [dict(TOKEN_FORMAT="pairs"), dict(TOKEN_FORMAT="pairs", RIDGE_ATTENTION=False),
           dict(TOKEN_FORMAT="pairs", COMPARE_IMAGES=False),
           dict(TOKEN_FORMAT="pairs", COMPARE_IMAGES=False, RIDGE_ATTENTION=False),
           dict(TOKEN_FORMAT="paper")]


def lively_model(settings):
    """Return a model whose zero-initialised matrices are random, so that every path counts."""
    torch.manual_seed(0)
    model = gpicl.make_model(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.abs().max() == 0:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("form", FORMATS)
def test_causality(form, tiny):
    """Changing example j, or label j, changes no prediction before j, nor that of label j."""
    settings = tiny(**form)
    model = lively_model(settings)
    x, y = torch.randn(3, 12, 32), torch.randint(10, (3, 12))
    logits = model(x, y)
    for j in range(12):
        other_x, other_y = x.clone(), y.clone()
        other_x[:, j:], other_y[:, j:] = torch.randn_like(x[:, j:]), 9 - y[:, j:]
        assert torch.allclose(model(other_x, y)[:, :j], logits[:, :j], atol=1e-5)
        assert torch.allclose(model(x, other_y)[:, :j + 1], logits[:, :j + 1], atol=1e-5)
        if j < 11:                                       # and what comes later does depend on it
            assert not torch.allclose(model(x, other_y)[:, j + 1], logits[:, j + 1], atol=1e-3)
        assert not torch.allclose(model(other_x, y)[:, j], logits[:, j], atol=1e-3)


@pytest.mark.parametrize("form", FORMATS)
def test_the_label_beside_an_example_is_the_one_before(form, tiny):
    model, seen = gpicl.InContextModel(tiny(**form)), []
    model.embed_label.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    y = torch.randint(10, (3, 12))
    model(torch.randn(3, 12, 32), y)
    assert torch.equal(seen[0][:, 1:].argmax(-1), y[:, :-1])
    assert torch.equal(seen[0][:, 1:].sum(-1), torch.ones(3, 11))
    assert seen[0][:, 0].abs().sum() == 0                # no label yet: no class at all


def test_pairs_put_the_label_beside_its_own_image(tiny):
    settings, seen = tiny(), []
    model = gpicl.InContextModel(settings)
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, y = torch.randn(2, 12, 32), torch.randint(10, (2, 12))
    model(x, y)
    label = model.embed_label(torch.nn.functional.one_hot(y, 10).float())
    stored = seen[0][:, 5] - label[:, 4]                 # token 5 holds x_5, and x_4 with y_4
    images = model.embed_image(x * 8 * 32**-0.5)         # weights of std 1/8 for any width
    assert torch.allclose(stored[:, :16], images[:, 5], atol=1e-5)
    assert torch.allclose(stored[:, 16:], images[:, 4], atol=1e-5)
    assert images.std().item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("form", FORMATS)
def test_no_label_is_unlike_every_class(form, tiny):
    model = lively_model(tiny(**form))
    x = torch.randn(1, 12, 32)
    codes = [model.embed_label(torch.eye(10)[c]) for c in range(10)]
    assert all(code.norm() > 0.1 for code in codes)      # "no label" adds nothing at all
    outputs = [model(x, torch.full((1, 12), c))[0, 1] for c in range(10)]
    assert min((a - b).abs().max() for i, a in enumerate(outputs) for b in outputs[:i]) > 1e-4


def ridge_by_loops(x, i, width=0.25, penalty=0.03):
    """What the examples before i weigh in a kernel ridge regression, one system at a time."""
    unit = torch.nn.functional.normalize(x[:i + 1].double(), dim=1)
    kernel = ((unit @ unit.T - 1) / width).exp()
    return torch.linalg.solve(kernel[:i, :i] + penalty * torch.eye(i), kernel[:i, i]).float()


def test_ridge_weights_equal_plain_systems():
    x = torch.randn(2, 9, 20)
    cosines = gpicl.image_cosines(x, 1)[2]
    found = gpicl.ridge_weights(cosines, 1, gpicl.causal_mask(9, 1, "cpu"))
    together = gpicl.ridge_weights(                      # after 6 examples each
        cosines, 3, gpicl.causal_mask(9, 3, "cpu"))
    for b in range(2):
        for i in range(9):                               # token j holds the label of example j - 1
            assert torch.allclose(found[b, i, 1:i + 1], ridge_by_loops(x[b], i), atol=1e-4)
            assert not found[b, i, 0] and not found[b, i, i + 1:].any()
        for query in (6, 7, 8):
            expected = ridge_by_loops(x[b][[0, 1, 2, 3, 4, 5, query]], 6)
            assert torch.allclose(together[b, query, 1:6], expected[:-1], atol=1e-4)
            assert torch.allclose(together[b, query, query], expected[-1], atol=1e-4)
            assert together[b, query].count_nonzero() == 6


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("first", [True, False])
def test_attention_equals_a_plain_loop(form, first, tiny):
    torch.manual_seed(0)
    attention = gpicl.Attention(tiny(**form), first)
    torch.nn.init.normal_(attention.out.weight, std=0.2)
    if attention.mixture is not None:
        torch.nn.init.normal_(attention.mixture)
    if attention.ridge is not None:
        torch.nn.init.normal_(attention.ridge)
    h, x, mask = torch.randn(2, 6, 32), torch.randn(2, 6, 32), gpicl.causal_mask(6, 1, "cpu")
    seen = x @ torch.randn(32, 2 * 256) if attention.tied else x
    cosines = gpicl.image_cosines(seen, 1)
    found = attention(h, gpicl.Surroundings(
        1, mask, 1.0, seen, cosines, gpicl.ridge_weights(cosines[2], 1, mask)))

    def unit(v):
        return v / v.norm().clamp_min(1e-6)

    def standard(v):
        return (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()

    def image(b, i):                                     # x_-1 does not exist
        return x[b, i] if i >= 0 else torch.zeros(32)

    for b in range(2):
        q, k, v = attention.qkv(h[b]).split(32, -1)
        for i in range(6):
            heads = []
            for n in range(2):
                part, scores = slice(16 * n, 16 * n + 16), []
                for j in range(i + 1):
                    query, key = q[i, part], k[j, part]
                    if attention.tied:
                        wide = slice(256 * n, 256 * n + 256)
                        query = seen[b, i, wide]
                        key = seen[b, j - 1, wide] if j else torch.zeros(256)
                    score = attention.log_scale[n].exp() * (standard(query) * standard(key)).mean()
                    if attention.mixture is not None:
                        pairs = [(i, j - 1), (i - 1, j - 1), (i, j), (i - 1, j)]
                        score = score + gpicl.MIXTURE_SCALE * sum(
                            w * (unit(image(b, a)) @ unit(image(b, c)))
                            for w, (a, c) in zip(attention.mixture[n], pairs))
                    if attention.back is not None and j == i - 1:
                        score = score + attention.back[n].item()
                    scores.append(score)
                weights = torch.stack(scores).softmax(0)
                heads.append(sum(w * v[j, part] for j, w in enumerate(weights)))
                if attention.ridge is not None:
                    heads[-1] = heads[-1] + attention.ridge[n].item() * sum(
                        w * v[j + 1, part] for j, w in enumerate(ridge_by_loops(seen[b], i)))
            expected = attention.out(torch.cat(heads))
            assert torch.allclose(found[b, i], expected, atol=1e-4)


@pytest.mark.parametrize("form", FORMATS)
def test_untrained_is_at_chance(form, tiny, blobs):
    settings = tiny(**form)
    model = lively_model(settings)
    with torch.no_grad():
        x, y = gpicl.draw_sequences(blobs, 2000, settings, ("chance",))
        right = (gpicl.logits_of(model, x, y, "fp32").argmax(-1) == y).float().mean(0)
    # lively, not trained: later positions could only be right by luck (10 % +- 5 std)
    assert (right - 0.1).abs().max() < 5 * math.sqrt(0.09 / 2000)
    loss = torch.nn.functional.cross_entropy(
        gpicl.InContextModel(settings)(x, y).flatten(0, 1), y.flatten())
    assert loss.item() == pytest.approx(math.log(10), abs=1e-4)


def test_scores_are_multiplied_by_the_sharpness(tiny):
    model, seen = gpicl.InContextModel(tiny()), []
    attention = model.layers[0].attention
    attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    x = torch.randn(1, 40, 32)
    model(x, torch.randint(10, (1, 40)))
    h, around = seen[0]
    factors = gpicl.sharpness(40, 1, 11, "cpu")          # trained on 11 examples before the last
    assert torch.allclose(around.cosines, gpicl.image_cosines(x, 1) * factors)
    torch.nn.init.eye_(attention.out.weight)
    sharper = attention(h, around._replace(sharpness=2.0))
    attention.log_scale.data += math.log(2)
    assert torch.allclose(attention(h, around._replace(sharpness=1.0)), sharper, atol=1e-5)


def test_first_weights_are_as_said(tiny):
    """Layers start with look-ups of sharpness 8 and 32, and only the first one with ridge."""
    for form in (dict(), dict(COMPARE_IMAGES=False)):
        first, later = (layer.attention for layer in gpicl.make_model(tiny(**form)).layers)
        assert (first.ridge == 1).all() and (later.ridge == 0).all()
        if form:
            assert first.tied and not later.tied
            assert first.log_scale.exp().tolist() == pytest.approx([8, 32])
            continue
        for layer, columns in ((first, (0, 0)), (later, (0, 1))):
            expected = torch.zeros(2, 4)
            expected[[0, 1], columns] = torch.tensor([8.0, 32.0])
            assert torch.allclose(gpicl.MIXTURE_SCALE * layer.mixture, expected)


def test_the_plain_preset_has_nothing_built_in():
    """No cosines, no ridge, no learnt comparison of images, no tied or backward-looking start."""
    model = gpicl.make_model(gpicl.default_settings(**gpicl.PRESETS["plain"]))
    assert model.glance is model.positions is None
    for layer in model.layers:
        attention = layer.attention
        assert attention.mixture is attention.ridge is attention.back is None
        assert not attention.tied
