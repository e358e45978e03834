"""Hybrid Post-Training for verl. The public names below are imported when they are first asked for, and nothing before:
verl imports this package in every process, half initialised itself."""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "parts": ("part", "Tokens"),
    "estimator": ("Estimator", "Term", "Method"),
    "methods": ("METHODS", "register_method"),
    "gate": ("register_gate", "Decision", "DEMO", "RL"),
}
_ROOM = {name: room for room, names in _PUBLIC.items() for name in names}
__all__ = sorted(_ROOM)


def __getattr__(name: str):
    if name not in _ROOM:
        raise AttributeError(f"module 'verl_hpt' has no attribute {name!r}")
    return getattr(import_module(f"verl_hpt.{_ROOM[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOM])
