"""The guided model: its ridge regression and its similarities, against plain ones."""

import math

import pytest
import torch
from conftest import gpicl, train
from sklearn.kernel_ridge import KernelRidge

from experiments import guided

GUIDED = "experiments.guided:GuidedTransformer"


def test_ridge_weights_are_those_of_scikit_learns_kernel_ridge():
    """Token j holds the label of example j - 1, and the weights of query i stand in row i."""
    x, labels, mask = torch.randn(2, 9, 20), torch.randn(2, 9, 4), gpicl.causal_mask(9, "cpu")
    cosines = guided.image_cosines(x, gpicl.previous(x), mask)
    weights = guided.ridge_weights(cosines[:, 2], mask)
    for b in range(2):
        unit = torch.nn.functional.normalize(x[b].double(), dim=1)
        assert torch.allclose(cosines[b, 2].double(), unit @ unit.T, atol=1e-5)
        assert not weights[b].triu(1).any() and not weights[b, :, 0].any()
        # (cosine - 1) / 0.25 is -2 times the squared distance of unit vectors
        reference = KernelRidge(alpha=0.03, kernel="rbf", gamma=2)
        for i in range(1, 9):
            reference.fit(unit[:i].numpy(), labels[b, :i].numpy())
            expected = torch.tensor(reference.predict(unit[i:i + 1].numpy())[0])
            result = weights[b, i, 1:i + 1] @ labels[b, :i]
            assert torch.allclose(result.double(), expected, atol=1e-3)


def test_cosines_are_of_query_and_labelled_images():
    x, mask = torch.randn(1, 6, 20), gpicl.causal_mask(6, "cpu")
    unit = torch.nn.functional.normalize(x[0], dim=1)
    before = torch.cat([torch.zeros(1, 20), unit[:-1]])  # the first token has no labelled image
    expected = [a @ b.T for a, b in ((unit, before), (before, before), (unit, unit),
                                     (before, unit))]
    result = guided.image_cosines(x, gpicl.previous(x), mask)[0]
    assert torch.allclose(result, torch.stack(expected), atol=1e-5)


def layer_outputs(attention, x, cosines_weight=1.0, ridge_weight=1.0):
    """Return (T, T): what each token gets of each, if a token's value is its own coordinate."""
    T, width = x.shape[1], attention.value.weight.shape[0]
    mask = gpicl.causal_mask(T, "cpu")
    cosines = guided.image_cosines(x, gpicl.previous(x), mask)
    ridge = guided.ridge_weights(cosines[:, 2], mask)
    with torch.no_grad():
        attention.value.weight.copy_(torch.eye(width))
        attention.out.weight.copy_(torch.eye(width))
        tokens = torch.eye(T, width // 2).repeat(1, 2)[None]             # in both heads
        out = attention(tokens, cosines_weight * cosines, ridge_weight * ridge, mask)
    return out[0].view(T, 2, -1).sum(1)[:, :T], ridge[0]


def test_layer_1_starts_as_a_look_up_of_the_nearest_neighbour(tiny):
    correct = 0
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(1, 12, 8)
        attention = guided.AttentionWithoutRidge(tiny(), first=True)
        weights, _ = layer_outputs(attention, x)
        unit = torch.nn.functional.normalize(x[0], dim=1)
        nearest = (unit[11] @ unit[:11].T).argmax().item()
        correct += weights[11].argmax().item() == nearest + 1            # beside its label
    assert correct >= 18


@pytest.mark.parametrize("first", [True, False])
def test_the_first_layer_starts_with_ridge_regression_the_others_without(first, tiny):
    attention, x = guided.GuidedAttention(tiny(), first), torch.randn(1, 12, 8)
    with_ridge, ridge = layer_outputs(attention, x)
    without, _ = layer_outputs(attention, x, ridge_weight=0.0)
    assert torch.allclose(with_ridge - without, 2 * ridge * first, atol=1e-4)    # of two heads


def test_attention_is_sharper_the_longer_the_context_beyond_the_trained_length(tiny):
    factors = guided.length_temperature(gpicl.causal_mask(40, "cpu"), tiny(NUM_EXAMPLES=12))[:, 0]
    assert factors[:12].tolist() == [1] * 12
    assert factors[39].item() == pytest.approx(math.log(39) / math.log(11))


def test_it_learns_within_a_few_steps(tiny, blobs):
    settings = tiny(MODEL=GUIDED, STEPS=40, NUM_EXAMPLES=30, BATCH_SIZE=16, LEARNING_RATE=2e-2)
    model = gpicl.make_model(settings)
    train(model, blobs, settings)
    correct = gpicl.count_correct(model, blobs, 256, settings, "fp32")["in-context"] / 256
    assert correct[-1] > 0.7 and correct[0] < 0.2


def test_only_pairs_can_be_compared(tiny_flags, fails):
    assert "TOKEN_FORMAT" in fails(["guided", *tiny_flags(TOKEN_FORMAT="paper")])
