"""A pretrained vision-language model of any family that `AutoModelForImageTextToText` opens, as action code sees it.

Families differ in chat templates, image placeholders, extra per-token inputs and who may attend to whom. The three
operations here hide that: `encode` (images + text -> left-padded batch), `action_logits` (teacher-forced) and `sample`.
Action ids are appended as ids, never as text, so nothing is re-tokenised.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedConfig

from vla.decoding import ActionSampler, AllComplete, gumbel_noise
from vla.fold_norms import fold_frozen_norms
from vla.number_tokens import NumberTokens
from vla.token_rows import only_rows
from vla.tokenizers.grammar import IdGrammar
from vla.types import VlaError, problem

TINY = "tiny"
TINY_PATH = Path(__file__).parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_source(source: str) -> str:
    """'tiny' becomes the packaged weights; anything else is a path or Hub id and stays as it is.

    Raises:
        VlaError: a bare name that is neither a folder nor of the form owner/name.
    """
    if source == TINY:
        return str(TINY_PATH)
    if not Path(source).exists() and "/" not in source:
        near = difflib.get_close_matches(source, [TINY], 1, 0.3)
        hint = f"did you mean {near[0]!r}?" if near else "pass 'tiny', a folder, or a Hub id such as owner/name"
        raise problem(f"backbone {source!r}", "'tiny', a checkpoint folder, or owner/name on the Hub", hint)
    return source


def load_backbone(
    source: str,
    *,
    processor_path: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    **options: Any,
) -> Backbone:
    """Open a checkpoint with stock transformers, or OpenVLA's with our own classes; safetensors only, no remote code.

    Args:
        processor_path: where the processor is, if not in `source`.
        options: passed to `from_pretrained` (revision, quantization_config, ...).
    """
    path = resolve_source(source)
    if dtype not in DTYPES:
        raise problem(f"dtype {dtype!r}", f"one of {', '.join(DTYPES)}", "correct --dtype")
    try:
        if _model_type(path, options.get("revision")) == "openvla":
            from vla.openvla.checkpoint import open_openvla

            model, processor = open_openvla(path, processor_path or path, dtype=DTYPES[dtype], **options)
        else:
            processor = AutoProcessor.from_pretrained(str(processor_path or path))
            model = AutoModelForImageTextToText.from_pretrained(
                path, dtype=DTYPES[dtype], use_safetensors=True, **options
            )
    except (OSError, ValueError, KeyError) as error:
        raise VlaError(f"{source} cannot be opened as an image-text-to-text model: {error}; expected a checkpoint that "
                       "AutoModelForImageTextToText loads, with its processor; fix: check the path") from error  # fmt: skip
    if "quantization_config" not in options:
        model = cast(Any, model).to(device)
        if device == "cpu":  # convolutions run 1.5 times as fast; values differ by rounding only
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    cast(Any, module).to(memory_format=torch.channels_last)
        fold_frozen_norms(model)
    return Backbone(model.eval(), processor)


def _model_type(path: str, revision: str | None) -> str | None:
    """`model_type` of a folder's or Hub repository's config.json."""
    return PreTrainedConfig.get_config_dict(path, revision=revision)[0].get("model_type")


class Backbone:
    """A model and its processor. `model` may be a PEFT model around the original."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self._numbers: NumberTokens | None = None
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # prompts then end in one column and action ids form a rectangle after it
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # A checkpoint's own repetition penalty, top-p or suppressed tokens would distort the action distribution, and
        # passing a config to `generate` does not help: missing fields are filled from this one.
        model.generation_config = GenerationConfig(
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def n_embeddings(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    def show_numbers_as(self, ids: Sequence[int]) -> None:
        """From now on the prompts' number characters (`vla.number_tokens`) become these ids, one per bin."""
        self._numbers = NumberTokens(self.processor, ids)

    def encode(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, torch.Tensor]:
        """Model inputs of B prompts, left-padded; `input_ids` is (B, prompt length)."""
        if self._numbers is None:
            inputs = self._processed(self.processor, prompts, images)
        else:
            texts, bins = self._numbers.taken_out(prompts)
            inputs = self._processed(self._numbers.processor, texts, images)
            inputs["input_ids"] = self._numbers.put_in(inputs["input_ids"], bins)
        inputs.pop("labels", None)  # PaliGemma's processor returns an all-ignored one
        return {
            name: value.to(self.device, self.model.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in inputs.items()
        }

    def action_logits(
        self,
        inputs: dict[str, torch.Tensor],
        token_ids: torch.Tensor,
        model: Any = None,
        only_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T, V) logits that predict each of `token_ids` (B, T), given the prompt and the ids before it.

        Rows may be padded at their end with -1; what is predicted there means nothing.

        Args:
            model: what to call instead of `self.model`, e.g. its wrapper for data-parallel training.
            only_ids: int64 (n,); the answer is then (B, T, n), and the logits of other ids are never computed.
        """
        n_tokens = token_ids.shape[1]
        pad = self.processor.tokenizer.pad_token_id
        extended = self._extend(inputs, torch.where(token_ids < 0, pad, token_ids)[:, :-1])
        with only_rows(self.model, only_ids):
            return (model or self.model)(**extended, logits_to_keep=n_tokens, use_cache=False).logits[:, -n_tokens:]

    @torch.no_grad()
    def sample(
        self,
        inputs: dict[str, torch.Tensor],
        grammar: IdGrammar,
        temperature: float = 0.0,
        keys: Sequence[tuple[int, ...]] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One complete row of `grammar` per prompt, and the log-probability of each id over those legal at its place.

        Both are (B, T). Rows that end before the longest are padded with id -1 and log-probability 0.

        Args:
            temperature: 0 is greedy.
            keys: one per row, the identity its noise is drawn from; needed when temperature > 0.
        """
        batch = inputs["input_ids"].shape[0]
        noise = None
        if temperature > 0:
            if len(keys) != batch or not all(keys):
                raise ValueError("sampling needs one non-empty key per row")
            noise = gumbel_noise(keys, len(grammar.ids))
        sampler = ActionSampler(grammar, temperature, noise, self.processor.tokenizer.pad_token_id, self.device)
        # In a grammar of one length, no row ends early: transformers then needs no word from the device at each step.
        until = (
            {"min_new_tokens": grammar.max_tokens} if grammar.free else {"stopping_criteria": [AllComplete(sampler)]}
        )
        self.model.generate(
            **inputs, logits_processor=[sampler], do_sample=False, max_new_tokens=grammar.max_tokens, **until,
            synced_gpus=False,  # where training shards the model, it is whole while it acts: no process waits for another
        )  # fmt: skip
        return sampler.token_ids, sampler.logprobs

    def _processed(self, processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
        """What `processor`, ours or a copy of it, makes of them."""
        if self.config.model_type == "openvla":
            return processor.encode(prompts, images)
        texts = [self.text(prompt, len(row)) for prompt, row in zip(prompts, images, strict=True)]
        return processor(
            images=[list(row) for row in images], text=texts, padding=True, return_tensors="pt",
            add_special_tokens=not self._templated,
        )  # fmt: skip

    @property
    def _templated(self) -> bool:
        return bool(self.processor.chat_template)

    def text(self, prompt: str, n_images: int) -> str:
        """What the processor is given for a prompt and its images: chat template and image placeholders added."""
        if self._templated:
            content = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
            messages = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if self.config.model_type == "paligemma":
            return self.processor.image_token * n_images + prompt  # BOS and the newline come from its processor
        return self.processor.image_token * n_images + "\n" + prompt

    def _extend(self, inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """`inputs` with `ids` (B, t) appended and every other per-token input grown to match."""
        extended = dict(inputs)
        extended["input_ids"] = torch.cat([inputs["input_ids"], ids.to(self.device)], dim=1)
        extended["attention_mask"] = _grow(inputs["attention_mask"], ids.shape[1], 1)
        if "token_type_ids" in inputs:  # PaliGemma: 1 marks the causal suffix; elsewhere 0 is text
            suffix = 1 if self.config.model_type == "paligemma" else 0
            extended["token_type_ids"] = _grow(inputs["token_type_ids"], ids.shape[1], suffix)
        if "mm_token_type_ids" in inputs:
            extended["mm_token_type_ids"] = _grow(inputs["mm_token_type_ids"], ids.shape[1], 0)
        return extended


def fingerprint(model: Any) -> str:
    """16 hex digits that change with the weights: names, shapes and up to 64 values of every parameter, as bfloat16.

    An adapter on other weights than it was trained on still loads, and acts wrongly without a word.
    """
    return fingerprint_of(sorted(model.named_parameters()))


def fingerprint_of(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`fingerprint` of parameters given in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _grow(tensor: torch.Tensor, n: int, value: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_full((tensor.shape[0], n), value)], dim=1)
