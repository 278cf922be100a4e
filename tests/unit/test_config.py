"""config.json in both published spellings: one model, nothing guessed, and the sizes that follow from it."""

import dataclasses
import json
from pathlib import Path

import pytest

from gptoss_jax.model.config import (
    ConfigError,
    ModelConfig,
    parse_config,
    read_config,
    to_huggingface,
)

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.json"))
LARGE, SMALL = (json.loads((ROOT / "configs" / f"gpt-oss-{size}.json").read_text()) for size in ("120b", "20b"))
# openai/gpt-oss-20b, original/config.json, as published
OPENAI = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}


def changed(raw: dict, **changes) -> dict:
    """The config with other values."""
    return raw | changes


def without(raw: dict, *keys: str) -> dict:
    """The config without some keys."""
    return {key: value for key, value in raw.items() if key not in keys}


def rope(**changes) -> dict:
    """The 20b's config with another rope_scaling."""
    return SMALL | {"rope_scaling": SMALL["rope_scaling"] | changes}


def test_both_spellings_are_one_model():
    """Guards against alpha and beta swapped, or an epsilon that only one spelling names."""
    assert parse_config(OPENAI) == parse_config(SMALL)
    config = parse_config(OPENAI)
    assert (config.rope_beta_slow, config.rope_beta_fast) == (1, 32)
    assert config.rms_norm_eps == 1e-5
    assert config.max_context_tokens == 131_072


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_is_written_reads_back_as_the_same_model(path):
    """Guards against a number lost on the way into a checkpoint."""
    config = read_config(path)
    assert parse_config(json.loads(json.dumps(to_huggingface(config)))) == config


def test_every_field_reaches_the_written_config():
    """Guards against a field that `to_huggingface` takes from a default: each is changed in turn."""
    config = parse_config(SMALL)
    for field in dataclasses.fields(ModelConfig):
        value = getattr(config, field.name)
        other = {
            "stop_ids": (200_002,),
            "pad_id": 7,
            "num_kv_heads": 16,
            "num_heads": 32,
            "experts_per_token": 5,
        }.get(field.name, value if isinstance(value, tuple) else 2 * value)
        if field.name == "stop_ids":
            continue  # the published vocabulary has them fixed
        altered = dataclasses.replace(config, **{field.name: other})
        assert parse_config(to_huggingface(altered)) == altered, field.name


def test_newer_transformers_spell_rope_differently():
    """Guards configs of transformers 5, which writes rope_parameters with rope_theta in it."""
    raw = without(SMALL, "rope_scaling", "rope_theta")
    raw["rope_parameters"] = SMALL["rope_scaling"] | {"rope_theta": SMALL["rope_theta"]}
    assert parse_config(raw) == parse_config(SMALL)


def test_stop_ids_are_harmony_s():
    """Guards against generation that runs on after a tool call: the published config.json names <|return|> alone."""
    assert set(parse_config(SMALL).stop_ids) == {200_002, 200_012, 199_999}
    small = parse_config(changed(SMALL, vocab_size=512, eos_token_id=[510, 509], pad_token_id=None))
    assert (small.stop_ids, small.pad_id) == ((510, 509), 511)


REFUSED = {
    "unknown key": (changed(SMALL, attention_chunk=3), "unknown key attention_chunk"),
    "missing key": (without(SMALL, "head_dim", "swiglu_limit"), "missing key head_dim; missing key swiglu_limit"),
    "missing rope": (without(SMALL, "rope_scaling"), "missing key rope_scaling.factor"),
    "unknown rope key": (rope(mscale=2.0), "unknown key rope_scaling.mscale"),
    "rounded YaRN": (rope(truncate=True), "rope_scaling.truncate is True, expected False"),
    "another rope": (rope(rope_type="linear"), "rope_scaling.rope_type is 'linear', expected 'yarn'"),
    "another model": (changed(SMALL, model_type="llama"), "model_type is 'llama', expected 'gpt_oss'"),
    "tied": (changed(SMALL, tie_word_embeddings=True), "tie_word_embeddings is True, expected False"),
    "no attention bias": (changed(SMALL, attention_bias=False), "attention_bias is False, expected True"),
    "swapped layers": (
        changed(SMALL, layer_types=SMALL["layer_types"][::-1]),
        "expected 24, sliding_attention on the even ones",
    ),
    "uneven heads": (
        changed(SMALL, num_key_value_heads=7),
        "num_heads 64 is not a multiple of num_kv_heads 7",
    ),
    "odd head": (changed(SMALL, head_dim=63), "head_dim 63 is odd, but rotary embedding turns pairs"),
    "top_k": (changed(SMALL, num_experts_per_tok=33), "experts_per_token 33 exceeds num_experts 32"),
    "blocks": (
        changed(SMALL, intermediate_size=2890),
        "intermediate_size 2890 is not a multiple of the MXFP4 block of 32",
    ),
    "zero": (changed(SMALL, num_hidden_layers=0), "num_layers is 0, expected a number above 0"),
    "stop id outside": (changed(SMALL, vocab_size=512), "special token id 200002 is outside the vocabulary of 512"),
    "no object": ([1, 2], "expected an object of keys and values, got list"),
    "rope no object": (changed(SMALL, rope_scaling="yarn"), "rope_scaling is 'yarn', expected an object"),
    "infinite": (changed(SMALL, rope_theta=float("inf")), "rope_theta is inf, expected a number"),
    "no token id": (changed(SMALL, eos_token_id=[1.5]), "eos_token_id is [1.5], expected token ids"),
    "openai unknown": (changed(OPENAI, qk_norm=True), "unknown key qk_norm"),
    "openai missing": (without(OPENAI, "rope_theta"), "missing key rope_theta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_gpt_oss_is_refused_by_name(case, tmp_path):
    """Guards against a key that changes the mathematics and is passed over."""
    raw, text = REFUSED[case]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ") and text in str(error.value)


def test_all_faults_are_in_one_message():
    """Guards against one fault a run."""
    with pytest.raises(ConfigError) as error:
        parse_config(changed(without(rope(truncate=True), "head_dim"), extra=1, hidden_act="gelu"))
    assert str(error.value).split("; ") == [
        "unknown key extra",
        "missing key head_dim",
        "hidden_act is 'gelu', expected 'silu'",
        "rope_scaling.truncate is True, expected False",
    ]


def test_absent_and_damaged_files_are_named(tmp_path):
    """Guards against a traceback for a mistyped folder."""
    with pytest.raises(ConfigError, match=r"config\.json: no such file; a checkpoint's folder holds its config\.json"):
        read_config(tmp_path / "config.json")
    for text in ("{", "[" * 100_000, f'{{"vocab_size": {"1" * 5000}}}'):  # the last two are no JSONDecodeErrors
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json: not JSON \("):
            read_config(tmp_path / "config.json")


def test_cache_bytes_at_the_longest_context():
    """Guards against sliding-window layers that keep everything: twice the memory."""
    assert parse_config(LARGE).cache_bytes(131_072) / 2**30 == pytest.approx(4.504, rel=1e-3)
    assert parse_config(SMALL).cache_bytes(131_072) / 2**30 == pytest.approx(3.003, rel=1e-3)


def test_weight_bytes_of_the_published_models():
    """Guards the cost model against the published files: 13,761,264,768 bytes of tensors in the 20b."""
    assert parse_config(SMALL).weight_bytes / 13_761_264_768 == pytest.approx(1, rel=0.002)
    assert parse_config(SMALL).weight_bytes < 13_761_264_768
    assert parse_config(LARGE).expert_bytes == 13_219_200


def test_decoding_reads_more_experts_the_more_slots():
    """Guards against every expert charged to one slot, or four experts to a thousand slots."""
    config = parse_config(SMALL)
    dense = config.attention_bytes + config.unembedding_bytes
    one = config.decode_bytes(1, 0) - dense
    many = config.decode_bytes(1000, 0) - dense
    assert one == config.num_layers * config.experts_per_token * config.expert_bytes
    assert many == pytest.approx(config.num_layers * config.num_experts * config.expert_bytes, rel=1e-6)
    assert config.decode_bytes(2, 500) - config.decode_bytes(2, 0) == 2 * config.cache_bytes(500)


def test_small_vocabulary_without_stop_ids():
    """Guards OpenAI's format, whose config names no stop ids: a small vocabulary has none, and that reads back."""
    none = parse_config(changed(SMALL, vocab_size=512, eos_token_id=None, pad_token_id=None))
    assert (none.stop_ids, none.pad_id) == ((), 511)
    assert parse_config(to_huggingface(none)) == none
