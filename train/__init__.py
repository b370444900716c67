"""Stage 2: a latent cache becomes a LoRA."""
