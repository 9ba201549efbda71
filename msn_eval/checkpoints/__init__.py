"""From a file to the named tensors of one network."""
