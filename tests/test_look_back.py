"""What lets the paper's token leave its plateau: looking back, copying, comparing, smeared keys."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import gpicl

from experiments import look_back


@pytest.fixture
def start(tiny):
    """Return a function that makes a new model of a class in look_back.py."""
    def make(name):
        torch.manual_seed(0)
        return gpicl.make_model(tiny(MODEL=f"experiments.look_back:{name}", TOKEN_FORMAT="paper",
                                     IMAGE_QUERIES=False, MODEL_SIZE=128))
    return make


def test_layer_1_starts_by_looking_one_token_back(tiny):
    attention = look_back.LookBackAttention(tiny(IMAGE_QUERIES=False), first=True)
    q = k = torch.zeros(1, 2, 5, 16)
    weights = attention.scores(q, k, gpicl.causal_mask(5, "cpu")).softmax(-1)[0, 0]
    assert weights.argmax(-1).tolist() == [0, 0, 1, 2, 3] and weights.amax(-1).min() > 0.99
    later = look_back.LookBackAttention(tiny(IMAGE_QUERIES=False), first=False)
    assert later.back is None


def test_queries_after_one_context_look_at_its_last_token(tiny):
    """Two queries, apart from each other, after three examples."""
    mask = torch.tensor([[0, 0, 0, 0, -math.inf], [0, 0, 0, -math.inf, 0]])
    attention = look_back.LookBackAttention(tiny(IMAGE_QUERIES=False), first=True)
    scores = attention.scores(torch.zeros(1, 2, 2, 16), torch.zeros(1, 2, 5, 16), mask)
    assert scores.argmax(-1).unique().tolist() == [2]


@torch.no_grad()
def test_layer_1_starts_by_adding_the_image_before_to_the_other_half(start):
    """It adds next to nothing else: the half that holds the token's own image stays."""
    model, x = start("CopyingTransformer"), torch.randn(2, 12, 32)
    mask = gpicl.causal_mask(12, "cpu")
    own, before = model.embed_image(x).chunk(2, -1)
    assert own.abs().min() > 0 == before.abs().max()
    added = model.layers[0].mixer(gpicl.norm(model.embed_image(x)), x, None, mask)
    same, copied = added.chunk(2, -1)
    assert same.abs().max() == 0
    assert F.cosine_similarity(copied[:, 1:], own[:, :-1], dim=-1).min() > 0.97


@torch.no_grad()
def test_layer_2_starts_by_comparing_the_image_with_those_before_the_labels(start):
    """Image 7 is image 3 again: its token looks for token 4, which holds the label of image 3."""
    model, x = start("ComparingTransformer"), torch.randn(2, 12, 32)
    mask = gpicl.causal_mask(12, "cpu")
    x[:, 7] = x[:, 3]
    h = model.embed_image(x)
    h = gpicl.norm(h + model.layers[0].mixer(gpicl.norm(h), x, None, mask))
    attention = model.layers[1].mixer
    q, k = (F.normalize(part.unflatten(-1, (2, -1)), dim=-1).transpose(1, 2)
            for part in (attention.query(h), attention.key(h)))
    cosines = (q @ k.mT)[:, :, 7]
    assert cosines[..., :8].argmax(-1).unique().tolist() == [4] and cosines[..., 4].min() > 0.95


@torch.no_grad()
def test_a_smeared_key_is_mostly_that_of_the_token_before(tiny):
    attention = look_back.SmearedAttention(tiny(IMAGE_QUERIES=False), first=False)
    q, k, mask = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), gpicl.causal_mask(5, "cpu")
    scale, share = attention.log_scale.exp()[:, None, None] / 16, 1 / (1 + math.exp(-3))
    before = torch.cat([torch.zeros(1, 2, 1, 16), k[:, :, :-1]], 2)
    expected = scale * (q @ (share * before + (1 - share) * k).mT) + mask
    assert torch.allclose(attention.scores(q, k, mask), expected, atol=1e-5) and 0.94 < share < 0.96


@torch.no_grad()
def test_layers_1_and_2_start_by_comparing_images_through_smeared_keys(start):
    """Image 7 is image 3 again: its token looks for token 4, which holds the label of image 3."""
    model, x = start("SmearedComparingTransformer"), torch.randn(2, 12, 32)
    x[:, 7] = x[:, 3]
    h, mask = gpicl.norm(model.embed_image(x)), gpicl.causal_mask(12, "cpu")
    for layer in model.layers[:2]:
        attention = layer.mixer
        q, k = (gpicl.norm(part.unflatten(-1, (2, -1))).transpose(1, 2)
                for part in (attention.query(h), attention.key(h)))
        scores = attention.scores(q, k, mask)[:, :, 7]
        assert scores.argmax(-1).unique().tolist() == [4]
        assert torch.allclose(attention.log_scale.exp(), torch.tensor([8.0, 16.0]))


@pytest.mark.parametrize("flag", ["TOKEN_FORMAT=pairs", "IMAGE_QUERIES=True", "NUM_LAYERS=1",
                                  "MODEL_SIZE=8"])
@pytest.mark.parametrize("name", ["ComparingTransformer", "SmearedComparingTransformer"])
def test_settings_that_it_is_not_made_for(tiny_flags, capsys, name, flag):
    model = f"--MODEL=experiments.look_back:{name}"
    assert gpicl.main(["paper", *tiny_flags(), model, f"--{flag}"]) == 2
    assert f"{name} starts for the paper's token; set" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["LookBackTransformer", "CopyingTransformer",
                                  "ComparingTransformer", "MuonLookBackTransformer",
                                  "SmearedTransformer", "SmearedComparingTransformer"])
def test_each_is_causal_and_all_of_it_is_learnt(start, name):
    model = start(name)
    for parameter in model.parameters():                 # so that every path counts
        if parameter.ndim == 2 and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter)
    x, y = torch.randn(2, 12, 32), torch.randint(10, (2, 12))
    changed = y.clone()
    changed[:, 6:] = (y[:, 6:] + 1) % 10
    difference = (model(x, y) - model(x, changed)).abs().amax((0, 2))
    assert difference[:7].max() == 0 < difference[7]
    model(x, y).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
