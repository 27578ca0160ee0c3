"""The experiments: what they compute, and that a sweep goes on where it stopped."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, gpicl, wait_until
from matplotlib.figure import Figure
from scipy import stats
from test_evaluation import Neighbour

SWEEP = dict(NUM_EXAMPLES=12, PROJECTION_SIZE=16, MODEL_SIZE=16, NUM_HEADS=2, STEPS=3,
             BATCH_SIZE=4, EVAL_SEQUENCES=32, VALIDATION_IMAGES=300, DEVICE="cpu", SEEDS=2,
             WORKERS=1, WARMUP_STEPS=1)


@pytest.fixture(scope="module")
def rendered_dir(tmp_path_factory):
    """Return a data folder that keeps its rendered digits and letters for all tests."""
    return tmp_path_factory.mktemp("rendered")


@pytest.fixture
def sweep(rendered_dir, tmp_path, capsys):
    """Return a function that runs an experiment in a small form; it returns what was printed."""
    def run(name, **more):
        flags = {**SWEEP, "TRAIN_DATASET": "RenderedDigits", "DATA_DIR": rendered_dir, "OUT_DIR":
                 tmp_path / "runs", "RESULTS_DIR": tmp_path / "results", **more}
        code = gpicl.main([name, *(f"--{key}={value}" for key, value in flags.items())])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out
    return run


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name, columns", [
    ("phases", {"NUM_TASKS", "MODEL_SIZE", "TOKEN_FORMAT", "tested_on", "improvement", "SEED"}),
    ("architectures", {"ARCHITECTURE", "state", "parameters", "accuracy", "SEED"}),
    ("plateau", {"BATCH_SIZE", "NUM_TASKS", "ADAM_EPSILON", "length", "left", "SEED"}),
    ("table", {"method", "tested_on", "accuracy", "paper", "SEED"}),
    ("features", {"input", "shots", "learner", "accuracy", "SEED"}),
    ("algorithm", {"step", "examples", "a", "b", "kappa", "same_mistake", "SEED"}),
])
def test_every_experiment_ends_in_a_table_a_csv_a_figure_and_a_record(
        name, columns, sweep, tmp_path):
    more = dict(phases=dict(NUM_TASKS=4), plateau=dict(STEPS=25), features=dict(
        IMAGE_SIZE=8, SHOTS="1,2,1"), table=dict(EVAL_DATASETS="auto,Random,Missing.npz?"))
    printed = sweep(name, **more.get(name, {}))
    results = tmp_path / "results"
    rows = table(results / f"{name}.csv")
    assert columns <= set(rows[0]) and {row["SEED"] for row in rows} == {"0", "1"}
    assert len(rows) == len({tuple(row.values()) for row in rows}) or name != "features"
    assert (results / f"{name}.png").stat().st_size > 10000
    record = json.loads((results / f"{name}.json").read_text())
    assert record["experiment"] == name and (
        name == "table" or record["settings"]["STEPS"] in (3, 25))
    assert record["versions"]["torch"] == torch.__version__ and record["run_seconds"] > 0
    assert all(line in printed for line in record["table"])


def test_a_sweep_goes_on_where_it_stopped(sweep, tmp_path):
    """Runs of before are kept, a line that a kill cut short is made again, a seed can be added."""
    more = dict(NUM_TASKS=4, MODEL_SIZE=16)
    first = sweep("phases", **more)
    assert "Experiment  phases: 6 runs, 0 of them made before, 1 at once" in first
    lines = next((tmp_path / "runs").glob("phases-*/runs.jsonl"))
    kept, rows = lines.read_text(), table(tmp_path / "results" / "phases.csv")
    lines.write_text(kept[:-20])
    again = sweep("phases", **more)
    assert "6 runs, 5 of them made before" in again
    assert table(tmp_path / "results" / "phases.csv") == rows
    assert "9 runs, 6 of them made before" in sweep("phases", **{**more, "SEEDS": 3})
    assert len(table(tmp_path / "results" / "phases.csv")) == 1.5 * len(rows)


def test_a_run_left_by_a_kill_gets_as_many_threads_as_ever(sweep, tmp_path, monkeypatch):
    """Their number decides how sums are rounded."""
    threads, run_all = [], gpicl.run_all

    def noted(jobs, workers):
        threads.append({job[-1] for job in jobs})
        return run_all(jobs, 1)

    monkeypatch.setattr(gpicl, "run_all", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    more = dict(NUM_TASKS=4, MODEL_SIZE=16, SEEDS=1, WORKERS=4)
    sweep("phases", **more)
    lines = next((tmp_path / "runs").glob("phases-*/runs.jsonl"))
    lines.write_text(lines.read_text().strip().rpartition("\n")[0])      # the last one is gone
    sweep("phases", **more)
    assert threads == [{2}, {2}]


def test_fresh_tasks_are_no_training_tasks(sweep, tmp_path):
    sweep("phases", NUM_TASKS=0, MODEL_SIZE=16, SEEDS=1)
    rows = table(tmp_path / "results" / "phases.csv")
    assert {row["tested_on"] for row in rows} == {"unseen tasks", "RenderedLetters"}


def test_a_setting_that_some_runs_only_set_counts_for_the_others(sweep):
    """`architectures` sets LEARNING_RATE for one kind of model; by a flag it changes them all."""
    assert " 0 of them made before" in sweep("architectures", MODEL_SIZE=8, STEPS=1)
    printed = sweep("architectures", MODEL_SIZE=8, STEPS=1, LEARNING_RATE=1e-3)
    assert " 0 of them made before" in printed


def test_architectures_can_be_compared_without_a_start():
    settings = gpicl.default_settings(GUIDED_START=False)
    with_some, none = (gpicl.runs_of("architectures", settings, flags)
                       for flags in ([], ["GUIDED_START"]))
    assert {run["GUIDED_START"] for run in with_some} == {True, False} != {
        run["GUIDED_START"] for run in none} and len(none) == len(with_some)


def test_two_workers_do_what_one_does(sweep, tmp_path):
    more, threads = dict(NUM_TASKS=4, MODEL_SIZE=16, SEEDS=1), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sweep("phases", **more)
        alone = table(tmp_path / "results" / "phases.csv")
        assert ", 2 at once" in sweep("phases", **more, WORKERS=2, OUT_DIR=tmp_path / "other")
    finally:
        torch.set_num_threads(threads)
    assert table(tmp_path / "results" / "phases.csv") == alone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_says_so_and_keeps_its_runs(number, rendered_dir, tmp_path):
    flags = {**SWEEP, "TRAIN_DATASET": "RenderedDigits", "DATA_DIR": rendered_dir, "OUT_DIR":
             tmp_path / "runs", "RESULTS_DIR": tmp_path / "results", "WORKERS": 2, "SEEDS": 50}
    process = subprocess.Popen(
        [sys.executable, ROOT / "gpicl_minimal_replication.py", "phases", "--NUM_TASKS=4",
         *(f"--{key}={value}" for key, value in flags.items())],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # nohup ... & ignores it
    wait_until(lambda: any(path.stat().st_size for path in (
        tmp_path / "runs").glob("*/runs.jsonl")), process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)     # until its workers have ended, too
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130 and "the same command goes on with the runs" in output
    assert "Traceback" not in errors
    assert gpicl.read_runs(next((tmp_path / "runs").glob("*/runs.jsonl")))


@pytest.mark.parametrize("arguments, expected", [
    (["phases", "--STEPZ=3"], "did you mean STEPS?"),
    (["phase"], "did you mean phases?"),
    (["quick", "--SEEDS=3"], "quick does not read SEEDS; these do: phases, "),
    (["phases", "--WAYS=3"], "phases does not read WAYS; these do: features."),
    (["phases", "--AVERAGED_PASSES=3"], "phases does not read AVERAGED_PASSES"),
    (["phases", "--TOKEN_FORMAT=pairs"], "compares models of different TOKEN_FORMAT"),
    (["features", "--TOKEN_FORMAT=paper", "--SHOTS=9"], "positions for at most 11 examples"),
    (["features", "--WAYS=6", "--SHOTS=1", "--NUM_EXAMPLES=12", "--IMAGE_SIZE=8"],
     "episodes need WAYS=6"),
    (["phases", "--CHECKPOINT=a.pt"],
     "phases does not read CHECKPOINT; these do: evaluate, classify."),
    (["phases", "--MODEL_SIZE=31"], "multiple of NUM_HEADS"),
    (["phases", "--LEARNING_RATE=1e30"], "(in the run {'ARCHITECTURE': 'transformer',"),
    (["features", "--SHOTS=many"], "expected numbers of examples such as 1,5"),
    (["features", "--WAYS=30"], "from 1 to 10"),
    (["features", "--SHOTS=1", "--IMAGE_SIZE=3"],
     "train and test on grey images such as MNIST, of IMAGE_SIZE=4 or more"),
    (["algorithm", "--NUM_EXAMPLES=2"], "after 2 or more examples; NUM_EXAMPLES=3 or up"),
    (["algorithm", "--ARCHITECTURE=maml"], "maml answers after all examples only"),
    (["plateau", "--ARCHITECTURE=maml"], "maml answers after all examples only"),
    (["plateau", "--EVAL_DATASETS=Random"], "plateau does not read EVAL_DATASETS"),
    (["features", "--FEATURES_FILE=none.npz"], "there is no file none.npz"),
    (["--ATTENTION_SCALE=0"], "expected a number above 0"),
    (["--GRADIENT_CLIP=0"], "expected a number above 0"),
    (["--ARCHITECTURE=rnn"], "expected one of transformer, lstm"),
])
def test_wrong_use(arguments, expected, fails, rendered_dir, tmp_path):
    where = [f"--DATA_DIR={rendered_dir}", f"--OUT_DIR={tmp_path}"]
    if arguments[0] in gpicl.EXPERIMENTS:
        flags = {**SWEEP, "TRAIN_DATASET": "RenderedDigits", "RESULTS_DIR": tmp_path}
        where += [f"--{key}={value}" for key, value in flags.items()
                  if not any(key in word for word in arguments)]
    assert expected in fails([*arguments, *where])


def test_mean_and_interval_are_students():
    values = [0.3, 0.5, 0.45, 0.7]
    mean, half = gpicl.summary([dict(p=value) for value in values], "p")
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert mean == pytest.approx(np.mean(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-3)
    for freedom in (1, 5, 10, 11, 20, 100):
        assert gpicl.student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)
    assert math.isnan(gpicl.summary([dict(p=0.5)], "p")[1])


def test_rank_correlation_is_spearmans():
    generator = np.random.default_rng(0)
    for _ in range(5):
        x, y = generator.integers(6, size=20), generator.standard_normal(20)
        assert gpicl.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_power_law_finds_the_exponent():
    x = np.array([16, 32, 64, 128, 256])
    slope, half = gpicl.power_law(x, 5000 * x**-0.7)
    assert slope == pytest.approx(-0.7) and half < 1e-6


def test_every_name_has_its_tick_however_many_there_are():
    names, panel = list("abcdefghijkl"), Figure().subplots()
    gpicl.draw_curves([dict(x=name, y=1.0, by="a") for name in names], panel, "x", "y", "by", "")
    assert [label.get_text() for label in panel.get_xticklabels()] == names


def test_plateau_ends_where_the_loss_leaves_for_good():
    guess, steps = math.log(10), [10, 20, 30, 40, 50]
    assert gpicl.plateau_length(steps, [guess, guess, 2.1, 2.0, 1.9]) == 30
    assert gpicl.plateau_length(steps, [guess, 2.1, guess, 2.0, 1.9]) == 40
    assert gpicl.plateau_length(steps, [2.0] * 5) == 10
    assert gpicl.plateau_length(steps, [guess] * 5) is None
    assert gpicl.plateau_length(steps, [2.0, 2.0, 2.0, 2.0, math.nan]) is None


def test_agreement_beyond_accuracy():
    generator = np.random.default_rng(0)
    y = generator.integers(10, size=100000)

    def guesses(accuracy):
        wrong = (y + generator.integers(1, 10, size=len(y))) % 10
        return np.where(generator.random(len(y)) < accuracy, y, wrong)

    a, b, ten = guesses(0.7), guesses(0.6), np.full(len(y), 10)
    independent = gpicl.agreement(a, b, y, ten)
    assert abs(independent["kappa"]) < 0.01 and abs(independent["same_mistake"] - 1 / 9) < 0.01
    assert independent["agreement"] == pytest.approx(independent["expected"], abs=0.01)
    same = gpicl.agreement(a, a, y, ten)
    assert same["kappa"] == 1 and same["same_mistake"] == 1
    assert np.isnan(gpicl.agreement(y, y, y, ten)["kappa"])              # nothing was left to agree
    half = gpicl.agreement(a, np.where(generator.random(len(y)) < 0.5, a, b), y, ten)
    assert 0.4 < half["kappa"] < 0.6
    # few classes shown: guesses among them agree more often, and that is no agreement
    shown = generator.integers(2, 11, size=len(y))
    y = (generator.random(len(y)) * shown).astype(int)
    a, b = ((generator.random(len(y)) * shown).astype(int) for _ in range(2))
    assert abs(gpicl.agreement(a, b, y, shown)["kappa"]) < 0.05
    assert gpicl.agreement(a, b, y, np.full(len(y), 10))["kappa"] > 0.1


def test_episodes_have_so_many_ways_and_shots(blobs, tiny):
    x, y = gpicl.draw_episodes(blobs, 50, 4, 3, tiny(), ("test",))
    assert x.shape == (50, 13, 32) and y.shape == (50, 13)
    for labels in y:
        kinds, counts = labels[:-1].unique(return_counts=True)
        assert len(kinds) == 4 and (counts == 3).all() and labels[-1] in kinds
    queries = torch.bincount(y[:, -1], minlength=10)
    assert (queries > 0).sum() > 7                       # labels are permuted afresh
    few = gpicl.Dataset("few", blobs.x[:20], blobs.y[:20], 10)
    with pytest.raises(gpicl.UserError, match="episodes need WAYS=4"):
        gpicl.draw_episodes(few, 5, 4, 3, tiny(), ("test",))


def test_features_of_many_classes_come_from_a_file(sweep, tmp_path):
    generator = np.random.default_rng(0)
    centres, y = 3 * generator.standard_normal((30, 50)), np.arange(600) % 30
    np.savez(tmp_path / "embeddings.npz", x=centres[y] + generator.standard_normal((600, 50)), y=y)
    sweep("features", FEATURES_FILE=tmp_path / "embeddings.npz", SHOTS="5", SEEDS=1, STEPS=80,
          PROJECTION_SIZE=256, MODEL_SIZE=32, BATCH_SIZE=16, EVAL_SEQUENCES=128, NUM_EXAMPLES=30)
    found = {row["learner"]: float(row["accuracy"])
             for row in table(tmp_path / "results" / "features.csv")}
    assert found["nearest centroid"] > 0.95 and found["in-context"] > 0.6


def test_a_file_that_changed_makes_a_new_run(sweep, tmp_path):
    path = tmp_path / "embeddings.npz"
    for seed in (0, 0, 1):
        np.savez(path, x=np.random.default_rng(seed).standard_normal((60, 5)), y=np.arange(60) % 6)
        sweep("features", FEATURES_FILE=path, SHOTS="1", SEEDS=1, STEPS=1)
    runs = [len(gpicl.read_runs(path)) for path in (tmp_path / "runs").glob("*/runs.jsonl")]
    assert runs == [1, 1]


def test_data_of_runs_are_the_test_images_once(monkeypatch, rendered_dir):
    monkeypatch.setattr(gpicl, "NUM_TASKS", 8)           # as edited at the top of the file
    pairs = dict(TRAIN_DATASET="RenderedDigits", EVAL_DATASETS="auto", DATA_DIR=str(rendered_dir))
    training, validation, tests = gpicl.data_of_runs("cpu", **pairs)
    assert len(training.y) + len(validation.y) == 20000
    assert [(name, len(dataset.y)) for name, dataset in tests.items()] == [
        ("RenderedDigits", 5000), ("RenderedLetters", 5000)]


def test_random_points_are_learnt_by_heart(tiny):
    settings = tiny(NUM_EXAMPLES=100, IMAGE_SIZE=8)
    dataset = gpicl.load_dataset("Random", "unseen", settings, "cpu")
    hits, *_ = gpicl.count_hits(gpicl.InContextModel(settings), dataset, 64, settings, "fp32",
                                lengths=[99])
    assert hits["1-nearest neighbour"][0] >= 63


def test_other_architectures_in_the_main_job_and_its_commands(tiny_flags, tmp_path, capsys, fails):
    for architecture, name in (("lstm", "LSTM"), ("vsml", "VSML"), ("maml", "MAML")):
        assert gpicl.main(tiny_flags(ARCHITECTURE=architecture, STEPS=2)) == 0
        printed = capsys.readouterr().out
        columns = re.search(r"seconds +loss +rate +\|(.*)", printed)[1].split()
        assert f"blobs: {name}" in printed and len(columns) == (1 if name == "MAML" else 6)
        newest = max((tmp_path / "runs").glob("*/curves.csv"), key=os.path.getmtime)
        lengths = [int(row["examples"]) for row in table(newest) if row["learner"] == name]
        assert lengths == ([11] if name == "MAML" else [*range(12)])
    assert gpicl.main(["evaluate", f"--OUT_DIR={tmp_path / 'runs'}", "--EVAL_DATASETS=Random"]) == 0
    newest = gpicl.newest_checkpoint(gpicl.default_settings(OUT_DIR=str(tmp_path / "runs")))
    capsys.readouterr()
    with pytest.raises(gpicl.UserError, match="has ARCHITECTURE=maml; only a transformer"):
        gpicl.InContextClassifier(newest).fit(np.eye(4), [0, 1, 0, 1])


# -------------------------------------------------------------------------- what each one measures
def test_power_law_half_width_is_students():
    x, y = np.array([16, 32, 64, 128, 256]), np.array([900, 520, 300, 190, 90])
    fit = stats.linregress(np.log(x), np.log(y))
    assert gpicl.power_law(x, y) == pytest.approx(
        (fit.slope, stats.t.ppf(0.975, 3) * fit.stderr), rel=2e-3)


def test_phases_are_told_where_the_whole_interval_is_above_ten_points():
    rows = [dict(ARCHITECTURE="mlp", TOKEN_FORMAT="paper", MODEL_SIZE=32, NUM_TASKS=n, last=0.5,
                 tested_on="unseen tasks", improvement=p) for n, few in (
                     (8, (0.11, 0.2)), (16, (0.3, 0.31))) for p in few]
    lines = gpicl.report_phases(rows, Figure())
    assert "  unseen tasks: 95 % interval above 10 points with 16 tasks" in lines


def test_models_of_other_settings_are_no_more_seeds():
    rows = [dict(ARCHITECTURE=name, LEARNING_RATE=rate, SEED=seed, tested_on="MNIST", state=8,
                 parameters=9, accuracy=rate)
            for name in ("lstm", "mlp") for rate in (0.1, 0.3) for seed in (0, 1)]
    figure = Figure()
    lines = gpicl.report_architectures(rows, figure)
    assert [re.search(r"MNIST +(.*)", line)[1] for line in lines[:4]] == [
        "10.0 ± 0.0", "30.0 ± 0.0"] * 2
    for panel in figure.axes:                            # a mark for each model
        assert [bars[0].get_ydata().tolist() for bars in panel.containers] == [[10, 30], [10, 30]]


@pytest.mark.parametrize("flags, shown, hidden", [
    ({}, ["AdamW, 1e-08", "2**6", "random", "zero outputs"], []),
    (dict(LEARNING_RATE=2e-3), ["AdamW, 1e-08", "Muon"], []),
    (dict(OUTPUT_STD=0.5), ["comparing"], []),
    (dict(GUIDED_START=True), ["comparing", "zero outputs"], ["random"]),
    (dict(BATCH_SIZE=32), ["32"], ["128"]),
    (dict(OPTIMIZER="adamw"), ["AdamW, 1e-08"], ["Muon"]),
    (dict(OPTIMIZER="muon"), ["Muon"], ["AdamW, 1e-08", "AdamW, 0.001"])])
def test_plateau_tells_of_every_run_that_flags_leave(flags, shown, hidden):
    cells = [{**gpicl.PLATEAU_BASE, **cell, **flags} for cells in gpicl.PLATEAU_FACTORS.values()
             for cell in cells.values()]
    rows = [dict(cell, SEED=0, tested_on="unseen tasks", length=40, left=True, steps=60)
            for i, cell in enumerate(cells) if cell not in cells[:i]]
    figure = Figure()
    lines = "\n".join(gpicl.report_plateau(rows, figure))
    ticks = [label.get_text() for panel in figure.axes for label in panel.get_xticklabels()]
    assert all(word in ticks and f" {word}" in lines for word in shown)
    assert not any(word in ticks for word in hidden)


def test_a_run_has_training_and_test_sequences_of_its_own(blobs, tiny, monkeypatch):
    found = []
    monkeypatch.setattr(gpicl, "data_of_runs", lambda *_, **__: None)
    monkeypatch.setitem(gpicl.EXPERIMENTS, "table", gpicl.EXPERIMENTS["table"]._replace(
        measure=lambda settings, *_: found.append(settings.EVAL_SEED)))
    gpicl.one_run(("table", vars(tiny(SEED=7)), {}, torch.get_num_threads()))
    assert found == [7]
    one, other = (gpicl.trained_model(tiny(SEED=seed, STEPS=1, LEARNING_RATE=0.0), blobs, "fp32")
                  for seed in (0, 1))
    assert not torch.equal(one.embed_image.weight, other.embed_image.weight)


def test_what_experiments_ask_of_a_model(blobs, tiny, monkeypatch):
    asked, data = [], (blobs, blobs._replace(name="validation"), {"blobs": blobs})
    hits = np.arange(12)
    monkeypatch.setattr(gpicl, "trained_model", lambda *_: gpicl.InContextModel(tiny()))
    monkeypatch.setattr(gpicl, "count_hits", lambda *given, **_: (asked.append(given[5:]), (
        {"in-context": hits, "SGD (softmax)": hits[-1:]}, None, None))[1])
    found = gpicl.measure_phases(tiny(NUM_TASKS=8), data, "fp32")
    assert asked == [(8,), (0,)] and found[0]["last"] == 11 / 64     # of the last tenth: one
    assert {row["accuracy"] for row in gpicl.measure_table(tiny(), data, "fp32")} == {11 / 64}


def test_plateau_is_measured_on_validation_images(blobs, tiny, monkeypatch):
    drawn, true_draw = set(), gpicl.draw_sequences
    monkeypatch.setattr(gpicl, "draw_sequences", lambda dataset, n, settings, key, *rest: (
        drawn.add((key[0], dataset.name, n)), true_draw(dataset, n, settings, key, *rest))[1])
    data = blobs, blobs._replace(name="validation"), {}
    gpicl.measure_plateau(tiny(STEPS=1), data, "fp32")
    assert drawn == {("plateau", "validation", 64), ("train", "blobs", 8)}


def test_features_are_of_classes_that_nothing_was_trained_on(blobs, tiny, monkeypatch):
    images = gpicl.Dataset("images", torch.randn(300, 16), torch.arange(300) % 10, 10)
    trained_on, tested_on = [], []
    monkeypatch.setattr(gpicl, "train_features", lambda dataset, settings: (
        trained_on.append(dataset), torch.nn.Flatten())[1])
    monkeypatch.setattr(gpicl, "trained_model", lambda settings, dataset, precision: (
        trained_on.append(dataset), gpicl.InContextModel(settings))[1])
    monkeypatch.setattr(gpicl, "draw_episodes", lambda dataset, *rest: (
        tested_on.append(dataset), (torch.randn(1, 3, 32), torch.arange(3)[None] % 2))[1])
    test = images._replace(x=images.x + 1)
    gpicl.measure_features(tiny(IMAGE_SIZE=4, SHOTS="1"), (images, images, {"images": test}),
                           "fp32")
    assert len(trained_on) == 2 and all(
        set(dataset.y.tolist()) == {0, 1, 2, 3, 4} == {*range(dataset.classes)}
        for dataset in trained_on)
    assert torch.equal(tested_on[0].x, test.x[test.y > 4])


def test_the_query_of_an_episode_is_not_among_its_examples(blobs, tiny):
    x, y = gpicl.draw_episodes(blobs, 50, 4, 3, tiny(), ("test",))
    assert (x[:, :-1] - x[:, -1:]).norm(dim=-1).min() > 0.1
    assert not (y[:, 0] == y[:, 1]).all()                # the examples are in random order


def test_the_twin_has_another_seed_and_queries_of_unseen_classes_do_not_count(
        blobs, tiny, monkeypatch):
    seeds, true_trained = [], gpicl.trained_model
    monkeypatch.setattr(gpicl, "trained_model", lambda settings, *rest: (
        seeds.append(settings.SEED), true_trained(settings, *rest))[1])
    known, true_agreement = [], gpicl.agreement
    monkeypatch.setattr(gpicl, "agreement", lambda a, b, y, shown: (
        known.append(len(y)), true_agreement(a, b, y, shown))[1])
    gpicl.measure_algorithm(tiny(STEPS=1), (blobs, None, {"blobs": blobs}), "fp32")
    assert seeds == [1000] and max(known) < 64


def test_a_model_that_looks_up_neighbours_agrees_with_1_nn(blobs, tiny, monkeypatch):
    monkeypatch.setattr(gpicl, "trained_model", lambda *_: Neighbour())
    monkeypatch.setattr(gpicl, "training_steps", lambda *_: [(Neighbour(), 1), (Neighbour(), 6)])
    rows = gpicl.measure_algorithm(tiny(NUM_EXAMPLES=30), (blobs, None, {"blobs": blobs}), "fp32")
    for b in ("1-nearest neighbour", "same model, other seed"):
        found = gpicl.select(rows, a="in-context", b=b)
        assert {(row["step"], row["examples"]) for row in found} == {
            (step, n) for step in (1, 6) for n in (10, 20, 29)}
        assert min(row["agreement"] for row in found) > 0.95


@pytest.mark.parametrize("known, expected", [
    (False, [(20, True, 200), (None, False, 200)]), (True, 2 * [(20, True, 60)])])
def test_plateau_is_told_for_each_kind_of_task_and_ends_the_run(
        known, expected, blobs, tiny, monkeypatch):
    """A model that knows the tasks of the training from the start, and fresh ones or not."""
    monkeypatch.setattr(gpicl, "training_steps", lambda *_: ((None, i + 1) for i in range(200)))
    monkeypatch.setattr(gpicl, "draw_sequences", lambda dataset, n, settings, key, tasks: (
        torch.full((1, 1, 1), 9.0 * (known or tasks > 0)), torch.zeros(1, 1).long()))
    monkeypatch.setattr(gpicl, "logits_of", lambda model, x, *_: x * torch.eye(10)[0])
    rows = gpicl.measure_plateau(tiny(NUM_TASKS=8, STEPS=200), (blobs, blobs, {}), "fp32")
    assert [row["tested_on"] for row in rows] == ["training tasks", "unseen tasks"]
    assert [(row["length"], row["left"], row["steps"]) for row in rows] == expected


def test_a_table_of_runs_that_had_different_data_sets():
    rows = [dict(method=method, tested_on=kind, accuracy=0.5, paper=70.0, SEED=0)
            for method, kind in (("GPICL", "MNIST"), ("GPICL", "KMNIST"), ("LSTM", "MNIST"))]
    lines = gpicl.report_table(rows, Figure())
    assert "the paper, LSTM: MNIST 70.0" in lines
    assert [line.split()[-1] for line in lines if line.startswith("LSTM")] == ["-"]


def test_a_file_called_as_another_data_set_is_what_is_measured(blobs, tiny, tmp_path, monkeypatch):
    mnist = blobs.x.numpy(), blobs.y.numpy()
    monkeypatch.setattr(gpicl, "torchvision_arrays", lambda *arguments: mnist)
    path = str(tmp_path / "FashionMNIST.npz")
    np.savez(path, x=mnist[0], y=mnist[1])
    settings = tiny(TRAIN_DATASET=path, EVAL_DATASETS="auto")
    training, _, tests, _ = gpicl.load_all(settings, torch.device("cpu"))
    assert training.name == path and [*tests] == [path, "FashionMNIST"]


def test_what_a_panel_hides_is_told():
    """Runs that stayed on the plateau are listed by their factor; points are never cut off."""
    cells = [{**gpicl.PLATEAU_BASE, **cell} for cells in gpicl.PLATEAU_FACTORS.values()
             for cell in cells.values()]
    rows = [dict(cell, SEED=0, tested_on="unseen tasks", length=None, left=False, steps=60)
            for i, cell in enumerate(cells) if cell not in cells[:i]]
    lines = gpicl.report_plateau(rows, Figure())
    assert "  not left within 60 steps: token paper's, unseen tasks, 1 runs" in lines
    rows = [dict(ARCHITECTURE="mlp", TOKEN_FORMAT="paper", MODEL_SIZE=32, NUM_TASKS=n, last=0.5,
                 tested_on="unseen tasks", improvement=p) for n, p in ((8, -0.2), (16, 0.9))]
    figure = Figure()
    gpicl.report_phases(rows, figure)
    low, high = figure.axes[6].get_ylim()
    assert low < -20 and high > 90
