"""A classifier for your own data: labelled examples are its context, and nothing is trained.

    python in_context_classifier.py train.csv test.csv   label the rows of test.csv
    InContextClassifier().fit(X, y).predict(X_test)      the same in Python, as in scikit-learn

The network beside this file was meta-trained on MNIST alone, on randomly projected numbers with
permuted labels. Tables of any width and images of any size can be given the same look.
Letters for dimensions: n examples, q rows to label, N features, P numbers of a projected row.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils import check_consistent_length, check_random_state, check_scalar, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from tqdm import tqdm

import gpicl_minimal_replication as gpicl
from gpicl_minimal_replication import C, UserError

WEIGHTS = Path(__file__).with_suffix(".pt")
MAX_CONTEXT = 2000                                       # of more examples, each pass sees a sample
ROWS_AT_ONCE = 200                                       # that are asked about side by side


class InContextClassifier(ClassifierMixin, BaseEstimator):
    """Classifies rows by the examples in its context.

    model            None: the weights beside this file; path of a run's model.pt; or a network
    n_ensemble       passes whose probabilities are averaged, each with a random projection, label
                     permutation and order of the examples of its own
    scaling          "shared": one mean and one scale for all features (images); "centred": a mean
                     of its own for each; "columns": a mean and a scale for each (tables); "auto"
    temperature      divides the logits; None: context_temperature, of each pass
    random_state     seed of everything that is random
    """

    def __init__(self, model=None, n_ensemble=8, scaling="auto", temperature=None, random_state=0):
        self.model, self.n_ensemble, self.scaling = model, n_ensemble, scaling
        self.temperature, self.random_state = temperature, random_state

    def fit(self, X, y):
        """Take examples as the context: X (n, ...), numbers of any shape; y (n,), any labels."""
        check_scalar(self.n_ensemble, "n_ensemble", (int, np.integer), min_val=1)
        if self.temperature is not None:
            check_scalar(self.temperature, "temperature", (int, float), min_val=1e-6)
        x, labels = as_rows(self, X, new=True), column_or_1d(y, warn=True)
        for row in np.flatnonzero(pd.isna(labels) | (labels.astype(str) == "nan")):
            raise UserError(f"{row_name(y, row)} has no label; give it one, or leave it out.")
        check_consistent_length(x, labels)
        check_classification_targets(labels)
        self.classes_, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
        if not 2 <= len(self.classes_) <= C:
            raise UserError(f"{len(self.classes_)} classes; expected more than one class and at "
                            f"most {C}. OneVsRestClassifier(InContextClassifier()) takes more.")
        self.network_ = (self.model if isinstance(self.model, torch.nn.Module) else
                         gpicl.load_model(Path(self.model or WEIGHTS))[0])
        gpicl.require(hasattr(self.network_, "predict"), f"{type(self.network_).__name__} can't "
                      "answer many queries after one context; use a MODEL with attention.")
        gpicl.require(all(weight.isfinite().all() for weight in self.network_.parameters()),
                      "the model has weights that are NaN or infinite; train it again.")
        self.slots_ = torch.as_tensor(first.argsort().argsort())         # in order of appearance:
        self.labels_ = self.slots_[numbers]              # other names change nothing but names
        self.scale_ = choose_scale(self.scaling, x, numbers, is_image=len(self.shape_) > 1)
        self.examples_ = scaled(x, *self.scale_)
        self.seeds_ = check_random_state(self.random_state).randint(2**31, size=self.n_ensemble)
        return self

    def predict(self, X):
        """Return (q,): the most probable class of each row."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]

    def predict_log_proba(self, X):
        return np.log(self.predict_proba(X))

    @torch.no_grad()
    def predict_proba(self, X):
        """Return (q, classes): the probability of each class, in the order of classes_."""
        check_is_fitted(self)
        parts = scaled(as_rows(self, X, new=False), *self.scale_).split(ROWS_AT_ONCE)
        answers = (answer for seed in self.seeds_ for answer in self.one_pass(parts, int(seed)))
        answers = tqdm(answers, total=len(self.seeds_) * len(parts), delay=3, leave=False)
        return torch.cat([*answers]).unflatten(0, (len(self.seeds_), -1)).mean(0).numpy()

    def one_pass(self, parts, seed):
        """Yield the probabilities (q, classes) of each of `parts`, rows (q, N), given the examples
        under one random projection, label permutation and order. The context is worked out once:
        that takes n^2 comparisons, and then every query n."""
        network, settings = self.network_, self.network_.settings
        device, generator = next(network.parameters()).device, torch.Generator().manual_seed(seed)
        A = torch.randn(self.examples_.shape[1], settings.PROJECTION_SIZE, generator=generator)
        A = (A / len(A)**0.5).to(device)                 # (N, P)
        rho = torch.randperm(C, generator=generator)
        order = torch.randperm(len(self.labels_), generator=generator)
        _, first = np.unique(self.labels_[order], return_index=True)     # one of every class
        limit = MAX_CONTEXT if settings.TOKEN_FORMAT == "pairs" else settings.NUM_EXAMPLES - 1
        order = order[np.union1d(first, np.arange(min(len(order), limit - C)))]
        n, cache = len(order), functools.partial(after_context, {})
        labels = rho[self.labels_[order]].to(device)[None]
        x, y = (self.examples_[order].to(device) @ A)[None], F.one_hot(labels, C).float()
        logits = network.predict(x, gpicl.previous(x), gpicl.previous(y),
                                 gpicl.causal_mask(n, device), cache)
        temperature = self.temperature or context_temperature(logits, labels).item()
        for rows in parts:
            q = len(rows)
            mask = torch.full((q, q), -torch.inf, device=device).fill_diagonal_(0)
            mask = F.pad(mask, (n, 0))                   # the context and itself, no other query
            last_x, last_y = (tensor[:, -1:].expand(-1, q, -1) for tensor in (x, y))
            logits = network.predict((rows.to(device) @ A)[None], last_x, last_y, mask, cache)
            yield (logits[0].cpu().double() / temperature)[:, rho[self.slots_]].softmax(-1)


def after_context(kept, owner, *tensors):
    """Keep what an owner gives first, of the context; put it before what it gives later."""
    first = kept.setdefault(owner, tensors)
    return first if first is tensors else [torch.cat(pair, -2) for pair in zip(first, tensors)]


def context_temperature(logits, y, prior=0.2):
    """Return (B,): what to divide a query's logits by, to be as sure as is right. The logits of the
    context's own examples (B, n, C) and their labels y (B, n) tell: it is the posterior mean of log
    temperature, whose prior is normal with mean 0 and that std."""
    grid = torch.linspace(-1, 2, 61, device=logits.device)
    losses = [F.cross_entropy((logits / t).mT, y, reduction="none").sum(1) for t in grid.exp()]
    return (grid @ (-torch.stack(losses) - (grid[:, None] / prior)**2 / 2).softmax(0)).exp()


def row_name(data, row):
    """Return what to call a row in a message: its line in a file (see read_table), or number."""
    index = data.index if isinstance(data, pd.DataFrame | pd.Series) else pd.Index([])
    return f"{index.name} {index[row]}" if index.name else f"row {row + 1}"


def as_rows(classifier, X, new):
    """Return X (n, ...), new examples or rows that must be like them, as numbers (n, N)."""
    cells = validate_data(classifier, X, reset=new, allow_nd=True, dtype=None,
                          ensure_all_finite=False)
    classifier.shape_ = cells.shape[1:] if new else classifier.shape_
    if cells.shape[1:] != classifier.shape_:
        raise UserError(f"X has images of shape {cells.shape[1:]}, not {classifier.shape_}.")
    cells = cells.reshape(len(cells), -1)
    try:
        x = cells.astype(np.float64)
    except ValueError:                                   # there are words
        x = pd.DataFrame(cells).apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    for row, column in np.argwhere(~(np.abs(x) < 1e30)):
        names = getattr(classifier, "feature_names_in_", range(1, x.shape[1] + 1))
        raise UserError(f"{row_name(X, row)}, column {names[column]}: {cells[row, column]} is no "
                        "finite number. SimpleImputer() for NaN or OneHotEncoder() for words help: "
                        "make_pipeline(SimpleImputer(), InContextClassifier()) is a classifier.")
    return torch.from_numpy(x)


def choose_scale(scaling, x, numbers, is_image):
    """Return the mean and scale of a kind of scaling. "auto": "shared" for images, else "centred"
    or, always where stds differ tenfold, "columns", whichever puts more next to their class."""
    mean, std, some = x.mean(0), x.std(0, correction=0), slice(None, None, 1 + len(x) // 2000)
    scales = dict(shared=(x.mean(), x.std(correction=0)), columns=(mean, std),
                  centred=(mean, std.square().mean().sqrt()))
    if scaling not in ("auto", *scales):
        raise UserError(f"scaling={scaling!r}; expected auto, {', '.join(scales)}.")

    def agreement(kind):
        neighbours = KNeighborsClassifier(1, metric="cosine")
        neighbours.fit(scaled(x[some], *scales[kind]), numbers[some])
        return neighbours.score(None, numbers[some])     # each example by the others

    uneven = std.max() > 10 * std[std > 0].median()      # False where all columns are constant
    kinds = ["shared"] if is_image else ["columns"] if uneven else ["centred", "columns"]
    return scales[max(kinds, key=agreement) if scaling == "auto" else scaling]


def scaled(x, mean, scale, constant=3.0):
    """Return rows x scaled, with a constant feature more: so that angles tell distances too."""
    x = ((x - mean) / torch.where(scale > 0, scale, 1)).clamp(-1e4, 1e4).float()
    return F.pad(x, (0, 1), value=constant)


# ------------------------------------------------------------------------------------ .csv files
def read_table(path, needed):
    """Return a .csv file as a data frame without its empty lines; its index holds line numbers.

    The first line names the columns, `needed` among them. What parts most names is the separator:
    a comma, or a semicolon or tab, and then numbers may have decimal commas."""
    for encoding in ("utf-8-sig", "latin-1"):            # the latter reads anything
        read = functools.partial(pd.read_csv, path, encoding=encoding)
        try:
            mark = max(";\t,", key=lambda mark: read(sep=mark, nrows=0).shape[1])
            table = read(sep=mark, na_values="?", skip_blank_lines=False, skipinitialspace=True,
                         low_memory=False)
            break
        except Exception as error:                       # pandas raises many kinds for a bad file
            if not isinstance(error, UnicodeDecodeError):
                raise UserError(f"{path} could not be read: {error}") from error
    if not table.index.equals(pd.RangeIndex(len(table))) or "Unnamed: 0" in table:
        raise UserError(f"{path}: the first line must name every column; leave row numbers out.")
    if mark != ",":
        table = table.replace(r"^([-+]?\d*),(\d+(e[-+]?\d+)?)$", r"\1.\2", regex=True)
    if lacking := [name for name in needed if name not in table]:
        raise UserError(f"{path} lacks the column {lacking[0]}; it has {', '.join(table)[:200]}.")
    table.index = pd.RangeIndex(2, len(table) + 2, name=f"{path}, line")
    return table.dropna(how="all")


def classify(arguments):
    """Label the rows of one .csv file by the examples in another; write predictions.csv."""
    parser = argparse.ArgumentParser(description=classify.__doc__, allow_abbrev=False)
    parser.add_argument("train", help="labelled examples; the first line names the columns")
    parser.add_argument("test", help="rows to label; the same columns, in any order")
    parser.add_argument("--label-column", metavar="NAME", help="default: the last one of train")
    parser.add_argument("--predictions", metavar="FILE", default="predictions.csv", type=Path)
    options = parser.parse_args(arguments)
    train = read_table(options.train, needed=filter(None, [options.label_column]))
    label = options.label_column or train.columns[-1]
    features = [name for name in train if name != label]
    test = read_table(options.test, needed=features)
    gpicl.require(features and len(train) and len(test),
                  "expected rows in both files, and features beside the labels.")
    gpicl.require(str(options.predictions) not in (options.train, options.test),
                  "--predictions would replace one of the two files; give another name.")
    words = train[label].convert_dtypes().astype("string")               # 1 and 1.0 are the same
    classifier = InContextClassifier().fit(train[features], words)
    print(f"Model        {WEIGHTS}\nLabels       the column {label} of {options.train}: "
          f"{', '.join(classifier.classes_)}\nExamples     {len(train)}, {len(features)} features")
    with gpicl.atomic_write(options.predictions) as temporary:
        probabilities = classifier.predict_proba(test[features])
        predicted = classifier.classes_[probabilities.argmax(1)]
        table = pd.DataFrame(probabilities, columns=[f"p({name})" for name in classifier.classes_])
        table.insert(0, "prediction", predicted)
        table.to_csv(temporary, index=False, float_format="%.4f")
    print(f"Predictions  {len(test)} rows, in {options.predictions}")
    if label in test and (n := test[label].notna().sum()):
        correct = (predicted == test[label].convert_dtypes().astype("string")).sum()
        low, high = gpicl.wilson_interval(correct, n)
        print(f"Accuracy     {correct / n:.1%} of the {n} rows with a label (95 % interval "
              f"{low:.1%} to {high:.1%})")


if __name__ == "__main__":
    sys.exit(gpicl.main(sys.argv[1:], classify))
