"""Where the modules that an adapter was trained on stand in the model: here, and exported.

The exported class has query, key and value apart, each of which is rows of our joined matrix.
"""

from __future__ import annotations

import dataclasses

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.export.names import exported_modules
from gpt2ml_torch.modelfile.format import expected_shapes


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a module of the model that an adapter was trained on stands in this model.

    Its parameters, `shapes`, are rows of the parameters of `module`, from `first_row`.
    """

    module: str
    shapes: dict[str, tuple[int, ...]]
    first_row: int = 0

    @property
    def adaptable(self) -> bool:
        """Whether it has a matrix, to which a product can be added."""
        return len(self.shapes["weight"]) == 2

    @property
    def is_embedding(self) -> bool:
        """Whether it is a table of rows, which peft adapts with transposed matrices."""
        return self.module.endswith("_embedding")


def own_places(config: GPT2MLConfig) -> dict[str, Place]:
    """The places of the modules of `GPT2ML`, by name: they are its own."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in expected_shapes(config).items():
        module, _, parameter = name.rpartition(".")
        shapes.setdefault(module, {})[parameter] = shape
    return {module: Place(module, parameters) for module, parameters in shapes.items()}


def exported_places(config: GPT2MLConfig) -> dict[str, Place]:
    """The places of the modules of the class that is exported for transformers, by name there."""
    places: dict[str, Place] = {}
    for module, own in own_places(config).items():
        names = exported_modules(module)
        shapes = {key: (rows // len(names), *rest) for key, (rows, *rest) in own.shapes.items()}
        for index, name in enumerate(names):
            places[name] = Place(module, shapes, first_row=index * shapes["weight"][0])
    return places
