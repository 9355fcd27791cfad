"""What the configuration derives, and which pairs it refuses. Reading it is protocol/settings.py's business."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from learner.config import LearnerConfig


def make(**options) -> LearnerConfig:
    return LearnerConfig(**{"model": "models/tiny", "dataset": "data/sums.jsonl", **options})


@pytest.mark.parametrize(
    ("options", "steps_ahead", "window", "slots"),
    [
        ({}, 3, 9, 32),  # max_staleness 4, P 8
        ({"max_staleness": 0}, 0, 1, 8),
        ({"max_staleness": 2, "prompts_per_step": 5}, 2, 1, 15),
        ({"max_staleness": 4, "reorder_window": 1}, 4, 1, 40),
        ({"max_staleness": 6, "reorder_window": 17}, 4, 17, 40),
    ],
)
def test_how_far_ahead_is_derived(options, steps_ahead, window, slots):
    bounds = make(**options).bounds
    assert (bounds.steps_ahead, bounds.reorder_window, bounds.slots_total) == (steps_ahead, window, slots)
    assert make(**options).granted_bounds == bounds, "the default byte budget holds them all"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_peft": True, "publish": "full"}, "publish full with use_peft: .* publish adapter"),
        ({"publish": "adapter"}, "publish adapter without use_peft: there is no adapter; add use_peft"),
        ({"lora_r": 8}, "lora_r 8 without use_peft"),
        ({"lora_alpha": 8}, "lora_alpha 8 without use_peft"),
        ({"lora_target_modules": ["q_proj"]}, r"lora_target_modules \['q_proj'\] without use_peft"),
        ({"use_peft": True, "lora_r": 0}, "greater than or equal to 1"),
        ({"use_peft": True, "lora_alpha": 0}, "greater than or equal to 1"),
    ],
)
def test_adapters_that_cannot_be_are_refused_before_anything_loads(options, match):
    with pytest.raises(ValidationError, match=match):
        make(**options)


@pytest.mark.parametrize("options", [{}, {"publish": "auto"}, {"publish": "adapter", "lora_r": 1, "lora_alpha": 1}])
def test_an_adapter_is_published_in_float32_unless_told_otherwise(options):
    config = make(use_peft=True, dtype="bfloat16", **options)
    assert config.published_dtype == "float32"
    assert make(use_peft=True, publish_dtype="bfloat16").published_dtype == "bfloat16"


def small(buffer_groups: float, **options) -> LearnerConfig:
    """A budget of so many worst-case groups."""
    shape = {"num_generations": 64, "max_completion_length": 1024, "max_prompt_length": 1024, "prompts_per_step": 4}
    per_group = make(**shape).group_bytes
    return make(**shape, buffer_bytes=int(buffer_groups * per_group), **options)


def test_a_worst_case_group_has_a_span_per_token():
    config = make(num_generations=2, max_completion_length=10, max_prompt_length=100)
    assert config.group_bytes == 2 * (10 * (4 + 4 + 1 + 4 + 12) + 64) + 4 * 100


@pytest.mark.parametrize(
    ("buffer_groups", "steps_ahead", "window"),
    [(100, 3, 5), (16, 3, 5), (15.9, 2, 5), (8, 1, 5), (7.9, 0, 1), (4, 0, 1)],
)
def test_a_small_byte_budget_lowers_how_far_ahead_and_nothing_else(buffer_groups, steps_ahead, window):
    config = small(buffer_groups, max_staleness=4)
    granted = config.granted_bounds
    assert (granted.steps_ahead, granted.reorder_window) == (steps_ahead, window)
    assert (granted.max_staleness, granted.prompts_per_step) == (4, 4)
    assert granted.steps_ahead + granted.window_steps <= 4
    assert granted.slots_total * config.group_bytes <= config.buffer_bytes
    assert config.bounds.steps_ahead == 3, "what was asked for is still known"


@pytest.mark.parametrize(
    ("buffer_groups", "options", "needed"), [(3.9, {}, 4), (7.9, {"max_staleness": 3, "weight_sync_steps": 2}, 8)]
)
def test_a_budget_that_holds_no_step_is_refused_at_once(buffer_groups, options, needed):
    need_bytes = needed * small(100).group_bytes
    with pytest.raises(ValidationError, match=f"does not hold {needed} worst-case groups, .* at least {need_bytes}"):
        small(buffer_groups, **options)
    assert small(needed, **options).granted_bounds.slots_total == needed


def test_an_unknown_key_is_refused():
    with pytest.raises(ValidationError, match=r"max_stalenes\n.*Extra inputs are not permitted"):
        make(max_stalenes=3)


def test_a_config_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        make().max_staleness = 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_p": 0.9}, r"top_p 0\.9, top_k 0, min_p 0\.0: training needs the whole softmax"),
        ({"top_k": 50}, "top_k 50, min_p 0.0: training needs the whole softmax"),
        ({"min_p": 0.1}, "min_p 0.1: training needs the whole softmax"),
        ({"key": "a.key"}, "key a.key and allowed_keys None: give both or none"),
        ({"allowed_keys": "a"}, "key None and allowed_keys a: give both or none"),
        ({"liveness_s": 1.5}, "liveness_s 1.5 must be at least twice heartbeat_s 1.0"),
        ({"max_staleness": 0, "reorder_window": 9}, "reorder_window 9 alone allows a staleness of 1"),
        ({"max_staleness": 1, "weight_sync_steps": 4}, "weight_sync_steps 4 with S = 1 steps ahead would deadlock"),
        ({"max_staleness": 1, "reorder_window": 9}, "reorder_window 9 buys nothing"),
        (
            {"staleness_policy": "drop", "reorder_window": 9},
            "reorder_window 9 with staleness_policy drop: nothing waits",
        ),
        ({"max_staleness": 0, "staleness_control": "auto"}, "auto with max_staleness 0: rollouts run exactly 0 steps"),
        ({"max_staleness": 1, "weight_sync_steps": 2, "staleness_control": "auto"}, "exactly 1 steps ahead, nothing"),
    ],
)
def test_refused_pairs(options, says):
    with pytest.raises(ValidationError, match=says):
        make(**options)


PROXIMAL, GSPO, PENALTY = {"anchor": "proximal"}, {"importance_sampling_level": "sequence"}, {"beta": 0.1}
TIS = {"importance_sampling_mode": "token_truncate"}
PPO = {"advantage_estimator": "gae", "filter_zero_std": False}
STEPS = {"advantage_estimator": "process"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss_type": "cispo"}, "cispo truncates the ratio at epsilon_high itself: set it"),
        ({"loss_type": "sapo", "delta": 2.0}, "delta bounds a clipped loss .*, and loss_type sapo has no clip"),
        ({"delta": 1.2, "epsilon_high": 0.28}, "delta 1.2 must be above 1 . epsilon_high, 1.28"),
        ({"loss_function": "m:f", "loss_type": "sapo"}, "loss_type is only how tokens are averaged"),
        ({"loss_function": "m:f", **GSPO}, "importance_sampling_level have no meaning"),
        ({"loss_function": "m.f"}, "loss_function 'm.f' must be module:function"),
        ({"advantage_function": "m:f", "scale_rewards": "none"}, "leave those out"),
        ({"proximal_logprobs": "loglinear", **PROXIMAL}, "loglinear saves a forward pass that only .* several updates"),
        ({"proximal_logprobs": "loglinear", "num_iterations": 2}, "only anchor proximal"),
        ({"advantage_estimator": "rloo", "scale_rewards": "group"}, "rloo: it is defined with none"),
        ({"advantage_estimator": "gae"}, "equal rewards have a gradient, too, .*; set filter_zero_std false"),
        (
            {**PPO, "scale_rewards": "group"},
            "scale_rewards group with advantage_estimator gae: it is defined with batch",
        ),
        ({**PPO, **GSPO}, "sequence with advantage_estimator gae: .* use importance_sampling_level token"),
        ({**PPO, "advantage_function": "m:f"}, "leave those out"),
        (
            {**STEPS, "scale_rewards": "batch"},
            "batch with advantage_estimator process: it is defined with group or none",
        ),
        ({**STEPS, **GSPO}, "sequence with advantage_estimator process: .* use importance_sampling_level token"),
        ({**STEPS, **PENALTY, "kl_in": "reward"}, "process: a token's KL is no step .*; use kl_in loss"),
        ({**STEPS, "lam": 0.9}, "lam without a critic"),
        ({**STEPS, "advantage_function": "m:f"}, "leave those out"),
        ({"lam": 0.9}, "lam without a critic has no meaning: use advantage_estimator gae, or leave it out"),
        ({"gamma": 0.9}, "gamma without a critic"),
        ({"cliprange_value": 0.1}, "cliprange_value without a critic"),
        ({"value_learning_rate": 1e-5}, "value_learning_rate without a critic"),
        ({"num_generations": 1}, "num_generations 1: one completion compares with nothing; use at least 2, or advan"),
        ({**GSPO, **PROXIMAL, **TIS}, "completion's ratio cannot be corrected token by token; use sequence_truncate"),
        ({**GSPO, "importance_sampling_mode": "token_mask"}, "cannot be corrected token by token"),
        (TIS, "token_truncate with anchor behavior: .* use anchor proximal, a mask"),
        ({"importance_sampling_clip_min": 2.0}, "clip_min 2.0 must be below importance_sampling_clip_max 2.0"),
        ({**PENALTY, "kl_in": "reward", "kl_estimator": "k3"}, "kl_estimator k3 with kl_in reward: only k1"),
        ({**PENALTY, "kl_in": "reward", "use_bias_correction_kl": True}, "is for the KL in the loss"),
        ({"kl_in": "reward"}, "kl_in reward with beta 0 takes nothing off"),
        ({"sync_ref_model": True}, "sync_ref_model without a reference policy: set beta above 0"),
        ({"kl_target": 0.1}, "kl_target without a reference policy"),
        ({"num_mini_batches": 9}, "num_mini_batches 9 of prompts_per_step 8 groups"),
        ({**GSPO, "loss_head": "fused"}, "loss_head fused computes the loss token by token"),
        ({"entropy_coef": 0.1, "loss_head": "fused"}, "use loss_head auto or recompute"),
        ({"soft_punish_cache": 9, "max_completion_length": 8}, "soft_punish_cache 9 must be at most max_compl"),
        (
            {
                "importance_sampling_mode": "second_moment",
                "proximal_logprobs": "loglinear",
                "num_iterations": 2,
                **PROXIMAL,
            },
            "second_moment needs all logprobs first",
        ),
        (
            {"kl_in": "reward", "proximal_logprobs": "loglinear", "num_iterations": 2, **PROXIMAL, **PENALTY},
            "kl_in reward needs all logprobs first",
        ),
    ],
)
def test_refused_objectives(options, says):
    with pytest.raises(ValidationError, match=says):
        make(**options)


MASK, RANGE = (
    {"importance_sampling_mode": "token_mask"},
    "an importance_sampling_mode that truncates or masks by a range",
)
SAPO, CISPO, OWN = {"loss_type": "sapo"}, {"loss_type": "cispo", "epsilon_high": 5.0}, {"loss_function": "m:f"}
FOLLOW = {"sync_ref_model": True, "beta": 0.1}


@pytest.mark.parametrize(
    ("word", "unread", "read", "needs"),
    [
        ({"importance_sampling_clip_max": 3.0}, {}, MASK, RANGE),
        ({"importance_sampling_clip_max": 3.0}, {"importance_sampling_mode": "second_moment"}, PROXIMAL, RANGE),
        ({"importance_sampling_clip_min": 0.5}, {}, MASK, RANGE),
        ({"second_moment_threshold": 0.1}, MASK, {"importance_sampling_mode": "second_moment"}, "mode second_moment"),
        ({"epsilon": 0.3}, SAPO, {}, r"a clipped loss_type \(grpo, bnpo, dapo, dr_grpo\) without loss_function"),
        ({"epsilon": 0.3}, CISPO, {}, "a clipped loss_type"),
        ({"epsilon": 0.3}, OWN, {}, "a clipped loss_type"),
        ({"epsilon_high": 0.3}, SAPO, {}, "a loss_type that clips, or cispo"),
        ({"epsilon_high": 0.3}, OWN, {"loss_type": "cispo"}, "a loss_type that clips, or cispo"),
        ({"sapo_temperature_pos": 2.0}, {}, SAPO, "loss_type sapo"),
        ({"sapo_temperature_neg": 2.0}, CISPO, SAPO, "loss_type sapo"),
        ({"kl_estimator": "k3"}, {}, PENALTY, "beta above 0"),
        ({"kl_horizon": 10}, PENALTY, {**PENALTY, "kl_target": 0.1}, "kl_target"),
        ({"ref_model_sync_steps": 9}, PENALTY, FOLLOW, "sync_ref_model"),
        ({"ref_model_mixup_alpha": 1.0}, PENALTY, FOLLOW, "sync_ref_model"),
        ({"eval_steps": 5}, {}, {"eval_dataset": "e.jsonl"}, "eval_dataset"),
        ({"eval_size": 5}, {}, {"eval_dataset": "e.jsonl"}, "eval_dataset"),
        ({"eval_temperature": 1.0}, {}, {"eval_dataset": "e.jsonl"}, "eval_dataset"),
        ({"eval_dataset_config": {"size": 5}}, {}, {"eval_dataset": "reasoning_gym:gcd"}, "eval_dataset"),
        ({"attn_implementation": "flex_attention"}, {"share_prefix": False}, {}, "share_prefix"),
        ({"activation_offloading": True}, {"device": "cpu"}, {"device": "cuda"}, "a CUDA device"),
    ],
)
def test_a_word_that_nothing_reads_is_refused_and_where_it_is_read_it_is_not(word, unread, read, needs):
    (key,) = word
    with pytest.raises(ValidationError, match=f"{key} has no effect here: it needs .*{needs}.*, or leave {key} out"):
        make(**unread, **word)
    make(**read, **word)
    default = {key: make().model_dump()[key]}
    assert make(**unread, **default) == make(**unread), "a resolved configuration has every word"


def test_k1_in_the_loss_pulls_towards_nothing():
    with pytest.raises(
        ValidationError, match=r"k1 with kl_in loss: .* use k3, or k1 with kl_in reward, or add use_bias"
    ):
        make(**PENALTY, kl_estimator="k1")
    make(**PENALTY, kl_estimator="k1", use_bias_correction_kl=True)
    make(**PENALTY, kl_estimator="k1", kl_in="reward")


@pytest.mark.parametrize(
    ("options", "correction"),
    [
        ({}, "none"),
        (GSPO, "none"),
        (PROXIMAL, "token_truncate"),
        ({**GSPO, **PROXIMAL}, "sequence_truncate"),
        ({"importance_sampling_mode": "second_moment"}, "second_moment"),
        ({**PROXIMAL, "importance_sampling_mode": "none"}, "none"),
    ],
)
def test_the_correction_goes_with_anchor_and_level(options, correction):
    assert make(**options).correction == correction


def test_what_an_estimator_divides_by_is_its_own_unless_given():
    assert make().reward_scale == "group"
    assert make(advantage_estimator="rloo").reward_scale == "none"
    assert make(advantage_estimator="reinforce_plus_plus_baseline").reward_scale == "batch"
    assert make(scale_rewards="batch").reward_scale == "batch"
    assert make(**STEPS).reward_scale == "group"
    assert make(**STEPS, loss_type="dr_grpo").reward_scale == "none"
    assert make(**STEPS, loss_type="dr_grpo", scale_rewards="group").reward_scale == "group"


def test_the_estimator_of_the_kl_goes_with_its_place():
    assert make().kl_kind == "k3"
    assert make(beta=0.1, kl_in="reward").kl_kind == "k1"
    assert make(beta=0.1, kl_estimator="k2").kl_kind == "k2"


def test_the_resolved_configuration_is_a_configuration():
    for options in ({}, {"advantage_estimator": "rloo"}, {**GSPO, **PROXIMAL}, {"beta": 0.1, "kl_in": "reward"}):
        config = make(**options)
        assert LearnerConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_generations", 1), ("prompts_per_step", 0), ("max_staleness", -1), ("temperature", 0.0), ("epsilon", 1.0),
        ("learning_rate", 0.0), ("save_steps", 0), ("buffer_bytes", 1000), ("loss_type", "ppo"), ("max_attempts", 0),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_key(key, value):
    with pytest.raises(ValidationError, match=key):
        make(**{key: value})


def test_what_a_critic_changes():
    critic = make(**PPO, num_generations=1)
    assert (critic.has_critic, critic.min_scored, critic.token_level, critic.reward_scale) == (True, 1, True, "batch")
    assert (critic.gamma, critic.lam, critic.cliprange_value, critic.value_learning_rate) == (1.0, 0.95, 0.2, None)
    assert (make().has_critic, make().min_scored) == (False, 2)
    given = make().model_dump()
    assert make(**{key: given[key] for key in ("gamma", "lam", "cliprange_value", "value_learning_rate")})
    for combined in ({"anchor": "proximal", "num_iterations": 2}, {"loss_type": "cispo", "epsilon_high": 5.0},
                     {"beta": 0.1, "kl_in": "reward"}, {"entropy_coef": 0.01}, {"loss_function": "m:f"}):  # fmt: skip
        assert make(**PPO, **combined).has_critic


def test_steps_go_with_everything_that_looks_at_tokens():
    for options in ({}, {"anchor": "proximal", "num_iterations": 2}, {"beta": 0.1}, {"scale_rewards": "none"},
                    {"loss_type": "cispo", "epsilon_high": 5.0}, {"loss_function": "m:f"}):  # fmt: skip
        assert make(**STEPS, **options).compares_steps
    assert make(**STEPS).token_level
    assert not make().compares_steps


def test_names_are_made_of_model_and_data():
    assert make().name == "tiny-sums"
    assert make(dataset="reasoning_gym:spell_backward").name == "tiny-reasoning_gym-spell_backward"
    assert make(run_name="mine").name == "mine"
    assert make(output_dir="out", run_name="mine").run_dir.as_posix() == "out/mine"


def test_the_upper_clip_is_the_lower_one_unless_given():
    assert make(epsilon=0.1).clip_high == 0.1
    assert make(epsilon=0.1, epsilon_high=0.28).clip_high == 0.28


@pytest.mark.parametrize(
    ("options", "published"),
    [
        ({}, "float32"),
        ({"autocast": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"autocast": "bfloat16", "publish_dtype": "float32"}, "float32"),
        ({"publish_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_what_dtype_is_published(options, published):
    assert make(**options).published_dtype == published
