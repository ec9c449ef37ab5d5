import pickle

import pytest
import torch
from fastai.optimizer import Adam
from torch import nn

from fastai_swa import (
    Curve,
    Ensemble,
    SnapshotCallback,
    SWACallback,
    WeightAverage,
    average_checkpoints,
    line,
    rays,
)
from fastai_swa.solutions import by_epoch, gathered, has_solutions, named_solutions, source_of
from fastai_swa.weights import NoSolution, write_index

from .helpers import assert_close, learner, net
from .test_weight_formats import parts, write


class Holder:
    "What a user may write: it holds solutions by name."

    def __init__(self, **solutions):
        self.found = solutions

    def solutions(self):
        if not self.found:
            raise NoSolution('the holder', 'has found nothing yet')
        return self.found


def state(value):
    return {'weight': torch.tensor([float(value)])}


ONE, TWO, THREE, MODULE = state(1), state(2), state(3), nn.Sequential(nn.Linear(1, 1))


@pytest.mark.parametrize(
    'given, expected',
    [
        (ONE, {'solution 1': ONE}),
        (MODULE, {'solution 1': MODULE}),  # which could be iterated over
        ('runs/best.pth', {'best': 'runs/best.pth'}),
        ([ONE, 'runs/best.pth', MODULE], {'solution 1': ONE, 'best': 'runs/best.pth', 'solution 3': MODULE}),
        (['a/best.pth', 'b/best.pth'], {'solution 1': 'a/best.pth', 'solution 2': 'b/best.pth'}),
        ((o for o in (ONE, TWO)), {'solution 1': ONE, 'solution 2': TWO}),
        ({'SGD': ONE, 5: 'runs/best.pth'}, {'SGD': ONE, '5': 'runs/best.pth'}),
        (Holder(average=ONE), {'average': ONE}),
        (Holder(early=ONE, late=TWO), {'early': ONE, 'late': TWO}),
        ([Holder(early=ONE, late=TWO), THREE], {'early': ONE, 'late': TWO, 'solution 3': THREE}),
        ([Holder(a=ONE), Holder(a=TWO)], {'solution 1': ONE, 'solution 2': TWO}),
        ({'SWA': Holder(average=ONE), 'SGD': TWO}, {'SWA': ONE, 'SGD': TWO}),
        ({'run': Holder(early=ONE, late=TWO)}, {'run, early': ONE, 'run, late': TWO}),
        ([], {}),
        ({}, {}),
        (3, {'solution 1': 3}),  # no solution: for whoever checks
    ],
)
def test_whatever_is_given_becomes_solutions_by_name(given, expected):
    found = gathered(given)
    assert list(found) == list(expected)
    assert all(found[name] is solution for name, solution in expected.items())


def test_a_folder_of_an_ensemble_stands_for_its_files_alone_and_among_others(tmp_path):
    (tmp_path / 'ens').mkdir()
    for name, weights in {'a.pth': ONE, 'b.pth': TWO}.items():
        torch.save(weights, tmp_path / 'ens' / name)
    write_index(tmp_path / 'ens', ['a.pth', 'b.pth'], epochs=[1, 3])
    a, b = tmp_path / 'ens' / 'a.pth', tmp_path / 'ens' / 'b.pth'
    assert gathered(tmp_path / 'ens') == gathered(str(tmp_path / 'ens')) == {'epoch 1': a, 'epoch 3': b}
    assert gathered([tmp_path / 'ens', 'c.pth']) == {'epoch 1': a, 'epoch 3': b, 'c': 'c.pth'}
    assert gathered({'FGE': tmp_path / 'ens'}) == {'FGE, epoch 1': a, 'FGE, epoch 3': b}
    write_index(tmp_path / 'ens', ['a.pth', 'b.pth'])
    assert gathered(tmp_path / 'ens') == {'a': a, 'b': b}


def test_epochs_are_names_where_there_is_one_for_each():
    assert by_epoch([ONE, TWO], [4, 2]) == {'epoch 4': ONE, 'epoch 2': TWO}
    for epochs in ([], [4], [4, 4]):
        assert by_epoch([ONE, TWO], epochs) == {'solution 1': ONE, 'solution 2': TWO}


def test_a_module_is_a_solution_whatever_methods_it_has():
    class Solver(nn.Linear):
        def solutions(self):
            raise AssertionError

    learn, module = learner(), Solver(1, 1)
    learn.model = module
    assert not has_solutions(module) and not has_solutions(learn)
    assert gathered([module, learn]) == {'solution 1': module, 'solution 2': learn}
    assert source_of(learn) is source_of(module) is module


@pytest.mark.parametrize(
    'given, error, said',
    [
        ([], ValueError, '^solutions is empty: one is needed at least$'),
        ([ONE, TWO], ValueError, '^solutions must be 3 for a plane, not 2$'),
        ([ONE, 3, TWO], TypeError, '^solution 2 must be a state dict, a module, a learner, a path or a SWACallback'),
        (Holder(), ValueError, '^the holder has found nothing yet$'),
        ([ONE, Holder()], ValueError, '^the holder has found nothing yet$'),
        ({'SWA': Holder()}, ValueError, '^SWA has found nothing yet$'),
        (WeightAverage(net()), ValueError, '^average has averaged nothing yet$'),
        (SWACallback(1), ValueError, '^average has averaged nothing yet$'),
        ({'SWA': SWACallback(1)}, ValueError, '^SWA has averaged nothing yet$'),
        (SnapshotCallback(0), ValueError, '^the SnapshotCallback has kept nothing yet$'),
    ],
)
def test_what_cannot_be_used_is_one_clear_sentence(given, error, said):
    with pytest.raises(error, match=said):
        named_solutions(given, 3, 'a plane')


def test_a_folder_without_models_or_index_is_one_clear_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match='has no index.json: it is no folder of an ensemble'):
        gathered(tmp_path)
    write_index(tmp_path, [])
    with pytest.raises(ValueError, match=f'{tmp_path.name} has no models yet: the fit that writes there'):
        gathered(tmp_path)


def test_the_error_can_be_sent_between_processes():
    error = pickle.loads(pickle.dumps(NoSolution('SWA', 'has nothing')))
    assert str(error) == 'SWA has nothing' and error.lack == 'has nothing'


# what takes them


@pytest.fixture(scope='module')
def fit():
    "A learner after a fit of four epochs, an average of the last three and a snapshot of each of them."
    learn, swa, snapshots = learner(), SWACallback(1), SnapshotCallback(1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(4, cbs=[swa, snapshots])
    return learn, swa, snapshots


def test_what_holds_solutions_gives_them_by_name(fit):
    learn, swa, snapshots = fit
    assert swa.solutions() == {'average': swa.swa_model}
    assert list(snapshots.solutions()) == ['epoch 1', 'epoch 2', 'epoch 3']
    assert list(snapshots.solutions().values()) == snapshots.snapshots
    assert list(snapshots.ensemble(learn).solutions()) == ['epoch 1', 'epoch 2', 'epoch 3']
    assert list(Ensemble([learn, swa]).solutions()) == ['solution 1', 'solution 2']
    average = WeightAverage(learn.model)
    average.update(learn.model)
    assert average.solutions() == {'average': average.swa_model}


@pytest.mark.parametrize('kind', ['callback', 'several', 'dict', 'folder'])
def test_an_ensemble_takes_what_rays_takes(fit, kind, tmp_path):
    learn, swa, snapshots = fit
    if kind == 'folder':
        snapshots.ensemble(learn).save(tmp_path / 'ens')
    given, models = {
        'callback': (swa, [swa.swa_model]),
        'several': ([snapshots, learn, swa], [*snapshots.snapshots, learn.model, swa.swa_model]),
        'dict': ({'SWA': swa, 'own': learn.model}, [swa.swa_model, learn.model]),
        'folder': ([tmp_path / 'ens', swa], [*snapshots.snapshots, swa.swa_model]),
    }[kind]
    ens = Ensemble(given, learn)
    xs = torch.cat([x for x, _ in learn.dls.valid])
    expected = []
    for model in models:
        plain = net()
        plain.load_state_dict(model if isinstance(model, dict) else model.state_dict())
        with torch.no_grad():
            expected.append(plain.eval()(xs).softmax(1))
    assert len(ens) == len(models)
    torch.testing.assert_close(ens.get_preds()[0], torch.stack(expected).mean(0))
    assert rays(learn, given, [1.0], 1, sets='valid').names == list(gathered(given))


def test_an_ensemble_of_a_learner_in_a_list_with_others_serves_without_another_learner(fit):
    learn, swa, _ = fit
    assert Ensemble([swa, learn]).learn is learn
    with pytest.raises(ValueError, match='learn is needed'):
        Ensemble(swa)
    with pytest.raises(ValueError, match='average has averaged nothing yet'):
        Ensemble(SWACallback(1), learn)


@pytest.mark.parametrize('of', ['callback', 'ensemble', 'folder', 'dict', 'mixed'])
def test_checkpoints_that_callbacks_and_ensembles_hold_average_to_the_mean_of_their_weights(fit, of, tmp_path):
    learn, swa, snapshots = fit
    ens = snapshots.ensemble(learn)
    ens.save(tmp_path)
    given, states = {
        'callback': (snapshots, snapshots.snapshots),
        'ensemble': (ens, snapshots.snapshots),
        'folder': (tmp_path, snapshots.snapshots),
        'dict': ({'SWA': swa, 'own': learn}, [swa.swa_model.state_dict(), learn.model.state_dict()]),
        'mixed': ([snapshots, learn], [*snapshots.snapshots, learn.model.state_dict()]),
    }[of]
    average = average_checkpoints(given, learn)
    for name, p in average.named_parameters():
        torch.testing.assert_close(
            p.double(), sum(s[name].double() for s in states) / len(states), rtol=1e-6, atol=1e-7
        )
    as_before = average_checkpoints(states, learn)
    assert_close(average.state_dict().values(), as_before.state_dict().values(), 0)


def test_what_has_no_weights_is_refused_before_anything_is_averaged(fit):
    learn, _, _ = fit
    with pytest.raises(TypeError, match='solution 2 must be a state dict, a module, a learner, a path'):
        average_checkpoints([learn, 3], learn)
    with pytest.raises(ValueError, match='the SnapshotCallback has kept nothing yet'):
        average_checkpoints(SnapshotCallback(0), learn)


@pytest.mark.parametrize('paths', [['a.pth', 'b.pth'], 'a.pth', [ONE], ONE, None])
def test_files_and_learner_in_the_other_order_are_one_sentence_that_gives_the_order(fit, paths):
    learn, _, _ = fit
    for model in learn, learn.model:
        with pytest.raises(
            TypeError, match=r'^model must be .* the files come first: average_checkpoints\(paths, model'
        ):
            average_checkpoints(model, paths)


def test_a_line_and_a_curve_take_two_holders_of_one_solution(fit):
    learn, swa, _ = fit
    found = line(learn, {'last': learn, 'SWA': swa}, ts=[0, 1], sets='valid')
    assert found.names == ['last', 'SWA'] == list(Curve(learn, {'last': learn, 'SWA': swa}).ends)


# files as others write them


def saved(kind: str, learn, folder):
    "A file with the weights of `learn`, as somebody else writes it."
    weights = learn.model.state_dict()
    if kind == 'learn.save':
        learn.path, learn.model_dir = folder, '.'
        return learn.save('full')
    if kind == 'safetensors':
        return with_safetensors(weights, folder / 'a.safetensors')
    held = {
        'DataParallel': lambda: {f'module.{k}': v for k, v in weights.items()},
        'AveragedModel': lambda: torch.optim.swa_utils.AveragedModel(learn.model).state_dict(),
        'compiled': lambda: {f'module._orig_mod.{k}': v for k, v in weights.items()},
        'state_dict': lambda: {
            'state_dict': weights,
            'epoch': 3,
            'optimizer': torch.optim.SGD(learn.model.parameters()),
        },
        'model_state_dict': lambda: {'model_state_dict': weights, 'loss': 0.5},
        'both': lambda: {'state_dict': {f'module.{k}': v for k, v in weights.items()}, 'args': Holder()},
        # as PyTorch's own example of a training on ImageNet has it
        'imagenet': lambda: {
            'state_dict': {f'module.{k}': v for k, v in weights.items()},
            'best_acc1': torch.tensor(0.7),
        },
        'Lightning': lambda: {'state_dict': {f'model.{k}': v for k, v in weights.items()}, 'epoch': 3},
    }
    torch.save(held[kind](), folder / 'a.pth')
    return folder / 'a.pth'


def with_safetensors(weights, file):
    return write(file, *parts({k: v.float() if v.is_floating_point() else v for k, v in weights.items()}))


@pytest.mark.parametrize(
    'kind',
    [
        *'learn.save safetensors DataParallel AveragedModel compiled'.split(),
        *'state_dict model_state_dict both imagenet Lightning'.split(),
    ],
)
def test_files_as_others_write_them_are_solutions(kind, tmp_path):
    learn = learner(opt_func=Adam)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 0.01)
    file = saved(kind, learn, tmp_path)
    expected = learn.get_preds()[0]
    weights = {k: v.clone() for k, v in learn.model.state_dict().items()}
    other = learner(seed=5)
    assert torch.equal(Ensemble([file], other).get_preds()[0], expected)
    average = average_checkpoints([file, str(file)], other)
    for name, p in average.named_parameters():
        torch.testing.assert_close(p, weights[name])
    losses = rays(other, {'file': file, 'model': learn}, [1.0], 1, sets='valid').profiles('valid_loss')
    assert losses['file'][0, 0] == losses['model'][0, 0]
    if kind != 'safetensors':
        held = torch.load(file, weights_only=False)  # and as a dict that somebody has loaded
        assert torch.equal(Ensemble([held], other).get_preds()[0], expected)


def test_a_model_whose_own_names_begin_with_module_keeps_them(tmp_path):
    class Wrapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = net()

        def forward(self, x):
            return self.module(x)

    learn = learner(model=Wrapping)
    expected = learn.get_preds()[0]
    weights = learn.model.state_dict()
    for given in weights, {f'module.{k}': v for k, v in weights.items()}:
        assert torch.equal(Ensemble([{k: v.clone() for k, v in given.items()}], learn).get_preds()[0], expected)
    with pytest.raises(ValueError, match='member 0 does not hold weights of this architecture'):
        Ensemble([net(width=9).state_dict()], learn).get_preds()


def test_of_tied_weights_a_file_may_have_one(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))[:, :3]

    learn = learner(model=Tied)
    expected = learn.get_preds()[0]
    for left_out in 'a.weight', 'b.weight':
        weights = {k: v.clone() for k, v in learn.model.state_dict().items() if k != left_out}
        file = with_safetensors(weights, tmp_path / 'a.safetensors')
        assert torch.equal(Ensemble([file], learner(model=Tied, seed=2)).get_preds()[0], expected)
    del weights['a.weight']
    with pytest.raises(ValueError, match='does not hold weights of this architecture'):
        Ensemble([weights], learn).get_preds()


@pytest.mark.parametrize(
    'held, said',
    [
        ({'state_dict': ONE, 'model': TWO}, 'a.pth holds several state dicts: give the one that is meant'),
        ({'epoch': 3}, r'a.pth holds no state dict: save one with learn.save\(name\), or torch.save'),
        ([ONE], 'a.pth holds no state dict'),
        ({0: torch.ones(1)}, 'a.pth holds no state dict'),
        (MODULE, 'a.pth holds no state dict'),
    ],
)
def test_a_file_without_one_state_dict_is_one_clear_sentence(held, said, tmp_path):
    torch.save(held, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=said):
        Ensemble([tmp_path / 'a.pth'], learner()).get_preds()
    if isinstance(held, dict):
        with pytest.raises(ValueError, match=said.replace('a.pth', 'member 0')):
            Ensemble([held], learner()).get_preds()
