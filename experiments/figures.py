"""What the experiments' reports share: means and intervals over the seeds, tables, curves, maps."""

import math

import numpy as np


def t_quantile(freedom):
    """Return the 97.5 % quantile of Student's t distribution."""
    first = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return first[freedom - 1] if freedom <= 10 else 1.96 + 2.37 / freedom + 2.8 / freedom**2


def mean_interval(rows, column):
    """Return the mean of a column over the seeds, and half of its 95 % t interval (nan for one).

    Every seed has training and test sequences of its own: it is the interval of both.
    """
    values = np.array([row[column] for row in rows], float)
    if len(values) < 2:
        return values.mean() if len(values) else math.nan, math.nan
    return values.mean(), t_quantile(len(values) - 1) * values.std(ddof=1) / len(values)**0.5


def rank_correlation(x, y):
    """Return Spearman's rank correlation of x and y (n,), and its bootstrapped 95 % interval."""
    def correlation(*columns):
        ranks = [(np.less.outer(v, v).sum(0) + np.less_equal.outer(v, v).sum(0)) / 2
                 for v in columns]                       # equal values share their mean rank
        with np.errstate(all="ignore"):                  # nan where all values are equal
            return np.corrcoef(*ranks)[0, 1]

    x, y = np.array(x), np.array(y)
    samples = np.random.default_rng(0).integers(len(x), size=(2000, len(x)))
    low, high = np.nanquantile([correlation(x[some], y[some]) for some in samples], [.025, .975])
    return correlation(x, y), low, high


def select(rows, **wanted):
    """Return the rows that hold these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def distinct(rows, column):
    """Return the different values of a column: numbers in order, texts in that of their rows."""
    values = list(dict.fromkeys(row[column] for row in rows))
    return values if any(isinstance(value, str) for value in values) else sorted(values)


def table_lines(rows, x, y, by, title, unit=100, digits=1):
    """Return lines of text: the means of column y times `unit`, with 95 % intervals over the seeds.

    There is a column for each value of column x, and a line for each value of column `by`.
    """
    marks = distinct(rows, x)
    table = [["", *map(str, marks)]]
    for kind in distinct(rows, by):
        table.append([str(kind)])
        for mark in marks:
            mean, half = mean_interval(select(rows, **{by: kind, x: mark}), y)
            table[-1].append("-" if math.isnan(mean) else f"{unit * mean:.{digits}f}" + (
                "" if math.isnan(half) else f" ±{unit * half:{digits + 2}.{digits}f}"))
    label = max(len(kind) for kind, *_ in table)
    width = 1 + max(len(word) for _, *words in table for word in words)
    return ["", title, *(kind.ljust(label) + "".join(word.rjust(width) for word in words)
                         for kind, *words in table)]


def draw_curves(panel, rows, x, y, by, x_label, y_label, unit=100):
    """Draw the means of column y, times `unit`, against column x, with 95 % intervals over the
    seeds, a curve for each value of column `by`.

    The figure gets one legend: give all of its panels the same kinds of curves in the same order.
    """
    marks = distinct(rows, x)
    of_texts = isinstance(marks[0], str)
    for color, kind in enumerate(distinct(rows, by)):
        mean, half = unit * np.array(
            [mean_interval(select(rows, **{by: kind, x: mark}), y) for mark in marks]).T
        there = ~np.isnan(mean)
        places = np.arange(len(marks)) + 0.08 * color if of_texts else np.array(marks)
        panel.errorbar(places[there], mean[there], half[there], color=f"C{color}", marker="o",
                       ms=4, capsize=3, label=kind)
    panel.set(xlabel=x_label, ylabel=y_label)
    panel.set_xscale("linear" if of_texts or min(marks) <= 0 else "log")
    panel.grid(alpha=0.3)
    if of_texts or len(marks) < 10:                      # more numbers would overlap
        panel.set_xticks(range(len(marks)) if of_texts else marks, marks)
        panel.minorticks_off()


def heat_map(panel, rows, x, y, value, x_label, y_label, unit=100, digits=0):
    """Draw the means of a column by two others as a field of colours and numbers."""
    columns, lines = distinct(rows, x), distinct(rows, y)
    means = np.array([[unit * mean_interval(select(rows, **{x: column, y: line}), value)[0]
                       for column in columns] for line in lines])
    panel.imshow(means, aspect="auto", cmap="Greens", vmin=0, vmax=unit)
    for (i, j), mean in np.ndenumerate(means):
        if not math.isnan(mean):
            panel.text(j, i, f"{mean:.{digits}f}", ha="center", va="center",
                       color="w" if mean > 0.6 * unit else "k")
    panel.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    panel.set_yticks(range(len(lines)), lines)
    panel.set(xlabel=x_label, ylabel=y_label)


def add_legend(figure):
    """Give a figure one legend below its panels, where it lies over no curve."""
    handles = {label: handle for panel in figure.axes
               for handle, label in zip(*panel.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
