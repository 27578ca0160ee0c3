"""The paper's table: accuracy of several learners at the end of a sequence, by meta-test data set.

    python -m experiments.table

Rows: the default model, the guided one, LSTM, MAML and VSML, all meta-trained here; and two
learners that are not meta-trained. "SGD (softmax)" is softmax regression, tuned (see BASELINES in
the main file). "Adam, online" is how an earlier public program of the paper's first author ran its
"SGD": untuned, one pass. Which of the two the paper's "SGD" is, it doesn't say.
Columns: MNIST, FashionMNIST, KMNIST, Random (ten random points, one per class), and CIFAR10 in
colour, from a file with x (n, 32, 32, 3) and y (n,) (ours: of public JPEG copies, so not the exact
pixels). The paper's numbers stand in brackets.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import gpicl_minimal_replication as gpicl
from experiments import sweep
from experiments.figures import distinct, draw_curves, mean_interval, select
from gpicl_minimal_replication import C

CIFAR10_FILE = "data/CIFAR10_jpeg_4000.npz"    # images and labels; no such file: no such column

TITLE = "The paper's table"
# As in the paper, all ten classes are told apart: none are merged.
SETTINGS = dict(EVAL_DATASETS="MNIST,FashionMNIST,KMNIST", MERGED_FRACTION=0.0)
IN_CONTEXT = {
    "in-context, default": dict(MODEL="transformer", STEPS=gpicl.PRESETS["quick"]["STEPS"]),
    "in-context, guided": {**gpicl.PRESETS["guided"], "STEPS": 600},
}
METHODS = {
    **IN_CONTEXT,
    "LSTM": dict(MODEL="experiments.architectures:LSTMModel", PROJECTION_SIZE=64, MODEL_SIZE=400,
                 NUM_LAYERS=1, STEPS=400, LEARNING_RATE=1e-3),
    "MAML": dict(MODEL="experiments.architectures:MAML", STEPS=600, BATCH_SIZE=16,
                 LEARNING_RATE=1e-3),
    "VSML": dict(MODEL="experiments.architectures:VSML", STEPS=600, BATCH_SIZE=16,
                 LEARNING_RATE=4e-2, EVAL_SEQUENCES=1024),               # a test takes it minutes
}
CELLS = list(METHODS.values())
COMPARED = ("MODEL",)
# Accuracy (%) on the 100th example after 99, meta-trained on MNIST (paper, table).
PAPER = {
    "MNIST": dict(GPICL=73.70, SGD=70.31, MAML=53.71, VSML=79.04, LSTM=25.39),
    "FashionMNIST": dict(GPICL=62.24, SGD=50.78, MAML=48.44, VSML=68.49, LSTM=28.12),
    "KMNIST": dict(GPICL=53.39, SGD=37.89, MAML=36.33, VSML=54.69, LSTM=18.10),
    "Random": dict(GPICL=100.0, SGD=100.0, MAML=99.80, VSML=100.0, LSTM=58.72),
    "CIFAR10": dict(GPICL=19.40, SGD=14.84, MAML=17.38, VSML=24.09, LSTM=12.11),
    "SVHN": dict(GPICL=14.58, SGD=10.16, MAML=11.33, VSML=17.45, LSTM=11.07),
}
NAMES_IN_PAPER = {"in-context, default": "GPICL", "LSTM": "LSTM", "MAML": "MAML", "VSML": "VSML",
                  "SGD (softmax)": "SGD", "Adam, online": "SGD"}


def method_name(settings):
    """Return the name of the method whose MODEL these settings have."""
    return next(name for name, cell in METHODS.items() if cell["MODEL"] == settings.MODEL)


def random_points(settings, device):
    """Return a Dataset of ten random points, one per class, many times each."""
    y = np.arange(2000) % C
    points = np.random.default_rng(0).standard_normal((C, settings.IMAGE_SIZE**2))
    return gpicl.as_dataset("Random", points[y], y, settings.IMAGE_SIZE, device)


def more_tests(settings, device):
    """Return {column: Dataset} of what EVAL_DATASETS can't name: Random, and CIFAR10 in colour, of
    32 x 32 x 3 numbers as in the paper, if there is a CIFAR10_FILE.
    """
    tests = {"Random": random_points(settings, device)}
    if Path(settings.CIFAR10_FILE).is_file():
        in_colour = gpicl.default_settings(**{**vars(settings), "IMAGE_SIZE": 32})
        cifar10 = gpicl.load_dataset(settings.CIFAR10_FILE, "unseen", in_colour, device)
        tests["CIFAR10"] = cifar10._replace(name="CIFAR10")
    return tests


def check(settings, data):
    """Say so where there is no CIFAR10; raise UserError where it can't be used."""
    if "CIFAR10" not in more_tests(settings, data[0].x.device):
        print(f"\n*** NOTICE: there is no file {settings.CIFAR10_FILE} (CIFAR10_FILE).\n"
              "*** The table will have no column CIFAR10.\n")


@torch.enable_grad()
def online_adam(x, y, rate=1e-3):
    """Return logits (B, C) for the last of x (B, n + 1, P), by labels y (B, n) of the others.

    A linear softmax layer that starts at zero learns from one example after another, in one pass,
    by Adam. Adam treats every number alone, so a layer for each sequence is one optimiser's.
    """
    weights = x.new_zeros(len(x), x.shape[2], C, requires_grad=True)
    biases = x.new_zeros(len(x), 1, C, requires_grad=True)
    optimizer = torch.optim.Adam([weights, biases], rate)
    for i in range(y.shape[1]):
        logits = x[:, i:i + 1] @ weights + biases
        F.cross_entropy(logits[:, 0], y[:, i], reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
    return (x[:, -1:] @ weights + biases)[:, 0].detach()


def online_adam_correct(dataset, settings):
    """Return how often online_adam is right at the end of the meta-test sequences."""
    batches = gpicl.meta_test_batches(dataset, settings.EVAL_SEQUENCES, settings)
    return sum((online_adam(x, y[:, :-1]).argmax(-1) == y[:, -1]).sum().item() for x, y in batches)


def measure(settings, data, precision):
    """Return the accuracy at the end of the sequence, on every data set; beside the default's,
    those of the learners that are not meta-trained.
    """
    training, _, tests = data
    model, n = sweep.trained_model(settings, training, precision), settings.EVAL_SEQUENCES
    method, rows = method_name(settings), []
    lengths = [settings.NUM_EXAMPLES - 1] if method == "in-context, default" else []
    comparable = training.name == "MNIST" and settings.NUM_EXAMPLES == 100
    for name, dataset in {**tests, **more_tests(settings, training.x.device)}.items():
        counts = gpicl.count_correct(model, dataset, n, settings, precision, lengths=lengths)
        correct = {method: counts["in-context"][-1]}
        if lengths:
            correct["SGD (softmax)"] = counts["SGD (softmax)"][-1]
            correct["Adam, online"] = online_adam_correct(dataset, settings)
        paper = PAPER.get(name, {}) if comparable else {}
        rows += [dict(method=learner, tested_on=name, accuracy=float(k / n),
                      paper=paper.get(NAMES_IN_PAPER.get(learner)))
                 for learner, k in correct.items()]
    return rows


def report(rows, figure):
    """Return the table, ours with 95 % intervals and the paper's in brackets; draw both."""
    methods = [name for name in (*METHODS, "SGD (softmax)", "Adam, online")
               if select(rows, method=name)]
    data_sets = distinct(rows, "tested_on")
    lines = ["", "Accuracy (%) at the end of the sequence, 95 % interval over the seeds "
             "(the paper's number)", 22 * " " + "".join(f"{name:>20}" for name in data_sets)]
    for method in methods:
        lines.append(f"{method:22}")
        for name in data_sets:
            cell = select(rows, method=method, tested_on=name)
            mean, half = mean_interval(cell, "accuracy")
            words = f"{100 * mean:.1f} ± {100 * half:.1f}".replace(" ± nan", "")
            paper = f" ({cell[0]['paper']:.1f})" if cell[0]["paper"] else ""
            lines[-1] += f"{words:>12}{paper:8}"
    draw(figure, [row for name in methods for row in select(rows, method=name)], data_sets)
    return [line.rstrip() for line in lines]


def draw(figure, rows, data_sets):
    """Draw a mark for each method on each data set, and a cross for the paper's number."""
    figure.set_size_inches(11, 5.5)
    panel, methods = figure.subplots(), distinct(rows, "method")
    draw_curves(panel, rows, "tested_on", "accuracy", "method", "meta-test data set",
                "accuracy (%) at the end of the sequence")
    for line in panel.get_lines():
        line.set_linestyle("")                           # data sets have no order to join
    for color, method in enumerate(methods):
        papers = {data_sets.index(row["tested_on"]) + 0.08 * color: row["paper"]
                  for row in select(rows, method=method) if row["paper"]}
        panel.plot([*papers], [*papers.values()], f"C{color}x")
    panel.plot([], [], "kx", label="in the paper")
    panel.axhline(100 / C, color="grey", ls=":", label="chance")
    panel.set_xticks(np.arange(len(data_sets)) + 0.04 * (len(methods) - 1), data_sets)
    panel.set_ylim(0, 105)


if __name__ == "__main__":
    sys.exit(sweep.main("table", sys.argv[1:]))
