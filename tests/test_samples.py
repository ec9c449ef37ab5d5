"""Samples are known again by what data sets are made from, and others are not taken for them."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import Datasets
from fastai.tabular.core import Categorify, FillMissing, Normalize, TabularPandas
from fastai.tabular.data import TabularDataLoaders  # noqa: F401  (dataloaders of TabularPandas)
from fastai.torch_basics import Transform
from torch.utils.data import Dataset, Subset, TensorDataset

from fastai_swa.samples import Samples, in_common


def common(a, b):
    return in_common(Samples(a), Samples(b))


def numbers(seed, n=60, inputs=None):
    """`Datasets` whose items are numbers, of a source of their own for each `seed`; the transforms
    are new objects each time."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g) if inputs is None else inputs
    y = torch.randn(n, generator=g)

    def parts(train, valid):
        return Datasets(range(n), [[lambda i: x[i]], [lambda i: y[i]]], splits=[list(train), list(valid)])

    return parts


def test_numbers_of_one_source_are_its_samples_in_any_fold():
    parts = numbers(0)
    first, second = parts(range(40), range(40, 60)), parts(range(20, 60), range(20))
    assert common(first.valid, first.train) == common(second.valid, second.train) == []
    assert common(first.valid, second.train) == list(range(20))
    assert common(first.train, second.valid) == list(range(20))


@pytest.mark.parametrize('inputs', [None, torch.arange(60.0)[:, None]], ids=['of their own', 'the numbers themselves'])
def test_equal_numbers_of_other_sources_are_other_samples(inputs):
    a, b = numbers(0, inputs=inputs)(range(40), range(40, 60)), numbers(1, inputs=inputs)(range(40), range(40, 60))
    assert common(a.valid, b.valid) == common(a.train, b.train) == []


class Noisy(Transform):
    "Draws from random generators of several kinds, and counts what it is asked for."

    def __init__(self):
        self.own, self.n_calls = random.Random(0), 0

    def encodes(self, i: int):
        self.n_calls += 1
        return i + 0 * (self.own.random() + float(torch.rand(1)) + np.random.rand())


def test_looking_at_samples_leaves_random_generators_and_data_sets_as_they_were():
    noisy = Noisy()
    a, b = (Datasets(range(30), [[noisy]]) for _ in range(2))

    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), noisy.own.getstate(), noisy.n_calls

    before = state()
    assert len(common(a, b)) == 30
    assert state() == before


def test_samples_that_cannot_be_loaded_are_not_known():
    def broken(i):
        raise OSError('gone')

    a, b = (Datasets(range(30), [[broken]], do_setup=False) for _ in range(2))
    assert common(a, b) == []


class Held(Dataset):
    "As torchvision's: all samples in one array."

    def __init__(self, x, y):
        self.data, self.targets = x.numpy(), y.tolist()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return torch.as_tensor(self.data[i]), self.targets[i]


@pytest.mark.parametrize(
    'make',
    [
        TensorDataset,
        lambda x, y: list(zip(x, y)),
        lambda x, y: list(zip(x.numpy(), y.numpy())),
        lambda x, y: [(x[i], y[i]) for i in range(len(x))],
        Held,
    ],
    ids='TensorDataset tensors arrays rows Held'.split(),
)
def test_copies_of_tensors_are_known_by_their_values_and_subsets_by_their_places(make):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, 4, 4, generator=g), torch.randint(2, (60,), generator=g)
    order = torch.randperm(60, generator=g)
    a, b, c = order[:20], order[20:50], order[10:30]
    assert common(make(x[a], y[a]), make(x[b], y[b])) == []
    assert common(make(x[c], y[c]), make(x[a], y[a])) == list(range(10))
    data = make(x, y)
    assert common(Subset(data, a), Subset(data, b)) == []
    assert common(Subset(data, c), Subset(Subset(data, order), range(20))) == list(range(10))
    assert common(Subset(data, [5, 3]), data) == [0, 1]
    assert len(common(make(x, y), make(x, y))) == 60  # made anew


def test_equal_values_by_chance_are_no_proof():
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(2, (200, 3), generator=g).float()  # eight samples, again and again
    assert common(TensorDataset(bits[:100]), TensorDataset(bits[100:])) == []
    x = torch.randn(400, 5, generator=g)
    x[399] = x[0]  # one that data sets have twice
    assert common(TensorDataset(x[200:]), TensorDataset(x[:200])) == []


def test_files_are_known_by_their_paths_also_beside_labels(tmp_path):
    files = [tmp_path / f'{i}.png' for i in range(10)]
    assert common(files[:5], files[5:]) == [] and common(files[4:], files[:5]) == [0]
    assert common([str(f) for f in files[4:]], files[:5]) == [0]
    labelled = [(f, i % 2) for i, f in enumerate(files)]
    again = [(f, i % 2) for i, f in enumerate(files)]
    assert common(labelled[4:], again[:5]) == [0]


# data frames


def frame(seed, n=200):
    r = np.random.RandomState(seed)
    kinds, classes = r.choice(list('xyz'), n), r.choice(list('uv'), n)
    res = pd.DataFrame({'a': r.randn(n), 'b': r.randn(n) * 3, 'kind': kinds, 'y': classes})
    res.loc[::17, 'b'] = np.nan
    return res


def tables(df, train, valid):
    procs, splits = [Categorify, FillMissing, Normalize], (list(train), list(valid))
    parts = TabularPandas(df, procs, ['kind'], ['a', 'b'], 'y', splits=splits)
    return parts.dataloaders(bs=32)


def test_rows_of_one_table_are_known_though_each_fold_normalises_them_in_its_own_way():
    df = frame(0)
    first, second = tables(df, range(100), range(100, 200)), tables(df, range(50, 200), range(50))
    assert common(first.valid_ds, first.train_ds) == []
    assert common(first.valid_ds, second.train_ds) == list(range(100))
    assert common(first.test_dl(df.iloc[90:110], with_labels=True).dataset, first.train_ds) == list(range(10))


def test_rows_of_another_table_with_the_same_index_are_other_samples():
    first, second = (tables(frame(seed), range(100), range(100, 200)) for seed in range(2))
    assert common(first.valid_ds, second.valid_ds) == []
    assert common(first.test_dl(frame(2, 90), with_labels=True).dataset, first.train_ds) == []


def test_rows_with_a_new_index_are_known_by_what_is_in_them():
    df = frame(0)
    part = df.iloc[50:90].reset_index(drop=True)
    assert common(part, df.iloc[:70]) == list(range(20)) and common(part, df.iloc[100:]) == []
