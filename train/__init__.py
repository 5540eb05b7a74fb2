"""Fine-tuning: data, loss, one training step and the LoRA loop."""
