"""Stage 3: a LoRA and prompts become videos."""
