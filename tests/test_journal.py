"""Which fits a file knows, and where the one under way stands among them: without a learner."""

import copy
from pathlib import Path

import pytest

from fastai_swa.journal import N_EPOCHS, SCHEDULE, START, Journal, why_not_the_longer_fit

FILE = Path('run.ckpt')


def settings(lr=0.1, n_epoch=4, trained='all', start=None, schedule=()):
    res = {
        N_EPOCHS: n_epoch,
        'the parameters to train': [trained],
        'lr': [lr],
        'wd': [0.01],
        SCHEDULE: [{'lr': list(values)} for values in schedule],
    }
    return res if start is None else res | {'SWACallback': {START: start, 'cycle_len': 1}}


class Program:
    """A program that fits one learner again and again on one path, where a state is a sentence;
    `file`: what is on the disk.
    """

    def __init__(self, file=None):
        self.journal, self.file, self.passed = Journal(FILE), file, []

    def begin(self, fit):
        "Begin a fit, or pass it by; returns how it begins."
        place = None
        if self.file is not None:
            place = self.journal.open(copy.deepcopy(self.file), fit)
        elif self.journal.fits:
            self.journal.begin_another(f'after {len(self.journal.fits)}')
        number = len(self.journal.fits)
        self.journal.begin(fit)
        if place is not None and place.is_past:
            self.passed.append(self.journal.pass_by(place.settings))
            return f'{number} passed'
        self.write(fit, 0)
        return 'new' if place is None else f'{number} goes on'

    def write(self, fit, epoch):
        self.file = {'version': 2, **self.journal.content(fit, f'epoch {epoch}')}

    def fit(self, fit, kept='nothing'):
        how = self.begin(fit)
        if 'passed' not in how:
            self.journal.complete(fit, lambda: {'average': kept})
            self.file = None
        return how

    def killed_and_started_again(self):
        return Program(copy.deepcopy(self.file))


FIRST, SECOND, THIRD = settings(0.1), settings(0.2), settings(0.3)


def test_a_killed_program_passes_by_what_was_completed_and_goes_on_with_the_last():
    program = Program()
    assert program.fit(FIRST, 'one') == 'new' and program.fit(SECOND, 'two') == 'new'
    program.begin(THIRD)
    again = program.killed_and_started_again()
    assert again.fit(FIRST) == '0 passed' and again.fit(SECOND) == '1 passed'
    assert again.passed == [{'average': 'one'}, {'average': 'two'}] and again.journal.end == 'after 2'
    assert again.fit(THIRD, 'three') == '2 goes on' and again.file is None
    assert again.journal.fits == [FIRST, SECOND, THIRD]


def test_what_a_program_keeps_that_was_killed_twice_is_what_the_first_one_kept():
    program = Program()
    program.fit(FIRST, 'one')
    program.begin(SECOND)
    again = program.killed_and_started_again()
    again.fit(FIRST), again.begin(SECOND)
    third = again.killed_and_started_again()
    third.fit(FIRST), third.fit(SECOND, 'two'), third.begin(THIRD)
    assert third.file['kept'] == [{'average': 'one'}, {'average': 'two'}] and third.file['end'] == 'after 2'


def test_what_a_callback_keeps_is_asked_for_when_another_fit_begins():
    journal, average = Journal(FILE), ['stale']
    journal.begin(FIRST)
    journal.complete(FIRST, lambda: {'average': list(average)})
    average[:] = ['refreshed']
    journal.begin_another('the end')
    assert journal.content(SECOND, 'now')['kept'] == [{'average': ['refreshed']}]


def test_equal_fits_are_told_apart_by_their_order():
    program = Program()
    program.fit(FIRST), program.begin(FIRST)
    again = program.killed_and_started_again()
    assert [again.fit(FIRST), again.fit(FIRST)] == ['0 passed', '1 goes on']


def test_of_the_fits_called_again_after_ctrl_c_the_latest_one_is_meant():
    program = Program()
    program.fit(FIRST), program.fit(SECOND), program.begin(SECOND)
    assert program.begin(SECOND) == '2 goes on'  # in the same program
    assert program.begin(FIRST) == '0 passed'  # fine_tune, called again from its first stage on


def test_what_an_interrupted_fit_has_changed_itself_does_not_make_it_another_one():
    program = Program()
    program.begin(settings(trained='head'))
    assert program.begin(settings(trained='all')) == '0 goes on'
    again = program.killed_and_started_again()
    with pytest.raises(ValueError, match='the parameters to train'):  # a program of its own has changed nothing
        again.begin(settings(trained='body'))


def test_another_fit_is_refused_and_nothing_has_changed():
    program = Program()
    program.fit(FIRST, 'one'), program.begin(SECOND)
    again = program.killed_and_started_again()
    again.fit(FIRST)
    before = copy.deepcopy((again.journal.fits, again.journal.kept, again.journal.end, again.file))
    with pytest.raises(ValueError, match=r'run.ckpt is of another fit: lr is \[0.7\] and was \[0.2\]\. It is left'):
        again.begin(settings(0.7))
    assert (again.journal.fits, again.journal.kept, again.journal.end, again.file) == before
    assert again.fit(SECOND) == '1 goes on'


def test_what_differs_is_said_at_its_place_and_three_times_at_most():
    program = Program()
    was = settings() | {'the model': {'a': [1, 2], 'b': [3], 'c': [4]}, 'x': [0, 1, 2, 3], 'y': 'z' * 100}
    program.begin(was)

    def said(**changes):
        with pytest.raises(ValueError) as e:
            program.killed_and_started_again().begin(was | changes)
        return str(e.value).split(': ', 1)[1].split('. It is left')[0]

    assert said(x=[0, 1, 5, 3]) == 'x[2] is 5 and was 2'
    assert said(the=1) == 'the is new'
    assert (
        said(**{'the model': {'a': [1, 2], 'c': [4, 4]}}) == 'the model: b is gone; the model: c is [4, 4] and was [4]'
    )
    assert said(y='short').endswith("zzz...") and len(said(y='short')) < 120
    assert (
        said(lr=[1], wd=[2], x=[], y='') == 'lr is [1] and was [0.1]; wd is [2] and was [0.01]; x is [] and was '
        '[0, 1, 2, 3] ...'
    )


def test_a_call_with_more_epochs_goes_on_and_one_with_fewer_is_another_fit():
    program = Program()
    program.begin(settings(n_epoch=4, start=3))
    assert program.killed_and_started_again().begin(settings(n_epoch=8, start=6)) == '0 goes on'
    with pytest.raises(ValueError, match='the number of epochs is 2 and was 4'):
        program.killed_and_started_again().begin(settings(n_epoch=2, start=3))
    with pytest.raises(ValueError, match='lr is'):
        program.killed_and_started_again().begin(settings(0.5, n_epoch=8, start=6))


def test_a_longer_fit_is_said_to_end_elsewhere_where_schedule_or_start_differ_on_the_epochs_done():
    was = settings(n_epoch=2, start=1, schedule=[[3, 1]])
    assert why_not_the_longer_fit(was, settings(n_epoch=4, start=1, schedule=[[3, 1, 1, 1]]), 2) == []
    falling = settings(n_epoch=4, start=3, schedule=[[3, 2, 1, 0]])
    assert why_not_the_longer_fit(was, falling, 1) == ['averaging starts in epoch 1 as in the file, not in epoch 3']
    assert len(why_not_the_longer_fit(was, falling, 2)) == 2


def test_a_file_of_the_first_format_lacks_settings_of_callbacks():
    program = Program()
    program.begin(settings(start=2))
    old = copy.deepcopy(program.file) | {'version': 1}
    del old['fits'][0]['SWACallback']['cycle_len']
    assert Program(old).begin(settings(start=2)) == '0 goes on'
    with pytest.raises(ValueError, match='cycle_len is new'):
        Program(old | {'version': 2}).begin(settings(start=2))
