"""tunejax: to tune a model is to transform its parameter pytree.

Import the modules themselves (``from tunejax.methods import lora``); this file re-exports nothing.
"""

__version__ = "0.1.0"
