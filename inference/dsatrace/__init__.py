"""dsatrace: shows what DeepSeek Sparse Attention reads."""

__version__ = "0.1.0"
