"""Context-oriented LoRA initialisation: CorDA and CorDA++.

Importing this loads no other library, not even torch: every name is imported at first use, from
where `__init__.pyi` says.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
