"""Memorise instances, identify tasks, learn to learn: by number of training tasks.

    python -m experiments.phases

Meta-trains on so many fixed tasks, and tests on these, on fresh ones, and on another data set
(paper, figures on the number of tasks; heat maps by model size, Transformer beside MLP).
"""

import sys

from experiments import sweep
from experiments.figures import distinct, draw_curves, heat_map, mean_interval, select, table_lines

TITLE = "Memorising, identifying tasks, learning to learn: by number of training tasks"
SETTINGS = dict(
    IMAGE_SIZE=8, NUM_EXAMPLES=30, PROJECTION_SIZE=512, IMAGE_QUERIES=False, MERGED_FRACTION=0.0,
    NUM_LAYERS=2, MLP_SIZE=512, ATTENTION_SCALE=16.0, OUTPUT_STD=1.0,
    BATCH_SIZE=128, STEPS=800, LEARNING_RATE=2e-3, DECAY_FRACTION=0.3, EVAL_SEQUENCES=1024)
# 512 numbers of images of 64: tasks are easy to tell apart, and to memorise.
KINDS = {
    "Transformer, paper's tokens": dict(MODEL="experiments.look_back:MuonLookBackTransformer",
                                        TOKEN_FORMAT="paper"),
    "Transformer, sample-label pairs": dict(MODEL="experiments.muon:MuonTransformer",
                                            TOKEN_FORMAT="pairs"),
    "MLP, which sees no context": dict(MODEL="experiments.architectures:MLPModel",
                                       TOKEN_FORMAT="paper"),
}
CELLS = [dict(kind, MODEL_SIZE=size, NUM_TASKS=2**k) for kind in KINDS.values()
         for size in (32, 128) for k in (0, 5, 9, 10, 11, 13, 18)]
COMPARED = ("MODEL", "TOKEN_FORMAT")


def measure(settings, data, precision):
    """Return accuracy on the first example and on the last tenth of them, on the training tasks
    (of many not all were seen), on fresh tasks, and on other data sets; all on test images.
    """
    training, _, tests = data
    model, rows = sweep.trained_model(settings, training, precision), []
    kinds = [(name, "unseen tasks" if name == training.name else name, 0) for name in tests]
    if settings.NUM_TASKS and training.name in tests:
        kinds.insert(0, (training.name, "training tasks", settings.NUM_TASKS))
    for name, tested_on, num_tasks in kinds:
        first, last = sweep.first_and_last(model, tests[name], settings, precision, num_tasks)
        rows.append(dict(tested_on=tested_on, first=first, last=last, improvement=last - first))
    return rows


def report(rows, figure):
    """One row of panels for each kind of model: improvement of the widest, accuracy of all."""
    figure.set_size_inches(16, 4 * len(KINDS))
    lines, tasks = [], "number of training tasks"
    for panels, (label, kind) in zip(figure.subplots(len(KINDS), 3), KINDS.items()):
        of_kind = select(rows, **kind)
        for size in distinct(of_kind, "MODEL_SIZE"):
            of_size = select(of_kind, MODEL_SIZE=size)
            lines += table_lines(of_size, "NUM_TASKS", "improvement", "tested_on", f"{label}, "
                                 f"model size {size}: improvement (points) by {tasks}")
            lines += clear_improvements(of_size)
        draw_curves(panels[0], of_size, "NUM_TASKS", "improvement", "tested_on", tasks,
                    "improvement (points)")
        panels[0].set_title(f"{label}, model size {size}")
        if panels[0].get_xscale() == "log":              # not so where all tasks are fresh
            panels[0].set_xscale("log", base=2)
            panels[0].set_xticks(distinct(of_size, "NUM_TASKS"))
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(min(-10, low), max(60, high))
        for panel, tested_on in zip(panels[1:], ("training tasks", "unseen tasks")):
            panel.set_title(f"accuracy (%) on the last examples, {tested_on}")
            if shown := select(of_kind, tested_on=tested_on):
                heat_map(panel, shown, "NUM_TASKS", "MODEL_SIZE", "last", tasks, "model size")
    return lines


def clear_improvements(rows, least=0.1):
    """Return lines that say with how many tasks the whole 95 % interval lies above ten points."""
    lines = []
    for tested_on in distinct(rows, "tested_on"):
        intervals = {n: mean_interval(select(rows, NUM_TASKS=n, tested_on=tested_on), "improvement")
                     for n in distinct(rows, "NUM_TASKS")}
        clear = [f"{n:,}" for n, (mean, half) in intervals.items() if mean - half > least]
        lines.append(f"  {tested_on}: 95 % interval above 10 points " + (
            f"with {', '.join(clear)} tasks" if clear else "nowhere"))
    return lines


if __name__ == "__main__":
    sys.exit(sweep.main("phases", sys.argv[1:]))
