"""The fast path for latent generative models: encode, train, sample, decode, and the ops behind them."""

__version__ = "0.1.0"
