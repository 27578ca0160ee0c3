"""Old weights of the former default give equal logits in experiments.guided: for this commit only."""

import old_main_file as old
import pytest
import torch

import gpicl_minimal_replication as gpicl
from experiments import guided


def converted(state):
    """Return an old state dict with the new names."""
    new = {}
    for name, value in state.items():
        name = name.replace(".attention.", ".mixer.").replace(".mixture", ".similarity_bias")
        if name.endswith(".qkv.weight"):
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                new[name.replace("qkv", part)] = rows.clone()
        else:
            new[name] = value[..., 0, 0] if name.endswith(".ridge") else value
    return new


@pytest.mark.parametrize("length, changes", [(100, {}), (260, {}), (30, dict(NUM_HEADS=8))])
@pytest.mark.parametrize("ridge", [True, False])
def test_equal_logits(ridge, length, changes):
    torch.manual_seed(0)
    before = old.InContextModel(
        old.default_settings(PROJECTION_SIZE=784, RIDGE_ATTENTION=ridge, **changes))
    for p in before.parameters():
        p.data += p.std().nan_to_num(1).clamp(min=0.15) * torch.randn_like(p)
    kind = guided.GuidedTransformer if ridge else guided.GuidedWithoutRidge
    after = kind(gpicl.default_settings(**changes))
    after.load_state_dict(converted(before.state_dict()))
    x, y = torch.randn(2, length, 784) + 0.5 * torch.randn(2, 1, 784), torch.randint(10, (2, length))
    with torch.no_grad():
        torch.testing.assert_close(after(x, y), before(x, y), atol=1e-4, rtol=1e-4)
