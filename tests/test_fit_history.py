import math

import numpy as np
import pytest
import torch
from fastcore.foundation import L

from fastai_swa.fit_history import FitHistory, FitTable

from .helpers import learner


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


def table():
    "With a recorder as it is at the beginning of a fit."
    recorder = learner().recorder
    recorder.metric_names = L('epoch', 'train_loss', 'valid_loss', 'accuracy', 'time')
    return FitTable(recorder, 'ema'), recorder


def test_a_table_completes_the_rows_of_the_recorder_and_keeps_them():
    t, recorder = table()
    assert list(recorder.metric_names)[3:] == ['accuracy', 'ema_valid_loss', 'ema_accuracy', 'time']
    for epoch, (values, averaged) in enumerate([([], []), ([0.5, 0.75], [1])]):
        recorder.log = L(epoch, 3.0, 2.0, 0.25)
        t.complete_row(values)
        assert len(recorder.log) == 6
        recorder.learn.final_record = recorder.log[1:]
        t.keep_row(epoch, averaged)
    h = t.history
    assert h.epochs == [0, 1] and h.averaged == [1] and h.column('valid_loss') == [2, 2]
    assert math.isnan(h.column('ema_accuracy')[0]) and h.column('ema_accuracy')[1] == 0.75
    assert h.names == ['train_loss', 'valid_loss', 'accuracy', 'ema_valid_loss', 'ema_accuracy']


def test_the_recorder_shows_the_history_also_after_another_is_gone_on_with():
    t, recorder = table()
    assert recorder.ema_history is vars(t.history)
    t.go_on(FitHistory('ema', t.columns, t.history.names, epochs=[0], rows=[[1.0] * 5]))
    recorder.log = L(1, 3.0, 2.0, 0.25)
    t.complete_row([0.5, 0.75])
    recorder.learn.final_record = recorder.log[1:]
    t.keep_row(1, [1])
    assert recorder.ema_history['epochs'] == [0, 1] and recorder.ema_history['rows'][1][-1] == 0.75
    with pytest.raises(ValueError, match='another name'):
        FitTable(recorder, 'ema')
