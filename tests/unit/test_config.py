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
from gptoss_jax.model.config_ranges import MAX_STOP_IDS, RANGES

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


SAVED_BY_TRANSFORMERS = {  # PretrainedConfig.to_dict() of 4.55 and 5.24, as far as the published file does not have it
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
    "pruned_heads": {},
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
    "task_specific_params": None,
    "tokenizer_class": None,
    "prefix": None,
    "bos_token_id": None,
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "max_length": 20,
    "temperature": 1.0,
    "exponential_decay_length_penalty": None,
    "_name_or_path": "openai/gpt-oss-20b",
    "_attn_implementation_autoset": True,
    "auto_map": {"AutoConfig": "configuration.Config"},
    "swiglu_alpha": 1.702,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": None, "dequantize": False},
    "unheard_of": None,
}


def test_what_transformers_saves_of_any_model_is_passed_over():
    """Guards configs that transformers itself has saved: they have dozens of keys that say nothing of the model."""
    assert parse_config(SMALL | SAVED_BY_TRANSFORMERS) == parse_config(SMALL)


def test_current_transformers_config():
    """Guards the file that transformers 5.24 saves: rope_parameters, swiglu_alpha, no rope_scaling."""
    raw = without(SMALL, "rope_scaling", "rope_theta") | {"swiglu_alpha": 1.702, "bos_token_id": None}
    raw |= {"rope_parameters": SMALL["rope_scaling"] | {"rope_theta": 150000}, "transformers_version": "5.24.0"}
    assert parse_config(raw) == parse_config(SMALL)
    assert parse_config(raw | {"rope_scaling": None}) == parse_config(SMALL)
    old = rope(type="yarn", attention_factor=None) | {"rope_parameters": None}
    assert parse_config(old) == parse_config(SMALL)
    assert parse_config(rope(attention_factor=1.3465735902799727)) == parse_config(SMALL)


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
    "unknown rope key": (rope(mscale=2.0), "rope_scaling.mscale is 2.0, expected no such key"),
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
        "num_attention_heads 64 is not a multiple of num_key_value_heads 7",
    ),
    "odd head": (changed(SMALL, head_dim=63), "head_dim 63 is odd, but rotary embedding turns pairs"),
    "top_k": (
        changed(SMALL, num_experts_per_tok=33, experts_per_token=33),
        "num_experts_per_tok 33 exceeds num_local_experts 32",
    ),
    "blocks": (
        changed(SMALL, intermediate_size=2890),
        "intermediate_size 2890 is not a multiple of the MXFP4 block of 32",
    ),
    "zero": (changed(SMALL, num_hidden_layers=0), "num_hidden_layers is 0, expected a whole number from 1 to 1,024"),
    "stop id outside": (changed(SMALL, vocab_size=512), "special token id 200002 is outside the vocabulary of 512"),
    "no object": ([1, 2], "expected an object of keys and values, got list"),
    "rope no object": (changed(SMALL, rope_scaling="yarn"), "rope_scaling is 'yarn', expected an object"),
    "infinite": (changed(SMALL, rope_theta=float("inf")), "the file, 'rope_theta' is a number out of range"),
    "no token id": (changed(SMALL, eos_token_id=[1.5]), "eos_token_id is [1.5], expected token ids"),
    "another alpha": (changed(SMALL, swiglu_alpha=1.5), "swiglu_alpha is 1.5, expected 1.702"),
    "encoder": (changed(SMALL, is_encoder_decoder=True), "is_encoder_decoder is True, expected False"),
    "a number for a truth": (changed(SMALL, attention_bias=1), "attention_bias is 1, expected True"),
    "pruned": (changed(SMALL, pruned_heads={"0": [1]}), "pruned_heads is {'0': [1]}, expected {}"),
    "attention factor": (rope(attention_factor=1.0), "rope_scaling.attention_factor is 1.0, expected 1.3465736"),
    "two thetas": (rope(rope_theta=1e4), "rope_scaling.rope_theta is 10000.0, but rope_theta is 150000"),
    "two ropes": (
        changed(SMALL, rope_parameters=SMALL["rope_scaling"] | {"factor": 16.0}),
        "rope_scaling and rope_parameters say different things",
    ),
    "two top_k": (changed(SMALL, experts_per_token=2), "experts_per_token is 2, but num_experts_per_tok is 4"),
    "bitsandbytes": (
        changed(SMALL, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantization_config.quant_method is 'bitsandbytes', expected 'mxfp4'",
    ),
    "MLX": (
        changed(SMALL, quantization={"group_size": 32, "bits": 4}),
        "quantization.quant_method is {'group_size': 32, 'bits': 4}, expected 'mxfp4': weights that other tools",
    ),
    "quantised somehow": (changed(SMALL, quantization_config="int4"), "quant_method is 'int4', expected 'mxfp4'"),
    "many keys": (
        changed(SMALL, **{f"extra{i:03}": 1 for i in range(200)}),
        "unknown keys extra000, extra001, extra002, extra003, extra004 and 195 more (delete those that say nothing",
    ),
    "a key that looks like an inner one": (
        rope() | {"rope.factor": 32.0, "rope_scaling": without(SMALL["rope_scaling"], "factor")},
        "unknown key rope.factor",
    ),
    "long key": (changed(SMALL, **{"x" * 100_000: 1}), f"unknown key {'x' * 60}... (delete"),
    "control characters": (changed(SMALL, **{"a\n\x1b[2Jb": 1}), "unknown key a\\n\\x1b[2Jb (delete"),
    "openai unknown": (changed(OPENAI, qk_norm=True), "unknown key qk_norm"),
    "openai missing": (without(OPENAI, "rope_theta"), "missing key rope_theta"),
}


NUMBERS = {  # key -> values that end in tracebacks, hours or nonsense where they are let in
    "num_hidden_layers": (-1, 0, 1025, 1_000_000, 10**400, 2.0, True, "24", None, [24]),
    "hidden_size": (0, 1 << 17, 2**63, 96.5),
    "num_attention_heads": (-64, 10**9),
    "num_key_value_heads": (0, 10**9),
    "head_dim": (0, 1, 2048),
    "num_local_experts": (0, 10**6),
    "intermediate_size": (0, 1 << 20),
    "vocab_size": (0, 1, 2**31, 10**400),
    "sliding_window": (0, -1, 10**9, 2**63, 128.0, False),
    "swiglu_limit": (0, -7.0, 1e305, 1e-300, "7"),
    "rms_norm_eps": (0, 1, 1e-300, -1e-5),
    "rope_theta": (0, 1, 1.0, 1e305, -150000),
    "max_position_embeddings": (0, 1, 2**63),
    "rope_scaling.factor": (0, 0.5, 1e305, 10**400),
    "rope_scaling.beta_fast": (0, 1e308, 1.0),
    "rope_scaling.beta_slow": (0, 1e308, 32, -1),
    "rope_scaling.original_max_position_embeddings": (0, 2**63, 4096.0),
}


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_out_of_their_range_are_refused_by_name(key, tmp_path):
    """Guards against numbers that eat the memory, divide by zero, or convert to what nobody can run."""
    path = tmp_path / "config.json"
    for value in NUMBERS[key]:
        outer, _, inner = key.rpartition(".")
        raw = rope(**{inner: value}) if outer else changed(SMALL, **{key: value})
        path.write_text(json.dumps(without(raw, "initial_context_length")))
        with pytest.raises(ConfigError) as error:
            read_config(path)
        assert inner in str(error.value), value
        assert "\n" not in str(error.value) and len(str(error.value)) < 500, value


@pytest.mark.parametrize("key", OPENAI)
def test_openai_s_numbers_are_checked_alike(key):
    """Guards the other spelling, where two numbers are multiplied for the context's length."""
    for value in (0, -1, 10**400, 1e305, True, "1", [1]):
        with pytest.raises(ConfigError, match=key):
            parse_config(OPENAI | {key: value})


def test_context_that_follows_from_openai_s_numbers_is_checked():
    """Guards a product of two numbers, each of them in its range."""
    with pytest.raises(ConfigError, match="max_context_tokens is 134217728000, expected a whole number"):
        parse_config(OPENAI | {"initial_context_length": 1 << 24, "rope_scaling_factor": 8000.0})


def test_every_number_has_a_range():
    """Guards a field that is added without one."""
    numbers = {field.name for field in dataclasses.fields(ModelConfig)} - {"stop_ids", "pad_id"}
    assert set(RANGES) == numbers
    types = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    assert all(type(low) is type(high) is types[name] for name, (low, high) in RANGES.items())


def test_special_ids_are_checked():
    """Guards an engine that holds so many stop ids and no more, and ids that are truths or lists."""
    small = changed(SMALL, vocab_size=512, pad_token_id=3)
    assert parse_config(changed(small, eos_token_id=list(range(MAX_STOP_IDS)))).stop_ids == tuple(range(MAX_STOP_IDS))
    for ids, fault in {
        tuple(range(MAX_STOP_IDS + 1)): "9 ids end an answer, expected at most 8",
        tuple(range(100_000)): "100,000 ids end an answer",
        (True,): r"eos_token_id is \[True\], expected token ids",
        (512,): "special token id 512 is outside the vocabulary of 512",
        (-1,): "special token id -1 is outside",
        (10**400,): "special token id 1000",
    }.items():
        with pytest.raises(ConfigError, match=fault) as error:
            parse_config(changed(small, eos_token_id=list(ids)))
        assert len(str(error.value)) < 300


def test_another_family_is_named_first_and_alone():
    """Guards against `model_type` as the fourteenth of sixteen faults."""
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "rope_scaling": None}
    for raw in (llama, changed(rope(truncate=True), model_type="llama", num_hidden_layers=0, extra=1)):
        with pytest.raises(ConfigError) as error:
            parse_config(raw)
        assert str(error.value) == "model_type is 'llama', expected 'gpt_oss': another model family, not read here"
    with pytest.raises(ConfigError, match=r"^architectures is \['LlamaForCausalLM'\], expected GptOssForCausalLM"):
        parse_config(without(llama, "model_type"))


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
        "unknown key extra (delete it if it says nothing about what is computed)",
        "missing key head_dim",
        "hidden_act is 'gelu', expected 'silu'",
        "rope_scaling.truncate is True, expected False",
    ]


def test_absent_and_damaged_files_are_named(tmp_path):
    """Guards against a traceback for a mistyped folder."""
    with pytest.raises(ConfigError, match=r"config\.json: no such file; a checkpoint's folder holds its config\.json"):
        read_config(tmp_path / "config.json")
    for text, fault in {
        "{": r", line 1, column 2: .*; expected JSON",
        "[" * 100_000: " is nested too deeply, at most 64 levels are taken",
        f'{{"vocab_size": {"1" * 5000}}}': ": a number of 5000 digits is out of range",
        '{"vocab_size": NaN}': ": the file, 'vocab_size': NaN is no JSON",
        "[1]": ": expected an object of keys and values, got list",
    }.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"config\.json{fault}") as error:
            read_config(tmp_path / "config.json")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


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
