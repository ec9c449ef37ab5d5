"""Two processes (gloo, on the CPU) against one that sees the same global batches."""

import multiprocessing
import os
import re
import socket
import traceback
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.metrics import RocAuc, accuracy
from fastai.optimizer import SGD
from torch import distributed, nn
from torch.nn import functional as F

from fastai_swa import CheckpointCallback, SaveSWAModelCallback, SWACallback
from fastai_swa.batchnorm import batch_moments, tracked_bn

from .helpers import At, assert_close, column, fingerprint, learner, loaders, net, raising
from .reference import twins

# children of a fresh process: one that has trained may have threads, and torch refuses to train in its children
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['tests.test_distributed'])


def child(f, rank, size, port, folder, args):
    os.environ |= {
        'RANK': str(rank),
        'LOCAL_RANK': str(rank),
        'WORLD_SIZE': str(size),
        'MASTER_ADDR': 'localhost',
        'MASTER_PORT': str(port),
    }
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        from fastai.distributed import DistributedDL

        def broadcast(self, t, rank):  # fastai's sends everything through a GPU
            t = torch.LongTensor(t)
            distributed.broadcast(t, rank)
            return t.tolist()

        DistributedDL._broadcast = broadcast
        torch.save(f(rank, *args), folder / f'{rank}.pt')
    except BaseException:
        (folder / f'{rank}.err').write_text(traceback.format_exc())
    os._exit(0)  # nothing of the test session's runs in a child


def run(folder, f, *args, size=2, timeout=100):
    "`f(rank, *args)` in `size` processes; their results."
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    children = [SERVER.Process(target=child, args=(f, rank, size, port, folder, args)) for rank in range(size)]
    for c in children:
        c.start()
    for c in children:
        c.join(timeout)
    alive = [c for c in children if c.is_alive()]
    for c in alive:
        c.kill()
    errors = [p.read_text() for p in sorted(folder.glob('*.err'))]
    assert not errors and not alive, '\n'.join(errors)[-2000:] or 'a process hangs'
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(size)]


def context(learn):
    return learn.distrib_ctx(sync_bn=False, cpu=True)


class Interleaved(DataLoader):
    """One process's loader whose batches are the global batches of two processes that share the
    samples as fastai's `DistributedDL` does.
    """

    def get_idxs(self):
        idxs, half = list(super().get_idxs()), self.bs // 2
        idxs += idxs[: len(idxs) % 2]
        a, b = idxs[: len(idxs) // 2], idxs[len(idxs) // 2 :]
        return [i for j in range(0, len(a), half) for i in (*a[j : j + half], *b[j : j + half])]


class GhostBatchNorm(nn.BatchNorm1d):
    """Normalises the halves of a batch on their own, as two processes do; the running statistics
    are the first half's.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        a, b = x.chunk(2)
        return torch.cat([super().forward(a), F.batch_norm(b, None, None, self.weight, self.bias, True, 0, self.eps)])


def plain_net():
    return net(dropout=0)


def layer_norm_net():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def ghost_net():
    model = net(dropout=0)
    for i in (1, 5):
        model[i] = GhostBatchNorm(8)
    return model


def one_process(model, n=90, n_valid=41):
    dls = loaders(n=n, n_valid=n_valid)
    return learner(
        model,
        dls=DataLoaders(
            Interleaved(dls.train.dataset, bs=32, shuffle=True), DataLoader(dls.valid.dataset, bs=64), device='cpu'
        ),
        opt_func=partial(SGD, mom=0.9),
        lr=0.05,
    )


def two_processes(model, n=90, n_valid=41, **kwargs):
    return learner(model, dls=loaders(n=n, n_valid=n_valid), opt_func=partial(SGD, mom=0.9), lr=0.05, **kwargs)


class Inputs(Callback):
    """The inputs of each batch-norm pass, as the callback's own loop sees them: batches with the
    layers in train mode, outside training. (On the class: what a callback holds itself is put back
    after a pass.)"""

    passes = []

    def before_validate(self):
        self.passes.append([])

    def before_batch(self):
        if not self.training:
            self.passes[-1].append(self.xb[0].clone())


def train(rank, model, n, every):
    learn, swa, inputs = two_processes(model, n=n), SWACallback(1, every=every), Inputs()
    with context(learn):
        learn.fit(4, cbs=[swa, inputs])
    return {
        'swa': swa.swa_model.state_dict(),
        'model': learn.model.state_dict(),
        'epochs': swa.averaged_epochs,
        'n': swa.n_averaged,
        'columns': {k: column(learn, k) for k in ('swa_valid_loss', 'swa_accuracy', 'train_loss')},
        'pass': inputs.passes[-2],
        'valid': inputs.passes[-1],
    }


@pytest.mark.parametrize('every', [None, 2])
@pytest.mark.parametrize('n', [90, 91])
@pytest.mark.parametrize('model', [net, layer_norm_net])
def test_weights_statistics_and_columns_equal_those_of_one_process_on_the_same_global_batches(
    tmp_path, model, n, every
):
    bn = model is net
    a, b = run(tmp_path / 'two', train, plain_net if bn else model, n, every)
    one, swa = one_process(ghost_net if bn else model, n=n), SWACallback(1, every=every)
    one.fit(4, cbs=swa)
    assert a['epochs'] == b['epochs'] == swa.averaged_epochs and a['n'] == b['n'] == swa.n_averaged
    for k in a['swa']:
        assert torch.equal(a['swa'][k], b['swa'][k]), f'{k} differs between the ranks'
    assert (
        a['columns']['swa_valid_loss'][1:] == b['columns']['swa_valid_loss'][1:]
        and a['columns']['swa_accuracy'][1:] == b['columns']['swa_accuracy'][1:]
    )
    weights = {k: v for k, v in a['swa'].items() if 'running' not in k and 'num_b' not in k}
    assert_close(weights.values(), [one_v for k, one_v in swa.swa_model.state_dict().items() if k in weights], tol=2e-5)
    average = (net(dropout=0) if bn else model()).eval()
    average.load_state_dict(a['swa'])
    if bn:  # each process's batches, the pooled moments of both
        batches = [(x,) for x in a['pass'] + b['pass']]
        seen = torch.cat([x for (x,) in batches])
        assert len(seen) == n and len(seen.unique(dim=0)) == n  # each sample once, none twice
        for name, (mean, var) in twins.bn_statistics(average, batches).items():
            layer = average.get_submodule(name)
            assert_close([layer.running_mean, layer.running_var], [mean, var], tol=1e-5)
            assert layer.num_batches_tracked == len(batches)
    valid = loaders(n=n, n_valid=41).valid.dataset
    loss, acc = twins.evaluate(
        average,
        [(torch.stack([x for x, _ in valid]), torch.stack([y for _, y in valid]))],
        F.cross_entropy,
        (lambda p, t: (p.argmax(1) == t).float().mean(),),
    )
    assert a['columns']['swa_valid_loss'][-1] == pytest.approx(loss, rel=1e-5) and a['columns']['swa_accuracy'][
        -1
    ] == pytest.approx(acc, rel=1e-6)
    if not bn:
        for k in ('swa_valid_loss', 'swa_accuracy'):
            assert a['columns'][k][1:] == pytest.approx(column(one, k)[1:], rel=1e-4)


def with_auc(rank):
    learn, swa = two_processes(lambda: net(dropout=0), metrics=[accuracy, RocAuc()]), SWACallback(0)
    with context(learn):
        learn.fit(2, cbs=swa)
    return column(learn, 'swa_roc_auc_score'), swa.swa_model.state_dict()


def test_a_metric_of_all_predictions_is_of_the_whole_validation_set(tmp_path):
    (auc, state), (other, _) = run(tmp_path / 'two', with_auc)
    model = net(dropout=0).eval()
    model.load_state_dict(state)
    valid = loaders(n=90, n_valid=41).valid.dataset
    from sklearn.metrics import roc_auc_score

    with torch.no_grad():
        probs = model(torch.stack([x for x, _ in valid])).softmax(1)
    assert auc == other and auc[-1] == pytest.approx(
        roc_auc_score([int(y) for _, y in valid], probs.numpy(), multi_class='ovr'), rel=1e-6
    )


def untouched(rank, with_swa):
    learn = two_processes(net)
    with context(learn):
        learn.fit(3, cbs=SWACallback(1) if with_swa else None)
    return {k: v for k, v in fingerprint(learn).items() if k != 'cbs'}


def test_training_is_untouched_in_two_processes(tmp_path):
    from .helpers import assert_same

    for a, b in zip(run(tmp_path / 'with', untouched, True), run(tmp_path / 'without', untouched, False)):
        assert_same(a, b)


def afterwards(rank, folder):
    learn, swa = two_processes(net), SWACallback(1, swa_eval_freq=0, bn_batches=2)
    with context(learn):
        learn.fit(3, cbs=[swa, SaveSWAModelCallback(at_end=True)])
        swa.enabled = True
        learn.fit(2, cbs=At('after_train', 9, None))
        with swa.averaged():
            loss = learn.validate()[0]
    return loss, swa.swa_model.state_dict(), (folder / 'models' / 'swa_model.pth').exists()


def test_the_average_is_of_use_and_saved_once_by_the_first_process(tmp_path):
    (a, state, saved), (b, other, _) = run(tmp_path, afterwards, tmp_path)
    assert a == b and saved and all(torch.equal(state[k], other[k]) for k in state)
    on_disk = torch.load(tmp_path / 'models' / 'swa_model.pth')
    assert all(torch.equal(state[k], on_disk[k]) for k in state)


class Stop(BaseException):
    pass


def checkpointed(rank, folder, stop, seed):
    learn = two_processes(net)
    if seed:
        learn = learner(net, dls=loaders(n=90, n_valid=41), opt_func=partial(SGD, mom=0.9), lr=0.05, seed=seed + rank)
    swa = SWACallback(1)
    cbs = [swa, CheckpointCallback(folder / 'run.ckpt')] + (
        [At('after_batch', stop, raising(Stop()), batch=1, training=True)] if stop is not None else []
    )
    try:
        with context(learn):
            learn.fit(4, cbs=cbs)
    except Stop:
        return sorted(p.name for p in folder.glob('run.ckpt*'))
    return {k: v for k, v in fingerprint(learn).items() if k != 'cbs'} | {
        f'swa.{k}': v for k, v in swa.swa_model.state_dict().items()
    }


@pytest.mark.parametrize('stop', [0, 3])
def test_resume_is_exact_in_two_processes_each_with_its_own_random_state(tmp_path, stop):
    from .helpers import assert_same

    file, beside = run(tmp_path / 'a', checkpointed, tmp_path, stop, 0)[0]
    assert file == 'run.ckpt' and re.fullmatch(r'run\.ckpt\.[0-9a-f]{16}\.steps', beside)
    resumed, whole = (
        run(tmp_path / 'b', checkpointed, tmp_path, None, 7),
        run(tmp_path / 'c', checkpointed, tmp_path / 'whole', None, 0),
    )
    for a, b in zip(resumed, whole):
        assert_same(a, b)
    assert not list(tmp_path.glob('run*'))


def refused(rank, folder):
    (folder / 'run.ckpt').write_text('my thesis') if rank == 0 else None
    learn = two_processes(net)
    with context(learn), pytest.raises(ValueError, match='no checkpoint of fastai_swa'):
        learn.fit(1, cbs=CheckpointCallback(folder / 'run.ckpt'))
    return True


def test_what_one_process_refuses_all_refuse(tmp_path):
    assert run(tmp_path, refused, tmp_path) == [True, True]


def other_number(rank, folder):
    learn = two_processes(net)
    with context(learn):
        learn.fit(2, cbs=CheckpointCallback(folder / 'run.ckpt'))


def test_a_checkpoint_of_another_number_of_processes_is_named(tmp_path):
    learn = two_processes(net)
    with pytest.raises(Stop):
        learn.fit(
            2,
            cbs=[
                CheckpointCallback(tmp_path / 'run.ckpt'),
                At('after_batch', 1, raising(Stop()), batch=1, training=True),
            ],
        )
    with pytest.raises(AssertionError, match='the number of processes is 2 and was 1'):
        run(tmp_path / 'two', other_number, tmp_path)


# what is not supported is refused with a sentence


def test_one_of_several_processes_that_trains_alone_is_refused(monkeypatch):
    monkeypatch.setattr('fastai_swa.passes.num_distrib', lambda: 2)
    with pytest.raises(NotImplementedError, match=r'distrib_ctx'):
        learner().fit(1, cbs=SWACallback())


def fully_sharded(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Sharded(nn.Module):
        pass

    learn = two_processes(net)

    class Shard(Callback):
        order = 12

        def before_fit(self):
            model = self.learn.model.module
            wrapped = type(
                'FullyShardedDataParallel',
                (nn.Module,),
                {
                    '__init__': lambda self, m: (nn.Module.__init__(self), setattr(self, 'module', m))[0],
                    'forward': lambda self, x: self.module(x),
                },
            )(model)
            self.learn.model = wrapped

    assert FullyShardedDataParallel.__name__ == 'FullyShardedDataParallel'
    with context(learn), pytest.raises(NotImplementedError, match='spread over processes .FullyShardedDataParallel'):
        learn.fit(1, cbs=[SWACallback(), Shard()])
    return True


def test_fully_sharded_models_are_refused(tmp_path):
    assert run(tmp_path, fully_sharded) == [True, True]


def synced(rank):
    """Layers of `SyncBatchNorm` cannot run on a CPU in several processes, where they would wait for
    each other; in the pass they do not.
    """
    distributed.init_process_group('gloo')
    torch.manual_seed(0)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net(dropout=0)).train()

    def gather(o):
        res = [None, None]
        distributed.all_gather_object(res, o)
        return res

    x = torch.stack([x for x, _ in loaders(n=90, n_valid=41).train.dataset])
    with batch_moments(model, tracked_bn(model), gather) as moments:
        for batch in x[50 * rank : 50 + 50 * rank].split(16):  # shares of 50 and of 40
            model(batch)
            moments.end_batch()
    assert 'forward' not in vars(model[1])
    return model.state_dict()


def test_synchronised_batch_norm_is_refreshed_without_waiting_for_other_processes(tmp_path):
    a, b = run(tmp_path, synced)
    x = torch.stack([x for x, _ in loaders(n=90, n_valid=41).train.dataset])
    model = net(dropout=0)
    model.load_state_dict(a)
    for name, (mean, var) in twins.bn_statistics(
        model, [(x,) for share in (x[:50], x[50:]) for x in share.split(16)]
    ).items():
        assert_close(
            [model.get_submodule(name).running_mean, model.get_submodule(name).running_var], [mean, var], tol=1e-5
        )
    assert all(torch.equal(a[k], b[k]) for k in a)


def tuned(rank, folder, stop, seed):
    learn = learner(
        net,
        dls=loaders(n=90, n_valid=41),
        opt_func=partial(SGD, mom=0.9),
        lr=0.05,
        seed=seed + rank * bool(seed),
        splitter=lambda m: [list(m[:4].parameters()), list(m[4:].parameters())],
    )

    class Stops(Callback):
        order, n = 70, 0

        def before_fit(self):
            self.n += not self.learn.lock.locked()

        def after_batch(self):
            if stop and self.training and (self.n, self.epoch, self.iter) == (2, 1, 1):
                raise Stop

    try:
        with context(learn):
            learn.fine_tune(
                2, 1e-2, freeze_epochs=1, cbs=[SWACallback(0), CheckpointCallback(folder / 'run.ckpt'), Stops()]
            )
    except Stop:
        return None
    return {k: v for k, v in fingerprint(learn).items() if k != 'cbs'}


def test_the_second_stage_of_fine_tune_goes_on_in_two_processes(tmp_path):
    from .helpers import assert_same

    run(tmp_path / 'a', tuned, tmp_path, True, 0)
    for a, b in zip(
        run(tmp_path / 'b', tuned, tmp_path, False, 7), run(tmp_path / 'c', tuned, tmp_path / 'whole', False, 0)
    ):
        assert_same(a, b)


# what fails in one process ends the pass in all, and the training in none


class Fails(Callback):
    "Raises at one event of a pass in one process."

    order = 2

    def __init__(self, rank, event, at):
        self.rank, self.on, self.at, self.n, self.in_pass = rank, event, at, 0, False

    def __call__(self, event_name):
        if event_name == 'before_validate':
            self.in_pass = any(type(cb).__name__ in ('_Collector', '_EndBatch') for cb in self.learn.cbs)
        if not self.in_pass or event_name != self.on or self.learn.training:
            return
        if self.learn.iter == self.at % self.learn.n_iter and torch.distributed.get_rank() == self.rank:
            raise ArithmeticError('only here')


def failing_value(rank):
    def f(pred, y):
        if distributed.get_rank() == rank and not f.is_training:
            raise ArithmeticError('only here')
        return accuracy(pred, y)

    f.is_training = True
    return f


def one_fails(rank, where, failing):
    from fastai_swa.passes import refresh_bn, validate_aside

    learn, seen = two_processes(net), []

    class Passes(Callback):
        order = 80

        def after_validate(self):
            if any(type(cb).__name__ in ('_Collector', '_EndBatch') for cb in self.learn.cbs):
                return
            for run in (partial(validate_aside, self.learn), partial(refresh_bn, self.learn, ['1', '5'], None, True)):
                try:
                    seen.append(type(run()).__name__)
                except Exception as e:
                    seen.append(f'{type(e).__name__}: {e}')

    fails = {
        'first batch': lambda: Fails(failing, 'before_batch', 0),
        'last batch': lambda: Fails(failing, 'after_batch', -1),
        'item': lambda: None,
        'metric': lambda: None,
        'nothing': lambda: None,
    }[where]()
    if where == 'metric':
        metric = failing_value(failing)
        learn.metrics = [metric]

        class Arms(Callback):
            order = 79

            def after_validate(self):
                metric.is_training = False

            def before_epoch(self):
                metric.is_training = True

        learn.add_cb(Arms())
    with context(learn):
        if where == 'item':  # in a loader of one process alone

            class Raises(Callback):
                order = 78

                def after_validate(self):
                    if any(type(cb).__name__ in ('_Collector', '_EndBatch') for cb in self.learn.cbs):
                        return
                    for dl in self.learn.dls.loaders:
                        dl.dl.after_batch = raising_batch if rank == failing else dl.dl.after_batch

                def before_epoch(self):
                    for dl in self.learn.dls.loaders:
                        vars(dl.dl).pop('after_batch', None)

            learn.add_cb(Raises())
        learn.fit(2, cbs=[Passes(), *([fails] if fails is not None else [])])
    model = learn.model.state_dict()
    return seen, {k: v for k, v in model.items()}


def raising_batch(b):
    raise ArithmeticError('only here')


@pytest.fixture(scope='module')
def nothing_fails(tmp_path_factory):
    return run(tmp_path_factory.mktemp('whole') / 'two', one_fails, 'nothing', None)


@pytest.mark.parametrize('where, failing', [('first batch', 0), ('last batch', 1), ('item', 1), ('metric', 0)])
def test_what_fails_in_one_process_ends_the_pass_in_all_and_training_goes_on(tmp_path, nothing_fails, where, failing):
    results, whole = run(tmp_path / 'two', one_fails, where, failing), nothing_fails
    assert whole[0][0] == whole[1][0] == ['list', 'Moments'] * 2
    for rank, (seen, model) in enumerate(results):
        failed = [s for s in seen if 'only here' in s]
        assert len(seen) == 4 and len(failed) == (2 if where == 'metric' else 4), seen
        for s in failed:
            assert s.startswith('ArithmeticError' if rank == failing else 'PassFailed'), s
            assert rank == failing or f'it failed in process {failing} (ArithmeticError' in s, s
        for k, v in whole[rank][1].items():
            if 'running' not in k and 'num_b' not in k:
                assert torch.equal(v, model[k]), k


def averaged_while_one_fails(rank, failing):
    learn, swa = two_processes(net), SWACallback(0)
    with context(learn):
        learn.fit(3, cbs=[swa, Fails(failing, 'before_batch', 1)])
    return column(learn, 'swa_valid_loss'), swa.n_averaged, learn.model.state_dict(), swa.swa_model.state_dict()


def test_an_average_of_which_one_process_cannot_make_the_passes_is_still_that_of_all(tmp_path):
    (a, n, model, average), (b, m, other, same) = run(tmp_path / 'two', averaged_while_one_fails, 1)
    assert all(v != v for v in a + b) and n == m == 3
    for k in model:
        assert torch.equal(model[k], other[k]) or 'running' in k, k
    for k in average:
        assert torch.equal(average[k], same[k]) or 'running' in k, k


def counted(rank, with_swa):
    class Counts(Callback):
        def __init__(self):
            self.n = 0

        def before_batch(self):
            self.n += 1
            if self.training:
                self.learn.xb = (self.xb[0] * (1 + 0.001 * self.n),)

    learn = two_processes(net, cbs=Counts())
    with context(learn):
        learn.fit(3, cbs=SWACallback(0) if with_swa else None)
    return {k: v for k, v in fingerprint(learn).items() if k != 'cbs'} | {'n': learn.counts.n}


def test_what_counts_its_passes_is_untouched_in_two_processes(tmp_path):
    from .helpers import assert_same

    for a, b in zip(run(tmp_path / 'with', counted, True), run(tmp_path / 'without', counted, False)):
        assert_same(a, b)
