"""Command line: settings, presets, `evaluate`, and one sentence for every mistake."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SCRIPT, TINY, gpicl


# ------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("words, expected", [
    ("--STEPZ=5", "STEPZ"), ("--steps=5", "--steps=5"), ("--__class__=5", "__class__"),
    ("--C=5", "--C=5"), ("quik", "quik"), ("--STEPS", "--STEPS"), ("--STEPS 5", "--STEPS"),
    ("--STEPS=", "STEPS"), ("--STEPS=many", "STEPS"), ("--STEPS=1.5", "STEPS"),
    ("--STEPS=__import__('os')", "STEPS"), ("--STEPS=9**99", "STEPS"), ("--STEPS=0", "STEPS"),
    ("--STEPS=2**2**2", "STEPS"), ("--BATCH_SIZE=-1", "BATCH_SIZE"), ("--SEED=0.5", "SEED"),
    ("--LEARNING_RATE=fast", "LEARNING_RATE"), ("--LEARNING_RATE=nan", "LEARNING_RATE"),
    ("--LEARNING_RATE=inf", "LEARNING_RATE"), ("--LEARNING_RATE=-1", "LEARNING_RATE"),
    ("--IMAGE_QUERIES=maybe", "IMAGE_QUERIES"), ("--BIASED_FRACTION=1.5", "BIASED_FRACTION"),
    ("--TOKEN_FORMAT=triples", "TOKEN_FORMAT"), ("--DEVICE=tpu", "DEVICE"),
    ("--PRECISION=fp16", "PRECISION"), ("--MODEL_SIZE=100 --NUM_HEADS=8", "NUM_HEADS"),
    ("--MODEL_SIZE=9 --NUM_HEADS=3", "MODEL_SIZE"), ("--NUM_EXAMPLES=1", "NUM_EXAMPLES"),
    ("--ADAM_BETA2=1", "ADAM_BETA2"), ("--ATTENTION_SCALE=0", "ATTENTION_SCALE"),
    ("--TRAIN_DATASET=mnist", "mnist"), ("--EVAL_DATASETS=a.csv", "a.csv"),
    ("--EVAL_DATASETS=nowhere.npz", "nowhere.npz"), ("--MODEL=wrong:thing", "wrong:thing"),
    ("--MODEL=wrong", "MODEL"), ("evaluate --STEPS=5", "STEPS"), ("evaluate --SEED=5", "SEED"),
])
def test_wrong_use_is_one_sentence_that_names_it(words, expected, tiny_flags, fails):
    flags = [] if words.startswith("evaluate") else tiny_flags()         # the last flag counts
    assert expected in fails([*flags, *words.split()])


def test_numbers_are_read_as_people_write_them(tmp_path, tiny_flags, run_folder):
    flags = tiny_flags(NUM_TASKS="2**16", STEPS="1e1", LEARNING_RATE="1e-3", GRADIENT_CLIP=2,
                       IMAGE_QUERIES="False", SEED=7)
    assert gpicl.main(flags) == 0
    settings = json.loads((run_folder() / "results.json").read_text())["settings"]
    assert settings["NUM_TASKS"] == 65536 and settings["LEARNING_RATE"] == 1e-3
    assert settings["STEPS"] == 10 and type(settings["STEPS"]) is int
    assert settings["IMAGE_QUERIES"] is False and settings["SEED"] == 7
    assert type(settings["GRADIENT_CLIP"]) is float


def test_constants_may_be_edited_in_the_same_ways(tiny_flags, run_folder, fails, monkeypatch):
    flags = [flag for flag in tiny_flags() if not flag.startswith(("--STEPS", "--LOG_EVERY"))]
    for name, value in dict(STEPS=1e1, LOG_EVERY=2**2, LEARNING_RATE=1, NUM_TASKS=2.0**3).items():
        monkeypatch.setattr(gpicl, name, value)
    assert gpicl.main(flags) == 0
    results = json.loads((run_folder() / "results.json").read_text())
    settings = results["settings"]
    assert repr([settings[name] for name in ("STEPS", "LEARNING_RATE", "NUM_TASKS")]) == (
        "[10, 1.0, 8]")
    assert [row["step"] for row in results["progress"]] == [4, 8, 10]
    for value in (0.5, -1, None, float("nan"), [3]):
        monkeypatch.setattr(gpicl, "LOG_EVERY", value)
        assert "LOG_EVERY" in fails(flags)


@pytest.mark.parametrize("line", ["STEPS = 7", "STEPS=7  # mine", "STEPS  =  7   #"])
def test_a_constant_stays_a_setting_however_its_line_is_edited(line, tmp_path):
    path = tmp_path / "edited.py"
    path.write_text(re.sub("^STEPS = .*$", line, SCRIPT.read_text(), count=1, flags=re.MULTILINE))
    spec = importlib.util.spec_from_file_location("edited", path)
    edited = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(edited)
    assert vars(edited.default_settings()) == {**vars(gpicl.default_settings()), "STEPS": 7}


def test_presets_exist_name_settings_only_and_are_valid():
    assert {"default", "quick", "plain", "paper", "guided"} <= {*gpicl.PRESETS}
    for preset in gpicl.PRESETS.values():
        settings = gpicl.default_settings()
        assert preset.keys() <= vars(settings).keys()
        settings = gpicl.default_settings(**preset)
        gpicl.check_settings(settings)
        for name, value in preset.items():
            assert getattr(settings, name) == value


@pytest.mark.parametrize("preset", gpicl.PRESETS)
def test_every_preset_trains_and_flags_override_it(preset, tiny_flags, run_folder):
    assert gpicl.main([preset, *tiny_flags(STEPS=2, EVAL_SEQUENCES=8)]) == 0
    results = json.loads((run_folder() / "results.json").read_text())
    expected = {**gpicl.PRESETS[preset], **TINY, "STEPS": 2, "EVAL_SEQUENCES": 8}
    assert {name: results["settings"][name] for name in expected} == expected
    assert results["preset"] == preset


def test_help_shows_every_setting_with_its_value(capsys):
    assert gpicl.main(["--help"]) == 0
    text = capsys.readouterr().out
    settings = vars(gpicl.default_settings())
    assert {"SEED", "DEVICE", "DATA_DIR", "OUT_DIR", "TRAIN_DATASET", "EVAL_DATASETS",
            "IMAGE_SIZE", "NUM_TASKS", "NUM_EXAMPLES", "BIASED_FRACTION", "TOKEN_FORMAT",
            "BATCH_SIZE", "STEPS", "EVAL_SEQUENCES"} <= settings.keys()
    for name in settings:
        assert re.search(rf"^{name} += \S.* # \w", text, re.MULTILINE), name


def test_every_constant_before_the_presets_is_a_setting():
    top = SCRIPT.read_text().split("\nPRESETS = {")[0]
    assert re.findall(r"^([A-Z_0-9]+) *=", top, re.MULTILINE) == [*vars(gpicl.default_settings())]


def test_a_device_that_is_not_there(fails, tiny_flags, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "DEVICE=cuda" in fails(tiny_flags(DEVICE="cuda"))


def test_too_little_memory_is_one_sentence(tiny_flags, fails):
    assert "memory" in fails(tiny_flags(MODEL_SIZE=2**22))               # 200 TB
    assert "memory" in fails(tiny_flags(BATCH_SIZE=2**50))


def test_mistakes_of_the_program_are_not_hidden(tiny_flags, monkeypatch):
    def run(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(gpicl, "run", run)
    with pytest.raises(RuntimeError, match="mat1"):
        gpicl.main(tiny_flags())


# --------------------------------------------------------------------------------------- evaluate
@pytest.fixture
def trained(tiny_flags, run_folder, capsys):
    """Return the folder of a finished run on the blobs."""
    assert gpicl.main(tiny_flags()) == 0
    capsys.readouterr()
    return run_folder()


def evaluate(folder, *flags):
    """Run `evaluate`, below the folder of a run; return the results that it wrote."""
    assert gpicl.main(["evaluate", "--DEVICE=cpu", f"--OUT_DIR={folder.parent}", *flags]) == 0
    newest = max(folder.parent.glob("evaluation*/results.json"), key=os.path.getmtime)
    assert {path.name for path in newest.parent.iterdir()} == {
        "results.json", "curves.csv", "accuracy_by_examples.png", "log.txt"}
    return json.loads(newest.read_text())


def test_evaluate_repeats_the_test_of_the_run(trained, capsys, monkeypatch):
    monkeypatch.setattr(gpicl, "train_step", lambda *_: pytest.fail("it trains"))
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    results = evaluate(trained, f"--EVAL_DATASETS={trained.parent.parent}/blobs.npz")
    of_run = json.loads((trained / "results.json").read_text())
    assert results["data_sets"] == of_run["data_sets"]
    assert "blobs@11: " in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in trained.iterdir()}


def test_evaluate_tests_on_any_data_and_in_other_ways(trained, tmp_path, blobs, capsys):
    np.savez(tmp_path / "other.npz", x=blobs.x.view(600, 5, 8), y=np.array(
        ["cat", "dog", "owl"])[blobs.y % 3])
    flags = [f"--EVAL_DATASETS={tmp_path}/other.npz,RenderedLetters", "--NUM_EXAMPLES=20",
             "--EVAL_SEQUENCES=32", "--IMAGE_SIZE=8"]
    data_sets = evaluate(trained, *flags)["data_sets"]
    assert [*data_sets] == ["other", "RenderedLetters"] and data_sets["other"]["classes"] == 3
    curve = data_sets["other"]["curves"]["in-context"]
    assert len(curve["accuracy"]) == 20 and curve["sequences"] == 32
    output = capsys.readouterr().out
    assert "other@19: " in output and "RenderedLetters@19: " in output
    assert evaluate(trained, *flags, "--EVAL_SEED=1")["data_sets"] != data_sets


def test_evaluate_takes_the_newest_model_or_the_one_that_is_named(
        trained, tiny_flags, tmp_path, fails):
    other = f"--EVAL_DATASETS={tmp_path}/blobs.npz"
    assert gpicl.main(tiny_flags(SEED=1)) == 0
    second, = {*trained.parent.glob("blobs*")} - {trained}
    os.utime(trained / "model.pt", (1, 1))
    assert evaluate(trained, other)["checkpoint"] == str(second / "model.pt")
    named = evaluate(trained, other, f"--CHECKPOINT={trained}/model.pt")
    assert named["checkpoint"] == str(trained / "model.pt")
    assert "OUT_DIR" in fails(["evaluate", f"--OUT_DIR={tmp_path}/nothing"])
    assert "none.pt" in fails(["evaluate", "--CHECKPOINT=none.pt"])
    assert "a.csv" in fails(["evaluate", f"--OUT_DIR={trained.parent}", "--EVAL_DATASETS=a.csv"])


def test_evaluate_finds_the_training_data_from_anywhere(tiny_flags, tmp_path, monkeypatch):
    """A file by a relative path is still the one trained on, so that its test rows are taken."""
    monkeypatch.chdir(tmp_path)
    assert gpicl.main(tiny_flags(TRAIN_DATASET="blobs.npz", EVAL_DATASETS="blobs.npz")) == 0
    folder, = (tmp_path / "runs").iterdir()
    of_run = json.loads((folder / "results.json").read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    results = evaluate(folder, "--EVAL_DATASETS=../blobs.npz")
    assert results["data_sets"] == of_run["data_sets"]


# ---------------------------------------------------------------------------- output that goes away
def test_it_runs_where_standard_output_is_no_terminal_or_file(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())    # as in a notebook's %run
    assert gpicl.main(["--help"]) == 0 and "STEPS" in sys.stdout.getvalue()


def shell(line, *words):
    """Run a line of bash, in which "$@" are the program and its words."""
    return subprocess.run(["bash", "-c", line, "bash", sys.executable, SCRIPT, *words],
                          capture_output=True, text=True, timeout=120)


def test_a_reader_who_leaves_gets_no_traceback_and_a_checkpoint(tiny_flags, run_folder):
    """As `| head -12`: standard output is closed between two rows of the progress table."""
    done = shell('"$@" | head -12; exit ${PIPESTATUS[0]}',
                 *tiny_flags(STEPS=10**6, LOG_EVERY=20))
    assert done.returncode == 141 and done.stderr == ""
    last = done.stdout.splitlines()[-1]
    saved = gpicl.load_checkpoint(run_folder() / "checkpoint.pt")
    assert saved["progress"]["step"] > int(last.split()[0])


def test_without_standard_error_it_still_trains(tiny_flags, run_folder):
    done = shell('"$@" 2>&-', *tiny_flags())
    assert done.returncode == 0 and "blobs@11: " in done.stdout
    assert (run_folder() / "results.json").exists()
