"""The in-context classifier, and the commands evaluate and classify."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, gpicl
from hypothesis import HealthCheck, given, settings, strategies
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_model import FORMATS, lively_model
from test_training import train

InContextClassifier, UserError = gpicl.InContextClassifier, gpicl.UserError


@pytest.fixture(scope="session")
def model(blobs):
    """Return a small model, meta-trained on the blobs for a few seconds."""
    torch.manual_seed(0)
    chosen = gpicl.default_settings(**{**TINY, "NUM_EXAMPLES": 30, "STEPS": 150, "BATCH_SIZE": 16,
                                       "PROJECTION_SIZE": 64})
    network = gpicl.InContextModel(chosen)
    train(network, blobs, chosen)
    return network


@pytest.fixture(scope="session")
def model_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "model.pt"
    gpicl.save_checkpoint(path, model.settings, model, trained_on="blobs")
    return path


def table(n=90, classes=3, features=6, seed=0, spread=0.6):
    """Return X, y of overlapping Gaussian classes whose features have very different scales."""
    random = np.random.default_rng(seed)
    y = random.integers(classes, size=n)
    y[:classes] = range(classes)
    X = random.normal(size=(classes, features))[y] + spread * random.normal(size=(n, features))
    return X * 10.0 ** np.arange(features), y


# ------------------------------------------------------------------------------ side by side
@pytest.mark.parametrize("form", FORMATS)
def test_queries_side_by_side_get_what_each_gets_alone(form, tiny):
    network = lively_model(tiny(**form))
    x, y = torch.randn(2, 12, 32), torch.randint(10, (2, 12))
    together = network(x, y, queries=5)[:, 7:]
    for i in range(5):
        alone = network(torch.cat([x[:, :7], x[:, 7 + i:8 + i]], 1), y[:, :8])
        assert torch.allclose(together[:, i], alone[:, 7], atol=1e-4)
    other = torch.cat([y[:, :7], (y[:, 7:] + 1) % 10], 1)
    assert torch.allclose(network(x, other, queries=5)[:, 7:], together, atol=1e-6)


def test_scores_sharpen_beyond_the_trained_length_only(tiny):
    network = lively_model(tiny(NUM_EXAMPLES=12))
    x, y = torch.randn(1, 40, 32), torch.randint(10, (1, 40))
    whole = network(x, y)
    assert torch.allclose(whole[:, :12], network(x[:, :12], y[:, :12]), atol=1e-4)
    assert torch.allclose(whole[:, :30], network(x[:, :30], y[:, :30]), atol=1e-4)  # causal
    factors = gpicl.sharpness(40, 1, 11, "cpu")[:, 0]
    assert (factors[:12] == 1).all()
    assert factors[39].item() == pytest.approx(np.log(39) / np.log(11))


# --------------------------------------------------------------------------------- predictions
def test_it_learns_from_its_examples(model):
    for seed in range(3):
        X, y = table(300, seed=seed)
        classifier = InContextClassifier(model).fit(X[:60], y[:60])
        share = max(np.bincount(y[60:])) / 240
        assert classifier.score(X[60:], y[60:]) > share + 0.2


def test_probabilities_sum_to_one_and_name_the_classes(model):
    X, y = table()
    names = np.array(["ape", "bee", "cat"])[y]
    classifier = InContextClassifier(model).fit(X[:40], names[:40])
    p = classifier.predict_proba(X[40:])
    assert p.shape == (50, 3) and np.allclose(p.sum(1), 1, atol=1e-5)
    assert list(classifier.classes_) == ["ape", "bee", "cat"]
    assert (classifier.predict(X[40:]) == classifier.classes_[p.argmax(1)]).all()


def test_the_same_seed_gives_the_same_and_another_seed_something_else(model):
    X, y = table()
    one, same, other = (InContextClassifier(model, n_ensemble=2, random_state=seed).fit(
        X[:40], y[:40]).predict_proba(X[40:]) for seed in (0, 0, 1))
    assert (one == same).all() and (one != other).any()


def test_order_and_number_of_test_rows_change_nothing(model, monkeypatch):
    X, y = table()
    classifier = InContextClassifier(model, n_ensemble=2).fit(X[:40], y[:40])
    whole = classifier.predict_proba(X[40:])
    assert np.allclose(classifier.predict_proba(X[40:][::-1])[::-1], whole, atol=1e-5)
    assert np.allclose(classifier.predict_proba(X[47:48]), whole[7:8], atol=1e-5)
    monkeypatch.setattr(gpicl, "QUERIES", 7)
    assert np.allclose(classifier.predict_proba(X[40:]), whole, atol=1e-5)


def test_other_names_for_the_classes_change_only_names(model):
    X, y = table()
    names = np.array(["zebra", "ape", "mouse"])
    numbers = InContextClassifier(model).fit(X[:40], y[:40]).predict(X[40:])
    words = InContextClassifier(model).fit(X[:40], names[y[:40]]).predict(X[40:])
    assert (names[numbers] == words).all()


def test_the_scales_of_a_table_do_not_matter_and_images_keep_theirs(model):
    X, y = table()
    one, other = (InContextClassifier(model, scaling="columns").fit(Z[:40], y[:40])
                  .predict_proba(Z[40:]) for Z in (X, 3 + X * np.array([7, 1, 1e-3, 1, 1e4, 1])))
    assert np.allclose(one, other, atol=1e-3)
    assert InContextClassifier(model).fit(X, y).scale_[0].shape == (6,)       # found: a table
    images = np.random.default_rng(0).normal(size=(20, 4, 4, 3))
    images[:, 0] = 0                                     # a border stays a border
    classifier = InContextClassifier(model).fit(images, np.arange(20) % 2)
    assert classifier.scale_[0].ndim == 0 and classifier.predict(images).shape == (20,)


@pytest.mark.parametrize("n", [2, 5, 29, 30, 120])
def test_few_and_many_and_unbalanced_examples(model, n):
    X, y = table(200, classes=2)
    y[2:] = 0
    y[:2] = 0, 1                                         # a class with one example
    p = InContextClassifier(model, n_ensemble=1).fit(X[:n], y[:n]).predict_proba(X[120:])
    assert p.shape == (80, 2) and np.isfinite(p).all()


def test_more_examples_help_beyond_the_trained_length(model):
    """Trained on 29 examples; 200 must do better than 29, over several tables."""
    gains = []
    for seed in range(5):
        X, y = table(500, classes=5, seed=seed, spread=1.0)
        few, many = (InContextClassifier(model).fit(X[:n], y[:n]).score(X[200:], y[200:])
                     for n in (29, 200))
        gains.append(many - few)
    assert np.mean(gains) > 0.02


labels = {"numbers": lambda y: y, "words": lambda y: np.array([f"class {c}" for c in y]),
          "truth": lambda y: y % 2 == 0, "floats": lambda y: y / 2, "objects": lambda y: np.array(
              [f"{c}" for c in y], object), "list": lambda y: [int(c) for c in y]}


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(n=strategies.integers(1, 40), shape=strategies.lists(strategies.integers(0, 5), max_size=3),
       kind=strategies.sampled_from(sorted(labels)), classes=strategies.integers(1, 12),
       dtype=strategies.sampled_from(["float64", "float32", "float16", "int8", "uint8", "bool",
                                      "int64", "complex64", "U3", "tensor", "bfloat16", "list"]),
       scale=strategies.sampled_from([0.0, 1e-30, 1.0, 1e20, 1e200, np.nan, np.inf]),
       seed=strategies.integers(0, 99))
def test_anything_is_classified_or_refused_in_one_sentence(model, n, shape, kind, classes, dtype,
                                                           scale, seed):
    random = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        X = random.normal(size=(n, *shape)) * scale
        y = labels[kind](random.integers(classes, size=n))
        if dtype in ("tensor", "bfloat16"):
            X = torch.from_numpy(X).to(torch.bfloat16 if dtype == "bfloat16" else torch.float64)
        else:
            X = X.tolist() if dtype == "list" else np.nan_to_num(X).astype(dtype) if (
                dtype in ("int8", "uint8", "int64")) else X.astype(dtype)
    try:
        classifier = InContextClassifier(model, n_ensemble=1).fit(X, y)
    except UserError as error:
        assert len(str(error)) > 20 and "\n" not in str(error)
        return
    p = classifier.predict_proba(X)
    assert np.allclose(p.sum(1), 1, atol=1e-4) and set(classifier.predict(X)) <= set(np.unique(y))


def test_every_pass_has_a_sample_of_all_examples_and_a_projection_of_its_own(tiny, monkeypatch):
    monkeypatch.setattr(gpicl, "MAX_CONTEXT", 20)
    model, seen = gpicl.InContextModel(tiny()), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    X = np.random.default_rng(0).normal(size=(90, 6))
    gpicl.InContextClassifier(model, 3).fit(X, np.arange(90) < 45).predict_proba(X[:1])
    assert all(y.shape == (1, 21) and len(y[0, :20].unique()) == 2 for _, y, _ in seen)
    assert len({x[0, -1].sum().item() for x, _, _ in seen}) == 3
    assert len({frozenset(y[0, :20].tolist()) for _, y, _ in seen}) > 1  # and other labels


def test_auto_scaling_is_the_one_whose_neighbours_agree(tiny):
    random, y = np.random.default_rng(0), np.arange(200) % 2
    noise, told = random.normal(size=(200, 4)), 3 * y[:, None] + random.normal(size=(200, 1))
    for X, kind in ((np.hstack([5 * noise, told]), "columns"),
                    (np.hstack([noise, 5 * told]), "centred"),
                    (np.hstack([noise, 1e3 * told]), "columns")):
        classifier = gpicl.InContextClassifier(gpicl.InContextModel(tiny())).fit(X, y)
        assert classifier.scaling_ == kind
    x = torch.nn.functional.normalize(torch.from_numpy(noise))
    right = [y[max((j for j in range(200) if j != i), key=lambda j: x[i] @ x[j])] == y[i]
             for i in range(200)]
    assert gpicl.neighbours_agree(x, y) == pytest.approx(np.mean(right))


def test_slots_are_numbered_as_the_classes_first_appear(tiny):
    fitted = gpicl.InContextClassifier(gpicl.InContextModel(tiny())).fit(
        np.eye(6), ["b", "c", "a", "c", "d", "b"])
    assert fitted.labels_.tolist() == [0, 1, 2, 1, 3, 0]
    assert fitted.slots_.tolist() == [2, 0, 1, 3]        # of a, b, c, d


def test_classified_rows_are_scaled_and_have_a_constant(tiny):
    X, seen = np.random.default_rng(0).normal(size=(90, 400)), []
    model = gpicl.InContextModel(tiny(PROJECTION_SIZE=400))
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    gpicl.InContextClassifier(model, 1).fit(X, np.arange(90) % 2).predict_proba(X)
    mean = (seen[0] @ seen[0].mT).mean() / 400           # what is alike in all: the constant
    assert mean.item() * 401 == pytest.approx(gpicl.OFFSET**2, rel=0.5)
    assert seen[0].square().mean().item() * 401 == pytest.approx(400 + gpicl.OFFSET**2, rel=0.1)


# ---------------------------------------------------------------------- scikit-learn's conventions
def test_it_works_inside_scikit_learn(model):
    X, y = table(120)
    classifier = InContextClassifier(model, n_ensemble=2)
    assert cross_val_score(classifier, X, y, cv=3).mean() > 0.5
    assert cross_val_score(make_pipeline(StandardScaler(), classifier), X, y, cv=3).mean() > 0.5
    assert classifier._estimator_type == "classifier"    # what scikit-learn before 1.6 goes by
    copy = clone(classifier).set_params(random_state=5)
    assert copy.get_params()["random_state"] == 5 and classifier.random_state == 0
    assert copy.fit(X, y).n_features_in_ == 6
    with pytest.raises(UserError, match="did you mean n_ensemble"):
        classifier.set_params(n_ensembel=3)


@pytest.mark.parametrize("kind", [str, object])
def test_saved_and_loaded_it_predicts_the_same(model_file, tmp_path, kind):
    X, y = table(features=16)
    X = X.reshape(-1, 4, 4)                              # as rows they would be a table
    names = np.array([np.str_("ape"), np.str_("bee"), np.str_("cat")], dtype=kind)[y]
    classifier = InContextClassifier(str(model_file), n_ensemble=np.int64(2),
                                     random_state=np.int64(3)).fit(X[:40], names[:40])
    classifier.save(tmp_path / "classifier.pt")
    loaded = InContextClassifier.load(tmp_path / "classifier.pt")
    assert (loaded.predict_proba(X[40:]) == classifier.predict_proba(X[40:])).all()
    assert (loaded.classes_ == classifier.classes_).all()
    with pytest.raises(UserError, match="holds a model, but no classifier"):
        InContextClassifier.load(model_file)


@pytest.mark.parametrize("X, y, words", [
    (np.zeros((0, 3)), [], "at least one row"),
    (np.eye(3), [0, 1], "expected one label per row"),
    (np.eye(2), [[0], [0, 1]], "can't be read, one per row"),
    (np.eye(3), [0, 1, np.nan], "row 3 has NaN for a label"),
    (np.eye(2), torch.zeros(2, dtype=torch.bfloat16), "can't be read, one per row"),
    (torch.zeros(3, 2, dtype=torch.complex64), [0, 1, 0], "they are complex"),
    ([[10**400, 1], [2, 3]], [0, 1], "can't be read as an array of numbers"),
    (np.eye(12), range(12), "12 classes; this model tells 2 to 10 apart"),
    (np.eye(3), [1, 1, 1], "1 classes"),
    (np.array([[1, 2], [2, np.nan]]), [0, 1], "NaN, infinite or huge numbers, first in row 2"),
    ([["red", 1], ["blue", 2]], [0, 1], "can't be read as an array of numbers"),
    ([[1, 2], [1]], [0, 1], "can't be read as an array of numbers"),
    (5, [0, 1], "at least one row"),
])
def test_bad_examples_are_refused(model, X, y, words):
    with pytest.raises(UserError, match=words):
        InContextClassifier(model).fit(X, y)


def test_bad_use_is_refused(model, tmp_path):
    X, y = table()
    with pytest.raises(UserError, match="has no examples yet"):
        InContextClassifier(model).predict(X)
    with pytest.raises(UserError, match="has no examples yet"):
        InContextClassifier(model).save(tmp_path / "c.pt")
    with pytest.raises(UserError, match="X has 5 features, the examples 6"):
        InContextClassifier(model).fit(X, y).predict(X[:, :5])
    with pytest.raises(UserError, match="expected auto, shared, centred"):
        InContextClassifier(model, scaling="wide").fit(X, y)
    for wrong in (dict(n_ensemble=0), dict(n_ensemble=1.5), dict(temperature=0),
                  dict(temperature=1e-40), dict(random_state=1.5)):
        with pytest.raises(UserError, match=f"{list(wrong)[0]} is {list(wrong.values())[0]}"):
            InContextClassifier(model, **wrong).fit(X, y).predict(X)
    with pytest.raises(UserError, match="90 rows, but labels of shape"):
        InContextClassifier(model).fit(X, y).score(X, np.stack([y, y], 1))
    with pytest.raises(UserError, match="none of the labels y .* is one of"):
        InContextClassifier(model).fit(X, y).score(X, y.astype(str))
    with pytest.raises(UserError, match="can't write"):
        InContextClassifier(model).fit(X, y).save(tmp_path / "no" / "c.pt")
    with pytest.raises(UserError, match="can't be saved; use words or numbers"):
        InContextClassifier(model).fit(X, y.astype("M8[D]")).save(tmp_path / "c.pt")
    with pytest.raises(UserError, match="labels like 1970-01-01.* can't be saved"):
        InContextClassifier(model).fit(X, y.astype("M8[ns]")).save(tmp_path / "c.pt")
    with pytest.raises(UserError, match="can't read the checkpoint"):
        InContextClassifier("nowhere/model.pt").fit(X, y)
    paper = gpicl.InContextModel(gpicl.default_settings(**TINY, TOKEN_FORMAT="paper"))
    with pytest.raises(UserError, match="TOKEN_FORMAT=paper .* at most 11 examples"):
        InContextClassifier(paper).fit(X, y)
    with pytest.raises(UserError, match="only a transformer of this program"):
        InContextClassifier(torch.nn.Linear(6, 3)).fit(X, y)


# --------------------------------------------------------------------------------- calibration
def test_calibration_error_against_a_plain_loop():
    p = torch.rand(500, 4).softmax(1)
    y = torch.randint(4, (500,))
    confidence, right = p.max(1).values.numpy(), (p.argmax(1) == y).numpy()
    expected = 0
    for b in range(15):
        inside = (confidence >= b / 15) & (confidence < (b + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert gpicl.calibration_error(p, y) == pytest.approx(expected, abs=1e-6)
    sure = torch.eye(4)[y]
    assert gpicl.calibration_error(sure, y) == 0 and gpicl.calibration_error(1 - sure, y) > 0.9


class Overconfident(torch.nn.Module):
    """Gives the right class a probability of 0.7 in truth, but says more: logits times three."""

    def forward(self, x, y):
        g = torch.Generator().manual_seed(int(y.sum()))
        told = torch.where(torch.rand(y.shape, generator=g) < 0.7, y, (y + 1) % 10)
        truth = torch.full((*y.shape, 10), 0.3 / 9)
        return 3 * truth.scatter(-1, told[..., None], 0.7).log()


def test_the_context_temperature_mends_overconfidence(blobs, tiny):
    x, y = torch.zeros(50, 400, 1), torch.randint(10, (50, 400))
    logits = Overconfident()(x, y)
    assert (gpicl.context_temperature(logits, y) - 3).abs().max() < 0.6
    assert (gpicl.context_temperature(logits / 3, y) - 1).abs().max() < 0.2
    assert torch.allclose(gpicl.context_temperature(logits[:, :0], y[:, :0]), torch.ones(50))
    settings = tiny(EVAL_SEQUENCES=1024, NUM_EXAMPLES=200)
    _, found = gpicl.evaluate(Overconfident(), blobs, settings, "fp32")
    assert found["fitted"] < 0.1 < found["raw"]


def test_calibration_is_of_the_query_whose_label_the_temperature_does_not_see(blobs, tiny):
    settings = tiny(EVAL_SEQUENCES=256)
    _, found = gpicl.evaluate(Overconfident(), blobs, settings, "fp32")
    _, y, logits = gpicl.predictions(Overconfident(), blobs, 256, settings, "fp32")
    y = torch.from_numpy(y)
    t = gpicl.context_temperature(logits[:, :-1], y[:, :-1])[:, None]
    for kind, by in (("raw", 1), ("fitted", t)):
        expected = gpicl.calibration_error((logits[:, -1] / by).softmax(1), y[:, -1])
        assert found[kind] == pytest.approx(expected, abs=1e-6)


def test_the_classifier_divides_by_the_context_temperature(tiny):
    torch.manual_seed(0)
    network = gpicl.InContextModel(tiny())
    torch.nn.init.normal_(network.head.weight)           # very sure of nothing
    x, y = torch.randn(60, 5), torch.arange(60) % 3
    doubtful, sure = (InContextClassifier(network, 1, temperature=t).fit(x, y).predict_proba(x)
                      for t in (None, 1))
    assert (doubtful.max(1) < sure.max(1)).mean() > 0.9
    assert np.array_equal(doubtful.argmax(1), sure.argmax(1))


# ------------------------------------------------------------------------------------ commands
def write(path, rows, separator=","):
    path.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))
    return path


def test_classify_from_csv_files(model_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X, y = table()
    names = np.array(["ape", "bee", "cat"])[y]
    rows = [[*x, name] for x, name in zip(X, names)]
    header = [*"abcdef", "kind"]
    train = write(tmp_path / "train.csv", [header, *rows[:40]])
    test = write(tmp_path / "test.csv", [header, *rows[40:]])
    command = ["classify", f"--CHECKPOINT={model_file}", f"--TRAIN_FILE={train}"]
    assert gpicl.main([*command, f"--TEST_FILE={test}"]) == 0
    printed = capsys.readouterr().out
    expected = InContextClassifier(model_file).fit(X[:40], names[:40])
    assert "40 of 6 features, 3 classes" in printed
    assert f"{100 * expected.score(X[40:], names[40:]):.1f} %" in printed
    strange = write(tmp_path / "strange.csv", [header, *rows[40:-2], *(
        [*row[:-1], "Ape"] for row in rows[-2:])])       # labels that no example has
    assert gpicl.main([*command, f"--TEST_FILE={strange}", "--PREDICTIONS_FILE=p.csv"]) == 0
    assert "2 labels of TEST_FILE are of no class of the examples (Ape ...)" in (
        capsys.readouterr().out)
    with open("predictions.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["prediction"] for row in found] == list(expected.predict(X[40:]))
    assert abs(sum(float(found[0][f"p({name})"]) for name in ("ape", "bee", "cat")) - 1) < 1e-3

    # other layouts of the same data: labels first, by name or number; semicolons; no labels
    turned = [[row[-1], *row[:-1]] for row in rows[:40]]
    first = write(tmp_path / "first.csv", [["kind", *"abcdef"], *turned], ";")
    bare = write(tmp_path / "bare.csv", [list(x) for x in X[40:]])
    for column in ("kind", "1"):
        assert gpicl.main(["classify", f"--CHECKPOINT={model_file}", f"--TRAIN_FILE={first}",
                           f"--TEST_FILE={bare}", f"--LABEL_COLUMN={column}",
                           "--PREDICTIONS_FILE=again.csv"]) == 0
        assert "Accuracy" not in capsys.readouterr().out
        assert open("again.csv").read() == open("predictions.csv").read()

    # pandas' own names for columns are a header: 0, 1, 2 ...
    pandas = write(tmp_path / "pandas.csv", [[*range(6), "kind"], *rows[:40]])
    assert gpicl.read_examples(pandas, "last")[0].shape == (40, 6)

    # so is a line of other numbers, or one that lacks some, where a word stands above numbers
    for line in ((3, 5, "kind"), ("?", 5, "kind")):
        years = write(tmp_path / "years.csv", [line, [1, 2, 0], [4, 5, 1]])
        x, labels, words = gpicl.read_examples(years, "last")
        assert x.tolist() == [[1, 2], [4, 5]] and labels.tolist() == [0, 1]
        assert gpicl.read_examples(years, "last", 2, words)[0].tolist() == [[1, 2], [4, 5]]
    # but a line that lacks one is else no header, which would hide it
    for hole in ("?", "NA", ""):
        hidden = write(tmp_path / "hidden.csv", [[1, hole, 3, "a"], [4, 5, 6, "b"]])
        with pytest.raises(UserError, match=f"'{re.escape(hole)}' in line 1, column 2, is not a"):
            gpicl.read_examples(hidden, "last")

    # quoted words hold no separators, nor does an empty first line; as many commas are decimal
    for name, text in (("q", '"a, cm";"b, cm";"c, cm";kind\n1;2;3;x\n4;5;6;y\n'),
                       ("n", '"a\nb, c";b;c;kind\n1;2;3;x\n4;5;6;y\n'),
                       ("e", '\na;b;c;kind\n1;2;3;x\n4;5;6;y\n')):
        (tmp_path / name).write_text(text)
        x, labels, _ = gpicl.read_examples(tmp_path / name, "last")
        assert x.tolist() == [[1, 2, 3], [4, 5, 6]] and [*labels] == ["x", "y"]
    (tmp_path / "d").write_text("5,1;a\n6,2;b\n")
    with pytest.raises(UserError, match="'6,2' in line 2, column 1, is not a number"):
        gpicl.read_examples(tmp_path / "d", "last")

    # nor is the first row of a test, nor 0, 1, 2 ... that a number follows
    two = write(tmp_path / "two.csv", [[0, 1, 1], [1, 0, 0], [1, 1, 1]])
    assert gpicl.read_examples(two, "last")[0].tolist() == [[0, 1], [1, 0], [1, 1]]
    two = write(tmp_path / "two.csv", [[0, 1], [1, 0]])
    assert gpicl.read_examples(two, "last", features=2)[0].tolist() == [[0, 1], [1, 0]]
    assert gpicl.read_examples(two, "last", 2, ["0", "1"])[0].tolist() == [[1, 0]]
    assert gpicl.read_examples(two, "1", 2)[0].tolist() == [[0, 1], [1, 0]]
    x, labels, words = gpicl.read_examples(two, "1", 1)  # as the examples: labels first, no header
    assert labels.tolist() == [0, 1] and x[:, 0].tolist() == [1, 0] and words is None

    # nor is "last", which a column may be called
    last = write(tmp_path / "last.csv", [["last", "kind"], [0, 5], [1, 6]])
    assert gpicl.read_examples(last, "last")[1].tolist() == [5, 6]

    # a number for the labels' column is no name, though the first row may hold it
    counted = write(tmp_path / "counted.csv", [[2, 5, 1, 8], [1, 6, 2, 7], [2, 4, 3, 9]])
    x, labels, words = gpicl.read_examples(counted, "1")
    assert labels.tolist() == [2, 1, 2] and x[:, 0].tolist() == [5, 6, 4] and words is None
    assert gpicl.read_examples(counted, "1", features=4)[0].shape == (3, 4)
    large = write(tmp_path / "large.csv", [[1, 2**53], [2, 2**53 + 1], [3, 2**53]])
    assert len(set(gpicl.read_csv(large, "last")[1])) == 2
    zeros = write(tmp_path / "zeros.csv", [[1, "007"], [2, "7"], [3, "7.0"]])
    assert [*gpicl.read_csv(zeros, "last")[1]] == ["007", "7", "7.0"]    # names, then
    named = write(tmp_path / "named.csv", [[0, 1, 2], [5, 6, 7], [5, 8, 9]])
    x, labels, words = gpicl.read_examples(named, "1")
    assert labels.tolist() == [6, 8] and words == ["0", "2"]

    # labels that look like numbers, with spaces, against numbers
    spaced = write(tmp_path / "spaced.csv", [[*x, f" {c}"] for x, c in zip(X[:40], y[:40])])
    np.savez(tmp_path / "numbers.npz", x=X[40:], y=y[40:].astype(float))
    assert gpicl.main(["classify", f"--CHECKPOINT={model_file}", f"--TRAIN_FILE={spaced}",
                       "--TEST_FILE=numbers.npz", "--PREDICTIONS_FILE=numbers.csv"]) == 0
    assert f"{100 * expected.score(X[40:], names[40:]):.1f} %" in capsys.readouterr().out

    for odd in (1e300, np.inf, np.nan):                  # no whole numbers: left as they are
        np.savez(tmp_path / "odd.npz", x=X[:3], y=[0.0, 1.0, odd])
        assert gpicl.read_examples(tmp_path / "odd.npz", "last")[1].dtype == np.float64

    np.savez(tmp_path / "train.npz", x=X[:40], y=names[:40])
    np.savez(tmp_path / "test.npz", x=X[40:])
    assert gpicl.main(["classify", f"--CHECKPOINT={model_file}", "--TRAIN_FILE=train.npz",
                       "--TEST_FILE=test.npz", "--PREDICTIONS_FILE=again.csv"]) == 0
    assert open("again.csv").read() == open("predictions.csv").read()


def test_classify_says_what_is_wrong(model_file, tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)                          # where predictions.csv goes
    good = write(tmp_path / "good.csv", [[1, 2, "a"], [3, 4, "b"], [5, 6, "a"]])
    command = ["classify", f"--CHECKPOINT={model_file}"]
    assert "needs a TRAIN_FILE" in fails([*command])
    assert "needs a TEST_FILE" in fails([*command, f"--TRAIN_FILE={good}"])
    for name, rows, words in (
            ("word", [[1, "red", "a"], [3, "blue", "b"], [3, "x", "b"]],
             "'blue' in line 2, column 2, is not a number"),
            ("underscore", [[1, 2, "a"], [3, "1_0", "b"]], "'1_0' in line 2, column 2, is not"),
            ("gap", [[1, 2, "a"], ["", "", ""], [3, 4, "b"]], "'' in line 2, column 1, is not"),
            ("hole", [[1, 2, "a"], [3, "", "b"]], "'' in line 2, column 2, is not a number"),
            ("nan", [[1, 2, "a"], [3, "nan", "b"]], "'nan' in line 2, column 2, is not a number"),
            ("huge", [[1, 2, "a"], [3, 1e31, "b"]],
             "NaN, infinite or huge numbers, first in row 2"),
            ("ragged", [[1, 2, "a"], [3, "b"]], "line 2 has 2 values, the first has 3"),
            ("unlabelled", [[1, 2, "a"], [3, 2, ""]], "line 2 has no label in column 3"),
            ("missing", [[1, 2, "a"], [3, 2, "nan"]], "line 2 has no label in column 3"),
            ("index", [["", "a", "kind"], [3, 2, "a"]], "column 1 has no name"),
            ("empty", [], "has 0 columns"),
            ("narrow", [[1], [2]], "has 1 columns; expected 2")):
        bad = write(tmp_path / f"{name}.csv", rows)
        flag = "TEST_FILE" if name == "narrow" else "TRAIN_FILE"
        other = "TRAIN_FILE" if name == "narrow" else "TEST_FILE"
        assert words in fails([*command, f"--{flag}={bad}", f"--{other}={good}"])
    named, other = (write(tmp_path / f"{a}{b}.csv", [[a, b, "kind"], [1, 2, "x"], [3, 4, "y"]])
                    for a, b in ("ab", "ba"))
    assert "TEST_FILE (b, a) are not those of TRAIN_FILE (a, b)" in fails([
        *command, f"--TRAIN_FILE={named}", f"--TEST_FILE={other}"])
    assert "none of TEST_FILE's labels (x ...) is one of the examples' (a, b)" in fails([
        *command, f"--TRAIN_FILE={good}", f"--TEST_FILE={named}"])
    header = write(tmp_path / "header.csv", [["a", "b", "label"]])
    assert "no rows below" in fails([*command, f"--TRAIN_FILE={header}", f"--TEST_FILE={good}"])
    both = [*command, f"--TRAIN_FILE={good}", f"--TEST_FILE={good}"]
    assert "can't write PREDICTIONS_FILE=: it is not a file" in fails(
        [*both, "--PREDICTIONS_FILE="])
    assert "no column 'kind'" in fails([*both, "--LABEL_COLUMN=kind"])
    assert "no column '9'" in fails([*both, "--LABEL_COLUMN=9"])
    assert "can't read" in fails([*command, "--TRAIN_FILE=nowhere.csv", f"--TEST_FILE={good}"])
    nowhere = f"PREDICTIONS_FILE={tmp_path}/no/p.csv"
    assert f"can't write {nowhere}" in fails([*both, f"--{nowhere}"])
    assert "classify does not read STEPS" in fails([*both, "--STEPS=3"])
    assert "default does not read TRAIN_FILE; these do: classify." in fails(
        [f"--TRAIN_FILE={good}"])
    assert "there is no model.pt in OUT_DIR" in fails([
        "classify", *both[2:], f"--OUT_DIR={tmp_path}/none"])


def test_evaluate_gives_the_curves_of_training_again_and_of_other_data(
        tiny_flags, tmp_path, capsys, fails, monkeypatch):
    assert gpicl.main(tiny_flags(AVERAGED_PASSES=2)) == 0
    capsys.readouterr()
    random = np.random.default_rng(0)
    np.savez(tmp_path / "wide.npz", x=random.normal(size=(60, 3, 9)), y=np.arange(60) % 4)
    blobs = tmp_path / "blobs.npz"
    command = ["evaluate", f"--OUT_DIR={tmp_path}/runs"]
    assert gpicl.main([*command, f"--EVAL_DATASETS={blobs},{tmp_path}/wide.npz"]) == 0
    printed = capsys.readouterr().out
    assert "blobs@11: " in printed and "wide@11: " in printed
    trained, = (tmp_path / "runs").glob("blobs-*/results.json")
    again, = (tmp_path / "runs").glob("evaluation-blobs-wide-*/results.json")
    again = json.loads(again.read_text())
    assert set(again["data_sets"]) == {"blobs", "wide"}
    assert again["trained_on"] == "blobs"
    assert again["settings"]["AVERAGED_PASSES"] == 2     # as in training
    assert json.loads(trained.read_text())["settings"]["STEPS"] == again["settings"]["STEPS"]
    # the rows that were trained on are never tested on, under whatever name the file goes
    monkeypatch.chdir(tmp_path / "runs")
    for name in (blobs, "../blobs.npz"):
        assert gpicl.main([*command, f"--EVAL_DATASETS={name}"]) == 0
        assert "blobs@11" in capsys.readouterr().out
    same = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob(
        "evaluation-blobs-??????/results.json")]
    assert len(same) == 2                                # a folder each: nothing is overwritten
    curves = json.loads(trained.read_text())["data_sets"]["blobs"]["curves"]
    assert all(found["data_sets"]["blobs"]["curves"] == curves for found in same)
    assert gpicl.main([*command, f"--EVAL_DATASETS={blobs}", "--NUM_EXAMPLES=60"]) == 0
    assert "blobs@59: " in capsys.readouterr().out       # more than VALIDATION_IMAGES=50
    # fixed tasks are seen ones only where they are those of the training
    monkeypatch.chdir(tmp_path)
    assert gpicl.main(tiny_flags(TRAIN_DATASET="blobs.npz", EVAL_DATASETS="auto",
                                 NUM_TASKS=8)) == 0
    monkeypatch.chdir(tmp_path / "runs")
    for flags, row in (([], "blobs, seen tasks: T"), (["--IMAGE_SIZE=5"], "blobs: T")):
        capsys.readouterr()
        assert gpicl.main([*command, f"--EVAL_DATASETS={blobs}", *flags]) == 0
        printed = capsys.readouterr().out
        assert row in printed and ("seen" in printed) == (not flags)
    assert "evaluate does not read STEPS" in fails([*command, "--STEPS=3"])
    assert "can't read the checkpoint" in fails(["evaluate", "--CHECKPOINT=nowhere.pt"])
    assert "truncated or not a checkpoint.\n" in fails(["evaluate", f"--CHECKPOINT={blobs}"])


def test_labels_are_the_same_in_whatever_way_they_are_written(
        model_file, tmp_path, capsys, fails, recwarn):
    X = np.arange(24.0).reshape(12, 2) % 7
    np.savez(tmp_path / "a.npz", x=X, y=[1.0, 2.0, 2.5] * 4)
    np.savez(tmp_path / "b.npz", x=X[:2], y=np.array([1, 2]))
    np.savez(tmp_path / "half.npz", x=X, y=np.array([1.0, 2.0, 2.5] * 4, np.float16))
    np.savez(tmp_path / "bytes.npz", x=X, y=np.array([b"a", b"b", b"\xc3\xa9"] * 4))
    words = write(tmp_path / "words.csv", [[*x, y] for x, y in zip(X, ["1.0", "2", "2.50"] * 4)])
    odd = write(tmp_path / "odd.csv", [[1, 2, "unknown"], [3, 5, "1.0"]])
    command = ["classify", f"--CHECKPOINT={model_file}", f"--PREDICTIONS_FILE={tmp_path}/p.csv"]
    for train, test in (("a.npz", "b.npz"), ("a.npz", words), ("half.npz", "b.npz"),
                        (words, "a.npz"), ("bytes.npz", "bytes.npz"), ("b.npz", odd)):
        files = [f"--TRAIN_FILE={tmp_path / train}", f"--TEST_FILE={tmp_path / test}"]
        assert gpicl.main([*command, *files, "--N_ENSEMBLE=1"]) == 0
        assert "Accuracy" in capsys.readouterr().out
    assert gpicl.plain("1") == gpicl.plain(np.float16(1)) == "1.0" != gpicl.plain("01") == "01"
    assert not [warning for warning in recwarn if "overflow" in str(warning.message)]
    own = [f"--TRAIN_FILE={tmp_path}/a.npz", f"--TEST_FILE={tmp_path}/p.csv"]
    (tmp_path / "p.csv").write_text("mine")
    assert "PREDICTIONS_FILE would replace TEST_FILE" in fails([*command, *own])
    assert (tmp_path / "p.csv").read_text() == "mine"


def test_a_first_row_with_a_hole_is_no_header_of_a_test(tmp_path):
    hole = write(tmp_path / "hole.csv", [["NA", 3], [1, 2]])
    with pytest.raises(UserError, match="'NA' in line 1, column 1, is not a number"):
        gpicl.read_csv(hole, "last", features=2)
    worded = write(tmp_path / "worded.csv", [["a", "b"], [1, 2]])        # of examples in an .npz
    assert gpicl.read_csv(worded, "last", features=2)[0].tolist() == [[1, 2]]


@pytest.mark.parametrize("text, words", [
    ('1,2,x\n3,4,"y\n5,6,x\n', "unexpected end of data"),               # a quote never closed
    ("5.1cm,3.5,x\n1,2,x\n3,4,y\n", "'5.1cm' in line 1, column 1, is not a number"),
    ("<NA>,3,x\n1,2,x\n3,4,y\n", "'<NA>' in line 1, column 1, is not a number"),
    ("a,b,c\n1,2,x\n3,nan,y\n", "'nan' in line 3, column 2, is not a number"),
    ("a,b,c\n", "no rows below its first line"),
    ("c,b,c\n1,2,3\n3,4,5\n", "several columns 'c'")])
def test_a_csv_file_that_would_be_misread_is_refused(text, words, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        gpicl.read_csv(path, "c" if "several" in words else "last")
    assert str(path) in str(error.value)


def test_images_of_another_layout_are_refused(model, tmp_path):
    x, y = np.random.default_rng(0).normal(size=(20, 4, 4, 3)), np.arange(20) % 2
    fitted = InContextClassifier(model, 1).fit(x, y)
    expected = fitted.predict(x)
    fitted.save(tmp_path / "c.pt")
    for classifier in (fitted, InContextClassifier.load(tmp_path / "c.pt")):
        with pytest.raises(UserError, match="X has images of shape .3, 4, 4., the examples .4, 4"):
            classifier.predict(np.moveaxis(x, -1, 1))
        assert np.array_equal(classifier.predict(x.reshape(20, -1)), expected)


def test_labels_and_numbers_are_taken_as_they_are(model, tmp_path):
    X, y = table()
    labels = y.copy()
    fitted = InContextClassifier(model, 1).fit(X, labels)
    before = fitted.predict(X)
    labels[:] = labels[::-1]                             # by the caller, afterwards
    fitted.save(tmp_path / "c.pt")
    assert np.array_equal(InContextClassifier.load(tmp_path / "c.pt").predict(X), before)
    assert np.array_equal(InContextClassifier(model, 1).fit(X, y[:, None]).predict(X), before)
    for mixed in ([1, "no"] * 45, ["s", float("nan")] * 45):
        with pytest.raises(UserError, match="several types"):
            InContextClassifier(model).fit(X, mixed)
    with pytest.raises(UserError, match="can't be read as an array of numbers"):
        InContextClassifier(model).fit(np.array(X.astype(int), "datetime64[s]"), y)
    with pytest.raises(ValueError, match="has no examples yet"):         # as scikit-learn expects
        InContextClassifier(model).predict(X)


def test_a_folder_is_no_damaged_checkpoint(tmp_path, fails):
    error = fails(["evaluate", f"--CHECKPOINT={tmp_path}"])
    assert "can't read the checkpoint" in error and "Is a directory" in error


def test_columns_in_another_order_are_refused(model, tmp_path):
    class Frame(np.ndarray):                             # as much of pandas' as matters
        pass

    X, y = table()
    X, turned, other = X.view(Frame), X[:, ::-1].view(Frame), X.view(Frame)
    X.columns, turned.columns, other.columns = [*"abcdef"], [*"fedcba"], [*"abcdef"]
    fitted = InContextClassifier(model, 1).fit(X, y)
    assert np.array_equal(fitted.predict(other), fitted.predict(np.asarray(X)))
    fitted.save(tmp_path / "c.pt")
    for classifier in (fitted, InContextClassifier.load(tmp_path / "c.pt")):
        with pytest.raises(UserError, match="X has the columns .*'f', 'e'.* the examples .*'a'"):
            classifier.predict(turned)


def test_a_failed_fit_changes_nothing(model):
    X, y = table()
    fitted = InContextClassifier(model, 1).fit(X, y)
    before = fitted.predict(X)
    with pytest.raises(UserError):
        fitted.set_params(model="missing.pt").fit(X[:9], y[:9] + 1)
    assert np.array_equal(fitted.predict(X), before)


def test_an_array_that_can_not_be_made_is_a_sentence(model):
    class Broken:
        def __array__(self, *_, **__):
            raise RuntimeError("no array of this")

    with pytest.raises(UserError, match="can't be read as an array of numbers .no array of this"):
        InContextClassifier(model, 1).fit(Broken(), [0, 1])


def test_a_scaling_from_a_parameter_grid_can_be_saved(model, tmp_path):
    X, y = table()
    grid = np.array(["shared", "columns"])
    InContextClassifier(model, 1, scaling=grid[1]).fit(X, y).save(tmp_path / "c.pt")
    assert InContextClassifier.load(tmp_path / "c.pt").scaling == "columns"


def test_data_without_any_length_are_no_traceback():
    gram, y = torch.zeros(2, 6, 6), torch.arange(10).view(2, 5) % 3
    assert all(label.shape == (2,) for label in gpicl.classical_labels(gram, y).values())


def test_a_byte_order_mark_and_tabs_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("1\t2\t0\n3\t4\t1\n", encoding="utf-8-sig")
    x, labels, names = gpicl.read_csv(tmp_path / "a.csv", "last")
    assert x.tolist() == [[1, 2], [3, 4]] and labels.tolist() == [0, 1] and names is None


def test_classify_follows_ensemble_and_seed(tiny, tmp_path, monkeypatch):
    X, y = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2
    np.savez(tmp_path / "data.npz", x=X, y=y)
    monkeypatch.chdir(tmp_path)
    model = lively_model(tiny())
    gpicl.save_checkpoint(tmp_path / "model.pt", model.settings, model)
    assert gpicl.main(["classify", "--CHECKPOINT=model.pt", "--TRAIN_FILE=data.npz",
                       "--TEST_FILE=data.npz", "--N_ENSEMBLE=1", "--SEED=5"]) == 0
    p = gpicl.InContextClassifier("model.pt", 1, random_state=5).fit(X, y).predict_proba(X)
    with open("predictions.csv", newline="") as file:
        assert [row["p(0)"] for row in csv.DictReader(file)] == [f"{q:.4f}" for q in p[:, 0]]


@pytest.mark.parametrize("word", ["load_iris", "load_dataset"])
def test_the_python_of_the_readme_runs(word, model, tmp_path, monkeypatch, request, capsys):
    """With a small model in place of a run's, and real images for the block that reads them."""
    chosen = gpicl.altered(model.settings)
    if word == "load_dataset":
        chosen.DATA_DIR = str(request.getfixturevalue("real_data"))
    monkeypatch.chdir(tmp_path)
    gpicl.save_checkpoint(tmp_path / "model.pt", chosen, model)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    block, = (block for block in blocks if word in block)
    exec(block.replace("runs/<your run>/", ""), {})
    assert capsys.readouterr().out
