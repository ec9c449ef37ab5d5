"The plain attributes of the modules of an average follow those of the model."

import copy
from dataclasses import dataclass, field

from torch import nn

from ..modules import MODULES_OWN, is_plain, same_data

__all__ = ['Attributes', 'may_change', 'may_follow']


@dataclass
class Attributes:
    "The attributes of a module of the model beside those of its counterpart in the average."

    source: dict  # of the module that is followed
    target: dict  # of the one that follows
    # those that the target has from the source, or had from the start as the source did
    names: set = field(default_factory=set)

    def follow(self) -> list[str]:
        """Give the target the source's plain attributes, as copies; returns the names of those that
        cannot be copied.
        """
        source, target = self.source, self.target
        left = []
        for name, value in source.items():
            if name in MODULES_OWN:
                continue
            own = target.get(name, _MISSING)
            if value is own or not may_follow(value, own):
                continue
            try:
                target[name] = copy.deepcopy(value)
            except Exception:
                left.append(name)
        for name in self.names - source.keys():
            target.pop(name, None)
        self.names = source.keys() & target.keys() - MODULES_OWN
        return left

    def reversed(self):
        return Attributes(self.target, self.source)


_N_OWN = len(vars(nn.Module()))
_MISSING = object()


def may_follow(value, own) -> bool:
    "Is `value` data that differs from `own`, data as well or nothing?"
    return is_plain(value) and (own is _MISSING or is_plain(own) and not same_data(value, own))


def may_change(module) -> bool:
    """May training change the plain attributes of `module`?

    Not where it has none, nor those of PyTorch's own layers with parameters, which say how the layer was made.
    """
    is_layer = type(module).__module__.startswith('torch.nn.modules.') and bool(module._parameters)
    return not is_layer and len(vars(module)) > _N_OWN
