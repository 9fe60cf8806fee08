"""Shapes of arrays in annotations: jaxtyping's names, or the bare arrays where it is not installed.

One legend everywhere: ``B`` batch, ``T`` frames, ``S`` sequence, ``K`` codebooks, ``C`` channels, ``D`` width, ``V``
vocabulary. ``tests/bench/gpu.py`` runs where there are torch and transformers and little else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Complex, Float, Int, Integer
else:
    try:
        from jaxtyping import Bool, Complex, Float, Int, Integer
    except ImportError:

        class _Bare:
            """``Float[Tensor, "B T"]`` is ``Tensor``."""

            def __class_getitem__(cls, told: tuple[Any, str]) -> Any:
                return told[0]

        Bool = Complex = Float = Int = Integer = _Bare

__all__ = ["Bool", "Complex", "Float", "Int", "Integer"]
