"""`vla data viz`."""

from __future__ import annotations

import base64
import io
import json
import re

import av
import numpy as np
import pytest
from PIL import Image
from sources import arm_source, toy_source

from vla.finetune.data import data_viz
from vla.finetune.data.data_viz import CURVES_HEIGHT_PX, Settings, curves_svg, run
from vla.types import VlaError


@pytest.fixture
def source(monkeypatch):
    source = toy_source(3, instructions=["open <the> drawer", "close", "x"], success=[True, False, None])
    monkeypatch.setattr(data_viz, "open_source", lambda text: source)
    return source


def test_page_stands_alone(source, tmp_path):
    page = run(Settings("x", tmp_path / "a.html", 0)).read_text()
    assert "http" not in page.replace("http-equiv", "") and "open &lt;the&gt; drawer (7 frames, success)" in page
    frames = json.loads(re.search(r"const frames = (\[.*?\]), numbers", page)[1])  # type: ignore[index]
    assert len(frames) == 7 and page.count("<polyline") == 3
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(frames[0]))))
    assert image.shape == (16, 20 + 12, 3)
    assert run(Settings("x", tmp_path / "b.html", 1, ("front",))).read_text().count("failure") == 1


def test_long_episodes_are_thinned(monkeypatch, tmp_path):
    long = arm_source(1, 1300)
    monkeypatch.setattr(data_viz, "open_source", lambda text: long)
    page = run(Settings("x", tmp_path / "a.html")).read_text()
    assert len(json.loads(re.search(r"const frames = (\[.*?\]), numbers", page)[1])) == 434  # type: ignore[index]


def test_video_has_every_frame_and_the_curves(source, tmp_path):
    path = run(Settings("x", tmp_path / "a.mp4", 2))
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 9 and frames[0].shape == (16 + CURVES_HEIGHT_PX, 480, 3)
    red = [(f[16:].astype(int)[..., 0] - f[16:].astype(int)[..., 1]).mean(0).argmax() for f in frames]
    assert np.all(np.diff(red) > 20)  # the line moves on


def test_upright(monkeypatch, source, tmp_path):
    seen = {}
    for deg in (0, 180):
        seen[deg] = data_viz._frame(source, 0, Settings("x", tmp_path / "a.html", 0, ("front",), deg))  # type: ignore
    np.testing.assert_array_equal(seen[0][::-1, ::-1], seen[180])


def test_curves_of_constants_and_nan():
    svg = curves_svg(np.array([[0.0, np.nan], [0.0, 1.0]], np.float32), ("<a>", "b"))
    assert "nan" not in svg and "&lt;a&gt; 0..0" in svg


def test_mistakes_are_named(source, tmp_path):
    for settings, message in (
        (Settings("x", tmp_path / "a.gif"), "a name that ends in .html or .mp4"),
        (Settings("x", tmp_path / "a.html", 3), "episode 3; expected 0..2"),
        (Settings("x", tmp_path / "a.html", 0, ("top",)), "camera 'top'"),
    ):
        with pytest.raises(VlaError, match=message):
            run(settings)
    assert list(tmp_path.iterdir()) == []
