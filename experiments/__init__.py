"""The experiments of ecjax, one command each: ``python -m experiments.mnist --help``."""
