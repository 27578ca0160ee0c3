# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "numpy>=2.1", "tqdm>=4.60", "matplotlib>=3.9"]
# ///
"""General-purpose in-context learning by meta-learning Transformers, in one file.

Replicates Kirsch, Harrison, Sohl-Dickstein, Metz, arXiv 2212.04458 (GPICL). One labelled image set
is turned into endless tasks: every task projects the images with a random matrix A and permutes the
labels with a random permutation rho. A causal Transformer sees one task as a sequence of examples
and predicts each label from the examples before it. With enough tasks it stops memorising and
becomes a learning algorithm: its accuracy rises with the number of examples in its context, without
a gradient step, on tasks and on whole data sets that it has never seen.

    python gpicl_minimal_replication.py                      meta-train on MNIST, test, plot
    python gpicl_minimal_replication.py quick                the same with 600 steps (see "Presets")
    python gpicl_minimal_replication.py --SEED=3 --BATCH_SIZE=2**6     any setting, by its own name
    python gpicl_minimal_replication.py evaluate ...         the curves of a trained model, any data
    python gpicl_minimal_replication.py classify ...         label the rows of a file by another's
    python gpicl_minimal_replication.py phases ...           the paper's other experiments, one each
    python gpicl_minimal_replication.py --help               every setting, preset and command

In the code          in the paper
task                 (A, rho): random projection, random label permutation          (Sec. 3, Alg. 1)
sequence             D = ((x_1, y_1) ... (x_T, y_T)), one data set shown in context
meta-training        minimise the loss of every prediction, averaged over tasks      (Eq. 2)
meta-test            accuracy after n examples, no weight changes                    (Sec. 4)

The paper is in the sections "tasks" to "evaluation"; what follows serves use and more experiments.
Letters for dimensions: B sequences, T examples in a sequence, N pixels of an image, P numbers of a
projected image, D model size, H heads, C classes.
"""

import contextlib
import csv
import ctypes
import datetime
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import threading
import time
import timeit
import zipfile
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

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

# Data
TRAIN_DATASET = "auto"       # torchvision's name, Random or an .npz file; auto: MNIST or rendered
EVAL_DATASETS = "auto"       # several, by commas (NAME?: if to be had); auto: own and FashionMNIST?
IMAGE_SIZE = 28              # images are resized to this height and width (paper: 32)
VALIDATION_IMAGES = 5000     # last training images, never trained on (of few, a quarter)

# Tasks
NUM_TASKS = 0                # so many fixed tasks, as 2**16; 0: a fresh task for every sequence
NUM_EXAMPLES = 100           # examples in a sequence: the last is predicted after 99
PROJECTION_SIZE = 3072       # numbers that the random projection turns an image into (as paper)
READ_SIZE = 64               # how many of them a token holds (beside cosines), or VSML trains on
BIASED_FRACTION = 0.0        # share of each batch with one fixed label permutation
MERGED_FRACTION = 0.2        # share of each batch with classes merged into 2 to 9 (fresh tasks)

# Model
ARCHITECTURE = "transformer"  # lstm, outer_lstm, deltanet, mlp, vsml, vsml_free, maml
TOKEN_FORMAT = "pairs"       # pairs: (A x_i, A x_i-1, y_i-1); paper: (A x_i, y_i-1)
COMPARE_IMAGES = True        # give attention the cosines between images (pairs only); or black box
RIDGE_ATTENTION = True       # heads add a ridge regression of their values (if images are compared)
GUIDED_START = True          # no cosines: start by comparing images (token paper: by looking back)
ATTENTION_SCALE = 2.0        # first scale of the last head's scores (of the first head's: 2)
OUTPUT_STD = 0.0             # weights that write to the stream start with std this / sqrt(inputs)
MODEL_SIZE = 128             # width of the residual stream
NUM_LAYERS = 6               # each is attention, then an MLP
NUM_HEADS = 4                # attention heads per layer
MLP_SIZE = 512               # hidden units of each MLP
CELL_SIZE = 8                # vsml: state of each of its many tiny LSTMs

# Meta-training
OPTIMIZER = "muon"           # muon (AdamW for what is not a hidden matrix) or adamw
BATCH_SIZE = 32              # sequences per step
STEPS = 1000                 # updates in all
LEARNING_RATE = 5e-3         # peak rate
WARMUP_STEPS = 50            # rate rises from zero over so many steps
DECAY_FRACTION = 0.4         # rate falls linearly to zero over the last so much of the steps
WEIGHT_DECAY = 0.0           # decoupled, as in AdamW
ADAM_BETA2 = 0.99            # decay rate of Adam's second moment
ADAM_EPSILON = 1e-8          # a small one shortens the plateau (paper)
GRADIENT_CLIP = 1.0          # largest norm of the gradient

# Evaluation
EVAL_SEQUENCES = 4096        # meta-test sequences per data set
EVAL_SEED = 0                # of these sequences; they do not depend on SEED
AVERAGED_PASSES = 0          # passes of test-time averaging, a row of its own; 0: none
ROW_EVERY = 250              # steps between two rows of the progress table
ROW_SEQUENCES = 512          # validation sequences behind one such row
CHECKPOINT_SECONDS = 30.0    # seconds between two checkpoints

# Commands evaluate and classify
CHECKPOINT = "auto"          # model.pt of a run; auto: the newest one in OUT_DIR
TRAIN_FILE = ""              # classify: the examples, a .csv or .npz file
TEST_FILE = ""               # classify: the rows to be labelled, likewise
LABEL_COLUMN = "last"        # classify: labels in a .csv: last, a header's name, or 1, 2 ...
N_ENSEMBLE = 8               # classify: passes whose probabilities are averaged
PREDICTIONS_FILE = "predictions.csv"    # classify: the labels and their probabilities

# Experiments
WAYS = 5                     # features: classes of an episode
SHOTS = "1,5,15"             # features: examples of each class, comma-separated
FEATURES_FILE = ""           # features: an .npz file with x (n, N) and y; none: made on the spot
SEEDS = 3                    # runs of each kind, with SEED, SEED + 1 ...
WORKERS = 0                  # runs at once; 0: as many as CPU cores, one on a GPU
RESULTS_DIR = "results"      # the tables and figures of the experiments

PRESETS = {
    "default": {},
    "quick": dict(STEPS=600, ROW_EVERY=100),
    "large": dict(STEPS=12000, ROW_EVERY=1000),          # longer, not wider
    "plain": dict(COMPARE_IMAGES=False, RIDGE_ATTENTION=False, GUIDED_START=False, STEPS=1500,
                  LEARNING_RATE=3e-3, PROJECTION_SIZE=384, MODEL_SIZE=512, NUM_LAYERS=3,
                  MLP_SIZE=1024, MERGED_FRACTION=0.0),   # no images compared; ten classes, as paper
    "paper": dict(IMAGE_SIZE=32, NUM_TASKS=2**25, BIASED_FRACTION=0.9, TOKEN_FORMAT="paper",
                  GUIDED_START=False, OUTPUT_STD=1.0, MODEL_SIZE=256, NUM_LAYERS=4, NUM_HEADS=8,
                  MLP_SIZE=1024, OPTIMIZER="adamw", BATCH_SIZE=128, STEPS=2**18,
                  LEARNING_RATE=3e-4, ADAM_BETA2=0.999),
}
# What these commands read; what no flag sets, "evaluate" takes from the checkpoint.
COMMANDS = {
    "evaluate": ("CHECKPOINT", "EVAL_DATASETS", "EVAL_SEQUENCES", "EVAL_SEED", "AVERAGED_PASSES",
                 "NUM_EXAMPLES", "IMAGE_SIZE", "DEVICE", "PRECISION", "DATA_DIR", "OUT_DIR"),
    "classify": ("CHECKPOINT", "TRAIN_FILE", "TEST_FILE", "LABEL_COLUMN", "N_ENSEMBLE",
                 "PREDICTIONS_FILE", "SEED", "OUT_DIR"),
}
OF_FEATURES = ("WAYS", "SHOTS", "FEATURES_FILE")
OF_EXPERIMENTS = (*OF_FEATURES, "SEEDS", "WORKERS", "RESULTS_DIR")
NOT_OF_SWEEPS = ("EVAL_SEED", "AVERAGED_PASSES", "ROW_EVERY", "ROW_SEQUENCES", "CHECKPOINT_SECONDS")
OF_COMMANDS = {*COMMANDS["classify"]} - {"SEED", "OUT_DIR"}              # no run reads these

C = 10                                               # classes that the model tells apart
EVAL_BATCH = 64                                      # sequences that are tested at once
QUERIES = 200                                        # rows that are classified at once
MAX_CONTEXT = 2000                                   # of more examples, each pass sees a sample
OFFSET = 3.0                                         # constant feature, where the others have std 1
MIXTURE_SCALE = 10.0                                 # makes Adam's steps fit the image mixtures
FORMAT = "gpicl-6"                                   # of checkpoints
DTYPES = dict(bf16=torch.bfloat16, fp32=torch.float32)
MODELS = dict(transformer="Transformer", lstm="LSTM", outer_lstm="outer-product LSTM",
              deltanet="gated DeltaNet", mlp="MLP", vsml="VSML", vsml_free="VSML, not symmetric",
              maml="MAML")
CHOICES = dict(DEVICE=("auto", "cuda", "mps", "cpu"), PRECISION=("auto", "bf16", "fp32"),
               TOKEN_FORMAT=("pairs", "paper"), OPTIMIZER=("muon", "adamw"), ARCHITECTURE=[*MODELS])
MISSING = {"", "?", "-", ".", "na", "n/a", "n.a.", "#n/a", "<na>", "null", "none", "nan", "inf",
           "-inf", "missing", "unknown"}             # in a .csv file: no names of columns
RENDERED = dict(RenderedDigits="0123456789", RenderedLetters="ABCDEFGHIJ")    # stand in for MNIST
# What each setting is, whatever is written above: type, least, most, and that in words.
KINDS = {name: kind for *kind, names in (
    (str, "", chr(0x10ffff), "a text in quotes", (*CHOICES, "DATA_DIR", "OUT_DIR", "RESULTS_DIR",
        "TRAIN_DATASET", "EVAL_DATASETS", "CHECKPOINT", "SHOTS", "TRAIN_FILE", "TEST_FILE",
        "LABEL_COLUMN", "PREDICTIONS_FILE", "FEATURES_FILE")),
    (bool, False, True, "True or False", ("COMPARE_IMAGES", "RIDGE_ATTENTION", "GUIDED_START")),
    (int, 0, 2**62, "a whole number, 0 or more", (
        "SEED", "EVAL_SEED", "NUM_TASKS", "WARMUP_STEPS", "AVERAGED_PASSES", "WORKERS")),
    (int, 2, 2**62, "a whole number, 2 or more", ("NUM_EXAMPLES",)),
    (int, 1, C, f"a whole number from 1 to {C}", ("WAYS",)),
    (float, 0, 1, "a share from 0 to 1", ("BIASED_FRACTION", "MERGED_FRACTION", "DECAY_FRACTION")),
    (float, 0, 1 - 1e-9, "a share below 1", ("ADAM_BETA2",)),
    (float, 1e-30, 1e30, "a number above 0", ("ATTENTION_SCALE", "GRADIENT_CLIP", "ADAM_EPSILON")),
    (float, 0, 1e30, "a number from 0 to 1e30", (
        "OUTPUT_STD", "LEARNING_RATE", "WEIGHT_DECAY", "CHECKPOINT_SECONDS"))) for name in names}
OTHERS = int, 1, 2**62, "a whole number, 1 or more"
# The paper's table: accuracy on the 100th example after 99, meta-trained on MNIST.
PAPER = {name: dict(zip(("GPICL", "SGD", "MAML", "VSML", "LSTM"), row)) for name, row in dict(
    MNIST=(73.70, 70.31, 53.71, 79.04, 25.39), FashionMNIST=(62.24, 50.78, 48.44, 68.49, 28.12),
    KMNIST=(53.39, 37.89, 36.33, 54.69, 18.10), Random=(100.0, 100.0, 99.80, 100.0, 58.72),
    CIFAR10=(19.40, 14.84, 17.38, 24.09, 12.11), SVHN=(14.58, 10.16, 11.33, 17.45, 11.07)).items()}


class UserError(ValueError):
    """Something that the user can mend. The message says what is wrong and what to do."""


class DataUnavailable(UserError):
    """A data set that is neither on the disk nor to be downloaded."""


# ---------------------------------------------------------------------------------------- tasks
class Dataset(NamedTuple):
    """One labelled data set: x (n, N) z-normalised, y (n,) in 0 .. classes - 1."""
    name: str
    x: torch.Tensor
    y: torch.Tensor
    classes: int


def stream(device, *key):
    """Return a random generator on `device` that depends on nothing but `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def draw_task(seed, i, n_pixels, size, device):
    """Return task number i of a fixed set: A (P, N) and rho (C,), the same at every call.

    (On one kind of device: the random numbers of CUDA, MPS and CPU differ.) A_ij ~ N(0, 1/N): the
    *variance* is 1/N, so a projected image keeps its scale (paper, Sec. 3).
    """
    generator = stream(device, seed, "task", i)
    projection = torch.randn(size, n_pixels, generator=generator, device=device) / n_pixels**0.5
    return projection, torch.randperm(C, generator=generator, device=device)


def cholesky(matrix):
    """Return the lower triangular L (B, T, T) with L L' = matrix, for singular matrices too.

    By torch where it can. It stops at singular matrices, which identical or low-dimensional inputs
    give, and MPS lacked it for long: then by columns, where a vanishing pivot gives zeros.
    """
    if matrix.device.type != "mps":
        upper = not matrix.requires_grad                 # quicker than lower, but not its gradient
        factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
        if not failed.any():
            return factor.mT if upper else factor
    columns, floor = [], 1e-6 * matrix.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True) + 1e-30
    for j in range(matrix.shape[-1]):
        column, pivot = matrix[..., j], matrix[:, j, j, None]
        column = torch.where(pivot > floor, column * pivot.clamp_min(floor).rsqrt(), 0)
        matrix = matrix - column[..., None] * column[:, None]            # what is left to explain
        columns.append(column)
    return torch.stack(columns, -1).tril()


def span(images):
    """Return coordinates (B, T, n) of images (B, T, N), whose inner products are X X'/N.

    Few images span little: then n = T, and T numbers say of each what N pixels did. For many images
    (a nearly singular matrix of products) n = N.
    """
    if 4 * images.shape[1] > images.shape[2]:
        return images / images.shape[2]**0.5
    return cholesky(images @ images.mT / images.shape[2])


def outputs_read(s):
    """Return how many outputs of a projection, all alike, a model reads: few, if given cosines."""
    return min(s.PROJECTION_SIZE, s.READ_SIZE) if comparison(s) == "exact" else s.PROJECTION_SIZE


def project_afresh(coordinates, settings, generator):
    """Return (B, T, P): the images with these coordinates under a fresh A for each sequence.

    A is drawn only where the images look. For A_ij ~ N(0, 1/N), each row of A gives T numbers whose
    covariance is X X'/N. So do `coordinates` times a matrix G (n, P) of normal numbers: n rows in
    place of N, and the same distribution.

    Of the outputs that a model does not read one by one only inner products matter, so G G': n
    numbers say of each image what P - outputs_read did (see bartlett_), and x is
    (B, T, outputs_read + n) where that is fewer than P by 100.
    """
    (B, _, n), P, read = coordinates.shape, settings.PROJECTION_SIZE, outputs_read(settings)
    fewer = read + n <= P - 100
    matrix = torch.randn(B, n, read + n if fewer else P, generator=generator,
                         device=coordinates.device)
    if fewer:
        bartlett_(matrix, read, P - read)
    return coordinates @ matrix


def bartlett_(matrix, start, outputs):
    """Turn the normal numbers of matrix (B, n, start + n), from column `start` on, into L (B, n, n)
    whose L L' has the law of G G' for G (n, outputs).

    L is lower triangular: normal below a diagonal of chi-distributed numbers (Bartlett 1933), which
    come from normal ones by the formula of Wilson and Hilferty (1931).
    """
    diagonal = matrix.diagonal(start, 1, 2)
    freedom = outputs - torch.arange(matrix.shape[1], device=matrix.device)
    root = 1 - 2 / (9 * freedom) + (2 / (9 * freedom))**0.5 * diagonal
    matrix.tril_(start)
    diagonal.copy_(freedom**0.5 * root**1.5)


def draw_images(dataset, n_sequences, length, generator):
    """Return indices (B, T) of images: none twice within a sequence."""
    n, device = len(dataset.y), dataset.y.device
    chosen = torch.empty(n_sequences, length, dtype=torch.long, device=device)
    for part in chosen.split(n // length):               # from one shuffle of all images
        part.view(-1).copy_(torch.randperm(n, generator=generator, device=device)[:part.numel()])
    return chosen


def draw_sequences(dataset, n_sequences, settings, key, num_tasks=0, biased=0.0, merged=0.0):
    """Return x (B, T, P) and y (B, T): sequences, each a task applied to its own random images.

    A pure function of its arguments: `key` names the place in the random stream. With `num_tasks`
    the tasks are picked from that many fixed ones, else each is fresh (and x perhaps narrower, see
    project_afresh). The first share, `biased`, has one label permutation (Sec. 4.5). In the last,
    `merged`, rho merges classes at random into 2 to 9 (not in the paper): a learner that only met
    ten equally frequent classes fails on three, or where one is rare (results/recipe.md).
    """
    device, generator = dataset.x.device, stream(dataset.x.device, *key)
    chosen = draw_images(dataset, n_sequences, settings.NUM_EXAMPLES, generator)
    images, labels = F.embedding(chosen, dataset.x), dataset.y[chosen]   # faster than x[chosen]
    if num_tasks:
        numbers = torch.randint(num_tasks, (n_sequences,), generator=generator, device=device)
        tasks = [draw_task(settings.SEED, i, images.shape[-1], settings.PROJECTION_SIZE, device)
                 for i in numbers.tolist()]
        x = torch.stack([image @ projection.T for image, (projection, _) in zip(images, tasks)])
        rho = torch.stack([permutation for _, permutation in tasks])
    else:
        x = project_afresh(span(images), settings, generator)
        rho = torch.rand(n_sequences, C, generator=generator, device=device).argsort(1)
        if n := round(merged * n_sequences):
            few = torch.randint(2, C, (n, 1), generator=generator, device=device)
            into = torch.rand(n, C, generator=generator, device=device) * few
            rho[-n:] = rho[-n:].gather(1, into.long())
    rho[:round(biased * n_sequences)] = torch.arange(C, device=device)
    return x, rho.gather(1, labels)


# ---------------------------------------------------------------------------------------- model
def norm(x):
    """Return x (..., n) with mean zero and variance one over its last dimension, nothing learnt."""
    return F.layer_norm(x, x.shape[-1:])


# A classifier asks about many rows at once: the last `queries` examples of a sequence, of which
# each sees the T - queries before them and none of the others. So `shift`, mask and positions treat
# each as the one right after the context. (In meta-training `queries` is 1.)
def shift(x, queries):
    """Return x (B, T, n) moved on: example i gets what belongs to the example before it.

    The first gets zeros: "no example yet" is unlike every class, whose one-hot code has a one.
    """
    end = x.shape[1] - queries
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :end],
                      x[:, end - 1:end].expand(-1, queries - 1, -1)], 1)


def cosines_of(gram):
    """Return the cosines (B, T, T) between vectors, from their inner products gram (B, T, T)."""
    length = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-12).sqrt()
    return gram / (length[:, :, None] * length[:, None])


def image_cosines(x, queries):
    """Return (4, B, T, T): how alike the images of token i and of token j are, from x (B, T, n).

    A token holds two images, its query x_i and the labelled x_i-1. In order: query i with labelled
    j, labelled with labelled, query with query, labelled with query.
    """
    with torch.autocast(x.device.type, enabled=False):
        query = cosines_of(x.float() @ x.float().mT)
    labelled = shift(query, queries)
    return torch.stack([labelled.mT, shift(labelled.mT, queries), query, labelled])


def ridge_weights(cosines, queries, mask, width=0.25, penalty=0.03):
    """Return (B, T, T): what token j's label weighs in a kernel ridge regression for query i, from
    the images' cosines (B, T, T), where `mask` (T, T) lets it look.

    w_i = (K_i + penalty)^-1 k_i, where K = exp((cosines - 1) / width), K_i = K[:i, :i] are the
    examples before i among themselves, and k_i = K[:i, i]: a least-squares look-up (the mesa-layer
    of von Oswald et al. 2023), whose weights may be negative. All i at once, from one factor
    L L' = K + penalty: L_i = L[:i, :i] is the factor of K_i + penalty, and row i of L left of the
    diagonal is L_i^-1 k_i; so w_i = L[i, :i] L_i^-1, one triangular system for all.
    """
    T, n = cosines.shape[1], cosines.shape[1] - queries
    with torch.autocast(cosines.device.type, enabled=False):
        kernel = ((cosines - 1) / width).exp()
        L = cholesky(kernel + penalty * torch.eye(T, device=kernel.device))[..., :n]
        weights = torch.linalg.solve_triangular(L[:, :n], L.tril(-1), upper=False, left=False)
    labelled = shift(F.pad(weights, (0, queries)).mT, queries).mT        # as the tokens hold them
    return torch.where(mask == 0, labelled, 0)


def causal_mask(length, queries, device):
    """Return (T, T): 0 where row i may look at column j, minus infinity elsewhere."""
    i = torch.arange(length, device=device)
    context = (i < i[:, None]) & (i < length - queries)
    return torch.where(context | (i == i[:, None]), 0.0, -math.inf)


def comparison(s):
    """Return how attention compares images: "exact" (as they are), "learnt" (projected) or None."""
    if s.ARCHITECTURE != "transformer" or s.TOKEN_FORMAT != "pairs":
        return None
    return "exact" if s.COMPARE_IMAGES else "learnt" if s.GUIDED_START else None


def sharpness(length, queries, trained, device):
    """Return (T, 1): what attention scores are multiplied by after n examples, log n / log trained.

    The more examples, the sharper attention must be to find the near ones. It is one up to the
    trained length, where training has found the scale.
    """
    n = torch.arange(length, device=device).clamp(max=length - queries)
    return (n.clamp(min=trained).log() / math.log(trained))[:, None]


class Surroundings(NamedTuple):
    """What attention needs to know of a sequence besides the residual stream."""
    queries: int                           # how many of the last are asked about side by side
    mask: torch.Tensor                     # (T, T) from causal_mask
    sharpness: float | torch.Tensor        # (T, 1) factor of the scores from sharpness(), or 1
    seen: torch.Tensor                     # (B, T, n) images as compared: x, or learnt projections
    cosines: torch.Tensor | None           # (4, B, T, T) from image_cosines
    ridge: torch.Tensor | None             # (B, T, T) from ridge_weights


def residual_output(inputs, outputs, settings):
    """Return a matrix that writes to the residual stream; it starts at zero, or with OUTPUT_STD."""
    matrix = nn.Linear(inputs, outputs, bias=False)
    if settings.OUTPUT_STD:
        nn.init.normal_(matrix.weight, std=settings.OUTPUT_STD * inputs**-0.5)
    else:
        nn.init.zeros_(matrix.weight)
    return matrix


class Attention(nn.Module):
    """Causal multi-head attention with normalised queries and keys and a learnt scale per head.

    With COMPARE_IMAGES every head adds a learnt mixture of the four image cosines to its scores.
    So images are compared in full: the residual stream's few numbers would blur their distances.
    The mixtures start as nearest-neighbour look-ups of several sharpnesses, in the first layer
    between query and labelled images, later half of them among labelled images.
    Without them, the black box, GUIDED_START makes the first layer's queries and keys learnt
    projections of the images, wider than the stream and tied; or, with TOKEN_FORMAT "paper", its
    heads look at the token before, whose image the label belongs to.
    With RIDGE_ATTENTION every head adds a learnt multiple (at first one in layer 1, zero in others)
    of a kernel ridge regression of its values, on the cosines of images or learnt projections.
    """

    def __init__(self, settings, first):
        super().__init__()
        size, self.heads = settings.MODEL_SIZE, settings.NUM_HEADS
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = residual_output(size, size, settings)
        self.tied = first and comparison(settings) == "learnt"
        scales = (8, 32) if self.tied else (2, settings.ATTENTION_SCALE)
        self.log_scale = nn.Parameter(torch.linspace(*map(math.log, scales), self.heads))
        self.mixture = self.ridge = self.back = None
        if comparison(settings) == "exact":
            start = torch.zeros(self.heads, 4)           # to hold sharpnesses of 8 ... 32
            for head in range(self.heads):
                start[head, 0 if first else head % 2] = 8 * 4 ** (head / max(1, self.heads - 1))
            self.mixture = nn.Parameter(start / MIXTURE_SCALE)
        elif settings.GUIDED_START and first and settings.TOKEN_FORMAT == "paper":
            self.back = nn.Parameter(torch.full((self.heads, 1, 1, 1), 10.0))
        if settings.RIDGE_ATTENTION and comparison(settings):
            self.ridge = nn.Parameter(torch.full((self.heads, 1, 1, 1), float(first)))

    def forward(self, h, around):
        B, T, D = h.shape
        qkv = self.qkv(h).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 3, 0, 1, 4).contiguous()                # each (H, B, T, D / H)
        if self.tied:
            q, k = (a.view(B, T, self.heads, -1).permute(2, 0, 1, 3)
                    for a in (around.seen, shift(around.seen, around.queries)))
        scale = (self.log_scale.exp() / q.shape[-1])[:, None, None, None]    # q k' / size: cosine
        q, k = (norm(q) * (scale * around.sharpness)).to(v.dtype), norm(k).to(v.dtype)
        # Written out: fused kernels take no learnt bias, and their gradient is slow on CPUs. Sums
        # in fp32, since bf16 would round a score of 32 to a multiple of 1/4; in place is slower.
        scores = q @ k.mT + around.mask
        if self.mixture is not None:
            with torch.autocast(h.device.type, enabled=False):
                mixture = MIXTURE_SCALE * self.mixture @ around.cosines.flatten(1)
            scores = mixture.view(scores.shape) + scores
        if self.back is not None:
            scores = scores + self.back * shift(torch.eye(T, device=h.device)[None], around.queries)
        mixed = scores.softmax(-1).to(v.dtype) @ v
        if self.ridge is not None:
            values = v.permute(1, 2, 0, 3).reshape(B, T, D)              # of all heads at once
            found = (around.ridge.to(v.dtype) @ values).view(B, T, self.heads, -1)
            mixed = mixed + self.ridge * found.permute(2, 0, 1, 3)
        return self.out(mixed.permute(1, 2, 0, 3).reshape(B, T, D))


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then an MLP, each added to the residual stream.

    In other architectures another layer takes the place of attention; in the MLP nothing does: it
    sees its own token only and can but memorise (paper, heat maps).
    """

    def __init__(self, settings, first):
        super().__init__()
        mixer = MIXERS[settings.ARCHITECTURE]
        self.attention = mixer and mixer(settings, first)
        self.up = nn.Linear(settings.MODEL_SIZE, settings.MLP_SIZE, bias=False)
        self.down = residual_output(settings.MLP_SIZE, settings.MODEL_SIZE, settings)

    def forward(self, h, around):
        h = h + self.attention(norm(h), around) if self.attention else h
        return h + self.down(F.gelu(self.up(norm(h))))


class InContextModel(nn.Module):
    """Causal sequence model, by default a Transformer: predicts classes from the examples before.

    TOKEN_FORMAT "paper": token i is (A x_i, y_i-1), with learnt positions (paper, Sec. 3).
    "pairs": token i is (A x_i, A x_i-1, y_i-1). The label stands beside its own image, so that no
    layer has to be spent on finding "the label of the image before"; no positions are needed.
    """

    def __init__(self, settings):
        super().__init__()
        self.settings, size, inputs = settings, settings.MODEL_SIZE, outputs_read(settings)
        width = size // 2 if settings.TOKEN_FORMAT == "pairs" else size
        self.embed_image = nn.Linear(inputs, width, bias=False)
        self.embed_label = nn.Linear(C, size, bias=False)
        nn.init.normal_(self.embed_image.weight, std=1 / 8)              # see forward
        nn.init.normal_(self.embed_label.weight, std=3 * C**-0.5)
        self.positions = self.glance = None
        if settings.TOKEN_FORMAT == "paper":
            self.positions = nn.Parameter(0.02 * torch.randn(settings.NUM_EXAMPLES, size))
        if comparison(settings) == "learnt":
            self.glance = nn.Linear(inputs, 256 * settings.NUM_HEADS, bias=False)
            nn.init.normal_(self.glance.weight)          # only cosines matter: to suit Adam's steps
        self.layers = nn.ModuleList(Block(settings, i == 0) for i in range(settings.NUM_LAYERS))
        if "lstm" in settings.ARCHITECTURE and settings.GUIDED_START and self.positions is None:
            start_with_class_means(self.layers[0].attention, self.embed_label.weight)
        self.head = nn.Linear(size, C, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x, y, queries=1):
        """Return logits (B, T, C) for x (B, T, P) and y (B, T); those of i never use y_i.

        The last `queries` examples don't see each other: each comes after the same T - queries.
        """
        T, inputs = x.shape[1], self.embed_image.in_features
        read = x[..., :inputs] * (8 * inputs**-0.5)      # not smaller weights, for Adam's sake
        h = self.embed_image(read)
        if self.positions is None:
            h = torch.cat([h, shift(h, queries)], -1)
        else:
            h = h + self.positions[torch.arange(T, device=x.device).clamp(max=T - queries)]
        h = h + self.embed_label(shift(F.one_hot(y, C).to(x.dtype), queries))
        trained = max(2, self.settings.NUM_EXAMPLES - 1)
        sharp = sharpness(T, queries, trained, x.device) if T - queries > trained else 1.0
        mask, compare = causal_mask(T, queries, x.device), comparison(self.settings)
        seen = x if self.glance is None else self.glance(read)
        ridge = compare and self.settings.RIDGE_ATTENTION
        cosines = image_cosines(seen, queries) if compare == "exact" or ridge else None
        around = Surroundings(
            queries, mask, sharp, seen, cosines * sharp if compare == "exact" else None,
            ridge_weights(cosines[2], queries, mask) if ridge else None)
        for layer in self.layers:
            h = layer(h, around)
        return self.head(norm(h))


def check_context(model, n):
    """Raise UserError if n examples are more than a model has learnt positions for."""
    positions = getattr(model, "positions", None)
    if positions is not None and n >= len(positions):
        raise UserError(f"{n} examples; this model with TOKEN_FORMAT=paper has learnt "
                        f"positions for at most {len(positions) - 1} examples.")


def make_model(s):
    """Return a new model of the ARCHITECTURE of settings `s`, with random weights."""
    return dict(vsml=VSML, vsml_free=VSML, maml=MAML).get(s.ARCHITECTURE, InContextModel)(s)


# --------------------------------------------------------------------------------- meta-training
class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal before each step (Jordan et al. 2024).

    Does what torch.optim.Muon does with adjust_lr_fn="match_rms_adamw" (updates as large as
    AdamW's: one rate serves both), but in the precision of the run, and for all matrices of a shape
    at once. Torch's, always in bf16, took a quarter of each step where that is slow.
    """

    def __init__(self, params, lr, weight_decay, dtype):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, momentum=0.95):
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"].lerp_(p.grad, 1 - momentum)
                alike.setdefault(p.shape, []).append((p, p.grad.lerp(mean, momentum)))
            for shape, pairs in alike.items():
                params, updates = zip(*pairs)
                updates = orthogonal(torch.stack(updates).to(self.dtype)).to(params[0].dtype)
                rate = group["lr"] * 0.2 * max(shape)**0.5
                for p, new in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(new, alpha=rate)


def orthogonal(a):
    """Return matrices a (n, rows, columns), singular values made about one (Newton, Schulz)."""
    x = a.mT if a.shape[1] > a.shape[2] else a
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):                                   # a quintic that starts steeply
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x.mT if a.shape[1] > a.shape[2] else x


def make_optimizers(model, s, precision):
    """Return the optimisers; every parameter is in exactly one of them.

    Muon takes the matrices inside the layers; embeddings, head and scalars are AdamW's.
    """
    hidden = [p for p in getattr(model, "layers", nn.Module()).parameters()
              if s.OPTIMIZER == "muon" and p.ndim == 2 and min(p.shape) > C]
    rest = [p for p in model.parameters() if not any(p is other for other in hidden)]
    adam = torch.optim.AdamW(rest, s.LEARNING_RATE, betas=(0.9, s.ADAM_BETA2), eps=s.ADAM_EPSILON,
                             weight_decay=s.WEIGHT_DECAY)
    muon = [Muon(hidden, s.LEARNING_RATE, s.WEIGHT_DECAY, DTYPES[precision])] if hidden else []
    return [adam, *muon]


def learning_rate(step, settings):
    """Return the rate of a step: linear warm-up, constant, linear decay to zero."""
    warm_up = (step + 1) / max(1, settings.WARMUP_STEPS)
    decay = (settings.STEPS - step) / max(1.0, settings.DECAY_FRACTION * settings.STEPS)
    return settings.LEARNING_RATE * min(1.0, warm_up, decay)


def logits_of(model, x, y, precision):
    """Return logits (B, T, C) as fp32, computed in "bf16" or "fp32"; tests need finite ones."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(x, y).float()
    if not torch.is_grad_enabled() and (~logits.isfinite()).any():
        raise UserError("logits are not finite; try a lower LEARNING_RATE or PRECISION=fp32.")
    return logits


def update(model, optimizers, x, y, step, settings, precision):
    """Make step number `step` on sequences x (B, T, P), y (B, T); return the loss.

    The loss is the mean cross-entropy (nats) of every prediction, so of every prefix (Eq. 2).
    Raises UserError where it or its gradient is not finite; the model stays as it was.
    """
    loss = F.cross_entropy(logits_of(model, x, y, precision).flatten(0, 1), y.flatten())
    loss.backward()
    size = nn.utils.clip_grad_norm_(model.parameters(), settings.GRADIENT_CLIP)
    loss = loss.item()
    if not math.isfinite(loss + size.item()):
        raise UserError(f"the loss or its gradient is not finite at step {step + 1}; what was saved"
                        " before is kept. Try a lower --LEARNING_RATE than "
                        f"{settings.LEARNING_RATE:g}, or --PRECISION=fp32.")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        optimizer.zero_grad()
    return loss


def training_batch(dataset, step, settings, precision):
    """Return x (B, T, P) and y (B, T) of a step: the same at every call."""
    # Where fp32 products may round, oneDNN makes them: on an AMD, unrounded, in half of MKL's time.
    products, former = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    products.fp32_precision = "bf16" if precision == "bf16" else former
    batch = draw_sequences(dataset, settings.BATCH_SIZE, settings, ("train", settings.SEED, step),
                           settings.NUM_TASKS, settings.BIASED_FRACTION, settings.MERGED_FRACTION)
    products.fp32_precision = former
    return batch


def learning_steps(model, optimizers, dataset, settings, precision, first=0):
    """Meta-train `model` in place from step number `first` on (paper, Sec. 3, Alg. 1); after each
    step yield how many were made, the loss, the seconds it took, and those to draw its batch.
    Under torchrun every process draws the whole batch and learns from its share of it.
    """
    rank, world = processes()
    model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    for step in range(first, settings.STEPS):
        began = clock(dataset.x.device)
        x, y = training_batch(dataset, step, settings, precision)
        drawn = clock(dataset.x.device)
        loss = update(model, optimizers, x[rank::world], y[rank::world], step, settings, precision)
        yield step + 1, loss, clock(dataset.x.device) - began, drawn - began


def resume(path, settings, model, optimizers=()):
    """Put a checkpoint into model and optimisers; return its progress, None if there is none."""
    if not path.exists():
        return None
    saved = load_checkpoint(path, settings)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved.get("optimizers", ()), strict=True):
        optimizer.load_state_dict(state)
    return saved["progress"]


def meta_train(model, dataset, validation, settings, folder, precision, log):
    """Train `model` in place; return a dict of what happened. Continues the folder's checkpoint.
    Raises KeyboardInterrupt after Ctrl-C or SIGTERM, leaving a checkpoint of the very last step.
    """
    rank, path = processes()[0], folder / "checkpoint.pt"
    optimizers = make_optimizers(model, settings, precision)
    progress = resume(path, settings, model, optimizers) or dict(
        step=0, seconds=0.0, drawing_seconds=0.0, rows=[])
    if progress["step"]:
        log(f"Continuing after step {progress['step']} of {path}")
    log(*progress_table(progress["rows"], settings))
    saved_at = time.time()
    bar = tqdm(total=settings.STEPS, initial=progress["step"], unit="step", smoothing=0.05,
               disable=True if rank else None, dynamic_ncols=True, leave=False)
    with stop_requests() as stopping, bar:
        for step, loss, seconds, drawing in learning_steps(
                model, optimizers, dataset, settings, precision, progress["step"]):
            loss, stop = agree(loss, bool(stopping), dataset.x.device)
            progress["step"] = step
            progress["seconds"] += seconds
            progress["drawing_seconds"] += drawing
            rate, done = learning_rate(step - 1, settings), step == settings.STEPS
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", rate=f"{rate:.1e}", refresh=False)
            if rank == 0 and (done or step % settings.ROW_EVERY == 0):
                n = settings.ROW_SEQUENCES
                hits, *_ = count_hits(model, validation, n, settings, precision)
                progress["rows"].append(dict(step=step, seconds=progress["seconds"], loss=loss,
                                             rate=rate, accuracy=(hits["in-context"] / n).tolist()))
                log(progress_table(progress["rows"], settings)[-1])
            if rank == 0 and (done or stop or time.time() > saved_at + settings.CHECKPOINT_SECONDS):
                save_checkpoint(path, settings, model, progress=progress,
                                optimizers=[optimizer.state_dict() for optimizer in optimizers])
                saved_at = time.time()
            if stop or done and stopping:
                raise KeyboardInterrupt(f"Stopped after step {step}; the same command goes on.")
    return progress


# ----------------------------------------------------------------------------------- evaluation
def interval(successes, n):
    """Return the 95 % Wilson interval (low, high) of a proportion; arrays work too."""
    z, p = 1.959964, np.asarray(successes) / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return np.maximum(centre - half, 0), np.minimum(centre + half, 1)


# The classical learners see exactly what the model sees. All they need of it are the cosines
# (B, n + 1, n + 1) of the n examples and the query, which is last, and the one-hot labels targets
# (B, n, C). Each returns scores (B, 1, C). Their constants, and that images have unit length, are
# what did best on MNIST validation images (results/recipe.md).
def nearest_neighbour(cosines, targets):
    nearest = cosines[:, -1, :-1].argmax(1)
    return F.one_hot(nearest, targets.shape[1]).float()[:, None] @ targets


def nearest_centroid(cosines, targets):
    mean = targets / targets.sum(1, keepdim=True).clamp_min(1)
    square = torch.einsum("bic,bij,bjc->bc", mean, cosines[:, :-1, :-1], mean)
    return 2 * cosines[:, -1:, :-1] @ mean - square[:, None]


def ridge(products, targets, penalty=0.3):
    """Least squares on one-hot labels."""
    seen = products[:, :-1, :-1] + penalty * torch.eye(targets.shape[1])
    return products[:, -1:, :-1] @ torch.linalg.solve(seen, targets)


def kernel_ridge(cosines, targets, penalty=0.01, width=0.5):
    """Ridge with a Gaussian kernel."""
    return ridge(((cosines - 1) / width).exp(), targets - 1 / C, penalty)


def sgd(cosines, targets, rate=1.0, epochs=10):
    """Softmax regression by plain SGD, one example after another, in passes over the context.

    In its dual form: the weights are a sum of the examples, so only its coefficients are stepped.
    """
    coefficients = torch.zeros_like(targets)
    for _ in range(epochs):
        for i in range(targets.shape[1]):
            logits = (cosines[:, i:i + 1, :-1] @ coefficients)[:, 0]
            coefficients[:, i] += rate * (targets[:, i] - logits.softmax(-1))
    return cosines[:, -1:, :-1] @ coefficients


CLASSICAL = {"1-nearest neighbour": nearest_neighbour, "nearest centroid": nearest_centroid,
             "ridge regression": ridge, "kernel ridge": kernel_ridge, "SGD (softmax)": sgd}


def eval_key(dataset, start, settings):
    """Return the place in the random stream of the meta-test sequences from number `start` on."""
    return "meta-test", dataset.name, start, *([settings.EVAL_SEED] if settings.EVAL_SEED else [])


def starts_and_sizes(n_sequences, length):
    """Return (first, number) of each batch of test sequences: smaller batches of long ones."""
    size = max(1, EVAL_BATCH * 400 // max(400, length))
    return ((start, min(size, n_sequences - start)) for start in range(0, n_sequences, size))


def evaluation_batches(dataset, n_sequences, settings, num_tasks=0):
    """Yield x, y of the meta-test sequences: the same for all models (fixed tasks: of a SEED)."""
    for start, n in starts_and_sizes(n_sequences, settings.NUM_EXAMPLES):
        yield draw_sequences(dataset, n, settings, eval_key(dataset, start, settings), num_tasks)


def classical_labels(gram, y):
    """Return {learner: predicted label (B,)} for the last example: one that occurs in y (B, n).

    gram (B, n + 1, n + 1) holds the products of all, on the CPU, where linear algebra is at home.
    """
    cosines, targets = cosines_of(gram), F.one_hot(y, C).float()
    missing = targets.sum(1) == 0
    return {name: learner(cosines, targets)[:, 0].masked_fill(missing, -math.inf).argmax(-1)
            for name, learner in CLASSICAL.items()}


@torch.no_grad()
def predictions(model, dataset, n_sequences, settings, precision, num_tasks=0, lengths=()):
    """Return ({learner: predicted labels (n, ...)}, labels y (n, T), our logits (n, T, C)).

    Ours after 0 .. T - 1 examples; the classical learners' after the numbers in `lengths`.
    """
    parts = []
    for x, y in evaluation_batches(dataset, n_sequences, settings, num_tasks):
        logits, y = logits_of(model, x, y, precision).cpu(), y.cpu()
        found = {"in-context": logits.argmax(-1)}
        if len(lengths):
            gram = (x @ x.mT).cpu()
            labels = [classical_labels(gram[:, :n + 1, :n + 1], y[:, :n]) for n in lengths]
            found |= {name: torch.stack([some[name] for some in labels], 1) for name in CLASSICAL}
        parts.append((found, y, logits))
    found, y, logits = zip(*parts)
    return ({name: torch.cat([part[name] for part in found]).numpy() for name in found[0]},
            torch.cat(y).numpy(), torch.cat(logits))


def count_hits(model, dataset, n, settings, precision, num_tasks=0, lengths=()):
    """Return {learner: in how many of n sequences it was right}, our logits and labels (n, T)."""
    found, y, logits = predictions(model, dataset, n, settings, precision, num_tasks, lengths)
    hits = {name: (labels == (y if name == "in-context" else y[:, list(lengths)])).sum(0)
            for name, labels in found.items()}
    return hits, logits, torch.from_numpy(y)


@torch.no_grad()
def count_averaged_hits(model, dataset, n_sequences, settings, precision):
    """Return in how many sequences the mean of several passes was right about the last example.

    The images and labels are those of evaluation_batches; each of AVERAGED_PASSES projects them
    afresh, permutes the labels and the order of the context, and the probabilities are averaged.
    """
    hits, T, device = 0, settings.NUM_EXAMPLES, dataset.x.device
    for start, n in starts_and_sizes(n_sequences, T):
        key = eval_key(dataset, start, settings)
        chosen = draw_images(dataset, n, T, stream(device, *key))
        coordinates, y = span(dataset.x[chosen]), dataset.y[chosen]
        total = torch.zeros(n, C, device=device)
        for i in range(settings.AVERAGED_PASSES):
            generator = stream(device, *key, "pass", i)
            order = torch.rand(n, T, generator=generator, device=device)
            order[:, -1] = 1                             # the query stays the last
            order = order.argsort(1)
            x = project_afresh(coordinates.take_along_dim(order[..., None], 1), settings, generator)
            rho = torch.rand(n, C, generator=generator, device=device).argsort(1)
            logits = logits_of(model, x, rho.gather(1, y.gather(1, order)), precision)[:, -1]
            total += logits.softmax(-1).gather(1, rho)
        hits += (total.argmax(-1) == y[:, -1]).sum().item()
    return hits


def evaluate(model, dataset, settings, precision, num_tasks=0):
    """Return {learner: curve} on EVAL_SEQUENCES meta-test sequences of unseen tasks, and the
    model's calibration error after the longest context.

    With `num_tasks`, on that fixed set. A curve has lists: examples, accuracy, its 95 % low, high.
    """
    n, lengths = settings.EVAL_SEQUENCES, context_lengths(settings)[1:]
    hits, logits, y = count_hits(model, dataset, n, settings, precision, num_tasks, lengths)
    ours = hits.pop("in-context")
    asked = slice(-1 if settings.ARCHITECTURE == "maml" else 0, None)    # it answers last only
    found = {MODELS[settings.ARCHITECTURE]: (range(len(ours))[asked], ours[asked]),
             **{name: (lengths, counts) for name, counts in hits.items()}}
    if settings.AVERAGED_PASSES and not num_tasks:
        hits = count_averaged_hits(model, dataset, n, settings, precision)
        found[f"mean of {settings.AVERAGED_PASSES} passes"] = lengths[-1:], np.array([hits])
    curves = {}
    for name, (examples, hits) in found.items():
        low, high = interval(hits, n)
        curves[name] = dict(examples=list(examples), accuracy=(hits / n).tolist(),
                            low=low.tolist(), high=high.tolist(), sequences=n)
    batches = zip(logits.split(EVAL_BATCH), y.split(EVAL_BATCH))         # in parts, for memory
    t = torch.cat([context_temperature(a[:, :-1], b[:, :-1]) for a, b in batches])[:, None]
    return curves, {kind: calibration_error((logits[:, -1] / by).softmax(1), y[:, -1])
                    for kind, by in (("raw", 1), ("fitted", t))}


def context_temperature(logits, y, prior=0.2):
    """Return (B,): what to divide the logits for a query by, to be as sure as is right.

    The context tells: logits (B, n, C) are those for its own n examples, each from the ones before
    it, and y (B, n) their labels. So data unlike those of the meta-training need no labels apart.
    The posterior mean of log temperature, whose prior is normal with mean 0 and that std.
    """
    grid = torch.linspace(-1, 2, 61, device=logits.device)
    losses = [F.cross_entropy((logits / t).mT, y, reduction="none").sum(1) for t in grid.exp()]
    return (grid @ (-torch.stack(losses) - (grid[:, None] / prior)**2 / 2).softmax(0)).exp()


def calibration_error(probabilities, y, bins=15):
    """Return the expected calibration error: the mean distance of confidence and accuracy over
    `bins` bins of confidence (Guo et al. 2017), for probabilities (n, C) and labels y (n,).
    """
    confidence, predicted = probabilities.max(1)
    gap = torch.zeros(bins).index_add(
        0, (confidence * bins).long().clamp(max=bins - 1), confidence - (predicted == y).float())
    return (gap.abs().sum() / len(y)).item()


def context_lengths(settings):
    """Return the columns of the printed tables: the last is the longest context there is."""
    last = settings.NUM_EXAMPLES - 1
    return [n for n in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500) if n < last] + [last]


# ---------------------------------------------------------------------- a classifier for any data
class InContextClassifier:
    """Classifies any data in context: the examples become the context, and nothing is trained.

    model            path of a model.pt, or an InContextModel
    n_ensemble       passes whose probabilities are averaged, each with a random projection, label
                     permutation and order of the examples of its own
    scaling          "shared": one mean and one scale for all features (images); "centred": a mean
                     of its own for each; "columns": a mean and a scale for each (tables); "auto":
                     shared for X of more than two dimensions, else columns, or centred where the
                     spreads are alike and no fewer examples are then of their neighbour's class
    temperature      divides the logits; None: context_temperature, of each pass
    random_state     seed of everything that is random

    Follows scikit-learn's conventions without needing it. Raises UserError for what can't be used.
    """

    _estimator_type = "classifier"                       # scikit-learn before 1.6 asks for this

    def __init__(self, model, n_ensemble=8, scaling="auto", temperature=None, random_state=0):
        self.model, self.n_ensemble, self.scaling = model, n_ensemble, scaling
        self.temperature, self.random_state = temperature, random_state

    def get_params(self, deep=True):
        return {name: getattr(self, name) for name in
                ("model", "n_ensemble", "scaling", "temperature", "random_state")}

    def set_params(self, **params):
        for name, value in params.items():
            if name not in (known := self.get_params()):
                raise UserError(f"there is no parameter {name!r}{did_you_mean(name, known)}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self):                          # since 1.6 for this
        from sklearn.utils import ClassifierTags, Tags, TargetTags
        return Tags(estimator_type="classifier", target_tags=TargetTags(required=True),
                    classifier_tags=ClassifierTags())

    def fit(self, X, y):
        """Take examples as the context: X (n, ...), numbers of any shape; y (n,), any labels."""
        x = as_rows(X)
        y = as_labels(y, len(x))
        if str(self.scaling) not in ("auto", "shared", "centred", "columns"):
            raise UserError(f"scaling: {self.scaling!r}; expected auto, shared, centred, columns.")
        classes, first, numbers = class_numbers(y, "y")
        network = self.model if isinstance(self.model, nn.Module) else load_model(self.model)[0]
        check_context(network, len(x))
        kind = getattr(getattr(network, "settings", None), "ARCHITECTURE", None)
        if kind != "transformer":
            raise UserError(f"this model has ARCHITECTURE={kind}; only a transformer of this "
                            "program answers many queries at once (classify: --CHECKPOINT=path).")
        self.network_, self.classes_, self.names_ = network, classes, column_names(X)
        # Numbered as they first appear: other names for the classes change nothing but names.
        self.slots_ = torch.as_tensor(first.argsort().argsort())
        self.labels_ = self.slots_[torch.as_tensor(numbers)]
        self.examples_, self.n_features_in_, self.shape_ = (x, y), x.shape[1], np.shape(X)[1:]
        mean, spread = x.mean(0), x.std(0, correction=0)
        scales = dict(shared=(x.mean(), x.std(correction=0)), columns=(mean, spread),
                      centred=(mean, spread.square().mean().sqrt()))
        uneven = spread.any() and spread.max() > 10 * spread[spread > 0].median()
        kinds = ([self.scaling] if self.scaling != "auto" else ["shared"] if np.ndim(X) > 2 else
                 ["columns"] if uneven else ["centred", "columns"])
        self.scaling_ = max(kinds, key=lambda k: neighbours_agree(scaled(x, *scales[k]), numbers))
        self.scale_ = scales[self.scaling_]
        return self

    @torch.no_grad()
    def predict_proba(self, X):
        """Return (n, classes): the probability of each class, in the order of classes_."""
        if not hasattr(self, "examples_"):
            raise UserError("this classifier has no examples yet; call fit(X, y) first.")
        x, context = as_rows(X), scaled(self.examples_[0], *self.scale_)
        if x.shape[1] != self.n_features_in_:
            raise UserError(f"X has {x.shape[1]} features, the examples {self.n_features_in_}.")
        if min(np.ndim(X), len(self.shape_) + 1) > 2 and np.shape(X)[1:] != self.shape_:
            raise UserError(f"X has images of shape {np.shape(X)[1:]}, the examples {self.shape_}.")
        names = column_names(X)
        if names and self.names_ and names != self.names_:
            raise UserError(f"X has the columns {names}, the examples {self.names_}.")
        if not isinstance(self.n_ensemble, (int, np.integer)) or self.n_ensemble < 1:
            raise UserError(f"n_ensemble is {self.n_ensemble!r}; expected 1 or more.")
        x, network, n = scaled(x, *self.scale_), self.network_, min(len(context), MAX_CONTEXT)
        device, shape = network.head.weight.device, (x.shape[1], network.settings.PROJECTION_SIZE)
        t, total = self.temperature, torch.zeros(len(x), len(self.classes_))
        if t is not None and not (isinstance(t, (int, float, np.number)) and 1e-6 <= t <= 1e6):
            raise UserError(f"temperature is {t!r}; expected 1e-6 to 1e6, or None.")
        if not isinstance(self.random_state, (int, np.integer)):
            raise UserError(f"random_state is {self.random_state!r}; expected a whole number.")
        for i in range(self.n_ensemble):
            generator = stream("cpu", int(self.random_state), "classifier", i)
            rho = torch.randperm(C, generator=generator)
            order = torch.randperm(len(context), generator=generator)[:n]
            labels = rho[self.labels_[order]].to(device)
            projection = torch.randn(shape, generator=generator).div_(shape[0]**0.5).to(device)
            seen, t = context[order].to(device) @ projection, self.temperature
            for part, out in zip(x.split(QUERIES), total.split(QUERIES)):
                shown = torch.cat([seen, part.to(device) @ projection])[None]
                logits = network(shown, F.pad(labels, (0, len(part)))[None], len(part)).float()
                t = t or context_temperature(logits[:, :n], labels[None])
                logits = (logits[0, n:] / t).cpu()[:, rho[self.slots_]]
                out += logits.softmax(-1) / self.n_ensemble
        return total.numpy()

    def predict(self, X):
        """Return (n,): the most probable class of each row."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]

    def score(self, X, y):
        """Return the share of rows whose class is predicted rightly."""
        predicted = self.predict(X)
        y = as_labels(y, len(predicted))
        if not np.isin(y, self.classes_).any():
            raise UserError(f"none of the labels y ({y[0]!r} ...) is one of {self.classes_}.")
        return float((predicted == y).mean())

    def save(self, path):
        """Write the fitted classifier, model and examples included, to a file for `load`."""
        if not hasattr(self, "examples_"):
            raise UserError("this classifier has no examples yet; call fit(X, y) first.")
        labels = [np.asarray(label).item() for label in self.examples_[1]]    # NumPy's don't load
        if self.classes_.dtype.kind in "mM" or {*map(type, labels)} - {str, int, float, bool}:
            raise UserError(f"labels like {self.classes_[0]} can't be saved; use words or numbers.")
        params = {k: np.asarray(v).item() for k, v in self.get_params().items() if k != "model"}
        params["scaling"] = str(self.scaling_)
        state = dict(params=params, x=self.examples_[0], y=labels, names=self.names_,
                     shape=list(self.shape_))
        save_checkpoint(Path(path), self.network_.settings, self.network_, classifier=state)

    @classmethod
    def load(cls, path):
        """Return the fitted classifier that `save` wrote."""
        network, saved = load_model(path)
        if "classifier" not in saved:
            raise UserError(f"{path} holds a model, but no classifier; make one with "
                            "InContextClassifier(path).fit(X, y).")
        state = saved["classifier"]
        classifier = cls(network, **state["params"]).fit(state["x"], np.array(state["y"]))
        classifier.names_ = state.get("names", [])
        classifier.shape_ = tuple(state.get("shape", classifier.shape_))
        return classifier


def as_rows(X):
    """Return X (n, ...) as numbers (n, features) on the CPU; raise UserError for anything else."""
    try:
        x = np.asarray(X.detach().cpu().to(torch.promote_types(X.dtype, torch.float64)) if
                       isinstance(X, torch.Tensor) else X)             # NumPy has no bfloat16
        if x.dtype.kind in "cmM":                        # complex, dates
            raise TypeError(f"they are {x.dtype}")
        x = x.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"X can't be read as an array of numbers ({error}).") from None
    if x.ndim < 2 or not x.size:
        raise UserError(f"X has shape {x.shape}; expected at least one row, (n, ...).")
    wrong = np.argwhere(~(np.abs(x) < 1e30))
    if len(wrong):
        raise UserError(f"X has NaN, infinite or huge numbers, first in row {wrong[0, 0] + 1}; "
                        "fill in or drop them.")
    return torch.from_numpy(x.reshape(len(x), -1))


def column_names(X):
    """Return the names of a data frame's columns as texts; none for other X."""
    return [*map(str, getattr(X, "columns", ()))]


def as_labels(y, n):
    """Return the labels y as an array of shape (n,); raise UserError for anything else."""
    try:
        kinds = {*map(type, y)} if isinstance(y, (list, tuple)) else ()
        y = np.asarray(y.detach().cpu() if isinstance(y, torch.Tensor) else y,
                       object if len(kinds) > 1 and str in kinds else None).copy()   # not as text
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the labels can't be read, one per row ({error}).") from None
    if y.shape != (n,):
        raise UserError(f"{n} rows, but labels of shape {y.shape}; expected one label per row.")
    return y


def scaled(x, mean, scale):
    """Return rows x scaled, with one constant feature more: so that angles tell distances too."""
    x = ((x - mean) / torch.where(scale > 0, scale, 1)).clamp(-1e4, 1e4).float()
    return F.pad(x, (0, 1), value=OFFSET)


def neighbours_agree(x, labels, most=2000):
    """Return the share of rows x (n, N) whose nearest other row, by its cosine, has their label."""
    every = -(-len(x) // most)
    x, labels = F.normalize(x[::every]), np.asarray(labels)[::every]
    nearest = (x @ x.T).fill_diagonal_(-2).argmax(1).numpy()
    return (labels[nearest] == labels).mean()


def class_numbers(y, name, most=C):
    """Return the classes of y, where each first occurs, and the number of each label's class."""
    try:
        kinds, first, numbers = np.unique(y, return_index=True, return_inverse=True)
    except TypeError as error:
        raise UserError(f"{name}: the labels are of several types ({error}).") from None
    if (kinds != kinds).any():
        raise UserError(f"{name}: row {first[kinds != kinds][0] + 1} has NaN for a label.")
    if not 2 <= len(kinds) <= most:
        raise UserError(f"{name}: {len(kinds)} classes; this model tells 2 to {most} apart.")
    return kinds, first, numbers


# ----------------------------------------------------------------------------------------- data
def as_dataset(name, x, y, size, device, most=C):
    """Return a Dataset of arrays x (n, ...) and y (n,): z-normalised by one mean and one std.

    Images (n, h, w), (n, h, w, c) or (n, c, h, w) are resized to `size`; rows (n, N) stay as they
    are. Labels of any kind become 0 .. classes - 1. Raises UserError for what can't be used.
    """
    x, y = np.asarray(x), np.asarray(y)
    if not 2 <= x.ndim <= 4 or y.ndim != 1 or len(x) != len(y) or not x.size:
        raise UserError(f"{name}: x has shape {x.shape} and y {y.shape}; expected one row of x per "
                        "label: rows (n, N) or images (n, h, w) or (n, h, w, c), and y (n,).")
    if x.dtype.kind not in "biuf":
        raise UserError(f"{name}: x holds {x.dtype}; expected numbers.")
    kinds, _, y = class_numbers(y, name, most)
    with np.errstate(all="ignore"):                      # what is too large is refused below
        x = torch.as_tensor((x - x.mean(dtype=float) if x.itemsize > 2 else x).astype(np.float32))
    if not 0 < x.std() < math.inf:
        raise UserError(f"{name}: x is constant or has NaN, infinite or huge values; clean it.")
    if x.ndim > 2:
        x = x.movedim(-1, 1) if x.ndim == 4 and x.shape[-1] < min(5, x.shape[1]) else x
        x = x[:, None] if x.ndim == 3 else x
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    x = (x - x.mean()).flatten(1) / x.std()
    return Dataset(printable(name), x.to(device), torch.as_tensor(y).long().to(device), len(kinds))


def printable(name):
    """Return a name as text that every file takes, and figures: two $ there mean mathematics."""
    return name.replace("$", "_").encode(errors="replace").decode()


def torchvision_arrays(name, train, folder):
    """Return the images and labels of one of torchvision's data sets, downloading if need be."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:         # "operator torchvision::nms ..."
        raise UserError(
            f"torchvision does not fit torch {torch.__version__} ({error}); install both from the "
            "same place, for example: pip install --force-reinstall torch torchvision --index-url "
            "https://download.pytorch.org/whl/cpu") from error
    known = [n for n in datasets.__all__ if n[0].isupper() and not n.startswith("Fake")]
    if name not in known:
        raise UserError(f"data set {name!r} is neither a torchvision data set nor an .npz file"
                        f"{did_you_mean(name, [*known, *RENDERED, 'Random'])}")
    make = getattr(datasets, name)
    place = Path(folder, name, "raw") if hasattr(make, "raw_folder") else Path(folder)
    arguments = make.__init__.__code__.co_varnames
    split = dict(train=train) if "train" in arguments else dict(split="train" if train else "test")
    split |= dict(split="digits", train=train) if name == "EMNIST" else {}
    try:
        with contextlib.redirect_stdout(None):           # its progress goes to stderr
            data = make(folder, download=True, **split)
        labels = data.targets if hasattr(data, "targets") else data.labels
        return np.asarray(data.data), np.asarray(labels)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, ImportError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (OSError, ImportError)) or re.search("download|not found", words):
            raise DataUnavailable(f"{name} can't be had: it is not in {place} (put its files there)"
                                  f" and can't be downloaded, or read ({words}).") from error
        raise UserError(f"{name} in {place} can't be read ({words}); if it is damaged, delete its "
                        "files and run again to get them afresh.") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{name} can't be used as a data set here: {error}.") from error


def render_characters(characters, n, seed):
    """Return n grey images (n, 28, 28) of the characters and their numbers: stands in for MNIST.

    Drawn from matplotlib's own fonts in three stroke widths, then turned, scaled, slanted, shifted
    and bent: so much that 1-nearest neighbour on 99 examples is right in about 70 %, as on MNIST.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont          # matplotlib brings Pillow along
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    paths = [path for path in sorted(folder.glob("*.ttf")) if re.match(
        r"(DejaVuSans|DejaVuSansMono|DejaVuSerif|STIXGeneral|cm(b|r|ss|ti|tt)10)[^D]*$", path.stem)]
    fonts, drawn = [ImageFont.truetype(str(path), 40) for path in paths], []
    for font, stroke, character in itertools.product(fonts, range(3), characters):
        image = Image.new("L", (56, 56))
        ImageDraw.Draw(image).text((28, 28), character, 255, font, "mm", stroke_width=stroke)
        drawn.append(np.asarray(image))
    drawn = torch.tensor(np.array(drawn)).view(-1, len(characters), 56, 56)
    g = torch.Generator().manual_seed(seed)
    style = torch.randint(len(drawn), (n,), generator=g)
    label = torch.randint(len(characters), (n,), generator=g)

    turn, scale, slant, right, down = (torch.empty(n).uniform_(*ends, generator=g) for ends in (
        (-0.15, 0.15), (0.9, 1.1), (-0.15, 0.15), (-0.03, 0.03), (-0.03, 0.03)))
    affine = torch.stack([scale * turn.cos(), scale * (slant - turn.sin()), right,
                          scale * turn.sin(), scale * turn.cos(), down], 1).view(n, 2, 3)
    bend = F.interpolate(0.02 * torch.randn(n, 2, 4, 4, generator=g), (28, 28), mode="bicubic")
    images = []
    for part in torch.arange(n).split(2048):             # in parts: float images are large
        grid = F.affine_grid(affine[part], (len(part), 1, 28, 28), align_corners=False)
        image = drawn[style[part], label[part]][:, None].float()
        image = F.grid_sample(image, grid + bend[part].movedim(1, -1), align_corners=False)
        images.append(image[:, 0].clamp(0, 255).byte())
    return torch.cat(images).numpy(), label.numpy()


def rendered_arrays(name, train, folder):
    """Return rendered images and labels, from `folder` if they have been made before."""
    path = Path(folder, name, "train.npz" if train else "test.npz")
    if not path.exists():
        make_folder(path.parent, "DATA_DIR")
        x, y = render_characters(RENDERED[name], 20000 if train else 5000, seed=int(train))
        with replacing(path) as temporary:
            np.savez_compressed(temporary, x=x, y=y)
    return npz_arrays(path)


def random_arrays(name, train, folder):
    """Return ten random points as images (n, 28, 28), many times each: every class is one point."""
    y = np.arange(2000) % 10
    return np.random.default_rng(int(train)).standard_normal((10, 28, 28))[y], y


def npz_arrays(path, labels=True):
    """Return x and y of an .npz file; where `labels` need not be there, y may be None."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("x", "y") if name in file}
    except FileNotFoundError as error:
        raise DataUnavailable(f"there is no file {path}; give the path of an .npz file.") from error
    except OSError as error:
        raise UserError(f"can't read {path}: {error}.") from error
    except Exception as error:                           # zipfile and numpy raise many kinds
        raise UserError(f"{path} can't be read as an .npz file ({error}); make it with numpy.savez("
                        "path, x=x, y=y), or delete it if this program made it.") from error
    missing = [name for name in ("x", "y") if name not in arrays and (labels or name == "x")]
    if missing:
        raise UserError(f"{path} has no array {'/'.join(missing)}; expected x (n, ...), y (n,).")
    return arrays["x"], arrays.get("y")


def number(text):
    """Return the text as a number, None if it is none: neither words nor 1_000, nan, inf."""
    with contextlib.suppress(ValueError):
        if "_" not in text and math.isfinite(value := float(text)):
            return value


def plain(label):
    """Return a label as text: 1, 1.0 and "1" are the same one, "01" is another."""
    text = str(label)
    return str(float(text)) if re.fullmatch(r"[+-]?(0|[1-9]\d{0,14})(\.\d*)?", text) else text


def csv_lines(path):
    """Return (line number, cells) of a .csv file's lines, whether by comma, semicolon or tab."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        first = re.sub('"[^"]*"', "", text).strip("\n").partition("\n")[0]
        separator = max(";\t,", key=first.count)         # of as many, not the comma: 1,5;2,5
        reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
        return [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"can't read {path}: {error}.") from error


def read_csv(path, label_column, features=None, names=None):
    """Return x (n, features), labels (n,) and the features' names of a .csv file.

    A first line is a header if it has a word above a feature (and no other numbers than whole
    ones), or above labels that are numbers, or counts 0, 1, 2 ... as pandas does (of a test, where
    `features` are so many: if it has the same `names`); without one, names are None. The labels are
    in the column `label_column`: "last", a name in a header (numbers are names in one of 0, 1, 2
    ... only), or its number from 1. With as many columns as `features` there are none.
    """
    lines = csv_lines(path)
    first = lines[0][1] if lines else []
    width, place = len(first), len(first) - 1
    if width < 2 if features is None else width - features not in (0, 1):
        raise UserError(f"{path} has {width} columns; expected {features or 'some'} of features "
                        "and, but for a test, one of labels, separated by commas.")
    for line, row in lines:
        if len(row) != width:
            raise UserError(f"{path}: line {line} has {len(row)} values, the first has {width}.")
    labelled, counting = width != features, [*map(str, range(width))]  # pandas names columns so
    likely = features is None or names is not None       # a header; not where the examples had none
    counted = likely and first == counting
    named = labelled and label_column in set(first) - {"last"} and (
        counted or not label_column.isdecimal())
    if named:
        place = first.index(label_column)
        if label_column in first[place + 1:]:
            raise UserError(f"{path} has several columns {label_column!r}; give one a new name.")
    elif labelled and label_column != "last":
        if label_column not in [str(i + 1) for i in range(width)]:
            raise UserError(f"{path} has no column {label_column!r}; its first line is: "
                            f"{', '.join(first)[:200]}.")
        place = int(label_column) - 1
    columns = [i for i in range(width) if not (labelled and i == place)]
    words, below = [first[i] for i in columns], [number(row[place]) for _, row in lines[1:]]
    worded = [number(cell) is None and cell.lower() not in MISSING for cell in first]
    numbered = width > 2 and words == counting[:-1] and (counted or worded[place])
    titled = worded[place] and len(below) > 0 and None not in below    # a word above numbers
    values = any(number(word) is not None and not word.isdecimal() for word in words)    # no names
    header = named or not values and (any if likely else all)(worded[i] for i in columns) or (
        numbered or titled if features is None else words == names)
    if header and "" in first:
        raise UserError(f"{path}: column {first.index('') + 1} has no name in the first line; if "
                        "it only numbers the rows, leave it out (pandas: index=False).")
    x, labels = [], []
    for line, row in lines[header:]:
        x.append([number(row[i]) for i in columns])
        labels.append(row[place])
        if None in x[-1]:
            column = columns[x[-1].index(None)]
            raise UserError(f"{path}: {row[column]!r} in line {line}, column {column + 1}, is not "
                            f"a number; LABEL_COLUMN, for the labels, is column {place + 1}.")
        if labelled and row[place] in ("", "nan", "NaN"):
            raise UserError(f"{path}: line {line} has no label in column {place + 1}.")
    if not x:
        raise UserError(f"{path} has no rows below its first line, the columns' names.")
    if all(re.fullmatch(r"[+-]?(0|[1-9]\d{0,14})(\.0*)?", label) for label in labels):
        labels = [int(float(label)) for label in labels]    # "1" and "1.0" are one class; not "01"
    return np.array(x), np.array(labels) if labelled else None, words if header else None


def read_examples(path, label_column, features=None, names=None):
    """Return x, labels and feature names of a .csv or .npz file; None for what it lacks."""
    if not str(path).endswith(".npz"):
        return read_csv(path, label_column, features, names)
    return *npz_arrays(path, labels=features is None), None


def load_dataset(name, split, settings, device):
    """Return the "train" or "test" images of a data set, by name or .npz path, on `device`.

    About a seventh of an .npz file's rows is its test, by their contents: adding rows moves none. A
    data set that was not trained on is "unseen": all rows of a file, the test images of the others.
    Raises DataUnavailable where there is no such data, UserError where it can't be used.
    """
    if of_file := name.endswith(".npz"):
        arrays, name = npz_arrays(name), Path(name).stem
    else:
        source = {**dict.fromkeys(RENDERED, rendered_arrays), "Random": random_arrays}.get(
            name, torchvision_arrays)
        arrays = source(name, split == "train", settings.DATA_DIR)
    dataset = as_dataset(name, *arrays, settings.IMAGE_SIZE, device)
    if of_file:
        keys = np.array([int(hashlib.blake2b(row.tobytes(), digest_size=6).hexdigest(), 16)
                         for row in arrays[0]])
        order, n_test = keys.argsort(), (keys < 2**48 / 7).sum()       # files may be sorted
        rows = dict(unseen=order, test=order[:n_test], train=order[n_test:])[split]
        dataset = dataset._replace(x=dataset.x[rows], y=dataset.y[rows])
    if len(dataset.y) < settings.NUM_EXAMPLES:
        raise UserError(f"{name} has {len(dataset.y)} rows ({split}); a sequence needs "
                        f"NUM_EXAMPLES={settings.NUM_EXAMPLES} different ones.")
    return dataset


# ------------------------------------------------------------------------- plumbing: checkpoints
@contextlib.contextmanager
def stop_requests():
    """Yield a list that Ctrl-C or SIGTERM makes non-empty; a second one stops at once."""
    requests = []

    def note(number, frame):
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    main = threading.current_thread() is threading.main_thread()      # no other may catch them
    former = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield requests
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def replacing(path, called=None):
    """Yield a temporary path that becomes `path` in one step; raise UserError where it can't."""
    called, temporary = called or path, None
    try:
        path = path.resolve()                            # of a link, what it points to
        temporary = path.parent / f"{path.stem}.{os.getpid()}.tmp{path.suffix}"
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:             # RuntimeError: torch, of a full disk
        raise UserError(f"can't write {called}: {error}. Is there such a folder, and room on its "
                        "disk? What was saved before is kept.") from error
    finally:
        with contextlib.suppress(OSError, AttributeError):
            temporary.unlink()


def save_checkpoint(path, s, model, **more):
    """Write model, settings and whatever else resuming needs; `path` is never half written."""
    with replacing(path) as file:
        torch.save(dict(format=FORMAT, settings=vars(s), model=model.state_dict(), **more), file)


def load_checkpoint(path, settings=None):
    """Return the dict that save_checkpoint wrote; UserError for other files or other `settings`."""
    remedy = "; delete it to train again from the start" if settings else ""
    try:
        with zipfile.ZipFile(path) as parts:
            if parts.testzip():                          # torch does not check the sums
                raise ValueError
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"can't read the checkpoint {path}: {error.strerror}.") from error
    except Exception as error:                           # torch raises many kinds for a bad file
        raise UserError(f"{path} is truncated or not a checkpoint{remedy}.") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or (
            settings is not None and identity(saved["settings"]) != identity(vars(settings))):
        of = "program with these settings" if settings else "version of the program"
        raise UserError(f"{path} is not a checkpoint of this {of}{remedy}.")
    saved["settings"].setdefault("MERGED_FRACTION", 0.0)               # older ones merged none
    return saved


def load_model(path, device=None):
    """Return (model, saved): the model of a model.pt, and all that the file holds."""
    saved = load_checkpoint(path)
    model = make_model(default_settings(**saved["settings"])).to(device or choose_device("auto")[0])
    model.load_state_dict(saved["model"])
    return model, saved


def newest_checkpoint(settings):
    """Return the path CHECKPOINT, or for "auto" that of the newest model.pt in OUT_DIR."""
    if settings.CHECKPOINT != "auto":
        return Path(settings.CHECKPOINT)
    found = sorted(Path(settings.OUT_DIR).glob("*/model.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"there is no model.pt in OUT_DIR={settings.OUT_DIR}; meta-train one first "
                        "(python gpicl_minimal_replication.py quick), or give --CHECKPOINT=path.")
    return found[-1]


def identity(settings):
    """Return the settings that make a run: not folders, nor what only other commands read."""
    elsewhere = {"DATA_DIR", "OUT_DIR", *OF_COMMANDS, *OF_EXPERIMENTS}
    return {k: v for k, v in settings.items() if k not in elsewhere}


# ---------------------------------------------------------------------------- plumbing: settings
@functools.cache
def setting_comments():
    """Return {name: comment} of the settings, read from this file's own source, in its order."""
    source = Path(__file__).read_text(encoding="utf-8")
    block = source[source.index("- settings\n"):source.index("\nPRESETS =")]
    return dict(re.findall(r"^([A-Z][A-Z0-9_]+) *=[^#\n]*#? *(.*)$", block, re.MULTILINE))


def default_settings(**overrides):
    """Return the settings at the top of this file, with some of them replaced."""
    settings = {name: globals()[name] for name in setting_comments()}
    for name in [name for name in overrides if name not in settings]:
        raise UserError(f"there is no setting {name!r}{did_you_mean(name, settings)}")
    return SimpleNamespace(**{**settings, **overrides})


def altered(settings, **changes):
    """Return a copy of settings with some of them replaced."""
    return SimpleNamespace(**{**vars(settings), **changes})


def did_you_mean(word, known):
    """Return the end of an error message: the nearest known word, or all of them."""
    near = difflib.get_close_matches(word.upper(), [name.upper() for name in known], 1, 0.5)
    names = [name for name in known if name.upper() in near]
    return f"; did you mean {names[0]}?" if names else f"; expected one of {', '.join(known)}."


def read_value(name, text):
    """Return a flag's text as a value of its setting; 2**16 and 1e-3 are numbers."""
    kind, *_, words = KINDS.get(name, OTHERS)
    try:
        if kind in (str, bool):
            return text if kind is str else {"true": True, "false": False}[text.lower()]
        power = re.fullmatch(r"(\d{1,3})\*\*(\d{1,2})", text)
        whole = re.fullmatch(r"[+-]?\d{1,18}", text)
        return int(power[1]) ** int(power[2]) if power else int(text) if whole else float(text)
    except (ValueError, KeyError):
        raise UserError(f"--{name}={text}: expected {words}.") from None


def read_settings(arguments):
    """Return (a preset's or command's name, settings, names set by flags) of a command line."""
    words, flags = [word for word in arguments if not word.startswith("-")], []
    known = [*PRESETS, *COMMANDS, *EXPERIMENTS]
    for word in [word for word in words if word not in known]:
        raise UserError(f"unexpected word {word!r}{did_you_mean(word, known)} Settings are written "
                        "as --NAME=value.")
    if len(words) > 1:
        raise UserError(f"{' and '.join(words)}: at most one preset or command is read.")
    first = words[0] if words else "default"
    changes = EXPERIMENTS[first].settings if first in EXPERIMENTS else PRESETS.get(first, {})
    settings = default_settings(**changes)
    for word in [word for word in arguments if word.startswith("-")]:
        name, equals, text = word.lstrip("-").partition("=")
        if name not in vars(settings):
            raise UserError(f"there is no setting {name!r}{did_you_mean(name, vars(settings))}")
        if not equals:
            raise UserError(f"{word} has no value; write --{name}=value.")
        if first not in readers(name):
            raise UserError(f"{first} does not read {name}; these do: {', '.join(readers(name))}.")
        setattr(settings, name, read_value(name, text))
        flags.append(name)
    check_settings(settings)
    return first, settings, flags


def readers(name):
    """Return the presets, commands and experiments that read a setting."""
    presets = [] if name in {*OF_COMMANDS, *OF_EXPERIMENTS} else [*PRESETS]
    commands = [command for command, names in COMMANDS.items() if name in names]
    experiments = [] if name in {*OF_COMMANDS, *NOT_OF_SWEEPS} else [
        word for word in EXPERIMENTS if (word == "features" or name not in OF_FEATURES) and (
            word != "plateau" or name != "EVAL_DATASETS")]
    return presets + commands + experiments


def check_settings(s):
    """Raise UserError for the first value or combination of settings that can't work. Numbers
    written in the other way (STEPS = 1e4, WEIGHT_DECAY = 0) become what they should be.
    """
    for name, value in vars(s).items():
        kind, least, most, words = KINDS.get(name, OTHERS)
        if {kind, type(value)} == {int, float} and abs(value) <= 1e30 and value == kind(value):
            setattr(s, name, value := kind(value))
        if type(value) is not kind or not least <= value <= most:
            raise UserError(f"{name} is {value!r}; expected {words}.")
        if value not in CHOICES.get(name, [value]):
            raise UserError(f"{name} is {value!r}; expected one of {', '.join(CHOICES[name])}.")
    if s.MODEL_SIZE % s.NUM_HEADS or s.MODEL_SIZE % 2:
        raise UserError(
            f"MODEL_SIZE={s.MODEL_SIZE} must be even and a multiple of NUM_HEADS={s.NUM_HEADS}.")
    if not re.fullmatch("[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", s.SHOTS):
        raise UserError(f"SHOTS={s.SHOTS}: expected numbers of examples such as 1,5.")


# ----------------------------------------------------------------------- plumbing: device, folder
def choose_device(wanted, precision="auto"):
    """Return (device, why, precision), by itself "bf16" where the hardware multiplies that."""
    usable = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if not usable.get(wanted, True):
        raise UserError(f"DEVICE={wanted} is not available here; use --DEVICE=auto.")
    best = next(name for name, there in usable.items() if there and wanted in ("auto", name))
    if best == "cuda":                                   # torchrun: one device per process
        mine, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if mine >= there:
            raise UserError(f"more processes than GPUs; use --nproc-per-node={there} at most.")
        torch.cuda.set_device(mine)
    why = dict(cuda="the fastest kind", mps="no CUDA here", cpu="no CUDA and no MPS here")[best]
    if precision == "auto":
        fast = (torch.cuda.get_device_capability() >= (8, 0) if best == "cuda" else
                best == "cpu" and re.search(r"\b(avx512_bf16|amx_bf16)\b", cpu_info()))
        precision = "bf16" if fast else "fp32"
    return torch.device(best), why if wanted == "auto" else "as asked for", precision


def processes():
    """Return (rank, number) of this process among those that torchrun started; else (0, 1)."""
    group = torch.distributed
    together = group.is_available() and group.is_initialized()
    return (group.get_rank(), group.get_world_size()) if together else (0, 1)


@contextlib.contextmanager
def joined_processes(s):
    """Join the processes that torchrun started, and leave them at the end."""
    kind = choose_device(s.DEVICE)[0].type
    if kind == "mps":
        raise UserError("several processes can't share MPS; use --DEVICE=cpu, or one process.")
    torch.distributed.init_process_group(                # the others wait while the first one tests
        "nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    try:
        if s.BATCH_SIZE % (n := processes()[1]):
            raise UserError(f"BATCH_SIZE={s.BATCH_SIZE} can't be split evenly over {n} processes.")
        yield
        torch.distributed.barrier()                      # who leaves early may take others along
    finally:
        torch.distributed.destroy_process_group()


def agree(loss, stop, device):
    """Return the mean loss over all processes, and whether any of them was asked to stop."""
    if processes()[1] > 1:
        both = torch.tensor([loss, float(stop)], device=device)
        torch.distributed.all_reduce(both)
        loss, stop = (both / processes()[1]).tolist()
    return loss, stop > 0


def cpu_info():
    """Return what Linux says of the processor; elsewhere nothing."""
    return file.read_text() if (file := Path("/proc/cpuinfo")).exists() else ""


def clock(device):
    """Return the seconds on a clock, once the device has done what it was told to."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def machine(device):
    """Return the processor and the accelerator in words."""
    model = re.search(r"model name\s*: (.+)", cpu_info())
    words = [model[1] if model else platform.processor() or platform.machine(),
             f"{torch.get_num_threads()} threads", platform.system()]
    return ", ".join(words + ([torch.cuda.get_device_name()] if device.type == "cuda" else []))


def provenance(device, precision):
    """Return what a record says of where its numbers were made."""
    return dict(device=device.type, precision=precision, machine=machine(device), versions=dict(
        python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))


def peak_memory(device):
    """Return the most bytes that were in use at once: the GPU's, else the process's, else None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):               # not on Windows
        import resource
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if platform.system() == "Darwin" else 1024 * used


def keep_freed_memory():
    """Make Linux's allocator keep freed memory: taking it anew cost a seventh of each CPU step."""
    with contextlib.suppress(OSError, AttributeError):
        allocator = ctypes.CDLL("libc.so.6")
        allocator.mallopt(-4, 0)                         # M_MMAP_MAX: nothing from mmap
        allocator.mallopt(-1, 2**31 - 1)                 # M_TRIM_THRESHOLD: 2 GiB


def flops(model, x, y):
    """Return the floating-point operations of a step's matrix products (but in torch's LSTM)."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x, y).flatten(0, 1), y.flatten()).backward()
    model.zero_grad()
    return counter.get_total_flops()


def matmul_rate(device, precision, size=2048):
    """Return the FLOP/s of large square matrix products: the best of ten, for comparison."""
    a = torch.randn(size, size, device=device).to(DTYPES[precision])
    return 2 * size**3 / min(timeit.repeat(lambda: (a @ a, clock(device)), number=1, repeat=10))


def run_folder(settings, name, *key):
    """Make and return a run's folder: `name`, a hash of `key` and of the data files' contents."""
    name = re.sub("[^A-Za-z0-9.=_-]", "_", name[:100])
    words = [settings.TRAIN_DATASET, *settings.EVAL_DATASETS.split(","), settings.FEATURES_FILE]
    files = [Path(word.strip().rstrip("?")) for word in words]
    key += tuple(hashlib.blake2b(path.read_bytes()).digest() for path in files if path.is_file())
    key = hashlib.blake2b(repr((FORMAT, *key)).encode(), digest_size=3).hexdigest()
    return make_folder(Path(settings.OUT_DIR, f"{name}-{key}"))


def make_folder(folder, setting="OUT_DIR"):
    """Make and return a folder that can be written to; `setting` says where it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".probe").write_text("")
        (folder / ".probe").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"can't write to {folder} ({setting} says where): {error}.") from error
    return folder


def log_to(path, silent=False):
    """Return a function that prints texts beside the progress bar and keeps them in a file."""
    def log(*texts):
        for text in () if silent else texts:
            with tqdm.external_write_mode(), open(path, "ab") as file:
                print(text, flush=True)
                file.write(f"{text}\n".encode(errors="backslashreplace"))
    return log


# ------------------------------------------------------------------------------ plumbing: reports
def paper_numbers(settings, trained_on, tested_on):
    """Return {method: accuracy (%)} of the paper's table, where ours can be compared with it."""
    mnist = trained_on == "MNIST" and not settings.TRAIN_DATASET.endswith(".npz")
    return PAPER.get(tested_on, {}) if mnist and settings.NUM_EXAMPLES == 100 else {}


def progress_table(rows, settings):
    """Return the lines of the table that grows during training."""
    lengths = context_lengths(settings)[-1 if settings.ARCHITECTURE == "maml" else 0:]
    lines = ["", "Accuracy (%) on unseen tasks of validation images, after so many examples:",
             "   step  seconds    loss     rate  |" + "".join(f"{n:6}" for n in lengths)]
    return lines + [f"{row['step']:7}{row['seconds']:9.0f}{row['loss']:8.3f}{row['rate']:9.1e}  |"
                    + "".join(f"{100 * row['accuracy'][n]:6.1f}" for n in lengths) for row in rows]


def result_table(results):
    """Return the lines of the final table and the greppable ones."""
    lengths, rows, greppable = results["context_lengths"], [], []
    ours = MODELS[results["settings"]["ARCHITECTURE"]]
    for name, entry in results["data_sets"].items():
        for learner, curve in entry["curves"].items():
            examples, accuracy = curve["examples"], 100 * np.array(curve["accuracy"])
            label = f"{name}: {ours}" if learner == ours else f"  {learner}"
            rows.append((label, dict(zip(examples, accuracy))))
            if learner == ours:
                low, high = (100 * np.array(curve[end]) for end in ("low", "high"))
                half = np.maximum(high - accuracy, accuracy - low)       # at 0 or 100 % one-sided
                rows.append(("  95 % interval, ±", dict(zip(examples, half))))
                key = f"{name.replace(' ', '-')}@{lengths[-1]}"
                greppable.append(f"{key}: {accuracy[-1]:.1f} ± {half[-1]:.1f}")
        rows.append(("  chance", dict.fromkeys(lengths, 100 / entry["classes"])))
        if entry["paper"]:
            words = ", ".join(f"{method} {value}" for method, value in entry["paper"].items())
            rows.append((f"  the paper, after 99: {words}", {}))
    lines = [f"{label:38}" + "".join(f"{at[n]:6.1f}" if n in at else 6 * " " for n in lengths)
             for label, at in rows]
    head = f"{'Accuracy (%) after so many examples':38}" + "".join(f"{n:6}" for n in lengths)
    return ["", head, *map(str.rstrip, lines), "", *greppable]


def write_csv(path, rows, called=None):
    """Write lists of cells to a .csv file, which is never half written; `called` so in errors."""
    with replacing(path, called) as new, open(new, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def plot(path, results):
    """Draw accuracy by number of examples, one panel per data set."""
    from matplotlib.figure import Figure                 # no pyplot: needs no display, no state
    entries, ours = results["data_sets"], MODELS[results["settings"]["ARCHITECTURE"]]
    figure = Figure(figsize=(max(6, 4.4 * len(entries)), 4.4), layout="constrained")
    panels = figure.subplots(1, len(entries), sharey=True, squeeze=False)[0]
    for panel, (name, entry) in zip(panels, entries.items()):
        for color, (learner, curve) in enumerate(entry["curves"].items()):
            accuracy, low, high = (100 * np.array(curve[k]) for k in ("accuracy", "low", "high"))
            style = "D" if len(accuracy) == 1 else "-" if learner == ours else ".--"
            if learner == ours:
                panel.fill_between(curve["examples"], low, high, color="C0", alpha=0.25, lw=0)
            panel.plot(curve["examples"], accuracy, f"C{color}{style}", label=learner,
                       lw=2 if learner == ours else 1, zorder=2 if style == ".--" else 5)
        panel.axhline(100 / entry["classes"], color="grey", ls=":", label="chance")
        if entry["paper"]:
            panel.plot([99], [entry["paper"]["GPICL"]], "k*", ms=10, label="GPICL in the paper")
        panel.set(title=name, xlabel="examples in context", ylim=(0, 100))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower right")
    panels[0].set_ylabel("accuracy (%)")
    figure.suptitle(f"In-context learning, meta-trained on {results['trained_on']}")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def help_text():
    """Return the usage, the presets, and every setting with its value and its comment."""
    usage = __doc__[__doc__.index("    python"):__doc__.index("In the code")].rstrip()
    presets = [f"    {name:9}" + (" ".join(f"{k}={v}" for k, v in changes.items()) or "as below")
               for name, changes in PRESETS.items()]
    settings = [f"    {name + '=' + str(globals()[name]):34} {comment}"
                for name, comment in setting_comments().items()]
    commands = [f"    {name:9}with {', '.join(names)}" for name, names in COMMANDS.items()]
    experiments = [f"    {name:15}{experiment.title}" for name, experiment in EXPERIMENTS.items()]
    return "\n".join(["Usage", usage, "", "Presets", *presets, "",
                      "Commands, with the settings that they read", *commands, "",
                      "Experiments, with small settings of their own", *experiments, "",
                      "Settings: --NAME=value", *settings])


# ----------------------------------------------------------------------- the other architectures
# Each takes attention's place in a Block, called alike: h (B, T, D) to (B, T, D), causal.
class LSTM(nn.Module):
    """Long short-term memory (Hochreiter and Schmidhuber 1997): torch's own."""

    def __init__(self, settings, first):
        super().__init__()
        self.lstm = nn.LSTM(settings.MODEL_SIZE, settings.MODEL_SIZE, batch_first=True)

    def forward(self, h, around):
        with torch.autocast(h.device.type, enabled=False):               # CUDA's would be in fp16
            return self.lstm(h.float())[0]

    def hold_class_means(self, told, free):
        """Two cells for each class and direction take in the labelled image along that direction,
        and let out through the query's place, one with each sign: the differences of a class's
        pairs add up to how like it the query is. What cells are left stay as they are.
        """
        D, half = told.shape[1], len(free)
        m = D // (2 * C) if half > 2 * C else 0          # so many directions
        image = F.normalize(torch.randn(m, half) @ free, dim=1).repeat_interleave(2, 0).repeat(C, 1)
        n, told = 2 * C * m, told.repeat_interleave(2 * m, 0)
        sign = torch.tensor([1.0, -1.0]).repeat(n // 2)[:, None]
        for parameter in self.lstm.parameters():
            parameter.view(4, D, -1)[:, :n] = 0
        weights, biases = self.lstm.weight_ih_l0.view(4, D, D), self.lstm.bias_ih_l0.view(4, D)
        weights[0, :n], biases[0, :n] = 22 * told, -8    # input gate, forget gate, cell, output
        weights[1, :n], biases[1, :n] = -9.5 * told, 8
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

    def forward(self, h, around):
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

    def hold_class_means(self, told, free):
        """Each head's cell has a row for each class (while there are rows): the labelled image is
        its key, and the query's, along the same directions, reads it.
        """
        nn.init.zeros_(self.recurrent.weight)
        half, weights = len(free), self.input.weight.zero_().view(6, self.heads, -1, self.size)
        biases = self.input.bias.zero_().view(6, self.heads, -1)         # f, i, o, k, v, q
        image = F.normalize(torch.randn(self.size, half) @ free, dim=1).view(self.heads, -1, half)
        for gate, slope, bias in ((0, -9.5, 8), (1, 22, -8)):
            weights[gate, :, :C], biases[gate, :, :C] = slope * told[:image.shape[1]], bias
        biases[2], biases[4, :, :C] = 2, 3
        weights[3, ..., half:] = weights[5, ..., :half] = image


@torch.no_grad()
def start_with_class_means(layer, embed_label):
    """Make a recurrent layer start with running means of each class: then it is nearest centroid.

    Its input (D) is a pair token, whose label embed_label (D, C) wrote: told (C, D) reads it, and
    free (D / 2, D / 2) leaves of an image's place what no label writes to (while there is such).
    The label opens the input gates of its class's cells, and they forget a quarter.
    """
    half = len(embed_label) // 2
    label = torch.cat([embed_label[:half], embed_label[half:]], 1)       # in either image's place
    free = torch.eye(half) - (half > 2 * C) * label @ torch.linalg.pinv(label)
    layer.hold_class_means(torch.linalg.pinv(embed_label), free)


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
        self.out = residual_output(self.size, self.size, settings)

    def forward(self, h, around):
        B, T, D = h.shape
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            q, k, v = self.qkv(h).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            write, keep = self.gates(h).view(B, T, 2, self.heads).permute(2, 0, 3, 1)
            mixed = delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, write.sigmoid(),
                               F.logsigmoid(keep), self.chunk)
            return self.out(norm(mixed).transpose(1, 2).reshape(B, T, D))


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


MIXERS = {"transformer": Attention, "mlp": None, "lstm": LSTM, "outer_lstm": OuterProductLSTM,
          "deltanet": GatedDeltaNet}


class VSML(nn.Module):
    """Variable shared meta-learning (Kirsch and Schmidhuber 2021): weights that are tiny LSTMs.

    Between every input a and output b is an LSTM with a state of CELL_SIZE, all with the same few
    parameters. It gets messages from both and sends some back. "vsml": the inputs are the numbers
    of A x_i, the outputs are the classes; their order makes no difference: the symmetries of a
    learning algorithm are built in. Nor does their number: meta-training is on READ_SIZE inputs,
    which is quicker, meta-test on all. "vsml_free": learnt matrices at inputs and outputs break the
    symmetries (as in the paper); with GUIDED_START they start as a projection and as identities.
    """

    def __init__(self, settings):
        super().__init__()
        n, self.settings, self.free = settings.CELL_SIZE, settings, "free" in settings.ARCHITECTURE
        images = 2 if settings.TOKEN_FORMAT == "pairs" else 1            # in a token
        self.outputs = size = settings.MODEL_SIZE if self.free else C
        self.into = self.told = self.head = nn.Identity()
        if self.free:                                    # with as many inputs as outputs
            self.into = nn.Linear(images * settings.PROJECTION_SIZE, images * size)
            self.told = nn.Linear(2 * C, 2 * size)
            self.head = nn.Linear(size, C)
            if settings.GUIDED_START:                    # as with the symmetries, of fewer numbers
                for layer in (self.into, self.told, self.head):
                    nn.init.zeros_(layer.bias)
                nn.init.eye_(self.told.weight)
                nn.init.eye_(self.head.weight)
                few = torch.randn(size, settings.PROJECTION_SIZE)
                self.into.weight.data = torch.kron(F.normalize(few), torch.eye(images))
        self.forward_message = nn.Linear(images, 4 * n)
        self.backward_message = nn.Linear(2, 4 * n)
        self.recurrent = nn.Linear(n, 4 * n, bias=False)
        self.up = nn.Linear(n, 1, bias=False)

    def forward(self, x, y):
        """Return logits (B, T, C) for x (B, T, P) and y (B, T), one example after another."""
        if torch.is_grad_enabled() and not self.free:
            x = x[..., :self.settings.READ_SIZE]
        seen = torch.stack([x, shift(x, 1)][:self.forward_message.in_features], -1)
        seen = self.into(seen.flatten(2)).unflatten(2, (-1, seen.shape[-1]))
        # A state's numbers stand first and the inputs last, so that all arithmetic is on long rows.
        messages = self.forward_message(seen).permute(1, 3, 0, 2).contiguous()     # (T, 4 n, B, A)
        labels = shift(F.one_hot(y, C).to(x.dtype), 1)
        cell = h = x.new_zeros(self.settings.CELL_SIZE, self.outputs, *messages.shape[2:])
        logits, outputs = x.new_zeros(len(x), C), []
        for message, label in zip(messages, labels.unbind(1)):
            back = torch.stack([label, logits.softmax(-1) * label.sum(-1, keepdim=True)], -1)
            back = self.told(back.flatten(1)).unflatten(1, (-1, 2))
            back = self.backward_message(back).permute(2, 1, 0)[..., None]
            gates = (self.recurrent.weight @ h.flatten(1)).view(-1, *h.shape[1:])
            f, i, o, new = (gates + message[:, None] + back).chunk(4)
            cell = (f + 2).sigmoid() * cell + i.sigmoid() * new.tanh()
            h = o.sigmoid() * cell.tanh()
            logits = self.head(self.up(h.sum(-1).permute(2, 1, 0))[..., 0] / h.shape[-1]**0.5)
            outputs.append(logits)
        return torch.stack(outputs, 1)


class MAML(nn.Module):
    """Model-agnostic meta-learning (Finn, Abbeel, Levine 2017): a start to descend from.

    Learnt are the first weights of a network with one hidden layer, and a rate for every tensor and
    step (Antoniou et al. 2019). Some steps of gradient descent on the context adapt the weights;
    the adapted network answers the queries: the last quarter of the sequence in meta-training, else
    the last example. All logits before are zero, which is no answer.
    """

    def __init__(self, settings, steps=5):
        super().__init__()
        self.settings, inputs, hidden = settings, settings.PROJECTION_SIZE, settings.MODEL_SIZE
        shapes = (inputs, hidden), (1, hidden), (hidden, C), (1, C)
        self.start = nn.ParameterList(
            torch.randn(shape) * (shape[0] > 1) * (2 / shape[0])**0.5 for shape in shapes)
        self.log_rates = nn.Parameter(torch.full((steps, len(shapes)), math.log(0.1)))

    def forward(self, x, y):
        """Return logits (B, T, C) for x (B, T, P) and y (B, T)."""
        T, training = x.shape[1], torch.is_grad_enabled()
        n = T - max(1, T // 4) if training else T - 1

        def net(x, w, b, v, c):
            return (x @ w + b).relu() @ v + c

        with torch.enable_grad():
            weights = [w.expand(len(x), *w.shape) for w in self.start]
            for rates in self.log_rates.exp():
                loss = F.cross_entropy(net(x[:, :n], *weights).flatten(0, 1), y[:, :n].flatten(),
                                       reduction="sum") / n
                slopes = torch.autograd.grad(loss, weights, create_graph=training)
                weights = [w - rate * s for w, rate, s in zip(weights, rates, slopes)]
        return F.pad(net(x[:, n:], *weights), (0, 0, n, 0))


# ------------------------------------------------------------------------------- the experiments
# The paper's other experiments: each is many short runs, then a table, a .csv file and a figure.
class Experiment(NamedTuple):
    """A sweep: what is run and measured, and how it is told."""
    title: str                             # of the figure
    settings: dict                         # of all its runs, where they are not the defaults
    cells: list                            # what its runs differ in: dicts of settings
    measure: Callable                      # (settings, data, precision) -> rows of one run: dicts
    report: Callable                       # (rows, figure) -> lines of the printed table


def student(freedom):
    """Return the 97.5 % quantile of Student's t distribution."""
    few = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return few[freedom - 1] if freedom <= len(few) else 1.96 + 2.37 / freedom + 2.8 / freedom**2


def summary(rows, name):
    """Return the mean of a column over the seeds, and half of its 95 % t interval (nan for one).

    Every seed has training and test sequences of its own: it is the interval of both.
    """
    values = np.array([row[name] for row in rows], float)
    if len(values) < 2:
        return values.mean() if len(values) else math.nan, math.nan
    return values.mean(), student(len(values) - 1) * values.std(ddof=1) / len(values)**0.5


def select(rows, **wanted):
    """Return the rows that hold these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def values_of(rows, name):
    """Return the different values of a column, in the order of their first rows."""
    return list(dict.fromkeys(row[name] for row in rows))


def draw_curves(rows, panel, x, y, by, title, unit=100, digits=1):
    """Draw the means of column y against column x, with 95 % intervals over the seeds, a curve for
    each value of column `by`. Return the same numbers, times `unit`, as lines of text.
    """
    if not rows:
        return []
    marks, numeric = values_of(rows, x), not isinstance(rows[0][x], str)
    marks = sorted(marks) if numeric else marks
    table = [["", *map(str, marks)]]
    for color, kind in enumerate(values_of(rows, by)):
        found = [summary(select(rows, **{by: kind, x: mark}), y) for mark in marks]
        mean, half = unit * np.array(found).T
        table.append([str(kind), *(
            "-" if math.isnan(m) else f"{m:.{digits}f}" if math.isnan(h) else
            f"{m:.{digits}f} ±{h:{digits + 2}.{digits}f}" for m, h in zip(mean, half))])
        ok = ~np.isnan(mean)
        places = np.array(marks) if numeric else np.arange(len(marks)) + 0.08 * color
        panel.errorbar(places[ok], mean[ok], half[ok], marker="o", ms=4, capsize=3, label=kind)
    panel.set(title=title, xlabel=x, xscale="log" if numeric and min(marks) > 0 else "linear")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, framealpha=0.5)             # it may lie on a curve
    if len(marks) < 10 or not numeric:                   # more numbers would overlap
        panel.set_xticks(marks if numeric else range(len(marks)), marks, fontsize=8)
        panel.minorticks_off()
    label = max(len(kind) for kind, *_ in table)
    width = 1 + max(len(word) for _, *words in table for word in words)
    return ["", f"{title}, by {x}", *(kind.ljust(label) + "".join(
        word.rjust(width) for word in words) for kind, *words in table)]


def heat_map(panel, rows, x, y, value, title, unit=100, digits=0):
    """Draw the means of a column by two others as a field of colours and numbers."""
    if not rows:
        panel.set_axis_off()
        return
    columns, lines = sorted(values_of(rows, x)), sorted(values_of(rows, y))
    means = np.array([[unit * summary(select(rows, **{x: a, y: b}), value)[0] for a in columns]
                      for b in lines])
    panel.imshow(means, aspect="auto", cmap="Greens", vmin=0, vmax=unit)
    for (i, j), mean in np.ndenumerate(means):
        if not math.isnan(mean):
            panel.text(j, i, f"{mean:.{digits}f}", ha="center", va="center",
                       color="w" if mean > 0.6 * unit else "k")
    panel.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    panel.set_yticks(range(len(lines)), lines, fontsize=8)
    panel.set(title=title, xlabel=x, ylabel=y)


def training_steps(settings, dataset, precision):
    """Meta-train a new model, without files or messages; yield (model, step) after each step."""
    torch.manual_seed(settings.SEED)
    model = make_model(settings).to(dataset.x.device)
    optimizers = make_optimizers(model, settings, precision)
    for step, *_ in learning_steps(model, optimizers, dataset, settings, precision):
        yield model, step


def trained_model(settings, dataset, precision):
    """Return a new model, meta-trained."""
    return list(training_steps(settings, dataset, precision))[-1][0]


def one_run(job):
    """Make one run of an experiment, in any process; return what is to be kept of it."""
    name, values, cell, threads = job
    torch.set_num_threads(threads)
    keep_freed_memory()
    began, settings = time.time(), default_settings(**{**values, "EVAL_SEED": values["SEED"]})
    device, _, precision = choose_device(settings.DEVICE, settings.PRECISION)
    data = data_of_runs(device, **{key: values[key] for key in ("DATA_DIR", "TRAIN_DATASET",
        "EVAL_DATASETS", "IMAGE_SIZE", "VALIDATION_IMAGES", "NUM_EXAMPLES")})
    try:
        rows = EXPERIMENTS[name].measure(settings, data, precision)
    except UserError as error:
        raise UserError(f"{error} (in the run {cell})") from error
    return dict(cell=cell, rows=rows, seconds=time.time() - began)


@functools.lru_cache(maxsize=1)
def data_of_runs(device, **settings):
    """Return (training, validation, tests) for these settings; the last ones are kept."""
    training, validation, tests, _ = load_all(default_settings(**settings, NUM_TASKS=0), device)
    return training, validation, {name: dataset for name, (dataset, _) in tests.items()}


def runs_of(name, settings, flags):
    """Return the cells of an experiment with their seeds. A flag fixes what would be varied."""
    cells = []
    if settings.ARCHITECTURE == "maml" and name in ("algorithm", "plateau"):
        raise UserError(f"{name} asks early and late; maml answers after all examples only.")
    if name == "algorithm" and settings.NUM_EXAMPLES < 3:
        raise UserError("algorithm compares answers after 2 or more examples; NUM_EXAMPLES=3 or up")
    for cell in EXPERIMENTS[name].cells:
        for key in {"ARCHITECTURE", "TOKEN_FORMAT"} & {*cell} & {*flags}:
            raise UserError(f"{name} compares models of different {key}; leave that flag out.")
        cell = {k: getattr(settings, k) if k in flags else v for k, v in cell.items()}
        check_settings(altered(settings, **cell))
        cells += [cell] if cell not in cells else []
    return [dict(cell, SEED=settings.SEED + i) for i in range(settings.SEEDS) for cell in cells]


def sweep(name, settings, flags):
    """Make the runs of an experiment that are not yet made; write and print what they tell."""
    from matplotlib.figure import Figure                 # no pyplot: needs no display, no state
    device, why, precision = choose_device(settings.DEVICE, settings.PRECISION)
    training, _, tests, notices = load_all(altered(settings, NUM_TASKS=0), device)
    runs = runs_of(name, settings, flags)
    varied = set(runs[0]).intersection(*runs)            # what only some runs set counts for others
    common = {key: value for key, value in vars(settings).items() if key not in {
        *varied, "SEED", "EVAL_SEED", "DATA_DIR", "OUT_DIR", "RESULTS_DIR", "SEEDS", "WORKERS"}}
    folder = run_folder(settings, name, training.name, sorted(tests), device.type, precision,
                        sorted(common.items()))
    results = make_folder(Path(settings.RESULTS_DIR), "RESULTS_DIR")
    log, threads = log_to(folder / "log.txt"), torch.get_num_threads()
    done = read_runs(folder / "runs.jsonl")
    todo = [run for run in runs if json.dumps(run) not in done]
    most = settings.WORKERS or (threads if device.type == "cpu" else 1)
    workers = min(most, max(1, len(todo)))
    log(*notices,
        f"Experiment  {name}: {len(runs)} runs, {len(runs) - len(todo)} of them made before, "
        f"{workers} at once\n"
        f"Device      {device.type} ({why}), {precision}; {machine(device)}\n"
        f"Data        {training.name}; tested on {', '.join(tests)}\nRun folder  {folder}")
    # Threads decide how sums are rounded: as many in a run that is made alone, after a kill.
    jobs = [(name, {**vars(settings), **run}, run, max(1, threads // most)) for run in todo]
    with run_all(jobs, workers) as made, open(folder / "runs.jsonl", "a", buffering=1) as file:
        for record in tqdm(made, total=len(jobs), unit="run", leave=False,
                           disable=None if jobs else True):
            done[json.dumps(record["cell"])] = record
            file.write("\n" + json.dumps(record))        # first: a line cut short stays alone
    records = [done[json.dumps(run)] for run in runs]
    rows = [{**record["cell"], **row} for record in records for row in record["rows"]]
    figure = Figure(layout="constrained")
    lines = EXPERIMENTS[name].report(rows, figure)
    figure.suptitle(f"{EXPERIMENTS[name].title} (meta-trained on {training.name})")
    with replacing(results / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=110)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(results / f"{name}.csv", [columns, *(map(row.get, columns) for row in rows)])
    facts = dict(experiment=name, runs=len(runs), settings=common, **provenance(device, precision),
                 run_seconds=sum(record["seconds"] for record in records), table=lines)
    with replacing(results / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1))
    log("", *lines, "", f"Written: {results / name}.csv, .json, .png")


def read_runs(path):
    """Return {settings of a run: record} of a file's lines, without those that a kill cut short."""
    done = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            done[json.dumps(record["cell"])] = record
    return done


def begin_worker():
    """Leave Ctrl-C to the process that started this one; end when that ends, even if killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = torch.multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def run_all(jobs, workers):
    """Yield the records of these runs as they come, of that many processes at once."""
    if workers < 2:
        yield map(one_run, jobs)
        return
    spawn = torch.multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(workers, spawn, begin_worker)
    try:
        main = threading.current_thread() is threading.main_thread()   # no other may set signals
        former = main and signal.signal(signal.SIGINT, signal.SIG_IGN)           # workers inherit
        tasks = [pool.submit(one_run, job) for job in jobs]
        if main:
            signal.signal(signal.SIGINT, former)
        yield (task.result() for task in futures.as_completed(tasks))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped; the same command goes on with the runs left.") from None
    except futures.process.BrokenProcessPool as error:
        raise UserError("a run was killed, perhaps for want of memory; run the same command with "
                        f"fewer than --WORKERS={workers}.") from error
    finally:
        for process in torch.multiprocessing.active_children():
            process.terminate()                          # those that are still at work
        pool.shutdown(cancel_futures=True)


def both_ends(model, dataset, settings, precision, num_tasks=0):
    """Return the accuracy on the first example and that on the last tenth of the examples."""
    hits, *_ = count_hits(model, dataset, settings.EVAL_SEQUENCES, settings, precision, num_tasks)
    curve = hits["in-context"] / settings.EVAL_SEQUENCES
    return curve[0], curve[-max(1, len(curve) // 10):].mean()


# phases: memorise instances, identify tasks, learn to learn (paper, figures on the number of tasks)
def measure_phases(settings, data, precision):
    """Return accuracy on the first example and on the last tenth of them, on the tasks to train on
    (too many of them, and not all were seen), on fresh tasks, and on other data sets; test images.
    """
    training, _, tests = data
    model, rows = trained_model(settings, training, precision), []
    sets = [("training tasks", training.name, settings.NUM_TASKS), *(
        ("unseen tasks" if name == training.name else name, name, 0) for name in tests)]
    for label, name, num_tasks in sets:
        if name in tests and (num_tasks or label != "training tasks"):
            first, last = both_ends(model, tests[name], settings, precision, num_tasks)
            rows.append(dict(tested_on=label, first=first, last=last, improvement=last - first))
    return rows


def report_phases(rows, figure):
    """One row of panels for each kind of model: improvement by number of tasks, and accuracies."""
    kinds = {("transformer", "paper"): "Transformer, paper's tokens",
             ("transformer", "pairs"): "Transformer, sample-label pairs",
             ("mlp", "paper"): "MLP, which sees no context"}
    figure.set_size_inches(16, 4 * len(kinds))
    grid, lines = figure.subplots(len(kinds), 3, squeeze=False), []
    for panels, ((architecture, token), label) in zip(grid, kinds.items()):
        mine = select(rows, ARCHITECTURE=architecture, TOKEN_FORMAT=token)
        for D in sorted(values_of(mine, "MODEL_SIZE")):
            panels[0].clear()                            # the widest is drawn
            lines += draw_curves(select(mine, MODEL_SIZE=D), panels[0], "NUM_TASKS", "improvement",
                                 "tested_on", f"{label}, width {D}: improvement (points)")
            for kind in values_of(mine, "tested_on"):
                found = [(n, *summary(select(mine, MODEL_SIZE=D, NUM_TASKS=n, tested_on=kind),
                                      "improvement")) for n in values_of(mine, "NUM_TASKS")]
                surely = [f"{n:,}" for n, mean, half in found if mean - half > 0.1]
                lines.append(f"  {kind}: 95 % interval above 10 points with {', '.join(surely)} "
                             "tasks" if surely else f"  {kind}: nowhere surely above 10 points")
        panels[0].set_xscale("symlog", base=2, linthresh=1)            # 0: fresh tasks
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(min(-10, low), max(60, high))
        for panel, kind in zip(panels[1:], ("training tasks", "unseen tasks")):
            heat_map(panel, select(mine, tested_on=kind), "NUM_TASKS", "MODEL_SIZE", "last",
                     f"accuracy (%) at the end, {kind}")
    return lines


# plateau: how long the loss stays at that of guessing (paper, figures on the plateau)
PLATEAU_FACTORS = {
    "batch size": {str(n): dict(BATCH_SIZE=n) for n in (16, 32, 64, 128, 256)},
    "tasks": {**{f"2**{k}": dict(NUM_TASKS=2**k) for k in (6, 8, 10, 12, 14, 16)},
              "fresh": dict(NUM_TASKS=0)},
    "optimiser": {"Muon": dict(OPTIMIZER="muon"), **{
        f"AdamW, {e:g}": dict(OPTIMIZER="adamw", LEARNING_RATE=1e-3, ADAM_EPSILON=e)
        for e in (1e-12, 1e-8, 1e-5, 1e-3)}},
    "share with one label permutation": {
        str(share): dict(BIASED_FRACTION=share) for share in (0.0, 0.5, 0.9)},
    "start": {"zero outputs": dict(GUIDED_START=False, OUTPUT_STD=0.0),
              "random": dict(GUIDED_START=False, OUTPUT_STD=1.0),
              "comparing": dict(GUIDED_START=True, OUTPUT_STD=1.0)},
    "token": {"pairs": dict(TOKEN_FORMAT="pairs", GUIDED_START=False),
              "paper's": dict(TOKEN_FORMAT="paper", GUIDED_START=False),
              "paper's, looking back": dict(TOKEN_FORMAT="paper", GUIDED_START=True)},
}
PLATEAU_BASE = dict(BATCH_SIZE=64, NUM_TASKS=0, OPTIMIZER="muon", LEARNING_RATE=3e-3,
                    ADAM_EPSILON=1e-8, BIASED_FRACTION=0.0, GUIDED_START=False, OUTPUT_STD=1.0,
                    TOKEN_FORMAT="pairs")


def plateau_length(steps, losses, drop=0.1):
    """Return the first of `steps` from which on the loss stays `drop` nats below log C, or None."""
    after = max((i for i, loss in enumerate(losses, 1) if not loss < math.log(C) - drop), default=0)
    return steps[after] if after < len(steps) else None


def measure_plateau(settings, data, precision, every=20, enough=3):
    """Return the plateau's lengths on validation images, unbiased, of the run's and fresh tasks."""
    (training, validation, _), steps = data, []
    losses = {num_tasks: [] for num_tasks in (settings.NUM_TASKS, 0)}    # one, where all are fresh
    batches = {num_tasks: draw_sequences(validation, settings.EVAL_SEQUENCES, settings, (
        "plateau", settings.EVAL_SEED), num_tasks) for num_tasks in losses}
    for model, step in training_steps(settings, training, precision):
        if step % every == 0 or step == settings.STEPS:
            steps.append(step)
            with torch.no_grad():
                for num_tasks, (x, y) in batches.items():
                    logits = logits_of(model, x, y, precision).flatten(0, 1)
                    losses[num_tasks].append(F.cross_entropy(logits, y.flatten()).item())
            lengths = {n: plateau_length(steps, found) for n, found in losses.items()}
            if len(steps) >= enough and all(at and at <= steps[-enough] for at in lengths.values()):
                break                                    # both were left a while ago
    return [dict(tested_on=kind, length=lengths[n], left=lengths[n] is not None, steps=steps[-1])
            for kind, n in (("training tasks", settings.NUM_TASKS), ("unseen tasks", 0))]


def report_plateau(rows, figure):
    """One panel for each factor: the lengths where the plateau was left; hollow where not."""
    figure.set_size_inches(16, 8)
    panels, lines = figure.subplots(2, 3, sharey=True).flat, []
    cap = max(row["steps"] for row in rows)
    fixed = {key: rows[0][key] for key in PLATEAU_BASE if len(values_of(rows, key)) == 1}
    for panel, (factor, cells) in zip(panels, PLATEAU_FACTORS.items()):
        wanted = {value: {**PLATEAU_BASE, **cell, **fixed} for value, cell in cells.items()}
        # Values that a flag has made alike are left out, but for the flag's own.
        told = [value for value, settings in wanted.items() if cells[value].items() <=
                settings.items() or [*wanted.values()].count(settings) == 1 and
                cells[value].get("OPTIMIZER") in (None, settings["OPTIMIZER"])]
        runs = [dict(row, value=value) for value in told for row in select(rows, **wanted[value])]
        if not runs:                                     # a flag holds this factor fixed
            panel.set_axis_off()
            continue
        lines += draw_curves(select(runs, left=True), panel, "value", "length", "tested_on",
                             f"Length of the plateau (steps): {factor}", 1, 0)
        panel.clear()                                    # every run is drawn, not their means
        values, kinds = values_of(runs, "value"), values_of(runs, "tested_on")
        lines += [f"  not left within {cap} steps: {factor} {value}, {kind}, {len(stuck)} runs"
                  for value, kind in itertools.product(values, kinds)
                  if (stuck := select(runs, value=value, tested_on=kind, left=False))]
        for color, kind in enumerate(kinds):
            for left, marker, fill in ((True, "o", "full"), (False, "^", "none")):
                some = select(runs, tested_on=kind, left=left)
                panel.plot([values.index(row["value"]) + 0.15 * color for row in some],
                           [row["length"] if left else cap for row in some], f"C{color}{marker}",
                           fillstyle=fill, label=kind if left else None)
        panel.set_xticks(range(len(values)), values, fontsize=8)
        panel.set(title=factor, yscale="log", ylabel="plateau (steps)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    others = {k: v for k, v in {**PLATEAU_BASE, **fixed}.items() if k != "BATCH_SIZE"}
    sizes = select(rows, tested_on="unseen tasks", **others)
    stuck = values_of(select(sizes, left=False), "BATCH_SIZE")           # would bias the fit
    fitted = [row for row in sizes if row["BATCH_SIZE"] not in stuck]
    if len(values_of(fitted, "BATCH_SIZE")) > 2:
        slope, half = power_law(*([row[k] for row in fitted] for k in ("BATCH_SIZE", "length")))
        lines += ["", f"Power law: length ~ batch size ** ({slope:.2f} ± {half:.2f}), from "
                      f"{len(fitted)} runs of the batch sizes that always left it"]
    return lines


def power_law(x, y):
    """Return the exponent of y ~ x ** exponent and half of its 95 % interval, by least squares."""
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    return slope, student(len(x) - 2) * covariance[0, 0]**0.5


# architectures: is it the state that matters, or the parameters? (paper, figure on state size)
def state_size(s, length):
    """Return how many numbers a model carries from one example to the next, after `length`."""
    D, width = s.MODEL_SIZE, s.MODEL_SIZE // s.NUM_HEADS
    if s.ARCHITECTURE.startswith("vsml"):
        return 2 * s.CELL_SIZE * (D * D if s.ARCHITECTURE == "vsml_free" else s.PROJECTION_SIZE * C)
    return s.NUM_LAYERS * dict(mlp=0, lstm=2 * D, transformer=2 * length * D,    # keys and values
                               outer_lstm=D * width + D, deltanet=D * width)[s.ARCHITECTURE]


def measure_architectures(settings, data, precision):
    """Return the accuracy at the end of the sequence beside the sizes of state and parameters."""
    training, _, tests = data
    model = trained_model(settings, training, precision)
    return [dict(tested_on=name, accuracy=both_ends(model, dataset, settings, precision)[1],
                 state=state_size(settings, settings.NUM_EXAMPLES),
                 parameters=sum(p.numel() for p in model.parameters()))
            for name, dataset in tests.items()]


def rank_correlation(x, y):
    """Return Spearman's rank correlation of x and y; equal values share their mean rank."""
    rank = [(np.less.outer(v, v).sum(0) + np.less_equal.outer(v, v).sum(0) + 1) / 2 for v in (x, y)]
    with np.errstate(all="ignore"):                      # nan where all values are equal
        return np.corrcoef(*rank)[0, 1]


def report_architectures(rows, figure):
    """Two panels, with rank correlations and their bootstrapped intervals over kinds of model."""
    figure.set_size_inches(15, 5)
    first, lines, models, points, names = rows[0]["tested_on"], [], {}, [], []
    for row in rows:
        cell = [value for key, value in row.items() if key.isupper() and key != "SEED"]
        models.setdefault(str(cell), []).append(row)
    for mine in models.values():
        architecture, state, parameters = map(mine[0].get, ("ARCHITECTURE", "state", "parameters"))
        lines.append(f"{architecture:13}{state:9,} state{parameters:11,} parameters")
        for kind in values_of(mine, "tested_on"):
            mean, half = summary(select(mine, tested_on=kind), "accuracy")
            lines[-1] += f"   {kind}{100 * mean:6.1f} ±{100 * half:4.1f}".replace(" ± nan", "")
            if kind == first:
                points.append((state, parameters, mean, half))
                names.append(MODELS[architecture])
    points, names = np.array(points), np.array(names)
    for column, what in enumerate(("state", "parameters")):
        again = points[np.random.default_rng(0).integers(len(points), size=(2000, len(points)))]
        value, *every = (rank_correlation(few[:, column], few[:, 2]) for few in (points, *again))
        ends = np.quantile([v for v in every if v == v] or [math.nan], [.025, .975])
        words = "rank correlation with {} {:.2f} ({:.2f} to {:.2f})".format(what, value, *ends)
        lines.append(f"{first}, {len(points)} kinds of model: {words}")
        panel = figure.add_subplot(1, 2, column + 1)
        for name in dict.fromkeys(names):                # a curve joins the sizes of a kind
            place, (mean, half) = points[names == name, column], 100 * points[names == name, 2:].T
            panel.errorbar(place, mean, half, marker="o", ms=4, capsize=3, label=name)
        panel.axhline(100 / C, color="k", lw=1, ls=":", label="chance")
        panel.set(title=f"accuracy (%) on {first}\n{words}", xlabel=what, xscale="log")
        panel.legend(fontsize=8, framealpha=0.5)
    return lines


# table: the paper's comparison of methods (its table)
def measure_table(settings, data, precision):
    """Return the accuracy after the longest context on every data set, SGD's beside ours."""
    training, _, tests = data
    model = trained_model(settings, training, precision)
    method, n, rows = settings.ARCHITECTURE, settings.EVAL_SEQUENCES, []
    lengths = [settings.NUM_EXAMPLES - 1] if method == "transformer" else []
    for name, dataset in tests.items():
        hits, *_ = count_hits(model, dataset, n, settings, precision, lengths=lengths)
        names = {"in-context": "GPICL" if lengths else method.upper(), "SGD (softmax)": "SGD"}
        paper = paper_numbers(settings, training.name, name)
        rows += [dict(method=word, tested_on=name, accuracy=hits[k][-1] / n, paper=paper.get(word))
                 for k, word in names.items() if k in hits]
    return rows


def report_table(rows, figure):
    """Ours with intervals, and crosses where the paper's numbers are."""
    figure.set_size_inches(11, 5)
    panel, kinds = figure.subplots(), values_of(rows, "tested_on")
    lines = [*draw_curves(rows, panel, "tested_on", "accuracy", "method",
                          "accuracy (%) at the end of the sequence; crosses: the paper"), ""]
    for line in panel.get_lines():
        line.set_linestyle("")
    for color, method in enumerate(values_of(rows, "method")):
        paper = dict.fromkeys(kinds) | {                 # a data set may be had in some runs only
            row["tested_on"]: row["paper"] for row in select(rows, method=method)}
        panel.plot(np.arange(len(kinds)) + 0.08 * color, [*paper.values()], f"C{color}x")
        words = ", ".join(f"{kind} {value}" for kind, value in paper.items() if value)
        lines += [f"the paper, {method}: {words}"] if words else []
    return lines


# features: few-shot learning on top of the features of another network (paper: of a ResNet)
def train_features(training, settings, steps=300):
    """Return the convolutions of a network trained to tell the classes of `training` apart: the
    layer after them knows too little of classes that it was not trained on (results/recipe.md).
    """
    size, device = settings.IMAGE_SIZE, training.x.device
    torch.manual_seed(settings.SEED)
    body = nn.Sequential(
        nn.Unflatten(1, (1, size, size)), nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    head = [nn.Linear(32 * (size // 4)**2, 128), nn.ReLU(), nn.Linear(128, training.classes)]
    net = nn.Sequential(body, *head).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    for step in range(steps):
        chosen = torch.randint(len(training.y), (128,), generator=stream(
            device, settings.SEED, "features", step), device=device)
        F.cross_entropy(net(training.x[chosen]), training.y[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return body


def draw_episodes(dataset, n_episodes, ways, shots, settings, key):
    """Return x (B, T, P) and y (B, T) of N-way K-shot episodes, T = N K + 1: `shots` examples each
    of `ways` random classes in random order, then a query of one of them, under a fresh projection.
    """
    generator, device = stream("cpu", *key), dataset.x.device
    members = [(dataset.y.cpu() == c).nonzero()[:, 0] for c in range(dataset.classes)]
    members = [rows for rows in members if len(rows) > shots]
    if len(members) < ways:
        raise UserError(f"{dataset.name} has {len(members)} classes of more than {shots} rows; "
                        f"episodes need WAYS={ways}.")
    images, labels = [], []
    for _ in range(n_episodes):
        kinds = torch.randperm(len(members), generator=generator)[:ways].tolist()
        rows = torch.stack([members[kind][torch.randperm(
            len(members[kind]), generator=generator)[:shots + 1]] for kind in kinds])
        slots = torch.randperm(C, generator=generator)[:ways, None].expand_as(rows)
        order = torch.randperm(ways * shots, generator=generator)
        images.append(torch.cat([rows[:, :-1].flatten()[order], rows[:1, -1]]))
        labels.append(torch.cat([slots[:, :-1].flatten()[order], slots[:1, -1]]))
    images = span(dataset.x[torch.stack(images).to(device)])
    return project_afresh(images, settings, stream(device, *key)), torch.stack(labels).to(device)


def measure_features(settings, data, precision):
    """Return the learners' accuracy on episodes of images and of features, or of FEATURES_FILE."""
    training, _, tests = data
    every = list(dict.fromkeys(int(word) for word in settings.SHOTS.split(",")))
    check_context(make_model(settings), settings.WAYS * max(every))
    if settings.FEATURES_FILE:
        inputs = [as_dataset(Path(settings.FEATURES_FILE).stem, *npz_arrays(settings.FEATURES_FILE),
                             settings.IMAGE_SIZE, training.x.device, 10**6)]
    else:
        known = training.classes // 2
        few = training.y < known                         # nothing sees the other classes
        if training.x.shape[1] != max(4, settings.IMAGE_SIZE)**2 or training.name not in tests or (
                few.sum() < settings.NUM_EXAMPLES):
            raise UserError("without a FEATURES_FILE, train and test on grey images such as MNIST, "
                            "of IMAGE_SIZE=4 or more, NUM_EXAMPLES or more of half of the classes.")
        training = training._replace(x=training.x[few], y=training.y[few], classes=known)
        body, test = train_features(training, settings), tests[training.name]
        images, y = test.x[test.y >= known], test.y[test.y >= known] - known
        features = torch.cat([body(x).detach() for x in images.split(500)])
        features = (features - features.mean()) / features.std()
        inputs = [Dataset(word, x, y, test.classes - known)
                  for word, x in (("pixels", images), ("features", features))]
    for dataset in inputs:
        draw_episodes(dataset, 1, settings.WAYS, max(every), settings, ("are there enough rows?",))
    model, rows, n = trained_model(settings, training, precision), [], settings.EVAL_SEQUENCES
    for dataset, shots in itertools.product(inputs, every):
        hits = {}
        for start, size in starts_and_sizes(n, settings.WAYS * shots):
            x, y = draw_episodes(dataset, size, settings.WAYS, shots, settings,
                                 ("episodes", settings.EVAL_SEED, shots, start))
            for learner, labels in last_predictions(model, x, y, precision).items():
                hits[learner] = hits.get(learner, 0) + (labels == y[:, -1].cpu()).sum().item()
        rows += [dict(input=dataset.name, ways=settings.WAYS, shots=shots, learner=learner,
                      accuracy=right / n) for learner, right in hits.items()]
    return rows


@torch.no_grad()
def last_predictions(model, x, y, precision):
    """Return {learner: label (B,) of the last example}, among the classes that were shown."""
    shown = F.one_hot(y[:, :-1], C).sum(1) > 0
    ours = logits_of(model, x, y, precision)[:, -1].masked_fill(~shown, -math.inf).argmax(-1)
    return {"in-context": ours.cpu(), **classical_labels((x @ x.mT).cpu(), y[:, :-1].cpu())}


def report_features(rows, figure):
    """One panel for each kind of input: accuracy against shots."""
    kinds, lines = values_of(rows, "input"), []
    figure.set_size_inches(6 * len(kinds), 4.6)
    for panel, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds):
        lines += draw_curves(select(rows, input=kind), panel, "shots", "accuracy", "learner",
                             f"{kind}: accuracy (%), {rows[0]['ways']} ways")
    return lines


# algorithm: which classical learner does the trained model act like? (not in the paper)
def agreement(a, b, y, shown):
    """Return how predictions a and b (n,) of the labels y (n,) agree: a dict.

    agreement: share of equal predictions; expected: that share if their hits and their mistakes
    were independent and mistakes fell evenly on the other classes that were shown, `shown` (n,) in
    number; kappa: the excess, as a share of what is possible (as Cohen's); same_mistake: share of
    equal predictions where both are wrong.
    """
    p, q, both_wrong = (a == y).mean(), (b == y).mean(), (a != y) & (b != y)
    same, expected = (a == b).mean(), p * q + (1 - p) * (1 - q) * (1 / (shown - 1)).mean()
    kappa = (same - expected) / (1 - expected) if expected < 1 else math.nan
    return dict(agreement=same, expected=expected, kappa=kappa,
                same_mistake=(a == b)[both_wrong].mean() if both_wrong.any() else math.nan)


def measure_algorithm(settings, data, precision):
    """Return how the model's predictions agree with classical learners' and another seed's, by
    number of examples and of steps, where the query is of one of two or more classes shown.
    """
    (training, _, tests), n, rows = data, settings.EVAL_SEQUENCES, []
    longest = settings.NUM_EXAMPLES - 1
    lengths = [k for k in (10, 20, 50) if k < longest] + [longest]
    marks = [step for step in (1, 10, 30, 100, 300) if step < settings.STEPS] + [settings.STEPS]
    twin = trained_model(altered(settings, SEED=settings.SEED + 1000), training, precision)
    found = {name: predictions(twin, dataset, n, settings, precision, lengths=lengths)
             for name, dataset in tests.items()}
    for known, *_ in found.values():
        known["same model, other seed"] = known.pop("in-context")[:, lengths]
    for model, step in training_steps(settings, training, precision):
        for name, (known, y, *_) in found.items() if step in marks else ():
            mine = predictions(model, tests[name], n, settings, precision)[0]["in-context"]
            learners = {"in-context": mine[:, lengths], **known}
            pairs = [(a, b) for a, b in itertools.combinations(learners, 2)
                     if a == "in-context" or step == settings.STEPS]
            for (a, b), (i, k) in itertools.product(pairs, enumerate(lengths)):
                shown = np.eye(C, dtype=bool)[y[:, :k]].any(1)
                kept = shown[np.arange(len(y)), y[:, k]] & (shown.sum(1) > 1)
                rows.append(dict(step=step, tested_on=name, examples=k, a=a, b=b, **agreement(
                    learners[a][kept, i], learners[b][kept, i], y[kept, k], shown[kept].sum(1))))
    return rows


def report_algorithm(rows, figure):
    """For each data set: kappa by number of examples, over the training, and of all pairs."""
    kinds, last = values_of(rows, "tested_on"), max(row["step"] for row in rows)
    longest, lines = max(row["examples"] for row in rows), []
    figure.set_size_inches(17, 5 * len(kinds))
    for panels, kind in zip(figure.subplots(len(kinds), 3, squeeze=False), kinds):
        ours = select(rows, a="in-context", tested_on=kind)
        lines += draw_curves(select(ours, step=last), panels[0], "examples", "kappa", "b",
                             f"{kind}: agreement with the trained model, kappa", 1, 2)
        lines += draw_curves(select(ours, examples=longest), panels[1], "step", "kappa", "b",
                             f"{kind}: the same after {longest} examples", 1, 2)
        pairs = select(rows, tested_on=kind, step=last, examples=longest)
        pairs += [dict(row, a=row["b"], b=row["a"]) for row in pairs]
        heat_map(panels[2], pairs, "a", "b", "kappa", "kappa of all pairs", 1, 2)
    return lines


# What the small ones among them share: 8x8 images, and a model small enough for many runs.
SMALL = dict(IMAGE_SIZE=8, PROJECTION_SIZE=64, NUM_EXAMPLES=30, COMPARE_IMAGES=False,
             RIDGE_ATTENTION=False, ATTENTION_SCALE=16.0, OUTPUT_STD=1.0, MODEL_SIZE=64,
             NUM_LAYERS=2, MLP_SIZE=128, BATCH_SIZE=64, STEPS=1000, LEARNING_RATE=3e-3,
             DECAY_FRACTION=0.3, MERGED_FRACTION=0.0, EVAL_SEQUENCES=1024)
AS_QUICK = dict(PROJECTION_SIZE=784, STEPS=600, MERGED_FRACTION=0.0, EVAL_SEQUENCES=1024)
EXPERIMENTS = {
    "phases": Experiment(
        "Memorising, identifying tasks, learning to learn: by number of training tasks",
        dict(SMALL, PROJECTION_SIZE=512, MLP_SIZE=512, BATCH_SIZE=128, STEPS=800,
             LEARNING_RATE=2e-3),                        # tasks easy to tell apart, and to memorise
        [dict(kind, MODEL_SIZE=D, NUM_TASKS=2**k) for kind in (
            dict(ARCHITECTURE="transformer", TOKEN_FORMAT="paper", GUIDED_START=True),
            dict(ARCHITECTURE="transformer", TOKEN_FORMAT="pairs", GUIDED_START=False),
            dict(ARCHITECTURE="mlp", TOKEN_FORMAT="paper", GUIDED_START=True))
            for D in (32, 128) for k in (0, 5, 9, 10, 11, 13, 18)], measure_phases, report_phases),
    "architectures": Experiment(
        "Accuracy against state and against parameters",
        dict(SMALL, BATCH_SIZE=32),                      # without a start some stay at chance
        [*(dict(ARCHITECTURE=name, MODEL_SIZE=D, GUIDED_START=False)
           for name in ("transformer", "deltanet") for D in (32, 64, 128)),
         *(dict(ARCHITECTURE="lstm", MODEL_SIZE=D, GUIDED_START=True) for D in (64, 128, 256)),
         *(dict(ARCHITECTURE="outer_lstm", MODEL_SIZE=D, NUM_HEADS=H, LEARNING_RATE=lr,
                GUIDED_START=True) for D, H, lr in ((32, 2, 1e-3), (64, 4, 1e-3), (128, 4, 3e-4))),
         *(dict(ARCHITECTURE="vsml", MODEL_SIZE=64, CELL_SIZE=n, GUIDED_START=False)
           for n in (4, 8)),
         *(dict(ARCHITECTURE="vsml_free", MODEL_SIZE=D, CELL_SIZE=8, GUIDED_START=True)
           for D in (12, 16))], measure_architectures, report_architectures),
    "plateau": Experiment(
        "Length of the plateau: filled where it was left, hollow where it was not",
        dict(SMALL, MLP_SIZE=256, STEPS=1200, DECAY_FRACTION=0.0, EVAL_SEQUENCES=256), [
            {**PLATEAU_BASE, **cell} for cells in PLATEAU_FACTORS.values()
            for cell in cells.values()], measure_plateau, report_plateau),
    "table": Experiment(
        "The paper's table",
        dict(EVAL_DATASETS="auto,KMNIST?,Random,CIFAR10?,SVHN?", MERGED_FRACTION=0.0),
        [dict(ARCHITECTURE=name, PROJECTION_SIZE=P, MODEL_SIZE=D, NUM_LAYERS=layers, STEPS=steps,
              BATCH_SIZE=B, LEARNING_RATE=rate) for name, P, D, layers, steps, B, rate in (
            ("transformer", 784, 128, 6, 600, 32, 5e-3), ("lstm", 64, 400, 1, 400, 32, 1e-3),
            ("maml", 784, 128, 1, 600, 16, 1e-3), ("vsml", 784, 64, 1, 600, 16, 4e-2))],
        measure_table, report_table),
    "features": Experiment("Few-shot classification of classes that nothing was trained on",
                           AS_QUICK, [{}], measure_features, report_features),
    "algorithm": Experiment("Which classical learner does the trained model act like?",
                            AS_QUICK, [{}], measure_algorithm, report_algorithm),
}


# --------------------------------------------------------------------------------- the whole job
def load_all(settings, device):
    """Return training, validation, tests, notices: Datasets, {row: (Dataset, NUM_TASKS)}, texts."""
    notices, name = [], "MNIST" if settings.TRAIN_DATASET == "auto" else settings.TRAIN_DATASET
    try:
        whole = load_dataset(name, "train", settings, device)
    except DataUnavailable as error:
        if settings.TRAIN_DATASET != "auto":
            raise
        notices.append(f"\n*** NOTICE: {error}\n*** Rendered digits and letters stand in for MNIST "
                       "and FashionMNIST.\n*** Their numbers can't be compared with the paper's.\n")
        name = "RenderedDigits"
        whole = load_dataset(name, "train", settings, device)
    n = len(whole.y)
    kept = n - min(settings.VALIDATION_IMAGES, max(n // 4, settings.NUM_EXAMPLES))
    if min(kept, n - kept) < settings.NUM_EXAMPLES:
        raise UserError(f"{name} has {kept} images to train on and {n - kept} for validation, see "
                        f"VALIDATION_IMAGES; a sequence needs {settings.NUM_EXAMPLES} of either.")
    training = whole._replace(x=whole.x[:kept], y=whole.y[:kept])
    validation = whole._replace(x=whole.x[kept:], y=whole.y[kept:])
    tests = load_tests(name, settings, device, notices)
    if printable(name) in tests:                         # a file called as another data set
        training = training._replace(name=printable(name))
    return training, validation, tests, notices


def load_tests(name, settings, device, notices):
    """Return the rows of the evaluation, {row: (Dataset, NUM_TASKS)}, after training on `name`."""
    other = {"RenderedDigits": "RenderedLetters", "FashionMNIST": "MNIST"}.get(name, "FashionMNIST")
    wanted = [word.strip() for word in settings.EVAL_DATASETS.split(",") if word.strip()]
    if "auto" in wanted:
        wanted = [name, f"{other}?", *(word for word in wanted if word != "auto")]
    names, tests = dict.fromkeys(word.rstrip("?") for word in wanted), {}
    for word in names:
        known = os.path.realpath(word) == os.path.realpath(name)       # a path has many names
        try:
            dataset = load_dataset(word, "test" if known else "unseen", settings, device)
        except DataUnavailable as error:
            if word in wanted:                           # without a "?"
                raise
            notices.append(f"\n*** NOTICE: {error}\n*** It is left out of the evaluation.\n")
            continue
        taken = {*tests, *names, *(() if known else PAPER)}            # someone's MNIST.npz
        row = printable(word) if dataset.name in taken else dataset.name
        if settings.NUM_TASKS and known:
            tests[f"{row}, seen tasks"] = dataset, settings.NUM_TASKS
        tests[row] = dataset, 0
    if not tests:
        raise UserError("EVAL_DATASETS names no data set to be had; try --EVAL_DATASETS=MNIST.")
    return tests


def speed(model, training, settings, progress, precision, log):
    """Say and return how fast the steps were, beside what the machine could do."""
    x, y = draw_sequences(training, 1, settings, ("speed",))
    seconds, drawing = progress["seconds"], progress["drawing_seconds"] / progress["seconds"]
    steps = progress["step"] * settings.BATCH_SIZE / processes()[1]      # of one sequence each
    rate, peak = flops(model, x, y) * steps / seconds, matmul_rate(x.device, precision)
    log(f"\nTrained {progress['step']} steps in {seconds:.0f} s, {drawing:.0%} of it to draw "
        f"tasks; {rate:.3g} FLOP/s in matrix products,\n{rate / peak:.0%} of what one large "
        f"product reaches here. Testing on {settings.EVAL_SEQUENCES} sequences a data set ...")
    return dict(training_seconds=seconds, model_flop_per_second=rate, matmul_flop_per_second=peak,
                model_flop_share=rate / peak, drawing_share=drawing)


def run(preset, settings):
    """Meta-train, evaluate and report; continue where a run of the same settings stopped."""
    began, (rank, world) = time.time(), processes()
    device, why, precision = choose_device(settings.DEVICE, settings.PRECISION)
    if rank:                                             # the first process downloads the data
        torch.distributed.barrier()
    training, validation, tests, notices = load_all(settings, device)
    if world > 1 and not rank:
        torch.distributed.barrier()
    chosen, default = identity(vars(settings)), vars(default_settings())
    words = [f"{k}={v}" for k, v in chosen.items() if v != PRESETS[preset].get(k, default[k])]
    folder = run_folder(settings, "-".join([training.name, preset, *words]), training.name,
                        sorted(chosen.items()))
    log = log_to(folder / "log.txt", silent=rank > 0)
    torch.manual_seed(settings.SEED)
    model = make_model(settings).to(device)
    data = [("meta-training", training), ("validation", validation)] + [
        ("test", dataset) for dataset, num_tasks in tests.values() if not num_tasks]
    log(*notices, f"Device      {device.type} ({why}), {precision}; {machine(device)}", *(
        f"Data        {dataset.name}, {use}: {len(dataset.x):,} of {dataset.x.shape[1]} numbers, "
        f"{dataset.classes} classes" for use, dataset in data),
        f"Model       {sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"Settings    {', '.join([preset, *words])}\nRun folder  {folder}")

    report, final = folder / "results.json", folder / "model.pt"
    if report.exists() and final.exists():
        with contextlib.suppress(ValueError, TypeError, KeyError):     # damaged: tested again
            found = json.loads(report.read_text())
            if {*tests} <= {*found["data_sets"]}:        # none can be had that could not then
                log(*result_table(found),
                    f"\nThis run was finished before. To make it afresh, delete {folder}")
                return
    if not (rank or final.exists() or folder.samefile(Path(__file__).parent)):
        with replacing(folder / Path(__file__).name) as temporary:     # now: it may be edited
            shutil.copyfile(__file__, temporary)
    progress = resume(final, settings, model) or meta_train(
        model, training, validation, settings, folder, precision, log)
    if rank:
        return                                           # the rest is the first process's work
    if not final.exists():                               # else it tells where it was trained
        source = settings.TRAIN_DATASET
        source = os.path.realpath(source) if source.endswith(".npz") else source
        save_checkpoint(final, settings, model, progress=progress, trained_on=training.name,
                        source=source, device=device.type)
    for done in [folder / "checkpoint.pt", *folder.glob("*.tmp.*")]:     # what a kill half wrote
        done.unlink(missing_ok=True)
    test_and_report(model, tests, settings, precision, folder, log, began, dict(
        trained_on=training.name, preset=preset, processes=world, steps=progress["step"],
        **speed(model, training, settings, progress, precision, log), progress=progress["rows"]))


def test_and_report(model, tests, settings, precision, folder, log, began, facts):
    """Evaluate the model on all of `tests`; write the files of the run, print the table."""
    device, testing, data_sets = next(model.parameters()).device, time.time(), {}
    for row, (dataset, num_tasks) in tests.items():
        curves, error = evaluate(model, dataset, settings, precision, num_tasks)
        data_sets[row] = dict(classes=dataset.classes, calibration_error=error, curves=curves,
                              paper=paper_numbers(settings, facts["trained_on"], row))
    results = dict(**facts, settings=vars(settings), data_sets=data_sets,
                   context_lengths=context_lengths(settings), **provenance(device, precision),
                   parameters=sum(p.numel() for p in model.parameters()),
                   evaluation_seconds=time.time() - testing)
    columns = "examples", "accuracy", "low", "high"
    write_csv(folder / "curves.csv", [["data_set", "learner", *columns]] + [
        [row, learner, *point] for row, entry in data_sets.items()
        for learner, curve in entry["curves"].items() for point in zip(*map(curve.get, columns))])
    plot(folder / "accuracy_by_examples.png", results)
    results |= dict(peak_memory_bytes=peak_memory(device), total_seconds=time.time() - began)
    with replacing(folder / "results.json") as temporary:      # last: it marks the run as finished
        temporary.write_text(json.dumps(results, indent=1))
    seconds = results["total_seconds"]
    log(f"Finished, {seconds:.0f} s after the start of this command.", *result_table(results))


def evaluate_checkpoint(settings, flags):
    """Print and write the curves of a trained model on any data sets, without training."""
    began, path = time.time(), newest_checkpoint(settings)
    device, why, precision = choose_device(settings.DEVICE, settings.PRECISION)
    model, saved = load_model(path, device)
    chosen = {name: getattr(settings, name) for name in
              {"DEVICE", "PRECISION", "DATA_DIR", "OUT_DIR", "EVAL_DATASETS", *flags}}
    settings = default_settings(**{**saved["settings"], **chosen})
    check_settings(settings)
    if "trained_on" not in saved:
        raise UserError(f"{path} is not the model.pt of a run; give one with --CHECKPOINT=path.")
    check_context(model, settings.NUM_EXAMPLES - 1)
    notices, name = [], saved["trained_on"] if saved["source"] == "auto" else saved["source"]
    before = saved["settings"]["IMAGE_SIZE"], saved["device"]
    # Of other images, or by another device's random numbers, fixed tasks would not be those seen.
    seen = settings.NUM_TASKS if before == (settings.IMAGE_SIZE, device.type) else 0
    tests = load_tests(name, altered(settings, NUM_TASKS=seen), device, notices)
    folder = run_folder(settings, "-".join(["evaluation", *tests]), path.resolve(),
                        sorted(identity(vars(settings)).items()))
    log = log_to(folder / "log.txt")
    log(*notices, f"Device      {device.type} ({why}), {precision}\n"
        f"Model       {path}, meta-trained on {saved['trained_on']}\n"
        f"Data        {', '.join(tests)}\nRun folder  {folder}")
    test_and_report(model, tests, settings, precision, folder, log, began,
                    dict(trained_on=saved["trained_on"], checkpoint=str(path)))


def classify(settings):
    """Label the rows of TEST_FILE by the examples of TRAIN_FILE; write PREDICTIONS_FILE."""
    for name in ("TRAIN_FILE", "TEST_FILE"):
        if not getattr(settings, name):
            raise UserError(f"classify needs a {name}; add --{name}=path of a .csv or .npz file.")
        if os.path.realpath(getattr(settings, name)) == os.path.realpath(settings.PREDICTIONS_FILE):
            raise UserError(f"PREDICTIONS_FILE would replace {name}; give another name.")
    path = newest_checkpoint(settings)
    x, y, names = read_examples(settings.TRAIN_FILE, settings.LABEL_COLUMN)
    features = as_rows(x).shape[1]
    rows, labels, other = read_examples(settings.TEST_FILE, settings.LABEL_COLUMN, features, names)
    if names and other and names != other:
        raise UserError(f"the columns of TEST_FILE ({', '.join(other)}) are not those of "
                        f"TRAIN_FILE ({', '.join(names)}), in their order.")
    classifier = InContextClassifier(path, settings.N_ENSEMBLE, random_state=settings.SEED)
    probabilities = classifier.fit(x, y).predict_proba(rows)
    predicted = classifier.classes_[probabilities.argmax(1)]
    write_csv(Path(settings.PREDICTIONS_FILE), [
        ["prediction", *(f"p({name})" for name in classifier.classes_)],
        *([name, *(f"{p:.4f}" for p in row)] for name, row in zip(predicted, probabilities))],
        f"PREDICTIONS_FILE={settings.PREDICTIONS_FILE}")
    print(f"Model        {path}\nExamples     {len(x)} of {features} features, "
          f"{len(classifier.classes_)} classes\nPredictions  {len(rows)} rows, in "
          f"{settings.PREDICTIONS_FILE}")
    if labels is not None:
        labels = as_labels(labels, len(rows))
        known, told, true = ([*map(plain, a)] for a in (classifier.classes_, predicted, labels))
        others = [label for label in true if label not in known]
        if len(others) == len(true):
            raise UserError(f"none of TEST_FILE's labels ({labels[0]!s} ...) is one of the "
                            f"examples' ({', '.join(map(str, classifier.classes_))}).")
        if others:
            print(f"NOTICE       {len(others)} labels of TEST_FILE are of no class of the examples "
                  f"({others[0]} ...); they count as wrong.")
        right = sum(a == b for a, b in zip(told, true))
        low, high = interval(right, len(rows))
        print(f"Accuracy     {100 * right / len(rows):.1f} % "
              f"(95 % interval {100 * low:.1f} to {100 * high:.1f})")


def explained(error):
    """Return what to tell a user of an error; nothing, if it is a mistake of this program."""
    words = " ".join(str(error).split())
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, RuntimeError) and re.search("Connection (closed by peer|reset)", words):
        return "another process of torchrun has stopped; its message says why."
    if isinstance(error, ModuleNotFoundError):
        return f"{words}; to install what is needed: pip install -r requirements.txt"
    if isinstance(error, OSError):
        return (f"{words}. Is the disk full, or a folder gone? What was saved before is kept; the "
                "same command goes on from there.")
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError | TypeError) and re.search(
            "(allocate|out of) memory|size calculation overflow|Overflow when unpacking", words):
        return (f"there is too little memory ({words[:160]}); try fewer or shorter sequences "
                "(BATCH_SIZE, NUM_EXAMPLES) or a smaller model.")
    return ""


def main(arguments):
    """Run a command line; return the exit code."""
    socket.setdefaulttimeout(20)                         # for downloads from a silent network
    for out in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):        # a notebook's can't
            out.reconfigure(errors="backslashreplace")   # where a terminal has no ±
    keep_freed_memory()
    try:
        if {"-h", "--help"} & set(arguments):
            print(help_text(), flush=True)
            return 0
        word, settings, flags = read_settings(arguments)
        together = "TORCHELASTIC_RUN_ID" in os.environ   # of torchrun
        if word not in PRESETS and together:
            raise UserError(f"{word} is not for several processes; run it without torchrun.")
        if word == "evaluate":
            evaluate_checkpoint(settings, flags)
        elif word == "classify":
            classify(settings)
        elif word in EXPERIMENTS:
            sweep(word, settings, flags)
        else:
            with joined_processes(settings) if together else contextlib.nullcontext():
                run(word, settings)
    except BrokenPipeError:                              # the reader has left, as of --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "Stopped; run the same command again to go on.")
        return 130
    except Exception as error:
        if not (told := explained(error)):
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)          # a kill is as Ctrl-C
    sys.exit(main(sys.argv[1:]))
