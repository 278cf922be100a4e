"""The keys of config.json in both published spellings: which number each is, which are fixed, which say nothing.

Sources: openai/gpt-oss-20b's config.json and original/config.json; transformers' GptOssConfig and PretrainedConfig,
4.55 to 5.24, with all keys that `to_dict` and `save_pretrained` write.
"""

from collections.abc import Mapping
from typing import Any

# Hugging Face key -> field of ModelConfig. `rope.` stands for `rope_scaling.`, or `rope_parameters.` since version 5.
HUGGINGFACE = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "swiglu_limit": "swiglu_limit",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_context_tokens",
}
HUGGINGFACE_ROPE = {
    "factor": "rope_scaling_factor",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "original_max_position_embeddings": "initial_context_length",
}
# Keys whose value this model family fixes: anything else is another model. The first are written, too.
HUGGINGFACE_FIXED: Mapping[str, Any] = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
ROPE_FIXED: Mapping[str, Any] = {"rope_type": "yarn", "truncate": False}
HUGGINGFACE_ALSO_FIXED: Mapping[str, Any] = {
    "swiglu_alpha": 1.702,
    "partial_rotary_factor": 1.0,
    "rope.partial_rotary_factor": 1.0,
    "rope.type": "yarn",
    "rope.mscale": None,
    "rope.mscale_all_dim": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "per_layer_config": {},
}
# Keys that repeat another one -> that one.
HUGGINGFACE_REPEATED = {
    "experts_per_token": "num_experts_per_tok",
    "num_experts": "num_local_experts",
    "initial_context_length": "rope.original_max_position_embeddings",
    "rope.rope_theta": "rope_theta",
}
# Keys that say nothing about the forward pass: training, bookkeeping, what is returned, how tokens are drawn.
HUGGINGFACE_IGNORED = frozenset(
    """
    architectures attention_dropout initializer_range output_router_logits router_aux_loss_coef use_cache
    transformers_version dtype torch_dtype name_or_path _name_or_path _commit_hash auto_map custom_pipelines
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    experts_implementation _experts_implementation _experts_implementation_internal
    return_dict use_return_dict output_hidden_states output_attentions _output_attentions tie_last_hidden_states
    torchscript use_bfloat16 tf_legacy_loss gradient_checkpointing chunk_size_feed_forward is_decoder
    cross_attention_hidden_size decoder_start_token_id
    id2label label2id num_labels problem_type finetuning_task task_specific_params classifier_dropout
    tokenizer_class prefix bos_token_id sep_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p min_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    encoder_repetition_penalty num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    epsilon_cutoff eta_cutoff assistant_confidence_threshold assistant_lookbehind target_lookbehind
    num_assistant_tokens num_assistant_tokens_schedule
    base_model_tp_plan base_model_pp_plan base_model_ep_plan base_model_fsdp_plan
    model_name transformers.js_config unsloth_fixed unsloth_version
    """.split()
)
QUANTIZATION = ("quantization_config", "quantization", "compression_config")  # transformers', MLX's, an older one
# All that may stand in a config beside HUGGINGFACE and HUGGINGFACE_ROPE; the last have a check of their own.
HUGGINGFACE_OTHERS = frozenset().union(
    HUGGINGFACE_FIXED,
    HUGGINGFACE_ALSO_FIXED,
    (f"rope.{key}" for key in ROPE_FIXED),
    HUGGINGFACE_REPEATED,
    HUGGINGFACE_IGNORED,
    ("layer_types", "eos_token_id", "pad_token_id", "rope.attention_factor", *QUANTIZATION),
)
# OpenAI key -> field.
OPENAI = {
    "num_hidden_layers": "num_layers",
    "num_experts": "num_experts",
    "experts_per_token": "experts_per_token",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit",
    "head_dim": "head_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "sliding_window": "sliding_window",
    "initial_context_length": "initial_context_length",
    "rope_theta": "rope_theta",
    "rope_scaling_factor": "rope_scaling_factor",
    "rope_ntk_alpha": "rope_beta_slow",
    "rope_ntk_beta": "rope_beta_fast",
}
OPENAI_ONLY = ("rope_ntk_alpha", "rope_ntk_beta", "rope_scaling_factor")  # by these the spelling is known
OPENAI_RMS_NORM_EPS = 1e-5  # a literal in openai/gpt-oss torch/model.py, not a key of its config
