"""What OpenVLA's checkpoints call PrismaticProcessor: a Llama tokenizer and the image transform, from the published files.

The image transform is torchvision's on Pillow images (resize, centre crop, to [0, 1], normalise), once per featurizer, the
results stacked along the channels. It is written out here because it is short, and only Pillow decides its pixels.

Trap: published preprocessor_config.json files hold their mean and standard deviation twice. `means` and `stds` are exact;
`tvf_normalize_params`, rounded to bfloat16 when the checkpoint was converted, are what the authors' code really applies.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from vla.files import write_json
from vla.openvla.config import HUB_CODE, IMAGE_TOKEN_ID
from vla.types import VlaError, problem

IMAGE_FILE, TOKENIZER_FILE = "preprocessor_config.json", "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPACE = "▁"
"""Id 29871 of Llama-2's vocabulary. In training, "Out: " and the action's characters became ":", this token, actions; a
prompt that ends in "Out:" lacks it."""
STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
PILLOW_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
TVF_LISTS = ("tvf_resize_params", "tvf_crop_params", "tvf_normalize_params")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class OpenVlaImageProcessor:
    """Pillow images -> float32 `pixel_values` (B, 3 or 6, h, w), by the values of a preprocessor_config.json."""

    def __init__(self, values: dict[str, Any]) -> None:
        """
        Raises:
            VlaError: fields are missing or contradict each other.
        """
        needed = ("image_resize_strategy", "input_sizes", "interpolations", "means", "stds")
        missing = [name for name in needed if name not in values]
        if missing:
            raise problem(f"{IMAGE_FILE} without {', '.join(missing)}", f"all of {', '.join(needed)}",
                          "restore the file from the checkpoint")  # fmt: skip
        if values["image_resize_strategy"] not in STRATEGIES:
            raise problem(f"image_resize_strategy {values['image_resize_strategy']!r}", f"one of {', '.join(STRATEGIES)}",
                          f"correct {IMAGE_FILE}")  # fmt: skip
        lists = [name for name in (*needed[1:], *TVF_LISTS) if name in values]
        if len({len(values[name]) for name in lists}) != 1:
            raise problem(f"{IMAGE_FILE} with {', '.join(f'{len(values[name])} {name}' for name in lists)}",
                          "one entry per featurizer in each", "restore the file from the checkpoint")  # fmt: skip
        self.values = {**_derived(values), **copy.deepcopy(values)}

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([self._transform(image.convert("RGB")) for image in images])

    def _transform(self, image: Image.Image) -> torch.Tensor:
        values = self.values
        if values["tvf_do_letterbox"]:
            image = _letterbox(image, tuple(values["tvf_letterbox_fill"]))
        parts, seen = [], {}
        params = zip(
            values["tvf_resize_params"], values["tvf_crop_params"], values["tvf_normalize_params"], strict=True
        )
        for resize, crop, normalize in params:
            key = json.dumps([resize, crop])
            if key not in seen:  # both featurizers of the published models see the same pixels
                seen[key] = _to_tensor(_centre_crop(_resize(image, resize), crop["output_size"]))
            mean, std = (torch.tensor(normalize[name], dtype=torch.float32)[:, None, None] for name in ("mean", "std"))
            parts.append((seen[key] - mean) / std)
        return torch.cat(parts)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json as published."""
        code = f"{HUB_CODE}processing_prismatic"
        write_json(Path(folder) / IMAGE_FILE, {
            **self.values, "image_processor_type": "PrismaticImageProcessor", "processor_class": "PrismaticProcessor",
            "auto_map": {"AutoImageProcessor": f"{code}.PrismaticImageProcessor", "AutoProcessor": f"{code}.PrismaticProcessor"},
        })  # fmt: skip


class OpenVlaProcessor:
    """`image_processor` and `tokenizer` together."""

    chat_template = None

    def __init__(
        self, image_processor: OpenVlaImageProcessor, tokenizer: PreTrainedTokenizerFast, n_image_tokens: int
    ) -> None:
        """
        Args:
            n_image_tokens: P, patches of the model's featurizers.
        """
        self.image_processor, self.tokenizer, self.n_image_tokens = image_processor, tokenizer, n_image_tokens
        space: Any = tokenizer.convert_tokens_to_ids(SPACE)
        self.space_id = int(space)
        if self.space_id == tokenizer.unk_token_id:
            raise problem(
                f"a tokenizer without {SPACE!r}", "Llama's or Mistral's", "restore the checkpoint's tokenizer"
            )

    @classmethod
    def load(cls, folder: Path, n_image_tokens: int) -> OpenVlaProcessor:
        """From a folder with the published files. VlaError names what is missing or damaged."""
        return cls(OpenVlaImageProcessor(_read(folder / IMAGE_FILE)), load_tokenizer(folder), n_image_tokens)

    def __call__(
        self, text: str | Sequence[str], images: Image.Image | Sequence[Image.Image], *, padding: bool = False
    ) -> dict[str, torch.Tensor]:
        """As the authors' processor: {input_ids (B, T), attention_mask (B, T), pixel_values (B, 3 or 6, h, w)}, padded on
        the tokenizer's side. The ids say nothing of the image."""
        images = [images] if isinstance(images, Image.Image) else list(images)
        texts = [text] if isinstance(text, str) else list(text)
        if len(images) != len(texts):
            raise problem(f"{len(images)} images for {len(texts)} prompts", "one image per prompt", "give one each")
        encoded = self.tokenizer(texts, padding=padding, return_tensors="pt")
        return {
            "input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"],
            "pixel_values": self.image_processor(images),
        }  # fmt: skip

    def encode(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, torch.Tensor]:
        """Model inputs of B prompts with one image each: rows of BOS, places of the P patches, text and the bare space,
        padded; all but the padding is within the attention mask."""
        for row in images:
            if len(row) != 1:
                raise problem(f"{len(row)} images for a prompt", "one, as OpenVLA has", "choose one camera")
        texts: Any = self.tokenizer(list(prompts))["input_ids"]
        padded: Any = self.tokenizer.pad({"input_ids": [self._placed(list(ids)) for ids in texts]}, return_tensors="pt")
        return {
            "input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"],
            "pixel_values": self.image_processor([row[0] for row in images]),
        }  # fmt: skip

    def encode_many(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], n_more: int = 0
    ) -> dict[str, torch.Tensor]:
        """As `encode` with as many images for each prompt: their channels one after the other, (B, 6 * images, h, w), their
        patches' places too, and `n_more` places after them."""
        n = len(images[0])
        if n == 0 or any(len(row) != n for row in images):
            raise problem("prompts with different numbers of images", "as many for each, at least one", "give them")
        texts: Any = self.tokenizer(list(prompts))["input_ids"]
        n_places = n * self.n_image_tokens + n_more
        rows = [self._placed(list(ids), n_places) for ids in texts]
        padded: Any = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        return {
            "input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"],
            "pixel_values": torch.cat([self.image_processor([row[i] for row in images]) for i in range(n)], dim=1),
        }  # fmt: skip

    def _placed(self, ids: list[int], n_places: int | None = None) -> list[int]:
        if IMAGE_TOKEN_ID in ids:
            raise problem("<unk> in the prompt", "words", "take <unk> out of the instruction")
        space = [] if ids[-1] == self.space_id else [self.space_id]
        places = self.n_image_tokens if n_places is None else n_places
        return [ids[0], *[IMAGE_TOKEN_ID] * places, *ids[1:], *space]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the published files into a folder; it is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.image_processor.save_pretrained(folder)
        save_tokenizer(self.tokenizer, Path(folder))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """tokenizer.json exactly as it is: transformers 5 would build a Llama tokenizer anew, with rules of its own."""
    config = _read(folder / CONFIG_FILE)
    if not (folder / TOKENIZER_FILE).is_file():
        raise problem(f"no {TOKENIZER_FILE} in {folder}", "the tokenizer of the checkpoint", "fetch the file")
    special = {name: _content(config[name]) for name in SPECIAL if config.get(name) is not None}
    missing = [name for name in SPECIAL if name not in special]
    if missing:
        raise problem(f"{CONFIG_FILE} without {', '.join(missing)}", "all of " + ", ".join(SPECIAL), "restore the file")
    try:
        return PreTrainedTokenizerFast(
            tokenizer_file=str(folder / TOKENIZER_FILE), model_max_length=config.get("model_max_length", 2048),
            padding_side="right", clean_up_tokenization_spaces=False, **special,
        )  # fmt: skip
    except Exception as error:  # the Rust parser raises plain Exception
        raise problem(f"{folder / TOKENIZER_FILE}: {error}", "a tokenizer", "restore the file") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json as transformers 4.40 reads them."""
    special: dict[str, Any] = {name: str(tokenizer.special_tokens_map[name]) for name in SPECIAL}
    added = {
        str(index): {
            "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized, "rstrip": token.rstrip,
            "single_word": token.single_word, "special": token.special,
        }
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }  # fmt: skip
    write_json(folder / TOKENIZER_FILE, _old_form(json.loads(tokenizer.backend_tokenizer.to_str())))
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / CONFIG_FILE, {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, **special,
        "auto_map": {"AutoProcessor": f"{HUB_CODE}processing_prismatic.PrismaticProcessor"},
        "clean_up_tokenization_spaces": False, "legacy": False, "model_max_length": tokenizer.model_max_length,
        "padding_side": "right", "processor_class": "PrismaticProcessor", "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer", "use_default_system_prompt": False,
    })  # fmt: skip


def _old_form(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json with merges as "a b" instead of ["a", "b"], which tokenizers 0.19 cannot read."""
    merges = tokenizer["model"].get("merges", [])
    if all(" " not in piece for pair in merges for piece in pair):
        tokenizer["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    return tokenizer


def _derived(values: dict[str, Any]) -> dict[str, Any]:
    """The `tvf_*` fields as the authors' code derives them where a file does not hold them."""
    naive, letterbox = (values["image_resize_strategy"] == name for name in ("resize-naive", "letterbox"))
    sizes = [size[-1] for size in values["input_sizes"]]
    filters = [PILLOW_FILTERS[name] for name in values["interpolations"]]
    fill = [int(x * 255) for x in values["means"][-1]] if letterbox else None  # the last featurizer's, as there
    return {
        "tvf_resize_params": [
            {"antialias": True, "interpolation": how, "max_size": None, "size": [size, size] if naive else size}
            for size, how in zip(sizes, filters, strict=True)
        ],
        "tvf_crop_params": [{"output_size": list(size[-2:])} for size in values["input_sizes"]],
        "tvf_normalize_params": [
            {"inplace": False, "mean": list(mean), "std": list(std)}
            for mean, std in zip(values["means"], values["stds"], strict=True)
        ],
        "tvf_do_letterbox": letterbox, "tvf_letterbox_fill": fill,
        "use_fused_vision_backbone": len(sizes) == 2,
    }  # fmt: skip


def _letterbox(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """Borders on both sides of the shorter dimension; an odd remainder is left out, as there."""
    side = max(image.size)
    left, top = int((side - image.width) / 2), int((side - image.height) / 2)
    square = Image.new("RGB", (image.width + 2 * left, image.height + 2 * top), fill)
    square.paste(image, (left, top))
    return square


def _resize(image: Image.Image, params: dict[str, Any]) -> Image.Image:
    """`size` (height, width), or the length of the shorter side."""
    size = params["size"]
    if isinstance(size, int):
        short, long = sorted(image.size)
        other = int(size * long / short)
        width, height = (size, other) if image.width <= image.height else (other, size)
    else:
        height, width = size
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling(params["interpolation"]))


def _centre_crop(image: Image.Image, size: Sequence[int]) -> Image.Image:
    height, width = size
    if image.size == (width, height):
        return image
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """float32 (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise problem(f"no {path.name} in {path.parent}", "the published processor files", "fetch the file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VlaError(f"{path}: {error}; expected JSON; fix: restore the file from the checkpoint") from error
    if not isinstance(value, dict):
        raise problem(f"{path}: {type(value).__name__}", "a JSON object", "restore the file from the checkpoint")
    return value
