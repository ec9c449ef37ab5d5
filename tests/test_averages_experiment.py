"""Averages chosen after trainings: what is trained, chosen and tested, on which samples, and what is reported."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fastai_swa import WeightHistory, choosing
from fastai_swa.experiments import RECIPES, Recipe, Settings, report, reproduce
from fastai_swa.experiments.choose_averages import evaluate_seed, windows_to
from fastai_swa.experiments.listing import listing
from fastai_swa.experiments.machine import TimeIsUp
from fastai_swa.experiments.plan import runs, swa_lr
from fastai_swa.experiments.recipe_learner import loader_to_test_on, recipe_data, recipe_learner, with_wrong_labels
from fastai_swa.experiments.recipes import ChosenAverages, described, scaled
from fastai_swa.experiments.tables import mean_and_half
from fastai_swa.experiments.tasks import Table
from fastai_swa.experiments.train import run_seed
from fastai_swa.vision import cifar

from .reference import twins

ROOT = Path(__file__).resolve().parents[1]


def small_net(n):
    return nn.Sequential(nn.Conv2d(3, 6, 3, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, n))


SMALL = Recipe(
    'small',
    small_net,
    10,
    budget=6,
    lr=0.1,
    swa_lr=0.05,
    swa_start=4,
    wd=5e-4,
    bs=64,
    padding=None,
    images=100,  # two batches, the last one short
    source='digits',
    one_cycle_lr=0.2,
    ema=0.9,
    averages=ChosenAverages(n_choose=50, stops=(0.5,), label_noise=0.1),
)
RUNS = {'SWA 6': 6, 'constant 6': 6, 'one-cycle 6': 6, 'one-cycle 3': 3}


@pytest.fixture(scope='module', autouse=True)
def few_candidates():
    "Of which some end before the fit does."
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, 'STARTS', (0.0, 0.5))
        patch.setattr(choosing, '_ENDS', (0.75, 1.0))
        patch.setattr(choosing, '_N_SINGLE', 3)
        patch.setitem(RECIPES, 'small', SMALL)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A seed before its averages are chosen."
    folder = tmp_path_factory.mktemp('trained')
    run_seed(SMALL, 0, folder, threads=1)
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory, trained):
    "Two seeds, complete."
    out = tmp_path_factory.mktemp('averages') / 'small'
    shutil.copytree(trained, out)
    assert reproduce('small', 2, out, threads=1, stream=io.StringIO()) == {}
    return out


def lines_of(folder, kind=None):
    lines = [json.loads(line) for line in (folder / 'runs.jsonl').read_text().splitlines()]
    return [line for line in lines if kind in (None, line['kind'])]


@pytest.fixture(scope='module')
def found(folder):
    return lines_of(folder, 'averages')


# on which samples


@pytest.fixture(scope='module')
def samples():
    "Images and labels to train, choose and test on, by hand from the file order of digits."
    data = cifar(10, 'digits', device='cpu')
    x, y = data.train_ds.images, data.train_ds.labels
    places = {'train': [], 'choose': []}
    for c in range(10):
        of_class = (y == c).nonzero()[:, 0]
        places['train'] += of_class[:10].tolist()
        places['choose'] += of_class[10:15].tolist()
    res = {name: (x[sorted(i)], y[sorted(i)]) for name, i in places.items()}
    return res | {'test': (data.valid_ds.images, data.valid_ds.labels)}


def test_each_class_has_as_many_images_to_choose_on_and_no_image_is_in_two_parts(samples, folder):
    data, about = recipe_data(SMALL, None, Settings())
    assert (about['train'], about['choose'], about['valid']) == (100, 50, 397)
    assert all(line['images'] == about for line in lines_of(folder, 'training'))
    learn = recipe_learner(SMALL, 0, Settings(), data)
    test = loader_to_test_on(SMALL, Settings(), data, learn)
    for ds, name in ((learn.dls.train_ds, 'train'), (learn.dls.valid_ds, 'choose'), (test.dataset, 'test')):
        assert torch.equal(ds.images, samples[name][0])
        if name != 'train':
            assert torch.equal(ds.labels, samples[name][1])


def test_a_tenth_of_the_labels_trained_on_is_wrong_and_the_seed_says_which(samples):
    data, _ = recipe_data(SMALL, None, Settings())
    clean = samples['train'][1]
    labels = [recipe_learner(SMALL, seed, Settings(), data).dls.train_ds.labels for seed in (0, 0, 1)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])
    assert [int((y != clean).sum()) for y in labels] == [10, 10, 10]
    many = torch.arange(10).repeat(1000)
    noisy = with_wrong_labels(many, 0.5, 10, 0)
    wrong = noisy[noisy != many]
    assert len(wrong) == 5000 and all(abs(int(n) - 500) < 100 for n in wrong.bincount(minlength=10))
    assert torch.equal(with_wrong_labels(many, 0, 10, 0), many) and torch.equal(many, torch.arange(10).repeat(1000))


def test_fewer_images_to_train_on_are_fewer_to_choose_on():
    recipe = RECIPES['averages-small-cifar10']
    _, about = recipe_data(recipe, 'digits', Settings(images=400))
    assert (about['train'], about['choose'], about['valid']) == (400, 80, 397)
    with pytest.raises(ValueError, match='2000|12000'):
        recipe_data(recipe, 'digits', Settings())


@pytest.fixture
def table(tmp_path):
    rng = np.random.RandomState(0)
    rows = pd.DataFrame({'place': rng.choice(['near', 'far'], 90), 'rooms': np.arange(90), 'number': np.arange(90)})
    rows['paid'] = np.where(rng.rand(90) > 0.4, 'yes', 'no')
    rows[:60].to_csv(tmp_path / 'now.csv', index=False)
    rows[60:].to_csv(tmp_path / 'later.csv', index=False)
    return tmp_path


def test_rows_to_choose_on_are_those_after_the_training_rows(table):
    task = Table('now.csv', 'paid', ('place',), ('rooms',), 'later.csv')
    for n_train, of_train in (None, range(45)), (20, range(20)):
        data, about = task.load(table, n_train, n_choose=15)
        n = len(of_train)
        assert (about['train'], about['choose'], about['valid']) == (n, 15, 30)
        assert data[1]['rooms'].tolist() == list(of_train) and data[2]['rooms'].tolist() == list(range(60, 90))
        dls = task.loaders(data, 8, 0, n_choose=15)
        mean, std = np.mean(of_train), np.std(of_train)
        parts = (dls.train_ds, dls.valid_ds, task.test_loader(data, 15).dataset)
        for part, rooms in zip(parts, (of_train, range(n, n + 15), range(60, 90))):
            numbers = part.items['rooms'].to_numpy() * std + mean
            np.testing.assert_allclose(sorted(numbers), rooms, atol=1e-4)
        assert [len(dls.train), len(dls.valid)] == [-(-n // 8), 2]
    with pytest.raises(ValueError, match='now.csv has 60 rows: too few for 60 to choose on'):
        task.load(table, n_choose=60)


def test_a_table_is_chosen_and_tested_on_its_own_rows(table, monkeypatch):
    task = Table('now.csv', 'paid', ('place',), ('rooms',), 'later.csv')
    averages = ChosenAverages(n_choose=15, stops=(0.5,))
    recipe = replace(RECIPES['averages-adult'], name='mine', task=task, budget=4, swa_start=3, bs=16, averages=averages)
    monkeypatch.setitem(RECIPES, 'mine', recipe)
    assert reproduce('mine', 1, table / 'out', table, threads=1, stream=io.StringIO()) == {}
    data, _ = task.load(table, n_choose=15)
    dl = task.test_loader(data, 15)
    learn = recipe_learner(recipe, 0, Settings(), data)
    learn.model.load_state_dict(torch.load(table / 'out' / 'seed-0-constant-4.pth'))
    with learn.no_bar():
        wanted = list(map(float, learn.validate(dl=dl)))
    (found,) = lines_of(table / 'out', 'averages')
    assert found['runs']['constant 4']['rows']['last']['test'] == pytest.approx(wanted, abs=1e-5)
    assert 'samples that are in no training' in report(table / 'out')


# what is trained


def test_the_runs_are_three_schedules_and_shorter_one_cycles():
    recipe = RECIPES['averages-small-cifar100']
    assert {run.name: len(run.lrs) for run in runs(recipe)} == {
        'SWA 60': 60,
        'constant 60': 60,
        'one-cycle 60': 60,
        'one-cycle 15': 15,
        'one-cycle 30': 30,
    }
    swa, constant, *cycles = runs(recipe)
    assert swa.lrs == tuple(swa_lr(recipe, e) for e in range(60)) and set(swa.lrs[45:]) == {0.05}
    assert set(constant.lrs) == {0.05}
    for run in (swa, constant, *cycles):
        n = len(run.lrs)
        assert run.swa_start == round(0.75 * n) and n <= 3 / 4 * run.n_segments  # so that epochs end with a segment
        assert {(b.decay, b.power) for b in run.beside} == {(0.998, None), (None, 0.1)}
    assert {run.name for run in runs(scaled(recipe, 0.1))} == {
        'SWA 6',
        'constant 6',
        'one-cycle 6',
        'one-cycle 2',
        'one-cycle 3',
    }


def test_the_noisy_recipe_differs_in_the_noise_alone():
    clean, noisy = (RECIPES[f'averages-small-cifar100{ending}'] for ending in ('', '-noisy'))
    assert replace(noisy, name=clean.name, averages=replace(noisy.averages, label_noise=0.0)) == clean
    assert noisy.averages.label_noise == 0.1


@pytest.mark.parametrize('name', ['small-cifar10', 'lengths-small-cifar100', 'tabular-adult', 'ensembles-digits'])
def test_records_of_other_recipes_go_on(name):
    line = (ROOT / 'results' / name / 'runs.jsonl').read_text().splitlines()
    record = next(data for data in map(json.loads, line) if data['kind'] == 'training')
    assert described(RECIPES[name]) == record['trained']


def test_a_run_leaves_a_history_that_gives_the_averages_beside_it(trained):
    learn = recipe_learner(SMALL, 0, Settings(), recipe_data(SMALL, None, Settings())[0])
    for run, n in RUNS.items():
        name = run.lower().replace(' ', '-')
        history = WeightHistory.load(trained / f'seed-0-{name}-history', learn)
        ends = torch.stack([history.average(epochs=(e + 0.5, e + 1))['0.weight'] for e in range(n)])  # single steps
        assert torch.equal(ends[-1], torch.load(trained / f'seed-0-{name}.pth')['0.weight'])
        means = {'swa': ends[round(n * 4 / 6) :].double().mean(0), 'power': history.average(power=0.1)['0.weight']}
        for average, wanted in means.items():
            kept = torch.load(trained / f'seed-0-{name}-{average}.pth')['0.weight']
            torch.testing.assert_close(kept, wanted.float(), rtol=1e-5, atol=1e-6)


# what is chosen, and what that is worth


def values_of(samples, weights, refreshed=True, on='test'):
    "Loss and accuracy, by hand."
    images, targets = samples[on]
    train = samples['train'][0] if refreshed else None
    return twins.loss_and_accuracy(twins.logits(small_net(10), weights, images, SMALL.stats, train), targets)


class Steps:
    "The weights of each step of a run, from the files of its history: there every step is a segment."

    def __init__(self, folder, run):
        self.file = folder / f'seed-0-{run.lower().replace(" ", "-")}'
        history = Path(f'{self.file}-history')
        segments = json.loads((history / 'index.json').read_text())['segments']
        assert [s['n'] for s in segments] == [1] * 2 * RUNS[run]
        self.steps = [torch.load(history / s['file']) for s in segments]

    def kept(self, ending=''):
        return torch.load(f'{self.file}{ending}.pth')

    def mean(self, epochs):
        first, end = (round(2 * e) for e in epochs)
        chosen = self.steps[first:end]
        mean = {k: (sum(s[k].double() for s in chosen) / len(chosen)).float() for k in chosen[0]}
        return self.kept() | mean


@pytest.mark.parametrize('run', RUNS)
def test_every_row_is_what_its_weights_are_worth_on_the_test_set(trained, found, samples, run):
    steps = Steps(trained, run)
    rows = found[0]['runs'][run]['rows']
    weights = {'last': steps.kept(), 'refreshed': steps.kept()}
    for name in ('swa', 'ema', 'power'):
        weights[name] = steps.kept(f'-{name}')
    for column in ('valid_loss', 'accuracy'):
        weights[f'best {column}'] = steps.kept(f'-best-{column.replace("_", "-")}')
        for name in (f'mean {column}', f'chosen {column}'):
            if 'epochs' in rows[name]['which']:
                weights[name] = steps.mean(rows[name]['which']['epochs'])
            elif not rows[name]['which']:
                weights[name] = steps.kept()
    assert len(rows) == 11 and rows.keys() - weights.keys() <= {'chosen valid_loss', 'chosen accuracy'}  # an EMA
    for name, state in weights.items():
        refreshed = name != 'last' and rows[name].get('which') != {}
        for on in ('choose', 'test'):
            assert rows[name][on] == pytest.approx(values_of(samples, state, refreshed, on), abs=2e-5), (name, on)


@pytest.mark.parametrize('run', RUNS)
def test_the_best_epochs_are_best_on_the_samples_to_choose_on(trained, folder, found, samples, run):
    steps = Steps(trained, run)
    of_run = found[0]['runs'][run]
    record = lines_of(folder, 'training')[0]
    part = next(p for p in record['parts'] if p['runs'] == [run])
    means = [values_of(samples, steps.mean((e, e + 1)), on='choose') for e in range(RUNS[run])]
    for i, (column, best) in enumerate((('valid_loss', min), ('accuracy', max))):
        ends = [row[column] for row in part['epochs']]
        end = steps.kept(f'-best-{column.replace("_", "-")}')
        assert values_of(samples, end, False, 'choose')[i] == pytest.approx(best(ends), abs=2e-5)
        assert torch.equal(end['0.weight'], steps.steps[2 * ends.index(best(ends)) + 1]['0.weight'])
        start, after = of_run['rows'][f'mean {column}']['which']['epochs']
        assert after == start + 1 and means[start][i] == pytest.approx(best(v[i] for v in means), abs=2e-5)


@pytest.mark.parametrize('run', RUNS)
def test_the_choice_is_that_of_the_history(trained, found, samples, run):
    of_run = found[0]['runs'][run]
    learn = recipe_learner(SMALL, 0, Settings(), recipe_data(SMALL, None, Settings())[0])
    history = WeightHistory.load(trained / f'seed-0-{run.lower().replace(" ", "-")}-history', learn)
    table = history.choose('valid_loss')
    assert json.loads(json.dumps(history.chosen)) == of_run['rows']['chosen valid_loss']['which']
    assert of_run['choices']['valid_loss']['n'] == len(table) == len(of_run['table'])
    assert of_run['choices']['valid_loss']['gain'] == pytest.approx(table.iloc[0]['gain'], abs=1e-4)
    for name, loss, metric in of_run['table']:
        row = table[table['average'] == name].iloc[0]
        assert [loss, metric] == pytest.approx([row['valid_loss'], row['accuracy']], abs=1e-4)
    assert of_run['table'][0][0] == 'the last weights' and of_run['choices']['accuracy']['seconds'] > 0


def test_a_constant_rate_that_is_stopped_is_averaged_up_to_there(trained, found, samples):
    steps = Steps(trained, 'constant 6')
    assert [run for run in RUNS if 'stopped' in found[0]['runs'][run]] == ['constant 6']
    stopped = found[0]['runs']['constant 6']['stopped']
    assert list(stopped) == ['3', '6']
    for end, columns in stopped.items():
        windows = windows_to(int(end))
        assert windows == [(start, int(end)) for start in {'3': (0, 1, 2), '6': (0, 2, 3, 4, 5)}[end]]
        values = [values_of(samples, steps.mean(w), on='choose') for w in windows]
        for i, (column, best) in enumerate((('valid_loss', min), ('accuracy', max))):
            window = tuple(columns[column]['which']['epochs'])
            assert values[windows.index(window)][i] == pytest.approx(best(v[i] for v in values), abs=2e-5)
            assert columns[column]['test'] == pytest.approx(values_of(samples, steps.mean(window)), abs=2e-5)
    assert len(windows_to(60)) == 12 and windows_to(60)[-1] == (59, 60)


# what it survives


def without_seconds(found):
    found = json.loads(json.dumps(found)) | {'finished': True}
    for of_run in found['runs'].values():
        del of_run['seconds']
        for choice in of_run['choices'].values():
            del choice['seconds']
    return found


def test_a_seed_interrupted_again_and_again_finds_the_same(tmp_path, folder, found, monkeypatch):
    monkeypatch.setattr('fastai_swa.experiments.train._SECONDS', 0)

    class Interrupts(io.StringIO):
        def __init__(self, n):
            super().__init__()
            self.n = n

        def write(self, text):
            self.n -= 1
            if not self.n:
                raise KeyboardInterrupt

    monkeypatch.setattr('fastai_swa.experiments.progress._SECONDS', 0)
    n_interrupted = 0
    for n in (3, 6, 12, 2, 2, 99):  # lines: of epochs, then of runs that are evaluated
        try:
            assert reproduce('small', 1, tmp_path, threads=1, stream=Interrupts(n)) == {}
        except KeyboardInterrupt:
            n_interrupted += 1
    assert n_interrupted == 5
    (again,) = lines_of(tmp_path, 'averages')
    assert without_seconds(again) == without_seconds(found[0])
    left = {f.name for f in tmp_path.iterdir()}
    assert left == {f.name for f in folder.iterdir() if not f.name.startswith('seed-1')}
    assert not [name for name in left if 'history' in name or 'ckpt' in name]


def test_choosing_ends_in_time_and_loses_nothing(trained, tmp_path, found):
    out = tmp_path / 'out'
    shutil.copytree(trained, out)
    with pytest.raises(TimeIsUp):
        evaluate_seed(SMALL, 0, out, Settings(), None, 1, 0, lambda *line: None)
    assert (out / 'seed-0-swa-6-history').is_dir() and not lines_of(out, 'averages')
    with pytest.raises(ValueError, match='no seed whose averages are chosen: the same reproduce command goes on'):
        report(out)
    lines = []
    evaluate_seed(SMALL, 0, out, Settings(), None, 1, float('inf'), lambda *line: lines.append(line))
    assert without_seconds(lines_of(out, 'averages')[0]) == without_seconds(found[0])
    assert lines[0] == (0, 'seed 0  choosing between averages of SWA 6') and 'left' in lines[1][1]


def test_a_complete_seed_is_not_evaluated_again(folder, found, monkeypatch):
    monkeypatch.setattr('fastai_swa.experiments.choose_averages._evaluated', lambda *args: pytest.fail('again'))
    assert reproduce('small', 2, folder, threads=1, stream=io.StringIO()) == {}
    assert lines_of(folder, 'averages') == found


# the report


def tables_of(text):
    "Section -> name of a row -> its cells."
    sections = {}
    for section in text.split('\n## ')[1:]:
        title, *lines = section.splitlines()
        rows = [[c.strip() for c in line.split('|')[1:-1]] for line in lines if line.startswith('| ')]
        sections[title] = {}
        for name, *cells in rows:
            sections[title].setdefault(name, []).append(cells)
    return sections


def test_the_report_has_a_table_for_each_schedule_with_paired_differences(folder, found):
    text = report(folder)
    assert '2 seeds (0, 1)' in text and 'Chosen on 50 samples' in text
    assert '10 % of the labels that are trained on are wrong' in text
    sections = tables_of(text)
    assert list(sections)[:3] == ['SWA 6', 'constant 6', 'one-cycle 6']

    def tested(run, row):
        return np.array([f['runs'][run]['rows'][row]['test'] for f in found]).T

    for run in list(sections)[:3]:
        rows = sections[run]
        (cells,) = rows['chosen by loss']
        loss, accuracy = tested(run, 'chosen valid_loss')
        error = 100 - 100 * accuracy
        assert cells[:2] == [
            f'{error.mean():.2f} +- {error.std(ddof=1):.2f}',
            f'{loss.mean():.4f} +- {loss.std(ddof=1):.4f}',
        ]
        for row, place in ('last', 2), ('refreshed', 4):
            other_loss, other_accuracy = tested(run, row)
            for x, digits, cell in (
                (100 * (other_accuracy - accuracy), 2, cells[place]),
                (loss - other_loss, 4, cells[place + 1]),
            ):
                mean, half = mean_and_half(x)
                assert cell == f'{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})'
        assert rows['last weights'][0][2:4] == ['', ''] and rows['batch norm refreshed'][0][4:] == ['', '']
        assert 'SWA from 0.666667' in rows and len(rows) == 12
    assert (folder / 'curves.png').stat().st_size > 5000


def test_the_report_compares_the_stopped_constant_rate_with_one_cycle(folder, found):
    report(folder)
    numbers = json.loads((folder / 'report.json').read_text())
    for end in '3', '6':
        ours = np.array([f['runs']['constant 6']['stopped'][end]['accuracy']['test'][1] for f in found])
        theirs = np.array([f['runs'][f'one-cycle {end}']['rows']['refreshed']['test'][1] for f in found])
        name = f'constant rate stopped at {end}, chosen by accuracy'
        difference = numbers['differences'][f'{name} - one-cycle {end}, batch norm refreshed']['error']
        assert difference['mean'] == pytest.approx(100 * (theirs - ours).mean()) and difference['n'] == 2
        assert numbers['rows'][name]['error']['mean'] == pytest.approx(100 - 100 * ours.mean())
        assert f'one-cycle {end}, chosen by loss' in numbers['rows']
    assert numbers['differences']['SWA 6, chosen by loss - SWA 6, batch norm refreshed']['loss']['n'] == 2


def test_the_report_says_what_was_chosen(folder, found):
    text = report(folder)
    rows = [
        [c.strip() for c in line.split('|')[1:-1]]
        for line in text.split('## What was chosen')[1].splitlines()
        if line.startswith('| ')
    ]
    assert len(rows) == 1 + 2 * len(RUNS)
    for run, by, n_last, n_windows, n_emas, start, end, *_, worse, _ in rows[1:]:
        column = {'loss': 'valid_loss'}.get(by, by)
        chosen = [f['runs'][run]['rows'][f'chosen {column}'] for f in found]
        which = [row['which'] for row in chosen]
        windows = [w['epochs'] for w in which if 'epochs' in w]
        assert n_last == f'{sum(not w for w in which)} of 2' and int(n_windows) == len(windows)
        assert int(n_emas) == sum('ema' in w or 'power' in w for w in which)
        if windows:
            assert [start, end] == [f'{x:.1f}' for x in np.mean(windows, 0)]
        i = 0 if by == 'loss' else 1
        sign = -1 if by == 'loss' else 1
        last = [f['runs'][run]['rows']['last'] for f in found]
        n_worse = sum(sign * (row['test'][i] - other['test'][i]) < 0 for row, other in zip(chosen, last))
        assert worse == f'{n_worse} of 2'


def test_seeds_that_are_not_evaluated_do_not_count(folder, tmp_path):
    lines = lines_of(folder)
    more = next(line for line in lines if line['kind'] == 'training') | {'seed': 7}
    (tmp_path / 'runs.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in [*lines, more]))
    assert 'seed 7 is not yet evaluated' in report(tmp_path)
    assert json.loads((tmp_path / 'report.json').read_text())['seeds'] == [0, 1]


def test_the_list_counts_the_time_of_choosing(folder, found):
    line = next(line for line in listing(folder.parent).splitlines() if line.startswith('small '))
    seconds = []
    for record, of_seed in zip(lines_of(folder, 'training'), found):
        trained = sum(epoch['seconds'] for part in record['parts'] for epoch in part['epochs'])
        seconds.append(trained + sum(of_run['seconds'] for of_run in of_seed['runs'].values()))
    assert f' 21  {sorted(seconds)[1]:.0f} s (CPU' in line
