"""What lets the paper's Transformer find the image to which a token's label belongs.

    python gpicl_minimal_replication.py paper            # smeared keys, from the last of the starts

Token i of the paper holds image x_i and label y_i-1. So one layer must learn to look one token back
for the image of that label, and a later one to compare images; neither lowers the loss without the
other, which is the plateau. Either layer 1 starts by looking back (each class adds to the start of
the one before), or keys are smeared, so that one layer can do both. All is learnt, nothing is tied,
and no label is moved beside its image.
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


def require_papers_token(settings):
    """Raise UserError for settings that a start is not made for."""
    gpicl.require(settings.TOKEN_FORMAT == "paper" and not settings.IMAGE_QUERIES
                  and settings.NUM_LAYERS > 1 and settings.MODEL_SIZE > gpicl.C,
                  f"{settings.MODEL} starts for the paper's token; set TOKEN_FORMAT=paper, "
                  f"IMAGE_QUERIES=False, NUM_LAYERS >= 2 and MODEL_SIZE > {gpicl.C}.")


class CopyingTransformer(LookBackTransformer):
    """And by adding the image that it finds there to a half of the stream that is kept for it."""

    def __init__(self, settings):
        super().__init__(settings)
        require_papers_token(settings)
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
        half = settings.MODEL_SIZE // 2
        start_comparing(self.layers[1].mixer, half, shift=half)


@torch.no_grad()
def start_comparing(attention, n, shift=0):
    """Let an orthogonal W_Q read the stream's first n numbers, its copy W_K those `shift` later."""
    query = attention.query.weight
    query[:, n:] = 0
    # The gain as in gpicl.Attention: norm() undoes it; Adam's steps are small beside it.
    nn.init.orthogonal_(query[:, :n], gain=len(query)**0.5)
    attention.key.weight[:] = query.roll(shift, 1)
    attention.log_scale[:] = torch.linspace(math.log(8), math.log(16), attention.heads)


class SmearedAttention(gpicl.Attention):
    """Attention with smeared keys (Olsson et al., arXiv 2209.11895): a learnt share per head of
    each key is the key of the token before; 0.95 at first. So token j, which holds label y_j-1, is
    found by its image, x_j-1.
    """

    def __init__(self, settings, first):
        super().__init__(settings, first)
        self.smear = nn.Parameter(torch.full((self.heads, 1, 1), 3.0))   # sigmoid(3) = 0.95

    def scores(self, q, k, mask):
        visible, cached = (mask == 0).sum(-1), torch.arange(k.shape[2] - q.shape[2])
        before = torch.cat([cached.to(visible), visible - 1])            # 0: there is none
        share = self.smear.sigmoid().to(k.dtype)
        k_before = F.pad(k, (0, 0, 1, 0)).index_select(2, before)
        return super().scores(q, share * k_before + (1 - share) * k, mask)


class SmearedTransformer(gpicl.Transformer):
    """Every layer has smeared keys."""
    mixer = SmearedAttention


class SmearedComparingTransformer(SmearedTransformer):
    """And the first two layers start by comparing images, which leave C numbers to the labels."""

    def __init__(self, settings):
        super().__init__(settings)
        require_papers_token(settings)
        with torch.no_grad():
            self.embed_image.weight[-gpicl.C:] = 0
            self.embed_label.weight.zero_()
            self.embed_label.weight[-gpicl.C:] = settings.MODEL_SIZE**0.5 * torch.eye(gpicl.C)
        for layer in self.layers[:2]:
            start_comparing(layer.mixer, settings.MODEL_SIZE - gpicl.C)


class MuonLookBackTransformer(WithMuon, LookBackTransformer):
    """Layer 1 starts by looking one token back; trained with Muon."""
