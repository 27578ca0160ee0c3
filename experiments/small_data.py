"""The in-context classifier on small data, beside scikit-learn's own classifiers.

    python -m experiments.small_data              tables, and small images
    python -m experiments.small_data unequal      images whose classes are not equally frequent

Random splits of scikit-learn's own data sets, each with 60 to 99 rows to learn from, and of 16 x 16
test images of MNIST and FashionMNIST (where there are such), with 99. All classifiers get the same
rows; for scikit-learn's, but the forest, columns of tables are standardised, images get unit
length. C, of the SVM and of logistic regression, is 1 for tables and 10 for images (which did best
on validation images of MNIST: results/recipe.md). "unequal": "8 or not" asks whether a digit is an
8, "skewed" has every class 0.7 times as often as the one before.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import gpicl_minimal_replication as gpicl

SPLITS = 30                  # of each data set, into rows to learn from and rows to label
DATA_DIR = "data"            # MNIST and FashionMNIST, if they are there
RESULTS_DIR = "results"      # gets small_data.json, or small_data_unequal.json


def make_learners(images):
    """Return {name: new classifier}, for images or for tables."""
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler
    from sklearn.svm import SVC

    from in_context_classifier import InContextClassifier

    def scaled(classifier):
        return make_pipeline(Normalizer() if images else StandardScaler(), classifier)

    C = 10 if images else 1
    return {"in-context": InContextClassifier(),
            "in-context, one pass": InContextClassifier(n_ensemble=1),
            "1-nearest neighbour": scaled(KNeighborsClassifier(1)),
            "logistic regression": scaled(LogisticRegression(C=C, max_iter=5000)),
            "RBF SVM": scaled(SVC(C=C)),
            "random forest": RandomForestClassifier(300, random_state=0),
            "most frequent class": DummyClassifier()}


def image_sets(folder):
    """Yield name, X (n, 16, 16), y of 2,100 test images each."""
    settings = gpicl.default_settings(IMAGE_SIZE=16, DATA_DIR=folder)
    for name in ("MNIST", "FashionMNIST"):
        try:
            dataset = gpicl.load_dataset(name, "test", settings, torch.device("cpu"))
        except FileNotFoundError as error:
            print(f"*** NOTICE: {error} It is left out.")
        else:
            rows = np.random.default_rng(0).permutation(len(dataset.y))[:2100]
            yield name, dataset.x[rows].view(-1, 16, 16).numpy(), dataset.y[rows].numpy()


def small_sets(folder):
    """Yield name, X, y, images: whether the rows of X are such."""
    from sklearn import datasets
    for name in ("iris", "wine", "breast_cancer", "digits"):
        yield name, *getattr(datasets, f"load_{name}")(return_X_y=True), name == "digits"
    for name, X, y in image_sets(folder):
        yield f"{name} 16x16", X, y, True


def unequal_sets(folder):
    """Yield name, X, y, images, of which some classes are rarer than others."""
    for name, X, y in image_sets(folder):
        kept = np.random.default_rng(1).random(len(y)) < 0.7**y
        yield f"{name} skewed", X[kept], y[kept], True
        if name == "MNIST":
            yield "MNIST, 8 or not", X, y == 8, True


def calibration_error(probabilities, correct, bins=15):
    """Return the expected calibration error: the mean distance of confidence and accuracy over
    `bins` bins of confidence (Guo et al. 2017), for probabilities (n, classes), correct (n,).
    """
    confidence = probabilities.max(1)
    numbers = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.abs(np.bincount(numbers, correct - confidence)).sum() / len(correct)


def compare(X, y, images, splits):
    """Return {learner: its accuracy on each split}, and the in-context classifier's calibration
    error on each.
    """
    accuracy, errors = {}, []
    for split in range(splits):
        random = np.random.default_rng(split)
        order = random.permutation(len(y))
        n = random.integers(60, 100) if X.ndim == 2 else 99
        train, test = order[:n], order[n:]
        for name, classifier in make_learners(images).items():
            rows = X if name.startswith("in-context") else X.reshape(len(X), -1)
            classifier.fit(rows[train], y[train])
            if name == "in-context":
                probabilities = classifier.predict_proba(rows[test])
                predicted = classifier.classes_[probabilities.argmax(1)]
                errors.append(calibration_error(probabilities, predicted == y[test]))
            else:
                predicted = classifier.predict(rows[test])
            accuracy.setdefault(name, []).append((predicted == y[test]).mean())
    return accuracy, errors


def seconds_for_10000_rows():
    """Return how long 10,000 rows of 784 features take, with 99 examples and one pass."""
    from in_context_classifier import InContextClassifier
    random = np.random.default_rng(0)
    classifier = InContextClassifier(n_ensemble=1)
    classifier.fit(random.normal(size=(99, 784)), random.integers(10, size=99))
    began = time.time()
    classifier.predict(random.normal(size=(10000, 784)))
    return time.time() - began


def summarise(data_set, accuracy, errors):
    """Return the record of a data set, with 95 % intervals over the splits; print it."""
    record = dict(calibration_error=float(np.mean(errors)), accuracy={})
    for name, values in accuracy.items():
        mean, half = np.mean(values), 1.96 * np.std(values, ddof=1) / len(values)**0.5
        record["accuracy"][name] = dict(mean=float(mean), half=float(half))
        print(f"{data_set:21}{name:22}{100 * mean:6.1f} ± {100 * half:.1f}")
    print(f"{data_set:21}calibration error of in-context: {np.mean(errors):.3f}", flush=True)
    return record


def run_command_line(arguments):
    """Compare the classifiers on all data sets; print the table, and write it to a .json file."""
    defaults = dict(SPLITS=SPLITS, DATA_DIR=DATA_DIR, RESULTS_DIR=RESULTS_DIR)
    if {"-h", "--help"} & {*arguments}:
        return print("\n".join([__doc__, *gpicl.setting_lines(__file__).values()]))
    word, flags = gpicl.read_flags(arguments, defaults, ["small", "unequal"])
    settings = SimpleNamespace(**{**defaults, **flags})
    gpicl.require(settings.SPLITS > 1, "SPLITS=1 has no interval; use --SPLITS=2 or more.")
    try:
        import in_context_classifier                     # noqa: F401
        import sklearn
    except ImportError as error:
        raise gpicl.UserError(f"{error}: python -m pip install scikit-learn pandas") from error
    began, folder = time.time(), Path(settings.RESULTS_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    path, sets = folder / "small_data.json", small_sets
    if word == "unequal":
        path, sets = folder / "small_data_unequal.json", unequal_sets
    data_sets = {name: summarise(name, *compare(*data, settings.SPLITS))
                 for name, *data in sets(settings.DATA_DIR)}
    results = dict(splits=settings.SPLITS, data_sets=data_sets,
                   seconds_10000_rows=seconds_for_10000_rows(), seconds=time.time() - began,
                   sklearn=sklearn.__version__, **gpicl.provenance(torch.device("cpu"), "fp32"))
    with gpicl.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1))
    print(f"10,000 rows of 784 features, one pass: {results['seconds_10000_rows']:.1f} s\n"
          f"Written: {path}")


if __name__ == "__main__":
    sys.exit(gpicl.main(sys.argv[1:], run_command_line))
