"""The experiment on state sizes: what is counted, and how it is reported."""

import pytest
from conftest import gpicl
from matplotlib.figure import Figure
from test_sweep import read_csv, sweep_flags

from experiments import architectures, sweep


def test_architectures_in_their_smallest_form(blobs_file, tmp_path, capsys):
    flags = sweep_flags(blobs_file, tmp_path, MODEL_SIZE=None, NUM_HEADS=None, SEEDS=1)
    assert sweep.main("architectures", flags) == 0
    rows = read_csv(tmp_path / "results" / "architectures.csv")
    assert len(rows) == len(architectures.CELLS) == 16
    assert len({row["MODEL"] for row in rows}) == 7
    assert "16 models: rank correlation with parameters" in capsys.readouterr().out


@pytest.mark.parametrize("model, expected", [
    ("transformer", 2 * 2 * 12 * 32), ("experiments.architectures:LSTMModel", 2 * 2 * 32),
    ("experiments.architectures:DeltaNetModel", 2 * 2 * 16 * 16),
    ("experiments.architectures:OuterProductLSTMModel", 2 * (2 * 16 * 16 + 32)),
    ("experiments.architectures:VSML", 2 * 8 * 32 * 10),
    ("experiments.architectures:SmallVSML", 2 * 4 * 32 * 10),
    ("experiments.architectures:VSMLAsymmetric", 2 * 8 * 32 * 32)])
def test_state_is_counted(model, expected, tiny):
    settings = tiny(MODEL=model)
    assert architectures.state_size(gpicl.make_model(settings), settings) == expected


def test_a_mark_for_each_model_whatever_its_seeds():
    rows = [dict(MODEL=model, SEED=seed, tested_on="MNIST", state=state, parameters=9 * state,
                 accuracy=state / 10)
            for model in ("transformer", architectures.OWN + "LSTMModel")
            for state in (1, 3) for seed in (0, 1)]
    figure = Figure()
    lines = architectures.report(rows, figure)
    assert ["10.0 ± 0.0" in line for line in lines] == [True, False, True, False, False, False]
    for panel in figure.axes:
        assert [bars[0].get_ydata().tolist() for bars in panel.containers] == [[10, 30], [10, 30]]
