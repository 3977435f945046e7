"""The policy: a backbone, an action codec, statistics and preprocessing as one thing that is saved and loaded whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from vla.adapters import (
    add_action_tokens,
    parameter_counts,
    quantize_base,
)
from vla.backbone import DTYPES, Backbone, fingerprint, load_backbone
from vla.hub_policy import policy_folder
from vla.inputs import prepare_images, prepare_prompt
from vla.kbit import require_bitsandbytes
from vla.language_motion import asked, choose_phrases, phrase_grammar, with_motions
from vla.lean_lora import lean_lora
from vla.normalize import ActionNormalizer, Statistics, action_normalizer, choose_key, gripper_to_robot
from vla.openvla import oft_policy
from vla.policy_files import STATISTICS_FILE, read_statistics, save_policy
from vla.quantize import quantize_loaded, quantized_options, weight_bytes
from vla.spec import (
    FILE,
    HEAD_FOLDER,
    ImageSpec,
    PolicySpec,
    read_spec,
    read_tokenizer,
)  # fmt: skip
from vla.token_rows import lean_token_rows
from vla.tokenizers.chunk_codec import ActionCodec
from vla.tokenizers.grammar import IdGrammar
from vla.tokenizers.placement import Placement
from vla.tokenizers.protocol import PAD, ActionTokenizer
from vla.types import ActionChunk, Observation, VlaError, problem


class LocalPolicy:
    """A policy in this process. See `vla.types.Policy`."""

    def __init__(
        self, spec: PolicySpec, backbone: Backbone, statistics: Statistics, tokenizer: ActionTokenizer, *,
        unnorm_key: str | None = None, temperature: float = 0.0, quantization: str = "none",
    ) -> None:  # fmt: skip
        """
        Args:
            tokenizer: the action tokenizer that `spec.tokens` names.
            unnorm_key: whose statistics turn tokens into physical actions; default: the spec's, or the only one.
            temperature: 0 acts greedily; above, `Observation.key` decides the draw.
            quantization: what was done to the weights, for `metadata`.
        """
        self.spec, self.backbone, self.statistics = spec, backbone, statistics
        self.unnorm_key = choose_key(statistics, unnorm_key or spec.unnorm_key)
        self.normalizer = action_normalizer(statistics, self.unnorm_key, spec.action.dim, spec.action.normalization)
        self.temperature = temperature
        self.quantization = quantization
        placement = Placement.load(spec.tokens.placement)
        words = backbone.processor.tokenizer
        # Reserved tokens may be registered as special; ending the text is the one meaning an action id cannot share.
        reserved = spec.tokens.placement["kind"] == "reserved"
        special = [words.eos_token_id] if reserved else words.all_special_ids
        placement.check(backbone.n_embeddings, special)
        self.codec = ActionCodec(tokenizer, placement, spec.action.horizon, spec.action.dim)
        self.legal_ids = torch.from_numpy(np.array(self.codec.legal_ids))
        """int64 (n_symbols,), ascending: ids that may stand anywhere. `codec.grammar` says which of them where."""
        if spec.head is not None:
            oft_policy.check_head(spec, backbone, self.codec, temperature)
        if spec.prompt.numbers_as == "tokens":
            numbers = Placement.load(spec.prompt.number_ids)
            backbone.show_numbers_as(numbers.check(backbone.n_embeddings, special).ids)

    @property
    def metadata(self) -> dict[str, Any]:
        trainable, total = parameter_counts(self.backbone.model)
        return {
            "name": self.spec.name, "horizon": self.spec.action.horizon, "action_dim": self.spec.action.dim,
            "action_names": list(self.spec.action.names), "cameras": list(self.spec.image.cameras),
            "image_size_px": self.spec.image.size_px, "state_names": list(self.spec.state_names),
            "unnorm_key": self.unnorm_key, "unnorm_keys": sorted(self.statistics), "temperature": self.temperature,
            "quantization": self.quantization, "backbone": dataclasses.asdict(self.spec.backbone),
            "n_parameters": total, "weight_bytes": weight_bytes(self.backbone.model), "control_hz": self.spec.action.control_hz, "delta": self.spec.action.delta,
            "gripper_convention": self.spec.action.gripper_convention, "history": self.spec.prompt.history,
            "motions": list(self.spec.motion.phrases) if self.spec.motion else [],
            "optional_inputs": [name for name, optional in (
                ("state", self.spec.prompt.state_optional), ("past_actions", self.spec.prompt.history_optional)) if optional],
        }  # fmt: skip

    def reset(self) -> None:
        """Nothing is remembered between queries."""

    def encode(
        self, observations: Sequence[Observation], image: ImageSpec | None = None, datasets: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Model inputs of B observations. With language motions: of the action query where an observation carries a motion,
        else of the motion query.

        Args:
            image: how frames are prepared, if not as the policy's spec says.
            datasets: by whose statistics each state is normalised, where a head is given it; default: `unnorm_key`.
        """
        images = [prepare_images(observation, image or self.spec.image) for observation in observations]
        prompts = [prepare_prompt(*asked(observation, self.spec)) for observation in observations]
        if self.spec.head is not None:
            keys = datasets or [self.unnorm_key] * len(observations)
            states = oft_policy.normalized_states(self.spec, self.statistics, observations, keys)
            return oft_policy.encode(self.backbone, prompts, images, states)
        return self.backbone.encode(prompts, images)

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        if not observations:
            return []
        observations = self.with_motions(observations)
        keys = [observation.key for observation in observations]
        if self.spec.head is not None:
            return self._act_at_once(self.encode(observations), keys)
        ids, logprobs = self.backbone.sample(self.encode(observations), self.codec.grammar, self.temperature, keys)
        token_ids, logprob_rows = ids.cpu().numpy(), logprobs.float().cpu().numpy()
        normalized, ok = self.codec.decode(token_ids)
        actions = self.to_robot(self.normalizer.unnormalize(normalized))
        lengths = (token_ids != PAD).sum(axis=1)
        return [
            ActionChunk(actions[i], token_ids[i, :n], logprob_rows[i, :n], bool(ok[i]), observations[i].motion)
            for i, n in enumerate(lengths)
        ]

    def with_motions(self, observations: Sequence[Observation]) -> Sequence[Observation]:
        """Each observation with the language motion to act by; as they are, for a policy without."""
        if self.spec.motion is None:
            return observations
        return with_motions(observations, lambda rows: choose_phrases(self.backbone, self.encode(rows), self.phrases))

    @cached_property
    def phrases(self) -> IdGrammar:
        """What may be said in answer to a motion query. VlaError for a policy without language motions."""
        if self.spec.motion is None:
            raise problem("a policy without language motions", "one with", "train it with --language-motion")
        return phrase_grammar(self.backbone, self.spec.motion)

    def _act_at_once(self, inputs: dict[str, torch.Tensor], keys: list[tuple[int, ...]]) -> list[ActionChunk]:
        assert self.spec.head is not None
        normalized, ids, logprobs = oft_policy.answer(
            self.backbone, self.codec, self.spec.head.kind, inputs, self.temperature, keys
        )
        actions = self.to_robot(self.normalizer.unnormalize(normalized))
        if ids is None or logprobs is None:
            return [ActionChunk(row) for row in actions]
        return [ActionChunk(*row) for row in zip(actions, ids, logprobs, strict=True)]

    def to_robot(self, actions: np.ndarray) -> np.ndarray:
        """Actions (..., D) as the data has them -> as the robot wants them: only the gripper can differ."""
        spec = self.spec.action
        return gripper_to_robot(
            actions, spec.gripper_dim, spec.gripper_range, spec.gripper_threshold, spec.gripper_invert
        )

    def action_token_ids(self, actions: np.ndarray, dataset: str) -> torch.Tensor:
        """Physical actions (B, H, D) of one dataset -> int64 ids (B, T), padded with -1."""
        return torch.from_numpy(self.codec.encode(self.normalizer_of(dataset).normalize(actions)))

    def normalizer_of(self, dataset: str) -> ActionNormalizer:
        """Between the actions of one dataset, in physical units, and [-1, 1]."""
        action = self.spec.action
        return action_normalizer(self.statistics, dataset, action.dim, action.normalization)

    def legal_mask(self, token_ids: torch.Tensor) -> torch.Tensor | None:
        """Which of `legal_ids` stood open at each place of complete rows: ids (B, T) -> bool (B, T, n_symbols).

        None where all of them always do; padded places count as open.
        """
        if self.codec.grammar.free:
            return None
        return torch.from_numpy(self.codec.grammar.row_masks(token_ids.cpu().numpy())).to(token_ids.device)

    def save(
        self, folder: Path, *, stage: str, settings: dict[str, Any], refer: bool = False,
        weights: dict[str, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Write the policy directory, whole or not at all; an existing one at `folder` is replaced.

        Args:
            refer: weights that are those at `spec.backbone.source` are not copied.
            weights: parameters by name, instead of the model's own, where those are sharded over processes.
        """
        save_policy(
            folder, self.spec, self.backbone, self.statistics, self.codec.tokenizer, stage=stage, settings=settings, refer=refer,
            weights=weights,
        )  # fmt: skip


def load_policy(
    path: str | Path, *, device: str = "cpu", dtype: str = "float32", quantization: str = "none",
    unnorm_key: str | None = None, temperature: float = 0.0, trainable: bool = False, full_base: bool = False,
) -> LocalPolicy:  # fmt: skip
    """Open a policy directory, here or on the Hub.

    Args:
        path: a folder, OWNER/NAME, or hf://OWNER/NAME@REVISION (`vla.hub_policy`).
        quantization: none, int8 or nf4; needs merged weights (`vla merge`).
        trainable: the adapter's parameters get gradients.
        full_base: an adapter trained on a base in 4 bits (qlora) is put on the full one instead.

    Raises:
        VlaError: anything missing, corrupt or contradictory, with the file and the fix.
    """
    folder = policy_folder(path)
    spec = read_spec(folder)
    statistics = read_statistics(folder / STATISTICS_FILE)
    tokenizer = read_tokenizer(folder, spec)
    merged, adapted = (spec.backbone.weights == kind for kind in ("merged", "adapter"))
    weights = folder / ("model" if merged else "adapter")
    if (merged or adapted) and not weights.is_dir():
        raise problem(f"no {weights.name}/ in {folder}", f"it, as {FILE} says weights={spec.backbone.weights!r}",
                      "restore the folder from a copy of the policy")  # fmt: skip
    if quantization != "none" and adapted:
        raise problem(f"quantization {quantization} of an adapter policy", "merged weights",
                      f"vla merge --policy {folder} --out MERGED, then quantize MERGED")  # fmt: skip
    packed = adapted and spec.backbone.quantization == "nf4" and not full_base
    if packed:
        require_bitsandbytes(f"{folder}, trained by qlora,")
    options, done = quantized_options(quantization, device)
    source = str(weights) if merged else spec.backbone.source
    processor_path = folder / "processor" if merged else None
    if not merged and spec.backbone.revision is not None:
        options["revision"] = spec.backbone.revision
    backbone = load_backbone(
        source, processor_path=processor_path, dtype=dtype, device="cpu" if packed else device, **options
    )
    backbone.model = quantize_loaded(backbone.model, done)
    if spec.backbone.model_type and backbone.config.model_type != spec.backbone.model_type:
        raise problem(f"a {backbone.config.model_type} model at {source}", spec.backbone.model_type,
                      "restore the backbone the policy was trained on")  # fmt: skip
    if not merged and done == "none":
        found = fingerprint(backbone.model)
        if spec.backbone.fingerprint not in ("", found):
            raise problem(f"weights {found} at {source}", f"{spec.backbone.fingerprint}, which the {'adapter' if adapted else 'policy'} was "
                          + ("trained on" if adapted else "imported from"), "restore those weights, or fine-tune again on the new ones")  # fmt: skip
    if adapted:
        if spec.tokens.n_added:
            add_action_tokens(backbone, spec.tokens.n_added, spec.tokens.added_init)
        if packed:
            quantize_base(backbone, DTYPES[dtype], device)
            done = "bitsandbytes-nf4"
        try:
            backbone.model = PeftModel.from_pretrained(backbone.model, str(weights), is_trainable=trainable).eval()
            lean_token_rows(backbone.model)
            lean_lora(backbone.model)
        except Exception as error:  # safetensors, JSON, shape and key errors have no common base
            raise VlaError(f"{weights} cannot be loaded onto {source}: {error}; expected the adapter this policy was "
                           "saved with; fix: restore the folder from a copy") from error  # fmt: skip
    if spec.head is not None:
        from vla.openvla.oft_model import read_parts, train_parts

        read_parts(folder / HEAD_FOLDER, backbone.model, spec.head, spec.action.dim, DTYPES[dtype])
        if trainable:
            train_parts(backbone.model)
    return LocalPolicy(
        spec, backbone, statistics, tokenizer, unnorm_key=unnorm_key, temperature=temperature, quantization=done
    )
