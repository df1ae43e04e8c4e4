"""What `scripts/train_demo.py` trains on, writes and says: corpus, checkpoint, card, n-grams."""
