"""The published recipes: schedules, folds, optimizer."""

import math

import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastai_swa import SWACallback
from fastai_swa.experiments.plan import Run, parts, runs, sgd_lr, swa_lr
from fastai_swa.experiments.recipes import RECIPES, optimizer, scaled
from fastai_swa.vision import CIFAR_STATS, IMAGENET_STATS

from .helpers import learner, loaders, net
from .reference import twins

FAMILIES = {
    'vgg16': (200, 0.05, {10: 0.01, 100: 0.01}, 161, 5e-4, (40, 90, 140), 81),
    'preresnet110': (150, 0.1, {10: 0.01, 100: 0.05}, 126, 3e-4, (25, 62, 100), 64),
    'preresnet164': (150, 0.1, {10: 0.01, 100: 0.05}, 126, 3e-4, (25, 62, 100), 64),
    'wrn28-10': (200, 0.1, {10: 0.05, 100: 0.05}, 161, 5e-4, (40, 90, 140), 81),
}


PUBLISHED = [name for name in RECIPES if name.partition('-cifar')[0] in FAMILIES and not RECIPES[name].fixed_lr]
each_published = pytest.mark.parametrize('name', PUBLISHED)


@each_published
def test_the_learning_rate_of_every_epoch_is_the_published_one(name):
    recipe = RECIPES[name]
    budget, lr, swa, start, wd, _, common = FAMILIES[name.partition('-cifar')[0]]
    rate = swa[recipe.n_classes]
    assert recipe.epochs == 3 * budget // 2 and recipe.wd == wd and recipe.bs == 128
    for e in range(recipe.epochs):
        assert swa_lr(recipe, e) == pytest.approx(twins.papers_lr(e, start, lr, rate), rel=1e-12)
    for n in (budget, recipe.epochs):
        for e in range(n):
            assert sgd_lr(recipe, e, n) == pytest.approx(twins.papers_lr(e, n, lr, 0.01 * lr), rel=1e-12)
    sgd, longer_sgd, swa_run = runs(recipe)
    assert sgd.lrs == tuple(sgd_lr(recipe, e, budget) for e in range(budget)) and longer_sgd.lrs == tuple(
        sgd_lr(recipe, e, 3 * budget // 2) for e in range(3 * budget // 2)
    )
    assert swa_run.lrs == tuple(swa_lr(recipe, e) for e in range(3 * budget // 2)) and [
        r.swa_start for r in runs(recipe)
    ] == [budget - 1, 3 * budget // 2 - 1, start - 1]
    shared = parts(runs(recipe))
    assert [(p.begin, p.end, p.parent) for p in shared] == [
        (0, common, None),
        (common, budget // 2 + 1, 0),
        (budget // 2 + 1, budget, 1),
        (budget // 2 + 1, 3 * budget // 2, 1),
        (common, 3 * budget // 2, 0),
    ]
    # 419 and 311 epochs for the published rows (200 + 300 - 81, 150 + 225 - 64), and the
    # control of 1.5 budgets
    assert sum(p.end - p.begin for p in shared) == (419 if budget == 200 else 311) + 3 * budget // 2 - (budget // 2 + 1)


@each_published
def test_the_folds_number_as_published_at_1_and_a_quarter_and_a_half_budgets_more(name):
    recipe, folds = RECIPES[name], FAMILIES[name.partition('-cifar')[0]][5]
    for budgets, n in zip((1, 1.25, 1.5), folds):
        assert len(twins.folded_epochs(recipe.swa_start, 1, recipe.epochs_at(budgets))) == n


def test_a_fixed_learning_rate_is_that_from_the_first_epoch_on():
    wrn = RECIPES['wrn28-10-cifar100-fixed']
    sgd, _, swa = runs(wrn)
    assert set(swa.lrs) == {0.05} and len(swa.lrs) == 300 and swa.swa_start == 140
    assert (
        sgd.lrs == runs(RECIPES['wrn28-10-cifar100'])[0].lrs
    )  # beside its usual schedule, with which it shares no epoch
    assert [(p.begin, p.end, p.parent) for p in parts(runs(wrn))] == [
        (0, 101, None),
        (101, 200, 0),
        (101, 300, 0),
        (0, 300, None),
    ]


def test_shake_shake_falls_by_a_cosine_to_0_and_its_tail_leaves_that_for_a_constant_rate():
    recipe = RECIPES['shakeshake-cifar10']
    assert (recipe.bs, recipe.wd, recipe.nesterov, recipe.padding) == (64, 1e-4, True, 'constant')
    sgd, swa = runs(recipe)
    assert (len(sgd.lrs), len(swa.lrs), sgd.swa_start, swa.swa_start) == (1800, 2700, 1799, 1440)
    n_steps = 782  # 50,000 images in batches of 64
    for epoch in (0, 1, 899, 900, 1439, 1440, 1799):
        for step in (0, 391, 781):
            share = (epoch * n_steps + step) / (1800 * n_steps)
            expected = 0.1 * math.cos(math.pi / 2 * share) ** 2
            assert sgd.lr(epoch, step, n_steps) == pytest.approx(expected, rel=1e-9)
            assert swa.lr(epoch, step, n_steps) == (0.01 if epoch >= 1440 else sgd.lr(epoch, step, n_steps))
    assert sgd.lr(1799, 781, n_steps) < 1e-12 and set(swa.lrs[1440:]) == {0.01}
    assert [(p.begin, p.end, p.parent) for p in parts(runs(recipe))] == [
        (0, 1440, None),
        (1440, 1800, 0),
        (1440, 2700, 0),
    ]
    assert 'never published' in recipe.note and 'no reproduction' in recipe.note


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([0.1, 0.05]), min_size=1, max_size=9), st.integers(0, 9)),
        min_size=1,
        max_size=4,
    )
)
def test_any_runs_are_put_together_again_from_the_parts_that_they_share(specs):
    many = [Run(str(i), tuple(lrs), min(start, len(lrs) - 1)) for i, (lrs, start) in enumerate(specs)]
    tree = parts(many)
    for run in many:
        chain = [p for p in tree if run in p.runs]
        assert [e for p in chain for e in range(p.begin, p.end)] == list(
            range(len(run.lrs))
        )  # each epoch once, in order
        assert [p.parent for p in chain] == [None, *(tree.index(p) for p in chain[:-1])]
        assert [p.is_last for p in chain] == [False] * (len(chain) - 1) + [True] and chain[
            -1
        ].begin <= run.swa_start  # all folds are in its own part
    for i, p in enumerate(tree):
        assert p.parent is None or p.parent < i
        assert (
            len({r.lrs[p.begin : p.end] for r in p.runs}) == 1 and p.begin < p.end
        )  # what is shared is the same, and is something


def test_the_ensembles_of_a_comparison_stay_within_its_budget_and_share_what_they_can():
    vgg = RECIPES['ensembles-vgg16-cifar10']
    sgd, swa, snapshots, fge = runs(vgg)
    assert [len(r.lrs) for r in (sgd, swa, snapshots, fge)] == [200, 200, 200, 199] and swa.swa_start == 160
    assert sgd.lrs == runs(RECIPES['vgg16-cifar10'])[0].lrs and swa.lrs == runs(RECIPES['vgg16-cifar10'])[2].lrs[:200]
    assert fge.lrs[:160] == sgd.lrs[:160] and fge.snapshots == (160, 2)  # 20 snapshots, the last at the end
    assert len(range(160, 199, 2)) == 20 and snapshots.snapshots == (39, 40)
    for e in range(200):
        for i in (0, 7, 390):
            assert snapshots.lr(e, i, 391) == pytest.approx(
                0.05 / 2 * (math.cos(math.pi * ((e * 391 + i) % (40 * 391)) / (40 * 391)) + 1)
            )
            if 160 <= e < 199:
                t = ((e - 160) % 2 + i / 391) / 2
                assert fge.lr(e, i, 391) == pytest.approx(
                    0.01 * (1 - 2 * t) + 5e-4 * 2 * t if t < 0.5 else 0.01 * (2 * t - 1) + 5e-4 * (2 - 2 * t)
                )
    assert [(p.begin, p.end, p.parent) for p in parts(runs(vgg))] == [
        (0, 81, None),
        (81, 160, 0),
        (160, 200, 1),
        (160, 199, 1),
        (81, 200, 0),
        (0, 200, None),
    ]
    pre = runs(RECIPES['ensembles-preresnet110-cifar10'])[-1]
    assert (
        pre.snapshots == (121, 4) and len(pre.lrs) == 150 and (149 - 121) % 4 == 0
    )  # 8 cycles of 4, the last without its second half
    with pytest.raises(ValueError, match='4 epochs are too few for 5 snapshots'):
        runs(scaled(vgg, 0.02))


@pytest.mark.parametrize(
    'name', [name for name, recipe in RECIPES.items() if not recipe.ensembles and not recipe.lengths]
)
@pytest.mark.parametrize('scale', [0.02, 0.05, 0.1, 0.37, 2])
def test_a_scaled_recipe_has_all_rows_of_the_whole_one(name, scale):
    recipe = RECIPES[name]
    if round(scale * recipe.budget) < 4:
        with pytest.raises(ValueError, match=f'scale={scale}.* 4 are the least'):
            scaled(recipe, scale)
        return
    small = scaled(recipe, scale)
    assert small.swa_start < small.budget < small.epochs_at(1.25) < small.epochs == small.epochs_at(1.5)
    assert abs(small.swa_start / small.budget - recipe.swa_start / recipe.budget) <= 1 / small.budget
    assert {k for k in vars(small) if vars(small)[k] != vars(recipe)[k]} <= {'budget', 'swa_start'} and len(
        parts(runs(small))
    ) >= 3
    assert scaled(recipe, 1) == recipe


@pytest.mark.parametrize('scale', [0.02, 0.05, 0.1, 0.37, 2])
@each_published
def test_the_controls_and_the_averaged_epochs_of_a_scaled_recipe_get_to_the_rates_of_the_whole_one(name, scale):
    if round(scale * RECIPES[name].budget) < 4:
        return
    recipe = scaled(RECIPES[name], scale)
    *controls, swa = runs(recipe)
    for control in controls:
        n = len(control.lrs)
        expected = [twins.averaging_lr(e, n - 1, recipe.lr, recipe.lr / 100) for e in range(n)]
        assert control.lrs == pytest.approx(expected, rel=1e-12)
        assert control.lrs[-1] == pytest.approx(recipe.lr / 100)
    assert swa.lrs[swa.swa_start :] == pytest.approx([recipe.swa_lr] * (recipe.epochs - swa.swa_start))


def test_a_fit_folds_the_epochs_that_the_recipe_says():
    "At a twenty-fifth of the length: 12 epochs for 300, the first fold in the 7th."
    learn, swa = learner(), SWACallback(160 // 25)
    learn.fit(12, cbs=swa)
    assert swa.averaged_epochs == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize('name', ['vgg16-cifar10', 'preresnet110-cifar10', 'shakeshake-cifar10'])
def test_optimizer_steps_equal_torchs_sgd_with_coupled_decay_on_every_parameter(name):
    recipe = RECIPES[name]
    torch.manual_seed(0)
    learn = Learner(
        loaders(),
        net(dropout=0),
        CrossEntropyLossFlat(),
        opt_func=optimizer(recipe),
        lr=recipe.lr,
        wd=recipe.wd,
        wd_bn_bias=True,
    )
    twin = net(dropout=0)
    twin.load_state_dict(learn.model.state_dict())
    batches = []
    from fastai.callback.core import Callback

    class Keep(Callback):
        def before_batch(self):
            if self.training:
                batches.append((self.xb[0].clone(), self.yb[0].clone()))

    learn.fit(2, cbs=Keep())
    is_nesterov = name == 'shakeshake-cifar10'
    opt = torch.optim.SGD(twin.parameters(), lr=recipe.lr, momentum=0.9, nesterov=is_nesterov, weight_decay=recipe.wd)
    for x, y in batches:
        opt.zero_grad()
        nn.functional.cross_entropy(twin.train()(x), y).backward()
        opt.step()
    for a, b in zip(learn.model.parameters(), twin.parameters()):
        assert torch.equal(a, b)
    assert [h['wd'] for h in learn.opt.hypers] == [recipe.wd] and len(learn.opt.opt.param_groups[0]['params']) == len(
        list(twin.parameters())
    )


def test_weight_decay_moves_every_parameter_that_gets_no_gradient():
    model = net(dropout=0)
    opt = optimizer(RECIPES['vgg16-cifar10'])([list(model.parameters())], lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for p, b in zip(model.parameters(), before):
        assert torch.allclose(p, b * (1 - 0.1 * 5e-4), rtol=5e-7, atol=0)


TABLE_1 = {  # Izmailov et al. 2018, Table 1, typed once more: mean, standard deviation of SGD 1B, SWA 1B, 1.25B, 1.5B
    'vgg16-cifar10': '93.25 .16 93.59 .16 93.70 .22 93.64 .18',
    'vgg16-cifar100': '72.55 .10 73.91 .12 74.17 .15 74.27 .25',
    'preresnet110-cifar10': '95.03 .05 95.51 .10 95.65 .03 95.82 .03',
    'preresnet110-cifar100': '76.77 .38 78.75 .16 78.91 .29 79.10 .21',
    'preresnet164-cifar10': '95.28 .10 95.56 .11 95.77 .04 95.83 .03',
    'preresnet164-cifar100': '78.49 .36 79.77 .17 80.18 .23 80.35 .16',
    'wrn28-10-cifar10': '96.18 .11 96.45 .11 96.64 .08 96.79 .05',
    'wrn28-10-cifar100': '80.82 .23 81.46 .23 81.91 .27 82.15 .27',
}


def test_the_published_numbers_are_those_of_the_paper():
    for name, row in TABLE_1.items():
        numbers = list(map(float, row.split()))
        assert RECIPES[name].published == dict(
            zip(('SGD 1B', 'SWA 1B', 'SWA 1.25B', 'SWA 1.5B'), zip(numbers[::2], numbers[1::2]))
        )
    tails = {'imagenet-tail', 'imagenet-tail-resnet152', 'imagenet-tail-densenet161'}
    others = {'wrn28-10-cifar100-fixed', 'shakeshake-cifar10', *tails}
    assert {name for name, r in RECIPES.items() if r.published} == {*TABLE_1, *others}
    assert RECIPES['wrn28-10-cifar100-fixed'].published == {'SWA 1.5B': (81.7, None)}
    assert RECIPES['shakeshake-cifar10'].published == {
        'SGD 1B': (96.93, 0.10),
        'our SWA tail 1.25B': (97.16, 0.10),
        'our SWA tail 1.5B': (97.12, 0.06),
    }


def test_each_network_is_fed_with_the_papers_mean_and_standard_deviation():
    for name in TABLE_1:
        assert (
            RECIPES[name].stats == (IMAGENET_STATS if name.startswith('vgg') else CIFAR_STATS)
            and RECIPES[name].padding == 'constant'
        )
    assert IMAGENET_STATS == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) and CIFAR_STATS == (
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
    )


def test_reflection_differs_from_its_twin_in_the_padding_alone():
    for name in ('vgg16-cifar10', 'preresnet110-cifar10'):
        a, b = vars(RECIPES[name]), vars(RECIPES[f'{name}-reflection'])
        assert {k for k in a if a[k] is not b[k] and a[k] != b[k]} == {'name', 'padding', 'published'} and b[
            'padding'
        ] == 'reflect'


def test_networks_of_the_recipes_have_the_classes_of_their_data():
    for recipe in RECIPES.values():
        if recipe.task is not None:
            continue  # which makes its network of its data
        with torch.device('meta'):
            model = recipe.network(recipe.n_classes)
        assert [m for m in model.modules() if isinstance(m, nn.Linear)][-1].out_features == recipe.n_classes
