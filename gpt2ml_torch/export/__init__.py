"""Model folders for the Hugging Face ecosystem; writing them needs no transformers.

    from gpt2ml_torch.export.folder import ExportOptions, export_folder

Nothing is imported here: the converter shares the names, and does without PyTorch.
"""
