"""Convert TensorFlow checkpoints and PyTorch files of GPT2_ML to one model file, and back."""
