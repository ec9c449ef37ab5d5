"""`SaveSWAModelCallback`: the average at its best, as a file."""

from fastai.callback.tracker import SaveModelCallback
from fastai.torch_core import join_path_file, rank_distrib

from .callback import SWACallback
from .checks import check_known
from .files import save_weights
from .fit_average import weights_with_points
from .fitting import FitCallback

__all__ = ['SaveSWAModelCallback']


class SaveSWAModelCallback(FitCallback, SaveModelCallback):
    """fastai's `SaveModelCallback` for the average: saves `swa_model` whenever a column of it
    improves. Loads nothing at the end.

    The file is what `learn.save(fname, with_opt=False)` writes within `averaged()`, so
    `learn.load(fname, with_opt=False)` reads it into any learner with that architecture;
    `SWACallback(average=file)` goes on with it. It is replaced in one step: whatever happens, there
    is the old one or the new. Needs a `SWACallback` in the same fit, and stands aside where that
    one does; of several, the one that has the column `monitor` is saved. A file that cannot be
    written is a warning, and training goes on. Raises `ValueError` if there is none, or for a
    `monitor` that is not one of its columns.
    """

    def __init__(
        self,
        monitor='swa_valid_loss',  # column to watch
        comp=None,  # comparison: np.less or np.greater; default: less for a loss or an error, else greater
        min_delta=0.0,  # least change that counts as an improvement
        # file name under `learn.path/learn.model_dir`; default: `<name>_model` for the average of that name, so
        # `swa_model`
        fname=None,
        every_epoch=False,  # True or an int k: save after each (k-th) epoch that has an average, as `fname_<epoch>`
        at_end=False,  # save once, when the fit ends, instead of at improvements
        reset_on_fit=True,  # forget the best value at the start of a fit
    ):
        if every_epoch and at_end:
            raise ValueError('every_epoch and at_end cannot both be set: choose one')
        super().__init__(monitor, comp, min_delta, fname, every_epoch, at_end, False, reset_on_fit)

    def before_fit(self):
        averages = [cb for cb in self.learn.cbs if isinstance(cb, SWACallback)]
        if not averages:
            raise ValueError(
                'SaveSWAModelCallback needs a SWACallback in the same fit: pass one, or call learn.to_swa() first'
            )
        columns = [name for swa in averages if swa._fit for name in swa._fit.columns]
        if not columns:  # all stand aside, or there is no Recorder
            return
        check_known('monitor', self.monitor, columns)
        super().before_fit()
        self._swa = next(swa for swa in averages if swa._fit and self.monitor in swa._fit.columns)
        if self.fname is None:
            self.fname = f'{self._swa._name}_model'
        self._fit = self._swa._fit  # shared: it counts and warns with the average's, which comes first by its `order`

    def after_epoch(self):
        best = self.best
        self._failed = False
        super().after_epoch()
        if self._failed:
            self.best = best  # the next value that is better than the file's is saved

    def _save(self, name):
        if not self._fit.n_folds:
            return
        with self._fit.side.attempt(f'saving {self._swa._what}', 'the file stays as it was'):
            file = join_path_file(name, self.learn.path / self.learn.model_dir, ext='.pth')
            self._swa._refresh_aside(within=True)  # so that it equals its column
            if not rank_distrib():
                swa = self._swa
                save_weights(file, weights_with_points(swa.swa_model, swa.n_averaged, swa.averaged_epochs))
            self.last_saved_path = file
            return
        self._failed = True

    def after_fit(self):
        if self.at_end:
            self._save(self.fname)
