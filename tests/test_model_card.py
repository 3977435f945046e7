"""The model card: every figure from a file, metadata that the Hub reads, and the command beside it."""

import dataclasses
import json
import shutil

import pytest
from huggingface_hub import ModelCard
from test_policy import make

from vla import card_program, cli, merge
from vla.card_facts import clean_command, read_facts, run_facts
from vla.eval.results import EpisodeRow, EvalResult, to_json
from vla.files import append_jsonl, write_json
from vla.model_card import model_card, record_run
from vla.policy import load_policy
from vla.spec import read_spec
from vla.types import Task, VlaError

ROWS = [
    {"step": 1, "loss": 4.0, "lr": 0.1},
    {
        "step": 10,
        "holdout_loss": 1.25,
        "holdout_action_token_accuracy": 0.5,
        "free_running_action_token_accuracy": 0.375,
    },
    {"step": 20, "loss": 2.0, "lr": 0.01, "grad_norm": float("nan")},
    {"step": 20, "holdout_loss": 1.5, "holdout_action_token_accuracy": 0.625},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    policy = make(folder / "base", "llava")
    policy.save(
        folder / "run" / "policy", stage="finetune", settings={"data": ["hf://datasets/me/drawers@main", "local"]}
    )
    for row in ROWS:
        append_jsonl(folder / "run" / "metrics.jsonl", row)
    rows = tuple(
        EpisodeRow("open", i, 7 + i, i < 3, 12, 0, "crash" if i == 4 else None, 1.0, (5.0,)) for i in range(5)
    )  # fmt: skip
    command = "/opt/somewhere/bin/vla eval --policy run/policy --out runs/eval-toy"
    settings = {"policy": "run/policy", "suite": "fake", "episodes_per_task": 5, "seed": 7}
    result = EvalResult("run/policy", "fake", (Task("open", "open it", 20),), rows, settings, {"fake": "1"}, command,
                        {"name": "toy", "quantization": "none"}, 1.0, folder / "eval-toy")  # fmt: skip
    for row in rows:
        append_jsonl(folder / "eval-toy" / "episodes.jsonl", dataclasses.asdict(row))
    write_json(folder / "eval-toy" / "result.json", to_json(result))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_the_card_has_every_figure_and_its_command(folder, capsys):
    policy = folder / "run" / "policy"
    before = json.loads((policy / "policy.json").read_text())
    record_run(policy, folder / "run")
    argv = ["card", str(policy), "--eval", str(folder / "eval-toy"), "--license", "apache-2.0", "--datasets", "you/doors",
            "--limits", "It knows one kitchen."]  # fmt: skip
    assert cli.main(argv) == 0, capsys.readouterr().err
    card = ModelCard.load(policy / "README.md")  # parses the metadata as the Hub's own library does
    data = card.data
    assert (data.license, data.pipeline_tag, data.library_name, data.model_name) == (
        "apache-2.0",
        "robotics",
        "peft",
        "toy",
    )
    assert data.datasets == ["me/drawers", "you/doors"] and {"vla", "robotics"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_type, result.metric_type, result.metric_value) == (
        "robotics",
        "fake",
        "success_rate",
        0.75,
    )
    text = card.text
    for words in (
        "| held-out loss | 1.5 | `holdout_loss` |", "| lowest held-out loss | 1.25 |", "| training loss | 2 | `loss` |",
        "| held-out accuracy of action tokens, teacher-forced | 0.625 |", "free-running | 0.375 |", "Run `run`, 20 steps",
        "| all tasks | 75.0% | 30.1% to 95.4% | 3 of 4 | 1 |", "seed 7", "vla eval --policy run/policy --out runs/eval-toy",
        "| `toy` | not recorded | 10 | `", "- It knows one kitchen.", "in simulation (fake) only",
    ):  # fmt: skip
        assert words in text, words
    assert "/opt/somewhere" not in text and "nan" not in text
    assert json.loads((policy / "policy.json").read_text()) == before, "only the card changed"
    load_policy(policy)
    assert cli.main(argv) == 0 and len(read_facts(policy)["evaluations"]) == len(read_facts(policy)["runs"]) == 1


def test_without_evaluation_it_says_so(folder):
    card = model_card(read_spec(folder / "run" / "policy"), {"toy": {"num_transitions": 3, "num_trajectories": 2}})
    assert (
        "Its success rate has not been measured" in card and "| `toy` | 2 | 3 | `" in card and "## Training" not in card
    )
    assert ModelCard(card).data.license is None


def test_a_merged_policy_keeps_the_run_but_not_the_success_of_other_weights(folder):
    policy = folder / "run" / "policy"
    card_program.run(card_program.Settings(policy, eval=(folder / "eval-toy",), license="mit"))
    out = merge.run(merge.Settings(policy, folder / "merged"))
    facts = read_facts(out)
    assert (facts["license"], len(facts["runs"]), "evaluations" in facts) == ("mit", 1, False)
    text = (out / "README.md").read_text()
    assert "| held-out loss | 1.5 |" in text and "has not been measured" in text and "license: mit" in text


def test_what_a_card_does_not_take(folder):
    policy = folder / "run" / "policy"
    with pytest.raises(VlaError, match="no metrics.jsonl in .*empty; expected a training run's folder"):
        card_program.run(card_program.Settings(policy, run=(folder / "empty",)))
    with pytest.raises(VlaError, match="no result.json"):
        card_program.run(card_program.Settings(policy, eval=(folder / "run",)))
    with pytest.raises(VlaError, match="--datasets '/data/x'; expected OWNER/NAME"):
        card_program.run(card_program.Settings(policy, datasets=("/data/x",)))
    value = json.loads((folder / "eval-toy" / "result.json").read_text())
    value["policy"]["name"] = "other"
    write_json(folder / "eval-toy" / "result.json", value)
    with pytest.raises(VlaError, match="an evaluation of 'other' in .*expected one of 'toy'"):
        card_program.run(card_program.Settings(policy, eval=(folder / "eval-toy",)))
    (policy / "card.json").write_text("{")
    with pytest.raises(VlaError, match="card.json: .*delete it"):
        card_program.run(card_program.Settings(policy))


def test_commands_are_ours_and_without_machine_paths():
    assert clean_command("/home/me/.venv/bin/vla finetune --data 'a b' --out x") == "vla finetune --data 'a b' --out x"
    assert clean_command("python -m pytest") == clean_command("") == ""


def test_figures_of_a_run_are_its_last(folder):
    facts = run_facts(folder / "run")
    assert (facts["steps"], facts["figures"]["loss"], facts["figures"]["lowest_holdout_loss_step"]) == (20, 2.0, 10)
    assert "grad_norm" not in facts["figures"]
