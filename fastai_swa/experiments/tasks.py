"""What recipes are trained on beside images: tables and sentences, as fastai's own learners take
them."""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import torch
from fastai.data.block import CategoryBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import IndexSplitter
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import R2Score, accuracy
from fastai.tabular.core import Categorify, FillMissing, Normalize, TabularPandas
from fastai.tabular.model import TabularModel, get_emb_sz
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import nn

__all__ = ['Table', 'Sentences', 'ADULT', 'HOUSING', 'SST2']


@dataclass(frozen=True)
class Table:
    """A table as CSV, for fastai's `TabularModel`: embeddings of the categories, batch norm, two
    hidden layers of 200 and 100.

    `train` and `test` are the names of the files in the folder given; without `test` every fifth
    row, in an order drawn with seed 0, is tested on. A number to be predicted is standardised by
    the training rows.
    """

    train: str
    target: str
    categories: tuple[str, ...]
    numbers: tuple[str, ...]
    test: str | None = None
    is_number: bool = False  # what is to be predicted

    @property
    def metric(self) -> str:
        "The column of a fit by which it is judged."
        return 'r2_score' if self.is_number else 'accuracy'

    def load(self, source, n_train: int | None = None, n_test: int | None = None, n_choose: int = 0):
        """(data for `loaders`, what it is of). Raises `ValueError` if the folder `source` does not
        have the files or the columns, or too few rows.

        - `n_choose`: so many rows of the training file, those after the `n_train` first, are for choosing, and neither
          trained nor tested on.
        """
        columns = [*self.categories, *self.numbers, self.target]
        rows, test = _train_and_test(source, self.train, self.test, columns)
        if n_choose:
            n_train = n_train or len(rows) - n_choose
            if not 0 < n_train <= len(rows) - n_choose:
                raise ValueError(f'{self.train} has {len(rows)} rows: too few for {n_choose} to choose on')
        train = rows[:n_train].copy()
        test = test[:n_test].copy()
        if n_choose:
            test = pd.concat([rows[n_train : n_train + n_choose], test])
        for name in self.numbers:
            if not train[name].isna().any():  # else fastai's FillMissing has seen in training what to do
                test[name] = test[name].fillna(train[name].median())
        if self.is_number:
            mean = train[self.target].mean()
            std = train[self.target].std()
            for part in (train, test):
                part[self.target] = (part[self.target] - mean) / std
        about = _about(self.train, train, test)
        if n_choose:
            about |= {'choose': n_choose, 'valid': len(test) - n_choose}
        return (self._for_fastai(train, test), train, test[n_choose:]), about

    def _for_fastai(self, train, test) -> TabularPandas:
        both = pd.concat([train, test], ignore_index=True)
        for name in self.numbers:
            both[name] = both[name].astype('float64')
        splits = IndexSplitter(range(len(train), len(both)))(range(len(both)))
        return TabularPandas(
            both,
            procs=[Categorify, FillMissing, Normalize],
            cat_names=list(self.categories),
            cont_names=list(self.numbers),
            y_names=self.target,
            y_block=RegressionBlock() if self.is_number else CategoryBlock(),
            splits=list(splits),
        )

    def loaders(self, data, bs: int, seed: int, n_choose: int = 0) -> DataLoaders:
        "Of the training rows, and of those to choose on; of the test rows where there are none of these."
        dls = data[0].dataloaders(bs=bs, val_bs=2048, drop_last=False, device='cpu')
        dls.train.rng = Random(seed)
        if not n_choose:
            return dls
        res = DataLoaders(dls.train, _of_rows(dls.valid, slice(0, n_choose), bs))
        res.train.rng = dls.train.rng
        return res

    def test_loader(self, data, n_choose: int) -> DataLoader:
        "Of the test rows."
        dls = data[0].dataloaders(val_bs=2048, device='cpu')
        return _of_rows(dls.valid, slice(n_choose, None), 2048)

    def network(self, data, dls) -> nn.Module:
        n_out = 1 if self.is_number else len(dls.vocab)
        return TabularModel(get_emb_sz(data[0]), len(data[0].cont_names), n_out, [200, 100])

    def loss_and_metric(self):
        if self.is_number:
            return MSELossFlat(), R2Score()
        return CrossEntropyLossFlat(), accuracy

    def baseline(self, data, seed: int) -> dict:
        """scikit-learn's gradient boosting on the same rows: its name, the metric and the loss on
        the test rows.
        """
        _, train, test = data
        columns = [*self.categories, *self.numbers]
        dtypes = dict.fromkeys(self.categories, 'category')
        x_train = train[columns].astype(dtypes)
        x_test = test[columns].astype(dtypes)
        for name in self.categories:
            x_test[name] = x_test[name].cat.set_categories(x_train[name].cat.categories)
        kind = HistGradientBoostingRegressor if self.is_number else HistGradientBoostingClassifier
        model = kind(categorical_features='from_dtype', random_state=seed)
        model.fit(x_train, train[self.target])
        return {'name': 'gradient boosting'} | _judged(model, x_test, test[self.target], self.is_number)


@dataclass(frozen=True)
class Sentences:
    """Labelled sentences as CSV with the columns `sentence` and `label`, already split into words
    by blanks.

    For a small network: embeddings of 64, a convolution of three words with batch norm, the
    greatest value over the positions, a linear layer.
    """

    train: str
    test: str
    metric = 'accuracy'
    n_words = 10_000  # the most frequent ones; the others are one
    length = 40  # words of a sentence that are read

    def load(self, source, n_train: int | None = None, n_test: int | None = None):
        """(data for `loaders`, what it is of). Raises `ValueError` if the folder `source` does not
        have the files or the columns.
        """
        train, test = _train_and_test(source, self.train, self.test, ['sentence', 'label'])
        train = train[:n_train]
        test = test[:n_test]
        counts = Counter()
        for text in train['sentence']:
            counts.update(text.split())
        frequent = counts.most_common(self.n_words)
        words = {word: i for i, (word, _) in enumerate(frequent, 2)}  # 0: padding, 1: unknown
        parts = [self._tensors(part, words) for part in (train, test)]
        return (parts, train, test), _about(self.train, train, test)

    def _tensors(self, part, words) -> tuple[torch.Tensor, torch.Tensor]:
        "Numbers of words (n, length), and labels (n)."
        x = torch.zeros(len(part), self.length, dtype=torch.long)
        for row, text in zip(x, part['sentence']):
            numbers = [words.get(word, 1) for word in text.split()][: self.length]
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        return x, torch.tensor(part['label'].to_numpy())

    def loaders(self, data, bs: int, seed: int) -> DataLoaders:
        train, test = [_BatchedRows(*part) for part in data[0]]
        res = DataLoaders(_batch_loader(train, bs, shuffle=True), _batch_loader(test, 2048), device='cpu')
        res.train.rng = Random(seed)
        return res

    def network(self, data, dls) -> nn.Module:
        return SentenceNet(self.n_words + 2)

    def loss_and_metric(self):
        return CrossEntropyLossFlat(), accuracy

    def baseline(self, data, seed: int) -> dict:
        """scikit-learn's logistic regression on TF-IDF of words and pairs: its name, the metric and
        the loss on the test sentences.
        """
        _, train, test = data
        tfidf = TfidfVectorizer(ngram_range=(1, 2), min_df=2, token_pattern=r'\S+')
        model = LogisticRegression(C=10.0, max_iter=1000, random_state=seed)
        model.fit(tfidf.fit_transform(train['sentence']), train['label'])
        x_test = tfidf.transform(test['sentence'])
        return {'name': 'TF-IDF and logistic regression'} | _judged(model, x_test, test['label'], is_number=False)


class SentenceNet(nn.Module):
    "(n, length) numbers of words to (n, 2) logits."

    def __init__(self, n_words: int, width: int = 64):
        super().__init__()
        self.words = nn.Embedding(n_words, width, padding_idx=0)
        self.conv = nn.Conv1d(width, 2 * width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm1d(2 * width)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(2 * width, 2))

    def forward(self, x):
        features = torch.relu(self.bn(self.conv(self.words(x).transpose(1, 2))))
        return self.head(features.max(2).values)


def _of_rows(dl, rows: slice, bs: int) -> DataLoader:
    "A loader like `dl`, of fastai's for tables, of these rows of it."
    table = dl.dataset
    return dl.new(table.new(table.items[rows]), bs=bs)


class _BatchedRows:
    "A data set that gives whole batches: one indexing each."

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def _batch_loader(dataset, bs, shuffle=False) -> DataLoader:
    def create_batches(samps):
        for i in torch.tensor(list(samps), dtype=torch.long).split(bs):
            yield dataset[i]

    return DataLoader(dataset, bs=bs, shuffle=shuffle, num_workers=0, create_batches=create_batches)


def _train_and_test(source, train: str, test: str | None, columns) -> tuple[pd.DataFrame, pd.DataFrame]:
    "The rows for training and those to be tested on."
    folder = Path(source or os.environ.get('FASTAI_SWA_DATA') or '.')
    table = _read_table(folder / train, tuple(columns))
    if test:
        return table, _read_table(folder / test, tuple(columns))
    order = np.random.RandomState(0).permutation(len(table))
    n_test = len(order) // 5
    return table.iloc[order[n_test:]], table.iloc[order[:n_test]]


@cache  # the seeds of a process share it
def _read_table(file, columns) -> pd.DataFrame:
    if not file.exists():
        raise ValueError(f'{file} is missing: --data is to name a folder with {file.name}')
    table = pd.read_csv(file, skipinitialspace=True)
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(f'{file} has no column {missing[0]!r}')
    return table[list(columns)].dropna(subset=columns[-1:])


def _about(name, train, test) -> dict:
    digest = hashlib.sha256()
    for part in (train, test):
        digest.update(pd.util.hash_pandas_object(part, index=False).to_numpy().tobytes())
    return {'kind': Path(name).stem, 'train': len(train), 'valid': len(test), 'sha256': digest.hexdigest()[:16]}


def _judged(model, x, y, is_number) -> dict:
    "Metric and mean loss of a fitted scikit-learn `model` on (`x`, `y`)."
    if is_number:
        losses = (model.predict(x) - y) ** 2
    else:
        probs = model.predict_proba(x)
        column = {label: i for i, label in enumerate(model.classes_)}
        picked = probs[np.arange(len(y)), [column[label] for label in y]]
        losses = -np.log(np.maximum(picked, 1e-15))
    return {'metric': float(model.score(x, y)), 'loss': float(np.mean(losses))}


ADULT = Table(
    train='adult-train.csv',
    test='adult-test.csv',
    target='income',
    categories=(
        'workclass',
        'education',
        'marital_status',
        'occupation',
        'relationship',
        'race',
        'sex',
        'native_country',
    ),
    numbers=(
        'age',
        'fnlwgt',
        'education_num',
        'capital_gain',
        'capital_loss',
        'hours_per_week',
    ),
)
HOUSING = Table(
    train='california-housing.csv',
    target='median_house_value',
    is_number=True,
    categories=('ocean_proximity',),
    numbers=(
        'longitude',
        'latitude',
        'housing_median_age',
        'total_rooms',
        'total_bedrooms',
        'population',
        'households',
        'median_income',
    ),
)
SST2 = Sentences('sst2-train.csv', 'sst2-test.csv')
