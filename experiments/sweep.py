"""Many short runs, then a table, a .csv file and a figure: what the experiments share.

An experiment is a module experiments/NAME.py, run as `python -m experiments.NAME`, that has

    TITLE       of the figure
    SETTINGS    dict: settings of all runs, where they are not the main file's
    CELLS       list of dicts: what runs differ in; each is run with SEED, SEED + 1 ...
    measure(settings, data, precision)    returns the rows of one run: dicts of texts and numbers
    report(rows, figure)                  draws, and returns the lines of the printed table
    COMPARED    optional: names of settings that no flag may fix, since `report` compares them
    check(settings, data)    optional: raises UserError for what can't work, before the first run

and ends in `if __name__ == "__main__": sys.exit(sweep.main(NAME, sys.argv[1:]))`. `data` is
(training, validation, {name: test Dataset}). A row of the .csv is the run's cell, its SEED and one
of its rows: settings have CAPITALS as names, what was measured has small letters.
Flags are the constants below, the experiment's own (of one line with a comment, before functions
and classes), and the main file's settings. A flag fixes a setting for all runs.
"""

import contextlib
import csv
import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
import zlib
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import gpicl_minimal_replication as gpicl
from experiments.figures import add_legend

SEEDS = 3                    # runs of each kind, with SEED, SEED + 1 ...
WORKERS = 0                  # runs at once, each of one thread; 0: one per CPU core, one on a GPU
RESULTS_DIR = "results"      # the tables and figures of the experiments

DATA_SETTINGS = ("DATA_DIR", "TRAIN_DATASET", "EVAL_DATASETS", "IMAGE_SIZE", "VALIDATION_IMAGES",
                 "NUM_EXAMPLES")
UNREAD = {"EVAL_SEED", "CHECKPOINT", "LOG_EVERY", "VALIDATION_SEQUENCES", "CHECKPOINT_SECONDS"}


# --------------------------------------------------------------------------------------- one run
def training_run(settings, dataset, precision):
    """Meta-train a new model, without files or messages; yield (model, step) after each step."""
    torch.manual_seed(settings.SEED)
    model = gpicl.make_model(settings).to(dataset.x.device)
    optimizers = gpicl.make_optimizers(model, settings, precision)
    for step, _ in gpicl.training_steps(model, optimizers, dataset, settings, precision):
        yield model, step


def trained_model(settings, dataset, precision):
    """Return a new model, meta-trained."""
    return [model for model, _ in training_run(settings, dataset, precision)][-1]


def first_and_last(model, dataset, settings, precision, num_tasks=0):
    """Return the accuracy on the first example and that on the last tenth of the examples."""
    correct = gpicl.count_correct(model, dataset, settings.EVAL_SEQUENCES, settings, precision,
                                  num_tasks)["in-context"]
    curve = correct / settings.EVAL_SEQUENCES
    return curve[0], curve[-max(1, len(curve) // 10):].mean()


@functools.lru_cache(maxsize=1)
def read_data(device, values):
    """Return (training, validation, {name: test Dataset}); read once per process."""
    settings = gpicl.default_settings(**dict(zip(DATA_SETTINGS, values)), NUM_TASKS=0)
    training, validation, source = gpicl.load_training(settings, device)
    tests = gpicl.load_tests(source, settings, device)
    return training, validation, {name: dataset for name, (dataset, _) in tests.items()}


def one_run(job):
    """Make one run of an experiment, in any process; return what is to be kept of it."""
    name, values, run = job
    torch.set_num_threads(1)                             # their number decides how sums are rounded
    gpicl.keep_freed_memory()
    began, settings = time.time(), SimpleNamespace(**values)
    device, precision = gpicl.choose_device(settings.DEVICE, settings.PRECISION)
    data = read_data(device, tuple(values[key] for key in DATA_SETTINGS))
    try:
        rows = importlib.import_module(f"experiments.{name}").measure(settings, data, precision)
    except gpicl.UserError as error:
        raise gpicl.UserError(f"{error} (in the run {run})") from error
    return dict(run=run, rows=rows, seconds=time.time() - began)


# -------------------------------------------------------------------------------------- all runs
def end_with_parent():
    """Let this worker end when the process that started it ends, even if that is killed."""
    parent = torch.multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def run_all(jobs, workers):
    """Yield the records of these runs as they come, of so many processes at once."""
    if workers < 2:
        yield map(one_run, jobs)
        return
    pool = futures.ProcessPoolExecutor(
        workers, torch.multiprocessing.get_context("spawn"), end_with_parent)
    try:
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)    # workers inherit it: Ctrl-C is
        tasks = [pool.submit(one_run, job) for job in jobs]      # left to this process
        signal.signal(signal.SIGINT, former)
        yield (task.result() for task in futures.as_completed(tasks))
    except futures.process.BrokenProcessPool as error:
        raise gpicl.UserError("a run was killed, perhaps for want of memory; run the same command "
                              f"with fewer than --WORKERS={workers}.") from error
    finally:
        for process in torch.multiprocessing.active_children():
            process.terminate()                          # those that are still at work
        pool.shutdown(cancel_futures=True)


def record_line(record):
    """Return a record as a line of the file of runs: a checksum, and the record as JSON."""
    text = json.dumps(record).encode()
    return b"%08x %b" % (zlib.crc32(text), text)


def read_runs(path):
    """Return {run as JSON: record} of a file's lines; a damaged line is a run not yet made."""
    done = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            if record_line(record := json.loads(line[9:])) == line:
                done[json.dumps(record["run"])] = record
    return done


def make_runs(name, settings, runs, folder, log):
    """Make those runs that are not yet in the folder's file; return the records of all of them."""
    path = folder / "runs.txt"
    done = read_runs(path)
    todo = [run for run in runs if json.dumps(run) not in done]
    jobs = [(name, {**vars(settings), **run, "EVAL_SEED": run["SEED"]}, run) for run in todo]
    on_cpu = gpicl.choose_device(settings.DEVICE)[0].type == "cpu"
    workers = settings.WORKERS or (torch.get_num_threads() if on_cpu else 1)
    log(f"{len(runs)} runs, {len(runs) - len(todo)} of them made before, {workers} at once")
    # Unbuffered, so that a line is written at once, beside those of a second copy of the command.
    with run_all(jobs, workers) as records, open(path, "ab", buffering=0) as file:
        for record in tqdm(records, total=len(jobs), unit="run", leave=False,
                           disable=None if jobs else True):
            done[json.dumps(record["run"])] = record
            file.write(b"\n" + record_line(record))      # first: a line cut short stays alone
    return [done[json.dumps(run)] for run in runs]


# --------------------------------------------------------------------------- the whole experiment
def read_settings(experiment, arguments):
    """Return (settings, names of those that flags set) of a command line."""
    own = {key: value for module in (sys.modules[__name__], experiment)
           for key, value in vars(module).items()
           if " # " in gpicl.setting_lines(module.__file__).get(key, "")}
    defaults = {**vars(gpicl.default_settings(**experiment.SETTINGS)), **own}
    known = {key: value for key, value in defaults.items() if key not in UNREAD}
    flags = gpicl.read_flags(arguments, known)[1]
    settings = SimpleNamespace(**{**defaults, **flags})
    gpicl.check_settings(settings)
    return settings, {*flags}


def help_text(experiment):
    """Return what an experiment does, and its settings: its own and those of all experiments."""
    lines = [line for module in (experiment, sys.modules[__name__])
             for line in gpicl.setting_lines(module.__file__).values() if " # " in line]
    return "\n".join([experiment.__doc__, "Flags are --NAME=value of these and of the main file's "
                      "settings (python gpicl_minimal_replication.py --help):", "", *lines])


def make_cells(experiment, settings, flags):
    """Return the experiment's CELLS, different and checked, where flags fix what would differ."""
    cells = []
    if compared := flags & {*getattr(experiment, "COMPARED", ())}:
        raise gpicl.UserError(f"{', '.join(sorted(compared))}: runs are compared by it; leave that "
                              "flag out.")
    for cell in experiment.CELLS:
        cell = {key: getattr(settings, key) if key in flags else value
                for key, value in cell.items()}
        gpicl.check_settings(SimpleNamespace(**{**vars(settings), **cell}))
        cells += [cell] if cell not in cells else []
    return cells


def run_experiment(name, arguments):
    """Make the runs of an experiment that are not yet made; write and print what they show."""
    experiment = importlib.import_module(f"experiments.{name}")
    if {"-h", "--help"} & {*arguments}:
        return print(help_text(experiment))
    settings, flags = read_settings(experiment, arguments)
    cells = make_cells(experiment, settings, flags)
    device, precision = gpicl.choose_device(settings.DEVICE, settings.PRECISION)
    data = training, _, tests = read_data(
        device, tuple(getattr(settings, key) for key in DATA_SETTINGS))
    if hasattr(experiment, "check"):
        experiment.check(settings, data)
    varied = set(cells[0]).intersection(*cells)          # what some only set, others have in common
    common = {key: value for key, value in vars(settings).items() if key not in {
        *varied, *UNREAD, "SEED", "SEEDS", "WORKERS", "DATA_DIR", "OUT_DIR", "RESULTS_DIR"}}
    files = [zlib.crc32(Path(value).read_bytes()) for value in common.values()
             if isinstance(value, str) and Path(value).is_file()]
    key = dict(common, OUT_DIR=settings.OUT_DIR, context=(name, device, precision, files, [*tests]))
    folder, log = gpicl.run_folder(SimpleNamespace(**key), f"{name}-{training.name}", training.name)
    log(f"Experiment  {name}: {experiment.TITLE}\n"
        f"Device      {device.type}, {precision}\nData        {training.name}; tested on "
        f"{', '.join(tests)}\nRun folder  {folder}")
    runs = [dict(cell, SEED=settings.SEED + i) for i in range(settings.SEEDS) for cell in cells]
    records = make_runs(name, settings, runs, folder, log)
    facts = dict(experiment=name, **gpicl.provenance(device, precision), settings=common,
                 runs=len(runs), run_seconds=sum(record["seconds"] for record in records))
    rows = [{**record["run"], **row} for record in records for row in record["rows"]]
    write_results(experiment, f"{experiment.TITLE} (meta-trained on {training.name})", rows, facts,
                  Path(settings.RESULTS_DIR, name), log)


def write_results(experiment, title, rows, facts, path, log):
    """Write the rows to a .csv file, the facts with the table to .json, the figure to .png."""
    from matplotlib.figure import Figure                 # no pyplot: needs no display, no state
    figure = Figure(layout="constrained")
    lines = experiment.report(rows, figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with gpicl.atomic_write(path.with_suffix(".csv")) as temporary, open(temporary, "w") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [columns, *([row.get(key) for key in columns] for row in rows)])
    with gpicl.atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(dict(**facts, table=lines), indent=1))
    log(*lines, "", f"Written: {path}.csv, .json, .png")
    figure.suptitle(title)
    add_legend(figure)
    with gpicl.atomic_write(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=110)


def main(name, arguments):
    """Run experiments/NAME.py by a command line; return the exit code (see gpicl.main)."""
    return gpicl.main(arguments, functools.partial(run_experiment, name))
