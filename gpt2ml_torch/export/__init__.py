"""Write model folders for the Hugging Face ecosystem; this does not need transformers.

    from gpt2ml_torch.export.folder import ExportOptions, export_folder

Nothing is imported here, because the converter uses `names` and runs without PyTorch.
"""
