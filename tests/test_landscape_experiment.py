"""The loss surface around what the runner has stored: what is measured on what, interrupted, and
reported."""

import io
import json
import shutil
from dataclasses import replace
from time import time

import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.metrics import error_rate

from fastai_swa import Curve, Surface, line, plane, rays
from fastai_swa.__main__ import main
from fastai_swa.experiments import RECIPES, Settings, report, reproduce
from fastai_swa.experiments.machine import TimeIsUp
from fastai_swa.experiments.measure_surfaces import measure_seed
from fastai_swa.experiments.recipe_learner import recipe_data, recipe_learner
from fastai_swa.experiments.recipes import LANDSCAPES, Landscape

from .test_run import TINY

IMAGES = Settings(images=200)
LONGER = replace(TINY, name='longer', budget=8, swa_start=5)  # 1.5 budgets are 12 epochs: 7 to average
SMALL = {
    kind: Landscape(
        f'{kind}-longer',
        kind,
        'longer',
        n_rays=2,
        n_distances=5,
        n_line=5,
        n_plane=3,
        n_curve=5,
        epochs=2,
        lr=0.05,
        level=0.5,
    )
    for kind in ('width', 'plane', 'curve')
}


@pytest.fixture(scope='module', autouse=True)
def registered():
    threads = torch.get_num_threads()
    RECIPES['longer'] = LONGER
    LANDSCAPES.update({r.name: r for r in SMALL.values()})
    yield
    del RECIPES['longer']
    for r in SMALL.values():
        del LANDSCAPES[r.name]
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def stored(registered, tmp_path_factory):
    "A folder with the solutions of two seeds, and all that is measured around them."
    folder = tmp_path_factory.mktemp('landscapes')
    assert reproduce('longer', 2, folder / 'longer', 'digits', IMAGES, threads=1, stream=io.StringIO()) == {}
    for kind in SMALL:
        assert go(kind, folder) == {}
    return folder


def go(kind, folder, out=None, settings=Settings(), seeds=1, **kwargs):
    return reproduce(
        f'{kind}-longer',
        seeds,
        out or folder / f'{kind}-longer',
        'digits',
        settings,
        threads=1,
        stream=io.StringIO(),
        **kwargs,
    )


def test_the_level_of_a_width_is_the_reports_alone(stored, tmp_path, monkeypatch):
    "Nothing is measured anew for another one, also where an older record still has one."
    folder = tmp_path / 'width'
    shutil.copytree(stored / 'width-longer', folder)
    file = folder / 'runs.jsonl'
    records = [json.loads(text) for text in file.read_text().splitlines()]
    assert all('level' not in record['landscape'] for record in records)
    for record in records:
        record['landscape']['level'] = 0.5
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    monkeypatch.setitem(LANDSCAPES, 'width-longer', replace(SMALL['width'], level=0.85))
    assert 'distance to 85 % test error' in report(folder)
    assert go('width', stored, folder, solutions=stored / 'longer') == {}


def measured(folder, seed=0):
    "What the file of a row holds of a seed."
    lines = [json.loads(line) for line in (folder / 'runs.jsonl').read_text().splitlines()]
    return next(data for data in lines if data['kind'] == 'landscape' and data['seed'] == seed)


def surface(folder, kind, what, seed=0):
    return Surface.from_dict(measured(folder / f'{kind}-longer', seed)['surfaces'][what])


def put(folder, *lines):
    (folder / 'runs.jsonl').write_text(''.join(json.dumps(data) + '\n' for data in lines))


def plain_learner(settings=IMAGES):
    learn = recipe_learner(LONGER, 0, settings, recipe_data(LONGER, 'digits', settings)[0])
    learn.metrics = [error_rate]
    return learn


def same(a, b):
    assert a.about['solutions'] == b.about['solutions'] and a.values.keys() == b.values.keys()
    for k in a.values:
        np.testing.assert_array_equal(a.values[k], b.values[k])


def test_width_is_of_sgds_and_swas_solution_to_twice_the_norm(stored):
    weights = {'SGD': stored / 'longer' / 'seed-0-sgd-1b.pth', 'SWA': stored / 'longer' / 'seed-0-swa-average.pth'}
    found = surface(stored, 'width', 'rays')
    assert found.names == ['SGD', 'SWA'] and found.distances[-1] == pytest.approx(2 * found.norms['SGD'], rel=1e-5)
    same(found, rays(plain_learner(), weights, distances=found.distances[-1] * np.arange(1, 6) / 5, n_rays=2))
    same(surface(stored, 'width', 'line'), line(plain_learner(), weights, ts=5))


def test_planes_go_through_the_path_of_the_swa_run_and_through_both_solutions(stored):
    folder = stored / 'longer'
    path = sorted((folder / 'seed-0-swa').glob('*.pth'))
    assert len(path) == 7
    found = surface(stored, 'plane', 'trajectory')
    assert (
        found.names == ['epoch 6', 'epoch 9', 'epoch 12']
        and list(found.marks) == ['SWA']
        and len(found.trajectory) == 7
    )
    mine = plane(
        plain_learner(),
        dict(zip(found.names, (path[0], path[3], path[6]))),
        3,
        marks={'SWA': folder / 'seed-0-swa-average.pth'},
        trajectory=path,
    )
    same(found, mine)
    assert found.marks == mine.marks and np.array_equal(found.trajectory, mine.trajectory)
    same(
        surface(stored, 'plane', 'solutions'),
        plane(
            plain_learner(),
            {'SGD': folder / 'seed-0-sgd-1b.pth', 'SWA': folder / 'seed-0-swa-average.pth', 'epoch 6': path[0]},
            3,
        ),
    )


def cut_index(folder, which):
    "The index of the snapshots in `folder` names some of them alone."
    index = folder / 'index.json'
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {k: content[k][which] for k in ('epochs', 'files', 'sha256')}))


def test_the_snapshots_end_with_the_runs_own_last_weights_also_where_they_skip_it(stored, tmp_path):
    from fastai_swa.experiments.measure_surfaces import _trajectory

    shutil.copytree(stored / 'longer', tmp_path / 'longer')
    cut_index(tmp_path / 'longer' / 'seed-0-swa', slice(-2))
    path = _trajectory(tmp_path / 'longer', 0)
    assert (
        list(path) == ['epoch 6', 'epoch 7', 'epoch 8', 'epoch 9', 'epoch 10', 'epoch 12']
        and path['epoch 12'].name == 'seed-0-swa.pth'
    )


def test_curves_are_between_two_seeds_and_measured_along_and_in_their_planes(stored):
    ends = {f'seed {s}': stored / 'longer' / f'seed-{s}-sgd-1b.pth' for s in (0, 1)}
    learn = plain_learner()
    for kind in ('chain', 'bezier'):
        mine = Curve(learn, ends, kind=kind)
        with learn.no_logging():
            mine.fit(2, 0.05, wd=5e-4)
        stored_one = Curve.load(stored / 'curve-longer' / f'seed-0.{kind}.pth', learn)
        assert all(torch.equal(v, stored_one.bends[0][k]) for k, v in mine.bends[0].items() if 'running' not in k)
        same(surface(stored, 'curve', f'{kind}-path'), mine.evaluate(5))
        panel = surface(stored, 'curve', f'{kind}-plane')
        assert (
            panel.names == ['seed 0', 'seed 1', 'bend']
            and len(panel.trajectory) == 21
            and panel.trajectory[:, 2].max() < 1e-3 * panel.solutions['seed 1'][0]
        )
    same(surface(stored, 'curve', 'line-path'), mine.straight(5))


@pytest.mark.parametrize('kind', SMALL)
def test_a_measurement_that_is_stopped_again_and_again_ends_as_a_whole_one(stored, tmp_path, kind, monkeypatch):
    from fastai_swa.experiments import measure_surfaces

    steps, step = [0], measure_surfaces._Watch.step

    def stops(self, times):
        steps[0] += 1
        if steps[0] % 8 == 0:
            raise TimeIsUp('stopped')
        step(self, times)

    monkeypatch.setattr(measure_surfaces._Watch, 'step', stops)
    n = 0
    while go(kind, stored, tmp_path, solutions=stored / 'longer'):
        n += 1
    assert n > 1
    note = measured(tmp_path)
    assert note['finished'] and len(note['sessions']) == n + 1 and all('seconds' in s for s in note['sessions'])
    n_points = sum(len(content['points']) for content in note['surfaces'].values())
    n_epochs = 2 * SMALL[kind].epochs * (kind == 'curve')
    assert (
        n_points + n_epochs <= sum(s['steps'] for s in note['sessions']) <= n_points + n_epochs * (n + 1)
    )  # an epoch may be begun twice
    for what, content in note['surfaces'].items():
        same(surface(stored, kind, what), Surface.from_dict(content))
    assert {f.name for f in tmp_path.iterdir()} - {'seed-0.bezier.pth', 'seed-0.chain.pth'} == {
        'runs.jsonl'
    }  # all in one file


def test_a_curves_checkpoint_knows_the_watch_by_the_place_that_it_had_at_first(stored, tmp_path):
    "So that a curve begun by an earlier version goes on."

    def stop(seed, line):
        if 'epoch 1 of' in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_seed(SMALL['curve'], 0, tmp_path, Settings(), 'digits', 1, show=stop, solutions=stored / 'longer')
    state = torch.load(tmp_path / 'seed-0.chain.ckpt', weights_only=True)['state']
    assert 'fastai_swa.experiments.landscapes._EpochWatch.0' in state['callbacks']


def test_a_complete_measurement_is_not_repeated(stored, monkeypatch):
    monkeypatch.setattr(Learner, '_do_epoch_validate', lambda *args, **kwargs: pytest.fail('measured again'))
    before = (stored / 'width-longer' / 'runs.jsonl').read_bytes()
    for kind in SMALL:
        assert go(kind, stored) == {}
    assert (stored / 'width-longer' / 'runs.jsonl').read_bytes() == before and not list(
        (stored / 'width-longer').glob('seed-0*')
    )


def test_no_time_is_no_point_more(stored, tmp_path):
    with pytest.raises(TimeIsUp):
        measure_seed(SMALL['width'], 0, tmp_path, IMAGES, 'digits', 1, time() - 1, solutions=stored / 'longer')
    assert go('width', stored, tmp_path / 'out', solutions=stored / 'longer', until=time() - 1) == {
        0: 'stopped in time; the same command goes on from there'
    }


@pytest.mark.parametrize(
    'kind, seeds, said',
    [
        ('width', 3, 'seed 2 is missing in .*: reproduce longer with 3 seeds makes it, or give --solutions'),
        ('curve', 2, 'seed 2 is missing in .*: reproduce longer with 3 seeds makes it'),
    ],
)
def test_solutions_that_are_not_there_are_one_sentence_before_anything_is_measured(stored, tmp_path, kind, seeds, said):
    with pytest.raises(ValueError, match=said):
        go(kind, stored, tmp_path / 'out', seeds=seeds, solutions=stored / 'longer')
    assert not (tmp_path / 'out').exists()


def test_solutions_that_cannot_be_used_are_one_sentence(stored, tmp_path):
    def at(change, kind='width', **kwargs):
        shutil.rmtree(tmp_path / 'longer', ignore_errors=True)
        shutil.copytree(stored / 'longer', tmp_path / 'longer')
        change(tmp_path / 'longer')
        try:
            return go(kind, tmp_path, **kwargs).get(0)
        except ValueError as e:
            return str(e)
        finally:
            shutil.rmtree(tmp_path / f'{kind}-longer', ignore_errors=True)

    def record(**content):
        return lambda folder: put(
            folder, *(json.loads(line) | content for line in (folder / 'runs.jsonl').read_text().splitlines())
        )

    assert 'seed 0 in ' in at(record(finished=None)) and 'is not complete: reproduce longer goes on with it' in at(
        record(finished=None)
    )
    assert 'is of the recipe other, not longer' in at(record(recipe='other'))
    assert 'seed-0-swa-average.pth is missing' in at(lambda folder: (folder / 'seed-0-swa-average.pth').unlink())
    assert 'is damaged' in at(lambda folder: (folder / 'seed-0-sgd-1b.pth').write_bytes(b'nothing'))
    assert 'seed-0-swa is missing: the run is of an older version' in at(
        lambda folder: shutil.rmtree(folder / 'seed-0-swa'), 'plane'
    )
    assert 'was trained on 200 + 397 images of CIFAR-10 (SHA-256' in at(
        record(images={'kind': 'CIFAR-10', 'train': 200, 'valid': 397, 'sha256': 'x'})
    )
    assert 'and these are 300 + 397 images of digits' in at(lambda folder: None, settings=Settings(images=300))
    assert at(lambda folder: None, settings=Settings(images=100)) is None  # fewer will do


def test_what_was_measured_otherwise_is_refused(stored, tmp_path):
    shutil.copytree(stored / 'width-longer', tmp_path / 'out')
    missing = go('width', stored, tmp_path / 'out', Settings(scale=0.8), solutions=stored / 'longer')
    assert 'seed 0 was measured with n_distances=5, not 4: give the same, or another folder' in missing[0]
    for damaged, said in (
        ('{}', 'runs.jsonl is damaged in line 1'),
        ('{"kind": "landscape", "seed": 0}', 'seed 0 is no measurement'),
    ):
        (tmp_path / 'out' / 'runs.jsonl').write_text(damaged)
        assert said in go('width', stored, tmp_path / 'out', solutions=stored / 'longer')[0]
    (tmp_path / 'out' / 'runs.jsonl').unlink()
    (tmp_path / 'out' / 'seed-0.landscape.json').write_text('{}')
    assert (
        'is damaged, or no note on a measurement'
        in go('width', stored, tmp_path / 'out', solutions=stored / 'longer')[0]
    )


def test_solutions_are_no_argument_of_a_recipe_that_trains(tmp_path):
    with pytest.raises(ValueError, match='solutions are of width-, plane- and curve- only, and longer trains its own'):
        reproduce('longer', 1, tmp_path, 'digits', IMAGES, solutions=tmp_path)


def test_a_scaled_landscape_keeps_the_least_that_its_figures_need():
    for scale in (0.01, 0.5, 1):
        r = LANDSCAPES['width-vgg16-cifar10'].scaled(scale)
        assert (
            r.n_rays >= 2
            and r.n_distances >= 4
            and r.n_line >= 5
            and r.n_plane >= 3
            and r.n_curve >= 5
            and r.epochs >= 1
        )
    assert LANDSCAPES['width-vgg16-cifar10'].scaled(1) == LANDSCAPES['width-vgg16-cifar10']
    assert (
        LANDSCAPES['curve-vgg16-cifar10'].epochs,
        LANDSCAPES['curve-vgg16-cifar10'].lr,
        LANDSCAPES['curve-preresnet110-cifar10'].epochs,
        LANDSCAPES['curve-preresnet110-cifar10'].lr,
    ) == (600, 0.015, 200, 0.03)  # Garipov et al. 2018
    assert all(r.base in RECIPES for r in LANDSCAPES.values())


# the report


def cells(text, name):
    return next([c.strip() for c in row.split('|')[1:-1]] for row in text.splitlines() if row.startswith(f'| {name} |'))


def test_the_report_on_widths_is_of_the_rays(stored):
    text = report(stored / 'width-longer')
    found = surface(stored, 'width', 'rays')
    widths = found.widths('valid_error_rate', 0.5)
    for name, w in widths.items():
        row = cells(text, name)
        assert (
            row[1] == f'{found.norms[name]:.2f}'
            and row[2] == f'{100 * found.profiles("valid_error_rate")[name][0, 0]:.2f}'
        )
        assert (
            row[4] == ('not reached on all' if w.n_crossed < 2 else f'{w.distance:.2f} ({w.std:.2f})')
            and row[6] == f'{w.n_crossed} of 2'
        )
    assert (
        '200 training and 397 test images' in text
        and '1 seed of solutions of longer (0)' in text
        and (stored / 'width-longer' / 'report.md').read_text() == text
    )
    assert (stored / 'width-longer' / 'width.png').stat().st_size > 5000 and (
        stored / 'width-longer' / 'line.png'
    ).stat().st_size > 5000


def test_the_report_on_planes_says_where_everything_lies(stored):
    text, found = report(stored / 'plane-longer'), surface(stored, 'plane', 'solutions')
    assert cells(text, 'SGD') == ['SGD', '0.00', '0.00', '0.00']
    x, y = found.points[found.column('train_loss', wd=5e-4).argmin()]
    rows = [row for row in text.splitlines() if row.startswith('| least training loss + decay on the grid |')]
    assert rows[-1] == f'| least training loss + decay on the grid | {x:.2f} | {y:.2f} | 0.00 |'
    assert all((stored / 'plane-longer' / f'{name}.png').stat().st_size > 5000 for name in ('trajectory', 'solutions'))


def test_the_report_on_curves_compares_the_three_ways(stored):
    text = report(stored / 'curve-longer')
    for name, what in (
        ('straight line', 'line-path'),
        ('polygonal chain', 'chain-path'),
        ('Bezier curve', 'bezier-path'),
    ):
        p = surface(stored, 'curve', what)
        assert cells(text, name)[1:] == [
            f'{p.length:.2f}',
            *(
                f'{100 * v:.2f}'
                for v in (p.min('valid_error_rate'), p.max('valid_error_rate'), p.mean('valid_error_rate'))
            ),
            f'{p.max("train_loss"):.4f}',
            f'{p.mean("train_loss"):.4f}',
        ]
    assert '1 pair of solutions of longer (0+1)' in text and all(
        (stored / 'curve-longer' / f'{name}.png').stat().st_size > 5000 for name in ('paths', 'panels')
    )


def test_two_folders_are_reported_one_after_the_other(stored, capsys):
    with pytest.raises(SystemExit) as e:
        main(['report', str(stored / 'width-longer'), str(stored / 'longer')])
    said = capsys.readouterr().out
    assert not e.value.code and '# width-longer' in said and '# longer' in said and 'Paired differences of' not in said


def test_a_path_too_short_for_a_plane_is_said_before_anything_is_written(stored, tmp_path):
    shutil.copytree(stored / 'longer', tmp_path / 'longer')
    cut_index(tmp_path / 'longer' / 'seed-0-swa', slice(1))
    with pytest.raises(
        ValueError, match='has averaged 2 weights only, and a plane needs 3: reproduce longer with a greater scale'
    ):
        go('plane', tmp_path)
    assert not (tmp_path / 'plane-longer').exists()


def test_several_seeds_are_compared_seed_by_seed(stored, tmp_path):
    shutil.copytree(stored / 'width-longer', tmp_path / 'width-longer')
    assert go('width', stored, tmp_path / 'width-longer', seeds=2, solutions=stored / 'longer') == {}
    text = report(tmp_path / 'width-longer')
    assert (
        '2 seeds of solutions of longer (0, 1)' in text and '+-' in cells(text, 'SGD')[1] and 'over the seeds' in text
    )
    other = surface(tmp_path, 'width', 'rays', seed=1)
    assert not np.array_equal(other.values['valid_loss'], surface(stored, 'width', 'rays').values['valid_loss'])


def test_a_report_on_nothing_complete_or_on_a_mixture_is_one_sentence(stored, tmp_path):
    (tmp_path / 'it').mkdir()
    content = measured(stored / 'width-longer')
    put(tmp_path / 'it', content, content | {'seed': 1, 'images': {'train': 1}})
    with pytest.raises(ValueError, match='mixes measurements: seed 1 has images'):
        report(tmp_path / 'it')
    (tmp_path / 'it' / 'runs.jsonl').unlink()
    (tmp_path / 'it' / 'seed-0.landscape.json').write_text(json.dumps(content | {'finished': None}))
    with pytest.raises(ValueError, match='has no complete seed, and 1 begun'):
        report(tmp_path / 'it')


def test_the_command_line_measures_and_reports(stored, capsys, tmp_path):
    def run(*argv):
        with pytest.raises(SystemExit) as e:
            main(list(argv))
        return e.value.code, capsys.readouterr()

    code, said = run(
        'reproduce',
        'width-longer',
        '--data',
        'digits',
        '--threads',
        '1',
        '--out',
        str(tmp_path / 'out'),
        '--solutions',
        str(stored / 'longer'),
    )
    assert code == 0 and 'seed 0  complete' in said.out
    assert run('report', str(tmp_path / 'out'))[0] in (0, None) and (tmp_path / 'out' / 'report.md').exists()
    code, said = run('reproduce', 'width-longer', '--data', 'digits', '--out', str(tmp_path / 'elsewhere' / 'out'))
    assert code == 2 and 'seed 0 is missing in' in said.err and 'reproduce longer with 1 seed makes it' in said.err
