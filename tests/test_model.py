"""The Transformer: what a token holds, causality, attention against a plain loop, many queries."""

import functools
import math

import pytest
import torch
from conftest import gpicl, lively_model, train
from in_context_classifier import after_context

FORMS = [dict(TOKEN_FORMAT=token, IMAGE_QUERIES=of_images)
         for token in ("pairs", "paper") for of_images in (True, False)]
GUIDED = [dict(MODEL=f"experiments.guided:{name}")
          for name in ("GuidedTransformer", "GuidedWithoutRidge")]
SMEARED = [dict(MODEL="experiments.look_back:SmearedTransformer", TOKEN_FORMAT="paper",
                IMAGE_QUERIES=False)]


def form_name(form):
    return " ".join(str(value).split(":")[-1] for value in form.values())


in_every_form = pytest.mark.parametrize("form", FORMS, ids=form_name)
also_others = pytest.mark.parametrize("form", FORMS + GUIDED + SMEARED, ids=form_name)


# --------------------------------------------------------------------------------- what it can see
@also_others
def test_causality(form, tiny):
    """Changing example j, or label j, changes no prediction before j, nor that of label j."""
    model = lively_model(tiny(**form))
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


@also_others
def test_no_label_yet_is_unlike_every_class(form, tiny):
    """The first token's label is none: to make it one of a class changes what is predicted."""
    model = lively_model(tiny(**form))
    x, mask = torch.randn(1, 1, 32), gpicl.causal_mask(1, "cpu")
    codes = [torch.zeros(10), *torch.eye(10)]
    logits = torch.stack([model.predict(x, 0 * x, code.view(1, 1, 10), mask)[0, 0]
                          for code in codes])
    assert torch.equal(model(x, torch.tensor([[0]]))[0, 0], logits[0])
    assert torch.pdist(logits).min() > 1e-3              # nor is a class like another one


def tokens_of(model, x, y):
    """Return the tokens (B, T, D) that the first layer gets."""
    tokens = []
    hook = model.layers[0].register_forward_pre_hook(
        lambda module, inputs: tokens.append(inputs[0]))
    model(x, y)
    hook.remove()
    return tokens[0]


@in_every_form
def test_a_token_holds_the_label_before_and_in_pairs_its_image_too(form, tiny):
    settings = tiny(**form)
    model = gpicl.make_model(settings)
    x, y = torch.randn(1, 12, 32, requires_grad=True), torch.randint(10, (1, 12))
    tokens = tokens_of(model, x, y)
    halves = [torch.autograd.grad(half.sum(), x, retain_graph=True)[0][0].any(1).nonzero()
              .flatten().tolist() for half in tokens[0, 5].chunk(2)]     # each of which images?
    assert halves == ([[5], [4]] if settings.TOKEN_FORMAT == "pairs" else [[5], [5]])
    other = y.clone()
    other[0, 4] = 9 - y[0, 4]
    changed = (tokens_of(model, x, other) - tokens)[0].abs().amax(1)
    assert changed.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("size", [32, 784])
def test_images_and_labels_have_about_unit_size_in_the_stream(size, tiny):
    model = gpicl.make_model(tiny(PROJECTION_SIZE=size, MODEL_SIZE=128))
    tokens = tokens_of(model, torch.randn(64, 12, size), torch.randint(10, (64, 12)))
    assert 0.4 < tokens[:, 0, :64].std() < 2.5           # the first token holds its image only
    assert 0.4 < (tokens[:, 1:].std(1).mean()) < 2.5


@in_every_form
def test_sequences_may_be_longer_than_those_trained_on(form, tiny):
    model = lively_model(tiny(NUM_EXAMPLES=12, **form))
    assert model(torch.randn(1, 40, 32), torch.randint(10, (1, 40))).isfinite().all()


# ---------------------------------------------------------------------------------------- queries
@also_others
def test_many_queries_at_once_are_one_at_a_time(form, tiny):
    """The context's keys and values are kept, and seven queries asked about in parts."""
    settings, n = tiny(**form), 11
    model = lively_model(settings)
    x, y = torch.randn(2, n, 32), torch.randint(10, (2, n))
    queries, last_label = torch.randn(2, 7, 32), torch.nn.functional.one_hot(y[:, -1:], 10).float()
    expected = torch.stack([
        model(torch.cat([x, query[:, None]], 1), torch.nn.functional.pad(y, (0, 1)))[:, -1]
        for query in queries.unbind(1)], 1)
    cache = functools.partial(after_context, {})
    labels = torch.nn.functional.one_hot(y, 10).float()
    context = model.predict(x, gpicl.previous(x), gpicl.previous(labels),
                            gpicl.causal_mask(n, "cpu"), cache)
    assert torch.allclose(context, model(x, y), atol=1e-5)
    answers = []
    for part in queries.split([4, 1, 2], 1):
        q = part.shape[1]
        own = torch.full((q, q), -math.inf).fill_diagonal_(0)
        mask = torch.cat([torch.zeros(q, n), own], 1)    # the context and itself, no other query
        answers.append(model.predict(part, x[:, -1:].expand(-1, q, -1),
                                     last_label.expand(-1, q, -1), mask, cache))
    assert torch.allclose(torch.cat(answers, 1), expected, atol=1e-4)


# --------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("of_images", [True, False])
def test_attention_equals_a_plain_loop(of_images, tiny):
    attention = gpicl.Attention(tiny(IMAGE_QUERIES=of_images), first=True)
    torch.nn.init.normal_(attention.out.weight, std=0.2)
    torch.nn.init.normal_(attention.key.weight, std=0.2)
    h, x, mask = torch.randn(2, 6, 32), torch.randn(2, 6, 32), gpicl.causal_mask(6, "cpu")
    result = attention(h, x, gpicl.previous(x), mask)

    def standard(v):
        return (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()

    for b in range(2):
        before = [torch.zeros(32), *x[b, :-1]]
        for i in range(6):
            heads = []
            for n in range(2):
                width, size = (0, 16) if of_images else (16, 16)         # images: one for all heads
                scores = []
                for j in range(i + 1):
                    query = attention.query(x[b, i] if of_images else h[b, i])
                    key = attention.key(before[j] if of_images else h[b, j])
                    query, key = (v[n * width:n * width + width or None] for v in (query, key))
                    scores.append(attention.log_scale[n].exp()
                                  * (standard(query) * standard(key)).mean())
                weights = torch.stack(scores).softmax(0)
                heads.append(sum(w * attention.value(h[b, j])[n * size:n * size + size]
                                 for j, w in enumerate(weights)))
            assert torch.allclose(result[b, i], attention.out(torch.cat(heads)), atol=1e-4)


def attended(model, x, query):
    """Return the token that layer 1 attends to most from the token `query`."""
    attention, T = model.layers[0].mixer, x.shape[1]
    width = attention.value.weight.shape[0]
    with torch.no_grad():
        attention.value.weight.copy_(torch.eye(width))
        attention.out.weight.copy_(torch.eye(width))
        tokens = torch.eye(T, width)[None]               # each its own coordinate
        mixed = attention(tokens, x, gpicl.previous(x), gpicl.causal_mask(T, "cpu"))
    return mixed[0, query, :T].argmax().item()


def test_layer_1_starts_as_a_look_up_of_similar_images(tiny):
    """The token that holds the label of the image most like the query's gets most attention."""
    found = {True: 0, False: 0}
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(1, 12, 32)
        x[0, 11] = x[0, 4] + 0.3 * torch.randn(32)
        for of_images in found:
            model = gpicl.make_model(tiny(IMAGE_QUERIES=of_images))
            found[of_images] += attended(model, x, 11) == 5
    assert found[True] >= 19 and found[False] < 10


def test_keys_start_as_queries_in_layer_1_only_and_are_not_tied(tiny, blobs):
    model = gpicl.make_model(tiny())
    first, second = (layer.mixer for layer in model.layers)
    assert torch.equal(first.key.weight, first.query.weight)
    assert not torch.equal(second.key.weight, second.query.weight)
    train(model, blobs, tiny())
    assert not torch.equal(first.key.weight, first.query.weight)


def test_scales_of_the_scores_are_learnt_and_start_as_said(tiny):
    model = gpicl.make_model(tiny(ATTENTION_SCALE=16, NUM_HEADS=4))
    first, second = (layer.mixer.log_scale for layer in model.layers)
    assert first.exp().tolist() == pytest.approx([8, 8 * 4**(1 / 3), 8 * 4**(2 / 3), 32])
    assert second.exp().tolist() == pytest.approx([2, 4, 8, 16])
    assert first.requires_grad


# ------------------------------------------------------------------------------------- the start
@in_every_form
def test_untrained_is_at_chance(form, tiny, blobs):
    settings = tiny(**form)
    model = lively_model(settings)
    with torch.no_grad():
        x, y = gpicl.draw_sequences(blobs, 2000, settings, ("chance",))
        accuracy = (gpicl.compute_logits(model, x, y, "fp32").argmax(-1) == y).float().mean(0)
    # lively, not trained: later positions could only be right by luck (10 % +- 5 std)
    assert (accuracy - 0.1).abs().max() < 5 * math.sqrt(0.09 / 2000)
    loss = torch.nn.functional.cross_entropy(
        gpicl.make_model(settings)(x, y).flatten(0, 1), y.flatten())
    assert loss.item() == pytest.approx(math.log(10), abs=1e-4)


@pytest.mark.parametrize("std", [0.0, 1.0])
def test_layers_start_with_outputs_of_the_std_that_is_set(std, tiny):
    settings = tiny(OUTPUT_STD=std, MODEL_SIZE=64, MLP_SIZE=128)
    for layer in gpicl.make_model(settings).layers:
        for weight in (layer.mixer.out.weight, layer.down.weight):
            assert weight.std().item() == pytest.approx(std * weight.shape[1]**-0.5, rel=0.05)
        h, x = torch.randn(2, 5, 64), torch.randn(2, 5, 32)
        changed = layer(h, x, x, gpicl.causal_mask(5, "cpu")) - h
        assert (changed.abs().max() > 0.1) == (std > 0)


@pytest.mark.parametrize("change", [
    dict(IMAGE_QUERIES=False), dict(TOKEN_FORMAT="paper"), dict(MODEL_SIZE=64), dict(NUM_LAYERS=3),
    dict(NUM_HEADS=4), dict(MLP_SIZE=32), dict(ATTENTION_SCALE=4.0), dict(OUTPUT_STD=0.5),
    dict(PROJECTION_SIZE=20)], ids=str)
def test_every_setting_of_the_model_matters(change, tiny, blobs):
    losses = []
    for settings in (tiny(), tiny(**change)):
        torch.manual_seed(0)
        losses.append(train(gpicl.make_model(settings), blobs, settings)[-1])
    assert losses[0] != losses[1]


def test_bf16_is_nearly_fp32(tiny, blobs):
    model = lively_model(tiny())
    x, y = gpicl.draw_sequences(blobs, 8, tiny(), ("k",))
    exact, rounded = (gpicl.compute_logits(model, x, y, precision)
                      for precision in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()


# ------------------------------------------------------------------------------------ other models
def test_a_model_is_named_by_module_and_class(tiny, tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import gpicl_minimal_replication as gpicl\n\n\nclass Mine(gpicl.Transformer):\n    pass\n"
        "\n\nclass NoModel:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = gpicl.make_model(tiny(MODEL="my_models:Mine"))
    assert type(model).__name__ == "Mine" and isinstance(model, gpicl.Transformer)
    for wrong in ("my_models:None", "my_models:NoModel", "my_models", "no_module:Thing", "a:b:c",
                  "", ":", "my_models:tiny", "math:pi"):
        with pytest.raises(gpicl.UserError, match="MODEL=.*module:Class"):
            gpicl.make_model(tiny(MODEL=wrong))
