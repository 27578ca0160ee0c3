"""The plateau: how many steps the loss stays at that of guessing, and what shortens it.

    python -m experiments.plateau --SEEDS=6

(Paper, figures on the plateau.) From a base, on sample-label pairs, each factor is varied: the
batch size, the number of tasks, the optimiser, a share of each batch with one label permutation,
the start. With the paper's token and Adam: what helps it (its starts are in look_back.py).
"""

import math
import sys

import numpy as np
import torch
import torch.nn.functional as F

import gpicl_minimal_replication as gpicl
from experiments import sweep
from experiments.figures import distinct, mean_interval, select, t_quantile

TITLE = "Length of the plateau"
SETTINGS = dict(
    NUM_EXAMPLES=30, MODEL_SIZE=64, NUM_LAYERS=2, MLP_SIZE=256, ATTENTION_SCALE=16.0, STEPS=1200,
    DECAY_FRACTION=0.0, EVAL_SEQUENCES=256)
BASE = dict(MODEL="experiments.muon:MuonTransformer", TOKEN_FORMAT="pairs", IMAGE_QUERIES=False,
            OUTPUT_STD=1.0, NUM_TASKS=0, BIASED_FRACTION=0.0, MERGED_FRACTION=0.0, BATCH_SIZE=64,
            LEARNING_RATE=3e-3, ADAM_EPSILON=1e-8, IMAGE_SIZE=8, PROJECTION_SIZE=64)
ADAM = dict(MODEL="transformer", LEARNING_RATE=1e-3)
LOOK_BACK = "experiments.look_back:"
ADDITIONS = {
    "nothing": ADAM,
    "0.9, one permutation": dict(ADAM, BIASED_FRACTION=0.9),
    "batches of 256": dict(ADAM, BATCH_SIZE=256),
    "epsilon 1e-12": dict(ADAM, ADAM_EPSILON=1e-12),
    "these three": dict(ADAM, BIASED_FRACTION=0.9, BATCH_SIZE=256, ADAM_EPSILON=1e-12),
    "2 to 9 classes": dict(ADAM, MERGED_FRACTION=0.9),
    "looking back": dict(ADAM, MODEL=LOOK_BACK + "LookBackTransformer"),
    "back, copying": dict(ADAM, MODEL=LOOK_BACK + "CopyingTransformer"),
    "back, copying, comparing": dict(ADAM, MODEL=LOOK_BACK + "ComparingTransformer"),
    "smeared keys": dict(ADAM, MODEL=LOOK_BACK + "SmearedTransformer"),
    "smeared, comparing": dict(ADAM, MODEL=LOOK_BACK + "SmearedComparingTransformer"),
}
LARGE = ("nothing", "these three", "looking back", "back, copying, comparing", "smeared keys",
         "smeared, comparing")
FACTORS = {
    "batch size": {str(n): dict(BATCH_SIZE=n) for n in (16, 32, 64, 128, 256)},
    "number of training tasks": {
        **{f"2**{k}": dict(NUM_TASKS=2**k) for k in (6, 8, 10, 12, 14, 16)}, "fresh": {}},
    "optimiser, and epsilon of Adam": {
        "Muon": {}, **{f"Adam, {epsilon:g}": dict(ADAM, ADAM_EPSILON=epsilon)
                       for epsilon in (1e-12, 1e-8, 1e-5, 1e-3)}},
    "share of each batch with one label permutation": {
        str(share): dict(BIASED_FRACTION=share) for share in (0.0, 0.5, 0.9)},
    "start of the weights": {"zero outputs": dict(OUTPUT_STD=0.0), "random": {},
                             "comparing images": dict(IMAGE_QUERIES=True)},
    "what is added to the paper's token, 8×8 images": {
        value: dict(cell, TOKEN_FORMAT="paper") for value, cell in ADDITIONS.items()},
    "what is added to the paper's token, 28×28 images": {
        value: dict(ADDITIONS[value], TOKEN_FORMAT="paper", IMAGE_SIZE=28, PROJECTION_SIZE=784)
        for value in LARGE},
}
CELLS = [{**BASE, **cell} for cells in FACTORS.values() for cell in cells.values()]
COMPARED = tuple(BASE)


def plateau_length(steps, losses, drop=0.1):
    """Return the first of `steps` from which on the loss stays `drop` nats below log C, or None."""
    after = max((i for i, loss in enumerate(losses, 1) if not loss < math.log(gpicl.C) - drop),
                default=0)
    return steps[after] if after < len(steps) else None


def measure(settings, data, precision, every=20, enough=3):
    """Return the plateau's length on validation images: on unseen tasks, and on the training tasks
    where their number is fixed. A run ends when `enough` measurements were below the plateau.
    """
    training, validation, _ = data
    kinds = {"unseen tasks": 0}
    if settings.NUM_TASKS:
        kinds["training tasks"] = settings.NUM_TASKS
    key = "plateau", settings.EVAL_SEED
    batches = {kind: gpicl.draw_sequences(validation, settings.EVAL_SEQUENCES, settings, key, tasks)
               for kind, tasks in kinds.items()}
    steps, losses = [], {kind: [] for kind in kinds}
    for model, step in sweep.training_run(settings, training, precision):
        if step % every and step != settings.STEPS:
            continue
        steps.append(step)
        for kind, (x, y) in batches.items():
            with torch.no_grad():
                logits = gpicl.compute_logits(model, x, y, precision).flatten(0, 1)
            losses[kind].append(F.cross_entropy(logits, y.flatten()).item())
        lengths = {kind: plateau_length(steps, losses[kind]) for kind in kinds}
        if len(steps) >= enough and all(
                length and length <= steps[-enough] for length in lengths.values()):
            break
    return [dict(tested_on=kind, length=lengths[kind], left=lengths[kind] is not None,
                 steps=steps[-1]) for kind in kinds]


def report(rows, figure):
    """One panel for each factor, one mark for each run."""
    figure.set_size_inches(15, 16)
    panels = figure.subplot_mosaic("AABBCC;DDDEEE;FFFFFF;GGGGGG", sharey=True).values()
    lines = []
    limit = max(row["steps"] for row in rows)
    for panel, (factor, cells) in zip(panels, FACTORS.items()):
        lines += ["", f"Length of the plateau (steps) by {factor}"]
        for place, (value, cell) in enumerate(cells.items()):
            runs = select(rows, **{**BASE, **cell})
            lines.append(f"  {value:25}" + "; ".join(
                length_in_words(select(runs, tested_on=kind), limit)
                for kind in distinct(runs, "tested_on")))
            draw_runs(panel, place, runs, limit)
        panel.set_xticks(range(len(cells)), [value.replace(", ", ",\n") for value in cells])
        panel.set(xlabel=factor, ylabel="length of the plateau (steps)", yscale="log")
        panel.grid(alpha=0.3)
    return lines + power_law_lines(rows)


def length_in_words(runs, limit):
    """Return the mean length of the plateau in the runs that left it, and how many did."""
    left = select(runs, left=True)
    mean, half = mean_interval(left, "length")
    words = f"{mean:.0f} ± {half:.0f}".replace(" ± nan", "") if left else f"more than {limit}"
    return f"{runs[0]['tested_on']} {words}, left in {len(left)} of {len(runs)} runs"


def draw_runs(panel, place, runs, limit):
    """Draw a filled mark where a run left the plateau, a hollow one at `limit` if it did not."""
    for color, kind in enumerate(("unseen tasks", "training tasks")):
        for left, marker, words in ((True, "o", ""), (False, "^", f", not left in {limit} steps")):
            if shown := select(runs, tested_on=kind, left=left):
                panel.plot([place + 0.15 * color] * len(shown),
                           [row["length"] or limit for row in shown], f"C{color}{marker}",
                           fillstyle="full" if left else "none", label=kind + words)


def power_law_lines(rows):
    """Return a line with the exponent of length ~ batch size ** exponent, if it can be fitted."""
    unbatched = {name: value for name, value in BASE.items() if name != "BATCH_SIZE"}
    runs = select(rows, tested_on="unseen tasks", **unbatched)
    stuck = distinct(select(runs, left=False), "BATCH_SIZE")             # would bias the fit
    fitted = [row for row in runs if row["BATCH_SIZE"] not in stuck]
    if len(distinct(fitted, "BATCH_SIZE")) < 3:
        return []
    exponent, half = power_law([row["BATCH_SIZE"] for row in fitted],
                               [row["length"] for row in fitted])
    return ["", f"Power law: length ~ batch size ** ({exponent:.2f} ± {half:.2f}), from "
                f"{len(fitted)} runs of the batch sizes that always left it"]


def power_law(x, y):
    """Return the exponent of y ~ x ** exponent and half of its 95 % interval, by least squares."""
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    return slope, t_quantile(len(x) - 2) * covariance[0, 0]**0.5


if __name__ == "__main__":
    sys.exit(sweep.main("plateau", sys.argv[1:]))
