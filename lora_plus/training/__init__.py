"""LoRA+ learning rates, and what guards a run."""
