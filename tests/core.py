"""The core set, `pytest -m core`: what must hold, in a few minutes. It runs with the lowest versions supported, too.

What must hold -> file of tests -> names of tests, all cases of each; `None`: the whole file.
"""

CORE = {
    'the mean is the mean': {
        'test_averaging': [
            'test_the_mean_is_the_mean_for_random_shapes_weights_and_numbers_of_points',
            'test_an_average_of_a_low_precision_model_is_exact_in_its_float32_master',
            'test_compiled_and_parallel_models_have_plain_keys',
            'test_lending_puts_the_averages_own_tensors_into_the_model_and_gives_its_own_back',
            'test_a_restored_average_goes_on_bitwise',
        ],
        'test_callback': [
            'test_the_mean_is_the_mean_for_random_starts_cycles_and_lengths',
            'test_what_folds_is_an_epoch_whose_training_part_ended',
        ],
        'test_steps': None,
    },
    'training is untouched': {
        'test_contents': None,
        'test_callback': [
            'test_training_is_untouched_bitwise',
            'test_training_is_untouched_with_the_callback_attached_over_several_fits_and_validations',
            'test_training_is_untouched_on_plain_pytorch_loaders',
            'test_training_is_untouched_where_data_losses_and_models_keep_generators_and_state_of_their_own',
            'test_training_is_untouched_by_generators_deep_in_fastais_transforms',
            'test_the_learner_is_left_as_it_was_between_the_events',
        ],
    },
    'the columns are true': {
        'test_callback': [
            'test_the_columns_are_true',
            'test_the_columns_of_the_model_in_training_keep_its_own_values',
            'test_the_columns_are_true_under_any_recorder_and_without_time',
        ],
        'test_saving': ['test_save_swa_model_saves_the_best_average_and_loads_nothing'],
        'test_combinations': ['test_the_csv_log_has_the_columns'],
    },
    'batch norm is exact': {
        'test_batchnorm': [
            'test_batch_norm_is_exact_for_random_networks_and_batch_sizes',
            'test_frozen_layers_keep_their_statistics_and_normalise_by_them',
            'test_layers_of_all_kinds_hold_what_a_slow_twin_takes_from_the_batches',
            'test_on_any_error_statistics_modes_and_momenta_come_back',
        ],
        'test_callback': [
            'test_batch_norm_is_exact_in_every_layer_as_update_bn_makes_it',
            'test_batch_norm_is_exact_before_anything_reads_the_average_after_a_stop',
            'test_frozen_batch_norm_keeps_its_statistics',
        ],
    },
    'whatever ends the fit, the average survives': {
        'test_callback': ['test_whatever_ends_the_fit_the_average_survives'],
        'test_interrupts': None,
    },
    'no average, no change': {
        'test_callback': [
            'test_no_average_no_change_when_the_start_is_not_reached',
            'test_no_average_no_change_while_disabled',
            'test_no_average_no_change_from_calls_that_only_look_like_fits',
        ],
    },
    'any learner': {
        'test_combinations': [
            'test_any_learner_in_mixed_precision_runs_the_pass_and_the_validation_of_the_average_in_it_too',
            'test_any_learner_with_torch_optimizers_and_groups',
            'test_any_learner_u_net',
            'test_any_learner_language_model',
            'test_any_learner_tabular',
            'test_any_learner_several_inputs_and_targets',
            'test_any_learner_tied_weights',
            'test_any_way_to_fit_one_cycle_flat_cos_and_start_epoch',
            'test_an_export_made_inside_averaged_needs_no_fastai_swa_where_it_is_loaded',
        ],
        'test_ensemble': [
            'test_predictions_equal_a_naive_loop_over_samples_and_models',
            'test_an_ensemble_is_saved_and_loaded_as_one_folder',
        ],
        'test_learner': None,
        'test_several': ['test_each_is_bitwise_what_it_would_be_alone_in_any_order'],
    },
    'bad input gets one clear sentence': {
        'test_callback': [
            'test_bad_input_gets_one_clear_sentence_at_construction',
            'test_an_average_asked_for_before_it_exists_is_one_clear_sentence',
        ],
        'test_checkpoint': ['test_a_file_that_is_no_readable_checkpoint_is_one_sentence_and_never_overwritten'],
    },
    'resume is exact': {
        'test_checkpoint': [
            'test_resume_is_exact_for_all_that_a_fit_depends_on',
            'test_resume_is_exact_for_generators_deep_in_the_data',
            'test_resume_is_exact_in_mixed_precision_with_its_scaler',
            'test_resume_is_exact_wherever_in_an_epoch_it_was_killed',
            'test_the_progress_table_shows_the_earlier_epochs',
        ],
    },
    'files are read with weights_only': {
        'test_checkpoint': ['test_the_file_loads_with_weights_only_and_holds_the_averages_too'],
        'test_files': ['test_what_is_written_is_read', 'test_no_code_runs_from_a_file'],
        'test_packing': None,
    },
    'the package': {
        'test_package': [
            'test_a_star_import_brings_the_public_names_and_nothing_else',
            'test_the_lower_bounds_are_the_versions_tested',
            'test_the_core_set_is_there',
        ],
    },
}


def is_core(file, name) -> bool:
    "Is the test `name`, without its case, of the file `file` one of the core set?"
    for files in CORE.values():
        if file in files and (files[file] is None or name in files[file]):
            return True
    return False
