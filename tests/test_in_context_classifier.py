"""The classifier for any data: in Python, with scikit-learn, and its command."""

import gzip
import pickle
import re
import subprocess
import sys
import time

import joblib
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from conftest import ROOT, gpicl
from hypothesis import HealthCheck, given, settings, strategies
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.exceptions import NotFittedError
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import in_context_classifier
from in_context_classifier import InContextClassifier

TINY = dict(NUM_EXAMPLES=30, PROJECTION_SIZE=64, MODEL_SIZE=32, NUM_LAYERS=2, NUM_HEADS=2,
            MLP_SIZE=64, BATCH_SIZE=16, STEPS=150, WARMUP_STEPS=10, LEARNING_RATE=3e-3)
ORDER = "rows beside each other change the last digits (1e-7) of single precision"


@pytest.fixture(scope="session")
def model(blobs):
    """Return a small model, meta-trained on the blobs for a few seconds."""
    torch.manual_seed(0)
    chosen = gpicl.default_settings(**TINY)
    network = gpicl.make_model(chosen)
    optimizers = gpicl.make_optimizers(network, chosen, "fp32")
    for _ in gpicl.training_steps(network, optimizers, blobs, chosen, "fp32"):
        pass
    return network


@pytest.fixture(scope="session")
def model_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "model.pt"
    gpicl.save_checkpoint(path, model.settings, model, trained_on="blobs")
    return path


@pytest.fixture
def weights(model_file, monkeypatch):
    """Put the small model in the place of the weights that are shipped."""
    monkeypatch.setattr(in_context_classifier, "WEIGHTS", model_file)


def table(n=90, classes=3, features=6, seed=0, spread=0.6):
    """Return X, y of overlapping Gaussian classes whose features have very different scales."""
    random = np.random.default_rng(seed)
    y = random.integers(classes, size=n)
    y[:classes] = range(classes)
    X = random.normal(size=(classes, features))[y] + spread * random.normal(size=(n, features))
    return X * 10.0 ** np.arange(features), y


def lively(network):
    """Give random values to the weights that start at zero, so that they count."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return network


class Recorder(torch.nn.Module):
    """Stands for a network and keeps the tokens' labels (T, C) of each call."""

    def __init__(self, network):
        super().__init__()
        self.network, self.settings, self.seen = network, network.settings, []

    def predict(self, x, x_before, y_before, mask, cache=None):
        self.seen.append(y_before[0])
        return self.network.predict(x, x_before, y_before, mask, cache)


class OneByOne(Recorder):
    """Stands for a network and answers each query as the last token of a whole sequence."""

    def predict(self, x, x_before, y_before, mask, cache=None):
        if mask.shape[0] == mask.shape[1]:
            self.context = x, x_before, y_before
            return self.network.predict(x, x_before, y_before, mask)
        answers = []
        for i in range(x.shape[1]):
            query = x[:, i:i + 1], x_before[:, i:i + 1], y_before[:, i:i + 1]
            tokens = [torch.cat(pair, 1) for pair in zip(self.context, query)]
            mask = gpicl.causal_mask(tokens[0].shape[1], x.device)
            answers.append(self.network.predict(*tokens, mask)[:, -1:])
        return torch.cat(answers, 1)


# --------------------------------------------------------------------------------- predictions
def test_it_learns_from_its_examples(model):
    for seed in range(3):
        X, y = table(300, seed=seed)
        classifier = InContextClassifier(model).fit(X[:60], y[:60])
        most_frequent = max(np.bincount(y[60:])) / 240
        assert classifier.score(X[60:], y[60:]) > most_frequent + 0.2


@pytest.mark.skipif(not in_context_classifier.WEIGHTS.exists(), reason="no weights are shipped")
def test_it_works_at_once():
    from sklearn.datasets import load_iris
    X, y = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(150)
    X, y = X[order], y[order]
    assert InContextClassifier().fit(X[:75], y[:75]).score(X[75:], y[75:]) > 0.9
    assert in_context_classifier.WEIGHTS.stat().st_size <= 3 * 2**20


def test_probabilities_sum_to_one_and_name_the_classes(model):
    X, y = table()
    names = np.array(["ape", "bee", "cat"])[y]
    classifier = InContextClassifier(model).fit(X[:40], names[:40])
    p = classifier.predict_proba(X[40:])
    assert p.shape == (50, 3) and np.allclose(p.sum(1), 1)
    assert list(classifier.classes_) == ["ape", "bee", "cat"]
    assert (classifier.predict(X[40:]) == classifier.classes_[p.argmax(1)]).all()
    assert np.allclose(np.exp(classifier.predict_log_proba(X[40:])), p)


def test_the_same_seed_gives_the_same_and_another_something_else(model):
    X, y = table()
    one, same, other = (InContextClassifier(model, n_ensemble=2, random_state=seed).fit(
        X[:40], y[:40]).predict_proba(X[40:]) for seed in (0, 0, 1))
    assert (one == same).all() and (one != other).any()
    by_chance = InContextClassifier(model, n_ensemble=2, random_state=None).fit(X[:40], y[:40])
    assert (by_chance.predict_proba(X) == by_chance.predict_proba(X)).all()


def test_order_and_number_of_rows_change_nothing(model, monkeypatch):
    X, y = table()
    classifier = InContextClassifier(model, n_ensemble=2).fit(X[:40], y[:40])
    whole = classifier.predict_proba(X[40:])
    assert np.allclose(classifier.predict_proba(X[40:][::-1])[::-1], whole, atol=1e-5)
    assert np.allclose(classifier.predict_proba(X[47:48]), whole[7:8], atol=1e-5)
    monkeypatch.setattr(in_context_classifier, "ROWS_AT_ONCE", 7)
    assert np.allclose(classifier.predict_proba(X[40:]), whole, atol=1e-5)


@pytest.mark.parametrize("form", [
    {}, dict(IMAGE_QUERIES=False), dict(TOKEN_FORMAT="paper", IMAGE_QUERIES=False),
    dict(MODEL="experiments.guided:GuidedTransformer")])
def test_every_row_is_answered_as_if_it_alone_followed_the_examples(form):
    network = lively(gpicl.make_model(gpicl.default_settings(**TINY, **form)))
    X, y = table(60)
    together, alone = (InContextClassifier(model, n_ensemble=2).fit(X[:19], y[:19]).predict_proba(X)
                       for model in (network, OneByOne(network)))
    assert np.ptp(together[:, 0]) > 0.01 and np.allclose(together, alone, atol=1e-4)


def test_the_examples_are_worked_out_once_in_each_pass(model, monkeypatch):
    monkeypatch.setattr(in_context_classifier, "ROWS_AT_ONCE", 20)
    X, y = table(300)
    recorder = Recorder(model)
    InContextClassifier(recorder, n_ensemble=2).fit(X[:100], y[:100]).predict(X[100:])
    assert sum(map(len, recorder.seen)) == 2 * (100 + 200)


def test_every_class_is_in_every_sample_of_many_examples(model, monkeypatch):
    monkeypatch.setattr(in_context_classifier, "MAX_CONTEXT", 40)
    X, y = np.random.default_rng(0).normal(size=(405, 6)), np.arange(405) % 2
    y[-2:] = 2
    for seed in range(4):
        recorder = Recorder(model)
        InContextClassifier(recorder, n_ensemble=4, random_state=seed).fit(X, y).predict(X[:1])
        contexts = [(torch.cat([context[1:], query]).argmax(1)) for context, query in
                    zip(recorder.seen[::2], recorder.seen[1::2])]
        assert all(20 < len(labels) <= 40 and len(labels.unique()) == 3 for labels in contexts)
        assert len({tuple(labels.tolist()) for labels in contexts}) == 4


def test_other_names_for_the_classes_change_only_names(model):
    X, y = table()
    names = np.array(["zebra", "ape", "mouse"])
    numbers = InContextClassifier(model).fit(X[:40], y[:40]).predict(X[40:])
    words = InContextClassifier(model).fit(X[:40], names[y[:40]]).predict(X[40:])
    assert (names[numbers] == words).all()


@pytest.mark.parametrize("n", [2, 5, 29, 30, 120])
def test_few_and_many_and_unbalanced_examples(model, n):
    X, y = table(200, classes=2)
    y[2:] = 0
    y[:2] = 0, 1                                         # a class with one example
    p = InContextClassifier(model, n_ensemble=1).fit(X[:n], y[:n]).predict_proba(X[120:])
    assert p.shape == (80, 2) and np.isfinite(p).all()


def test_learnt_positions_limit_the_examples_and_are_no_error():
    paper = gpicl.make_model(gpicl.default_settings(**TINY, TOKEN_FORMAT="paper",
                                                    IMAGE_QUERIES=False))
    X, y = table(120)
    assert InContextClassifier(paper, n_ensemble=1).fit(X, y).predict(X[:3]).shape == (3,)


def test_a_bar_appears_only_if_it_takes_seconds(model, monkeypatch, capsys):
    X, y = table(50)
    classifier = InContextClassifier(model, n_ensemble=1).fit(X[:40], y[:40])
    classifier.predict(X)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(in_context_classifier, "ROWS_AT_ONCE", 1)
    slow = Recorder(model)
    slow.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    predict = slow.predict
    slow.predict = lambda *inputs: time.sleep(0.6) or predict(*inputs)
    InContextClassifier(slow, n_ensemble=1).fit(X[:40], y[:40]).predict(X[:6])
    captured = capsys.readouterr()
    assert "6/6" in captured.err and captured.out == ""


# ----------------------------------------------------------------------- scaling and temperature
def test_the_scales_of_a_table_do_not_matter_and_images_keep_theirs(model):
    X, y = table()
    one, other = (InContextClassifier(model, scaling="columns").fit(Z[:40], y[:40])
                  .predict_proba(Z[40:]) for Z in (X, 3 + X * np.array([7, 1, 1e-3, 1, 1e4, 1])))
    assert np.allclose(one, other, atol=1e-3)
    images = np.random.default_rng(0).normal(size=(20, 4, 4, 3))
    images[:, 0] = 0                                     # a border stays a border
    shared, auto = (InContextClassifier(model, 2, scaling).fit(images, np.arange(20) % 2)
                    .predict_proba(images) for scaling in ("shared", "auto"))
    assert (shared == auto).all()


def test_auto_scaling_is_the_one_whose_neighbours_agree(model):
    random, y = np.random.default_rng(0), np.arange(200) % 2
    noise, signal = random.normal(size=(200, 4)), 3 * y[:, None] + random.normal(size=(200, 1))
    for X, kind in ((np.hstack([5 * noise, signal]), "columns"),
                    (np.hstack([noise, 5 * signal]), "centred")):
        auto, chosen = (InContextClassifier(model, 2, scaling).fit(X, y).predict_proba(X[:9])
                        for scaling in ("auto", kind))
        assert (auto == chosen).all()


def test_the_context_temperature_mends_overconfidence():
    y, generator = torch.randint(10, (50, 400)), torch.Generator().manual_seed(0)
    named = torch.where(torch.rand(y.shape, generator=generator) < 0.7, y, (y + 1) % 10)
    truth = torch.full((50, 400, 10), 0.3 / 9).scatter(-1, named[..., None], 0.7)
    for factor in (1, 3):                                # right with a probability of 0.7
        t = in_context_classifier.context_temperature(factor * truth.log(), y)
        assert (t / factor - 1).abs().max() < 0.2
    assert torch.allclose(in_context_classifier.context_temperature(truth[:, :0], y[:, :0]),
                          torch.ones(50))


def test_it_is_as_sure_as_its_examples_warrant():
    network = gpicl.make_model(gpicl.default_settings(**TINY))
    torch.nn.init.normal_(network.head.weight)           # very sure of nothing
    X, y = torch.randn(60, 5), torch.arange(60) % 3
    doubtful, sure = (InContextClassifier(network, 1, temperature=t).fit(X, y).predict_proba(X)
                      for t in (None, 1))
    assert (doubtful.max(1) < sure.max(1)).mean() > 0.9
    assert np.array_equal(doubtful.argmax(1), sure.argmax(1))


# ---------------------------------------------------------------------- scikit-learn's conventions
@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_own_checks_pass(model_file):
    results = check_estimator(
        InContextClassifier(str(model_file), n_ensemble=2), on_skip=None, expected_failed_checks={
            "check_methods_sample_order_invariance": ORDER,
            "check_methods_subset_invariance": ORDER})
    assert len(results) > 40


def test_it_works_inside_scikit_learn(model_file):
    X, y = table(120)
    classifier = InContextClassifier(model_file, n_ensemble=2)
    assert cross_val_score(classifier, X, y, cv=3).mean() > 0.5
    assert cross_val_score(make_pipeline(StandardScaler(), classifier), X, y, cv=3).mean() > 0.5
    copy = clone(classifier).set_params(random_state=5)
    assert copy.get_params()["random_state"] == 5 and classifier.random_state == 0
    grid = dict(n_ensemble=np.array([1, 2]), scaling=np.array(["auto", "columns"]))
    assert GridSearchCV(classifier, grid, cv=2).fit(X, y).best_score_ > 0.5
    with pytest.raises(NotFittedError):
        classifier.predict(X)
    frame = pd.DataFrame(X, columns=[*"abcdef"])
    fitted = classifier.fit(frame, pd.Series(y, name="kind"))
    assert fitted.n_features_in_ == 6 and list(fitted.feature_names_in_) == [*"abcdef"]
    right = fitted.predict(frame) == y
    assert fitted.score(frame, y, sample_weight=right + 1e-9) == pytest.approx(1)


@pytest.mark.parametrize("library", [pickle, joblib])
def test_saved_and_loaded_it_predicts_the_same(model_file, tmp_path, library):
    X, y = table(features=16)
    X, names = X.reshape(-1, 4, 4), np.array(["ape", "bee", "cat"])[y]
    path = tmp_path / "model.pt"
    path.write_bytes(model_file.read_bytes())
    fitted = InContextClassifier(path, n_ensemble=2).fit(X[:40], names[:40])
    with open(tmp_path / "fitted", "wb") as file:
        library.dump(fitted, file)
    path.unlink()
    with open(tmp_path / "fitted", "rb") as file:
        loaded = library.load(file)
    assert (loaded.predict_proba(X[40:]) == fitted.predict_proba(X[40:])).all()
    assert (loaded.classes_ == fitted.classes_).all()
    assert loaded.get_params()["scaling"] == "auto"


def test_data_frames_of_other_libraries_are_tables(model):
    X, y = table(features=3)
    expected = InContextClassifier(model, 1).fit(X, y).predict_proba(X)
    columns = {name: X[:, i] for i, name in enumerate("abc")}
    frames = [pd.DataFrame(columns)]
    for library, make in (("pyarrow", "table"), ("polars", "DataFrame")):
        try:
            frames.append(getattr(__import__(library), make)(columns))
        except ImportError:
            continue
    for frame in frames:
        fitted = InContextClassifier(model, 1).fit(frame, y)
        assert np.array_equal(fitted.predict_proba(frame), expected)
    assert np.array_equal(InContextClassifier(model, 1).fit(torch.tensor(X), torch.tensor(y))
                          .predict_proba(X), expected)


# ------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("X, y, words", [
    (np.zeros((0, 3)), [], "0 sample"),
    (np.eye(3), [0, 1], "inconsistent numbers of samples"),
    (np.eye(3), [0, 1, np.nan], "row 3 has no label"),
    (np.eye(3), [None, "a", "b"], "row 1 has no label"),
    (np.eye(3), ["a", float("nan"), "b"], "row 2 has no label"),
    (np.eye(3), np.array(["a", np.nan, "b"], dtype=object), "row 2 has no label"),
    (np.eye(3), pd.Series(["a", "b", None]), "row 3 has no label"),
    (np.eye(3), [0.1, 0.2, 0.3], "continuous"),
    (torch.zeros(3, 2, dtype=torch.complex64), [0, 1, 0], "Complex"),
    (scipy.sparse.csr_matrix(np.eye(3)), [0, 1, 0], "[Ss]parse .*toarray"),
    (np.eye(12), range(12), "12 classes.* at most 10.*OneVsRestClassifier"),
    (np.eye(3), [1, 1, 1], "more than one class"),
    (np.array([[1, 2], [2, np.nan]]), [0, 1], "row 2, column 2: nan .*SimpleImputer"),
    (np.array([[1, 2], [1e300, 2]]), [0, 1], "row 2, column 1: 1e.300 is no finite number"),
    ([["1", "2"], ["blue", "2"]], [0, 1], "row 2, column 1: blue .*OneHotEncoder"),
    (pd.DataFrame(dict(mass=[1, 2], kind=["red", "blue"])), [0, 1], "column kind: red"),
    ([[1, 2], [1]], [0, 1], "inhomogeneous"),
    ([5, 6], [0, 1], "2D array"),
])
def test_bad_examples_are_refused(model, X, y, words):
    with pytest.raises((ValueError, TypeError), match=words):
        InContextClassifier(model).fit(X, y)


def test_bad_use_is_refused(model, tmp_path):
    X, y = table()
    fitted = InContextClassifier(model, 1).fit(X, y)
    with pytest.raises(ValueError, match="5 features, .* 6 features"):
        fitted.predict(X[:, :5])
    with pytest.raises(ValueError, match="row 1, column 1: nan"):
        fitted.predict(X * np.nan)
    for wrong in (dict(scaling="wide"), dict(n_ensemble=0), dict(n_ensemble=1.5),
                  dict(temperature=0), dict(temperature="hot"), dict(random_state="x")):
        with pytest.raises((ValueError, TypeError), match=f"{list(wrong)[0]}|'x'"):
            InContextClassifier(model, **wrong).fit(X, y)
    with pytest.raises(gpicl.UserError, match="nowhere"):
        InContextClassifier(tmp_path / "nowhere.pt").fit(X, y)
    images = X[:, :4].reshape(-1, 2, 2, 1)
    fitted = InContextClassifier(model, 1).fit(images, y)
    for shape, words in (((2, 1, 2), "images of shape .2, 1, 2., not .2, 2, 1."),
                         ((1, 2, 2), "X has 1 features"), ((4,), "X has 4 features")):
        with pytest.raises(ValueError, match=words):
            fitted.predict(images.reshape(-1, *shape))
    with pytest.raises(gpicl.UserError, match="Linear can't answer many queries"):
        InContextClassifier(torch.nn.Linear(6, 3)).fit(X, y)


def test_a_renamed_column_is_named_in_a_short_message(model):
    X, y = np.random.default_rng(0).normal(size=(20, 3000)), np.arange(20) % 2
    frame = pd.DataFrame(X, columns=[f"gene {i}" for i in range(3000)])
    fitted = InContextClassifier(model, 1).fit(frame, y)
    for changed in (frame.rename(columns={"gene 77": "jean 77"}), frame[frame.columns[::-1]]):
        with pytest.raises(ValueError, match="feature names should match") as error:
            fitted.predict(changed)
        assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="jean 77"):
        fitted.predict(frame.rename(columns={"gene 77": "jean 77"}))


def test_a_model_whose_weights_are_nan_is_refused(model, tmp_path):
    broken = gpicl.make_model(model.settings)
    torch.nn.init.constant_(broken.head.weight, np.nan)
    gpicl.save_checkpoint(tmp_path / "model.pt", broken.settings, broken)
    with pytest.raises(gpicl.UserError, match="NaN"):
        InContextClassifier(tmp_path / "model.pt").fit(*table())


labels = {"numbers": lambda y: y, "words": lambda y: np.array([f"class {c}" for c in y]),
          "truth": lambda y: y % 2 == 0, "list": lambda y: [int(c) for c in y],
          "objects": lambda y: np.array([f"{c}" for c in y], object)}


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(n=strategies.integers(1, 40), shape=strategies.lists(strategies.integers(1, 5), max_size=3),
       kind=strategies.sampled_from(sorted(labels)), classes=strategies.integers(1, 12),
       dtype=strategies.sampled_from(["float64", "float32", "float16", "int8", "bool", "int64",
                                      "complex64", "U3", "object", "tensor", "list"]),
       scale=strategies.sampled_from([0.0, 1e-30, 1.0, 1e20, 1e200, np.nan, np.inf]),
       seed=strategies.integers(0, 99))
def test_anything_is_classified_or_refused(model, n, shape, kind, classes, dtype, scale, seed):
    random = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        X = random.normal(size=(n, *shape)) * scale
        y = labels[kind](random.integers(classes, size=n))
        if dtype in ("tensor", "list"):
            X = torch.from_numpy(X) if dtype == "tensor" else X.tolist()
        else:
            X = (np.nan_to_num(X) if dtype.startswith("int") else X).astype(dtype)
    try:
        classifier = InContextClassifier(model, n_ensemble=1).fit(X, y)
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 20
        return
    p = classifier.predict_proba(X)
    assert np.allclose(p.sum(1), 1) and set(classifier.predict(X)) <= set(np.unique(y))


# ------------------------------------------------------------------------------------ the README
def test_the_python_of_the_readme_runs(weights):
    """And what it makes of gaps, words and many classes fits and predicts."""
    X, y = table(120)
    names = dict(X_train=X[:60], y_train=y[:60], X_test=X[60:], y_test=y[60:],
                 make_pipeline=make_pipeline, make_column_transformer=make_column_transformer,
                 SimpleImputer=SimpleImputer, OneHotEncoder=OneHotEncoder,
                 OneVsRestClassifier=OneVsRestClassifier)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    block, = (block for block in blocks if "InContextClassifier" in block)
    exec(block, names)

    holes = X.copy()
    holes[::7, 2] = np.nan
    frame = pd.DataFrame(X, columns=[*"abcdef"])
    frame["colour"] = np.array(["red", "blue", "green"])[y]
    for pipeline, rows in (("gaps", holes), ("words", frame)):
        assert names[pipeline].fit(rows[:60], y[:60]).score(rows[60:], y[60:]) > 0.5
    X, y = table(240, classes=12, spread=0.2)
    assert names["many"].fit(X[:120], y[:120]).score(X[120:], y[120:]) > 0.5


# --------------------------------------------------------------------------------- the command
BASE = "a,b,kind\n1,2,x\n3,4,y\n2,2,x\n4,4,y\n"


@pytest.fixture
def run(weights, tmp_path, monkeypatch, capsys):
    """Return a function that writes both files, runs the command and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(train, test, *flags, fails=False, names=("train.csv", "test.csv")):
        for name, content in zip(names, (train, test)):
            content = content if isinstance(content, bytes) else content.encode()
            (tmp_path / name).write_bytes(
                gzip.compress(content) if name.endswith(".gz") else content)
        code = gpicl.main([*names, *flags], in_context_classifier.classify)
        printed = capsys.readouterr()
        assert code == (2 if fails else 0), printed
        if fails:
            assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
            assert not (tmp_path / "predictions.csv").exists()
        return printed.err if fails else printed.out

    return run


def test_the_command_writes_predictions_and_prints_the_accuracy(run, model_file):
    X, y = table()
    frame = pd.DataFrame(X, columns=[*"abcdef"])
    frame.insert(2, "kind", np.array(["ape", "bee", "cat"])[y])
    train, test = frame[:40], frame[40:].iloc[:, ::-1]   # columns in another order
    printed = run(train.to_csv(index=False), test.to_csv(index=False), "--label-column=kind",
                  "--predictions=p.csv")
    features = [*"abcdef"]
    expected = InContextClassifier(model_file).fit(train[features], train["kind"])
    assert "kind" in printed and "40" in printed and str(model_file) in printed
    assert f"{expected.score(test[features], test['kind']):.1%} of the 50 rows" in printed
    written = pd.read_csv("p.csv")
    assert list(written) == ["prediction", "p(ape)", "p(bee)", "p(cat)"]
    assert list(written["prediction"]) == list(expected.predict(test[features]))
    assert np.allclose(written.iloc[:, 1:], expected.predict_proba(test[features]), atol=1e-4)


@pytest.mark.parametrize("train, test", [
    (BASE, "a,b\n1,2\n3,4\n"),                           # no labels
    (BASE, "kind,b,a\nx,2,1\ny,4,3\n"),                  # another order
    (BASE, "id,a,b\n7,1,2\n8,3,4\n"),                    # a column that is no feature
    (BASE.replace(",", ";"), "a\tb\n1\t2\n3\t4\n"),      # other separators
    (BASE.replace(",", ", "), "a, b\n1, 2\n3, 4\n"),
    (BASE.replace(",", "\t"), "\ufeffa,b\n1,2\n3,4\n"),
    (BASE, "a,b\n1,2\n\n3,4\n,,\n"[:-2] + "\n\n"),       # empty lines
    (BASE + ",,\n", "a,b\n1,2\n3,4\n,\n"),
])
def test_the_same_table_in_many_layouts(run, train, test):
    run(train, test)
    assert list(pd.read_csv("predictions.csv")["prediction"]) == ["x", "y"]


def test_numbers_and_words_in_many_ways(run):
    def predictions():
        return list(pd.read_csv("predictions.csv", dtype=str)["prediction"])

    run("a;b;kind\n1,5;-2,5;x\n3,5;4;y\n", "b;a\n-2,5;1,5\n4;3,5\n")        # decimal commas
    assert predictions() == ["x", "y"]
    run("mass;k\n1,5;x\n2,5;y\n", "mass\n1,5\n2,5\n")
    assert predictions() == ["x", "y"]
    run("a;kind\n1,5;café\n3,5;thé\n".encode("latin-1"), "a;kind\n1,5;café\n".encode("latin-1"))
    assert predictions() == ["café"]
    run("a,kind\n1,café\n3,thé\n", "a,kind\n1,café\n".encode("latin-1"))
    assert predictions() == ["café"]
    run("a,b,kind\nTrue,2,x\nFalse,4,y\n", "a,b\nTRUE,2\nFALSE,4\n")
    assert predictions() == ["x", "y"]
    run(BASE, BASE, names=("train.csv.gz", "test.csv.gz"))
    assert predictions() == ["x", "y", "x", "y"]
    printed = run("a,k\n1,1\n3,2\n", "a,k\n1,1.0\n3,2.0\n5,\n")          # pandas writes 1.0
    assert predictions()[:2] == ["1", "2"] and "100.0% of the 2 rows" in printed
    run("a,k\n1,True\n3,False\n", "a\n1\n3\n")
    assert predictions() == ["True", "False"]


def test_labels_that_are_not_known_do_not_count(run):
    printed = run(BASE, "a,b,kind\n1,2,?\n3,4,y\n1,1,x\n")
    assert len(pd.read_csv("predictions.csv")) == 3 and "100.0% of the 2 rows" in printed
    for label in ("?", ""):
        assert "Accuracy" not in run(BASE, f"a,b,kind\n1,2,{label}\n3,4,{label}\n")


@pytest.mark.parametrize("train, test, words", [
    ("a,b,kind\n1,2,x\n3,4,NA\n", BASE, "train.csv, line 3 has no label"),
    ("a,b,kind\n1,2,x\n\n3,4,\n", BASE, "train.csv, line 4 has no label"),
    ("a,b,kind\n1,2,x\n3,4,y\n3,4\n", BASE, "train.csv, line 4 has no label"),
    (BASE, "a,kind\n1,x\n", "test.csv lacks the column b"),
    ("mass,birch\n1,x\n2,y\n", "birch\nx\n", "lacks the column mass"),
    ("a,b,kind\n1,2,x\nred,4,y\n", BASE, "train.csv, line 3, column a: red"),
    ("a;b;kind\n1,5;2;x\nred;4;y\n", BASE, "train.csv, line 3, column a: red"),
    (BASE, "a,b,kind\n1,2,x\n\n3,blue,y\n", "test.csv, line 4, column b: blue"),
    (BASE, "a,b,kind\n1,2,x\n,4,y\n", "test.csv, line 3, column a: nan"),
    ("a,b,kind\n1,1e31,x\n3,4,y\n", BASE, "line 2, column b: 1e[+]31"),
    (",a,b,kind\n0,1,2,x\n1,3,4,y\n", BASE, "first line must name every column"),
    ("a,b,kind\n5,1,2,x\n7,3,4,y\n", BASE, "first line must name every column"),
    ("a,b,kind\n1,2,x,3\n", BASE, "first line|could not be read"),
    ("a,b,kind\n1,2,x\n1,2,x,5\n", BASE, "could not be read"),
    ('a,b,kind\n1,"2,x\n3,4,y\n', BASE, "could not be read"),
    ("", BASE, "could not be read"),
    ("a,b,kind\n", BASE, "expected rows"),
    (BASE, "a,b\n", "expected rows"),
    ("kind\nx\ny\n", BASE, "features beside the labels"),
    ("a,k\n1,x\n2,x\n", "a\n1\n", "more than one class"),
    ("a,k\n" + "".join(f"{i},c{i}\n" for i in range(12)), "a\n1\n", "12 classes"),
])
def test_the_command_says_what_is_wrong(run, train, test, words):
    assert re.search(words, run(train, test, fails=True))


def test_wrong_flags_and_files_are_refused(run, tmp_path, capsys):
    assert "lacks the column kin; it has a, b, kind" in run(BASE, BASE, "--label-column=kin",
                                                           fails=True)
    with pytest.raises(SystemExit, match="2"):           # no abbreviations
        run(BASE, BASE, "--label=kind")
    assert "error: " in capsys.readouterr().err
    assert "nowhere" in run(BASE, BASE, f"--predictions={tmp_path}/nowhere/p.csv", fails=True)
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(BASE.encode() * 100)[:60])
    for name in ("cut.csv.gz", "nowhere.csv"):
        assert gpicl.main([name, "test.csv"], in_context_classifier.classify) == 2
        assert f"{name} could not be read" in capsys.readouterr().err


def test_ctrl_c_ends_with_130_and_leaves_no_file(run, tmp_path, monkeypatch):
    run(BASE, BASE)
    (tmp_path / "predictions.csv").unlink()

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(InContextClassifier, "predict_proba", stop)
    assert gpicl.main(["train.csv", "test.csv"], in_context_classifier.classify) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv", "test.csv"}


def test_run_as_a_script_and_without_scikit_learn(tmp_path):
    script = ROOT / "in_context_classifier.py"
    ran = subprocess.run([sys.executable, script, "nowhere.csv", "nowhere.csv"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.startswith("error: nowhere.csv could not be read")
    code = "import gpicl_minimal_replication, sys; print({'sklearn', 'pandas'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "set()\n"
