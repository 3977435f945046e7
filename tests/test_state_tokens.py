"""Numbers of the prompt as vocabulary ids: the right ids in the right places, for every family and placement."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from families import FAMILIES
from openvla_tiny import write_checkpoint
from test_policy import STATISTICS
from training import fake_dataset, sft_settings, tiny_backbone
from transformers import AutoProcessor

from vla import merge
from vla.backbone import load_backbone
from vla.finetune import sft
from vla.finetune.sft_setup import build_policy, observation_of, open_datasets
from vla.inputs import FIRST_NUMBER, number_bins, prepare_prompt
from vla.new_policy import create_policy
from vla.number_tokens import SLOT, NumberTokens, n_own_ids, place_numbers
from vla.policy import LocalPolicy, load_policy
from vla.spec import ActionSpec, ImageSpec, PromptSpec, check, from_json, to_json
from vla.tokenizers.fast import FastTokenizer
from vla.tokenizers.placement import Placement
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import Observation, VlaError

BINS = 32
LOW, HIGH = (0.0, 0.0, -1.0), (1.0, 1.0, 1.0)
TEXT = PromptSpec("{instruction} State: {state}. Out:", True, ("u", "v", "w"), LOW, HIGH, BINS)
TOKENS = dataclasses.replace(TEXT, numbers_as="tokens", state_optional=True)
STATES = np.float32([[0.0, 0.5, 0.0], [0.99, 0.1, -2.0], [0.2, 1.0, 0.7]])
WORDS = ["open the drawer", "close the window right now, please", "press it"]


def make(folder, family="llava", prompt=TOKENS, **options) -> LocalPolicy:
    FAMILIES[family](folder)
    if options.get("placement") == "reserved":
        processor = AutoProcessor.from_pretrained(folder)
        processor.tokenizer.add_tokens([f"<reserved_{i}>" for i in range(80)])
        processor.save_pretrained(folder)
    torch.manual_seed(0)
    return create_policy(
        str(folder), name="toy", action=ActionSpec(("a", "b"), 3), image=ImageSpec(("cam",), 32), prompt=prompt,
        statistics=STATISTICS, unnorm_key="toy", **{"tokenizer": UniformTokenizer(64), "lora_r": 4, **options},
    )  # fmt: skip


def observations(states=STATES) -> list[Observation]:
    rng = np.random.default_rng(0)
    return [
        Observation({"cam": rng.integers(0, 255, (48, 40, 3), dtype=np.uint8)}, state, words, (3, i))
        for i, (state, words) in enumerate(zip(states, WORDS, strict=False))
    ]


def fast() -> FastTokenizer:
    return FastTokenizer(max_vocab=60).fit(np.random.default_rng(0).uniform(-1, 1, (60, 3, 2)))


def expected_ids(policy: LocalPolicy) -> np.ndarray:
    """(B, 3): the ids that the states should be, by the saved spec alone."""
    ids = np.asarray(Placement.load(policy.spec.prompt.number_ids).ids)
    share = np.clip((STATES - np.array(LOW)) / (np.array(HIGH) - np.array(LOW)), 0, 1)
    return ids[np.minimum((share * BINS).astype(int), BINS - 1)]


def assert_spliced(policy: LocalPolicy) -> None:
    """Each row is the row of the same prompt with three slots, and in their places the ids of the state."""
    seen = observations()
    inputs = policy.encode(seen)
    numbers = policy.backbone._numbers
    assert numbers is not None
    slot = numbers.processor.tokenizer.convert_tokens_to_ids(SLOT)
    prompts = [prepare_prompt(observation, policy.spec.prompt) for observation in seen]
    texts = ["".join(SLOT if ord(c) >= FIRST_NUMBER else c for c in prompt) for prompt in prompts]
    for row, text, ids, mask in zip(
        inputs["input_ids"], texts, expected_ids(policy), inputs["attention_mask"], strict=True
    ):
        words = numbers.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        at = [i for i, id_ in enumerate(words) if id_ == slot]
        assert len(at) == 3 and np.diff(at).tolist() == [1, 1]
        for place, id_ in zip(at, ids.tolist(), strict=True):
            words[place] = id_
        content = row[mask.bool()].tolist()
        assert any(content[i : i + 3] == ids.tolist() for i in range(len(content)))
        tail = words[at[0] - 1 :]  # BOS, templates and image tokens come before, and some families' newline after
        assert any(content[i : i + len(tail)] == tail for i in range(len(content)))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("placement", ["added", "tail"])
def test_the_ids_of_a_state_stand_in_the_prompt(tmp_path, family, placement):
    assert_spliced(make(tmp_path / "base", family, placement=placement))


def test_reserved_ids_and_ids_of_their_own_below_the_tail(tmp_path):
    reserved = make(tmp_path / "r", placement="reserved")
    assert_spliced(reserved)
    assert reserved.spec.prompt.number_ids["kind"] == "reserved"
    own = make(tmp_path / "t", placement="tail", tokenizer=UniformTokenizer(16))
    assert_spliced(own)
    assert own.spec.tokens.placement == {"kind": "tail", "first_id": 299, "step": -1, "n": 16}
    assert own.spec.prompt.number_ids == {"kind": "tail", "first_id": 283, "step": -1, "n": 32}


def test_openvla_too(tmp_path):
    write_checkpoint(tmp_path / "base")
    statistics = {"d": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}}}
    image = ImageSpec(("cam",), load_backbone(str(tmp_path / "base")).config.image_sizes[0])
    policy = create_policy(
        str(tmp_path / "base"), name="o", action=ActionSpec(tuple("abcdefg"), 1), image=image, prompt=TOKENS,
        statistics=statistics, placement="tail", lora_r=4,
    )  # fmt: skip
    assert_spliced(policy)
    assert policy.spec.prompt.number_ids["first_id"] == 31999
    assert all(chunk.ok for chunk in policy.act(observations()))


def test_a_number_is_the_action_token_at_the_same_place_of_its_range(tmp_path):
    policy = make(tmp_path / "base")  # 32 bins on 64 symbols
    assert policy.spec.tokens.n_added == 64
    actions = Placement.load(policy.spec.tokens.placement).ids
    assert Placement.load(policy.spec.prompt.number_ids).ids == actions[::2]
    equal = make(tmp_path / "equal", prompt=dataclasses.replace(TOKENS, state_bins=64))
    assert equal.spec.prompt.number_ids == equal.spec.tokens.placement


def test_other_schemes_and_too_few_bins_give_the_numbers_ids_of_their_own(tmp_path):
    policy = make(tmp_path / "base", tokenizer=fast())
    n = policy.codec.tokenizer.vocab_size
    numbers, actions = Placement.load(policy.spec.prompt.number_ids), Placement.load(policy.spec.tokens.placement)
    assert policy.spec.tokens.n_added == n + BINS and actions.n_symbols == n
    assert not set(numbers.ids) & set(actions.ids) and len(policy.legal_ids) == n
    assert_spliced(policy)
    trained = policy.backbone.model.get_input_embeddings().token_adapter.token_indices["default"]
    assert set(numbers.ids) <= set(trained)
    policy.save(tmp_path / "policy", stage="finetune", settings={})
    again = load_policy(tmp_path / "policy")
    assert torch.equal(again.encode(observations())["input_ids"], policy.encode(observations())["input_ids"])
    for mine, theirs in zip(policy.act(observations()), again.act(observations()), strict=True):
        assert np.array_equal(mine.token_ids, theirs.token_ids)
    few = UniformTokenizer(16).grammar(3, 2)
    assert (n_own_ids(TOKENS, 16, few), n_own_ids(TEXT, 16, few)) == (BINS, 0)


@pytest.mark.parametrize("tokenizer", [UniformTokenizer(64), fast()], ids=["shared", "own"])
def test_merged_weights_act_the_same(tmp_path, tokenizer):
    policy = make(tmp_path / "base", tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in policy.backbone.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    policy.save(tmp_path / "policy", stage="finetune", settings={})
    merge.run(merge.Settings(policy=tmp_path / "policy", out=tmp_path / "merged"))
    again = load_policy(tmp_path / "merged")
    for mine, theirs in zip(policy.act(observations()), again.act(observations()), strict=True):
        assert np.array_equal(mine.token_ids, theirs.token_ids)


def test_prompts_of_different_lengths_do_not_disturb_one_another(tmp_path):
    policy, seen = make(tmp_path / "base"), observations()
    seen[1] = dataclasses.replace(seen[1], state=None)  # "unknown": text among ids
    ids = torch.from_numpy(np.array(policy.codec.legal_ids[:6]))[None].repeat(3, 1)
    with torch.no_grad():
        together = policy.backbone.action_logits(policy.encode(seen), ids)
        alone = [policy.backbone.action_logits(policy.encode([o]), ids[:1]) for o in seen]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-4, rtol=1e-3)
    pairs = zip(policy.act(seen), [policy.act([o])[0] for o in seen], strict=True)
    assert all(np.array_equal(one.token_ids, other.token_ids) for one, other in pairs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_whichever_side_is_padded(tmp_path, side):
    FAMILIES["llava"](tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    numbers = NumberTokens(processor, range(100, 100 + BINS))
    numbers.processor.tokenizer.padding_side = side
    one, two = chr(FIRST_NUMBER + 7), chr(FIRST_NUMBER + 31)
    texts, bins = numbers.taken_out([f"a{one}{two}b", f"{two} a long sentence", "none"])
    rows = numbers.processor.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)["input_ids"]
    spliced = numbers.put_in(rows, bins)
    assert torch.equal((spliced != rows).sum(1), torch.tensor([2, 1, 0]))
    assert spliced[0][spliced[0] != rows[0]].tolist() == [107, 131] and spliced[1][spliced[1] != rows[1]].tolist() == [
        131
    ]
    assert len(processor.tokenizer) == 300, "the policy's own tokenizer has not learned the slot"


def test_text_and_tokens_show_the_same_bins_and_tokens_are_fewer(tmp_path):
    policy = make(tmp_path / "base", prompt=dataclasses.replace(TOKENS, state_bins=64))
    digits = make(tmp_path / "text", prompt=dataclasses.replace(TEXT, state_bins=64))
    seen = observations()[:1]
    shown = [ord(c) - FIRST_NUMBER for c in prepare_prompt(seen[0], policy.spec.prompt) if ord(c) >= FIRST_NUMBER]
    assert " ".join(map(str, shown)) in prepare_prompt(seen[0], digits.spec.prompt)
    as_text, as_tokens = (p.encode(seen)["input_ids"].shape[1] for p in (digits, policy))
    assert as_text - as_tokens >= 4  # 3 numbers of 2 digits and 2 spaces in this tokenizer


def test_bins_cover_their_range_and_clip():
    values = np.linspace(-0.5, 1.5, 201)[:, None]
    bins = number_bins(values, (0.0,), (1.0,), 10)[:, 0]
    assert bins.min() == 0 and bins.max() == 9 and (np.diff(bins) >= 0).all()
    assert number_bins(np.float32([[5.0]]), (2.0,), (2.0,), 10).item() == 9  # a constant dimension


def test_rows_in_a_saved_policy_are_found_again_and_old_ones_open(tmp_path):
    policy = make(tmp_path / "base", placement="tail")
    policy.save(tmp_path / "policy", stage="finetune", settings={})
    assert SLOT not in (tmp_path / "policy" / "tokenizer" / "tokenizer.json").read_text()
    again = load_policy(tmp_path / "policy")
    assert torch.equal(again.encode(observations())["input_ids"], policy.encode(observations())["input_ids"])
    value = to_json(make(tmp_path / "old", prompt=TEXT).spec)
    for name in ("history", "history_low", "history_high", "history_optional", "numbers_as", "number_ids"):
        del value["prompt"][name]
    assert from_json(json.loads(json.dumps(value))).prompt == TEXT


def test_training_with_either_loss_and_samples_of_many_lengths(tmp_path):
    fake_dataset(tmp_path)
    tiny_backbone(tmp_path)
    for loss_over in ("vocabulary", "actions"):
        settings = sft_settings(
            tmp_path, out=tmp_path / loss_over, numbers_as="tokens", bins=256, history=2, state_dropout=0.3, steps=2,
            loss_over=loss_over,
        )  # fmt: skip
        policy = load_policy(sft.run(settings))
        assert policy.spec.prompt.numbers_as == "tokens" and policy.spec.tokens.n_added == 256
    learned = sft_settings(tmp_path, out=tmp_path / "vq", numbers_as="tokens", tokenizer="fast", steps=1)
    dataset, statistics = open_datasets(learned)
    policy = build_policy(learned, dataset, statistics, "cpu")
    assert policy.spec.tokens.n_added == policy.codec.tokenizer.vocab_size + 256
    policy.act([observation_of(dataset[0])])


def test_what_is_refused(tmp_path):
    policy = make(tmp_path / "base")
    blank = observations()[0]
    with pytest.raises(VlaError, match="characters that stand for numbers"):
        policy.encode([dataclasses.replace(blank, instruction="go " + chr(FIRST_NUMBER))])
    with pytest.raises(VlaError, match="places for numbers in the prompts.*take .* out of the instruction"):
        policy.encode([dataclasses.replace(blank, instruction=f"go {SLOT}")])
    with pytest.raises(VlaError, match="got no state; expected .*u, v, w"):
        make(tmp_path / "strict", prompt=dataclasses.replace(TOKENS, state_optional=False)).encode(
            [dataclasses.replace(blank, state=None)]
        )
    with pytest.raises(VlaError, match="numbers as tokens with placement 'text'"):
        make(tmp_path / "text", placement="text")
    with pytest.raises(VlaError, match="added_init 'numbers' with 32 ids of the numbers' own"):
        make(tmp_path / "own", tokenizer=UniformTokenizer(16), added_init="numbers")
    with pytest.raises(VlaError, match="--numbers-as tokens without state and history"):
        sft_settings(tmp_path, numbers_as="tokens", state=False)
    spec = policy.spec
    with pytest.raises(VlaError, match="got 0 number ids with numbers_as 'tokens'; expected 32 for tokens"):
        check(dataclasses.replace(spec, prompt=dataclasses.replace(spec.prompt, number_ids={})))
    with pytest.raises(VlaError, match="got 32 number ids with numbers_as 'text'"):
        check(dataclasses.replace(spec, prompt=dataclasses.replace(spec.prompt, numbers_as="text")))


def test_dividing_ids_between_actions_and_numbers():
    placed = Placement.tail(300, 40, model_vocab_size=400)
    actions, prompt = place_numbers(TOKENS, placed, 8)
    assert actions.ids == tuple(range(299, 291, -1)) and Placement.load(prompt.number_ids).ids == placed.ids[8:]
    actions, prompt = place_numbers(TEXT, Placement.tail(300, 8, model_vocab_size=400), 8)
    assert actions.n_symbols == 8 and prompt == TEXT
