"""What a Qwen v1 model is made of: one frozen dataclass, read strictly from a Hugging Face config.

Every field changes the computation (a test changes each and sees the output change). Keys of the
published config.json that do not change it are listed by name below; a key that is on neither
list is an error, because a silently dropped key has cost other ports their rope base.
"""

import dataclasses
import pathlib
from typing import Any

from qwen_jax.errors import InputError, did_you_mean, shown
from qwen_jax.files import read_json_object

# Our field -> key in config.json, with the name that older Qwen revisions used.
_FIELDS = {
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "head_dim": ("kv_channels",),
    "norm_eps": ("layer_norm_epsilon",),
    "rope_base": ("rotary_emb_base", "rope_theta"),
    "seq_length": ("seq_length",),
    "use_dynamic_ntk": ("use_dynamic_ntk",),
    "use_logn_attn": ("use_logn_attn",),
    "initializer_range": ("initializer_range",),
}

# Keys whose other values would change the computation: only this value is implemented.
_REQUIRED_VALUES: dict[str, Any] = {
    "model_type": "qwen",
    "tie_word_embeddings": False,
    "no_bias": True,
    "scale_attn_weights": True,
    "rotary_pct": 1.0,
    "pos_emb": "rotary",
    "apply_residual_connection_post_layernorm": False,
    "activation": "swiglu",
    # The original inserts dropout in training when these are set; every published file has 0.
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "resid_dropout_prob": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}

# Keys that name files, precisions or switches of the PyTorch code and change no number of ours.
# "visual" is not among them: it marks Qwen-VL, a different model.
_IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "bf16",
        "bias_dropout_fusion",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "ffn_hidden_size",
        "fp16",
        "fp32",
        "intermediate_size",
        "max_position_embeddings",
        "n_inner",
        "n_positions",
        "onnx_safe",
        "pad_token_id",
        "params_dtype",
        "quantization_config",
        "softmax_in_fp32",
        "tokenizer_class",
        "tokenizer_type",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_cache_kernel",
        "use_cache_quantization",
        "use_flash_attn",
    }
)

_OTHER_FAMILIES = {
    "qwen2": "Qwen2/Qwen1.5/Qwen2.5",
    "qwen2_moe": "Qwen1.5-MoE",
    "qwen3": "Qwen3",
    "llama": "LLaMA",
    "baichuan": "Baichuan",
    "chatglm": "ChatGLM",
    "mistral": "Mistral",
}


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "head_dim",
    "ffn_size",
    "seq_length",
)
_MOST_LAYERS = 2**14


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyperparameters of one Qwen v1 model; sizes are counts of elements."""

    vocab_size: int  # V, rows of the embedding, padding included
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int  # N
    head_dim: int  # H
    ffn_size: int  # F, half of config.json's intermediate_size
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    seq_length: int = 8192  # tokens seen in training; past it dynamic NTK and logn set in
    use_dynamic_ntk: bool = False
    use_logn_attn: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        for name in _COUNTS:
            self._check_positive(name)
        if self.num_layers >= _MOST_LAYERS:  # every layer has names, which are made before any file
            raise InputError(f"num_layers is {self.num_layers}; expected under {_MOST_LAYERS}")
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}: rotary embedding needs an even size")
        if not (self.rope_base > 1 and self.norm_eps > 0):
            raise InputError(
                f"rope_base {self.rope_base} must be over 1 and norm_eps {self.norm_eps} over 0"
            )

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise InputError(f"{name} is {shown(value)}: a whole number over 0 is expected")

    @property
    def attention_size(self) -> int:
        """Width of the concatenated heads, N * H."""
        return self.num_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Reads what `to_dict` wrote; unknown or missing names are errors."""
        fields = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - fields):
            raise InputError(
                f"model config has unknown names {unknown}; known are {sorted(fields)}"
            )
        if missing := sorted(fields - set(values)):
            raise InputError(f"model config lacks {missing}")
        return cls(**values)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """Reads a published config.json.

        Raises InputError for another model family (and names it), for a key that is neither used
        nor known to be harmless, for a value of the wrong type, and for a switch that the original
        model has but no published checkpoint uses.
        """
        _check_family(hf)
        _check_keys(hf)
        values: dict[str, Any] = {}
        types = {f.name: f.type for f in dataclasses.fields(cls)}
        for field, keys in _FIELDS.items():
            found = {key: hf[key] for key in keys if hf.get(key) is not None}
            if any(value != first for value in found.values() for first in found.values()):
                both = ", ".join(f"{key} {shown(value)}" for key, value in found.items())
                raise InputError(f"config.json contradicts itself: {both} should be one value")
            if found:
                key, value = next(iter(found.items()))
                values[field] = _typed(key, value, types[field])
        if hf.get("intermediate_size") is None:
            raise InputError("config.json lacks intermediate_size (twice the FFN width)")
        width = _typed("intermediate_size", hf["intermediate_size"], int)
        if width % 2:
            raise InputError(
                f"intermediate_size is {width}: it must be even, the FFN is half of it"
            )
        values["ffn_size"] = width // 2
        for field in ("vocab_size", "hidden_size", "num_layers", "num_heads"):
            if field not in values:
                raise InputError(f"config.json lacks {_FIELDS[field][0]}")
        if "head_dim" not in values:
            values["head_dim"] = values["hidden_size"] // max(values["num_heads"], 1)
        return cls(**values)


def _check_family(hf: dict[str, Any]) -> None:
    model_type = hf.get("model_type")
    if "visual" in hf:
        raise InputError("this is Qwen-VL (config.json has 'visual'); only text models are covered")
    if model_type != "qwen":
        family = _OTHER_FAMILIES.get(model_type) if isinstance(model_type, str) else None
        known = f", that is {family}" if family else ""
        raise InputError(
            f"model_type is {shown(model_type)}{known}, not the original Qwen (v1): "
            "expected model_type 'qwen'; newer families run in their own maintained projects"
        )


def _check_keys(hf: dict[str, Any]) -> None:
    known = {key for keys in _FIELDS.values() for key in keys} | set(_REQUIRED_VALUES) | _IGNORED
    for key in hf:
        if key not in known:
            raise InputError(
                f"config.json has the unknown key {shown(key)}{did_you_mean(key, known)}"
            )
    for key, wanted in _REQUIRED_VALUES.items():
        if key in hf and hf[key] is not None and hf[key] != wanted:
            raise InputError(
                f"config.json has {key} {shown(hf[key])}; only {wanted!r} is implemented"
            )


def _typed(key: str, value: Any, kind: Any) -> Any:
    """Checks a JSON value against the type of its field; whole numbers may stand for floats."""
    is_bool = isinstance(value, bool)
    if kind is bool:
        good = is_bool
    elif kind is float:
        good = isinstance(value, int | float) and not is_bool and -1e30 < value < 1e30
    else:
        good = isinstance(value, int) and not is_bool
    if not good:
        raise InputError(f"config.json has {key} {shown(value)}; expected {kind.__name__}")
    return kind(value)


def load_hf_config(folder: pathlib.Path) -> ModelConfig:
    """Reads `folder`/config.json."""
    return ModelConfig.from_hf(read_json_object(folder / "config.json"))
