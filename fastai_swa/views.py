"""What outlives a context in which a learner predicts with other weights than its own: views of the
learner that go back into it.

fastai's interpretations keep their learner, and ask it for predictions only when they are read. One
that is made while the learner is an average or an ensemble, and is read later, must not mix its
predictions with those of the learner's own model. So importing this file makes
`Interpretation.learn` an attribute that takes, within `lending`, a view of the learner in the
learner's place.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from fastai.interpret import Interpretation
from fastai.learner import Learner

__all__ = ['as_lent', 'lending', 'refuse_lent']


@dataclass
class _Context:
    "One in which a learner is lent something. It is the same as another with the same `enter`."

    name: str  # as users write it
    enter: Callable  # gives the context anew; a bound method equals itself
    version: Callable  # gives what changes when the context would predict with something else

    def __eq__(self, other):
        return self.enter == other.enter


_contexts = weakref.WeakKeyDictionary()  # learner -> the contexts that it is in, the innermost last


class lending:
    """Within this context the interpretations that are made of `learn` keep what it predicts with
    here, for use after the context, too.

    - `name`: of the context, as users write it; `enter`: the bound method that gives it; `version`:
      a function of no arguments, whose value changes when the context would predict with something
      else than before.
    """

    def __init__(self, learn, name: str, enter: Callable, version: Callable):
        self.inside = _contexts.setdefault(learn, [])
        self.context = _Context(name, enter, version)

    def __enter__(self):
        self.inside.append(self.context)

    def __exit__(self, *error):
        self.inside[:] = [c for c in self.inside if c is not self.context]

    __del__ = __exit__  # where Ctrl-C has come in between


def refuse_lent(learn, call: str):
    "Raise `RuntimeError` if `learn` is lent something, at whose end what `call` does to its model would be undone."
    inside = _contexts.get(learn)
    if inside:
        raise RuntimeError(f'{call} inside {inside[-1].name} would be undone at its end: leave that context first')


def as_lent(learn):
    """`learn`; within `lending` a view of it that goes on predicting with what is lent. (For
    classes that keep a learner for later.)"""
    if not isinstance(learn, Learner) or '_view_of' in vars(learn) or not _contexts.get(learn):
        return learn
    return _View(learn, list(_contexts[learn]))


@dataclass
class _ViewOf:
    "What a view is made of."

    learn: object
    contexts: list  # those that it goes back into, the innermost last
    versions: list  # theirs, when it was made

    @property
    def names(self) -> str:
        return ' and '.join(c.name for c in self.contexts)

    @contextmanager
    def entered(self):
        "Within this context the learner is in all `contexts`."
        now = _contexts.get(self.learn, [])
        if now != self.contexts[: len(now)]:
            raise RuntimeError(
                f'this was made inside {self.names}, and the learner is inside {now[-1].name} now: leave that first'
            )
        with ExitStack() as stack:
            for context in self.contexts[len(now) :]:
                stack.enter_context(context.enter())
            if [c.version() for c in self.contexts] != self.versions:
                raise RuntimeError(
                    f'this was made inside {self.names}, which would predict with other weights now than it did then: '
                    'make it again'
                )
            yield

    def is_entered(self) -> bool:
        return _contexts.get(self.learn, [])[: len(self.contexts)] == self.contexts


class _View:
    """A learner as it is inside the contexts it was lent in: a method that is called goes back into
    them, unless the learner is in them.

    It passes for the learner, also for `isinstance`. Outside of the contexts its model is refused,
    which has other weights there. So is all that would be predicted with something else than
    before, because more was averaged, or a member was trained. `RuntimeError` says it.
    """

    def __init__(self, learn, contexts):
        vars(self)['_view_of'] = _ViewOf(learn, contexts, [c.version() for c in contexts])

    @property
    def __class__(self):
        return type(self._view_of.learn)

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        view_of = self._view_of
        if callable(getattr(type(view_of.learn), name, None)):
            return self._method(name)
        value = getattr(view_of.learn, name)
        is_models = name == 'model' or name not in vars(view_of.learn) and not hasattr(type(view_of.learn), name)
        if is_models and not view_of.is_entered():  # a learner passes on what it does not have itself
            raise RuntimeError(
                f"{name!r} is the model's, which has other weights outside of {view_of.names}: read it inside"
            )
        return value

    def _method(self, name):
        view_of = self._view_of

        def call(*args, **kwargs):
            with view_of.entered():
                return getattr(view_of.learn, name)(*args, **kwargs)

        return call

    def __setattr__(self, name, value):
        setattr(self._view_of.learn, name, value)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            f'what was made inside {self._view_of.names} cannot be copied or pickled: it predicts with weights that '
            'are lent'
        )

    def __repr__(self):
        return f'{self._view_of.learn!r} inside {self._view_of.names}'


class _Lendable:
    "An attribute that keeps a learner `as_lent`."

    def __get__(self, o, cls=None):
        if o is None or 'learn' not in vars(o):
            raise AttributeError('learn')
        return vars(o)['learn']

    def __set__(self, o, learn):
        vars(o)['learn'] = as_lent(learn)


Interpretation.learn = _Lendable()
