"""Layers and models whose modes move weights, written as the LoRA libraries write them: the update
is merged into the weights in `eval()`."""

import torch
from torch import nn


class LowRank:
    "What the layers share: a frozen base weight and a trained update of rank 2."

    def add_update(self, n_out, n_in):
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, n_in) / n_in**0.5)
        self.lora_B = nn.Parameter(torch.randn(n_out, 2) * 0.5)

    def delta(self):
        return self.lora_B @ self.lora_A


class MergedLinear(LowRank, nn.Linear):
    "As in loralib: an attribute knows whether the update is merged."

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.add_update(n_out, n_in)
        self.merged = False

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.merged:
            self.weight.data -= self.delta()
            self.merged = False
        elif not mode and not self.merged:
            self.weight.data += self.delta()
            self.merged = True
        return self

    def forward(self, x):
        out = super().forward(x)
        return out if self.merged else out + x @ self.delta().T


class MergedEmbedding(LowRank, nn.Embedding):
    "Keyed by `training` itself, and exchanging the tensor instead of changing it."

    def __init__(self, n, n_out):
        super().__init__(n, n_out)
        self.add_update(n, n_out)

    def train(self, mode: bool = True):
        if mode != self.training:
            sign = -1 if mode else 1
            self.weight.data = self.weight.data + sign * self.delta()
        return super().train(mode)

    def forward(self, x):
        out = super().forward(x)
        return out + self.delta()[x] if self.training else out


class Plain(LowRank, nn.Linear):
    "Left to the model that holds it."

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.add_update(n_out, n_in)
        self.is_merged = [False]  # changed in place

    def forward(self, x):
        out = super().forward(x)
        return out if self.is_merged[0] else out + x @ self.delta().T


class MergedByRoot(nn.Module):
    "The model as a whole merges what its layers hold."

    def __init__(self, n_in=6, n_out=3):
        super().__init__()
        self.body = nn.Sequential(Plain(n_in, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = Plain(8, n_out)

    def train(self, mode: bool = True):
        super().train(mode)
        for layer in (self.body[0], self.head):
            if layer.is_merged[0] == mode:
                layer.weight.data.add_(layer.delta(), alpha=-1 if mode else 1)
                layer.is_merged[0] = not mode
        return self

    def forward(self, x):
        return self.head(self.body(x))


def merged_layers(n_in=6, n_out=3):
    return nn.Sequential(MergedLinear(n_in, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), MergedLinear(8, n_out))


class MergedMixed(nn.Module):
    "An embedding of the signs of the inputs beside a linear layer."

    def __init__(self, n_in=6, n_out=3):
        super().__init__()
        self.signs, self.lin, self.norm = MergedEmbedding(2, 4), MergedLinear(n_in, 8), nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Dropout(0.1), MergedLinear(12, n_out))

    def forward(self, x):
        signs = self.signs((x > 0).long()).mean(1)
        return self.head(torch.cat([self.norm(self.lin(x)), signs], 1))


models = {'layers': merged_layers, 'root': MergedByRoot, 'mixed': MergedMixed}
