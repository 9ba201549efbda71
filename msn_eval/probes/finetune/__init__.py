"""Fine-tuning of an encoder together with a linear head."""
