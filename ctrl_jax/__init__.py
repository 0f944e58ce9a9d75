"""ctrl_jax: train a language model for how it will be decoded (InfAlign-CTRL) in JAX."""

__version__ = "0.1.0"
