"""Weights in and out: Hugging Face folders to our checkpoints, back again, and proof of both."""
