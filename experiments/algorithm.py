"""Which classical learner does the trained model act like? (Not in the paper.)

    python -m experiments.algorithm

Compares its predictions, sequence by sequence, with those of the baselines and of the same kind of
model trained with another seed: after so many examples, and in the course of meta-training. Kappa
is how much more often two learners predict the same label than their accuracies alone would make
them: 0 for nothing in common, 1 for the same predictions.
"""

import itertools
import math
import sys

import numpy as np
import torch

import gpicl_minimal_replication as gpicl
from experiments import sweep
from experiments.figures import distinct, draw_curves, heat_map, select, table_lines
from experiments.table import IN_CONTEXT, method_name

TITLE = "Which classical learner does the trained model act like?"
SETTINGS = dict(MERGED_FRACTION=0.0, EVAL_SEQUENCES=1024)
CELLS = list(IN_CONTEXT.values())
COMPARED = ("MODEL",)
TWIN = "same model, other seed"


def check(settings, data):
    """Raise UserError for sequences so short that there is no choice between two classes."""
    gpicl.require(settings.NUM_EXAMPLES > 2, "algorithm compares predictions after 2 or more "
                  "examples; use --NUM_EXAMPLES=3 or more.")


def agreement(predicted, others, y, n_classes):
    """Return how predictions and those of another learner, (n,) each, of the labels y (n,) agree:

    agreement: share of equal predictions; expected: that share if it did not matter where the other
    is right or wrong, and mistakes fell evenly on the other classes in the context, n_classes (n,)
    in number; kappa: the excess, as a share of what is possible (as Cohen's); same_mistake: share
    of equal predictions where both are wrong. The last two are nan where nothing is possible.
    """
    p, q, equal = (predicted == y).mean(), (others == y).mean(), (predicted == others).mean()
    expected = p * q + (1 - p) * (1 - q) * (1 / (n_classes - 1)).mean()
    kappa = (equal - expected) / (1 - expected) if expected < 1 else math.nan
    both_wrong = (predicted != y) & (others != y)
    same_mistake = (predicted == others)[both_wrong].mean() if both_wrong.any() else math.nan
    return dict(agreement=float(equal), expected=float(expected), kappa=float(kappa),
                same_mistake=float(same_mistake))


@torch.no_grad()
def predictions(model, dataset, settings, precision, lengths):
    """Return the labels (n, lengths) that the model predicts on the n meta-test sequences."""
    batches = gpicl.meta_test_batches(dataset, settings.EVAL_SEQUENCES, settings)
    return torch.cat([gpicl.compute_logits(model, x, y, precision)[:, lengths].argmax(-1)
                      for x, y in batches]).cpu().numpy()


def baseline_predictions(dataset, settings, lengths):
    """Return {baseline: predicted labels (n, lengths)} and the right labels y (n, T)."""
    predicted, labels = {name: [] for name in gpicl.BASELINES}, []
    for x, y in gpicl.meta_test_batches(dataset, settings.EVAL_SEQUENCES, settings):
        by_length = [gpicl.baseline_labels(x[:, :n + 1], y[:, :n]) for n in lengths]
        for name, parts in predicted.items():
            parts.append(torch.stack([of_length[name] for of_length in by_length], 1))
        labels.append(y.cpu())
    return ({name: torch.cat(parts).numpy() for name, parts in predicted.items()},
            torch.cat(labels).numpy())


def compare_all(predicted, y, lengths, pairs):
    """Return rows: the agreement of pairs of learners after `lengths` examples.

    predicted {learner: labels (n, lengths)}, y (n, T). Only queries count whose class is in the
    context, beside another one: a baseline can't predict what it hasn't seen.
    """
    rows = []
    for (learner, other), (i, length) in itertools.product(pairs, enumerate(lengths)):
        in_context = np.eye(gpicl.C, dtype=bool)[y[:, :length]].any(1)
        n_classes = in_context.sum(1)
        kept = in_context[np.arange(len(y)), y[:, length]] & (n_classes > 1)
        rows.append(dict(examples=length, learner=learner, other=other, **agreement(
            predicted[learner][kept, i], predicted[other][kept, i], y[kept, length],
            n_classes[kept])))
    return rows


def measure(settings, data, precision):
    """Return how the model's predictions agree with the others', by number of examples and of
    meta-training steps; after the last step, the agreement of all pairs.
    """
    training, _, tests = data
    rows, longest = [], settings.NUM_EXAMPLES - 1
    lengths = [k for k in (10, 20, 50) if k < longest] + [longest]
    marks = [step for step in (1, 3, 10, 30, 100, 300) if 2 * step <= settings.STEPS]
    marks.append(settings.STEPS)
    other_seed = gpicl.default_settings(**{**vars(settings), "SEED": settings.SEED + 1000})
    twin = sweep.trained_model(other_seed, training, precision)
    others = {}
    for name, dataset in tests.items():
        predicted, y = baseline_predictions(dataset, settings, lengths)
        predicted[TWIN] = predictions(twin, dataset, settings, precision, lengths)
        others[name] = predicted, y
    for model, step in sweep.training_run(settings, training, precision):
        for name, (predicted, y) in others.items() if step in marks else ():
            ours = predictions(model, tests[name], settings, precision, lengths)
            predicted = {"in-context": ours, **predicted}
            pairs = [pair for pair in itertools.combinations(predicted, 2)
                     if "in-context" in pair or step == settings.STEPS]
            rows += [dict(model=method_name(settings), step=step, tested_on=name, **row)
                     for row in compare_all(predicted, y, lengths, pairs)]
    return rows


def report(rows, figure):
    """A row of panels for each model and data set: kappa by number of examples, in the course of
    meta-training, and of all pairs.
    """
    kinds = list(itertools.product(distinct(rows, "tested_on"), distinct(rows, "model")))
    longest, lines = distinct(rows, "examples")[-1], []
    figure.set_size_inches(17, 4.6 * len(kinds))
    for panels, (tested_on, model) in zip(figure.subplots(len(kinds), 3, squeeze=False), kinds):
        of_kind = select(rows, tested_on=tested_on, model=model)
        last = select(of_kind, step=distinct(of_kind, "step")[-1])
        title = f"{tested_on}; {model}"
        for panel, shown, x, label in (
                (panels[0], select(last, learner="in-context"), "examples", "examples in context"),
                (panels[1], select(of_kind, learner="in-context", examples=longest), "step",
                 "meta-training steps")):
            lines += table_lines(shown, x, "kappa", "other", f"{title}: kappa, by {label}", 1, 2)
            draw_curves(panel, shown, x, "kappa", "other", label, "kappa", 1)
            panel.set_ylim(-0.1, 1)
        panels[0].set_title(title)
        panels[1].set_title(f"after {longest} examples")
        pairs = all_pairs(select(last, examples=longest))
        heat_map(panels[2], pairs, "learner", "other", "kappa", "", "", 1, 2)
        panels[2].set_title(f"kappa of all pairs, after {longest} examples")
    return lines


def all_pairs(rows):
    """Return rows for every ordered pair of learners, in one order; with itself a learner has 1."""
    learners = list(dict.fromkeys(distinct(rows, "learner") + distinct(rows, "other")))
    mirrored = [dict(row, learner=row["other"], other=row["learner"]) for row in rows]
    pairs = [dict(learner=name, other=name, kappa=1.0) for name in learners]
    return [row for learner in learners for other in learners
            for row in select(rows + mirrored + pairs, learner=learner, other=other)]


if __name__ == "__main__":
    sys.exit(sweep.main("algorithm", sys.argv[1:]))
