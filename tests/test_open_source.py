"""Every format is found by what its folder holds, and everything else is refused with a list of what was looked for."""

import shutil
from pathlib import Path

import pytest
from sources import toy_source
from test_hdf5_reader import write as write_hdf5

from vla.finetune.data.open_source import open_source, open_sources
from vla.finetune.formats import hub
from vla.finetune.formats.cache_format import CacheSettings
from vla.finetune.formats.cache_reader import CacheReader
from vla.finetune.formats.cache_writer import CacheWriter
from vla.finetune.formats.hdf5_reader import Hdf5Reader
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.rlds_reader import RldsReader
from vla.types import VlaError

FIXTURES = Path(__file__).parent / "fixtures"
RLDS = FIXTURES / "rlds" / "tiny_arm"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "cache"))


def test_lerobot_of_both_versions():
    for name in ("lerobot_v3_image", "lerobot_v21_image"):
        source = open_source(FIXTURES / name)
        assert isinstance(source, LeRobotReader) and source.name == name and len(source) > 0
    assert open_source(str(FIXTURES / "lerobot_v3_image"), name="mine").name == "mine"


def test_hdf5_file_and_folder(tmp_path):
    file = write_hdf5(tmp_path / "suite" / "open_the_drawer_demo.hdf5")
    one, folder = open_source(file), open_source(tmp_path / "suite", name="all")
    assert isinstance(one, Hdf5Reader) and isinstance(folder, Hdf5Reader)
    assert len(one) == len(folder) == 18 and folder.name == "all"


def test_rlds_folder_version_and_split():
    above, version = open_source(RLDS), open_source(RLDS / "1.0.0")
    assert isinstance(above, RldsReader) and isinstance(version, RldsReader)
    assert (above.name, version.name, above.split) == ("tiny_arm", "tiny_arm", "train")
    half = open_source(f"{RLDS}#split=train[:50%]")
    assert 0 < half.n_episodes < above.n_episodes == version.n_episodes
    assert open_source(f"{RLDS}#split=val").where == above.where


def test_our_cache(tmp_path):
    original = toy_source()
    writer = CacheWriter(tmp_path / "c", original, CacheSettings())
    for i in range(original.n_episodes):
        writer.add_episode(i)
    writer.close()
    with pytest.raises(VlaError):  # not finished
        open_source(tmp_path / "c")
    writer = CacheWriter(tmp_path / "c", original, CacheSettings())
    writer.finish()
    source = open_source(tmp_path / "c")
    assert isinstance(source, CacheReader) and len(source) == len(original)
    assert (source.images(3)["front"] == original.images(3)["front"]).all()


def test_open_x_embodiment_names_pick_their_rule(tmp_path):
    with pytest.raises(VlaError, match="toto"):  # the fixture has not the columns that toto has
        (tmp_path / "toto").symlink_to(RLDS)
        open_source(tmp_path / "toto")


def test_hub_addresses(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(hub, "open_hub", lambda text, name=None, skip_bad=False: asked.append((text, name)))
    monkeypatch.chdir(tmp_path)
    for text in ("lerobot/libero_10_image", "a/b@v3.0", "hf://datasets/a/b/folder"):
        open_source(text, name="n")
        assert asked.pop() == (text, "n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "data").mkdir()
    with pytest.raises(VlaError, match="own/data, in which there is nothing"):
        open_source("own/data")  # a folder of this name comes first
    with pytest.raises(VlaError, match="#split=train of hf://datasets/a/b"):
        open_source("hf://datasets/a/b#split=train")

    def refuse(text: str, name: str | None = None, skip_bad: bool = False) -> None:
        raise VlaError("no such dataset")

    monkeypatch.setattr(hub, "open_hub", refuse)
    with pytest.raises(VlaError, match="there is no folder runs/demos here, and on the Hub: no such dataset"):
        open_source("runs/demos")


def test_what_is_not_a_dataset(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(VlaError) as found:
        open_source(tmp_path)
    text = str(found.value)
    assert "notes.txt" in text
    assert all(word in text for word in ("cache.json", "meta/info.json", "features.json", "*.hdf5", "fix:"))
    with pytest.raises(VlaError, match="got no /nowhere/at/all; expected a dataset's folder or file, OWNER/NAME"):
        open_source("/nowhere/at/all")
    with pytest.raises(VlaError, match="expected PATH#split=SPLIT"):
        open_source(f"{RLDS}#train")
    with pytest.raises(VlaError, match="the only ones with splits"):
        open_source(f"{FIXTURES / 'lerobot_v3_image'}#split=train")
    for version in ("1.0.0", "1.1.0"):
        (tmp_path / "d" / version).mkdir(parents=True)
        (tmp_path / "d" / version / "features.json").write_text("{}")
    with pytest.raises(
        VlaError, match=r"2 versions in .*: 1\.0\.0, 1\.1\.0; expected one; fix: name one, e\.g\. .*1\.1\.0"
    ):
        open_source(tmp_path / "d")


def test_several_and_their_weights(tmp_path):
    texts = [str(FIXTURES / "lerobot_v3_image"), str(RLDS)]
    sources, weights = open_sources(texts)
    assert [source.name for source in sources] == ["lerobot_v3_image", "tiny_arm"] and weights is None
    assert open_sources(texts, (2, 0.5))[1] == [2, 0.5]
    with pytest.raises(VlaError, match="1 weights for 2 datasets"):
        open_sources(texts, (1,))
    with pytest.raises(VlaError, match="two datasets called 'tiny_arm'"):
        open_sources([str(RLDS), str(RLDS / "1.0.0")])


def test_named_mixtures(tmp_path):
    with pytest.raises(VlaError, match="oxe:MIXTURE@FOLDER"):
        open_sources(["oxe:bridge_rt_1"])
    with pytest.raises(VlaError, match="mixture 'bridge_rt1'.*nearest bridge_rt_1"):
        open_sources(["oxe:bridge_rt1@data"])
    (tmp_path / "bridge_orig").mkdir()
    with pytest.raises(VlaError, match="got no fractal20220817_data in .*; expected the 2 datasets of bridge_rt_1"):
        open_sources([f"oxe:bridge_rt_1@{tmp_path}"])
    for name in ("bridge_orig", "fractal20220817_data"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "meta").symlink_to(FIXTURES / "lerobot_v3_image" / "meta")
        (tmp_path / name / "data").symlink_to(FIXTURES / "lerobot_v3_image" / "data")
    sources, weights = open_sources([f"oxe:bridge_rt_1@{tmp_path}", str(RLDS)], (1, 3))
    assert [s.name for s in sources] == ["bridge_orig", "fractal20220817_data", "tiny_arm"] and weights == [1, 1, 3]


def test_a_number_sign_in_a_path(tmp_path):
    folder = shutil.copytree(FIXTURES / "lerobot_v3_image", tmp_path / "run#3/data")
    assert open_source(folder).name == "data"
    rlds = shutil.copytree(RLDS, tmp_path / "run#4/tiny_arm")
    whole, half = open_source(rlds), open_source(f"{rlds}#split=train[:50%]")
    assert 0 < half.n_episodes < whole.n_episodes
    with pytest.raises(VlaError, match=r"no .*run#5"):
        open_source(tmp_path / "run#5")
    with pytest.raises(VlaError, match="correct what follows the #"):
        open_source(f"{rlds}#split:train")
