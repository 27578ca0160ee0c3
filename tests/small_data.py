"""How good is the in-context classifier on small tables? Beside scikit-learn's own classifiers.

    python tests/small_data.py                          with the newest runs/*/model.pt
    python tests/small_data.py one/model.pt two/model.pt ...    the mean of what these do
    python tests/small_data.py unequal ...              the same on unequal classes

Thirty random splits of scikit-learn's own data sets, each with 60 to 99 rows to learn from, and,
where they are in data/, of 16 x 16 test images of MNIST and FashionMNIST, with 99. Every classifier
gets the same rows; for scikit-learn's, but the forest, columns of tables are standardised, images
get unit length. C, of the SVM and of logistic regression, is 1 for tables and 10 for images (which
did best on validation images of MNIST: results/recipe.md). Prints a table, writes
results/small_data.json.

With "unequal", of these images only: "8 or not" asks whether a digit is an 8, "skewed" has every
class 0.7 times as often as the one before. Writes results/small_data_unequal.json.
"""

import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn import datasets
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import SVC

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import gpicl_minimal_replication as gpicl  # noqa: E402

SPLITS = 30


def learners(models, images):
    """Return {name: fresh classifiers}; tables are standardised first, images get unit length."""
    def scaled(classifier):
        return [make_pipeline(Normalizer() if images else StandardScaler(), classifier)]

    C = 10 if images else 1
    return {"in-context": [gpicl.InContextClassifier(model) for model in models],
            "in-context, one pass": [gpicl.InContextClassifier(model, 1) for model in models],
            "1-nearest neighbour": scaled(KNeighborsClassifier(1)),
            "logistic regression": scaled(LogisticRegression(C=C, max_iter=5000)),
            "RBF SVM": scaled(SVC(C=C)),
            "random forest": [RandomForestClassifier(300, random_state=0)],
            "most frequent class": [DummyClassifier()]}


def image_sets():
    """Yield name, X, y of 2,100 16 x 16 test images each, of what is in data/."""
    settings = gpicl.default_settings(IMAGE_SIZE=16)
    for name in ("MNIST", "FashionMNIST"):
        try:
            data = gpicl.load_dataset(name, "test", settings, torch.device("cpu"))
        except gpicl.UserError as error:
            print(f"{name} is left out: {error}")
        else:
            some = np.random.default_rng(0).permutation(len(data.y))[:2100]
            yield name, data.x[some].view(-1, 16, 16).numpy(), data.y[some].numpy()


def small_sets():
    """Yield name, X, y, images: tables, flat images, and images of 16 x 16."""
    for name in ("iris", "wine", "breast_cancer", "digits"):
        yield name, *getattr(datasets, f"load_{name}")(return_X_y=True), name == "digits"
    for name, X, y in image_sets():
        yield f"{name} 16x16", X, y, True


def unequal_sets():
    """Yield name, X, y, images, of which some classes are rarer than others."""
    for name, X, y in image_sets():
        few = np.random.default_rng(1).random(len(y)) < 0.7**y
        yield f"{name} skewed", X[few], y[few], True
        if name == "MNIST":
            yield "MNIST, 8 or not", X, y == 8, True


def seconds_for_10000_rows(model):
    """Return how long 10,000 rows of 784 features take, with 99 examples and one pass."""
    random = np.random.default_rng(0)
    classifier = gpicl.InContextClassifier(model, n_ensemble=1)
    classifier.fit(random.normal(size=(99, 784)), random.integers(10, size=99))
    began = time.time()
    classifier.predict(random.normal(size=(10000, 784)))
    return time.time() - began


def judge(classifier, X, y):
    """Return the accuracy and the calibration error of a fitted classifier on rows X, labels y."""
    p, numbers = classifier.predict_proba(X), (y[:, None] == classifier.classes_).argmax(1)
    numbers[~np.isin(y, classifier.classes_)] = -1       # rare ones may not be among the examples
    return (classifier.classes_[p.argmax(1)] == y).mean(), gpicl.calibration_error(
        torch.from_numpy(p), torch.as_tensor(numbers))


def main(paths):
    unequal = paths[:1] == ["unequal"]
    paths = paths[unequal:] or [gpicl.newest_checkpoint(gpicl.default_settings())]
    models = [gpicl.load_model(path, torch.device("cpu"))[0] for path in paths]
    accuracy, errors, began = {}, {}, time.time()
    for name, X, y, images in (unequal_sets if unequal else small_sets)():
        found = {learner: [] for learner in learners(models, images)}
        gaps = []
        for split in range(SPLITS):
            random = np.random.default_rng(split)
            order = random.permutation(len(y))
            n = random.integers(60, 100) if X.ndim == 2 else 99
            train, test = order[:n], order[n:]
            for learner, classifiers in learners(models, images).items():
                shape = X.shape if learner.startswith("in-context") else (len(X), -1)
                rows = X.reshape(shape)
                for classifier in classifiers:
                    classifier.fit(rows[train], y[train])
                if learner == "in-context":
                    judged = [judge(one, rows[test], y[test]) for one in classifiers]
                    scores = [score for score, _ in judged]
                    gaps += [error for _, error in judged]
                else:
                    scores = [one.score(rows[test], y[test]) for one in classifiers]
                found[learner].append(float(np.mean(scores)))
        accuracy[name], errors[name] = found, float(np.mean(gaps))
        for learner, values in found.items():
            half = 1.96 * np.std(values, ddof=1) / SPLITS**0.5
            print(f"{name:21}{learner:22}{100 * np.mean(values):6.1f} ± {100 * half:.1f}",
                  flush=True)
        print(f"{name:21}calibration error of the mean of 8 passes: {errors[name]:.3f}", flush=True)
    results = dict(checkpoints=[Path(path).parent.name for path in paths], splits=SPLITS,
                   accuracy=accuracy, calibration_error=errors,
                   seconds_10000_rows=seconds_for_10000_rows(models[0]),
                   seconds=time.time() - began, machine=gpicl.machine(torch.device("cpu")),
                   versions=dict(python=platform.python_version(), torch=torch.__version__,
                                 sklearn=sklearn.__version__))
    print(f"10,000 rows of 784 features, one pass: {results['seconds_10000_rows']:.1f} s")
    name = "small_data_unequal.json" if unequal else "small_data.json"
    (ROOT / "results" / name).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
