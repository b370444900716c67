"""Stage 1: videos and captions become a latent cache."""
