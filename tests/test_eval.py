"""Statistics against published numbers; the evaluation program from settings to report."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from vla.eval.html import Html, bar_chart_svg, escaped, line_chart_svg, table, ticks
from vla.eval.results import compare, read_rows
from vla.eval.run import Settings, run
from vla.eval.run_folder import folder_digest
from vla.eval.statistics import (
    Interval,
    difference,
    mcnemar,
    mean_interval,
    paired_difference,
    percentile,
    t_quantile,
    wilson,
)
from vla.eval.suites import get_suite
from vla.eval.video import write_video
from vla.testing import FakeSuite, NoisyPolicy
from vla.types import VlaError

# --- statistics ---


def test_wilson_published_values() -> None:
    # Newcombe 1998a, table I: 81/263, 15/148, 0/20, 1/29 by method 3
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = wilson(successes, trials)
        assert interval.estimate == successes / trials
        assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    assert wilson(20, 20).high == 1.0
    empty = wilson(0, 0)
    assert math.isnan(empty.estimate) and empty[1:] == (0.0, 1.0)
    with pytest.raises(VlaError, match="got 3 successes in 2 trials; expected 0 <= successes <= trials"):
        wilson(3, 2)


def test_difference_published_values() -> None:
    # Newcombe 1998b, table II: 56/70 - 48/80 by method 10
    interval = difference(48, 80, 56, 70)
    assert interval.estimate == pytest.approx(0.2)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.0524, 0.3339)


def test_mcnemar_by_hand() -> None:
    a = [True] * 5 + [False] * 9 + [True]
    b = [True] * 5 + [True] * 9 + [False]  # 9 gained, 1 lost
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar([True, False], [True, False]) == 1.0
    with pytest.raises(VlaError, match="got 2 and 1 outcomes"):
        mcnemar([True, False], [True])


def test_paired_difference() -> None:
    a, b = [False] * 20, [True] * 12 + [False] * 8
    interval = paired_difference(a, b)
    assert interval.estimate == 0.6
    assert 0.3 < interval.low < 0.6 < interval.high < 0.85
    same = paired_difference(a, a)
    assert same.estimate == 0.0 and same.low < 0 < same.high
    mirrored = paired_difference(b, a)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low))


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (29, 2.0452)],
)
def test_t_quantile_against_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-5)


def test_mean_interval() -> None:
    interval = mean_interval([0.1, 0.2, 0.3, 0.2, 0.2])
    assert interval.estimate == pytest.approx(0.2)
    assert interval.high - interval.estimate == pytest.approx(2.7764 * math.sqrt(0.005) / math.sqrt(5), rel=1e-4)
    with pytest.raises(VlaError, match="got 1 values; expected at least 2"):
        mean_interval([0.1])


def test_percentile_is_numpys() -> None:
    values = list(np.random.default_rng(0).normal(size=37))
    for q in (0, 50, 90, 99, 100):
        assert percentile(values, q) == pytest.approx(np.percentile(values, q))
    assert math.isnan(percentile([], 50))


# --- building blocks of reports ---


def test_text_is_escaped_and_charts_are_well_formed() -> None:
    assert escaped("<b>") == "&lt;b&gt;" and escaped(Html("<b>")) == "<b>"
    assert "&lt;x&gt;" in table(["a"], [["<x>"]])
    bars = bar_chart_svg(
        ["<task>", "b"], {"one": [wilson(1, 4), Interval(math.nan, 0, 1)], "two": [wilson(3, 4)] * 2}, x_label="rate"
    )
    lines = line_chart_svg({"loss": [(0, 1.0), (1, math.nan), (2, 0.5)]}, x_label="step", y_label="loss")
    for chart in (bars, lines):
        ElementTree.fromstring(chart[chart.index("<svg") :])
    assert ">rate<" in bars and ">75%<" in bars and "one" in bars and bars.count("<rect") == 3
    assert ">step<" in lines and ">loss<" in lines and "nan" not in lines
    assert "No data" in line_chart_svg({}, x_label="x", y_label="y")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.003, 0.0071), (-3, 1200), (5, 5), (0, 0)])
def test_ticks_enclose_the_range(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and 3 <= len(marks) <= 8
    assert np.allclose(np.diff(marks), marks[1] - marks[0])


def test_video_is_what_browsers_play(tmp_path: Path) -> None:
    import av

    frames = [np.full((32, 33, 3), 10 * i, np.uint8) for i in range(10)]
    write_video(tmp_path / "a.mp4", frames, 10.0, border=True)
    with av.open(str(tmp_path / "a.mp4"), "r") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert pictures[0].shape == (64, 66, 3) and len(pictures) == 10 + 5
    assert abs(int(pictures[5][30, 30, 0]) - 50) < 6
    assert pictures[-1][1, 30].argmax() == 1  # the green frame of a success
    with pytest.raises(VlaError, match="no frames"):
        write_video(tmp_path / "b.mp4", [], 10.0)


# --- the program ---


def settings(out: Path, **changes: object) -> Settings:
    base = Settings("noisy", suite="fake", episodes_per_task=6, temperature=1.0, workers=0, videos_per_task=1, out=out)
    return replace(base, **changes)  # type: ignore[arg-type]


class CountingPolicy(NoisyPolicy):
    """Stops with an error after a number of queries, as a killed run would."""

    limit = 10**9

    def act(self, observations):  # noqa: ANN001, ANN202
        if sum(self.batch_sizes) > self.limit:
            raise KeyboardInterrupt
        return super().act(observations)


def test_result_json_report_and_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(settings(tmp_path), policy=NoisyPolicy(noise=0.1))
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["schema"] == "vla-eval/1"
    overall = stored["overall"]
    assert overall["trials"] == 12 and 0 < overall["successes"] < 12
    assert overall["successes"] + overall["timeouts"] == 12 and overall["undecodable"] == overall["faults"] == 0
    for name in ("reach-near", "reach-far"):
        task = stored["tasks"][name]
        assert (task["success_rate"], task["low"], task["high"]) == wilson(task["successes"], task["trials"])
    assert stored["latency_ms"]["queries"] == sum(len(row.latency_ms) for row in result.rows) > 12
    assert stored["latency_ms"]["p50"] <= stored["latency_ms"]["p99"]
    assert stored["versions"]["fake"] == "1" and stored["settings"]["seed"] == 1_000_000 and stored["command"]
    assert {row.seed for row in result.rows} == set(range(1_000_000, 1_000_006))
    videos = sorted((tmp_path / "videos").iterdir())
    assert len(videos) == 2 and all(re.fullmatch(r"reach-(near|far)-0-(success|failure)\.mp4", v.name) for v in videos)

    report = (tmp_path / "report.html").read_text()
    HTMLParser().feed(report)
    assert report.count("data:video/mp4;base64,") == 2
    assert "<script" not in report and not re.search(r'(src|href)="(?!data:)', report)
    for text in ("reach-near", "Wilson 95% interval", "p99", "viewport", f"{overall['successes']} / 12"):
        assert text in report
    assert "reach-near" in capsys.readouterr().out


def test_interrupted_run_continues_and_equals_a_straight_one(tmp_path: Path) -> None:
    policy = CountingPolicy(noise=0.1)
    straight = run(settings(tmp_path / "a"), policy=policy)
    n_queries = sum(policy.batch_sizes)

    first = CountingPolicy(noise=0.1)
    first.limit = n_queries // 2
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp_path / "b", slots=3), policy=first)
    done = len(read_rows(tmp_path / "b"))
    assert 0 < done < 12 and not (tmp_path / "b" / "result.json").exists()
    with open(tmp_path / "b" / "episodes.jsonl", "a") as file:
        file.write('{"task": "reach-')  # a line that a crash has cut
    second = CountingPolicy(noise=0.1)
    resumed = run(settings(tmp_path / "b", slots=2), policy=second)
    assert sum(second.batch_sizes) < n_queries
    assert resumed.outcomes() == straight.outcomes()
    assert len((tmp_path / "b" / "episodes.jsonl").read_text().splitlines()) == 12

    third = CountingPolicy(noise=0.1)
    again = run(settings(tmp_path / "b"), policy=third)
    assert third.batch_sizes == [] and again.outcomes() == straight.outcomes()
    longer = run(settings(tmp_path / "b", episodes_per_task=7), policy=third)
    assert longer.tally().trials == 14


def test_another_evaluation_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(settings(tmp_path), policy=NoisyPolicy())
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(
        VlaError, match=r"got seed=5 for .*, which holds an evaluation with seed=1000000; .*choose another --out"
    ):
        run(settings(tmp_path, seed=5), policy=NoisyPolicy())
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_faults_are_neither_success_nor_failure_and_get_another_chance(tmp_path: Path) -> None:
    suite = FakeSuite(faults=(("reach-near", 1_000_002, "raise_step"),))
    result = run(settings(tmp_path), policy=NoisyPolicy(noise=0.1), suite=suite)
    tally = result.tally("reach-near")
    assert (tally.trials, tally.faults) == (5, 1)
    healed = run(settings(tmp_path), policy=NoisyPolicy(noise=0.1), suite=FakeSuite())
    assert (healed.tally().trials, healed.tally().faults) == (12, 0)


def test_undecodable_is_counted(tmp_path: Path) -> None:
    keys = tuple((1_000_000, zlib.crc32(b"reach-far"), i) for i in range(6))
    result = run(settings(tmp_path, tasks=("reach-far",)), policy=NoisyPolicy(noise=0.1, undecodable_keys=keys))
    tally = result.tally()
    assert tally.undecodable == sum(len(row.latency_ms) == 2 for row in result.rows) > 0
    assert tally.trials == 6 and tally.timeouts == 0


def test_expert_solves_and_pairs(tmp_path: Path) -> None:
    expert = run(
        Settings("expert", suite="fake", episodes_per_task=6, workers=0, videos_per_task=0, out=tmp_path / "e")
    )
    assert expert.tally().successes == 12
    noisy = run(settings(tmp_path / "n"), policy=NoisyPolicy(noise=0.1))
    comparison = compare(noisy, expert)
    assert comparison.pairs == 12 and comparison.gain.estimate == pytest.approx(1 - noisy.tally().interval.estimate)
    other = run(
        Settings("expert", suite="fake", episodes_per_task=2, seed=7, workers=0, videos_per_task=0, out=tmp_path / "o")
    )
    with pytest.raises(VlaError, match="without a common"):
        compare(noisy, other)


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(settings(tmp_path / "out", dry_run=True, policy="expert"))
    assert "would run 6 episodes of each of 2 tasks (reach-near, reach-far)" in capsys.readouterr().out
    assert result.rows == () and not (tmp_path / "out").exists()


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(VlaError, match="got suite 'metawrld'; expected one of .*; fix: did you mean 'metaworld'?"):
        get_suite("metawrld")
    with pytest.raises(VlaError, match="got task 'reach-nar'; .*did you mean 'reach-near'?"):
        run(settings(tmp_path, tasks=("reach-nar",)))
    with pytest.raises(VlaError, match="each task once"):
        get_suite("fake", ("reach-near", "reach-near"))
    with pytest.raises(VlaError, match="got policy '.*nowhere'; expected a policy directory"):
        run(settings(tmp_path / "out", policy=str(tmp_path / "nowhere")))
    with pytest.raises(VlaError, match="without a client"):
        run(settings(tmp_path / "out", policy="http://127.0.0.1:1"))
    with pytest.raises(VlaError, match="episodes_per_task=0"):
        run(settings(tmp_path / "out", episodes_per_task=0))
    assert not (tmp_path / "out").exists()


def test_folder_digest_sees_content(tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text("{}")
    before = folder_digest(tmp_path)
    (tmp_path / "policy.json").write_text("[]")
    assert folder_digest(tmp_path) != before
