"""OpenVLA on today's transformers and timm: its published checkpoints are read and written without remote code."""
