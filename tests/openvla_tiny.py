"""Small random OpenVLA checkpoints in the published layout, the same on every machine: weights come from their names.

The JSON files under tests/fixtures/openvla were written by the authors' own code (see tests/test_openvla_parity.py).
Needs numpy and safetensors only, so that the code they are compared with can be given the same weights.
"""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent / "fixtures" / "openvla"
VOCAB = 32000
ACTION_IDS = slice(31744, 32000)
INSTRUCTIONS = ("open the drawer", "put the RED bowl on the plate", "a", "pick up the \u2615 cup")
PROMPT = "In: What action should the robot take to {}?\nOut:"
TIMM_ARGS = [
    {"embed_dim": 32, "depth": 3, "num_heads": 2},
    {"embed_dim": 24, "depth": 3, "num_heads": 2},
]
TEXT_SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of a parameter. Activations stay near 1; the action ids win every argmax over the vocabulary."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if name.endswith("scale_factor"):
        return 0.5 + 0.1 * draw
    if len(shape) == 1:
        return 0.1 * draw + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    if "embed" in name and "proj" not in name or "token" in name or "latent" in name:
        return draw
    values = draw / np.float32(np.sqrt(np.prod(shape[1:])))
    if name.endswith("lm_head.weight"):
        values[ACTION_IDS] *= 4.0
    return values


def write_checkpoint(folder: Path, variant: str = "fused", n_shards: int = 3) -> Path:
    """A folder as on the Hub: `variant` is 'fused' (DINOv2 + SigLIP) or 'single' (SigLIP)."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (FIXTURES / variant).iterdir():
        if path.name != "weights.json":
            shutil.copy(path, folder / path.name)
    write_tokenizer(folder)
    shapes = json.loads((FIXTURES / variant / "weights.json").read_text())
    names = sorted(shapes)
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {name: fill(name, tuple(shapes[name])).astype(np.float32) for name in names[i::n_shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, checkpoint_lm_head: bool = True) -> Path:
    """The LoRA adapter of the fixtures, as peft 0.11 wrote it: with a copy of the base's lm_head."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(FIXTURES / "lora" / "adapter_config.json", folder)
    tensors = {}
    for name, shape in json.loads((FIXTURES / "lora" / "weights.json").read_text()).items():
        if "lora_" in name:
            tensors[name] = (0.3 * fill(name, tuple(shape))).astype(np.float32)
        elif checkpoint_lm_head:
            tensors[name] = fill("language_model.lm_head.weight", tuple(shape)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of Llama-2's kind and size: same special ids, 29871 for the bare space, 29901 for the colon, single
    characters at the 256 last ids. Words of the prompts are one token; all else is spelled."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab = {**special, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    merges: list[str] = []
    for word in " ".join(PROMPT.format(text.lower()).split("\n")[0] for text in INSTRUCTIONS).split():
        for end in range(2, len(word.rstrip("?")) + 2):
            piece = ("\u2581" + word)[:end]
            if piece not in vocab and piece.isascii() is False and all(c.isascii() for c in piece[1:]):
                vocab[piece] = len(vocab)
                merges.append(f"{piece[:-1]} {piece[-1]}")
    singles = {"\u2581": 29871, ":": 29901}
    letters = "etaoinsrhldcumfpgwybvkxqjz0123456789.,?!-'ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    free = (i for i in range(29872, 31744) if i != 29901)
    singles |= {letter: next(free) for letter in letters}
    singles |= {chr(0x4E00 + i): 31744 + i for i in range(256)}
    vocab |= singles
    taken = set(vocab.values())
    vocab |= {f"<filler_{i}>": i for i in range(VOCAB) if i not in taken}

    def added(index: int, content: str) -> dict:
        return {
            "id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True,
        }  # fmt: skip

    replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added(i, word) for word, i in special.items()] + [added(VOCAB, "<PAD>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            replace, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def frames() -> list[np.ndarray]:
    """Three uint8 (h, w, 3) images of different sizes."""
    rng = np.random.default_rng(7)
    coarse = [rng.integers(0, 256, (h, w, 3)).astype(np.float64) for h, w in ((14, 14), (16, 16), (15, 20))]
    blocks = [np.kron(image, np.ones((16, 16, 1))) for image in coarse]
    return [np.clip(block + rng.normal(0, 12, block.shape), 0, 255).astype(np.uint8) for block in blocks]
