from matplotlib.backends.backend_agg import FigureCanvasAgg

from msn_eval.monitor.trajectory import RunInfo, Trajectory
from msn_eval.reports.html.trajectory import draw_panels, draw_plot


def _collapsed_run() -> Trajectory:
    """Return a run of 200 steps whose loss and entropies end at log k, and whose spread ends at zero."""
    lines = [
        {
            "step": float(step),
            "epoch": step // 20.0,
            "loss": 3.466 + 1 / step,
            "cross_entropy": 3.466,
            "me_max": 1 / step,
            "entropy": 3.466,
            "target_entropy": 3.466,
            "prototypes_in_use": 32.0,
            "feature_spread": 1 / step,
            "output_spread": 1.0,
        }
        for step in range(1, 201)
    ]
    run = RunInfo(name="run", method="msn", data="", subset="1img", epochs=10, warmup_epochs=0, prototypes=32)
    return Trajectory(run=run, steps_per_epoch=20, lines=tuple(lines), points=(), alarms=(), notices=())


def test_no_line_crosses_a_text_of_the_plot() -> None:
    trajectory = _collapsed_run()
    panels = draw_panels(trajectory)

    figure = draw_plot(trajectory, panels)

    FigureCanvasAgg(figure).draw()
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["log k = 3.47", "log k = 3.47", "all 32", "collapse"]
    for axes in figure.axes:
        inside = axes.get_window_extent()
        for text in (*axes.texts, *axes.get_legend().get_texts()):
            assert not inside.overlaps(text.get_window_extent()), text.get_text()


def test_levels_of_the_page_are_beside_the_curves() -> None:
    for drawn in draw_panels(_collapsed_run()):
        end = max(float(pair.split(",")[0]) for curve in drawn.curves for line in curve.lines for pair in line.split())
        assert end <= drawn.axes.right < drawn.axes.width - 8 * max(len(text) for *_, text in drawn.levels) + 1
