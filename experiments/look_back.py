"""The paper's Transformer, from a start that finds the image to which a token's label belongs.

    python gpicl_minimal_replication.py paper            # from the last of these starts

Token i of the paper holds image x_i and label y_i-1. So one layer must learn to look one token back
for the image of that label, and a later one to compare images; neither lowers the loss without the
other, which is the plateau. Each class here adds to the start of the one before. All is learnt,
nothing is tied, and no label is moved beside its image.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import gpicl_minimal_replication as gpicl
from experiments.muon import WithMuon


class LookBackAttention(gpicl.Attention):
    """Attention with a learnt bias per head for the token before, in layer 1; 10 at first."""

    def __init__(self, settings, first):
        super().__init__(settings, first)
        self.back = nn.Parameter(torch.full((self.heads, 1, 1), 10.0)) if first else None

    def scores(self, q, k, mask):
        scores = super().scores(q, k, mask)
        if self.back is not None:
            before = (mask == 0).sum(-1) - 1            # the first sees itself only, biased or not
            scores = scores + self.back * F.one_hot((before - 1).clamp(min=0), mask.shape[1])
        return scores


class LookBackTransformer(gpicl.Transformer):
    """Layer 1 starts by looking one token back."""
    mixer = LookBackAttention


class CopyingTransformer(LookBackTransformer):
    """And by adding the image that it finds there to a half of the stream that is kept for it.

    Raises UserError for settings that this start is not made for.
    """

    def __init__(self, settings):
        super().__init__(settings)
        if settings.TOKEN_FORMAT != "paper" or settings.IMAGE_QUERIES or settings.NUM_LAYERS < 2:
            raise gpicl.UserError(f"{type(self).__name__} starts for the paper's token; set TOKEN_"
                                  "FORMAT=paper, IMAGE_QUERIES=False, and NUM_LAYERS to 2 or more.")
        half, attention = settings.MODEL_SIZE // 2, self.layers[0].mixer
        with torch.no_grad():
            self.embed_image.weight[half:] = 0
            nn.init.eye_(attention.value.weight)
            attention.out.weight.zero_()
            attention.out.weight[half:, :half] = torch.eye(half)


class ComparingTransformer(CopyingTransformer):
    """And layer 2 by comparing: its W_K is a copy of its orthogonal W_Q, but reads the copied
    images, x_j-1, where W_Q reads x_i; its heads start with scales from 8 to 16.
    """

    def __init__(self, settings):
        super().__init__(settings)
        half, attention = settings.MODEL_SIZE // 2, self.layers[1].mixer
        with torch.no_grad():
            # The gain as in gpicl.Attention: norm() undoes it; Adam's steps are small beside it.
            nn.init.orthogonal_(attention.query.weight[:, :half], gain=settings.MODEL_SIZE**0.5)
            attention.query.weight[:, half:] = 0
            attention.key.weight[:] = attention.query.weight.roll(half, 1)
            attention.log_scale[:] = torch.linspace(math.log(8), math.log(16), attention.heads)


class MuonLookBackTransformer(WithMuon, LookBackTransformer):
    """Layer 1 starts by looking one token back; trained with Muon."""
