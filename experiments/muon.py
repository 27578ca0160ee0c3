"""Muon, an optimiser for the matrices inside the layers, and a Transformer that brings it along.

    python gpicl_minimal_replication.py plain         (MODEL=experiments.muon:MuonTransformer)
"""

import torch

import gpicl_minimal_replication as gpicl


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal before each step (Jordan et al. 2024).

    Does what torch.optim.Muon does with adjust_lr_fn="match_rms_adamw" (updates as large as
    Adam's: one rate serves both), but in the precision of the run, "bf16" or "fp32", and for all
    matrices of a shape at once: torch's, always in bf16, takes minutes a step on processors without
    such units.
    """

    def __init__(self, params, lr, precision):
        super().__init__(params, dict(lr=lr))
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    @torch.no_grad()
    def step(self, momentum=0.95):
        """Update all matrices by their gradients."""
        for group in self.param_groups:
            same_shape = {}
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"].lerp_(p.grad, 1 - momentum)
                same_shape.setdefault(p.shape, []).append((p, p.grad.lerp(mean, momentum)))
            for shape, pairs in same_shape.items():
                params, updates = zip(*pairs)
                updates = orthogonal(torch.stack(updates).to(self.dtype)).to(params[0].dtype)
                for p, update in zip(params, updates):
                    p.sub_(update, alpha=group["lr"] * 0.2 * max(shape)**0.5)


def orthogonal(matrices):
    """Return matrices (n, rows, columns), singular values made about one (Newton, Schulz)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):                                   # a quintic that starts steeply
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x.mT if tall else x


class WithMuon:
    """Makes a model bring along Muon for the matrices in its layers, and Adam for what is left."""

    def make_optimizers(self, settings, precision):
        """Return both; every parameter is in exactly one of them (see gpicl.make_optimizers)."""
        rest = dict(self.named_parameters())
        names = [name for name, p in rest.items()
                 if name.startswith("layers.") and p.ndim == 2 and min(p.shape) > gpicl.C]
        matrices = [rest.pop(name) for name in names]
        adam = torch.optim.Adam(rest.values(), settings.LEARNING_RATE,
                                betas=(0.9, settings.ADAM_BETA2), eps=settings.ADAM_EPSILON)
        return [adam, Muon(matrices, settings.LEARNING_RATE, precision)] if matrices else [adam]


class MuonTransformer(WithMuon, gpicl.Transformer):
    """The main file's Transformer, trained with Muon."""
