# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report: made, not blank, every method in its colour, names apart."""

import numpy as np
import pytest
import report_runs

from pbs_attn.eval.report import document, plots

LABELS = ("full", "identity", "pbs", "pbs:tau=0.95", "meanpool", "streaming")


def pixels(path):
    """float [height, width, 3] in 0..1"""
    from matplotlib.image import imread

    return imread(path)[..., :3]


def coloured(image, colour):
    from matplotlib.colors import to_rgb

    return int((np.abs(image - to_rgb(colour)).max(-1) < 0.02).sum())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """{file name: path} of a report over every bench."""
    folder = tmp_path_factory.mktemp("report")
    paths = [
        report_runs.write(folder / bench, bench, make(LABELS))
        for bench, make in report_runs.MAKERS.items()
        if bench not in ("longbench", "longbench2", "ttft")
    ]
    paths.append(report_runs.write(folder / "ttft", "ttft", report_runs.ttft(
        LABELS, lengths=(8192, 16384, 131072))))  # fmt: skip
    paths.append(report_runs.write(folder / "longbench", "longbench", report_runs.longbench(
        LABELS, tasks=["qasper", "trec"])))  # fmt: skip
    document.write(document.parts(document.views(paths)), folder / "out")
    return {path.name: path for path in (folder / "out").glob("*.png")}


def test_every_bench_has_its_picture(drawn):
    assert sorted(drawn) == [
        "equal-outputs.png", "longbench-score-density.png", "ppl-loss-density.png",
        "ruler-score-density.png", "ttft-time-length.png",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [
    "equal-outputs.png", "longbench-score-density.png", "ppl-loss-density.png",
    "ruler-score-density.png", "ttft-time-length.png",
])  # fmt: skip
def test_pictures_show_every_method_at_readme_width(drawn, name):
    image = pixels(drawn[name])
    assert image.shape[1] == 975 and 300 < image.shape[0] < 1600
    dark = (image.min(-1) < 0.9).mean()
    assert 0.005 < dark < 0.5, f"{dark:.1%} of {name} is not white"
    for label in LABELS[1:]:  # the base is no line of equal-outputs
        assert coloured(image, plots.style(label, LABELS)[0]) > 20, label


def test_the_report_shows_every_picture(drawn):
    text = next(iter(drawn.values())).with_name("report.md").read_text()
    for name in drawn:
        assert text.count(f"]({name})") == 1


def test_methods_look_different():
    labels = ["full", *plots.COLOURS, "streaming", "s2o", "bsfa:k=64", "flashprefill"]
    looks = [plots.style(label, labels) for label in dict.fromkeys(labels)]
    assert len({look[0] for look in looks}) == len(looks)
    assert len({look[1] for look in looks}) == len(looks)
    plain, other = (plots.style(label, LABELS) for label in ("pbs", "pbs:tau=0.95"))
    assert plain[:2] == other[:2] and plain[2] != other[2] == "white"


def test_names_do_not_cover_each_other(tmp_path):
    """Six points on nearly the same spot: every name has its own place inside the picture."""
    points = [(label, 0.5 + 0.001 * i, 10.0) for i, label in enumerate(LABELS)]
    with plots.figure(tmp_path / "x.png") as (fig, axes):
        axes = axes[0, 0]
        plots._scatter(axes, points, [(1.0, 1.0)] * 6, LABELS)
        plots.name_points(axes, points, [(1.0, 1.0)] * 6, LABELS)
        boxes = [text.get_window_extent().extents for text in axes.texts]
        whole = fig.bbox.extents
    assert len(boxes) == 6
    for i, box in enumerate(boxes):
        assert box[0] >= whole[0] and box[2] <= whole[2] and box[3] <= whole[3]
        for other in boxes[:i]:
            smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
            assert plots._shared(box, other) < 0.1 * smaller


def test_spread_keeps_order_and_gap():
    found = plots.spread(np.array([5.0, 1.0, 1.1, 5.0, 30.0]), 2.0)
    order = np.argsort([5.0, 1.0, 1.1, 5.0, 30.0], kind="stable")
    assert (np.diff(found[order]) > 1.98).all()
    assert found[4] == 30 and abs(found.mean() - 8.42) < 1e-6
