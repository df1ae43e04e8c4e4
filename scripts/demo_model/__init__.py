"""Parts of `scripts/train_demo.py`: the corpus, the checkpoint, the model card, the n-grams."""
