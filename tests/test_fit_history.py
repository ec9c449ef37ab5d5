import math

import numpy as np
import torch

from fastai_swa.fit_history import FitHistory


def history():
    return FitHistory(
        'swa', ['swa_valid_loss', 'swa_acc'], ['train_loss', 'valid_loss', 'valid_acc', 'swa_valid_loss', 'swa_acc']
    )


def test_rows_are_kept_by_the_names_of_their_columns_whatever_their_order():
    h = history()
    h.add(3, {'swa_acc': 0.5, 'valid_loss': 2, 'train_loss': np.float32(1.5)})
    h.add(4, {'train_loss': 1.0})
    assert h.epochs == [3, 4] and h.column('train_loss') == [1.5, 1.0] and h.column('valid_loss')[0] == 2
    assert h.column('swa_acc')[0] == 0.5 and math.isnan(h.column('swa_acc')[1])
    assert all(map(math.isnan, h.column('nothing'))) and len(h.column('nothing')) == 2


def test_what_is_no_number_is_nan():
    h = history()
    h.add(0, {'valid_acc': torch.zeros(3), 'train_loss': None, 'valid_loss': 'x'})
    assert all(map(math.isnan, h.rows[0]))


def test_the_column_of_the_model_in_training_is_found_also_where_the_recorder_measures_both_sets():
    h = history()
    assert h.beside('swa_valid_loss') == 'valid_loss' and h.beside('swa_acc') == 'valid_acc'
    assert h.measure('swa_valid_loss') == 'valid_loss'
    assert FitHistory('swa', ['swa_acc'], ['swa_acc']).beside('swa_acc') is None
