"""Model folders for the Hugging Face ecosystem; writing them needs no transformers."""

from gpt2ml_torch.export.folder import ExportOptions, export_folder

__all__ = ["ExportOptions", "export_folder"]
