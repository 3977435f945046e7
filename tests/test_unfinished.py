"""A conversion that was killed is no dataset; two at once do not mix; damaged settings and odd places are named."""

from __future__ import annotations

import json
import shlex
import threading
from pathlib import Path

import pytest
from episodes import WRITER, make_episode
from test_lerobot_reader import tree_hash

from vla.cli import main, parse
from vla.finetune.data import data_check, data_convert, data_filter
from vla.finetune.data.data_convert import CONVERT_JSON, Settings, run
from vla.finetune.data.open_source import open_source
from vla.finetune.formats.cache_format import CACHE_JSON, WRITING_JSON
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.finetune.formats.unfinished import LOCK, UNFINISHED_JSON, command_of, locked
from vla.types import VlaError


class Died(BaseException):
    pass


@pytest.fixture
def toy(tmp_path) -> Path:
    with LeRobotWriter(tmp_path / "toy", **WRITER) as writer:
        for k in range(3):
            writer.add_episode(make_episode(k))
    return tmp_path / "toy"


def die_at(monkeypatch, n_calls: int, error: type[BaseException] = Died) -> None:
    """The reader's `n_calls`-th frame is its last."""
    calls, images = 0, LeRobotReader.images

    def dying(self, i, cameras=None):
        nonlocal calls
        calls += 1
        if calls == n_calls:
            raise error("gone")
        return images(self, i, cameras)

    monkeypatch.setattr(LeRobotReader, "images", dying)


@pytest.mark.parametrize("error", [Died, VlaError])
def test_a_stopped_conversion_does_not_open_and_names_its_command(toy, tmp_path, monkeypatch, error):
    out = tmp_path / "my out"
    settings = Settings(str(toy), "lerobot", out, size_px=24)
    die_at(monkeypatch, 12, error)
    with pytest.raises(error):
        run(settings)
    monkeypatch.undo()
    assert LeRobotReader(out).n_episodes == 2  # what is there looks whole
    with pytest.raises(
        VlaError, match=r"an unfinished dataset in .*fix: run `vla data convert .*` again: it continues"
    ) as caught:
        open_source(out)
    findings, _ = data_check.check(data_check.Settings(str(out)))
    assert [f.level for f in findings] == ["error"] and "unfinished" in findings[0].text
    command = str(caught.value).split("`")[1]
    assert parse(shlex.split(command)[1:])[1] == settings
    assert main(shlex.split(command)[1:]) == 0
    assert open_source(out).n_episodes == 3
    assert not (out / UNFINISHED_JSON).exists() and not (out / LOCK).exists()


def test_a_stopped_filter_names_itself(toy, tmp_path, monkeypatch):
    settings = data_filter.Settings(str(toy), tmp_path / "out", drop=(0,), success_only=True)
    die_at(monkeypatch, 8)
    with pytest.raises(Died):
        data_filter.run(settings)
    monkeypatch.undo()
    with pytest.raises(VlaError, match=r"`vla data filter .*--success-only --drop 0`"):
        open_source(tmp_path / "out")
    data_filter.run(settings)
    assert open_source(tmp_path / "out").n_episodes == 2


def test_a_grown_folder_stays_open(toy):
    with LeRobotWriter(toy, **WRITER, resume=True) as writer:
        writer.add_episode(make_episode(3))
        assert open_source(toy).n_episodes == 4


def test_the_command_of_settings():
    settings = Settings("a b", "cache", Path("o"), "jpeg", cameras=("x", "y z"), skip_bad=True, fps=5)
    text = command_of("data convert", settings)
    assert text == "vla data convert 'a b' --to cache --out o --images jpeg --cameras x 'y z' --fps 5 --skip-bad"
    assert parse(shlex.split(text)[1:])[1] == settings


@pytest.mark.parametrize("to", ["cache", "lerobot"])
def test_a_second_conversion_at_once_is_refused(toy, tmp_path, monkeypatch, to):
    settings = Settings(str(toy), to, tmp_path / "out")
    inside, go_on, images = threading.Event(), threading.Event(), LeRobotReader.images

    def waiting(self, i, cameras=None):
        inside.set()
        assert go_on.wait(30)
        return images(self, i, cameras)

    monkeypatch.setattr(LeRobotReader, "images", waiting)
    first = threading.Thread(target=run, args=(settings,))
    first.start()
    assert inside.wait(30)
    with pytest.raises(VlaError, match=r"out, which another process is writing; expected one at a time"):
        run(settings)
    go_on.set()
    first.join(30)
    monkeypatch.undo()
    run(Settings(str(toy), to, tmp_path / "alone"))
    assert open_source(tmp_path / "out").n_episodes == 3 and not (tmp_path / "out" / LOCK).exists()
    if to == "cache":
        assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "alone")


def test_a_lock_whose_holder_was_killed_is_free(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).touch()
    with locked(tmp_path / "out"), pytest.raises(VlaError, match="another process"), locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "new/out"):
        pass
    assert not (tmp_path / "new/out").exists()  # nothing was written


def test_damaged_settings_are_named(toy, tmp_path, monkeypatch):
    for to, name in (("lerobot", CONVERT_JSON), ("cache", WRITING_JSON)):
        out = tmp_path / to
        die_at(monkeypatch, 8)
        with pytest.raises(Died):
            run(Settings(str(toy), to, out))
        monkeypatch.undo()
        for text, message in (('{"a": ', "Expecting value"), ("[]", "expected a JSON object")):
            (out / name).write_text(text)
            with pytest.raises(VlaError, match=rf"{name}: .*{message}|{name}: list; {message}"):
                run(Settings(str(toy), to, out))


def test_a_cache_json_without_its_keys(toy, tmp_path):
    run(Settings(str(toy), "cache", tmp_path / "c"))
    path = tmp_path / "c" / CACHE_JSON
    info = json.loads(path.read_text())
    for key in ("files", "settings"):
        path.write_text(json.dumps({k: v for k, v in info.items() if k != key}))
        with pytest.raises(VlaError, match=rf"{CACHE_JSON} without {key}; .*write the cache again"):
            open_source(tmp_path / "c")


@pytest.mark.parametrize(
    "words",
    ["convert {toy} --to cache --out {out}", "convert {toy} --to lerobot --out {out}", "filter {toy} --out {out}",
     "filter {toy} --out {out}.json", "stats --data {toy} --out {out}/a.json", "inspect --data {toy} --out {out}/a.html"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["/proc/x", "file"])
def test_a_place_that_cannot_be_written(toy, tmp_path, capsys, words, place):
    if place == "file":
        (tmp_path / "file").touch()
        (tmp_path / "file.json").mkdir()
        place = str(tmp_path / "file")
    assert main(["data", *words.format(toy=toy, out=place).split()]) == 2
    assert f"error: got {place}" in capsys.readouterr().err


def test_run_again_when_all_is_done(toy, tmp_path):
    """Run again when all is done, nothing is marked or changed."""
    settings = Settings(str(toy), "lerobot", tmp_path / "out")
    run(settings)
    before = tree_hash(tmp_path / "out")
    assert data_convert.run(settings).n_new == 0 and tree_hash(tmp_path / "out") == before
