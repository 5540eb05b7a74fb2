"""The usual PyTorch stack at the same shape: transformers + bitsandbytes NF4 + PEFT.

Qwen2 stands for Qwen v1: the same layers without the separate names. Its layers are made and
quantized one by one on the GPU, with random weights, so that no checkpoint is needed; gradient
checkpointing, SDPA attention, bf16, rank 8 on all linear layers, AdamW. The last line is tokens/s.
"""

import dataclasses
import json
import pathlib
import time

from qwen_jax.cli import parse, run

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times QLoRA steps of transformers + bitsandbytes + PEFT."""

    config: str = "qwen_72b"
    """a file in configs/"""
    layers: int | None = None
    """unset: as many as the config has"""
    seq: int = 2048
    """tokens of a sequence"""
    batch: int = 1
    """sequences a step"""
    steps: int = 5
    """timed steps"""


def build(args: Args):
    """The quantized model with its adapters, on the GPU."""
    import bitsandbytes as bnb
    import peft
    import torch
    import transformers

    hf = json.loads((CONFIGS / f"{args.config}.json").read_text())
    config = transformers.Qwen2Config(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"] // 2,
        num_hidden_layers=args.layers or hf["num_hidden_layers"],
        num_attention_heads=hf["num_attention_heads"],
        num_key_value_heads=hf["num_attention_heads"],
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)

    def quantized(linear: torch.nn.Linear) -> torch.nn.Module:
        out = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        w = torch.empty(
            linear.out_features, linear.in_features, dtype=torch.bfloat16, device="cuda"
        ).normal_(std=0.02)
        out.weight = bnb.nn.Params4bit(
            w, requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to("cuda")
        if linear.bias is not None:
            zeros = torch.zeros(linear.out_features, dtype=torch.bfloat16, device="cuda")
            out.bias = torch.nn.Parameter(zeros, requires_grad=False)
        return out

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, quantized(child))
    for name, value in list(model.named_parameters()):
        if value.is_meta:
            parent, _, leaf = name.rpartition(".")
            made = torch.empty(value.shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
            made = torch.ones_like(made) if "norm" in name else made
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(made, False))
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=config, device="cuda")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, lora)
    model.train()
    return model, config


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, argv)
    import bitsandbytes
    import peft
    import torch
    import transformers

    model, config = build(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = torch.randint(0, config.vocab_size, (args.batch, args.seq), device="cuda")

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    losses = [float(step()) for _ in range(2)]
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(args.steps):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / args.steps
    rate = args.batch * args.seq / seconds
    print(
        f"seq {args.seq:>5}  peer {seconds:.4f} s/step {rate:.1f} tok/s  peak "
        f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB  loss {losses[0]:.3f} {losses[-1]:.3f}  "
        f"torch {torch.__version__}, transformers {transformers.__version__}, bitsandbytes "
        f"{bitsandbytes.__version__}, peft {peft.__version__}"
    )
    print(rate)


if __name__ == "__main__":
    run(main)
