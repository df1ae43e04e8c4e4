"""Map the modules that an adapter was trained on to modules and rows of this model.

An adapter was trained here or on the exported class. There query, key and value are separate; each
holds a third of the rows of our joined matrix.
"""

from __future__ import annotations

import dataclasses

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.export.names import exported_modules
from gpt2ml_torch.modelfile.format import expected_shapes


@dataclasses.dataclass(frozen=True)
class Place:
    """The place in this model of a module that an adapter was trained on.

    Each of the module's parameters, with the given `shapes`, is a range of rows, starting at
    `first_row`, of the parameter of the same name in `module`.
    """

    module: str
    shapes: dict[str, tuple[int, ...]]
    first_row: int = 0

    @property
    def adaptable(self) -> bool:
        """Whether its weight is a matrix, to which a low-rank product can be added."""
        return len(self.shapes["weight"]) == 2

    @property
    def is_embedding(self) -> bool:
        """Whether it is an embedding, which peft adapts with transposed matrices."""
        return self.module.endswith("_embedding")


def own_places(config: GPT2MLConfig) -> dict[str, Place]:
    """The places of the modules of `GPT2ML` itself, by name."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in expected_shapes(config).items():
        module, _, parameter = name.rpartition(".")
        shapes.setdefault(module, {})[parameter] = shape
    return {module: Place(module, parameters) for module, parameters in shapes.items()}


def exported_places(config: GPT2MLConfig) -> dict[str, Place]:
    """The places of the modules of the exported class, by their names in that class."""
    places: dict[str, Place] = {}
    for module, own in own_places(config).items():
        names = exported_modules(module)
        shapes = {key: (rows // len(names), *rest) for key, (rows, *rest) in own.shapes.items()}
        for index, name in enumerate(names):
            places[name] = Place(module, shapes, first_row=index * shapes["weight"][0])
    return places
