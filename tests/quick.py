"""The tests of ``pytest -m quick``: by file, all of it or the functions named.

Each area with the tests that notice most for their time: some 20 s of a core altogether, beside as
much for imports. What runs longer than a second or two, or starts processes, is not for this list.
"""

QUICK = {
    "kernels/test_attention.py": (
        "test_masks_at_the_edge_of_their_padding",
        "test_nothing",
        "test_strides_of_single_entries",
    ),
    "kernels/test_attention_values.py": (
        "test_infinite_values_pass_through",
        "test_one_key_gets_everything",
    ),
    "kernels/test_folded_linear.py": ("test_without_optional_tensors",),
    "kernels/test_layer_norm.py": ("test_eps", "test_in_place", "test_without_shift"),
    "kernels/test_linear.py": ("test_strides_of_single_entries", "test_triangular"),
    "kernels/test_linear_backward.py": ("test_outlier_channels", "test_without_shift"),
    "kernels/test_operations.py": ("test_far_from_zero", "test_leading_dimensions"),
    "kernels/test_sources.py": "all",
    "ops/test_cross_attention.py": ("test_literal", "test_rounding"),
    "ops/test_custom_ops.py": (
        "test_gradients_only_where_asked",
        "test_second_derivative_is_a_clear_error",
    ),
    "ops/test_linear_layer_norm.py": "all",
    "projectors/test_modules.py": (
        "test_any_strides",
        "test_bad_features",
        "test_bad_perceiver_input",
        "test_copies_are_equal_and_separate",
        "test_leading_dimensions",
        "test_state_dict_keys_and_strict_loading",
    ),
    "projectors/test_parity.py": (
        "test_clip_layer_is_transformers",
        "test_gradients_are_the_oracles",
        "test_perceiver",
        "test_perceiver_masks_and_maps",
        "test_rounding_is_no_worse_than_eager",
    ),
    "projectors/test_triton.py": ("test_parity",),
    "qwen_vl/test_config.py": "all",
    "qwen_vl/test_model.py": (
        "test_autocast",
        "test_parity_with_the_oracle",
        "test_pooling_can_be_folded",
        "test_resized_tables_follow_the_weights",
    ),
    "test_backend.py": (
        "test_argument_then_context_then_variable",
        "test_automatic",
        "test_what_no_kernel_takes",
    ),
    "test_cli.py": ("test_help_names_every_option", "test_version"),
    "test_conversion.py": "all",
    "test_fusion.py": ("test_a_changed_child_is_called",),
    "test_folding.py": (
        "test_half_precision_from_fp32",
        "test_identity",
        "test_refused",
        "test_round_trip",
    ),
    "test_folding_triton.py": ("test_five_launches_and_nothing_wide_between", "test_parity"),
    "test_models.py": ("test_almost_a_resampler_is_refused", "test_folded", "test_there_and_back"),
    "test_packed.py": ("test_a_list_is_each_image_by_itself", "test_bad_cu_seqlens"),
    "test_positions.py": "all",
    "test_rounding.py": "all",
    "test_weights.py": "all",
    "vlm/test_compose.py": "all",
    "vlm/test_model.py": "all",
    "vlm/test_pretrained.py": "all",
}
