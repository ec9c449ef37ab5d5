"""The report on what the runner has found."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from fastai_swa import __main__
from fastai_swa.experiments import RECIPES, report
from fastai_swa.experiments.plan import parts, runs
from fastai_swa.experiments.recipes import scaled
from fastai_swa.experiments.report import papers_table
from fastai_swa.experiments.rows import curves, rows_of
from fastai_swa.experiments.tables import difference_rows, mean_and_half
from fastai_swa.plot import plot_lengths, plot_runs

NAME, SCALE = 'preresnet110-cifar10', 0.04  # budget 6, from epoch 5 on, 9 epochs
RECIPE = scaled(RECIPES[NAME], SCALE)


def accuracy(run, epoch, seed, average=False):
    "A value for each that no other has."
    return (
        {'SGD 1B': 0.1, 'SGD 1.5B': 0.2, 'SWA': 0.3}[run]
        + 0.01 * epoch
        + 0.001 * seed * (1 + epoch % 3)
        + (0.5 if average else 0)
    )


def record(seed, done=True, of=RECIPE, **changes):
    tree = parts(runs(of))

    def row(part, e):
        run, folds = part.runs[0].name, part.is_last and e >= part.runs[0].swa_start
        res = {
            'lr': 0.1,
            'train_loss': 1.0,
            'valid_loss': 2 - accuracy(run, e, seed),
            'accuracy': accuracy(run, e, seed),
        }
        if part.is_last:
            res |= {
                f'swa_{k}': v if folds else None
                for k, v in (
                    ('valid_loss', 2 - accuracy(run, e, seed, True)),
                    ('accuracy', accuracy(run, e, seed, True)),
                )
            }
        return res | {'seconds': 2.0 if folds else 1.0}

    return {
        'kind': 'training',
        'recipe': of.name,
        'seed': seed,
        'budget': of.budget,
        'swa_start': of.swa_start,
        'settings': {'scale': SCALE, 'images': None, 'device': 'cpu', 'precision': 'fp32', 'compile': None},
        'images': {'kind': 'CIFAR-10, JPEG', 'train': 50000, 'valid': 10000, 'sha256': 'abc'},
        'threads': 1,
        'sessions': [{'jobs': 1, 'versions': {'torch': '2.15.0'}, 'hardware': {'machine': 'x86_64', 'cores': 2}}],
        'started': '',
        'finished': 'now' if done else None,
        'parts': [
            {
                'runs': [r.name for r in p.runs],
                'begin': p.begin,
                'end': p.end,
                'done': done,
                'epochs': [row(p, e) for e in range(p.begin, p.end)],
            }
            for p in tree
        ],
    } | changes


def write(folder, *records):
    "The complete ones into the file of the row, those begun into one of their own."
    with (folder / 'runs.jsonl').open('a') as f:
        for r in records:
            if r['finished']:
                f.write(json.dumps(r) + '\n')
            else:
                (folder / f'seed-{r["seed"]}.json').write_text(json.dumps(r))
    return folder


def cells(text, name):
    return next(
        [c.strip() for c in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith(f'| {name} |')
    )


def test_each_row_of_the_table_is_the_mean_over_the_seeds_at_its_epoch(tmp_path):
    text = report(write(tmp_path, *(record(s) for s in (0, 1, 2))))
    for name, (run, epochs, average) in {
        'SGD 1B': ('SGD 1B', 6, False),
        'SGD 1B, batch norm refreshed': ('SGD 1B', 6, True),
        'SGD 1.5B': ('SGD 1.5B', 9, False),
        'SGD 1.5B, batch norm refreshed': ('SGD 1.5B', 9, True),
        'SWA 1B': ('SWA', 6, True),
        'SWA 1.25B': ('SWA', 7, True),
        'SWA 1.5B': ('SWA', 9, True),
        'SWA run at 1B, single weights': ('SWA', 6, False),
        'SWA run at 1.25B, single weights': ('SWA', 7, False),
        'SWA run at 1.5B, single weights': ('SWA', 9, False),
    }.items():
        values = [100 * (1 - accuracy(run, epochs - 1, s, average)) for s in (0, 1, 2)]
        mean, std = sum(values) / 3, math.sqrt(sum((v - sum(values) / 3) ** 2 for v in values) / 2)
        assert cells(text, name)[1:3] == [str(epochs), f'{mean:.2f} +- {std:.2f}'], name
    assert cells(text, 'SWA 1.5B')[4] == '4.18 +- 0.03' and cells(text, 'SGD 1.5B')[4] == ''
    assert (tmp_path / 'report.md').read_text() == text and (tmp_path / 'curves.png').stat().st_size > 5000


def test_differences_are_paired_with_their_confidence_interval(tmp_path):
    text = report(write(tmp_path, *(record(s) for s in (0, 1, 2))))
    gains = [
        100 * (accuracy('SGD 1B', 5, s) - accuracy('SWA', 8, s, True)) for s in (0, 1, 2)
    ]  # of the error: less is better
    low, high = stats.ttest_1samp(gains, 0).confidence_interval()
    losses = [accuracy('SGD 1B', 5, s) - accuracy('SWA', 8, s, True) for s in (0, 1, 2)]
    of_loss = stats.ttest_1samp(losses, 0).confidence_interval()
    assert cells(text, 'SWA 1.5B - SGD 1B')[1:] == [
        f'{np.mean(gains):+.2f}',
        f'{low:+.2f} to {high:+.2f}',
        '3 of 3',
        '-0.79',
        f'{np.mean(losses):+.4f}',
        f'{of_loss[0]:+.4f} to {of_loss[1]:+.4f}',
    ]
    ends = {
        'SGD 1B': ('SGD 1B', 5, False),
        'SGD 1B, batch norm refreshed': ('SGD 1B', 5, True),
        'SGD 1.5B': ('SGD 1.5B', 8, False),
        'SGD 1.5B, batch norm refreshed': ('SGD 1.5B', 8, True),
        'SWA 1B': ('SWA', 5, True),
        'SWA 1.25B': ('SWA', 6, True),
        'SWA 1.5B': ('SWA', 8, True),
        'SWA run at 1B, single weights': ('SWA', 5, False),
        'SWA run at 1.5B, single weights': ('SWA', 8, False),
    }
    rows = [
        line.split('|')[1].strip() for line in text.splitlines() if ' - ' in line.split('|')[1 % (1 + line.count('|'))]
    ]
    assert len(rows) == 12
    for name in rows:
        (run_a, e_a, avg_a), (run_b, e_b, avg_b) = (ends[part] for part in name.split(' - '))
        gains = [100 * (accuracy(run_b, e_b, s, avg_b) - accuracy(run_a, e_a, s, avg_a)) for s in range(3)]
        assert cells(text, name)[1] == f'{np.mean(gains):+.2f}', name


def test_one_seed_has_no_interval_and_is_said_to_tell_nothing_from_chance(tmp_path):
    text = report(write(tmp_path, record(4)))
    assert (
        'one seed cannot tell them from chance' in text
        and cells(text, 'SWA 1B - SGD 1B')[2] == ''
        and cells(text, 'SGD 1B')[2] == '83.80'
        and 'nan' not in text
    )


@pytest.mark.parametrize('x', [[1.0, 2.0, 4.0], [0.0, 0.0], [-3.0, 5.0, 1.0, 1.0]])
def test_the_interval_is_students(x):
    mean, half = mean_and_half(np.array(x))
    interval = stats.t.interval(0.95, len(x) - 1, loc=np.mean(x), scale=stats.sem(x)) if np.ptp(x) else (0, 0)
    assert (mean - half, mean + half) == pytest.approx(interval)
    assert mean_and_half(np.array([2.0])) == (2.0, math.inf)


def test_a_network_without_batch_norm_has_no_control_that_refreshes_it(tmp_path):
    assert 'refreshed' in report(write(tmp_path, record(0)))
    assert 'refreshed' not in report(write(tmp_path, record(0, recipe='vgg16-cifar10')))


@pytest.mark.parametrize(
    'scale, train, valid, is_whole',
    [
        (SCALE, 50000, 10000, False),
        (1, 50000, 10000, True),
        (1, 5000, 10000, False),
        (1, 50000, 2000, False),
        (2, 50000, 10000, False),
    ],
)
def test_what_was_not_run_at_full_length_on_all_images_is_said(tmp_path, scale, train, valid, is_whole):
    r = record(0, images={'kind': 'CIFAR-10', 'train': train, 'valid': valid, 'sha256': 'abc'})
    r['settings']['scale'] = scale
    text = report(write(tmp_path, r))
    assert (
        ('not at full length' in text) is (not is_whole)
        and ('the published row is not reproduced' in text) is (not is_whole)
        and 'JPEG' not in text
    )


def test_compressed_images_are_said_to_be_that(tmp_path):
    assert 'JPEG-compressed: absolute errors are not comparable' in report(write(tmp_path, record(0)))


def test_seconds_are_medians_and_seeds_side_by_side_are_said(tmp_path):
    r = record(0)
    r['parts'][0]['epochs'][0]['seconds'] = 1000.0  # compiling
    assert '1.00 s an epoch, 2.00 s where the average is validated (medians)\n' in report(write(tmp_path, r))
    (tmp_path / 'runs.jsonl').unlink()
    r['sessions'] = [r['sessions'][0], {'jobs': 5, 'versions': {'torch': '2.16.0'}, 'hardware': {'gpu': 'NVIDIA H200'}}]
    text = report(write(tmp_path, r))
    assert (
        ', 1 or 5 seeds side by side' in text
        and 'torch 2.15.0 / torch 2.16.0' in text
        and 'CPU, x86_64, 1 thread; NVIDIA H200' in text
    )


def test_a_run_that_diverged_is_named(tmp_path):
    r = record(0)
    next(p for p in r['parts'] if p['runs'] == ['SWA'])['epochs'][-1] |= {'swa_accuracy': None, 'swa_valid_loss': None}
    assert 'seed 0: the SWA run diverged' in report(write(tmp_path, r))


def test_two_folders_are_compared_row_by_row_for_the_seeds_that_both_have(tmp_path, capsys):
    from fastai_swa.experiments.report import compare

    for name, offset, seeds in (('zero', 0, (0, 1, 2)), ('reflect', 0.02, (1, 2, 3))):
        (tmp_path / name).mkdir()
        for s in seeds:
            r = record(s)
            for p in r['parts']:
                for row in p['epochs']:
                    row['accuracy'] += offset * (1 + s)
            write(tmp_path / name, r)
    text = compare(tmp_path / 'reflect', tmp_path / 'zero')
    low, high = stats.ttest_1samp([100 * 0.02 * 2, 100 * 0.02 * 3], 0).confidence_interval()
    assert 'of 2 seeds' in text and cells(text, 'SGD 1B, reflect - SGD 1B, zero')[1:] == [
        '-5.00',
        f'{-high:+.2f} to {-low:+.2f}',
        '2 of 2',
    ]
    assert cells(text, 'SWA 1.5B, reflect - SWA 1.5B, zero')[1] == '+0.00'  # of the averages, which are as they were
    with pytest.raises(SystemExit) as e:
        __main__.main(['report', str(tmp_path / 'reflect'), str(tmp_path / 'zero')])
    assert not e.value.code and text in capsys.readouterr().out


def test_a_seed_that_is_not_complete_is_named_and_not_counted(tmp_path):
    text = report(write(tmp_path, record(0), record(10), record(2, done=False)))
    assert '2 seeds (0, 10)' in text and 'seed 2 is not complete and not counted' in text


def test_curves_go_through_the_parts_that_runs_share():
    records = [record(s) for s in (0, 1)]
    found = curves(records, 'error')
    assert list(found) == ['SGD 1B', 'SGD 1.5B', 'SWA run, single weights', 'SWA run, average']
    epochs, values = found['SWA run, average']
    assert epochs.tolist() == [6, 7, 8, 9] and values[1].tolist() == [
        100 * (1 - accuracy('SWA', e, 1, True)) for e in (5, 6, 7, 8)
    ]
    epochs, values = found['SGD 1.5B']
    assert (
        epochs.tolist() == list(range(1, 10))
        and values.shape == (2, 9)
        and values[0, 8] == 100 * (1 - accuracy('SGD 1.5B', 8, 0))
    )
    assert values[0, 0] == 100 * (1 - accuracy('SGD 1B', 0, 0))  # of the part that all share
    assert rows_of(records[0])['SWA 1.25B'].epochs == 7


def test_folders_that_cannot_be_reported_are_one_sentence(tmp_path, capsys):
    def said(folder):
        with pytest.raises(SystemExit) as e:
            __main__.main(['report', str(folder)])
        assert e.value.code == 2
        return capsys.readouterr().err

    assert 'has no complete seed' in said(tmp_path)
    assert 'has no complete seed, and 1 begun' in said(write(tmp_path, record(3, done=False)))
    other = record(1)
    other['settings']['precision'] = 'bf16'
    assert "mixes runs: seed 1 has settings {'scale'" in said(write(tmp_path, record(0), other))
    for damaged in '{', '[]', '{"recipe": 3}':
        (tmp_path / 'runs.jsonl').write_text(json.dumps(record(0)) + '\n' + damaged)
        assert 'runs.jsonl is damaged in line 2: move it away' in said(tmp_path)
    (tmp_path / 'runs.jsonl').write_text('{"kind": "training", "seed": 0}\n')
    assert 'runs.jsonl is damaged: seed 0 is no record of a training' in said(tmp_path)
    (tmp_path / 'runs.jsonl').unlink()
    (tmp_path / 'seed-0-old.json').write_text('{')  # somebody's own
    report(write(tmp_path, record(0)))
    (tmp_path / 'runs.jsonl').unlink()
    assert 'of a recipe that is not known: other' in said(write(tmp_path, record(0, recipe='other')))
    assert 'nowhere is no folder' in said(tmp_path / 'nowhere')


def test_the_numbers_of_the_tables_are_in_report_json_with_their_intervals(tmp_path):
    report(write(tmp_path, *(record(s) for s in (0, 1, 2))))
    found = json.loads((tmp_path / 'report.json').read_text())
    errors = [100 * (1 - accuracy('SWA', 8, s, True)) for s in (0, 1, 2)]
    row = found['rows']['SWA 1.5B']
    assert row['epochs'] == 9 and row['error'] == {
        'mean': pytest.approx(np.mean(errors)),
        'std': pytest.approx(np.std(errors, ddof=1)),
        'n': 3,
    }
    assert row['loss']['mean'] == pytest.approx(2 - np.mean([accuracy('SWA', 8, s, True) for s in (0, 1, 2)]))
    gains = [e - 100 * (1 - accuracy('SGD 1B', 5, s)) for s, e in enumerate(errors)]
    low, high = stats.ttest_1samp(gains, 0).confidence_interval()
    assert found['differences']['SWA 1.5B - SGD 1B']['error'] == pytest.approx(
        {'mean': np.mean(gains), 'low': low, 'high': high, 'n': 3}
    )
    assert found['seeds'] == [0, 1, 2] and found['recipe'] == NAME


def test_one_seed_has_neither_interval_nor_standard_deviation_in_report_json(tmp_path):
    report(write(tmp_path, record(0)))
    found = json.loads((tmp_path / 'report.json').read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found['rows']['SGD 1B']['error']['std'] is None
    assert found['differences']['SWA 1B - SGD 1B']['error'] | {'mean': 0} == {
        'mean': 0,
        'low': None,
        'high': None,
        'n': 1,
    }


@pytest.mark.parametrize(
    'right, n_test, is_nothing', [(0.1, 1000, True), (0.12, 1000, True), (0.13, 1000, False), (0.12, 10_000, False)]
)
def test_a_network_at_chance_is_said_to_have_learned_nothing_instead_of_being_compared(
    tmp_path, right, n_test, is_nothing
):
    r = record(0, images={'kind': 'CIFAR-10', 'train': 50000, 'valid': n_test, 'sha256': 'abc'})
    r['parts'][-1]['epochs'][-1]['swa_accuracy'] = right  # SWA at 1.5 budgets
    text = report(write(tmp_path, r))
    assert (
        cells(text, 'SWA 1.5B')[4] == ('learned nothing: chance is 90' if is_nothing else '4.18 +- 0.03')
        and cells(text, 'SWA 1B')[4] == '4.49 +- 0.10'
    )
    assert ('| learned nothing |' in papers_table([tmp_path])) is is_nothing


def test_the_papers_table_has_a_line_a_network_with_what_is_published_in_brackets(tmp_path, capsys):
    whole = {
        'images': {'kind': 'CIFAR-10', 'train': 50000, 'valid': 10000, 'sha256': 'abc'},
        'settings': record(0)['settings'] | {'scale': 1.0},
    }
    for name in (NAME, 'vgg16-cifar10'):
        (tmp_path / name).mkdir()
        write(tmp_path / name, record(0, recipe=name, **whole), record(1, recipe=name, **whole))
    with pytest.raises(SystemExit):
        __main__.main(['report', str(tmp_path / NAME), str(tmp_path / 'vgg16-cifar10')])
    said = capsys.readouterr().out
    head = [c.strip() for c in next(line for line in said.splitlines() if 'test accuracy, %' in line).split('|')[1:-1]]
    assert head == ['test accuracy, %', 'seeds', 'SGD 1B', 'SWA 1B', 'SWA 1.25B', 'SWA 1.5B']
    values = [100 * accuracy('SWA', 8, s, True) for s in (0, 1)]
    row = [c for c in said.splitlines() if c.startswith('| vgg16-cifar10 |')][-1].split('|')
    assert (
        row[2].strip() == '2'
        and row[6].strip() == f'{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f} (93.64 +- 0.18)'
    )


def test_a_tail_of_our_own_is_called_so_wherever_it_stands_beside_published_numbers(tmp_path):
    recipe = RECIPES['shakeshake-cifar10']
    whole = {
        'images': {'kind': 'CIFAR-10', 'train': 50000, 'valid': 10000, 'sha256': 'abc'},
        'settings': record(0)['settings'] | {'scale': 1.0},
        'of': replace(recipe, budget=8, swa_start=6),
    }
    write(tmp_path, record(0, **whole), record(1, **whole))
    text = report(tmp_path)
    assert recipe.note in text.split('\n\n')[1]
    assert cells(text, 'SGD 1B')[4] == '3.07 +- 0.10' and '| SGD 1.5B' not in text and '| SWA ' not in text
    for budgets, epoch, published in (('1B', 7, ''), ('1.25B', 9, '2.84 +- 0.10'), ('1.5B', 11, '2.88 +- 0.06')):
        row = cells(text, f'our SWA tail {budgets}')
        errors = [100 - 100 * accuracy('SWA', epoch, s, True) for s in (0, 1)]
        assert row[2] == f'{np.mean(errors):.2f} +- {np.std(errors, ddof=1):.2f}' and row[4] == published
    assert cells(text, 'our SWA tail 1B - SGD 1B') and cells(text, 'our SWA tail 1.5B - SGD 1B')
    line = papers_table([tmp_path]).splitlines()[-1]
    assert line.startswith('| shakeshake-cifar10 (our SWA tail) |') and '(97.12 +- 0.06)' in line
    assert list(curves([record(0, **whole)], 'error'))[1:] == [
        'our SWA tail run, single weights',
        'our SWA tail run, average',
    ]


def test_the_command_prints_the_report(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        __main__.main(['report', str(write(tmp_path, record(0)))])
    assert not e.value.code and '| SWA 1.5B |' in capsys.readouterr().out


def test_what_was_scaled_or_compressed_does_not_stand_beside_the_papers_numbers(tmp_path):
    row = papers_table([write(tmp_path, record(0))]).splitlines()[-1]
    assert row.startswith(f'| {NAME} (not comparable) |') and '(95' not in row


def test_a_seed_that_diverged_does_not_count_and_is_said(tmp_path):
    broken = record(1)
    for p in broken['parts']:
        if p['runs'] == ['SWA']:
            p['epochs'] = [dict.fromkeys(row) | {'seconds': 1.0} for row in p['epochs']]
    text = report(write(tmp_path, record(0), record(2), broken))
    found = json.loads((tmp_path / 'report.json').read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found['rows']['SWA 1.5B']['error']['n'] == 2 and found['rows']['SGD 1B']['error']['n'] == 3
    values = [100 * (1 - accuracy('SWA', 8, s, True)) for s in (0, 2)]
    assert found['rows']['SWA 1.5B']['error']['mean'] == pytest.approx(np.mean(values)) and cells(text, 'SWA 1.5B')[
        2
    ].endswith('(2 of 3)')
    assert (
        'nan' not in text and 'seed 1: the SWA run diverged' in text and cells(text, 'SWA 1.5B - SGD 1B')[3] == '2 of 3'
    )


def test_rows_at_chance_are_named_in_the_head_and_their_differences_are_not_compared(tmp_path):
    r = record(0)
    r['parts'][-1]['epochs'][-1]['swa_accuracy'] = 0.1
    text = report(write(tmp_path, r))
    assert '**at chance, with nothing learned: SWA 1.5B**' in text and cells(text, 'SWA 1.5B - SGD 1B')[4] == ''


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    from fastai_swa.experiments.report import compare

    for name, offset in ('x', 0), ('y', 0.02):
        (tmp_path / name / 'row').mkdir(parents=True)
        r = record(0)
        for p in r['parts']:
            for row in p['epochs']:
                row['accuracy'] += offset
        write(tmp_path / name / 'row', r)
    text = compare(tmp_path / 'x' / 'row', tmp_path / 'y' / 'row')
    assert cells(text, f'SGD 1B, {tmp_path}/x/row - SGD 1B, {tmp_path}/y/row')[1] == '+2.00'


def test_seeds_of_a_recipe_that_has_changed_are_not_mixed(tmp_path, capsys):
    with pytest.raises(ValueError, match="mixes runs: seed 1 has trained {'lr': 0.2}"):
        report(write(tmp_path, record(0, trained={'lr': 0.1}), record(1, trained={'lr': 0.2})))


def intervals(ax):
    "(x, low, high) of each interval that is drawn."
    return [(x, low, high) for c in ax.collections for (x, low), (_, high) in c.get_segments()]


def test_the_figure_shows_means_with_intervals_at_a_few_epochs_and_its_legend_off_the_data():
    records = [record(s) for s in (0, 1, 2)]
    ax = plot_runs(curves(records, 'error'), ylabel='error')
    lines = {line.get_label(): line for line in ax.lines}

    def errors(e):
        return [100 * (1 - accuracy('SWA', e, s, True)) for s in range(3)]

    assert lines['SWA run, average'].get_ydata().tolist() == pytest.approx([np.mean(errors(e)) for e in range(5, 9)])
    low, high = stats.t.interval(0.95, 2, np.mean(errors(8)), stats.sem(errors(8)))
    assert (
        any(it == pytest.approx((9, low, high)) for it in intervals(ax))
        and ax.get_xlabel() == 'epochs'
        and ax.get_ylabel() == 'error'
    )
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().y1 <= ax.get_window_extent().y0
    late = [
        100 * (1 - accuracy('SGD 1B', e, s)) for e in (4, 5) for s in range(3)
    ]  # of all that is late, this is the greatest
    low, high = ax.get_ylim()
    assert low <= np.mean(errors(8)) and max(late) < high < 100


def test_the_figure_over_lengths_has_a_point_for_each_with_its_interval():
    values = np.array([[30.0, 20.0], [34.0, 22.0], [29.0, 21.0]])
    ax = plot_lengths({'SGD': (np.array([15, 60]), values), 'SWA': (np.array([15, 60]), values - 1)}, ylabel='error')
    sgd, swa = (next(line for line in ax.lines if line.get_label() == name) for name in ('SGD', 'SWA'))
    assert sgd.get_ydata().tolist() == pytest.approx([31, 21]) and swa.get_ydata().tolist() == pytest.approx([30, 20])
    assert list(sgd.get_xdata()) == pytest.approx([15, 60], rel=0.02) and [
        t.get_text() for t in ax.get_xticklabels()
    ] == ['15', '60']
    low, high = stats.t.interval(0.95, 2, 31, stats.sem(values[:, 0]))
    assert any(it[1:] == pytest.approx((low, high)) for it in intervals(ax))
    assert sgd.get_xdata()[0] != swa.get_xdata()[0] and sgd.get_linestyle() != swa.get_linestyle()


def test_less_is_better():
    rows = difference_rows(
        {'a': np.array([0.1, 0.2, 0.5]), 'b': np.array([0.2, 0.4, 0.4])}, [('a', 'b'), ('a', 'c')], 4
    )
    low, high = stats.ttest_1samp([-0.1, -0.2, 0.1], 0).confidence_interval()
    assert rows[1:] == [['a - b', '-0.0667', f'{low:+.4f} to {high:+.4f}', '2 of 3']]
