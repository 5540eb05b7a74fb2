"""generation_config.json: how a model's publisher wants it sampled.

A misspelt key there ("emperature") has shipped with a 72B model and was dropped without a word;
here every key is used, listed below as harmless, or warned about. It knows no model and no
tokenizer.

Keys that are missing have Hugging Face's meaning: greedy, and once sampling is on, top_k 50. Where
that is of no use to Qwen they have Qwen's published value: 512 new tokens (Hugging Face stops at
20 with the prompt), a window of 6144 tokens, the ChatML format. A missing file is all of these.
"""

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen_jax.config import read_json_object
from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.sampling import SamplingParams, check_setting

_FILE = "generation_config.json"
_CHAT_FORMATS = ("chatml", "raw")

# Keys that change no token we choose: records, outputs, caches, compilation, the tuning of beam
# search and of assisted decoding (which themselves stand below), encoder-decoder models.
_HARMLESS = (
    "transformers_version trust_remote_code _from_model_config _commit_hash _name_or_path "
    "bos_token_id decoder_start_token_id use_cache cache_implementation cache_config max_cache_len "
    "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate "
    "early_stopping length_penalty low_memory renormalize_logits "
    "encoder_repetition_penalty encoder_no_repeat_ngram_size is_assistant num_assistant_tokens "
    "num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit "
    "assistant_lookbehind target_lookbehind assistant_ensemble_weight prompt_lookup_num_tokens "
    "max_matching_ngram_size speculation_type use_mtp compile_config disable_compile "
    "continuous_batching_config prefill_chunk_size"
)

# Keys of Hugging Face that would change the text and are not implemented, with the value that
# turns each off; null does too.
_NOT_IMPLEMENTED: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "num_return_sequences": 1,
    "max_length": 20,  # Hugging Face's default
    "min_length": 0,
    "min_new_tokens": 0,
    "max_time": None,
    "stop_strings": None,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "token_healing": False,
    "remove_invalid_values": False,
    "watermarking_config": None,
}


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What generation_config.json says; the defaults are those of a missing key."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50  # 0 is off
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    max_window_size: int = 6144  # tokens of the chat prompt, history included
    chat_format: str = "chatml"  # or "raw": the prompt is plain text to be continued
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # further ids that end the text, from stop_words_ids

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every id that ends the text; empty when the file names none."""
        return frozenset(self.eos_token_ids + self.stop_token_ids)

    def sampling_params(
        self,
        *,
        greedy: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
    ) -> SamplingParams:
        """These defaults with what the user gave; None means not given.

        Who gives temperature, top_k or top_p and not `greedy` wants sampling, whatever the file
        says, for they do nothing without it; temperature 0 then means greedy, as in the APIs that
        people come from. Raises InputError for a value out of range.
        """
        if greedy is None:
            if temperature is not None and temperature == 0 and not isinstance(temperature, bool):
                greedy, temperature = True, None
            else:
                given = any(value is not None for value in (temperature, top_k, top_p))
                greedy = not (self.do_sample or given)
        return SamplingParams(
            greedy=greedy,
            temperature=_given(temperature, self.temperature),
            top_k=_given(top_k, self.top_k),
            top_p=_given(top_p, self.top_p),
            repetition_penalty=_given(repetition_penalty, self.repetition_penalty),
            max_new_tokens=_given(max_new_tokens, self.max_new_tokens),
            seed=_given(seed, 0),
        )


def load(folder: str | os.PathLike) -> tuple[GenerationDefaults, list[str]]:
    """Reads `folder`/generation_config.json; the second value is warnings, one line each.

    A missing file is one warning. Raises InputError for a file that is no JSON object and for a
    value of the wrong type or out of range; warns about unknown keys and about settings that would
    change the text and are not implemented.
    """
    path = pathlib.Path(folder) / _FILE
    if not os.path.lexists(path):
        return GenerationDefaults(), [
            f"{path} does not exist: greedy unless sampling is asked for, up to 512 new tokens"
        ]
    content = read_json_object(path)
    try:
        values, warnings = _read_values(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    warnings += _doubts(content)
    return GenerationDefaults(**values), [f"{path}: {warning}" for warning in warnings]


def _read_values(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields of GenerationDefaults from the keys that are used."""
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for key, read in _READERS.items():
        if content.get(key) is not None:
            field = _FIELD_OF.get(key, key)
            values[field] = read(key, content[key])
    if "top_k" in content and content["top_k"] is None:
        values["top_k"] = 0
    stops = values.get("stop_token_ids", ())
    if longer := [list(stop) for stop in stops if len(stop) != 1]:
        warnings.append(f"stop_words_ids has {longer}; only stops of one token are implemented")
    values["stop_token_ids"] = tuple(stop[0] for stop in stops if len(stop) == 1)
    return values, warnings


def _doubts(content: dict[str, Any]) -> list[str]:
    """Warnings about what the file says and we do not do."""
    warnings = []
    known = [*_READERS, *_HARMLESS.split(), *_NOT_IMPLEMENTED]
    for key, value in content.items():
        if key not in known:
            warnings.append(f"the unknown key {key!r} is ignored{did_you_mean(key, known)}")
        elif key == "max_length" and content.get("max_new_tokens") is not None:
            continue  # Hugging Face ignores it too beside max_new_tokens
        elif key in _NOT_IMPLEMENTED and value not in (None, [], _NOT_IMPLEMENTED[key]):
            warnings.append(f"{key} {value!r} is not implemented and is ignored")
    if not content.get("do_sample"):
        for key, idle in {"temperature": 1.0, "top_k": 50, "top_p": 1.0}.items():
            if content.get(key) not in (None, 0, idle):
                warnings.append(f"{key} {content[key]!r} has no effect: do_sample is not true")
    return warnings


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _setting(key: str, value: Any) -> Any:
    check_setting(key, value)
    return float(value) if isinstance(getattr(GenerationDefaults, key), float) else value


def _boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{key} is {value!r}; expected true or false")
    return value


def _window(key: str, value: Any) -> int:
    if not _is_whole(value) or value < 1:
        raise InputError(f"{key} is {value!r}; expected a whole number of tokens over 0")
    return value


def _chat_format(key: str, value: Any) -> str:
    if value not in _CHAT_FORMATS:
        raise InputError(f"{key} is {value!r}; expected one of {', '.join(_CHAT_FORMATS)}")
    return value


def _token_id(key: str, value: Any) -> int:
    if not _is_whole(value) or value < 0:
        raise InputError(f"{key} has {value!r}; expected a token id, a whole number from 0")
    return value


def _token_ids(key: str, value: Any) -> tuple[int, ...]:
    return tuple(_token_id(key, v) for v in (value if isinstance(value, list) else [value]))


def _stop_words(key: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not all(isinstance(stop, list) for stop in value):
        raise InputError(f"{key} is {value!r}; expected a list of lists of token ids")
    return tuple(_token_ids(key, stop) for stop in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value < 2**31


# Every key that is used and what reads it.
_READERS: dict[str, Callable[[str, Any], Any]] = {
    "do_sample": _boolean,
    "temperature": _setting,
    "top_k": _setting,
    "top_p": _setting,
    "repetition_penalty": _setting,
    "max_new_tokens": _setting,
    "max_window_size": _window,
    "chat_format": _chat_format,
    "eos_token_id": _token_ids,
    "pad_token_id": _token_id,
    "stop_words_ids": _stop_words,
}
_FIELD_OF = {"eos_token_id": "eos_token_ids", "stop_words_ids": "stop_token_ids"}
