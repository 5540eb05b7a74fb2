"""generation_config.json against transformers' GenerationConfig and the published files of Qwen."""

import json

import pytest
import transformers

from qwen_jax.errors import InputError
from qwen_jax.generation_config import GenerationDefaults, load
from qwen_jax.sampling import SamplingParams

# The file of Qwen-72B-Chat with its misspelt key.
QWEN_72B_CHAT = {
    "chat_format": "chatml",
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "max_window_size": 6144,
    "max_new_tokens": 512,
    "do_sample": True,
    "emperature": 0.95,
    "top_k": 50,
    "top_p": 0.8,
    "repetition_penalty": 1.1,
    "transformers_version": "4.31.0",
}
# The file of Qwen-7B.
QWEN_7B = {
    "chat_format": "raw",
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "stop_words_ids": [[151643]],
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
    "transformers_version": "4.31.0",
}


def write(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    return folder


def test_misspelt_temperature_is_warned_about(tmp_path):
    defaults, warnings = load(write(tmp_path, QWEN_72B_CHAT))
    assert len(warnings) == 1
    assert "'emperature'" in warnings[0] and "did you mean 'temperature'?" in warnings[0]
    assert "\n" not in warnings[0] and "generation_config.json" in warnings[0]
    assert defaults == GenerationDefaults(
        do_sample=True,
        temperature=1.0,
        top_k=50,
        top_p=0.8,
        repetition_penalty=1.1,
        max_new_tokens=512,
        max_window_size=6144,
        chat_format="chatml",
        eos_token_ids=(151643,),
        pad_token_id=151643,
    )
    assert defaults.stop_ids == {151643}


def test_base_model_file_is_read_without_warning(tmp_path):
    defaults, warnings = load(str(write(tmp_path, QWEN_7B)))
    assert warnings == []
    assert (defaults.chat_format, defaults.top_k, defaults.stop_ids) == ("raw", 0, {151643})
    assert defaults.sampling_params() == SamplingParams(top_p=0.8)


@pytest.mark.parametrize("content", [QWEN_72B_CHAT, QWEN_7B, {"do_sample": True}, {}])
def test_settings_equal_those_of_transformers(tmp_path, content):
    write(tmp_path, content)
    theirs = transformers.GenerationConfig.from_pretrained(str(tmp_path))
    filled = transformers.GenerationConfig._get_default_generation_params()
    defaults, _ = load(tmp_path)
    for key in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"):
        value = getattr(theirs, key)
        assert getattr(defaults, key) == (filled[key] if value is None else value), key


def test_every_key_of_transformers_is_known(tmp_path):
    """Saved whole, with every value at its default, a Hugging Face config draws no warning."""
    keys = set(vars(transformers.GenerationConfig())) - {"_original_object_hash"}
    defaults = transformers.GenerationConfig._get_default_generation_params()
    content = {key: defaults.get(key) for key in sorted(keys)}
    assert len(content) > 60
    assert load(write(tmp_path, content))[1] == []
    assert load(write(tmp_path, {key: None for key in content}))[1] == []


def test_missing_file_gives_documented_defaults(tmp_path):
    defaults, warnings = load(tmp_path)
    assert defaults == GenerationDefaults()
    assert len(warnings) == 1 and "does not exist" in warnings[0]
    assert defaults.sampling_params().greedy
    assert defaults.chat_format == "chatml" and defaults.stop_ids == frozenset()
    (tmp_path / "generation_config.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("typical_p", 0.9),
        ("min_p", 0.05),
        ("top_h", 0.4),
        ("no_repeat_ngram_size", 3),
        ("min_new_tokens", 5),
        ("max_length", 4096),
        ("bad_words_ids", [[5]]),
        ("suppress_tokens", [5]),
        ("epsilon_cutoff", 1e-4),
        ("stop_strings", ["Human:"]),
        ("penalty_alpha", 0.6),
        ("guidance_scale", 1.5),
        ("stop_words_ids", [[1, 2], [3]]),
    ],
)
def test_what_is_not_implemented_is_warned_about(tmp_path, key, value):
    _, warnings = load(write(tmp_path, {key: value}))
    assert len(warnings) == 1 and key in warnings[0] and "implemented" in warnings[0]


def test_values_that_change_nothing_are_not_warned_about(tmp_path):
    off = {"num_beams": 1, "typical_p": 1.0, "min_p": 0, "suppress_tokens": [], "min_length": 0}
    assert load(write(tmp_path, off | {"max_length": 8192, "max_new_tokens": 9}))[1] == []


def test_sampling_settings_without_do_sample_are_warned_about(tmp_path):
    content = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
    defaults, warnings = load(write(tmp_path, content))
    assert defaults.sampling_params().greedy
    assert [w.split(": ")[1].split()[0] for w in warnings] == ["temperature", "top_p"]
    assert load(write(tmp_path, content | {"do_sample": True}))[1] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_sample", "true"),
        ("do_sample", 1),
        ("temperature", "hot"),
        ("temperature", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 50.0),
        ("top_k", True),
        ("top_p", 1.01),
        ("top_p", -0.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", [1.1]),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2**40),
        ("max_window_size", 0),
        ("max_window_size", "6144"),
        ("chat_format", "llama"),
        ("chat_format", ["chatml"]),
        ("eos_token_id", "151643"),
        ("eos_token_id", [151643, -1]),
        ("eos_token_id", [True]),
        ("pad_token_id", 1.5),
        ("pad_token_id", [151643]),
        ("stop_words_ids", [151643]),
        ("stop_words_ids", [["x"]]),
    ],
)
def test_bad_values_name_file_key_and_expectation(tmp_path, key, value):
    with pytest.raises(InputError) as error:
        load(write(tmp_path, {key: value}))
    message = str(error.value)
    assert str(tmp_path / "generation_config.json") in message
    assert key in message and "expected" in message and "\n" not in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"top_k": 1,}', '{"top_k":1,"top_k":2}'])
def test_bad_json_names_the_file(tmp_path, text):
    with pytest.raises(InputError, match=r"generation_config\.json"):
        load(write(tmp_path, text))


def test_null_is_off_or_unset(tmp_path):
    content = {
        "do_sample": None,
        "top_k": None,
        "temperature": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "max_new_tokens": None,
        "chat_format": None,
        "num_beams": None,
    }
    defaults, warnings = load(write(tmp_path, content))
    assert warnings == []
    assert defaults == GenerationDefaults(top_k=0)


def test_end_ids_are_one_or_a_list(tmp_path):
    content = {"eos_token_id": [151645, 151643], "stop_words_ids": [[151644]]}
    defaults, _ = load(write(tmp_path, content))
    assert defaults.eos_token_ids == (151645, 151643)
    assert defaults.stop_ids == {151643, 151644, 151645}


def test_overrides_are_merged():
    file = GenerationDefaults(do_sample=True, top_p=0.8, repetition_penalty=1.1, max_new_tokens=9)
    assert file.sampling_params(top_k=0, seed=3) == SamplingParams(
        top_k=0, top_p=0.8, repetition_penalty=1.1, max_new_tokens=9, seed=3
    )
    assert file.sampling_params(temperature=0.5).temperature == 0.5
    assert file.sampling_params(repetition_penalty=1.0).repetition_penalty == 1.0
    assert file.sampling_params(greedy=True, temperature=0.5).greedy
    assert file.sampling_params(temperature=0).greedy
    with pytest.raises(InputError, match="temperature is 0"):
        file.sampling_params(greedy=False, temperature=0)
    with pytest.raises(InputError, match="top_k is -1"):
        file.sampling_params(top_k=-1)


def test_a_sampling_setting_switches_sampling_on():
    file = GenerationDefaults()
    assert file.sampling_params(max_new_tokens=5, repetition_penalty=1.2, seed=1).greedy
    for given in ({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"greedy": False}):
        assert not file.sampling_params(**given).greedy
    assert file.sampling_params(greedy=True, top_k=5).greedy
