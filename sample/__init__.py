"""Programs that run a model: `sample.chat` in a terminal, `sample.generate` over a file.

They know the command line, text and ChatML; everything else is in qwen_jax.
"""
