"""The settings of `vla finetune`, and its presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vla.adapters import AddedInit, Method, PlacementKind
from vla.finetune.optimizers import OptimizerName
from vla.types import problem


@dataclass(frozen=True)
class Settings:
    """Settings of `vla finetune`."""

    data: tuple[str, ...]
    """Datasets of any format, alone or mixed: LeRobot v2.1 or v3.0, RLDS (PATH#split=train[:95%]), LIBERO HDF5, our cache,
    OWNER/NAME on the Hub, or oxe:MIXTURE@FOLDER for a named mixture of OpenVLA. A folder's name is its unnorm_key."""
    out: Path
    """Run folder: policy/ (the result), checkpoints/, metrics.jsonl, curves.png."""
    weights: tuple[float, ...] = ()
    """One per dataset, as OpenVLA's mixtures: a frame of weight 2 is seen twice as often as one of weight 1. Empty: every
    frame once per epoch, or the weights of the named mixture."""
    skip_bad: bool = False
    """Leave out episodes that cannot be used (damaged files, NaN, missing columns, corrupt images), instead of stopping at
    the first; they are counted and listed in OUT/bad.jsonl. Of each episode the numbers and the first and last frame are
    read; a frame in between that turns out to be damaged is replaced by the next."""
    backbone: str = "tiny"
    """'tiny', a Hub id, or a checkpoint folder that AutoModelForImageTextToText opens."""
    cameras: tuple[str, ...] = ()
    """Cameras the policy sees, in order; empty: all that every dataset has. NAME=KEY|KEY gives the policy's name of a camera
    that datasets call by different names, e.g. primary=agentview|image."""
    image_size_px: int = 0
    """Square size given to the model's processor; 0: 160 for tiny, else 224."""
    crop_area: float = 1.0
    """Share of the image kept by a centre crop."""
    rotation_deg: Literal[0, 90, 180, 270] = 0
    """Counter-clockwise turn of every frame, in training and in acting: 180 for data with LIBERO's own camera frames."""
    protocol: str = ""
    """Prepare pictures as openvla, oft, openpi or lerobot do on LIBERO (turn, JPEG, filter, crop), so that `vla eval --protocol`
    of that name fits; of the settings above it fills crop_area and rotation_deg."""
    frames_turned: bool = False
    """With a protocol: the data's frames were turned already. Then evaluate with --turn-frames."""
    augment: bool = False
    """OpenVLA's five image augmentations in training. Needs crop_area 0.9: the centre crop when acting stands for the
    random crops, and is left out in training."""
    cache_images: bool = True
    """Decode every frame once, before training, and keep it in memory; else as needed. The samples are the same."""
    data_workers: int = 0
    """Processes that prepare samples ahead, for training on a GPU without --cache-images. The samples are the same."""
    horizon: int = 8
    """Actions per chunk."""
    state: bool = True
    """Show the proprioceptive state in the prompt, as integers."""
    state_dropout: float = 0.0
    """Share of training samples whose prompt says that the state is unknown, so that the policy does not lean on it
    alone; the policy may then be asked without a state."""
    state_low: tuple[float, ...] = ()
    """Lower bound of the state text per dimension; empty: the data's minimum."""
    state_high: tuple[float, ...] = ()
    """Upper bound of the state text per dimension; empty: the data's maximum."""
    template: str = ""
    """Prompt with {instruction} and, if the state is shown, {state}; empty: OpenVLA's wording."""
    gripper_dim: int | None = -1
    """Dimension left un-normalised; None normalises all. -1: the one called gripper, else the last, if its values lie in
    [-1, 1]."""
    gripper_convention: str = ""
    """In words, for whoever executes the actions."""
    delta: bool = True
    """The data's actions are displacements (False: absolute targets)."""
    placement: PlacementKind = "added"
    """Where action tokens sit in the vocabulary; text: on the model's own digits, for the tokenizer integer_text."""
    placement_skip: int = 0
    """Ids left out at the end of the vocabulary, with placement `tail`: 128 for PaliGemma as openpi uses it."""
    tokenizer: str = "uniform"
    """Action tokenizer: uniform, quantile, fast, vq, fsq or integer_text, fitted to the training chunks where it learns anything, or a
    folder that `vla tokenizer fit` wrote."""
    bins: int = 256
    """Bins per action dimension, of uniform and quantile."""
    added_init: AddedInit = "mean"
    """How added token embeddings start; `numbers` needs a vocabulary with the integers 0..255."""
    method: Method = "lora"
    """What trains: lora; qlora, on a base in 4 bits (nf4, double quantization; extra [bnb]); dora; rslora; or full, the
    weights themselves."""
    lora_r: int = 32
    """LoRA rank."""
    lora_alpha: int = 16
    """LoRA scale numerator."""
    lora_dropout: float = 0.0
    """LoRA dropout."""
    lora_parts: tuple[Literal["llm", "projector", "vision", "all"], ...] = ("llm", "projector")
    """Parts of the model that get LoRA layers or, with method full, train."""
    vl_data: str = ""
    """JSONL file of vision-language rows {"image", "question", "answer"} to co-train on; empty: none."""
    vl_weight: float = 0.1
    """Weight of their loss beside that of the actions."""
    vl_batch_size: int = 4
    """Such rows per forward pass and process."""
    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 16
    """Chunks per forward pass and process."""
    grad_accumulation: int = 1
    """Forward passes per optimiser step."""
    lr: float = 5e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after warm-up."""
    warmup_steps: int = 50
    """Linear warm-up."""
    loss_over: Literal["vocabulary", "actions"] = "vocabulary"
    """Softmax of the loss: the whole vocabulary as OpenVLA does, or the action ids that are legal at the place, as acting and RL
    use them; `actions` learns faster where new tokens start far below the old ones, but needs constrained decoding."""
    optimizer: OptimizerName = "adamw"
    """AdamW with moments in float32, in 8 bits, or in 8 bits that leave a full GPU for the host (extra [bnb])."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    clip_norm: float = 1.0
    """Gradient norm limit."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """bf16, fp16: autocast, and frozen weights are stored so; what trains is float32. fp16 scales the loss and needs a GPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third slower, a fraction of the memory."""
    compile: bool = False
    """torch.compile of the model's forward pass. The first steps take minutes."""
    device: str = "auto"
    """auto, cpu or cuda."""
    holdout_episodes: int = 2
    """Episodes per dataset kept out of training for the held-out figures."""
    eval_every_steps: int = 200
    """Held-out loss, token accuracy and L1 every so many steps."""
    free_running_samples: int = 16
    """So many held-out chunks are also decoded as the policy acts, not teacher-forced; 0: none."""
    patience: int = 0
    """Stop after so many evaluations without a lower held-out loss; 0: never."""
    policy_from: Literal["last", "best"] = "last"
    """Whose weights policy/ gets: those of the last step, or of the step with the lowest held-out loss."""
    eval_suite: str = ""
    """Also measure success in this simulator suite while training; empty: not."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks of that suite; empty: its default ones."""
    eval_suite_every_steps: int = 1000
    """Success every so many steps, and after the last."""
    eval_suite_episodes: int = 5
    """Episodes per task, from the same seeds each time."""
    eval_suite_workers: int = 2
    """Simulator processes."""
    save_every_steps: int = 200
    """Checkpoint every so many steps."""
    keep_checkpoints: int = 2
    """The newest so many are kept, and the best."""
    tensorboard: bool = False
    """Write TensorBoard files to tensorboard/ in `out` (extra [tensorboard])."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Send the metrics to Weights & Biases or trackio (extras of these names)."""
    tracker_project: str = "vla"
    """Project of the tracker."""
    log_every_steps: int = 10
    """Metrics every so many steps."""
    seed: int = 0
    """Data order and initialisation."""
    resume: bool = False
    """Continue the run in `out`."""
    overwrite: bool = False
    """Delete what is in `out` first."""
    dry_run: bool = False
    """Show settings, parameters and one decoded batch, then stop."""

    def __post_init__(self) -> None:
        if self.data_workers and self.skip_bad:
            raise problem("--data-workers with --skip-bad", "one of them: what a worker leaves out could not be listed",
                          "write a clean dataset first: `vla data convert --skip-bad`")  # fmt: skip
        if self.resume and self.overwrite:
            raise problem("--resume and --overwrite", "one of them", "drop one")
        if self.frames_turned and not self.protocol:
            raise problem("--frames-turned without --protocol", "both", "drop it, or name the protocol")
        if self.augment and not self.protocol and self.crop_area == 1.0:
            raise problem("--augment with crop_area 1.0", "the centre crop that stands for the random crops when acting",
                          "pass --crop-area 0.9")  # fmt: skip
        if min(self.steps, self.batch_size, self.grad_accumulation, self.horizon) < 1:
            raise problem("a count below 1", "steps, batch_size, grad_accumulation, horizon >= 1", "correct it")
        if min(self.keep_checkpoints, self.save_every_steps, self.eval_every_steps, self.eval_suite_every_steps) < 1:
            raise problem("an interval or keep_checkpoints below 1", "at least 1", "correct it")
        if not 0.0 <= self.state_dropout < 1.0 or (self.state_dropout and not self.state):
            raise problem(f"state_dropout {self.state_dropout} with state {self.state}", "0 <= state_dropout < 1, with the state",
                          "lower it, or drop --no-state")  # fmt: skip
        if self.vl_data and not (self.vl_weight > 0 and self.vl_batch_size >= 1):
            raise problem(f"vl_weight {self.vl_weight}, vl_batch_size {self.vl_batch_size} with --vl-data",
                          "a weight above 0, at least one row", "correct them, or drop --vl-data")  # fmt: skip
        if not self.holdout_episodes and (self.patience or self.policy_from == "best"):
            raise problem(f"patience {self.patience}, policy_from {self.policy_from!r} with holdout_episodes 0",
                          "held-out episodes, which decide what is best", "pass --holdout-episodes 1")  # fmt: skip


PRESETS = {
    # make demo's recipe: built-in VLM, a few demonstrations per Meta-World task; minutes on 2 CPU cores.
    "tiny-demo": Settings(
        data=(), out=Path("runs/sft"), horizon=3, added_init="numbers", lora_r=16, lora_alpha=32, lr=3e-3, batch_size=16,
        steps=300, warmup_steps=20, loss_over="actions", state_low=(-0.5, 0.35, 0.0, 0.0), state_high=(0.5, 1.0, 0.5, 1.0),
        gripper_convention="+1 closes, -1 opens",
    ),
    # OpenVLA's LoRA recipe (vla-scripts/finetune.py): r 32, alpha 16, constant 5e-4, no warm-up, one action per query.
    "openvla-lora": Settings(
        data=(), out=Path("runs/sft"), backbone="Qwen/Qwen2.5-VL-3B-Instruct", horizon=1, state=False, lr=5e-4,
        schedule="constant", warmup_steps=0, batch_size=16, steps=50_000, precision="bf16",
        lora_parts=("llm", "projector", "vision"), crop_area=0.9, augment=True, image_size_px=224, save_every_steps=5000,
    ),
    # LIBERO demonstrations of `vla data collect --suite libero_*`: two cameras, 8 state and 7 action dimensions, chunks of
    # 8 as OpenVLA-OFT. Frames are turned as its authors turn them. Needs a GPU of 24 GB or more; not measured.
    "libero": Settings(
        data=(), out=Path("runs/sft"), backbone="Qwen/Qwen2.5-VL-3B-Instruct", cameras=("agentview", "wrist"),
        rotation_deg=180, cache_images=False, horizon=8, lr=5e-4, schedule="cosine", warmup_steps=500, batch_size=16,
        steps=50_000, precision="bf16", lora_parts=("llm", "projector", "vision"), image_size_px=224,
        gripper_convention="+1 closes, -1 opens", save_every_steps=5000, eval_every_steps=1000, holdout_episodes=5,
    ),
}  # fmt: skip
