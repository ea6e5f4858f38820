from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fedbd.records.record import round_record
from fedbd.report import curves
from fedbd.report.run_view import RunView
from fedbd.summary import summarize


def run(arm: str, seed: int, window: tuple[int, int] | None = (1, 2)) -> RunView:
    after = {"clean_accuracy": 0.7, "attack_success": 0.05}
    lines = [
        round_record(
            round=n,
            clean_accuracy=0.2 * n,
            attack_success=None if n == 2 else 0.1 * n,
            attack_success_floor=0.01 if window else None,
            collapsed=n == 0,
            cleanup={"rnp": {"mode": "in_loop" if n == 1 else "if_stopped_now", "after": after}} if n in (1, 3) else {},
        )
        for n in range(5)
    ]
    return RunView(arm=arm, seed=seed, scenario={}, rounds=lines, summary=summarize(lines, window, 4))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw runs and return the figure: what is tested is what the picture says, not its pixels."""

    def draw(runs: list[RunView]) -> Figure:
        kept = []
        save = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))
        curves.draw_curves(tmp_path / "curves.png", runs)
        assert Image.open(tmp_path / "curves.png").size[0] > 600
        return kept[0]

    return draw


def test_lines_are_percent_over_rounds_and_break_where_nothing_was_measured(drawn):
    above, below = drawn([run("a", 0)]).axes
    assert np.allclose(above.lines[0].get_ydata(), [0, 20, 40, 60, 80])
    success = below.lines[0].get_ydata()
    assert math.isnan(success[2])
    assert math.isnan(success[0])  # it collapsed: a cross stands there, and no line leads to it
    assert success[4] == pytest.approx(40)
    assert below.lines[1].get_linestyle() == ":"
    assert np.allclose(below.lines[1].get_ydata(), 1.0)


def test_cleaned_models_are_filled_in_the_loop_and_open_if_stopped_now(drawn):
    below = drawn([run("a", 0)]).axes[1]
    marks = {line.get_markerfacecolor(): line.get_xdata() for line in below.lines if line.get_marker() == "v"}
    assert marks == {curves.COLORS[0]: [1], "white": [3]}
    crosses = [line for line in below.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[0]]


def test_no_triangle_stands_for_the_attack_success_of_a_model_that_a_cleanup_destroyed(drawn):
    view = run("a", 0)
    for line in view.rounds:
        for entry in line["cleanup"].values():
            entry["after"] = {**entry["after"], "collapsed": line["round"] == 3}
    above, below = drawn([view]).axes
    marks = [
        [x for line in axes.lines if line.get_marker() == "v" for x in line.get_xdata()] for axes in (above, below)
    ]
    assert marks == [[1, 3], [1]]


def test_seeds_share_a_color_and_windows_are_shaded_once(drawn):
    figure = drawn([run("a", 0), run("a", 1), run("b", 0)])
    above, _ = figure.axes
    plain = [line.get_color() for line in above.lines if line.get_marker() == "."]
    assert plain == [curves.COLORS[0], curves.COLORS[0], curves.COLORS[1]]
    assert len(above.patches) == 1
    assert (above.patches[0].get_x(), above.patches[0].get_width()) == (0.5, 2.0)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["a, 2 seeds", "b, 1 seed"]
    assert "attacked rounds" in labels


def test_nothing_is_promised_that_is_not_drawn(drawn):
    figure = drawn([run("a", 0, window=None)])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "attacked rounds" not in labels
    assert "floor (attack-free twin)" not in labels
    assert len(figure.axes[0].patches) == 0


def test_the_line_goes_on_over_rounds_in_which_nothing_was_measured(drawn):
    every_second = [
        line if line["round"] % 2 == 0 else round_record(round=line["round"]) for line in run("a", 0).rounds
    ]
    sparse = RunView(arm="a", seed=0, scenario={}, rounds=every_second, summary=summarize(every_second, (1, 2), 4))
    above, below = drawn([sparse]).axes
    assert above.lines[0].get_xdata().tolist() == [0, 2, 4]
    assert np.allclose(above.lines[0].get_ydata(), [0, 40, 80])
    assert math.isnan(below.lines[0].get_ydata()[1])  # round 2 was measured, and has no attack success
