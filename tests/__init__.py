"""One file for each module, and the TensorFlow reference they are held against."""
