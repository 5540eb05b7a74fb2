"""Independent PyTorch references for the parity tests; nothing here imports our model code.

`qwen2_model` maps random Qwen v1 weights onto transformers' Qwen2ForCausalLM (w1 is up_proj, w2 is
gate_proj, c_attn is q, k and v stacked). `TorchQwen` is a short module written from the published
rules for what Qwen2 lacks: dynamic NTK and logn attention.
"""

import math

import numpy as np
import torch
import transformers


def random_weights(cfg, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors under Qwen v1 names; biases large, as in the real models."""
    rng = np.random.default_rng(seed)
    D, F, V, M = cfg.hidden_size, cfg.ffn_size, cfg.vocab_size, cfg.attention_size

    def normal(*shape, std):
        return (rng.standard_normal(shape) * std).astype(np.float32)

    weights = {
        "transformer.wte.weight": normal(V, D, std=1.0),
        "transformer.ln_f.weight": 1 + normal(D, std=0.1),
        "lm_head.weight": normal(V, D, std=D**-0.5),
    }
    for i in range(cfg.num_layers):
        h = f"transformer.h.{i}."
        weights |= {
            h + "ln_1.weight": 1 + normal(D, std=0.1),
            h + "attn.c_attn.weight": normal(3 * M, D, std=D**-0.5),
            h + "attn.c_attn.bias": normal(3 * M, std=1.0),
            h + "attn.c_proj.weight": normal(D, M, std=M**-0.5),
            h + "ln_2.weight": 1 + normal(D, std=0.1),
            h + "mlp.w1.weight": normal(F, D, std=D**-0.5),
            h + "mlp.w2.weight": normal(F, D, std=D**-0.5),
            h + "mlp.c_proj.weight": normal(D, F, std=F**-0.5),
        }
    return weights


def to_qwen2_names(cfg, weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Renames (and splits) Qwen v1 tensors to the state dict of Qwen2ForCausalLM."""
    state = {
        "model.embed_tokens.weight": weights["transformer.wte.weight"],
        "model.norm.weight": weights["transformer.ln_f.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for i in range(cfg.num_layers):
        h, t = f"transformer.h.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            parts = np.split(weights[f"{h}attn.c_attn.{kind}"], 3)
            for name, part in zip("qkv", parts, strict=True):
                state[f"{t}self_attn.{name}_proj.{kind}"] = part
        for ours, theirs in (
            ("ln_1", "input_layernorm"),
            ("attn.c_proj", "self_attn.o_proj"),
            ("ln_2", "post_attention_layernorm"),
            ("mlp.w1", "mlp.up_proj"),
            ("mlp.w2", "mlp.gate_proj"),
            ("mlp.c_proj", "mlp.down_proj"),
        ):
            state[f"{t}{theirs}.weight"] = weights[f"{h}{ours}.weight"]
    return {name: torch.tensor(np.asarray(w, np.float32)) for name, w in state.items()}


def qwen2_model(cfg, weights: dict[str, np.ndarray]) -> transformers.Qwen2ForCausalLM:
    """transformers' model in float32 with these weights, eager attention, no dropout."""
    config = transformers.Qwen2Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.ffn_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_heads,
        head_dim=cfg.head_dim,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_base},
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"
    model = transformers.Qwen2ForCausalLM(config)
    if cfg.attention_size != cfg.hidden_size or model.model.layers[0].self_attn.q_proj.bias is None:
        raise ValueError("the Qwen2 reference needs N * H = D")
    model.load_state_dict(to_qwen2_names(cfg, weights), strict=True)
    return model.float().eval()


class TorchQwen:
    """Qwen v1 with dynamic NTK and logn, in float32, one sequence at a time, no cache."""

    def __init__(self, cfg, weights: dict[str, np.ndarray], dtype=torch.float32):
        self.cfg = cfg
        self.w = {
            name: torch.tensor(np.asarray(w, np.float32), dtype=dtype)
            for name, w in weights.items()
        }

    def norm(self, x, name):
        variance = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + self.cfg.norm_eps) * self.w[name]

    def rotate(self, x, alpha):  # x [T, N, H]
        cfg = self.cfg
        base = cfg.rope_base * alpha ** (cfg.head_dim / (cfg.head_dim - 2))
        inverse = 1.0 / base ** (torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)
        angle = torch.outer(torch.arange(x.shape[0]).float(), inverse)
        angle = torch.cat([angle, angle], dim=-1)[:, None].to(x.dtype)
        half = cfg.head_dim // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * angle.cos() + turned * angle.sin()

    def logits(self, ids, prompt_length: int | None = None):
        """ids [T] -> logits [T, V]; prompt_length fixes the NTK alpha (default: all of ids)."""
        cfg, w = self.cfg, self.w
        T = len(ids)
        n = prompt_length or T
        alpha = 1.0
        if cfg.use_dynamic_ntk:
            alpha = max(2 ** math.ceil(math.log(n / cfg.seq_length, 2) + 1) - 1, 1)
        x = w["transformer.wte.weight"][torch.as_tensor(ids)]
        for i in range(cfg.num_layers):
            h = f"transformer.h.{i}."
            y = self.norm(x, h + "ln_1.weight")
            y = y @ w[h + "attn.c_attn.weight"].T + w[h + "attn.c_attn.bias"]
            q, k, v = (part.view(T, cfg.num_heads, cfg.head_dim) for part in y.chunk(3, -1))
            q, k = self.rotate(q, alpha), self.rotate(k, alpha)
            if cfg.use_logn_attn and cfg.seq_length < T:
                steps = [
                    math.log(p + 1, cfg.seq_length) if p + 1 > cfg.seq_length else 1.0
                    for p in range(T)
                ]
                q = q * torch.tensor(steps, dtype=q.dtype)[:, None, None]
            scores = torch.einsum("tnh,snh->nts", q, k) / math.sqrt(cfg.head_dim)
            scores = scores.masked_fill(
                torch.triu(torch.ones(T, T, dtype=torch.bool), 1), -torch.inf
            )
            y = torch.einsum("nts,snh->tnh", scores.softmax(-1), v).reshape(T, -1)
            x = x + y @ w[h + "attn.c_proj.weight"].T
            y = self.norm(x, h + "ln_2.weight")
            up, gate = y @ w[h + "mlp.w1.weight"].T, y @ w[h + "mlp.w2.weight"].T
            x = x + (up * torch.nn.functional.silu(gate)) @ w[h + "mlp.c_proj.weight"].T
        return self.norm(x, "transformer.ln_f.weight") @ w["lm_head.weight"].T
