"""The comparison of ensembles at one budget: what is trained, predicted together, and reported."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastai_swa.experiments import RECIPES, Settings, report, reproduce
from fastai_swa.experiments.report_ensembles import size_curves
from fastai_swa.experiments.train import run_seed
from fastai_swa.vision import cifar

SMALL = replace(RECIPES['ensembles-digits'], name='small', budget=10, swa_start=6, images=100)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out, threads = tmp_path_factory.mktemp('ensembles'), torch.get_num_threads()
    RECIPES['small'] = SMALL
    try:
        assert reproduce('small', 2, out, threads=1, stream=io.StringIO()) == {}
        yield out
    finally:
        del RECIPES['small']
        torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def found(folder):
    return next(data for data in lines_of(folder) if data['kind'] == 'ensembles')


def lines_of(folder):
    return [json.loads(line) for line in (folder / 'runs.jsonl').read_text().splitlines()]


def probs(file):
    model, dls = SMALL.network(10), cifar(10, 'digits', SMALL.stats, padding=None, n_images=100, device='cpu')
    model.load_state_dict(torch.load(file))
    with torch.no_grad():
        return torch.cat([model.eval()(x.as_subclass(torch.Tensor)) for x, _ in dls.valid]).double().softmax(
            1
        ), torch.cat([y for _, y in dls.valid])


def accuracy_of(files):
    p = sum(probs(f)[0] for f in files) / len(files)
    return float((p.argmax(1) == probs(files[0])[1]).double().mean())


def snapshots(folder, seed, name):
    return sorted((folder / f'seed-{seed}-{name}').glob('snapshot-*.pth'))


def test_each_seed_leaves_the_snapshots_of_both_methods_at_the_epochs_that_they_say(folder):
    for seed in 0, 1:
        data = next(data for data in lines_of(folder) if data['kind'] == 'training' and data['seed'] == seed)
        assert data['images']['train'] == 100 and data['images']['valid'] == 397
        assert len(snapshots(folder, seed, 'snapshots')) == 5 and len(snapshots(folder, seed, 'fge')) == 1
        by_run = {p['runs'][0]: p for p in data['parts'] if len(p['runs']) == 1}
        kept = [
            by_run['snapshots']['begin'] + i
            for i, row in enumerate(by_run['snapshots']['epochs'])
            if row['ens_accuracy'] is not None
        ]
        assert kept == [1, 3, 5, 7, 9] and by_run['FGE']['end'] == 9 and by_run['FGE']['begin'] == 8
        last = torch.load(folder / f'seed-{seed}-fge.pth')
        assert all(torch.equal(v, last[k]) for k, v in torch.load(snapshots(folder, seed, 'fge')[-1]).items())


def test_every_number_of_models_is_measured_on_their_mean_probabilities(folder, found):
    for seed in 0, 1:
        files = snapshots(folder, seed, 'snapshots')
        for m in range(1, 6):  # the last m, as the paper has it
            row = next(r for r in found['sizes'] if (r['seed'], r['method'], r['members']) == (seed, 'snapshots', m))
            assert row['accuracy'] == pytest.approx(accuracy_of(files[-m:]))
        assert next(r for r in found['sizes'] if (r['seed'], r['method']) == (seed, 'SGD'))[
            'accuracy'
        ] == pytest.approx(accuracy_of([folder / f'seed-{seed}-sgd-1b.pth']))
        assert next(r for r in found['sizes'] if (r['seed'], r['method']) == (seed, 'SWA'))[
            'accuracy'
        ] == pytest.approx(accuracy_of([folder / f'seed-{seed}-swa-average.pth']))
    both = {r['method']: r for r in found['budgets'] if r['budgets'] == 2}
    assert len([r for r in found['budgets'] if r['method'] == 'FGE']) == 3  # two groups of one seed, one of two
    assert (
        both['SGD']['accuracy'] == pytest.approx(accuracy_of([folder / f'seed-{i}-sgd-1b.pth' for i in (0, 1)]))
        and both['snapshots']['members'] == 10
    )
    (a, y), (b, _) = (probs(folder / f'seed-{i}-sgd-1b.pth') for i in (0, 1))
    assert both['SGD']['disagreement'] == pytest.approx(float((a.argmax(1) != b.argmax(1)).double().mean()))
    assert both['SGD']['loss'] == pytest.approx(float(-((a + b) / 2)[torch.arange(397), y].log().mean()), rel=1e-4)
    costs = {c['method']: c for c in found['costs']}
    assert costs['snapshots']['bytes'] == 5 * costs['SGD']['bytes'] and costs['SGD']['bytes'] == sum(
        t.numel() * t.element_size() for t in torch.load(folder / 'seed-0-sgd-1b.pth').values()
    )
    assert all(c['sample'] > 0 and c['test set'] > 0 for c in costs.values())


def test_the_report_has_a_row_for_each_method_and_a_figure_over_the_number_of_models(folder, found):
    text = report(folder)
    lines = [line for line in text.splitlines() if line.startswith('| ')]
    rows = {
        line.split('|')[1].strip(): [c.strip() for c in line.split('|')[2:-1]] for line in reversed(lines)
    }  # the first of a name
    assert [rows[m][:2] for m in ('SGD', 'SWA', 'snapshots', 'FGE')] == [
        ['10', '1'],
        ['10', '1'],
        ['10', '5'],
        ['9', '1'],
    ]
    values = [100 * accuracy_of(snapshots(folder, seed, 'snapshots')) for seed in (0, 1)]
    values = [100 - v for v in values]  # errors
    assert rows['snapshots'][2] == f'{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}'
    pair = 100 * accuracy_of([folder / f'seed-{i}-sgd-1b.pth' for i in (0, 1)])
    assert (
        rows['snapshots'][-1] == '0.5'
        and rows['independent SGD runs'][1] == f'{100 - pair:.2f}'
        and 'scaled' not in text
        and 'not reproduced' not in text
    )
    of_sgd = [100 - 100 * accuracy_of([folder / f'seed-{s}-sgd-1b.pth']) for s in range(2)]
    assert rows['snapshots - SGD'][0] == f'{np.mean(np.array(values) - of_sgd):+.2f}'
    numbers = json.loads((folder / 'report.json').read_text())
    assert numbers['rows']['snapshots']['error'] == {
        'mean': pytest.approx(np.mean(values)),
        'std': pytest.approx(np.std(values, ddof=1)),
        'n': 2,
    }
    assert (
        numbers['rows']['SGD, 2 runs']['error']['mean'] == pytest.approx(100 - pair)
        and numbers['differences']['FGE - SWA']['loss']['n'] == 2
    )
    assert (folder / 'curves.png').stat().st_size > 5000
    curves = size_curves(found, 'accuracy')
    assert (
        curves['snapshots'][0].tolist() == [1, 2, 3, 4, 5]
        and curves['snapshots'][1].shape == (2, 5)
        and curves['SWA'][1].shape == (2, 1)
    )
    assert curves['independent runs, a budget each'][0].tolist() == [1, 2] and curves[
        'independent runs, a budget each'
    ][1].shape == (1, 2)


def test_a_report_without_the_evaluation_says_which_command_makes_it(folder, tmp_path):
    records = [data for data in lines_of(folder) if data['kind'] == 'training']
    (tmp_path / 'runs.jsonl').write_text(''.join(json.dumps(data) + '\n' for data in records))
    with pytest.raises(ValueError, match='has no comparison of its ensembles: the same reproduce command makes it'):
        report(tmp_path)


def test_a_comparison_of_fewer_seeds_does_not_replace_one_of_more(folder, found, monkeypatch):
    monkeypatch.setattr('fastai_swa.experiments.jobs.evaluate', lambda *args: pytest.fail('compared again'))
    assert reproduce('small', 1, folder, threads=1, stream=io.StringIO()) == {}
    assert next(data for data in lines_of(folder) if data['kind'] == 'ensembles') == found


def test_the_report_is_of_the_seeds_that_were_compared(folder, tmp_path):
    records = lines_of(folder)
    more = next(data for data in records if data['kind'] == 'training') | {'seed': 7}
    (tmp_path / 'runs.jsonl').write_text(''.join(json.dumps(data) + '\n' for data in [*records, more]))
    text = report(tmp_path)
    assert '2 seeds (0, 1)' in text and 'seed 7 is not yet compared with the others' in text
    assert json.loads((tmp_path / 'report.json').read_text())['seeds'] == [0, 1]


def test_too_small_a_scale_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match='4 epochs are too few for 5 snapshots'):
        reproduce('ensembles-vgg16-cifar10', 1, tmp_path, 'digits', Settings(scale=0.02))
    assert not list(tmp_path.iterdir())


def test_a_comparison_interrupted_again_and_again_keeps_the_same_snapshots(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, 'small', SMALL)
    for n_before in (
        13,
        12,
        9,
        7,
        1,
        99,
    ):  # epochs until the next interruption, most of them in the parts with snapshots
        shown = []

        def show(seed, line, n_before=n_before, shown=shown):
            shown.append(line)
            if len(shown) == n_before:
                raise KeyboardInterrupt

        try:
            run_seed(SMALL, 0, tmp_path, threads=1, show=show)
        except KeyboardInterrupt:
            continue
        break
    for file in folder.rglob('seed-0*/*.pth'):
        a, b = torch.load(file), torch.load(tmp_path / file.relative_to(folder))
        assert all(torch.equal(v, b[k]) for k, v in a.items()), file.name
    assert (
        len(list(tmp_path.rglob('seed-0*/*.pth'))) == 5 + 1 + 4
    )  # of the cycles, of FGE, and of the weights that the SWA run averages


def test_two_comparisons_of_ensembles_are_not_compared_row_by_row(folder):
    from fastai_swa.experiments.report import compare

    with pytest.raises(ValueError, match='only folders of SGD and SWA at several budgets are compared'):
        compare(folder, folder)
