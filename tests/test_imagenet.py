"""Tails from trained weights on a folder in ImageNet's layout: its data, its runs, its report."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.transforms import v2

import fastai_swa.experiments.train as train_module
from fastai_swa import __main__
from fastai_swa.experiments import RECIPES, Settings, report, reproduce
from fastai_swa.experiments.imagenet import ImageNet
from fastai_swa.experiments.plan import parts, runs
from fastai_swa.experiments.recipe_learner import recipe_data, recipe_learner
from fastai_swa.experiments.report import is_of_budgets
from fastai_swa.experiments.train import run_seed
from fastai_swa.vision import IMAGENET_STATS

from .reference import twins

ARCH = 'shufflenet_v2_x0_5'  # the smallest of torchvision's with batch norm
CLASSES = 'n01440764', 'n01443537', 'n01484850'


def write_images(folder, n, sizes=((48, 40), (40, 56))):
    "`n` noisy images of each class, of these widths and heights in turn; each class has a colour."
    rng = np.random.RandomState(0)
    for c, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            width, height = sizes[i % len(sizes)]
            pixels = rng.randint(0, 120, (height, width, 3))
            pixels[..., c] += 100
            Image.fromarray(pixels.astype('uint8')).save(folder / name / f'{name}_{i}.JPEG')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "In ImageNet's layout, with trained weights that stand in for torchvision's."
    path = tmp_path_factory.mktemp('imagenet')
    write_images(path / 'train', 8)
    write_images(path / 'val', 4)
    torch.manual_seed(0)
    torch.save(get_model(ARCH, weights=None, num_classes=3).state_dict(), path / f'{ARCH}.pth')
    return path


TASK = ImageNet(ARCH, size=32, n_workers=0)
RECIPE = replace(RECIPES['imagenet-tail'], name='mine', task=TASK, budget=4, bs=3)


def go(monkeypatch, folder, out, seeds=1):
    monkeypatch.setitem(RECIPES, 'mine', RECIPE)
    assert reproduce('mine', seeds, out, folder, threads=1, stream=io.StringIO()) == {}
    return [json.loads(line) for line in (out / 'runs.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as monkeypatch:
        records = go(monkeypatch, folder, out, seeds=2)
    return SimpleNamespace(out=out, records=records)


# the recipes


@pytest.mark.parametrize(
    'name, arch, published, n_parameters',
    [
        ('imagenet-tail', 'resnet50', (76.15, 76.97), 25_557_032),
        ('imagenet-tail-resnet152', 'resnet152', (78.31, 78.94), 60_192_808),
        ('imagenet-tail-densenet161', 'densenet161', (77.65, 78.44), 28_681_000),
    ],
)
def test_each_network_has_its_published_numbers_the_control_and_what_was_never_published(
    name, arch, published, n_parameters
):
    recipe = RECIPES[name]
    weights = get_model_weights(recipe.task.arch)[recipe.task.weights]
    assert recipe.task == ImageNet(arch) and weights.meta['num_params'] == n_parameters
    control = {'fine-tuning at 1e-4': (76.78, None)} if arch == 'resnet50' else {}
    before, after = published
    expected = {'pretrained weights': (before, None), 'SWA, cyclic rate': (after, None)}
    assert recipe.published == expected | control
    for said in ('never published', 'from memory', '76.78', 'timgaripov/swa#19', 'wjmaddox/swa_gaussian#17'):
        assert said in recipe.note


def test_the_tails_are_plain_fine_tuning_a_cyclic_rate_and_a_constant_one():
    recipe = RECIPES['imagenet-tail']
    assert (recipe.bs, recipe.wd, recipe.opt, recipe.nesterov) == (256, 1e-4, 'SGD', False)
    control, cyclic, constant = runs(recipe)
    assert control.lrs == (1e-4,) * 10 and control.swa_start == 9 and not control.keeps_average
    assert constant.lrs == (1e-3,) * 10 and (constant.swa_start, constant.n_averaged) == (0, 4)
    assert (cyclic.swa_start, cyclic.n_averaged) == (0, 1)
    for epoch in (0, 1, 9):
        for step in (0, 1, 2500, 5004):
            t = (step + 1) / 5005
            assert cyclic.lr(epoch, step, 5005) == pytest.approx((1 - t) * 1e-3 + t * 1e-5, rel=1e-9)
    assert [(p.begin, p.end, p.parent) for p in parts(runs(recipe))] == [(0, 10, None)] * 3


# the data


def test_images_are_taken_by_class_and_name_and_said_to_be_what_they_are(folder, tmp_path):
    (train, valid, vocab, file), about = TASK.load(folder)
    assert vocab == sorted(CLASSES) and file == folder / f'{ARCH}.pth'
    assert [f.name for f in train] == [f'{c}_{i}.JPEG' for c in CLASSES for i in range(8)]
    assert (about['train'], about['valid'], about['kind']) == (24, 12, "images in ImageNet's layout")
    assert about['weights'].startswith(f'{ARCH}.pth, SHA-256 ')
    (few, _, _, _), about_few = TASK.load(folder, 5, 3)
    assert [f.name for f in few] == [f'{CLASSES[c]}_{i}.JPEG' for c, n in enumerate((2, 2, 1)) for i in range(n)]
    assert about_few['sha256'] != about['sha256']
    moved = tmp_path / 'elsewhere'
    moved.mkdir()
    for name in ('train', 'val', f'{ARCH}.pth'):
        (moved / name).symlink_to(folder / name)
    assert TASK.load(moved)[1] == about


def test_validation_sees_the_centre_as_torchvision_cuts_it_and_training_random_crops(folder):
    data, _ = TASK.load(folder)
    dls = TASK.loaders(data, 5, seed=0)
    batches = list(dls.valid)
    assert len(dls.train) == 5 and sum(len(y) for _, y in batches) == 12  # the last short batch is kept
    images = torch.cat([x for x, _ in batches]).as_subclass(torch.Tensor)
    labels = torch.cat([y for _, y in batches]).as_subclass(torch.Tensor)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    crop = v2.Compose([v2.Resize(36), v2.CenterCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    twin = torch.stack([v2.functional.normalize(crop(Image.open(f)), *IMAGENET_STATS) for f in data[1]])
    assert images.shape == twin.shape == (12, 3, 32, 32)
    assert (images - twin).abs().mean() < 0.5 * (images - images.flip(3)).abs().mean()  # not the interpolation's detail
    torch.testing.assert_close(images.mean((2, 3)), twin.mean((2, 3)), rtol=0.05, atol=0.05)
    again = torch.cat([x for x, _ in dls.valid])
    assert torch.equal(images, again.as_subclass(torch.Tensor))
    one, two = [next(iter(dls.train))[0] for _ in range(2)]
    assert one.shape == (5, 3, 32, 32) and not torch.equal(one, two)


def test_the_network_begins_with_the_weights_in_the_folder(folder):
    data, _ = recipe_data(RECIPE, folder, Settings())
    learn = recipe_learner(RECIPE, 3, Settings(), data)
    expected = torch.load(folder / f'{ARCH}.pth')
    assert all(torch.equal(t, expected[k]) for k, t in learn.model.state_dict().items())
    conv = next(m for m in learn.model.modules() if isinstance(m, nn.Conv2d))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    group = learn.opt.opt.param_groups[0]
    assert isinstance(learn.opt.opt, torch.optim.SGD)
    assert (group['momentum'], group['weight_decay'], group['nesterov']) == (0.9, 1e-4, False)
    assert sum(len(g['params']) for g in learn.opt.opt.param_groups) == len(list(learn.model.parameters()))


def test_what_cannot_be_used_is_one_sentence(folder, tmp_path, capsys):
    def said(path, task=TASK, **numbers):
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            task.load(path, **numbers)
        return str(e.value)

    assert 'train/<class>/*' in said(tmp_path)
    assert 'resnet50.pth' in said(folder, ImageNet('resnet50')) and '1000' in said(folder, ImageNet('resnet50'))
    assert 'too few images for 40' in said(folder, n_train=40)
    write_images(tmp_path / 'train', 1)
    (tmp_path / 'val' / 'other').mkdir(parents=True)
    assert 'other classes' in said(tmp_path)
    with pytest.raises(SystemExit) as e:
        __main__.main(['reproduce', 'imagenet-tail', '--data', str(folder), '--out', str(tmp_path / 'out')])
    assert e.value.code == 2 and '3 class folders' in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / 'out').exists()


# its runs


def test_each_run_goes_on_from_the_trained_weights_and_its_average_is_the_mean_of_its_points(
    folder, tmp_path, monkeypatch
):
    points = {}

    class Keep(Callback):
        order = -4  # before the average folds

        def __init__(self, run, every):
            self.run = run
            self.every = every

        def after_step(self):
            self.n = getattr(self, 'n', 0) + 1
            if self.n % self.every == 0:
                weights = [p.detach().clone() for p in self.model.parameters()]
                points.setdefault(self.run, []).append(weights)

    average_callbacks = train_module._average_callbacks

    def with_watch(part, n_steps):
        run = part.runs[0]
        every = n_steps if run.n_averaged in (0, 1) else n_steps // run.n_averaged
        return [*average_callbacks(part, n_steps), Keep(run.name, every)]

    monkeypatch.setattr(train_module, '_average_callbacks', with_watch)
    data = run_seed(RECIPE, 0, tmp_path, Settings(), folder, 1)
    assert data['baseline']['name'] == 'pretrained weights'
    for run, n in (('SWA, cyclic rate', 4), ('SWA, constant rate', 16)):  # 8 steps an epoch
        assert len(points[run]) == n
        found = torch.load(tmp_path / f'seed-0-{run.lower().replace(", ", "-").replace(" ", "-")}-average.pth')
        names = [name for name, _ in get_model(ARCH, weights=None, num_classes=3).named_parameters()]
        for name, mean in zip(names, twins.mean(points[run])):
            torch.testing.assert_close(found[name].double(), mean, rtol=1e-5, atol=1e-6)


def test_what_the_record_says_is_what_the_stored_weights_predict(folder, trained):
    data, _ = recipe_data(RECIPE, folder, Settings())
    learn = recipe_learner(RECIPE, 0, Settings(), data)
    record = trained.records[0]
    with learn.no_logging():
        loss, accuracy = learn.validate()
    assert record['baseline'] == {'name': 'pretrained weights', 'metric': accuracy, 'loss': loss}
    for part in record['parts']:
        (run,) = part['runs']
        file = f'seed-0-{run.lower().replace(", ", "-").replace(" ", "-")}'
        ends = {'': file} if run.startswith('fine') else {'': file, 'swa_': f'{file}-average'}
        for prefix, name in ends.items():
            learn.model.load_state_dict(torch.load(trained.out / f'{name}.pth'))
            with learn.no_logging():
                loss, accuracy = learn.validate()
            assert part['epochs'][-1][f'{prefix}accuracy'] == pytest.approx(accuracy)
            assert part['epochs'][-1][f'{prefix}valid_loss'] == pytest.approx(loss, rel=1e-4)


def test_a_seed_interrupted_again_and_again_ends_bitwise_as_the_whole_one(folder, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, '_SECONDS', 0)

    class Stop(BaseException):
        pass

    for n in range(99):
        shown = []

        def show(seed, line, shown=shown):
            shown.append(line)
            if len(shown) == 3:
                raise Stop

        try:
            found = run_seed(RECIPE, 0, tmp_path, Settings(), folder, 1, show=show)
        except Stop:
            continue
        break
    assert n > 2
    for part, whole in zip(found['parts'], trained.records[0]['parts']):
        rows, expected = [[{k: v for k, v in r.items() if k != 'seconds'} for r in p['epochs']] for p in (part, whole)]
        assert rows == expected
    files = sorted(f.name for f in tmp_path.glob('seed-0-*.pth'))
    assert len(files) == 5
    for name in files:
        x, y = [torch.load(path / name) for path in (tmp_path, trained.out)]
        assert all(torch.equal(x[k], y[k]) for k in x), name


def test_a_seed_in_bf16_has_the_trained_weights_validated_in_bf16(folder, tmp_path, trained):
    settings = Settings(precision='bf16', images=9, test_images=6)
    data = run_seed(replace(RECIPE, tails=RECIPE.tails[:1], budget=4), 0, tmp_path, settings, folder, 1)
    assert data['baseline']['loss'] == pytest.approx(trained.records[0]['baseline']['loss'], rel=0.05)
    assert data['finished'] and data['parts'][0]['epochs'][-1]['valid_loss'] is not None


# its report


def test_the_report_compares_with_the_control_and_with_what_there_was(trained, monkeypatch):
    monkeypatch.setitem(RECIPES, 'mine', RECIPE)
    text = report(trained.out)
    head = text.split('\n\n')[1]
    assert RECIPE.note in head and f'weights at the beginning: {ARCH}.pth' in head
    assert 'the published row is not reproduced' in head
    lines = [[c.strip() for c in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('| ')]
    rows = {}
    for name, *cells in lines:
        rows.setdefault(name, cells)
    for name, published in (
        ('fine-tuning at 1e-4', '23.22'),
        ('fine-tuning at 1e-4, batch norm refreshed', ''),
        ('SWA, cyclic rate, single weights', ''),
        ('SWA, cyclic rate', '23.03'),
        ('SWA, constant rate', ''),
        ('pretrained weights', '23.85'),
    ):
        assert rows[name][3] == published, name
    before = [100 * (1 - r['baseline']['metric']) for r in trained.records]
    after = []
    for r in trained.records:
        part = next(p for p in r['parts'] if p['runs'] == ['SWA, cyclic rate'])
        after.append(100 * (1 - part['epochs'][-1]['swa_accuracy']))
    found = json.loads((trained.out / 'report.json').read_text())
    assert found['rows']['pretrained weights']['error']['mean'] == pytest.approx(np.mean(before))
    gain = found['differences']['SWA, cyclic rate - pretrained weights']['error']['mean']
    assert gain == pytest.approx(np.mean(np.array(after) - before))
    for name in ('SWA, cyclic rate', 'SWA, constant rate'):
        assert {f'{name} - fine-tuning at 1e-4', f'{name} - {name}, single weights'} <= found['differences'].keys()
    assert not is_of_budgets(trained.out) and (trained.out / 'curves.png').exists()
