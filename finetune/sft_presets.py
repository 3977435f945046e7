"""The presets of `vla finetune`: published recipes, and what the demo uses."""

from __future__ import annotations

from pathlib import Path

from vla.finetune.sft_settings import Settings

PRESETS = {
    # make demo's recipe: built-in VLM, a few demonstrations per Meta-World task; minutes on 2 CPU cores.
    "tiny-demo": Settings(
        data=(), out=Path("runs/sft"), horizon=3, added_init="numbers", lora_r=16, lora_alpha=32, lr=3e-3, batch_size=16,
        steps=300, warmup_steps=20, loss_over="actions", state_low=(-0.5, 0.35, 0.0, 0.0), state_high=(0.5, 1.0, 0.5, 1.0),
        gripper_convention="+1 closes, -1 opens",
    ),
    # OpenVLA on new data by its own script's recipe (openvla/openvla@c8f03f4, vla-scripts/finetune.py): FinetuneConfig's
    # values, LoraConfig's, AdamW's of PyTorch, no clipping; `all-linear` and the loss as there. What trains is float32 where
    # the script has bfloat16. Not measured at full size.
    "openvla": Settings(
        data=(), out=Path("runs/openvla"), backbone="openvla/openvla-7b", horizon=1, state=False, crop_area=0.9, augment=True,
        lora_r=32, lora_alpha=16, lora_init="gaussian", lora_parts=("all-linear",), stop_token=True, steps=200_000,
        batch_size=16, lr=5e-4, schedule="constant", warmup_steps=0, weight_decay=0.01, clip_norm=0.0, precision="bf16",
        cache_images=False, save_every_steps=5000, keep_checkpoints=1, eval_every_steps=5000,
    ),
    # OpenVLA-OFT's recipe for LIBERO (moojink/openvla-oft@213c5ff, vla-scripts/finetune.py and LIBERO.md): L1 regression, state,
    # third-person and wrist camera, chunks of 8, LoRA r 32 alpha 16 on all linear layers, 5e-4 falling to 5e-5 after 100,000 of
    # 150,000 steps, no clipping, batch 8 on each of 8 GPUs, random crops. They report 62 GB each; the estimate here is 53 GB,
    # and 22 GB with --gradient-checkpointing. What trains is float32, where their head is bfloat16. RLDS data of theirs is
    # turned already: add --frames-turned. Not measured at full size.
    "openvla-oft": Settings(
        data=(), out=Path("runs/oft"), backbone="openvla/openvla-7b", protocol="oft", augment=True,
        cameras=("agentview=agentview|primary|image", "wrist=wrist|wrist_image|image2"),
        horizon=8, head="l1", proprio=True, state=False, lora_r=32, lora_alpha=16, lora_init="gaussian", lora_parts=("all-linear",),
        steps=150_000, batch_size=8, lr=5e-4, schedule="step", decay_at_step=100_000, warmup_steps=0, weight_decay=0.01,
        clip_norm=0.0, precision="bf16", cache_images=False, save_every_steps=10_000, eval_every_steps=10_000,
    ),
    # The same recipe on a VLM that knows no actions: r 32, alpha 16, constant 5e-4, no warm-up, one action per query.
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
