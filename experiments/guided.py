"""A Transformer with image similarity and least squares built into its attention.

    python gpicl_minimal_replication.py guided     (MODEL=experiments.guided:GuidedTransformer)

The default model of the main file has to learn how to compare images. This one is given the
cosines between all images and a kernel ridge regression of its values, and learns how to use them.
So the answer to "which algorithm did it learn?" is partly built in.

Where tensors are (B, T, T), the first T counts the tokens of a call, the second those that they may
look at: the same ones, or n cached tokens of a context and then the queries themselves (see
GuidedTransformer.predict).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import gpicl_minimal_replication as gpicl
from experiments.muon import WithMuon

READ_SIZE = 64               # projected numbers that a token holds; the cosines are of all numbers
BIAS_SCALE = 10.0            # makes Adam's steps fit the similarity biases
RIDGE_WIDTH = 0.25           # of the kernel exp((cosine - 1) / width)
RIDGE_PENALTY = 0.03         # added to the kernel's diagonal


def context_length(mask):
    """Return n, how many tokens were cached before the queries in mask (T, n + T), or T without."""
    rows, columns = mask.shape
    return columns - rows or columns


def beside_labels(images, mask):
    """Return (B, T, T) for images (B, T, n): the column of each image of the context, moved to the
    token that holds its label. That is the next token, and every query for the last image.
    """
    n = context_length(mask)
    last = images[..., n - 1:n].expand(-1, -1, mask.shape[1] - n)
    return torch.cat([F.pad(images[..., :n - 1], (1, 0)), last], -1)


def image_cosines(x, x_before, mask, cache=None):
    """Return (B, 4, T, T): how alike the images of token i and of token j are.

    A token holds two images, its query x_i and the labelled x_i-1, each (B, T, P). In order: query
    i with labelled j, labelled with labelled, query with query, labelled with query.
    """
    with torch.autocast(x.device.type, enabled=False):   # in bf16 near images would be alike
        rows = columns = F.normalize(x, dim=-1)
        if cache is not None:
            columns, = cache("images", rows)
        query = rows @ columns.mT
        if context_length(mask) == mask.shape[1]:
            labelled = gpicl.previous(query)             # one product less
        else:
            labelled = F.normalize(x_before, dim=-1) @ columns.mT
    return torch.stack([beside_labels(query, mask), beside_labels(labelled, mask), query, labelled],
                       1)


def ridge_weights(cosines, mask, cache=None):
    """Return (B, T, T): what token j's label weighs in a kernel ridge regression for query i, from
    the cosines (B, T, T) of query images, where `mask` (T, T) lets it look.

    w_i = (K_i + penalty)^-1 k_i, where K = exp((cosines - 1) / width), K_i = K[:i, :i] are the
    examples before i among themselves, and k_i = K[:i, i]: a least-squares look-up (the mesa-layer
    of von Oswald et al. 2023), whose weights may be negative. All i at once, from one factor
    L L' = K + penalty: L_i = L[:i, :i] is the factor of K_i + penalty, and row i of L left of the
    diagonal is r_i = L_i^-1 k_i; so w_i = r_i L_i^-1, one triangular system for all. For queries
    after a cached context, L is that of the context, and r_i takes a system of its own.
    """
    n = context_length(mask)
    with torch.autocast(cosines.device.type, enabled=False):
        kernel = ((cosines - 1) / RIDGE_WIDTH).exp()
        if n == mask.shape[1]:
            L = torch.linalg.cholesky(kernel + RIDGE_PENALTY * torch.eye(n, device=kernel.device))
            if cache is not None:
                cache("ridge", L)
            r = L.tril(-1)
        else:
            L, = cache("ridge", kernel[:, :0, :n])       # no rows: only to have the context's
            r = torch.linalg.solve_triangular(L, kernel[..., :n].mT, upper=False).mT
        weights = torch.linalg.solve_triangular(L, r, upper=False, left=False)
    return torch.where(mask == 0, beside_labels(weights, mask), 0)


def length_temperature(mask, settings):
    """Return (T, 1): what attention scores are multiplied by, log n / log trained after n examples.

    The more examples, the sharper attention must be to find the near ones. It is one up to the
    trained length, where training has found the scale.
    """
    trained = max(2, settings.NUM_EXAMPLES - 1)
    examples_before = (mask == 0).sum(-1) - 1
    return examples_before.clamp(min=trained).log()[:, None] / math.log(trained)


class GuidedAttention(gpicl.Attention):
    """Attention that adds the images' cosines to its scores, and a ridge regression to its result.

    The similarity bias of every head is a learnt mixture of the four cosines. So images are
    compared in full: the residual stream's few numbers would blur their distances. The mixtures
    start as nearest-neighbour look-ups of several sharpnesses, in the first layer between query and
    labelled images, later half of them among labelled images. Every head also adds a learnt
    multiple (at first one in layer 1, zero in others) of a kernel ridge regression of its values.
    """
    has_ridge = True

    def __init__(self, settings, first):
        super().__init__(settings, first=False)          # queries and keys of the stream
        self.settings = settings
        start = torch.zeros(self.heads, 4)               # sharpnesses of 8 ... 32
        for head in range(self.heads):
            start[head, 0 if first else head % 2] = 8 * 4 ** (head / max(1, self.heads - 1))
        self.similarity_bias = nn.Parameter(start / BIAS_SCALE)
        if self.has_ridge:
            self.ridge = nn.Parameter(torch.full((self.heads, 1), float(first)))

    def forward(self, h, cosines, ridge, mask, cache=None):
        """Return (B, T, D) for the stream h (B, T, D), cosines (B, 4, T, T), ridge (B, T, T)."""
        q, k, v = (part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)   # (B, H, T, D / H)
                   for part in (self.query, self.key, self.value))
        k = gpicl.norm(k).to(v.dtype)
        if cache is not None:
            k, v = cache(self, k, v)
        scale = (self.log_scale.exp() / q.shape[-1])[:, None, None]
        q = gpicl.norm(q) * (scale * length_temperature(mask, self.settings))
        scores = q.to(v.dtype) @ k.mT + mask
        # Sums in fp32, since bf16 would round a score of 32 to a multiple of 1/4.
        with torch.autocast(h.device.type, enabled=False):
            similarity_bias = BIAS_SCALE * self.similarity_bias
            scores = scores + torch.einsum("hs,bsij->bhij", similarity_bias, cosines)
        mixed = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
        if self.has_ridge:
            values = v.transpose(1, 2)                   # (B, T, H, D / H): of all heads at once
            regression = ridge.to(v.dtype) @ values.flatten(2)
            mixed = mixed + self.ridge * regression.view(mixed.shape)
        return self.out(mixed.flatten(2))


class AttentionWithoutRidge(GuidedAttention):
    """Attention that adds the images' cosines to its scores, and no more."""
    has_ridge = False


class GuidedTransformer(WithMuon, gpicl.Transformer):
    """Transformer on pairs that is given the cosines between images and the ridge regression.

    Its tokens hold the first READ_SIZE projected numbers of both images, and the label.
    Raises UserError for another TOKEN_FORMAT. IMAGE_QUERIES does not matter.
    """
    mixer = GuidedAttention

    def __init__(self, settings):
        if settings.TOKEN_FORMAT != "pairs":
            raise gpicl.UserError(f"TOKEN_FORMAT={settings.TOKEN_FORMAT}: {type(self).__name__} "
                                  "compares images of pairs; set TOKEN_FORMAT=pairs.")
        super().__init__(settings)
        self.embed_image = nn.Linear(min(READ_SIZE, settings.PROJECTION_SIZE),
                                     settings.MODEL_SIZE // 2, bias=False)
        nn.init.normal_(self.embed_image.weight, std=1 / 8)              # see predict

    def predict(self, x, x_before, y_before, mask, cache=None):
        """Return logits (B, T, C) for tokens as in Transformer.predict.

        `cache(owner, *tensors)` keeps what a first call with the context's tokens computes. Later
        calls ask about any number of queries after it: their tokens hold the last example of the
        context, and mask (T, n + T) lets each see the context and itself.
        """
        inputs = self.embed_image.in_features
        image, image_before = (self.embed_image(a[..., :inputs] * (8 * inputs**-0.5))
                               for a in (x, x_before))
        h = self.embed_label(y_before) + torch.cat([image, image_before], -1)
        cosines = image_cosines(x, x_before, mask, cache)
        ridge = ridge_weights(cosines[:, 2], mask, cache) if self.mixer.has_ridge else None
        cosines = cosines * length_temperature(mask, self.settings)
        for layer in self.layers:
            h = layer(h, cosines, ridge, mask, cache)
        return self.head(gpicl.norm(h))


class GuidedWithoutRidge(GuidedTransformer):
    """The same without the ridge regression: only image similarity is built in."""
    mixer = AttentionWithoutRidge
