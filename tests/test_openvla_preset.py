"""`vla finetune openvla` and `--from`: fine-tuning what people own, with one preset and no code."""
