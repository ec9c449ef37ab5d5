"""CIFAR in memory: the loader, the augmentation against torchvision's, the sources and what is
wrong with them."""

import pickle
import random

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn
from torchvision.transforms import functional as TF

from fastai_swa import CheckpointCallback, SWACallback
from fastai_swa.vision import CIFAR_STATS, IMAGENET_STATS, cifar
from fastai_swa.vision.tensors import PadCropFlip, tensor_loaders

from .helpers import At, assert_same, fingerprint, raising


def images(n=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(n) % 10


def in_memory(n=50, n_valid=23, **kwargs):
    return tensor_loaders(images(n), images(n_valid, 1), list('abcdefghij'), CIFAR_STATS, **{'bs': 16, **kwargs})


# augmentation


@pytest.mark.parametrize('mode', ['constant', 'reflect'])
@pytest.mark.parametrize('pad', [4, 2])
def test_each_image_is_what_torchvision_makes_of_it_on_the_same_draws(mode, pad):
    x, tfm = images(40)[0], PadCropFlip(pad, mode, seed=3)
    top, left, flip = PadCropFlip(pad, mode, seed=3).draws(40)
    from fastai.torch_core import TensorImage

    got = tfm(TensorImage(x), split_idx=0)
    assert got.dtype == torch.uint8 and isinstance(got, TensorImage)
    for i in range(40):
        expected = TF.crop(TF.pad(x[i], [pad] * 4, padding_mode=mode), int(top[i]), int(left[i]), 32, 32)
        assert torch.equal(got[i].as_subclass(torch.Tensor), TF.hflip(expected) if flip[i] else expected)


def test_draws_are_independent_and_cover_all_crops_and_both_sides():
    top, left, flip = PadCropFlip(4, seed=0).draws(20_000)
    counts = torch.bincount(top * 9 + left, minlength=81)
    assert (
        counts.min() > 150 and (counts.float() - 20_000 / 81).square().sum() / (20_000 / 81) < 130
    )  # chi squared, 80 degrees of freedom: 0.03 %
    assert (
        abs(flip.float().mean() - 0.5) < 0.02
        and abs(torch.corrcoef(torch.stack([top.float(), left.float(), flip.float()]))[0, 1:]).max() < 0.03
    )


def test_validation_is_not_augmented_and_both_are_normalised_by_the_stats():
    for stats in (CIFAR_STATS, IMAGENET_STATS):
        dls = tensor_loaders(images(), images(23, 1), list('abcdefghij'), stats, bs=16)
        x, y = zip(*dls.valid)
        mean, std = (torch.tensor(s).view(3, 1, 1) for s in stats)
        assert torch.allclose(torch.cat(x).as_subclass(torch.Tensor), (images(23, 1)[0] / 255 - mean) / std, atol=1e-5)
        assert torch.equal(torch.cat(y).as_subclass(torch.Tensor), images(23, 1)[1])


# the loader


def test_each_training_image_comes_once_an_epoch_in_another_order_and_the_last_short_batch_is_kept():
    dls = in_memory(padding=None)
    epochs = [[b for b in dls.train] for _ in range(2)]
    expected = (images()[0] / 255 - torch.tensor(CIFAR_STATS[0]).view(3, 1, 1)) / torch.tensor(CIFAR_STATS[1]).view(
        3, 1, 1
    )
    orders = []
    for batches in epochs:
        assert [len(y) for _, y in batches] == [16, 16, 16, 2] and len(dls.train) == 4
        x = torch.cat([x for x, _ in batches]).as_subclass(torch.Tensor)
        order = [int((expected - image).abs().sum((1, 2, 3)).argmin()) for image in x]
        assert sorted(order) == list(range(50)) and torch.equal(
            torch.cat([y for _, y in batches]).as_subclass(torch.Tensor), images()[1][order]
        )
        orders.append(order)
    assert orders[0] != orders[1]


def test_it_is_a_fastai_loader():
    dls = in_memory()
    assert (
        isinstance(dls, DataLoaders)
        and isinstance(dls.train, DataLoader)
        and dls.c == 10
        and list(dls.vocab) == list('abcdefghij')
    )
    x, y = dls.one_batch()
    assert type(x).__name__ == 'TensorImage' and type(y).__name__ == 'TensorCategory' and x.dtype == torch.float32
    new = dls.train.new(shuffle=False, drop_last=True)
    assert len(new) == 3 and len(list(new)) == 3 and new.dataset is dls.train.dataset
    assert dls.valid.new(bs=5).one_batch()[0].shape == (5, 3, 32, 32)
    dls.show_batch(max_n=4)
    assert (
        not isinstance(dls.to('meta').train.dataset.images.device, str)
        and dls.train.dataset.images.device.type == 'meta'
    )


def test_fits_resumes_exports_and_shows_results(tmp_path):
    def start(seed, killer=()):
        set_seed(seed, reproducible=True)
        dls = in_memory(seed=1)
        for dl in dls.loaders:
            dl.rng = random.Random(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
        )
        learn, swa = Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path), SWACallback(1)
        learn.fit(3, cbs=[swa, CheckpointCallback(tmp_path / 'run.ckpt'), *killer])
        return learn, swa

    class Killed(BaseException):
        pass

    whole, swa = start(0)
    with pytest.raises(Killed):
        start(0, [At('after_batch', 2, raising(Killed()), batch=1, training=True)])
    resumed, again = start(5)
    assert_same(fingerprint(resumed) | {'cbs': 0}, fingerprint(whole) | {'cbs': 0})
    assert all(map(torch.equal, again.swa_model.state_dict().values(), swa.swa_model.state_dict().values()))
    with swa.averaged():
        whole.export('model.pkl')
    assert list(load_learner(tmp_path / 'model.pkl').dls.vocab) == list('abcdefghij')
    whole.show_results(max_n=4)


# the sources


def write_folder(path, n_classes=10, n=3, size=32, parts=('train', 'test')):
    for part in parts:
        for c in range(n_classes):
            (path / part / f'class{c:02d}').mkdir(parents=True)
            for i in range(n):
                Image.fromarray(np.full((size, size, 3), 10 * c + i, np.uint8)).save(
                    path / part / f'class{c:02d}' / f'{i}.png'
                )
    return path


def test_a_folder_of_images_is_read_in_the_order_of_its_names(tmp_path, monkeypatch):
    monkeypatch.setenv('CIFAR10_DIR', str(write_folder(tmp_path)))
    for dls in (cifar(10), cifar(10, tmp_path)):
        data = dls.train_ds
        assert data.images.shape == (30, 3, 32, 32) and data.images[:, 0, 0, 0].tolist() == [
            10 * c + i for c in range(10) for i in range(3)
        ]
        assert data.labels.tolist() == [c for c in range(10) for _ in range(3)] and dls.vocab[3] == 'class03'
    assert len(cifar(10, tmp_path, n_images=20).train_ds) == 20 and len(cifar(10, tmp_path, n_valid=10).valid_ds) == 10


def test_torchvisions_files_are_read(tmp_path, monkeypatch):
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (20, 3072)).astype(np.uint8)
    for i, name in enumerate([*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']):
        (folder / name).write_bytes(pickle.dumps({'data': pixels + i, 'labels': list(range(10)) * 2}))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': [f'name{i}' for i in range(10)]}))
    monkeypatch.setattr('torchvision.datasets.CIFAR10._check_integrity', lambda self: True)
    monkeypatch.setattr(
        'torchvision.datasets.CIFAR10._load_meta',
        lambda self: setattr(self, 'classes', [f'name{i}' for i in range(10)]),
    )
    dls = cifar(10, tmp_path)
    assert len(dls.train_ds) == 100 and len(dls.valid_ds) == 20 and dls.vocab[2] == 'name2'
    assert np.array_equal(dls.train_ds.images[:20].numpy(), pixels.reshape(20, 3, 32, 32)) and dls.train_ds.labels[
        :10
    ].tolist() == list(range(10))


def test_digits_stand_in_for_cifar():
    dls = cifar(10, 'digits', n_images=200)
    assert (
        len(dls.train_ds) == 200
        and dls.one_batch()[0].shape[1:] == (3, 32, 32)
        and torch.bincount(dls.train_ds.labels).tolist() == [20] * 10
    )


@pytest.mark.parametrize(
    'what, error, match',
    [
        (lambda p: cifar(10, p / 'nowhere'), FileNotFoundError, 'nowhere is no folder'),
        (lambda p: cifar(100, write_folder(p)), ValueError, 'has 10 class folders, CIFAR-100 has 100'),
        (lambda p: cifar(10, write_folder(p, parts=['train'])), FileNotFoundError, 'folders train and test'),
        (lambda p: cifar(7), ValueError, 'n_classes must be 10 or 100, not 7'),
        (lambda p: cifar(10, write_folder(p, size=28)), ValueError, 'has 28 x 28 pixels, expected 32 x 32'),
        (lambda p: cifar(10, write_folder(p), n_images=50), ValueError, 'n_images asks for 50'),
        (lambda p: cifar(10, write_folder(p), padding='zeros'), ValueError, "mode must be 'constant' or 'reflect'"),
    ],
)
def test_what_is_wrong_with_a_source_is_one_sentence(tmp_path, what, error, match):
    with pytest.raises(error, match=match) as e:
        what(tmp_path)
    assert '\n' not in str(e.value)


def test_a_broken_image_and_a_class_without_images_are_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / 'train' / 'class02' / '1.png').write_bytes(b'not an image')
    with pytest.raises(ValueError, match='class02/1.png cannot be read as an image'):
        cifar(10, tmp_path)
    for f in (tmp_path / 'test' / 'class05').iterdir():
        f.unlink()
    (tmp_path / 'train' / 'class02' / '1.png').unlink()
    with pytest.raises(ValueError, match="test has no images of the class 'class05'"):
        cifar(10, tmp_path)


def test_a_download_cut_short_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / 'cifar-10-python.tar.gz').write_bytes(b'half')

    def fail(*args, **kwargs):
        raise RuntimeError('File not found or corrupted.')

    monkeypatch.setattr('torchvision.datasets.cifar.download_and_extract_archive', fail)
    with pytest.raises(
        OSError, match='CIFAR-10 is not complete in .* and could not be downloaded there: File not found or corrupted.'
    ):
        cifar(10, tmp_path)


def test_a_loader_that_transforms_several_batches_at_once_gives_the_same_batches():
    plain, chunked = in_memory(seed=2), in_memory(seed=2, chunk=3)  # 4 batches: a whole chunk and a part of one
    for dls in plain, chunked:
        dls.train.rng = random.Random(0)
    for _ in range(2):
        a, b = list(plain.train), list(chunked.train)
        assert [len(y) for _, y in b] == [16, 16, 16, 2] and len(chunked.train) == 4
        for (x, y), (z, w) in zip(a, b, strict=True):
            assert type(x) is type(z) and type(y) is type(w) and torch.equal(x, z) and torch.equal(y, w)
    new = chunked.train.new(shuffle=False, drop_last=True)
    assert (
        new.chunk == 3
        and [len(y) for _, y in new] == [16] * 3
        and torch.equal(torch.cat([y for _, y in new]), images()[1][:48])
    )
    assert len(chunked.one_batch()[1]) == 16 and chunked.valid.chunk == 1


def test_images_of_a_chunk_each_have_draws_of_their_own():
    dls = in_memory(chunk=4, seed=5)
    dls.train.rng = random.Random(0)
    x = torch.cat([x for x, _ in dls.train]).as_subclass(torch.Tensor)
    plain = in_memory(padding=None)
    plain.train.rng = random.Random(0)
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in CIFAR_STATS)
    originals = torch.cat([x for x, _ in plain.train]).as_subclass(torch.Tensor) * std + mean
    top, left, flip = PadCropFlip(4, seed=5).draws(50)
    for i in range(50):
        expected = TF.crop(TF.pad(originals[i], [4] * 4), int(top[i]), int(left[i]), 32, 32)
        torch.testing.assert_close(x[i] * std + mean, TF.hflip(expected) if flip[i] else expected, rtol=0, atol=1e-5)


def test_images_are_on_fastais_own_device_if_none_is_given(monkeypatch):
    monkeypatch.setattr('fastai_swa.vision.data.default_device', lambda: torch.device('meta'))
    dls = cifar(10, 'digits', n_images=50)
    assert dls.train_ds.images.device.type == dls.valid_ds.labels.device.type == 'meta' and dls.device.type == 'meta'


def test_the_default_folder_is_made_and_an_empty_variable_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('CIFAR10_DIR', '')
    monkeypatch.setattr(
        'torchvision.datasets.CIFAR10.download', lambda self: (_ for _ in ()).throw(RuntimeError('no network'))
    )
    with pytest.raises(
        OSError, match='CIFAR-10 is not complete in .*/.fastai/data and could not be downloaded there: no network'
    ):
        cifar(10)


def test_training_and_test_images_are_cut_by_class(tmp_path):
    dls = cifar(10, 'digits', n_images=55, n_valid=31)
    assert len(dls.train_ds) == 55 and len(dls.valid_ds) == 31
    for ds, counts in (dls.train_ds, [6] * 5 + [5] * 5), (dls.valid_ds, [4] + [3] * 9):
        assert torch.bincount(ds.labels).tolist() == counts
    assert (
        len(cifar(10, 'digits', n_images=55).valid_ds) == 397 and len(cifar(10, 'digits', n_valid=20).train_ds) == 1400
    )
