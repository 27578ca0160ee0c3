"""General-purpose in-context learning by meta-learning Transformers: a minimal replication.

Replicates Kirsch, Harrison, Sohl-Dickstein, Metz, arXiv 2212.04458 (GPICL). One labelled image set
is turned into endless tasks: every task projects the images with a random matrix A and permutes the
labels with a random permutation rho. A causal Transformer sees one task as a sequence of examples
and predicts each label from the examples before it. With enough tasks it stops memorising and
becomes a learning algorithm: its accuracy rises with the number of examples in its context, without
a gradient step, on tasks and on whole data sets that it has never seen.

    python gpicl_minimal_replication.py                    meta-train on MNIST, test, plot
    python gpicl_minimal_replication.py quick              another preset (see PRESETS)
    python gpicl_minimal_replication.py --STEPS=500        any setting (--help lists them)
    python gpicl_minimal_replication.py evaluate           test a trained model on any data

Expected: 5 minutes on two CPU cores with bf16 units, 8 without; it ends with (± 95 % intervals)
    MNIST@99: 76.2 ± 1.3           after 99 examples of unseen tasks; the paper's Transformer: 73.7
    FashionMNIST@99: 66.6 ± 1.4    of a data set that it has never seen; the paper: 62.2

In the code      in the paper
task             (A, rho): random projection, random label permutation              (Sec. 3, Alg. 1)
sequence         D = ((x_1, y_1) ... (x_T, y_T)), one data set shown in context
meta-training    minimise the loss of every prediction, averaged over tasks          (Eq. 2)
meta-test        accuracy after n examples, no weight changes                        (Sec. 4)

Dimensions: B sequences, T examples, N pixels, P projected numbers, D model size, H heads, C classes
"""

import contextlib
import csv
import ctypes
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import re
import signal
import socket
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if __name__ == "__main__":                               # Ctrl-C while torch is being imported
    signal.signal(signal.SIGINT, lambda *_: sys.exit(print("Stopped; run it again.") or 130))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ------------------------------------------------------------------------------------- settings
# Edit these, or override one for one run by a flag of the same name: --STEPS=1000.

# Run
SEED = 0                     # of tasks, initial weights and everything else that is random
DEVICE = "auto"              # auto (CUDA, then MPS, then CPU), cuda, mps or cpu
PRECISION = "auto"           # auto (bf16 where the hardware has it), bf16 or fp32
DATA_DIR = "data"            # data sets live here and are downloaded to here
OUT_DIR = "runs"             # every run gets a folder of its own in here
CHECKPOINT = "auto"          # evaluate: model.pt of a run; auto: the newest one in OUT_DIR

# Data
TRAIN_DATASET = "auto"       # torchvision's name or an .npz file; auto: MNIST, or rendered digits
EVAL_DATASETS = "auto"       # several, by commas; auto: the one trained on, and FashionMNIST
IMAGE_SIZE = 28              # images are resized to this height and width (paper: 32)
VALIDATION_IMAGES = 5000     # last training images, never trained on (of few, a quarter)

# Tasks
NUM_TASKS = 0                # number of fixed tasks; 0: a fresh task for every sequence
NUM_EXAMPLES = 100           # examples in a sequence: the last is predicted after 99
PROJECTION_SIZE = 784        # length of a projected image A x
BIASED_FRACTION = 0.0        # share of each batch with one fixed label permutation
MERGED_FRACTION = 0.2        # with fresh tasks: share with classes merged into at most 2 to 9

# Model
MODEL = "transformer"        # or the class of another model, as module:Class
TOKEN_FORMAT = "pairs"       # pairs: (A x_i, A x_i-1, y_i-1); paper: (A x_i, y_i-1)
IMAGE_QUERIES = True         # layer 1 gets queries and keys from the images; they start equal
MODEL_SIZE = 128             # width of the residual stream
NUM_LAYERS = 6               # each is attention, then an MLP
NUM_HEADS = 4                # attention heads per layer
MLP_SIZE = 512               # hidden units of each MLP
ATTENTION_SCALE = 2.0        # heads start with scales from 2 to this (of images: 8 to 32)
OUTPUT_STD = 0.0             # what writes to the stream starts with this std / sqrt(inputs)

# Meta-training and meta-test
BATCH_SIZE = 32              # sequences per step
STEPS = 1000                 # updates in all
LEARNING_RATE = 2e-3         # peak rate
WARMUP_STEPS = 50            # steps over which the rate rises from zero
DECAY_FRACTION = 0.4         # last share of the steps, over which the rate falls to zero
ADAM_BETA2 = 0.99            # decay rate of Adam's second moment
ADAM_EPSILON = 1e-8          # a small one shortens the plateau (paper)
GRADIENT_CLIP = 1.0          # largest norm of the gradient
LOG_EVERY = 250              # steps between two rows of the progress table
VALIDATION_SEQUENCES = 512   # sequences behind each row's accuracy
CHECKPOINT_SECONDS = 30.0    # between two checkpoints
EVAL_SEQUENCES = 4096        # meta-test sequences per data set
EVAL_SEED = 0                # of these sequences; they do not depend on SEED

PRESETS = {
    "default": {},
    "quick": dict(STEPS=250, LOG_EVERY=100),
    "plain": dict(MODEL="experiments.muon:MuonTransformer", IMAGE_QUERIES=False, STEPS=1500,
                  LEARNING_RATE=3e-3, PROJECTION_SIZE=384, MODEL_SIZE=512, NUM_LAYERS=3,
                  MLP_SIZE=1024, MERGED_FRACTION=0.0),   # nothing starts as a comparison of images
    "paper": dict(MODEL="experiments.look_back:SmearedComparingTransformer", TOKEN_FORMAT="paper",
                  IMAGE_QUERIES=False, STEPS=3000, LEARNING_RATE=1e-3, MODEL_SIZE=256,
                  NUM_LAYERS=4, NUM_HEADS=8, MLP_SIZE=1024, MERGED_FRACTION=0.0),
    "guided": dict(MODEL="experiments.guided:GuidedTransformer", LEARNING_RATE=5e-3, STEPS=750),
}

C = 10                                                   # classes that the model tells apart


# ---------------------------------------------------------------------------------------- tasks
class Dataset(NamedTuple):
    """One labelled data set: x (n, N) z-normalised, y (n,) in 0 .. classes - 1."""
    name: str
    x: torch.Tensor
    y: torch.Tensor
    classes: int


def random_stream(device, *key):
    """Return a random generator on `device` that depends on nothing but `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def draw_task(seed, i, n_pixels, size, device):
    """Return task number i of a fixed set: A (P, N) and rho (C,), the same at every call.

    A_ij ~ N(0, 1/N): the *variance* is 1/N, so a projected image keeps its scale (paper, Sec. 3).
    """
    generator = random_stream("cpu", seed, "task", i)    # whose numbers are the same everywhere
    projection = torch.randn(size, n_pixels, generator=generator) / n_pixels**0.5
    return projection.to(device), torch.randperm(C, generator=generator).to(device)


def random_projection(images, size, generator):
    """Return (B, T, P): images (B, T, N) under a fresh A (P, N) for each sequence.

    T images span at most T dimensions, so T coordinates are enough: a row of A turns the images X
    (T, N) into T numbers ~ N(0, X X'/N). With X X'/N = L L', so does L times T normal numbers.
    """
    coordinates = images / images.shape[2]**0.5
    if 4 * images.shape[1] <= min(640, images.shape[2]):                 # else N are as quick
        gram = coordinates @ coordinates.mT
        jitter = 1e-5 * gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)      # if images repeat
        coordinates = torch.linalg.cholesky(gram + torch.diag_embed(jitter.expand(gram.shape[:2])))
    B, _, n = coordinates.shape
    return coordinates @ torch.randn(B, n, size, generator=generator, device=images.device)


def draw_images(dataset, n_sequences, length, generator):
    """Return indices (B, T) of images: none twice within a sequence."""
    n, device = len(dataset.y), dataset.y.device
    chosen = torch.empty(n_sequences, length, dtype=torch.long, device=device)
    for part in chosen.split(n // length):               # as many as one shuffle of them fills
        part.view(-1).copy_(torch.randperm(n, generator=generator, device=device)[:part.numel()])
    return chosen


def draw_sequences(dataset, n_sequences, settings, key, num_tasks=0, biased=0.0, merged=0.0):
    """Return x (B, T, P) and y (B, T): sequences, each a task applied to its own random images.

    A pure function of its arguments: `key` names the place in the random stream. Tasks come from
    `num_tasks` fixed ones, or are fresh. The first share of the sequences, `biased`, has one rho.
    In the last share of fresh ones, `merged`, rho sends the classes at random to at most 2 to 9
    labels (not in the paper): a learner that only met ten equally frequent classes fails on three,
    or where one is rare (results/recipe.md).
    """
    device, generator = dataset.x.device, random_stream(dataset.x.device, *key)
    chosen = draw_images(dataset, n_sequences, settings.NUM_EXAMPLES, generator)
    images, labels = F.embedding(chosen, dataset.x), dataset.y[chosen]   # faster than x[chosen]
    if num_tasks:
        numbers = torch.randint(num_tasks, (n_sequences,), generator=generator, device=device)
        tasks = [draw_task(settings.SEED, i, images.shape[-1], settings.PROJECTION_SIZE, device)
                 for i in numbers.tolist()]
        x = torch.stack([image @ A.T for image, (A, _) in zip(images, tasks)])
        rho = torch.stack([permutation for _, permutation in tasks])
    else:
        x = random_projection(images, settings.PROJECTION_SIZE, generator)
        rho = torch.rand(n_sequences, C, generator=generator, device=device).argsort(1)
        if n := round(merged * n_sequences):
            classes = torch.randint(2, C, (n, 1), generator=generator, device=device)
            merged_into = torch.rand(n, C, generator=generator, device=device) * classes
            rho[-n:] = rho[-n:].gather(1, merged_into.long())
    rho[:round(biased * n_sequences)] = torch.arange(C, device=device)
    return x, rho.gather(1, labels)


# ---------------------------------------------------------------------------------------- model
def norm(x):
    """Return x (..., n) with mean zero and variance one over its last dimension, nothing learnt."""
    return F.layer_norm(x, x.shape[-1:])


def previous(x):
    """Return x (B, T, n) moved on: example i gets what belongs to the example before it.

    The first gets zeros: "no example yet" is unlike every class, whose one-hot code has a one.
    """
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def causal_mask(length, device):
    """Return (T, T): 0 where row i may look at column j <= i, minus infinity elsewhere."""
    return torch.full((length, length), -math.inf, device=device).triu(1)


class Attention(nn.Module):
    """Causal multi-head attention with normalised queries and keys and a learnt scale per head.

    With IMAGE_QUERIES, layer 1 compares images: its queries are W_Q A x_i, its keys W_K A x_i-1 (of
    the image whose label token i holds), shared by all heads. W_K starts as a copy of an orthogonal
    W_Q, so attention starts as the cosine of two images, times a scale. All is learnt, none tied.
    """

    def __init__(self, settings, first):
        super().__init__()
        size, self.heads = settings.MODEL_SIZE, settings.NUM_HEADS
        self.of_images = first and settings.IMAGE_QUERIES
        inputs, scales = size, (2, settings.ATTENTION_SCALE)
        if self.of_images:
            inputs, scales = settings.PROJECTION_SIZE, (8, 32)           # broad to sharp look-ups
        self.query = nn.Linear(inputs, inputs, bias=False)
        self.key = nn.Linear(inputs, inputs, bias=False)
        self.value = nn.Linear(size, size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        nn.init.normal_(self.out.weight, std=settings.OUTPUT_STD * size**-0.5)
        self.log_scale = nn.Parameter(torch.linspace(*map(math.log, scales), self.heads))
        if self.of_images:                               # norm() undoes the gain; Adam's steps are
            nn.init.orthogonal_(self.query.weight, gain=inputs**0.5)     # small beside it
            self.key.load_state_dict(self.query.state_dict())

    def forward(self, h, x, x_before, mask, cache=None):
        """Return (B, T, D) for the stream h (B, T, D) and the tokens' images (B, T, P).

        `cache` may put the keys and values of earlier tokens before these; mask is then wider.
        """
        q, k, heads = (x, x_before, 1) if self.of_images else (h, h, self.heads)
        q, k = (norm(part.unflatten(-1, (heads, -1))).transpose(1, 2)    # (B, H or 1, T, numbers)
                for part in (self.query(q), self.key(k)))
        v = self.value(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if cache is not None:
            k, v = cache(self, k, v)
        weights = self.scores(q.to(v.dtype), k.to(v.dtype), mask).softmax(-1).to(v.dtype)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def scores(self, q, k, mask):
        """Return (B, H, T, T): cosines, scaled. Fused kernels have slow gradients on CPUs."""
        scale = self.log_scale.exp() / q.shape[-1]
        return scale[:, None, None] * (q @ k.mT) + mask


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then an MLP, each added to the residual stream."""

    def __init__(self, mixer, settings):
        super().__init__()
        size, hidden, self.mixer = settings.MODEL_SIZE, settings.MLP_SIZE, mixer
        self.up = nn.Linear(size, hidden, bias=False)
        self.down = nn.Linear(hidden, size, bias=False)
        nn.init.normal_(self.down.weight, std=settings.OUTPUT_STD * hidden**-0.5)

    def forward(self, h, *inputs):                       # what the mixer reads beside h
        h = h + self.mixer(norm(h), *inputs)
        return h + self.down(F.gelu(self.up(norm(h))))


class Transformer(nn.Module):
    """Causal Transformer that predicts classes from the examples before.

    TOKEN_FORMAT "paper": token i is (A x_i, y_i-1), with learnt positions (paper, Sec. 3).
    "pairs": token i is (A x_i, A x_i-1, y_i-1). The label stands beside its own image, so that no
    layer has to be spent on finding "the label of the image before"; no positions are needed.
    """
    mixer = Attention                                    # what mixes the tokens of each block

    def __init__(self, settings):
        super().__init__()
        self.settings, size = settings, settings.MODEL_SIZE
        self.pairs = settings.TOKEN_FORMAT == "pairs"
        width = size // 2 if self.pairs else size        # two images share the stream
        self.embed_image = nn.Linear(settings.PROJECTION_SIZE, width, bias=False)
        self.embed_label = nn.Linear(C, size, bias=False)
        nn.init.normal_(self.embed_image.weight, std=settings.PROJECTION_SIZE**-0.5)
        nn.init.normal_(self.embed_label.weight, std=3 * C**-0.5)
        if not self.pairs:
            self.positions = nn.Parameter(0.02 * torch.randn(settings.NUM_EXAMPLES, size))
        self.layers = nn.ModuleList(Block(self.mixer(settings, first=i == 0), settings)
                                    for i in range(settings.NUM_LAYERS))
        self.head = nn.Linear(size, C, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x, y):
        """Return logits (B, T, C) for x (B, T, P) and y (B, T); those of i never use y_i."""
        y_before = previous(F.one_hot(y, C).to(x.dtype))
        return self.predict(x, previous(x), y_before, causal_mask(x.shape[1], x.device))

    def predict(self, x, x_before, y_before, mask, cache=None):
        """Return logits (B, T, C). Token i holds image x_i, and the image and one-hot label before
        it, x_before and y_before; row i of mask (T, T) is 0 where i may look, else -infinity.
        """
        h = self.embed_label(y_before)
        if self.pairs:
            h = h + torch.cat([self.embed_image(x), self.embed_image(x_before)], -1)
        else:
            examples_before = ((mask == 0).sum(-1) - 1).clamp(max=len(self.positions) - 1)
            h = h + self.embed_image(x) + self.positions[examples_before]
        for layer in self.layers:
            h = layer(h, x, x_before, mask, cache)
        return self.head(norm(h))


# --------------------------------------------------------------------------------- meta-training
def make_optimizers(model, settings, precision):
    """Return a list of optimisers: Adam (paper), or those that the model brings along."""
    if hasattr(model, "make_optimizers"):
        return model.make_optimizers(settings, precision)
    return [torch.optim.Adam(model.parameters(), settings.LEARNING_RATE,
                             betas=(0.9, settings.ADAM_BETA2), eps=settings.ADAM_EPSILON)]


def learning_rate(step, settings):
    """Return the rate of a step: linear warm-up, constant, linear decay to zero."""
    warm_up = (step + 1) / max(1, settings.WARMUP_STEPS)
    decay = (settings.STEPS - step) / max(1.0, settings.DECAY_FRACTION * settings.STEPS)
    return settings.LEARNING_RATE * min(1.0, warm_up, decay)


def compute_logits(model, x, y, precision):
    """Return logits (B, T, C) as fp32, computed in "bf16" or "fp32"."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(x, y).float()


def train_step(model, optimizers, x, y, step, settings, precision):
    """Make step number `step` on sequences x (B, T, P), y (B, T); return the loss.

    The loss is the mean cross-entropy (nats) of every prediction, so of every prefix (Eq. 2).
    Raises UserError where it or its gradient is not finite; the model stays as it was.
    """
    loss = F.cross_entropy(compute_logits(model, x, y, precision).flatten(0, 1), y.flatten())
    loss.backward()
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), settings.GRADIENT_CLIP)
    loss = loss.item()
    require(math.isfinite(loss + gradient_norm.item()),
            f"the loss or its gradient is not finite at step {step + 1}; what was saved before is "
            f"kept. Try a lower LEARNING_RATE than {settings.LEARNING_RATE:g}, or PRECISION=fp32.")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        optimizer.zero_grad()
    return loss


def training_steps(model, optimizers, dataset, settings, precision, first=0):
    """Meta-train `model` in place (paper, Alg. 1); yield the number of each step, and its loss.

    Under torchrun every process draws the whole batch and learns from its share of it.
    """
    rank, world = rank_and_world_size()
    model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    for step in range(first, settings.STEPS):
        x, y = draw_sequences(
            dataset, settings.BATCH_SIZE, settings, ("train", settings.SEED, step),
            settings.NUM_TASKS, settings.BIASED_FRACTION, settings.MERGED_FRACTION)
        loss = train_step(model, optimizers, x[rank::world], y[rank::world], step, settings,
                          precision)
        yield step + 1, loss


def meta_train(model, dataset, validation, settings, folder, precision, log):
    """Train `model` in place; return {step, seconds, rows}. Continues the folder's checkpoint.

    Raises KeyboardInterrupt after Ctrl-C or SIGTERM, leaving a checkpoint of the very last step.
    """
    first_process, path = rank_and_world_size()[0] == 0, folder / "checkpoint.pt"
    optimizers = make_optimizers(model, settings, precision)
    progress = dict(step=0, seconds=0.0, rows=[])
    if path.exists():
        saved = load_checkpoint(path)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        progress = saved["progress"]
    log(*progress_table(progress["rows"], settings))
    bar = tqdm(total=settings.STEPS, initial=progress["step"], unit="step", leave=False,
               disable=None if first_process else True)
    clock = saved_at = time.time()
    with stop_requests() as stopping, bar:
        for step, loss in training_steps(model, optimizers, dataset, settings, precision,
                                         progress["step"]):
            loss, stop = all_reduce_loss_and_stop(loss, bool(stopping), dataset.x.device)
            progress |= dict(step=step, seconds=progress["seconds"] + time.time() - clock)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            row_due = first_process and (step % settings.LOG_EVERY == 0 or step == settings.STEPS)
            if row_due:
                n = settings.VALIDATION_SEQUENCES
                correct = count_correct(model, validation, n, settings, precision)["in-context"]
                progress["rows"].append(dict(step=step, seconds=progress["seconds"], loss=loss,
                                             accuracy=(correct / n).tolist()))
            waited = time.time() > saved_at + settings.CHECKPOINT_SECONDS
            if row_due or (first_process and (stop or waited)):
                save_checkpoint(path, settings, model, progress=progress,
                                optimizers=[optimizer.state_dict() for optimizer in optimizers])
                saved_at = time.time()
            if row_due:                                  # once it is saved: printing may fail
                log(progress_table(progress["rows"], settings)[-1])
            if stop:
                raise KeyboardInterrupt(f"Stopped after step {step}; the same command goes on.")
            clock = time.time()
    return progress


# ------------------------------------------------------------------------------------- meta-test
def wilson_interval(successes, n):
    """Return the 95 % Wilson interval (low, high) of a proportion; arrays work too."""
    z, p = 1.959964, np.asarray(successes) / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return np.maximum(centre - half, 0), np.minimum(centre + half, 1)


# The baselines see what the model sees: cosines (B, n + 1, n + 1) of n examples and the query, the
# last, and one-hot labels, targets (B, n, C). They return scores (B, 1, C). Their constants, and
# that images have unit length, did best on MNIST validation images (results/recipe.md).
def nearest_neighbour(cosines, targets):
    nearest = cosines[:, -1, :-1].argmax(1)
    return F.one_hot(nearest, targets.shape[1]).float()[:, None] @ targets


def nearest_centroid(cosines, targets):
    mean = targets / targets.sum(1, keepdim=True).clamp_min(1)
    square = torch.einsum("bic,bij,bjc->bc", mean, cosines[:, :-1, :-1], mean)
    return 2 * cosines[:, -1:, :-1] @ mean - square[:, None]


def ridge(products, targets, penalty=0.3):
    """Least squares on one-hot labels."""
    gram = products[:, :-1, :-1] + penalty * torch.eye(targets.shape[1])
    return products[:, -1:, :-1] @ torch.linalg.solve(gram, targets)


def kernel_ridge(cosines, targets, penalty=0.01, width=0.5):
    """Ridge with a Gaussian kernel."""
    return ridge(((cosines - 1) / width).exp(), targets - 1 / C, penalty)


def sgd(cosines, targets, rate=1.0, epochs=10):
    """Softmax regression by plain SGD, example by example, in passes over the context. In its dual
    form: the weights are a sum of the examples, so only its coefficients are stepped."""
    coefficients = torch.zeros_like(targets)
    for _ in range(epochs):
        for i in range(targets.shape[1]):
            logits = (cosines[:, i:i + 1, :-1] @ coefficients)[:, 0]
            coefficients[:, i] += rate * (targets[:, i] - logits.softmax(-1))
    return cosines[:, -1:, :-1] @ coefficients


BASELINES = {"1-nearest neighbour": nearest_neighbour, "nearest centroid": nearest_centroid,
             "ridge regression": ridge, "kernel ridge": kernel_ridge, "SGD (softmax)": sgd}


def baseline_labels(x, y):
    """Return {baseline: predicted label (B,), one of y (B, n)} for the last of x (B, n + 1, P)."""
    x = F.normalize(x, dim=-1)
    cosines, targets = (x @ x.mT).cpu(), F.one_hot(y.cpu(), C).float()   # solvers like the CPU
    missing = targets.sum(1) == 0
    return {name: baseline(cosines, targets)[:, 0].masked_fill(missing, -math.inf).argmax(-1)
            for name, baseline in BASELINES.items()}


def meta_test_batches(dataset, n_sequences, settings, num_tasks=0):
    """Yield x, y of the meta-test sequences: the same for all models of one PROJECTION_SIZE."""
    size = max(1, 128 * 100**2 // max(100, settings.NUM_EXAMPLES)**2)    # few of long ones
    for start in range(0, n_sequences, size):
        key = "meta-test", dataset.name, start, settings.EVAL_SEED
        yield draw_sequences(dataset, min(size, n_sequences - start), settings, key, num_tasks)


@torch.no_grad()
def count_correct(model, dataset, n_sequences, settings, precision, num_tasks=0, lengths=()):
    """Return {learner: in how many sequences it predicted the right label}.

    For the model, "in-context", after 0 .. T - 1 examples, for baselines after those of `lengths`.
    """
    correct = dict.fromkeys(["in-context", *BASELINES] if lengths else ["in-context"], 0)
    for x, y in meta_test_batches(dataset, n_sequences, settings, num_tasks):
        predicted = compute_logits(model, x, y, precision).argmax(-1)
        correct["in-context"] += (predicted == y).sum(0).cpu().numpy()
        by_length = [baseline_labels(x[:, :n + 1], y[:, :n]) for n in lengths]
        for name in BASELINES if lengths else ():
            correct[name] += np.array([(labels[name] == y[:, n].cpu()).sum()
                                       for n, labels in zip(lengths, by_length)])
    return correct


def context_lengths(settings):
    """Return the columns of the printed tables: the last is the longest context there is."""
    last = settings.NUM_EXAMPLES - 1
    return [n for n in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500) if n < last] + [last]


def meta_test(model, dataset, settings, precision, num_tasks=0):
    """Return {learner: lists of examples, accuracy, its 95 % low, high} on EVAL_SEQUENCES sequences
    of unseen tasks, or of `num_tasks` fixed ones."""
    n, lengths = settings.EVAL_SEQUENCES, context_lengths(settings)[1:]
    curves = {}
    for name, correct in count_correct(model, dataset, n, settings, precision, num_tasks,
                                       lengths).items():
        low, high = wilson_interval(correct, n)
        examples = list(range(len(correct))) if name == "in-context" else lengths
        curves[name] = dict(examples=examples, accuracy=(correct / n).tolist(),
                            low=low.tolist(), high=high.tolist(), sequences=n)
    return curves


# ------------------------------------------------------------------------------------------ data
# From here on nothing is about the paper: files, flags, devices, tables, and the whole job.
RENDERED = dict(RenderedDigits="0123456789", RenderedLetters="ABCDEFGHIJ")    # stand in for MNIST


class UserError(ValueError):
    """Something that the user can mend. The message says what is wrong and what to do."""


def require(condition, sentence):
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def as_dataset(name, x, y, size, device):
    """Return a Dataset of arrays x (n, ...) and y (n,): z-normalised by one mean and one std.

    Images (n, h, w), (n, h, w, c) or (n, c, h, w) are resized to `size`, rows (n, N) are not.
    """
    x, (classes, y) = np.asarray(x), np.unique(y, return_inverse=True)
    require(2 <= x.ndim <= 4 and y.shape == x.shape[:1] and x.dtype.kind in "biuf",
            f"{name}: x is {x.shape} of {x.dtype}, y {y.shape}; expected y (n,) and numbers x: "
            "rows (n, N), or images (n, h, w) or (n, h, w, c).")
    require(2 <= len(classes) <= C and (classes == classes).all(),
            f"{name}: y has {len(classes)} classes; expected 2 to {C}, none of them NaN.")
    x = torch.as_tensor((x - x.mean(dtype=float)).astype(np.float32))
    require(0 < x.std() < math.inf, f"{name}: x is constant, or has NaN or huge values; clean it.")
    if x.ndim > 2:
        x = x[:, None] if x.ndim == 3 else x.movedim(-1, 1) if x.shape[-1] < x.shape[1] else x
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    x = (x - x.mean()).flatten(1) / x.std()
    return Dataset(name, x.to(device), torch.as_tensor(y).long().to(device), len(classes))


def torchvision_arrays(name, train, folder):
    """Return the images and labels of one of torchvision's data sets, downloading if need be."""
    raw = Path(folder, name, "raw")
    if any(raw.glob("*ubyte*")):                         # of MNIST and its like
        stems = "images-idx3-ubyte", "labels-idx1-ubyte"
        return [idx_array(raw, f"{'train' if train else 't10k'}-{stem}") for stem in stems]
    from torchvision import datasets
    try:
        with contextlib.redirect_stdout(None):           # its progress goes to stderr
            data = getattr(datasets, name)(folder, train=train, download=True)
        return np.asarray(data.data), np.asarray(data.targets)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"{name} could not be loaded: it is not in {folder}, and could not "
                                f"be downloaded ({' '.join(str(error).split())}).") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"data set {name!r} is neither one of torchvision's with train=True (MNIST,"
                        f" CIFAR10 ...), nor {' or '.join(RENDERED)}, nor an .npz file.") from error


def idx_array(folder, stem):
    """Return the array of a file in MNIST's format, gzip-compressed or not."""
    path = folder / stem if (folder / stem).exists() else folder / f"{stem}.gz"
    remedy = f"get it afresh, or delete {folder} to have all of its files downloaded again."
    require(path.exists(), f"{folder} has no {stem}.gz (is it there by another name?); {remedy}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
        shape = np.frombuffer(content, ">i4", content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except Exception as error:                           # gzip raises many kinds
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error


def rendered_arrays(name, train):
    """Return characters in matplotlib's fonts, as grey images (n, 28, 28), and their numbers, so
    distorted that 1-nearest neighbour on 99 examples is right in about 70 %, as on MNIST."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont          # matplotlib brings Pillow along
    characters, drawn = RENDERED[name], []
    paths = [path for path in sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("*.ttf"))
             if re.match("(DejaVuSans|DejaVuSansMono|DejaVuSerif|STIXGeneral|cm(b|r|ss|ti|tt)10)"
                         "[^D]*$", path.stem)]
    for path, stroke, character in itertools.product(paths, range(3), characters):
        image, font = Image.new("L", (56, 56)), ImageFont.truetype(str(path), 40)
        ImageDraw.Draw(image).text((28, 28), character, 255, font, "mm", stroke_width=stroke)
        drawn.append(np.asarray(image))
    drawn = torch.tensor(np.array(drawn)).view(-1, len(characters), 56, 56)
    n, g = 20000 if train else 5000, torch.Generator().manual_seed(int(train))
    style = torch.randint(len(drawn), (n,), generator=g)
    label = torch.randint(len(characters), (n,), generator=g)
    affine = torch.eye(2, 3) + torch.tensor([0.09, 0.09, 0.02]) * torch.randn(n, 2, 3, generator=g)
    bend = F.interpolate(0.02 * torch.randn(n, 2, 4, 4, generator=g), (28, 28), mode="bicubic")
    images = []
    for part in torch.arange(n).split(2048):             # in parts: float images are large
        grid = F.affine_grid(affine[part], (len(part), 1, 28, 28), align_corners=False)
        image = drawn[style[part], label[part]][:, None].float()
        image = F.grid_sample(image, grid + bend[part].movedim(1, -1), align_corners=False)
        images.append(image[:, 0].clamp(0, 255).byte())
    return torch.cat(images).numpy(), label.numpy()


def npz_arrays(path):
    """Return the arrays x and y of an .npz file."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file}
        require({"x", "y"} <= {*arrays}, f"it has {', '.join(arrays)}, not x and y")
        return arrays["x"], arrays["y"]
    except Exception as error:                           # zipfile and numpy raise many kinds
        raise UserError(f"{path} could not be read as an .npz file ({error}); make it with "
                        "numpy.savez(path, x=x, y=y), where words are y.astype(str).") from error


def load_dataset(name, split, settings, device):
    """Return the "train" or "test" images of a data set, by name or .npz path, on `device`.

    A seventh of an .npz file's rows, shuffled, is its test; all of them are, of one not trained on
    ("unseen"). Raises FileNotFoundError where there is no such data.
    """
    train, of_file = split == "train", name.endswith(".npz")
    require(of_file or not Path(name).suffix, f"data set {name}: of files, only .npz is read here.")
    arrays = (npz_arrays(name) if of_file else rendered_arrays(name, train) if name in RENDERED
              else torchvision_arrays(name, train, settings.DATA_DIR))
    called = name if Path(name).stem in PAPER else Path(name).stem       # someone's MNIST.npz
    dataset = as_dataset(called, *arrays, settings.IMAGE_SIZE, device)
    if of_file and split != "unseen":
        rows = torch.randperm(len(dataset.y), generator=torch.Generator().manual_seed(0)).to(device)
        rows = rows[len(rows) // 7:] if train else rows[:len(rows) // 7]
        dataset = dataset._replace(x=dataset.x[rows], y=dataset.y[rows])
    require(len(dataset.y) >= settings.NUM_EXAMPLES, f"{name} has {len(dataset.y)} rows ({split}); "
            f"a sequence needs NUM_EXAMPLES={settings.NUM_EXAMPLES} different ones.")
    return dataset


def load_training(settings, device):
    """Return training and validation Datasets, and the name or path of the data set."""
    name = "MNIST" if settings.TRAIN_DATASET == "auto" else settings.TRAIN_DATASET
    try:
        whole = load_dataset(name, "train", settings, device)
    except FileNotFoundError as error:
        if settings.TRAIN_DATASET != "auto":
            raise
        print(f"\n*** NOTICE: {error}\n*** Rendered digits and letters stand in for MNIST and "
              "FashionMNIST.\n*** Their numbers can't be compared with the paper's.\n")
        name = "RenderedDigits"
        whole = load_dataset(name, "train", settings, device)
    n_validation = min(settings.VALIDATION_IMAGES, len(whole.y) // 4)
    require(n_validation >= settings.NUM_EXAMPLES, f"{name} leaves {n_validation} images for "
            f"validation (VALIDATION_IMAGES); a sequence needs {settings.NUM_EXAMPLES}.")
    (x, x_validation), (y, y_validation) = (
        part.split([len(part) - n_validation, n_validation]) for part in (whole.x, whole.y))
    return whole._replace(x=x, y=y), whole._replace(x=x_validation, y=y_validation), name


def load_tests(trained_on, settings, device):
    """Return {row: (Dataset, NUM_TASKS)} of the meta-test, after training on a data set."""
    other = {"RenderedDigits": "RenderedLetters", "FashionMNIST": "MNIST"}
    automatic, tests = settings.EVAL_DATASETS == "auto", {}
    for name in ([trained_on, other.get(trained_on, "FashionMNIST")] if automatic
                 else re.split(" *, *", settings.EVAL_DATASETS)):
        known = os.path.realpath(name) == os.path.realpath(trained_on)   # a path has many names
        try:
            dataset = load_dataset(name, "test" if known else "unseen", settings, device)
        except FileNotFoundError as error:
            if known or not automatic:
                raise
            print(f"\n*** NOTICE: {error}\n*** It is left out of the meta-test.\n")
            continue
        row = name if dataset.name in tests else dataset.name            # of two files of a name
        if settings.NUM_TASKS and known:
            tests[f"{row}, seen tasks"] = dataset, settings.NUM_TASKS
        tests[row] = dataset, 0
    return tests


# ----------------------------------------------------------------------------------- checkpoints
FORMAT = "gpicl-7"                                       # of checkpoints


@contextlib.contextmanager
def stop_requests():
    """Yield a list that Ctrl-C or SIGTERM makes non-empty, instead of stopping the program."""
    requests, signals = [], (signal.SIGINT, signal.SIGTERM)
    former = [signal.signal(number, lambda *_: requests.append(True)) for number in signals]
    try:
        yield requests
    finally:
        for number, handler in zip(signals, former):
            signal.signal(number, handler)


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path that becomes `path` in one step; raise UserError where it can't."""
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:             # RuntimeError: torch, of a full disk
        raise UserError(f"{path} could not be written ({error}); what was saved before is kept, "
                        "so make room and run the same command again.") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, settings, model, **more):
    """Write model, settings and whatever else resuming needs; `path` is never half written."""
    with atomic_write(path) as temporary:
        torch.save(dict(format=FORMAT, settings=vars(settings), model=model.state_dict(), **more),
                   temporary)


def load_checkpoint(path):
    """Return the dict that save_checkpoint wrote; UserError for other files."""
    try:
        with zipfile.ZipFile(path) as parts:
            require(not parts.testzip(), "it is damaged")                # torch does not check
        saved = torch.load(path, map_location="cpu", weights_only=True)
        require(saved["format"] == FORMAT, "it is of another version of the program")
        return saved
    except Exception as error:                           # torch raises many kinds for a bad file
        raise UserError(f"{path} could not be read as a checkpoint ({error}); delete it to train "
                        "again from the start.") from error


def load_model(path, device=None):
    """Return (model, saved): the model of a model.pt, and all that the file holds."""
    saved = load_checkpoint(path)
    model = make_model(default_settings(**saved["settings"])).to(device or choose_device("auto")[0])
    model.load_state_dict(saved["model"])
    return model, saved


# -------------------------------------------------------------------------------- settings, flags
CHOICES = dict(DEVICE=("auto", "cuda", "mps", "cpu"), PRECISION=("auto", "bf16", "fp32"),
               TOKEN_FORMAT=("pairs", "paper"))
MAY_BE_ZERO = {"SEED", "EVAL_SEED", "NUM_TASKS", "WARMUP_STEPS", "WORKERS"}    # of whole numbers
NOT_WHOLE = ("FRACTION", "RATE", "STD", "SCALE", "BETA2", "EPSILON", "CLIP", "SECONDS")    # ends
FOLDERS = {"DATA_DIR", "OUT_DIR", "CHECKPOINT"}          # settings that don't make a run another
OF_EVALUATE = FOLDERS | {"EVAL_DATASETS", "EVAL_SEQUENCES", "EVAL_SEED", "NUM_EXAMPLES", "DEVICE",
                         "PRECISION", "IMAGE_SIZE"}      # settings that `evaluate` reads


def setting_lines(path):
    """Return {name: line} of the constants at the top of a program, before its PRESETS."""
    top = re.split(r"\nPRESETS =|\ndef |\nclass ", Path(path).read_text(encoding="utf-8"))[0]
    return {line[1]: line[0] for line in re.finditer("^([A-Z][A-Z0-9_]+) *=.*", top, re.M)}


def default_settings(**changes):
    """Return the settings at the top of this file, with changes."""
    defaults = {name: globals()[name] for name in setting_lines(__file__)}
    return SimpleNamespace(**{**defaults, **changes})


def read_value(name, value, default):
    """Return the value of a setting, given as itself or as a flag's text; raise UserError."""
    choices = CHOICES.get(name, (True, False) if isinstance(default, bool) else ())
    if choices or isinstance(default, str):
        named = {str(choice): choice for choice in choices or [value]}
        require(str(value) in named, f"{name} is {value}; expected one of {', '.join(named)}.")
        return named[str(value)]
    whole = not name.endswith(NOT_WHOLE)
    least = 2 if name == "NUM_EXAMPLES" else 1 if whole and name not in MAY_BE_ZERO else 0
    least = 1e-30 if name.endswith(("SCALE", "EPSILON", "CLIP")) else least
    most = dict(FRACTION=1, BETA2=1 - 1e-9).get(name.split("_")[-1], 1e18)
    try:
        base, _, exponent = str(value).partition("**")   # such as 2**16
        number = float(base) ** int(exponent or 1)
        require(least <= number <= most and (number.is_integer() or not whole), "out of range")
        return int(number) if whole else number
    except (ValueError, OverflowError):
        raise UserError(f"{name} is {value}; expected a {'whole ' * whole}number from {least} to "
                        f"{most:g}.") from None


def check_settings(settings):
    """Check all values, and make them what they should be: STEPS = 1e4 a whole number."""
    for name, value in vars(settings).items():
        setattr(settings, name, read_value(name, value, globals().get(name, value)))
    require(settings.MODEL_SIZE % settings.NUM_HEADS == settings.MODEL_SIZE % 2 == 0,
            f"MODEL_SIZE={settings.MODEL_SIZE} is not even, or not a multiple of NUM_HEADS.")


def read_flags(arguments, defaults, words=()):
    """Return (one of `words`, by default the first, and {setting: value} of the flags given)."""
    word, flags = next(iter(words), None), {}
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if argument in words:
            word = argument
        else:
            require(equals and name in defaults, f"{argument} is neither --NAME=value of a setting "
                    f"that is read here, nor one of {', '.join(words)}; --help lists them.")
            flags[name] = read_value(name, text, defaults[name])
    return word, flags


def make_model(settings):
    """Return a new model of the class that MODEL names, with random weights."""
    if settings.MODEL == "transformer":
        return Transformer(settings)
    try:
        module, name = settings.MODEL.split(":")
        model_class = getattr(importlib.import_module(module), name)
        require(issubclass(model_class, nn.Module), "it is no torch.nn.Module")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"MODEL={settings.MODEL} could not be imported ({error}); expected "
                        "module:Class, of a module beside this file.") from error
    return model_class(settings)


# ------------------------------------------------------------------------------ device, processes
def choose_device(wanted, precision="auto"):
    """Return (device, precision): CUDA, MPS or CPU; "bf16" where the hardware multiplies that."""
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(),
                     cpu=True)
    require(available.get(wanted, True), f"DEVICE={wanted} is not available here; use auto.")
    kind = next(kind for kind, there in available.items() if there and wanted in ("auto", kind))
    fast = False
    if kind == "cuda":                                   # torchrun: one device per process
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        fast = torch.cuda.get_device_capability() >= (8, 0)
    elif kind == "cpu" and os.path.exists("/proc/cpuinfo"):
        fast = re.search(r"\b(avx512_bf16|amx_bf16)\b", Path("/proc/cpuinfo").read_text())
    if precision == "auto":
        precision = "bf16" if fast else "fp32"
    return torch.device(kind), precision


def provenance(device, precision):
    """Return what a record says of where its numbers were made."""
    cpu_info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    processor = re.search(r"model name\s*: (.+)", cpu_info)
    machine = processor[1] if processor else platform.processor() or platform.machine()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    return dict(device=device.type, precision=precision, threads=torch.get_num_threads(),
                machine=machine, system=platform.system(), python=platform.python_version(),
                torch=torch.__version__, numpy=np.__version__)


def rank_and_world_size():
    """Return (rank, number) of this process among those that torchrun started; else (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def all_reduce_loss_and_stop(loss, stop, device):
    """Return the mean loss over all processes, and whether any of them was asked to stop."""
    both = torch.tensor([loss, float(stop)], device=device)
    if (world := rank_and_world_size()[1]) > 1:
        torch.distributed.all_reduce(both)
    return both[0].item() / world, both[1].item() > 0


# ------------------------------------------------------------------------------------- reporting
# The paper's table: accuracy (%) of its Transformer after 99 examples, meta-trained on MNIST.
PAPER = dict(MNIST=73.70, FashionMNIST=62.24, KMNIST=53.39, CIFAR10=19.40)


def run_folder(settings, name, source):
    """Return a run's folder, and a function that prints texts and keeps them in its log.txt."""
    files = [path for path in map(Path, (source, *re.split(" *, *", settings.EVAL_DATASETS)))
             if path.is_file()]
    key = [FORMAT, source, *(hashlib.blake2b(path.read_bytes()).digest() for path in files),
           *(setting for setting in vars(settings).items() if setting[0] not in FOLDERS)]
    digest = hashlib.blake2b(repr(key).encode(), digest_size=3).hexdigest()
    folder = Path(settings.OUT_DIR, f"{re.sub('[^A-Za-z0-9.=_-]', '_', name[:100])}-{digest}")
    folder.mkdir(parents=True, exist_ok=True)

    def log(*texts):
        for text in texts if rank_and_world_size()[0] == 0 else ():
            with tqdm.external_write_mode(), open(folder / "log.txt", "a", encoding="utf-8") as out:
                print(text, file=out)
                print(text, flush=True)
    return folder, log


def progress_table(rows, settings):
    """Return the lines of the table that grows during training."""
    lengths = context_lengths(settings)
    return ["\nAccuracy (%) on unseen tasks of validation images, after so many examples:",
            "   step  seconds    loss  |" + "".join(f"{n:6}" for n in lengths)] + [
        f"{row['step']:7}{row['seconds']:9.0f}{row['loss']:8.3f}  |" + "".join(
            f"{100 * row['accuracy'][n]:6.1f}" for n in lengths) for row in rows]


def result_table(results):
    """Return the lines of the final table and the greppable ones."""
    lengths, greppable = context_lengths(SimpleNamespace(**results["settings"])), []
    lines = ["", f"{'Accuracy (%) after so many examples':37}" + "".join(f"{n:6}" for n in lengths)]

    def add_row(label, examples, accuracy):
        cells = {n: f"{100 * value:6.1f}" for n, value in zip(examples, accuracy)}
        lines.append(f"{label:37}" + "".join(cells.get(n, 6 * " ") for n in lengths).rstrip())

    for name, entry in results["data_sets"].items():
        for learner, curve in entry["curves"].items():
            prefix = f"{name}: " if learner == "in-context" else "  "
            add_row(prefix + learner, curve["examples"], curve["accuracy"])
            if learner == "in-context":
                half = (np.array(curve["high"]) - curve["low"]) / 2
                add_row("  95 % interval, ±", curve["examples"], half)
                greppable.append(f"{name.replace(' ', '-')}@{lengths[-1]}: "
                                 f"{100 * curve['accuracy'][-1]:.1f} ± {100 * half[-1]:.1f}")
        add_row("  chance", lengths, len(lengths) * [1 / entry["classes"]])
        if entry["paper"]:
            add_row("  the paper's Transformer", [99], [entry["paper"] / 100])
    return [*lines, "", *greppable]


def plot(path, results):
    """Draw accuracy by number of examples, one panel per data set."""
    from matplotlib.figure import Figure                 # no pyplot: needs no display, no state
    entries = results["data_sets"]
    figure = Figure(figsize=(max(6, 4.4 * len(entries)), 4.8), layout="constrained")
    panels = figure.subplots(1, len(entries), sharey=True, squeeze=False)[0]
    for panel, (name, entry) in zip(panels, entries.items()):
        for learner, curve in entry["curves"].items():
            accuracy, low, high = (100 * np.array(curve[k]) for k in ("accuracy", "low", "high"))
            style = dict(lw=2, zorder=5) if learner == "in-context" else dict(ls="--", marker=".")
            line, = panel.plot(curve["examples"], accuracy, label=learner, **style)
            if learner == "in-context":
                panel.fill_between(curve["examples"], low, high, color=line.get_color(), alpha=0.25)
        panel.axhline(100 / entry["classes"], color="grey", ls=":", label="chance")
        if entry["paper"]:
            panel.plot([99], [entry["paper"]], "k*", ms=10, label="Transformer in the paper")
        panel.set(xlabel="examples in context", ylabel="accuracy (%)", ylim=(0, 100))
        panel.set_title(name, parse_math=False)          # of files whose names have a $
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"Meta-trained on {results['trained_on']}", parse_math=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)


def test_and_report(model, tests, settings, precision, folder, log, facts):
    """Test the model on all of `tests`; write the files of the run, print the table."""
    began, data_sets = time.time(), {}
    paper = PAPER if facts["trained_on"] == "MNIST" and settings.NUM_EXAMPLES == 100 else {}
    for row, (dataset, num_tasks) in tests.items():
        data_sets[row] = dict(classes=dataset.classes, paper=paper.get(row),
                              curves=meta_test(model, dataset, settings, precision, num_tasks))
    results = dict(**facts, **provenance(next(model.parameters()).device, precision),
                   settings=vars(settings), data_sets=data_sets, test_seconds=time.time() - began)
    columns = "examples", "accuracy", "low", "high"
    with atomic_write(folder / "curves.csv") as path, open(path, "w", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([["data_set", "learner", *columns]] + [
            [row, name, *point] for row, entry in data_sets.items()
            for name, curve in entry["curves"].items() for point in zip(*map(curve.get, columns))])
    with atomic_write(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1))
    log(f"Tested in {results['test_seconds']:.0f} s.", *result_table(results))
    plot(folder / "accuracy_by_examples.png", results)


# --------------------------------------------------------------------------------- the whole job
def run(word, settings, flags):
    """Meta-train, test and report; continue where a run of the same settings stopped."""
    rank, world = rank_and_world_size()
    device, precision = choose_device(settings.DEVICE, settings.PRECISION)
    if rank:                                             # the first process downloads the data
        torch.distributed.barrier()
    training, validation, source = load_training(settings, device)
    tests = load_tests(source, settings, device)
    if world > 1 and not rank:
        torch.distributed.barrier()
    words = [word, *(f"{name}={value}" for name, value in flags.items() if name not in FOLDERS)]
    folder, log = run_folder(settings, "-".join([training.name, *words]), source)
    report, final = folder / "results.json", folder / "model.pt"
    if report.exists() and not (folder / "checkpoint.pt").exists():
        return log(*result_table(json.loads(report.read_text())),
                   f"\nFinished before, by the code in its folder. To run again, delete {folder}")
    torch.manual_seed(settings.SEED)
    model = make_model(settings).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"Device      {device.type}, {precision}; {provenance(device, precision)['machine']}\n"
        f"Data        {training.name}, {len(training.x):,} images to train on, "
        f"{len(validation.x):,} for validation; tests on {', '.join(tests)}\n"
        f"Model       {type(model).__name__}, {parameters:,} parameters\n"
        f"Settings    {', '.join(words)}\nRun folder  {folder}")
    if not rank and not (folder / "checkpoint.pt").exists():             # it may be edited
        (folder / Path(__file__).name).write_text(Path(__file__).read_text("utf-8"), "utf-8")
    progress = meta_train(model, training, validation, settings, folder, precision, log)
    if rank:
        return                                           # the rest is the first process's work
    source = os.path.realpath(source) if source.endswith(".npz") else source
    save_checkpoint(final, settings, model, trained_on=training.name, source=source)
    log(f"\nTrained {progress['step']} steps in {progress['seconds']:.0f} s. Testing on "
        f"{settings.EVAL_SEQUENCES} sequences a data set ...")
    test_and_report(model, tests, settings, precision, folder, log, dict(
        trained_on=training.name, preset=word, processes=world, parameters=parameters,
        training_seconds=progress["seconds"], progress=progress["rows"]))
    (folder / "checkpoint.pt").unlink(missing_ok=True)   # a stop in the test goes on from it


def evaluate(settings, flags):
    """Print and write the curves of a trained model on any data sets, without training."""
    paths = [Path(settings.CHECKPOINT)]
    if settings.CHECKPOINT == "auto":
        paths = sorted(Path(settings.OUT_DIR).glob("*/model.pt"), key=os.path.getmtime)
    require(paths, f"there is no model.pt in OUT_DIR={settings.OUT_DIR}; meta-train one first, or "
            "give --CHECKPOINT=path.")
    device, precision = choose_device(settings.DEVICE, settings.PRECISION)
    model, saved = load_model(paths[-1], device)
    kept = saved["settings"].keys() - flags.keys() - {*FOLDERS, "EVAL_DATASETS"}
    settings = default_settings(**{**vars(settings), **{k: saved["settings"][k] for k in kept}})
    tests = load_tests(saved["source"], settings, device)
    folder, log = run_folder(settings, "-".join(["evaluation", *tests]), str(paths[-1].resolve()))
    log(f"Device      {device.type}, {precision}\nModel       {paths[-1]}, meta-trained on "
        f"{saved['trained_on']}\nData        {', '.join(tests)}\nRun folder  {folder}")
    test_and_report(model, tests, settings, precision, folder, log,
                    dict(trained_on=saved["trained_on"], checkpoint=str(paths[-1])))


def run_command_line(arguments):
    """Do what a command line says."""
    if {"-h", "--help"} & {*arguments}:
        return print("\n".join([__doc__, *setting_lines(__file__).values()]))
    known = {name: value for name, value in vars(default_settings()).items()
             if "evaluate" not in arguments or name in OF_EVALUATE}
    word, flags = read_flags(arguments, known, [*PRESETS, "evaluate"])
    settings = default_settings(**{**PRESETS.get(word, {}), **flags})
    check_settings(settings)
    if word == "evaluate":
        return evaluate(settings, flags)
    world = rank_and_world_size()[1]
    require(settings.BATCH_SIZE % world == 0,
            f"BATCH_SIZE={settings.BATCH_SIZE} can't be split evenly over {world} processes.")
    if world > 1:
        kind = choose_device(settings.DEVICE)[0].type
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    run(word, settings, flags)
    if world > 1:
        torch.distributed.destroy_process_group()


def keep_freed_memory():
    """Make Linux's allocator keep freed memory: taking it anew costs a sixth of a step on CPUs."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)                              # M_MMAP_MAX: nothing from mmap
        libc.mallopt(-1, 2**31 - 1)                      # M_TRIM_THRESHOLD: 2 GiB


def main(arguments, command=run_command_line):
    """Run a command line; return the exit code: 0; 2 after one sentence; 130 or 141 if stopped."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # a kill is as Ctrl-C
    keep_freed_memory()
    socket.setdefaulttimeout(20)                         # for downloads from a silent network
    os.environ["MPLBACKEND"] = "agg"                     # figures are files, whatever was set
    sys.stderr = sys.stderr or open(os.devnull, "w")     # 2>&-: the progress bar needs one
    try:
        command(arguments)
    except BrokenPipeError:                              # the reader has left, as of --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "Stopped; run the same command again to go on.")
        return 130
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        words = " ".join(str(error).split()) or "there is too little memory."
        known = "memory|overflow|Connection|state_dict"  # others are mistakes of this program
        if type(error) is RuntimeError and not re.search(known, words):
            raise
        print(f"error: {words}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":                               # one copy, whoever imports it by its name
    sys.exit(importlib.import_module(Path(__file__).stem).main(sys.argv[1:]))
