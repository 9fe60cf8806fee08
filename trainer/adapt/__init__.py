"""What of a network is trained: everything, or an adapter beside it."""

from .lora import adapter_state, apply, load_adapter, save_adapter
from .parameters import parameter_groups

__all__ = ["adapter_state", "apply", "load_adapter", "parameter_groups", "save_adapter"]
