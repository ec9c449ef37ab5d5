"""Recipes beyond images: tables and sentences, from their files to the report."""

import io
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import r2_score

from fastai_swa.experiments import RECIPES, Settings, report, reproduce
from fastai_swa.experiments.recipe_learner import recipe_data, recipe_learner
from fastai_swa.experiments.report_trainings import draw
from fastai_swa.experiments.tasks import ADULT, HOUSING, SST2, Sentences, Table

FLATS = Table('flats.csv', 'price', ('place',), ('rooms', 'age'), is_number=True)
LOANS = Table('loans.csv', 'paid', ('place',), ('rooms',), 'later.csv')
VERDICTS = Sentences('train.csv', 'test.csv')


@pytest.fixture
def folder(tmp_path):
    rng = np.random.RandomState(0)
    n = 100
    flats = pd.DataFrame(
        {'place': rng.choice(['near', 'far'], n), 'rooms': rng.randint(1, 6, n), 'age': rng.rand(n) * 50}
    )
    flats['price'] = 100.0 * flats['rooms'] - flats['age'] + 50 * (flats['place'] == 'near')
    flats.loc[3, 'age'] = np.nan
    flats.to_csv(tmp_path / 'flats.csv', index=False)
    flats['paid'] = np.where(flats['rooms'] > 2, ' yes', 'no')  # with a blank in front, as files have it
    flats[:60].to_csv(tmp_path / 'loans.csv', index=False)
    flats[60:].to_csv(tmp_path / 'later.csv', index=False)
    good = pd.DataFrame(
        {'sentence': ['a fine film', 'fine , fine', 'no good film', 'dull'] * 10, 'label': [1, 1, 0, 0] * 10}
    )
    good.to_csv(tmp_path / 'train.csv', index=False)
    good[:8].to_csv(tmp_path / 'test.csv', index=False)
    return tmp_path


def recipe(task, **kwargs):
    return replace(
        RECIPES['tabular-housing'], name='mine', task=task, budget=8, swa_start=6, lengths=(4, 8), bs=32, **kwargs
    )


def go(monkeypatch, folder, task, settings=Settings(), seeds=1):
    monkeypatch.setitem(RECIPES, 'mine', recipe(task))
    assert reproduce('mine', seeds, folder / 'out', folder, settings, threads=1, stream=io.StringIO()) == {}
    return [json.loads(line) for line in (folder / 'out' / 'runs.jsonl').read_text().splitlines()]


def test_every_fifth_row_of_a_table_without_a_test_file_is_tested_on_and_no_row_twice(folder):
    (data, train, test), about = FLATS.load(folder)
    assert (len(train), len(test), about['train'], about['valid'], about['kind']) == (80, 20, 80, 20, 'flats')
    whole = pd.read_csv(folder / 'flats.csv')
    both = pd.concat([train, test]).sort_values(['rooms', 'age'])[['rooms', 'age']].to_numpy(float)
    np.testing.assert_array_equal(both, whole.sort_values(['rooms', 'age'])[['rooms', 'age']].to_numpy(float))
    assert FLATS.load(folder)[1] == about and FLATS.load(folder, 70)[1] != about


def test_a_number_to_be_predicted_is_standardised_by_the_training_rows(folder):
    (_, train, test), _ = FLATS.load(folder)
    assert train['price'].mean() == pytest.approx(0, abs=1e-12) and train['price'].std() == pytest.approx(1)
    whole = pd.read_csv(folder / 'flats.csv')
    back = pd.merge(pd.concat([train, test]), whole, on=['place', 'rooms', 'age'], how='inner')
    slope, intercept = np.polyfit(back['price_x'], back['price_y'], 1)
    np.testing.assert_allclose(
        back['price_x'] * slope + intercept, back['price_y'], rtol=1e-9
    )  # the test rows by the same numbers


def test_two_files_are_training_and_test_rows(folder):
    (data, train, test), about = LOANS.load(folder, n_test=30)
    assert (about['train'], about['valid']) == (60, 30) and set(train['paid']) == {'yes', 'no'}
    dls = LOANS.loaders(data := (data, train, test), 16, 0)
    assert len(dls.train) == 4 and len(dls.train_ds) == 60 and len(dls.valid_ds) == 30  # the last short batch is kept
    assert LOANS.network(data, dls)(*dls.one_batch()[:-1]).shape == (16, 2)


def test_words_are_numbered_by_how_often_they_are_in_the_training_sentences(folder):
    (parts, _, _), about = VERDICTS.load(folder)
    x, y = parts[0]
    assert x.shape == (40, 40) and y[:4].tolist() == [1, 1, 0, 0] and about['valid'] == 8
    fine, film = int(x[0, 1]), int(x[0, 2])
    assert fine == 2 and x[1, :3].tolist()[::2] == [2, 2] and film == 3  # 30 times, 20 times
    assert x[0, 3:].eq(0).all() and x[:4].max() == 2 + 7 - 1  # padding; seven words
    pd.DataFrame({'sentence': ['fine unheard-of'], 'label': [1]}).to_csv(folder / 'other.csv', index=False)
    (parts, _, _), _ = Sentences('train.csv', 'other.csv').load(folder)
    assert parts[1][0][0, :3].tolist() == [2, 1, 0]


@pytest.mark.parametrize('task', [FLATS, LOANS, VERDICTS], ids=['number', 'classes', 'sentences'])
def test_what_a_run_ends_with_is_what_its_stored_weights_predict(folder, task, monkeypatch):
    (data,) = go(monkeypatch, folder, task)
    part = next(p for p in data['parts'] if p['runs'] == ['SWA 8'])
    samples, _ = recipe_data(recipe(task), folder, Settings())
    learn = recipe_learner(recipe(task), 0, Settings(), samples)
    for prefix, file in (('', 'seed-0-swa-8.pth'),):
        learn.model.load_state_dict(torch.load(folder / 'out' / file))
        with learn.no_bar():
            preds, y = learn.get_preds()
        if task.is_number if isinstance(task, Table) else False:
            found = r2_score(y.numpy().ravel(), preds.numpy().ravel())
        else:
            found = float((preds.argmax(1) == y.ravel()).double().mean())
        assert part['epochs'][-1][prefix + task.metric] == pytest.approx(found, abs=1e-5)


def test_the_report_has_every_length_the_averages_and_the_baseline(folder, monkeypatch):
    records = go(monkeypatch, folder, FLATS, seeds=2)
    text = report(folder / 'out')
    rows = {
        line.split('|')[1].strip(): [c.strip() for c in line.split('|')[2:-1]]
        for line in text.splitlines()
        if line.startswith('| ')
    }
    for n in 4, 8:
        for name in (
            f'Adam {n}',
            f'SWA {n}',
            f'one-cycle {n}',
            f'Adam {n}, EMA over steps',
            f'one-cycle {n}, mean of its last third',
        ):
            assert rows[name][0] == str(n), name
    last = [next(p for p in r['parts'] if p['runs'] == ['Adam 8'])['epochs'][-1] for r in records]
    refreshed = [
        100 * (1 - row['swa_r2_score']) for row in last
    ]  # the control: its end with the batch norm of a whole pass
    assert rows['Adam 8, batch norm refreshed'][1] == f'{np.mean(refreshed):.2f} +- {np.std(refreshed, ddof=1):.2f}'
    gains = [
        100 * (1 - next(p for p in r['parts'] if p['runs'] == ['SWA 8'])['epochs'][-1]['swa_r2_score']) - e
        for r, e in zip(records, refreshed)
    ]
    assert rows['SWA 8 - Adam 8, batch norm refreshed'][0] == f'{np.mean(gains):+.2f}'
    emas = [next(p for p in r['parts'] if p['runs'] == ['SWA 8'])['epochs'][-1]['ema_r2_score'] for r in records]
    gains = [100 * (row['r2_score'] - ema) for row, ema in zip(last, emas)]
    assert rows['SWA 8, EMA over steps - Adam 8'][0] == f'{np.mean(gains):+.2f}'
    errors = [100 * (1 - row['r2_score']) for row in last]
    assert rows['Adam 8'][1] == f'{np.mean(errors):.2f} +- {np.std(errors, ddof=1):.2f}'
    baseline = [100 * (1 - r['baseline']['metric']) for r in records]
    assert (
        rows['gradient boosting (scikit-learn)'][1].startswith(f'{np.mean(baseline):.2f}')
        and 'unexplained variance, %' in text
    )
    found = json.loads((folder / 'out' / 'report.json').read_text())
    assert (
        found['rows']['Adam 8']['error']['mean'] == pytest.approx(np.mean(errors))
        and 'SWA 8 - Adam 8' in found['differences']
    )


def test_the_figure_over_lengths_shows_differences_from_the_plain_run_seed_by_seed(folder, monkeypatch):
    records = go(monkeypatch, folder, FLATS, seeds=2)
    report(folder / 'out')
    found = json.loads((folder / 'out' / 'report.json').read_text())['differences']
    _, axs = plt.subplots(2, 2)
    draw(records, axs)
    for ax, quantity in zip(axs[1], ('error', 'loss')):
        line = next(line for line in ax.lines if line.get_label() == 'SWA')
        assert line.get_ydata() == pytest.approx([found[f'SWA {n} - Adam {n}'][quantity]['mean'] for n in (4, 8)])
        assert 'difference from Adam' in ax.get_ylabel()


def test_the_baseline_is_scikit_learns_own_on_the_same_rows(folder):
    data, _ = FLATS.load(folder)
    found = FLATS.baseline(data, 0)
    from sklearn.ensemble import HistGradientBoostingRegressor

    (_, train, test) = data
    columns = [c.assign(place=(c['place'] == 'near').astype(float))[['place', 'rooms', 'age']] for c in (train, test)]
    model = HistGradientBoostingRegressor(categorical_features=[0], random_state=0).fit(columns[0], train['price'])
    assert found['metric'] == pytest.approx(r2_score(test['price'], model.predict(columns[1])), abs=0.02)
    assert found['loss'] == pytest.approx((1 - found['metric']) * test['price'].var(ddof=0), rel=1e-6)


def test_a_number_that_only_test_rows_lack_is_the_median_of_the_training_rows(folder):
    table = pd.read_csv(folder / 'later.csv')
    table.loc[2, 'rooms'] = np.nan
    table.to_csv(folder / 'later.csv', index=False)
    (_, train, test), _ = LOANS.load(folder)
    assert test['rooms'].iloc[2] == train['rooms'].median() and not test['rooms'].isna().any()


@pytest.mark.parametrize(
    'spoil, said',
    [
        (lambda f: (f / 'flats.csv').unlink(), 'flats.csv is missing: --data is to name a folder with flats.csv'),
        (lambda f: (f / 'flats.csv').write_text('place,rooms\nnear,3\n'), "flats.csv has no column 'age'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence_before_anything_is_written(folder, monkeypatch, spoil, said):
    monkeypatch.setitem(RECIPES, 'mine', recipe(FLATS))
    spoil(folder)
    with pytest.raises(ValueError, match=said):
        reproduce('mine', 1, folder / 'out', folder, threads=1)
    assert not (folder / 'out').exists()


def test_the_recipes_name_the_columns_of_their_files():
    assert ADULT.metric == SST2.metric == 'accuracy' and HOUSING.metric == 'r2_score'
    for name in 'tabular-adult', 'tabular-housing', 'text-sst2':
        r = RECIPES[name]
        assert r.opt == 'Adam' and max(r.lengths) == r.budget and all(n > n * r.swa_start / r.budget for n in r.lengths)
