from __future__ import annotations

import json
import re

import pytest

from vla import cli
from vla.finetune.data.data_list import Settings, describe, run
from vla.finetune.oxe.configs import DATASETS
from vla.finetune.oxe.registry import mixture
from vla.types import VlaError


def test_table_has_every_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "list"]) == 0
    out = capsys.readouterr().out
    for name in DATASETS:
        assert name in out
    kuka = next(line for line in out.splitlines() if " kuka " in line)
    cells = [cell.strip() for cell in kuka.strip("│").split("│")]
    weights = ["", "", "0.834", "0.834", "0.834", "0.834", "0.834"]
    assert cells == ["kuka", *weights, "primary image", "POS_QUAT", "EEF_POS", "1 open, 0 closed"]
    assert "\nbc_z: version 0.1.0 only" in out and "\n70 datasets. These are also mixtures of themselves alone: " in out


def test_a_narrow_terminal_loses_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    assert len(run(Settings())) == 70
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    first_column = "".join(line.split("│")[1].strip() for line in plain.splitlines() if line.startswith("│"))
    assert max(len(line) for line in plain.splitlines() if line.startswith("│")) <= 120
    for name in DATASETS:
        assert name in first_column


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(DATASETS)
    assert rows["libero_10_no_noops"]["cameras"] == {"primary": "observation/image", "wrist": "observation/wrist_image"}
    assert rows["libero_10_no_noops"]["mixtures"] == {"libero_10_no_noops": 1.0}
    assert len(rows["libero_10_no_noops"]["state"]) == 9 and rows["droid"]["mixtures"] == {"oxe_magic_soup_plus": 0.06}
    assert rows["language_table"]["gripper"] == "none: always 1"
    assert rows["taco_play"]["mixtures"]["rtx_franka"] == 2.0  # the first of its two weights
    assert rows["berkeley_rpt_converted_externally_to_rlds"]["mixtures"] == {}


def test_one_mixture(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(Settings(mixture="rtx_franka"))
    out = capsys.readouterr().out
    assert [(row["name"], row["weight"]) for row in rows] == mixture("rtx_franka")
    assert "0.541" in out and "utaustin_mutex" in out and "toto 1, stands there already" in out
    assert "left out: berkeley_rpt_converted_externally_to_rlds 1, actions are JOINT_POS" in out
    with pytest.raises(VlaError, match="mixture 'rtx2'; expected one of 18 names, nearest rtx"):
        run(Settings(mixture="rtx2", json=True))
    assert capsys.readouterr().out == ""
    assert cli.main(["data", "list", "--mixture", "nothing_like_it_at_all"]) == 2


def test_notes_name_what_is_odd() -> None:
    assert "against its own comment" in describe("taco_play")["note"]
    assert "0.1.0" in describe("bc_z")["note"]
