"""The settings of `vla finetune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vla.adapters import ALL_LINEAR, AddedInit, LoraInit, Method, PlacementKind
from vla.finetune.optimizers import OptimizerName
from vla.types import problem


@dataclass(frozen=True)
class Settings:
    """Settings of `vla finetune`."""

    data: tuple[str, ...]
    """Datasets of any format, alone or mixed: LeRobot v2.1 or v3.0, RLDS (PATH#split=train[:95%]), LIBERO HDF5, our cache,
    OWNER/NAME on the Hub (OWNER/NAME#cache_gb=50 keeps no more than 50 GB of it on the disk), or oxe:MIXTURE@FOLDER for a
    named mixture of OpenVLA. A folder's name is its unnorm_key."""
    out: Path
    """Run folder: policy/ (the result), checkpoints/, metrics.jsonl, curves.png."""
    weights: tuple[float, ...] = ()
    """One per dataset, as OpenVLA's mixtures: a frame of weight 2 is seen twice as often as one of weight 1. Empty: every
    frame once per epoch, or the weights of the named mixture."""
    skip_bad: bool = False
    """Leave out episodes that cannot be used (damaged files, NaN, missing columns, corrupt images), instead of stopping at
    the first; they are counted and listed in OUT/bad.jsonl. Of each episode the numbers and the first and last frame are
    read; a frame in between that turns out to be damaged is replaced by the next."""
    shuffle_window: int = 0
    """0: all frames are shuffled, as suits data on a local disk. N: files come in random order and their frames are shuffled
    over N, so that reading stays sequential and files can be dropped after use; nothing is held in memory."""
    backbone: str = "tiny"
    """'tiny', a Hub id, or a checkpoint folder that AutoModelForImageTextToText opens, or an OpenVLA."""
    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Start from this instead: a policy directory (here or OWNER/NAME), whose prompt, tokens, pictures, chunks and adapter
    are then kept; a LoRA folder of OpenVLA's own script, put on `backbone`; or a checkpoint, as with `backbone`."""
    unnorm_key: str = ""
    """Statistics the policy acts by: the name of a dataset or, with --from, a key of the source; the data are then normalised
    by that too, as more data of the same robot should be. Empty: the dataset's, if there is one."""
    cameras: tuple[str, ...] = ()
    """Cameras the policy sees, in order; empty: all that every dataset has. NAME=KEY|KEY gives the policy's name of a camera
    that datasets call by different names, e.g. primary=agentview|image."""
    image_size_px: int = 0
    """Square size given to the model's processor; 0: 160 for tiny, the checkpoint's own for an OpenVLA, else 224."""
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
    head: Literal["tokens", "l1", "discrete"] = "tokens"
    """What actions come from. tokens: one after the other. On an OpenVLA, as OpenVLA-OFT does it: all of a chunk from one pass
    with attention both ways, by l1, an MLP trained with the L1 loss, or discrete, one action token at each place."""
    proprio: bool = False
    """With l1 or discrete: give the state to the model as one token, normalised by the data's statistics."""
    film: bool = False
    """With l1 or discrete: the instruction modulates the vision transformers (FiLM), as in OFT+; all of FiLM trains."""
    normalization: Literal["bounds_q99", "bounds"] = "bounds_q99"
    """What of actions (and of the state of `proprio`) is brought to [-1, 1]: quantiles 0.01 and 0.99, or minimum and maximum,
    as OpenVLA-OFT does for ALOHA's joint angles."""
    state: bool = True
    """Show the proprioceptive state in the prompt, as integers."""
    state_dropout: float = 0.0
    """Share of training samples whose prompt says that the state is unknown, so that the policy does not lean on it
    alone; the policy may then be asked without a state."""
    history: int = 0
    """So many of the actions executed last are shown in the prompt, before the state. A policy that sees what it did tends to
    do it again (the copycat problem: Wen et al. 2020, arXiv 2010.14876; causal confusion: de Haan et al. 2019), so measure
    with and without, and see `history_dropout`."""
    history_dropout: float = 0.0
    """Share of training samples whose past actions are hidden, as at the beginning of an episode; the policy may then be
    asked without them."""
    numbers_as: Literal["text", "tokens"] = "text"
    """State and past actions in digits, or each number as one vocabulary id: the action tokens' own, if these are uniform with
    at least 256 bins, else 256 more."""
    state_low: tuple[float, ...] = ()
    """Lower bound of the state text per dimension; empty: the data's minimum."""
    state_high: tuple[float, ...] = ()
    """Upper bound of the state text per dimension; empty: the data's maximum."""
    template: str = ""
    """Prompt with {instruction} and, if they are shown, {state} and {history}; empty: OpenVLA's wording."""
    gripper_dim: int | None = -1
    """Dimension left un-normalised; None normalises all. -1: the one called gripper, else the last, if its values lie in
    [-1, 1]."""
    gripper_convention: str = ""
    """In words, for whoever executes the actions."""
    delta: bool = True
    """The data's actions are displacements (False: absolute targets)."""
    placement: Literal["auto"] | PlacementKind = "auto"
    """Where action tokens sit in the vocabulary; auto: an OpenVLA's own action ids (tail), elsewhere added; text: on the
    model's own digits, for the tokenizer integer_text."""
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
    lora_init: LoraInit = "kaiming"
    """How LoRA's first matrix starts; gaussian as in OpenVLA's script."""
    lora_parts: tuple[Literal["llm", "projector", "vision", "all", "all-linear"], ...] = ("llm", "projector")
    """Parts of the model that get LoRA layers or, with method full, train. all-linear: all of them, the output head and
    the patch embedding, as PEFT's setting of this name does in OpenVLA; action ids that the model has already then get no
    trained rows of their own."""
    language_motion: bool = False
    """RT-H: the policy says a phrase such as "move arm forward, close gripper" first and acts by it. The phrases are read off
    the actions of the data (`vla data inspect --motions 8` shows them); every sample is trained on twice."""
    motion_weight: float = 1.0
    """Weight of the phrases' loss beside that of the actions."""
    motion_lookahead: int = 0
    """Steps whose movement a phrase describes; 0: as many as the horizon."""
    motion_threshold: float = 0.25
    """A dimension is said if it moves at least so fast, as a share of the 99th percentile of its movement in one step."""
    motion_words: tuple[str, ...] = ()
    """NAME=PLUS/MINUS where an action's dimension has other directions than x forward, y left, z up, e.g. dx=right/left; NAME=
    leaves it out."""
    motion_template: str = ""
    """Prompt of the motion query; empty: the prompt in OpenVLA's wording, with motion in place of action."""
    vl_data: tuple[str, ...] = ()
    """Vision-language rows to co-train on (captions, questions and answers, pointing, conversations): JSONL files of
    {"image", "question", "answer"}, or datasets of the `datasets` library (extra [datasets]), hf:OWNER/NAME@REVISION on the Hub
    or a folder or parquet file, with #split=train&image=COLUMN&question=COLUMN&answer=COLUMN where they cannot be guessed."""
    vl_weights: tuple[float, ...] = ()
    """One per entry of `vl_data`: its share of their rows is its weight over their sum. Empty: equal shares."""
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
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Learning rate after warm-up: as it is, half a cosine down to a tenth, or times `decay_factor` from `decay_at_step` on."""
    decay_at_step: int = 0
    """Of the schedule step: optimiser steps before the learning rate falls."""
    decay_factor: float = 0.1
    """Of the schedule step: by what it is multiplied then."""
    warmup_steps: int = 50
    """Linear warm-up."""
    loss_over: Literal["vocabulary", "actions"] = "vocabulary"
    """Softmax of the loss: the whole vocabulary as OpenVLA does, or the action ids that are legal at the place, as acting and RL
    use them; `actions` learns faster where new tokens start far below the old ones, but needs constrained decoding."""
    stop_token: bool = False
    """Also learn to end the text after the action tokens, as OpenVLA's script does; the loss is then over these too. It
    changes nothing about acting, which ends by itself."""
    optimizer: OptimizerName = "adamw"
    """AdamW with moments in float32, in 8 bits, or in 8 bits that leave a full GPU for the host (extra [bnb])."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    clip_norm: float = 1.0
    """Gradient norm limit; 0: none."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """bf16, fp16: autocast, and frozen weights are stored so; what trains is float32. fp16 scales the loss and needs a GPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third slower, a fraction of the memory."""
    compile: bool = False
    """torch.compile of the transformer blocks in training: the first step takes a minute or more, and then it is for GPUs; a
    CPU gains little or nothing. Evaluation and acting are not compiled."""
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
        if self.shuffle_window < 0 or (self.shuffle_window and self.cache_images):
            raise problem(f"shuffle_window {self.shuffle_window} with cache_images {self.cache_images}",
                          "0 or more; above 0 frames are not kept", "pass --no-cache-images")  # fmt: skip
        if self.resume and self.overwrite:
            raise problem("--resume and --overwrite", "one of them", "drop one")
        if self.stop_token and self.loss_over == "actions":
            raise problem("--stop-token with loss_over 'actions'", "loss_over 'vocabulary': the end of a text is no action",
                          "drop one of them")  # fmt: skip
        if ALL_LINEAR in self.lora_parts and self.method == "full":
            raise problem(
                f"--lora-parts {ALL_LINEAR} with --method full", "the parts that train", "pass --lora-parts all"
            )
        if self.clip_norm < 0:
            raise problem(f"clip_norm {self.clip_norm:g}", "a limit above 0, or 0 for none", "correct --clip-norm")
        if self.frames_turned and not self.protocol:
            raise problem("--frames-turned without --protocol", "both", "drop it, or name the protocol")
        if self.augment and not (self.protocol or self.from_) and self.crop_area == 1.0:
            raise problem("--augment with crop_area 1.0", "the centre crop that stands for the random crops when acting",
                          "pass --crop-area 0.9")  # fmt: skip
        if min(self.steps, self.batch_size, self.grad_accumulation, self.horizon) < 1:
            raise problem("a count below 1", "steps, batch_size, grad_accumulation, horizon >= 1", "correct it")
        if min(self.keep_checkpoints, self.save_every_steps, self.eval_every_steps, self.eval_suite_every_steps) < 1:
            raise problem("an interval or keep_checkpoints below 1", "at least 1", "correct it")
        self._check_head()
        if (self.schedule == "step") != (self.decay_at_step > 0) or not 0.0 < self.decay_factor <= 1.0:
            raise problem(f"schedule {self.schedule!r} with decay_at_step {self.decay_at_step}, decay_factor {self.decay_factor:g}",
                          "schedule step with a step above 0 and 0 < decay_factor <= 1, or another without a step",
                          "pass --schedule step --decay-at-step N, or drop one")  # fmt: skip
        if not 0.0 <= self.state_dropout < 1.0 or (self.state_dropout and not self.state):
            raise problem(f"state_dropout {self.state_dropout} with state {self.state}", "0 <= state_dropout < 1, with the state",
                          "lower it, or drop --no-state")  # fmt: skip
        if self.numbers_as == "tokens" and not (self.state or self.history):
            raise problem("--numbers-as tokens without state and history", "numbers in the prompt", "drop one of them")
        shown = self.history or self.from_  # a policy that is gone on with decides what it is shown
        if self.history < 0 or not 0.0 <= self.history_dropout < 1.0 or (self.history_dropout and not shown):
            raise problem(f"history_dropout {self.history_dropout} with history {self.history}", "0 <= history_dropout < 1, with "
                          "past actions", "lower it, or pass --history 4")  # fmt: skip
        if self.vl_weights and len(self.vl_weights) != len(self.vl_data):
            raise problem(f"{len(self.vl_weights)} vl_weights for {len(self.vl_data)} of vl_data", "one each, or none",
                          "correct --vl-weights")  # fmt: skip
        if self.vl_data and not (self.vl_weight > 0 and self.vl_batch_size >= 1):
            raise problem(f"vl_weight {self.vl_weight}, vl_batch_size {self.vl_batch_size} with --vl-data",
                          "a weight above 0, at least one row", "correct them, or drop --vl-data")  # fmt: skip
        if self.language_motion and not (
            self.motion_weight > 0 and self.motion_lookahead >= 0 and 0 < self.motion_threshold <= 1
        ):
            raise problem(f"motion_weight {self.motion_weight:g}, motion_lookahead {self.motion_lookahead}, motion_threshold "
                          f"{self.motion_threshold:g}", "a weight above 0, a count, 0 < motion_threshold <= 1", "correct it")  # fmt: skip
        if (
            not self.language_motion
            and not self.from_
            and (self.motion_words or self.motion_template or self.motion_lookahead)
        ):
            raise problem(
                "settings of motions without --language-motion", "both", "pass --language-motion, or drop them"
            )
        if not self.holdout_episodes and (self.patience or self.policy_from == "best"):
            raise problem(f"patience {self.patience}, policy_from {self.policy_from!r} with holdout_episodes 0",
                          "held-out episodes, which decide what is best", "pass --holdout-episodes 1")  # fmt: skip

    def _check_head(self) -> None:
        if self.head == "tokens":
            if self.proprio or self.film:
                raise problem(f"proprio {self.proprio}, film {self.film} with head 'tokens'", "parallel decoding, which has them",
                              "pass --head l1 or --head discrete, or drop them")  # fmt: skip
            return
        if self.placement not in ("auto", "tail"):
            raise problem(f"placement {self.placement!r} with head {self.head!r}", "placement tail: OpenVLA's own action ids",
                          "drop --placement")  # fmt: skip
        for name, value in (
            ("--stop-token", self.stop_token), ("--vl-data", self.vl_data), ("--language-motion", self.language_motion),
            ("--numbers-as tokens", self.numbers_as == "tokens"),
        ):  # fmt: skip
            if value:
                fix = "pass --no-stop-token" if name == "--stop-token" else f"drop {name}"
                raise problem(f"{name} with head {self.head!r}", "one of them: parallel decoding has actions alone, and words",
                              f"{fix}, or pass --head tokens")  # fmt: skip
        if self.proprio and self.state_dropout:
            raise problem("--proprio with --state-dropout", "a state for every sample: its token cannot be left out",
                          "drop one of them")  # fmt: skip
