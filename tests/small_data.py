"""How good is the in-context classifier on small tables? Beside scikit-learn's own classifiers.

    python tests/small_data.py                    with the newest runs/*/model.pt
    python tests/small_data.py path/to/model.pt

Thirty random splits of scikit-learn's own data sets, each with 60 to 99 rows to learn from; every
classifier gets the same ones. Prints a table, writes results/small_data.json.
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
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import gpicl_minimal_replication as gpicl  # noqa: E402

SPLITS = 30


def learners(model, images):
    """Return {name: a fresh classifier}; tables are standardised first, images are not."""
    def scaled(classifier):
        return classifier if images else make_pipeline(StandardScaler(), classifier)

    return {"in-context": gpicl.InContextClassifier(model),
            "in-context, one pass": gpicl.InContextClassifier(model, n_ensemble=1),
            "1-nearest neighbour": scaled(KNeighborsClassifier(1)),
            "logistic regression": scaled(LogisticRegression(max_iter=5000)),
            "RBF SVM": scaled(SVC()),
            "random forest": RandomForestClassifier(300, random_state=0)}


def main(path):
    model = gpicl.load_model(path, torch.device("cpu"))[0]
    accuracy, began = {}, time.time()
    for name in ("iris", "wine", "breast_cancer", "digits"):
        X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        images = name == "digits"
        found = {learner: [] for learner in learners(model, images)}
        for split in range(SPLITS):
            random = np.random.default_rng(split)
            n, order = random.integers(60, 100), random.permutation(len(y))
            train, test = order[:n], order[n:]
            for learner, classifier in learners(model, images).items():
                classifier.fit(X[train] / (16 if images else 1), y[train])
                found[learner].append(classifier.score(X[test] / (16 if images else 1), y[test]))
        accuracy[name] = found
        for learner, values in found.items():
            half = 1.96 * np.std(values, ddof=1) / SPLITS**0.5
            print(f"{name:15}{learner:22}{100 * np.mean(values):6.1f} ± {100 * half:.1f}", flush=True)
    results = dict(checkpoint=str(path), splits=SPLITS, accuracy=accuracy,
                   seconds=time.time() - began, machine=gpicl.machine(torch.device("cpu")),
                   versions=dict(python=platform.python_version(), torch=torch.__version__,
                                 sklearn=sklearn.__version__))
    (ROOT / "results" / "small_data.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else gpicl.newest_checkpoint(gpicl.default_settings()))
