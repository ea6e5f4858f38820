"""Model families: image classifiers that are built from a generator and nothing else.

A family is a frozen dataclass with ``build(shape, classes, rng)`` (see ``types.ModelFamily``). The model that it
returns takes (N, C, H, W) float32 in [0, 1], not normalized, and returns (N, classes) logits. It is fresh, in train
mode, on the CPU, without dropout, and in the memory format that trains faster there (``training.memory_format_of``
reads it back).

Every model names, as attributes, the modules that defenses look into (``model.get_submodule(name)``, forward hooks):

- ``taps: tuple[str, ...]``: modules whose outputs are the features of each group of layers, from input to output, as
  (N, C, H, W) maps, or (N, D) for a model without convolutions. Of ``wrn16-1`` they are the outputs of the three
  residual groups before the last BatchNorm, which attention distillation compares.
- ``maps: str``: the module whose output is the last (N, C, H, W) map, activated where the network has an activation
  there, or (N, D); empty if there is none.
- ``channels: str``: the module whose output channels those of ``maps`` are: a BatchNorm2d, Conv2d or Linear; its scale
  (or filter) and bias switch one off; empty if there is none.
- ``prunable: str`` (only where ``maps`` ends in a shortcut's sum, of which no module alone switches a channel off): the
  last activated map before it, whose channels are those of ``channels``.
- ``classifier: str``: the last linear layer; its input is what a penultimate-layer method reads.
"""
