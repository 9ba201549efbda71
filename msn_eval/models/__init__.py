"""Network architectures by timm's names, and how they are built."""
