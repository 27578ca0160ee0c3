"""Layers that carry a state of fixed size: LSTM, outer-product LSTM, gated DeltaNet.

Each takes attention's place in gpicl.Block, called alike: h (B, T, D) to (B, T, D), causal. See
experiments/architectures.py for the models made of them.
"""

import torch
import torch.nn.functional as F
from torch import nn

import gpicl_minimal_replication as gpicl
from gpicl_minimal_replication import C


class LSTM(nn.Module):
    """Long short-term memory (Hochreiter and Schmidhuber 1997): torch's own."""

    def __init__(self, settings, first):
        super().__init__()
        self.lstm = nn.LSTM(settings.MODEL_SIZE, settings.MODEL_SIZE, batch_first=True)

    def forward(self, h, *inputs):
        with torch.autocast(h.device.type, enabled=False):               # CUDA's would be in fp16
            return self.lstm(h.float())[0]

    def hold_class_means(self, label_readout, label_nullspace):
        """Two cells for each class and direction take in the labelled image along that direction,
        and let out through the query's place, one with each sign: the differences of a class's
        pairs add up to how like it the query is. Cells that are left over stay as they are.
        """
        D, half = label_readout.shape[1], len(label_nullspace)
        directions = D // (2 * C) if half > 2 * C else 0
        image = F.normalize(torch.randn(directions, half) @ label_nullspace, dim=1)
        image = image.repeat_interleave(2, 0).repeat(C, 1)
        n, label = 2 * C * directions, label_readout.repeat_interleave(2 * directions, 0)
        sign = torch.tensor([1.0, -1.0]).repeat(n // 2)[:, None]
        for parameter in self.lstm.parameters():
            parameter.view(4, D, -1)[:, :n] = 0
        weights, biases = self.lstm.weight_ih_l0.view(4, D, D), self.lstm.bias_ih_l0.view(4, D)
        weights[0, :n], biases[0, :n] = 22 * label, -8   # input gate, forget gate, cell, output
        weights[1, :n], biases[1, :n] = -9.5 * label, 8
        weights[2, :n, half:], weights[3, :n, :half] = image, 2 * sign * image


class OuterProductLSTM(nn.Module):
    """An LSTM whose cell is a matrix per head, written to by outer products: fast weights.

    C_t = f * C_t-1 + (i * tanh v) (tanh k)',  h_t = o * C_t tanh q, each of f, i, o, v, k, q linear
    in the input and in h_t-1; f, i and o through a sigmoid (as in the paper).
    """

    def __init__(self, settings, first):
        super().__init__()
        self.size, self.heads = settings.MODEL_SIZE, settings.NUM_HEADS
        self.input = nn.Linear(self.size, 6 * self.size)
        self.recurrent = nn.Linear(self.size, 6 * self.size, bias=False)
        nn.init.constant_(self.input.bias[:self.size], 2.0)              # at first it remembers

    def forward(self, h, *inputs):
        B, T, D = h.shape
        out, width, outputs = torch.zeros_like(h[:, 0]), D // self.heads, []
        cell = h.new_zeros(B, self.heads, width, width)
        for step in self.input(h).unbind(1):
            gates = (step + self.recurrent(out)).view(B, 6, self.heads, width, 1)
            f, i, o = gates[:, :3].sigmoid().unbind(1)
            k, v, q = gates[:, 3:].tanh().unbind(1)
            cell = f * cell + (i * v) @ k.mT
            out = (o * (cell @ q)).reshape(B, D)
            outputs.append(out)
        return torch.stack(outputs, 1)

    def hold_class_means(self, label_readout, label_nullspace):
        """Each head's cell has a row for each class (while there are rows): the labelled image is
        its key, and the query's, along the same directions, reads it.
        """
        nn.init.zeros_(self.recurrent.weight)
        half = len(label_nullspace)
        weights = self.input.weight.zero_().view(6, self.heads, -1, self.size)
        biases = self.input.bias.zero_().view(6, self.heads, -1)         # f, i, o, k, v, q
        image = F.normalize(torch.randn(self.size, half) @ label_nullspace, dim=1)
        image = image.view(self.heads, -1, half)
        for gate, slope, bias in ((0, -9.5, 8), (1, 22, -8)):
            weights[gate, :, :C] = slope * label_readout[:image.shape[1]]
            biases[gate, :, :C] = bias
        biases[2], biases[4, :, :C] = 2, 3
        weights[3, ..., half:] = weights[5, ..., :half] = image


@torch.no_grad()
def start_with_class_means(layer, embed_label):
    """Make an LSTM or OuterProductLSTM start with running means of each class: nearest centroid.

    Its input (D) is a pair token, whose label embed_label (D, C) wrote: label_readout (C, D) reads
    it, and label_nullspace (D / 2, D / 2) leaves of an image's place what no label writes to (while
    there is such). The label opens the input gates of its class's cells, and they forget a quarter.
    """
    half = len(embed_label) // 2
    label = torch.cat([embed_label[:half], embed_label[half:]], 1)       # in either image's place
    label_nullspace = torch.eye(half) - (half > 2 * C) * label @ torch.linalg.pinv(label)
    layer.hold_class_means(torch.linalg.pinv(embed_label), label_nullspace)


class GatedDeltaNet(nn.Module):
    """Linear attention that overwrites: the gated delta rule (Yang, Kautz, Hatamizadeh 2024).

    S_t = a_t S_t-1 + b_t (v_t - a_t S_t-1 k_t) k_t',  out_t = S_t q_t, with unit keys and queries.
    Evaluated in chunks: within a chunk all steps are one triangular system.
    """

    def __init__(self, settings, first, chunk=32):
        super().__init__()
        self.size, self.heads, self.chunk = settings.MODEL_SIZE, settings.NUM_HEADS, chunk
        self.qkv = nn.Linear(self.size, 3 * self.size, bias=False)
        self.gates = nn.Linear(self.size, 2 * self.heads)
        nn.init.constant_(self.gates.bias[self.heads:], 5.0)             # at first it remembers
        self.out = nn.Linear(self.size, self.size, bias=False)
        nn.init.normal_(self.out.weight, std=settings.OUTPUT_STD * self.size**-0.5)

    def forward(self, h, *inputs):
        B, T, D = h.shape
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            q, k, v = self.qkv(h).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            write, keep = self.gates(h).view(B, T, 2, self.heads).permute(2, 0, 3, 1)
            mixed = delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, write.sigmoid(),
                               F.logsigmoid(keep), self.chunk)
            return self.out(gpicl.norm(mixed).transpose(1, 2).reshape(B, T, D))


def delta_rule(q, k, v, write, log_keep, chunk):
    """Return S_t q_t (..., T, d) of the gated delta rule for q, k, v (..., T, d), gates (..., T).

    With g_t the product of a up to t, S_t = g_t S_0 + sum_s<=t (g_t / g_s) u_s k_s', where the
    writes u solve (I + L) U = b (V - g K S_0'), L_ts = b_t (g_t / g_s) k_t k_s' for s < t.
    """
    state, outputs = k.new_zeros(*k.shape[:-2], k.shape[-1], k.shape[-1]), []
    for q, k, v, b, log_g in zip(*(a.split(chunk, -2) for a in (
            q, k, v, write[..., None], log_keep[..., None]))):
        log_g = log_g.cumsum(-2)
        passed = (log_g - log_g.mT).tril().exp().tril()                  # g_t / g_s for s <= t
        lower = (b * passed * (k @ k.mT)).tril(-1)
        u = torch.linalg.solve_triangular(
            lower, b * (v - log_g.exp() * (k @ state.mT)), upper=False, unitriangular=True)
        outputs.append(log_g.exp() * (q @ state.mT) + (passed * (q @ k.mT)) @ u)
        left = (log_g[..., -1:, :] - log_g).exp()
        state = log_g[..., -1:, :].exp() * state + (left * u).mT @ k
    return torch.cat(outputs, -2)
