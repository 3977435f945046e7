"""Tiny random models of real Hugging Face classes, with processors, as checkpoints on disk.

`width` multiplies the hidden sizes, with as many heads and layers: wide models for memory, heads of 32 for vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HIDDEN, LAYERS, HEADS, VOCAB = 64, 2, 4, 400
TEXT = ["In: What action should the robot take to open the drawer?\nOut: State: 12 200 31 255 close the window"] * 3


def tokenizer(special: list[str], bos: str, eos: str) -> tf.PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token="<pad>",
        additional_special_tokens=[s for s in special if s not in (bos, eos, "<pad>")],
    )  # fmt: skip


def text_sizes(width: int = 1, **more: object) -> dict:
    return {
        **hidden(width), "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 2048, **more,
    }  # fmt: skip


def hidden(width: int) -> dict:
    return {"hidden_size": HIDDEN * width, "intermediate_size": 128 * width}


def smolvlm(folder: Path, width: int = 1) -> None:
    special = ["<pad>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"]
    tok = tokenizer(special, "<|im_start|>", "<end_of_utterance>")
    tok.image_token, tok.fake_image_token, tok.global_image_token = (
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
    )
    image = tf.SmolVLMImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False
    )
    template = (
        "<|im_start|>{% for m in messages %}{{m['role']}}:{% for c in m['content'] %}{% if c['type']=='image' %}<image>"
        "{% else %} {{c['text']}}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    video = tf.SmolVLMVideoProcessor()
    processor = tf.SmolVLMProcessor(image, tok, video, image_seq_len=4, chat_template=template)
    config = tf.SmolVLMConfig(
        text_config=dict(model_type="llama", pad_token_id=0, **text_sizes(width)),
        vision_config=dict(
            **hidden(width), num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16
        ),
        image_token_id=tok.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    _save(tf.SmolVLMForConditionalGeneration(config), processor, folder, width)


def qwen2_5_vl(folder: Path, width: int = 1) -> None:
    special = [
        "<pad>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tok = tokenizer(special, "<|im_start|>", "<|im_end|>")
    image = tf.Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=32 * 32, max_pixels=64 * 64)
    template = (
        "{% for m in messages %}<|im_start|>{{m['role']}}\n{% for c in m['content'] %}{% if c['type']=='image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{c['text']}}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    sections = [2 * width, 3 * width, 3 * width]
    processor = tf.Qwen2_5_VLProcessor(image, tok, tf.Qwen2VLVideoProcessor(), chat_template=template)
    config = tf.Qwen2_5_VLConfig(
        text_config=dict(rope_parameters={"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4}, **text_sizes(width)),
        vision_config=dict(
            depth=1, **hidden(width), num_heads=2, out_hidden_size=HIDDEN * width, patch_size=8,
            fullatt_block_indexes=[0], window_size=32, spatial_merge_size=2,
        ),
        **{f"{name}_token_id": tok.convert_tokens_to_ids(token) for name, token in {
            "image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>",
        }.items()},
    )  # fmt: skip
    _save(tf.Qwen2_5_VLForConditionalGeneration(config), processor, folder, width)


def paligemma(folder: Path, width: int = 1) -> None:
    tok = tokenizer(["<pad>", "<eos>", "<bos>", "<unk>", "<image>"], "<bos>", "<eos>")
    image = tf.SiglipImageProcessor(size={"height": 32, "width": 32})
    image.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(image, tok)
    config = tf.PaliGemmaConfig(
        text_config=dict(model_type="gemma", head_dim=16 * width, **text_sizes(width)),
        vision_config=dict(
            **hidden(width), num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=16, projection_dim=HIDDEN * width, vision_use_head=False,
        ),
        projection_dim=HIDDEN * width, hidden_size=HIDDEN * width, image_token_index=tok.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    _save(tf.PaliGemmaForConditionalGeneration(config), processor, folder, width)


def llava(folder: Path, width: int = 1) -> None:
    tok = tokenizer(["<pad>", "<s>", "</s>", "<image>"], "<s>", "</s>")
    image = tf.SiglipImageProcessor(size={"height": 32, "width": 32})
    processor = tf.LlavaProcessor(image, tok, patch_size=16, vision_feature_select_strategy="full")
    config = tf.LlavaConfig(
        text_config=dict(model_type="llama", **text_sizes(width)),
        vision_config=dict(
            model_type="siglip_vision_model", **hidden(width), num_hidden_layers=2,
            num_attention_heads=2, image_size=32, patch_size=16, vision_use_head=False,
        ),
        image_token_index=tok.convert_tokens_to_ids("<image>"), vision_feature_select_strategy="full",
        vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    _save(tf.LlavaForConditionalGeneration(config), processor, folder, width)


def _save(model: tf.PreTrainedModel, processor: tf.ProcessorMixin, folder: Path, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # default initialisation is so flat that every image would give the same argmax
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 / width**0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


FAMILIES: dict[str, Callable[..., None]] = {
    "smolvlm": smolvlm, "qwen2_5_vl": qwen2_5_vl, "paligemma": paligemma, "llava": llava,
}  # fmt: skip
