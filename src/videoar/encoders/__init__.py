"""The two ends: pixels to latents and back, prompts to rows."""
