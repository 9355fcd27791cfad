"""Names that other GRPO systems give to headway's knobs, for one purpose: an error that says what to write.

Keyed by the dotted tail of the foreign name: `actor_rollout_ref.rollout.n` is found under `rollout.n`. Nothing is
ever accepted under a foreign name.
"""

from __future__ import annotations

FOREIGN_NAMES: dict[str, tuple[str, str]] = {
    # foreign name: (whose, headway's)
    "model_name_or_path": ("TRL", "model"),
    "model.path": ("verl", "model"),
    "model.name": ("prime-rl", "model"),
    "actor.path": ("AReaL", "model"),
    "hf_checkpoint": ("slime", "model"),
    "dataset_name": ("TRL", "dataset"),
    "train_files": ("verl", "dataset"),
    "rollout.n": ("verl", "num_generations"),
    "group_size": ("prime-rl", "num_generations"),
    "n_samples": ("AReaL", "num_generations"),
    "n_samples_per_prompt": ("slime and OpenRLHF", "num_generations"),
    "num_generations_per_prompt": ("NeMo-RL", "num_generations"),
    "train_batch_size": ("verl", "prompts_per_step"),
    "rollout_batch_size": ("slime", "prompts_per_step"),
    "num_prompts_per_step": ("NeMo-RL", "prompts_per_step"),
    "groups_per_batch": ("tinker-cookbook", "prompts_per_step"),
    "batch_size": ("prime-rl", "prompts_per_step"),
    "generation_batch_size": ("TRL", "prompts_per_step"),
    "per_device_train_batch_size": ("TRL", "token_budget"),
    "gradient_accumulation_steps": ("TRL", "token_budget"),
    "ppo_micro_batch_size_per_gpu": ("verl", "token_budget"),
    "ppo_max_token_len_per_gpu": ("verl", "token_budget"),
    "max_tokens_per_mb": ("AReaL", "token_budget"),
    "max_tokens_per_gpu": ("slime", "token_budget"),
    "max_response_length": ("verl", "max_completion_length"),
    "rollout_max_response_len": ("slime", "max_completion_length"),
    "max_new_tokens": ("AReaL and transformers", "max_completion_length"),
    "max_completion_tokens": ("prime-rl", "max_completion_length"),
    "max_tokens": ("vLLM", "max_completion_length"),
    "prompt_max_len": ("OpenRLHF", "max_prompt_length"),
    "kl_loss_coef": ("verl and slime", "beta"),
    "kl_coef": ("verl and slime", "beta"),
    "init_kl_coef": ("OpenRLHF", "beta"),
    "kl_ctl": ("AReaL", "beta"),
    "reference_policy_kl_penalty": ("NeMo-RL", "beta"),
    "clip_ratio": ("verl", "epsilon"),
    "clip_ratio_low": ("verl", "epsilon"),
    "clip_ratio_high": ("verl", "epsilon_high"),
    "eps_clip": ("AReaL and slime", "epsilon"),
    "eps_clip_low": ("SkyRL", "epsilon"),
    "eps_clip_high": ("slime and SkyRL", "epsilon_high"),
    "eps_clip_higher": ("AReaL", "epsilon_high"),
    "loss_agg_mode": ("verl", "loss_type"),
    "norm_adv_by_std_in_grpo": ("verl", "scale_rewards"),
    "max_off_policy_threshold": ("verl", "max_staleness"),
    "max_off_policy_steps": ("prime-rl", "max_staleness"),
    "max_head_offpolicyness": ("AReaL", "max_staleness"),
    "max_trajectory_age_steps": ("NeMo-RL", "max_staleness"),
    "max_staleness_steps": ("SkyRL", "max_staleness"),
    "max_weight_staleness": ("miles", "max_staleness"),
    "parameter_sync_step": ("verl", "weight_sync_steps"),
    "update_weights_interval": ("slime", "weight_sync_steps"),
    "filter_groups.enable": ("verl", "filter_zero_std"),
    "zero_variance_filter": ("SkyRL", "filter_zero_std"),
    "vllm_importance_sampling_mode": ("TRL", "importance_sampling_mode"),
    "vllm_importance_sampling_clip_max": ("TRL", "importance_sampling_clip_max"),
    "tis_clip": ("slime", "importance_sampling_clip_max"),
    "lr": ("verl and prime-rl", "learning_rate"),
    "warmup_ratio": ("TRL", "warmup_steps"),
    "total_training_steps": ("verl", "max_steps"),
    "eval_on_start": ("TRL", "eval_dataset"),
    "test_freq": ("verl", "eval_steps"),
    "save_freq": ("verl", "save_steps"),
    "custom_reward_function.path": ("verl", "reward_funcs"),
    "custom_rm_path": ("slime", "reward_funcs"),
    "log_completions": ("TRL", "num_completions_logged"),
}


def explain_foreign(key: str) -> tuple[str, str] | None:
    """Return (system, headway's name) for the longest dotted tail of `key` that is known."""
    parts = key.replace("-", "_").split(".")
    tails = (".".join(parts[start:]) for start in range(len(parts)))
    return next((FOREIGN_NAMES[tail] for tail in tails if tail in FOREIGN_NAMES), None)
