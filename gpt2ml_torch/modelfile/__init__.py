"""The model file: its format, its reader and its writer."""

from gpt2ml_torch.modelfile.reader import ModelFile
from gpt2ml_torch.modelfile.writer import ModelWriter

__all__ = ["ModelFile", "ModelWriter"]
