"""The repository: the main file runs alone, nobody imports the wrong way, files stay short."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPT, TINY, gpicl

OWN = {"gpicl_minimal_replication", "in_context_classifier", "experiments", "tests", "conftest"}
CLASSIFIER = ROOT / "in_context_classifier.py"
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
PYTHON_FILES = [SCRIPT, CLASSIFIER, *EXPERIMENTS, *TESTS]
READMES = [path for path in (ROOT / "README.md", *ROOT.glob("*/README.md")) if path.exists()]


def file_name(path):
    return str(path.relative_to(ROOT))


# -------------------------------------------------------------------- alone, and no side effects
def test_the_main_file_runs_alone_in_an_empty_folder(tmp_path, blobs_file):
    """With constants edited by hand, a MPLBACKEND of a notebook, and its output in a log file."""
    folder = tmp_path / "empty"
    folder.mkdir()
    text = SCRIPT.read_text()
    for name, value in TINY.items():
        line = f"{name} = {value!r}".replace("STEPS = 6", "STEPS = 6e0")
        text, edits = re.subn(f"^{name} = \\S+", line, text, count=1, flags=re.MULTILINE)
        assert edits == 1
    (folder / SCRIPT.name).write_text(text)
    environment = {**os.environ, "MPLBACKEND": "no_such_backend"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, SCRIPT.name, f"--TRAIN_DATASET={blobs_file}",
         f"--EVAL_DATASETS={blobs_file}"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "\r" not in done.stdout and "\x1b" not in done.stdout         # no bar in a log file
    assert len(re.findall(r"^ +\d+ +\d+ +\d\.\d{3} ", done.stdout, re.MULTILINE)) == (
        TINY["STEPS"] // TINY["LOG_EVERY"])
    assert "blobs@11: " in done.stdout
    written, = (folder / "runs").iterdir()
    assert {path.name for path in written.iterdir()} == {
        "model.pt", "results.json", "curves.csv", "accuracy_by_examples.png", "log.txt",
        SCRIPT.name}
    assert (written / SCRIPT.name).read_text() == text


IMPORT = """import os, signal, sys, time
import numpy, torch, tqdm
def surroundings():
    return (torch.random.get_rng_state().tolist(), dict(os.environ), torch.get_num_threads(),
            [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], os.listdir("."))
before, began = surroundings(), time.time()
import gpicl_minimal_replication
assert time.time() - began < 1, time.time() - began
assert surroundings() == before
print(*{"matplotlib", "torchvision", "pandas", "sklearn", "experiments"} & sys.modules.keys())
"""


def test_import_does_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.stdout, done.stderr) == ("\n", "")


# ------------------------------------------------------------------------------------------ imports
def imported(path):
    """Return the top-level names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative"
            names.add(node.module.split(".")[0])
    return names


def test_nobody_imports_the_wrong_way():
    assert not imported(SCRIPT) & OWN
    assert imported(CLASSIFIER) & OWN == {"gpicl_minimal_replication"}
    for path in EXPERIMENTS:
        allowed = {"gpicl_minimal_replication", "experiments"}
        if path.name == "small_data.py":                 # what it measures is the classifier
            allowed |= {"in_context_classifier"}
        assert imported(path) & OWN <= allowed, path


def test_requirements_name_what_is_imported():
    def required(path):
        return {re.match("[a-z-]+", line)[0].replace("scikit-learn", "sklearn")
                for line in path.read_text().splitlines() if line[:1].isalpha()}
    brought_along = {"PIL", "scipy", "joblib"}           # by matplotlib and scikit-learn
    standard = sys.stdlib_module_names | OWN | brought_along
    assert imported(SCRIPT) - standard <= required(ROOT / "requirements.txt")
    everything = set().union(*map(imported, PYTHON_FILES)) - standard
    everything -= {path.stem for path in TESTS}
    assert everything <= required(ROOT / "requirements.txt") | required(
        ROOT / "tests" / "requirements.txt")


# ------------------------------------------------------------------------------------------ lengths
def test_files_keep_to_their_number_of_lines():
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 1100
    data, = (i for i, line in enumerate(lines) if re.fullmatch("# -+ data", line))
    assert data < 600                                    # what comes before is the paper
    for path in [CLASSIFIER, *EXPERIMENTS]:
        assert len(path.read_text().splitlines()) <= 250, path
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


@pytest.mark.parametrize("path", PYTHON_FILES, ids=file_name)
def test_lines_and_functions_are_short(path):
    assert not [line for line in path.read_text().splitlines() if len(line) > 100]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name


def test_nothing_else_lies_at_the_top():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this copy is no git repository")
    assert {name.split("/")[0] for name in done.stdout.splitlines()} <= {
        "gpicl_minimal_replication.py", "in_context_classifier.py", "in_context_classifier.pt",
        "experiments", "results", "tests", "requirements.txt", "README.md", "LICENSE",
        ".gitignore", ".ci"}


# ------------------------------------------------------------------------------------------ READMEs
def commands():
    """Yield (README, program, words) of every command in the READMEs."""
    for readme in READMES:
        for line in re.findall(r"^.*(?:python|torchrun) .*$", readme.read_text(), re.MULTILINE):
            line = line.split(" #")[0].rstrip("`| ")
            found = re.search(r"(gpicl_minimal_replication\.py|-m experiments\.(\w+))(.*)", line)
            if found:
                yield readme, found[2] or "main", re.findall(r"[-\w]\S*", found[3].split("`")[0])


def test_every_flag_in_the_readmes_exists():
    found = [*commands()]
    assert len([program for _, program, _ in found if program == "main"]) >= 3
    for readme, program, words in found:
        settings = {*vars(gpicl.default_settings())}
        if program != "main":
            path = ROOT / "experiments" / f"{program}.py"
            settings |= {*gpicl.setting_lines(path)}
            settings |= {*gpicl.setting_lines(path.with_name("sweep.py"))}
        for word in words:
            if word.startswith("--"):
                name = word[2:].split("=")[0]
                assert name in settings | {"help"}, f"{file_name(readme)}: {program} {word}"
            elif program == "main":
                assert word in {*gpicl.PRESETS, "evaluate"}, f"{file_name(readme)}: {word}"


@pytest.mark.parametrize("readme", READMES, ids=file_name)
def test_every_file_that_a_readme_names_exists(readme):
    text = readme.read_text()
    names = re.findall(r"\]\(([^)#:]+)\)", text)         # links and figures
    for name in names:
        assert (readme.parent / name).exists(), name
    for name in re.findall(r"`((?:results|tests|experiments)/[\w./-]+)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name             # of any experiment


def test_the_readme_has_the_commands_that_ci_runs():
    lines = (ROOT / "README.md").read_text().splitlines()
    for ending in ("&& python gpicl_minimal_replication.py", "&& python -m pytest tests"):
        assert any(line.startswith("pip install") and line.endswith(ending) for line in lines)
