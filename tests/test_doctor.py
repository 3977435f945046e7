"""The doctor names every fault that is planted, and none in a policy that has none."""

from __future__ import annotations

import dataclasses
import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doctoring import ACTIONS, STATES, ToySuite, toy_dataset, toy_episode, toy_policy

from vla import cli
from vla.doctor import program as doctor
from vla.doctor.actions import closing_sign
from vla.doctor.finding import CHECKS, Finding
from vla.files import write_json
from vla.types import Episode, VlaError


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds toy/, the dataset, and run/policy, trained on it."""
    folder = tmp_path_factory.mktemp("doctor")
    toy_dataset(folder / "toy")
    toy_policy(folder)
    return folder


@pytest.fixture
def ask(folder: Path, tmp_path: Path) -> Callable[..., dict[str, Finding]]:
    """Run the doctor, on other data, with another suite or with changed files; returns the worst finding of each check."""

    def ask(
        data: Path | None = None, suite: ToySuite | None = None, spec: Callable[[dict[str, Any]], object] | None = None,
        statistics: Callable[[dict[str, Any]], object] | None = None, **settings: Any,
    ) -> dict[str, Finding]:  # fmt: skip
        policy = folder / "run" / "policy"
        if spec or statistics:
            policy = shutil.copytree(policy, tmp_path / "policy")
            for file, change in (("policy.json", spec), ("dataset_statistics.json", statistics)):
                value = json.loads((policy / file).read_text())
                (change or bool)(value)
                write_json(policy / file, value)
        base = {"dataset": (data or folder / "toy",), "frames": 8, "workers": 0, "replays": 3}
        asked = doctor.Settings(str(policy), out=tmp_path / "report.html", **{**base, **settings})
        findings = doctor.run(asked, suite=suite)
        worst = {
            f.name: f
            for f in sorted(findings, key=lambda f: ("pass", "not checked", "suspect", "wrong").index(f.status))
        }
        assert worst.keys() == CHECKS.keys(), "every check says something, whatever is absent"
        return worst

    return ask


def troubles(findings: dict[str, Finding]) -> dict[str, str]:
    return {f.name: f.status for f in findings.values() if f.status in ("wrong", "suspect")}


def changed(change: Callable[[Any], Any]) -> Callable[[Episode], Episode]:
    """An episode whose steps are changed one by one."""
    return lambda episode: dataclasses.replace(episode, steps=[change(step) for step in episode.steps])


def with_action(step: Any, action: Any) -> Any:
    return dataclasses.replace(step, action=np.asarray(action, np.float32))


def test_a_sound_policy_passes_everything(ask, tmp_path: Path) -> None:
    found = ask(suite=ToySuite(), strict=True, frames=12)
    assert troubles(found) == {}
    unchecked = {f.name for f in found.values() if f.status == "not checked"}
    assert unchecked == {"protocol"}
    assert found["predictions"].plot is not None and found["predictions"].plot.startswith(b"\x89PNG")
    assert "3 of 3 recorded successes succeed again" in found["replay success"].evidence
    assert found["token accuracy"].evidence.startswith("teacher-forced 100.0%, free-running 100.0% (dx 100%")
    assert "closes" in found["gripper convention"].evidence


def test_the_page_stands_alone_and_the_json_says_the_same(ask, tmp_path: Path) -> None:
    found = ask(data=None, spec=lambda s: s["action"].update(control_hz=5.0))
    page = (tmp_path / "report.html").read_text()
    assert "://" not in page.replace("data:image", "") and "data:image/png;base64," in page
    for name, check in CHECKS.items():
        assert name in page and html.escape(check.effect) in page
    value = json.loads((tmp_path / "doctor.json").read_text())
    assert value["schema"] == "vla-doctor/1" and value["counts"]["wrong"] == 1
    (row,) = [row for row in value["findings"] if row["status"] == "wrong"]
    assert row["name"] == "control rate" and row["fix"] == found["control rate"].fix
    assert row["evidence"] == "policy 5 Hz, dataset 10 Hz" and row["effect"] == CHECKS["control rate"].effect


def test_without_data_and_suite_it_says_what_is_missing(ask) -> None:
    found = ask(dataset=())
    assert troubles(found) == {}
    for name in ("token accuracy", "image rotation", "delta or absolute", "dataset statistics"):
        assert found[name].evidence == "not checked: needs a dataset (--dataset FOLDER)"
    assert found["max steps"].evidence == "not checked: needs a suite (--suite NAME)"
    assert found["mask"].status == "pass" and found["weights"].status == "pass"


PLANTED_IN_DATA: dict[str, tuple[Callable[[Episode], Episode], dict[str, Any], str, str]] = {
    # what is done: (change of the data, of the writer, the check that names it, a piece of its evidence)
    "gripper flipped": (
        changed(lambda s: with_action(s, s.action * [1, 1, 1, -1])), {}, "gripper polarity", "signs are opposite"
    ),
    "images turned": (
        changed(lambda s: dataclasses.replace(s, observation=dataclasses.replace(
            s.observation, images={"front": np.ascontiguousarray(np.rot90(s.observation.images["front"]))}))),
        {}, "image rotation", "fit better under rotation 270",
    ),
    "other scale": (
        changed(lambda s: with_action(s, s.action * [2, 2, 2, 1])), {}, "dataset statistics", "largest difference: d"
    ),
    "absolute": (
        changed(lambda s: with_action(s, [*(s.observation.state + s.action)[:3], s.action[3]])),
        {}, "delta or absolute", "the data's actions are targets",
    ),
    "second delta": (
        changed(lambda s: with_action(s, [*(s.action - s.observation.state)[:3], s.action[3]])),
        {}, "double delta", "delta minus state",
    ),
    "other rate": (lambda e: e, {"fps": 20}, "control rate", "policy 10 Hz, dataset 20 Hz"),
    "other camera": (
        changed(lambda s: dataclasses.replace(s, observation=dataclasses.replace(
            s.observation, images={"top": s.observation.images["front"]}))),
        {"cameras": {"top": (32, 32)}}, "cameras", "front not among the dataset's cameras: top",
    ),
    "black camera": (
        changed(lambda s: dataclasses.replace(s, observation=dataclasses.replace(
            s.observation, images={"front": np.zeros((32, 32, 3), np.uint8)}))),
        {}, "cameras", "black frames from front",
    ),
    "other order of dimensions": (
        changed(lambda s: with_action(s, s.action[[3, 0, 1, 2]])),
        {"action_names": ("gripper", "dx", "dy", "dz")}, "action names", "toy gripper, dx",
    ),
    "evaluation seeds": (lambda e: dataclasses.replace(e, seed=1_000_000 + (e.seed or 0)), {}, "seeds", "24 training episodes"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED_IN_DATA)
def test_a_fault_of_the_data_is_named(fault: str, ask, tmp_path: Path) -> None:
    change, writer, name, evidence = PLANTED_IN_DATA[fault]
    data = toy_dataset(tmp_path / "data" / "toy", 24, change, **writer)
    finding = ask(data=data)[name]
    assert finding.status == "wrong" and evidence in finding.evidence and finding.fix


def test_idle_frames_are_named(ask, tmp_path: Path) -> None:
    def idle(episode: Episode) -> Episode:
        steps = [with_action(s, [0, 0, 0, s.action[3]]) if i in (1, 2) else s for i, s in enumerate(episode.steps)]
        return dataclasses.replace(episode, steps=steps)

    finding = ask(data=toy_dataset(tmp_path / "toy", 24, idle))["no-ops"]
    assert finding.status == "wrong" and "33.3% of 144 frames command nothing" in finding.evidence


def test_success_that_does_not_last_is_named(ask, tmp_path: Path) -> None:
    def brief(episode: Episode) -> Episode:
        steps = [dataclasses.replace(s, success=i == 3) for i, s in enumerate(episode.steps)]
        return dataclasses.replace(episode, steps=steps)

    finding = ask(data=toy_dataset(tmp_path / "toy", 24, brief))["success latch"]
    assert finding.status == "suspect" and "24 of 24 episodes succeed at some step, 0 at the last" in finding.evidence


def second_key(s: dict[str, Any]) -> None:
    s["other"] = json.loads(json.dumps(s["toy"]))
    for name in ("q01", "q99"):
        s["other"]["action"][name] = [3 * value for value in s["other"]["action"][name]]


def as_min_max(s: dict[str, Any]) -> None:
    s["toy"]["action"].update(q01=s["toy"]["action"]["min"], q99=s["toy"]["action"]["max"])


def unmasked(s: dict[str, Any]) -> None:
    action = s["toy"]["action"]
    action["mask"] = [True] * 4
    action["q01"][3], action["q99"][3] = 0.0, 1.0


PLANTED_IN_POLICY: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # what is done: (arguments of `ask`, the check that names it, its status, a piece of its evidence)
    "wrong key": (
        {"statistics": second_key, "unnorm_key": "other"}, "unnorm key", "wrong", "in use: 'other'"
    ),
    "min and max": ({"statistics": as_min_max}, "statistic kind", "wrong", "q01 and q99 hold the data's min/max"),
    "gripper normalised": ({"statistics": unmasked}, "mask", "wrong", "bounds that change it: gripper 0 .. 1"),
    "not normalised": (
        {"statistics": lambda s: s["toy"]["action"].update(mask=[False, True, True, False])},
        "mask", "wrong", "not normalised although no gripper: dx",
    ),
    "rotation": ({"spec": lambda s: s["image"].update(rotation_deg=180)}, "image rotation", "wrong", "policy.json says 180"),
    "rotation unrecorded": (
        {"spec": lambda s: (s["image"].update(rotation_deg=180), s.update(provenance=[]))},
        "image rotation", "wrong", "better under rotation 0",
    ),
    "crop": ({"spec": lambda s: s["image"].update(crop_area=0.5)}, "crop", "wrong", "trained with crop_area 1, policy.json says 0.5"),
    "horizon": ({"spec": lambda s: s["action"].update(horizon=1)}, "chunk horizon", "wrong", "trained with 2"),
    "absolute": ({"spec": lambda s: s["action"].update(delta=False)}, "delta or absolute", "wrong", "displacements"),
    "replan": ({"n_execute": 3}, "replan length", "wrong", "3 of 2 actions"),
    "convention": (
        {"spec": lambda s: s["action"].update(gripper_convention="+1 opens")},
        "gripper convention", "wrong", "fingers in the data: the higher value closes",
    ),
    "no convention": (
        {"spec": lambda s: s["action"].update(gripper_convention="")}, "gripper convention", "suspect", "policy.json says ''"
    ),
    "gripper range": (
        {"spec": lambda s: s["action"].update(gripper_range="unit")}, "gripper threshold", "wrong", "outside the range"
    ),
    "template": (
        {"spec": lambda s: s["provenance"][0]["settings"].update(template="Do {instruction}")},
        "prompt template", "wrong", "trained with 'Do {instruction}'",
    ),
    "trailing space": (
        {"spec": lambda s: s["prompt"].update(template="Do {instruction}. Out: ")}, "prompt template", "suspect", "ends in a space"
    ),
    "temperature": ({"temperature": 1.0}, "temperature", "suspect", "asked at 1; last trained at 0"),
    "transformers": (
        {"spec": lambda s: s["versions"].update(transformers="4.40.1")}, "library versions", "suspect", "transformers 4.40.1 ->"
    ),
    "protocol": (
        {"protocol": "openvla"}, "protocol", "suspect", "image.jpeg_quality None instead of 95"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED_IN_POLICY)
def test_a_fault_of_the_policy_is_named(fault: str, ask) -> None:
    arguments, name, status, evidence = PLANTED_IN_POLICY[fault]
    finding = ask(**arguments)[name]
    assert finding.status == status, finding
    assert evidence in finding.evidence and finding.fix


PLANTED_IN_SUITE: dict[str, tuple[ToySuite, str, str, str]] = {
    "frames turned": (ToySuite(quarter_turns=2), "simulator frames", "wrong", "turned by 180"),
    "darker": (ToySuite(light=0.5), "simulator frames", "suspect", "simulator darker by"),
    "rate": (ToySuite(control_hz=20.0), "control rate", "wrong", "suite 20 Hz"),
    "limit": (ToySuite(max_steps=4), "max steps", "wrong", "stops after 4 steps"),
    "capitals": (ToySuite(instruction="Move the square!"), "instruction wording", "suspect", "'Move the square!' in the suite"),
    "unseen words": (ToySuite(instruction="shift it"), "instruction wording", "wrong", "4 of 4 instructions"),
    "other actions": (
        ToySuite(action_names=("dy", "dx", "dz", "gripper")), "action names", "wrong", "toy dy, dx, dz, gripper"
    ),
    "replay fails": (ToySuite(max_steps=3), "replay success", "wrong", "0 of 3 recorded successes"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED_IN_SUITE)
def test_a_fault_of_the_suite_is_named(fault: str, ask) -> None:
    suite, name, status, evidence = PLANTED_IN_SUITE[fault]
    finding = ask(suite=suite, frames=2)[name]
    assert finding.status == status, finding
    assert evidence in finding.evidence and finding.fix


def test_strict_names_what_is_wrong(ask) -> None:
    with pytest.raises(VlaError, match=r"1 checks say wrong: control rate; the fixes are in .*report.html"):
        ask(spec=lambda s: s["action"].update(control_hz=5.0), strict=True, frames=2)


def test_an_adapter_that_changes_nothing_is_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from vla.doctor.weights import check_weights, largest_update

    policy = shutil.copytree(folder / "run" / "policy", tmp_path / "policy")
    file = policy / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({k: v * 0 if "lora_B" in k else v for k, v in weights.items()}, file, {"format": "pt"})
    finding = check_weights("adapter", largest_update(policy))
    assert finding.status == "wrong" and "every LoRA B matrix is zero" in finding.evidence


def test_merged_weights_are_compared_with_their_adapter(folder: Path, tmp_path: Path, monkeypatch) -> None:
    from vla import merge
    from vla.doctor.weights import parent_agreement
    from vla.policy import load_policy

    merge.run(merge.Settings(folder / "run" / "policy", tmp_path / "merged"))
    merged = load_policy(tmp_path / "merged")
    assert parent_agreement(merged) == 1.0
    shutil.rmtree(shutil.copytree(folder / "run" / "policy", tmp_path / "gone"))
    entry = {**merged.spec.provenance[-1], "settings": {"policy": str(tmp_path / "gone")}}
    merged.spec = dataclasses.replace(merged.spec, provenance=(*merged.spec.provenance[:-1], entry))
    assert parent_agreement(merged) is None


@pytest.mark.parametrize(
    ("words", "sign"),
    [("+1 closes, -1 opens", 1), ("-1 opens, +1 closes", 1), ("1 = open, 0 = closed", -1), ("0 closes, 1 opens", -1), ("", None)],
)  # fmt: skip
def test_the_words_of_a_convention_are_read(words: str, sign: int | None) -> None:
    assert closing_sign(words) == sign


def test_the_command_line_takes_the_policy_without_a_flag(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    program, settings = cli.parse(["doctor", "runs/sft/policy", "--dataset", "a", "b", "--suite", "fake", "--strict"])
    assert (settings.policy, settings.dataset, settings.suite) == ("runs/sft/policy", (Path("a"), Path("b")), "fake")
    assert cli.main(["doctor", "nowhere", "--dry-run"]) == 0
    assert "actions: double delta (π0-FAST" in capsys.readouterr().out
    assert cli.main(["doctor", str(tmp_path / "nothing")]) == 2
    assert "expected a policy directory" in capsys.readouterr().err
    assert cli.main(["doctor", str(tmp_path), "--frames", "1"]) == 2


def test_the_toy_data_is_what_the_tests_think() -> None:
    steps = toy_episode(0).steps
    assert len(STATES) == len(ACTIONS) == 4 and steps[-1].success
    assert steps[1].observation.state is not None and steps[0].observation.state is not None
    np.testing.assert_allclose(
        steps[1].observation.state[:3] - steps[0].observation.state[:3], steps[0].action[:3], atol=1e-6
    )
