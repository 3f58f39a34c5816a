"""FourierFT: what is added to a frozen kernel has a few trained coefficients in its spectrum (Gao et al., 2024,
arXiv:2405.03003, equations 2 to 4).

    y = x (W + scaling · Re(F^-1(S))^T)        S [out, in]: ``spectrum`` at n places, 0 elsewhere

The places are drawn without replacement from a seed, as PEFT draws them, so that kernels of one shape have the same and
a folder need not name them. The paper draws the coefficients; here they are 0 at the start, and the model is unchanged.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors, low_rank, operators, portable
from tunejax.core import method as methods
from tunejax.core.method import Context, Method

ALIASES = {**{k: v for k, v in low_rank.ALIASES.items() if v in ("targets", "layers")}, "random_loc_seed": "seed"}
"""What PEFT calls it -> what it is here."""

PEFT = portable.Form(
    "FOURIERFT",
    write=lambda arrays: {"fourierft_spectrum": arrays["spectrum"]},
    read=lambda tensors, _: {"spectrum": tensors["fourierft_spectrum"]},
    entries={"n_frequency": "n_frequency", "scaling": "scaling", "seed": "random_loc_seed"},
    ignored=frozenset({"n_frequency_pattern"}),
    biases="fourier_only",
    found=lambda arrays: {"n_frequency": len(arrays["spectrum"])},
)

LARGEST = (2**32 - 1) // 20
"""Entries of a kernel up to which torch shuffles as here (llama-405b has larger ones)."""


@operators.operator
class Spectral(operators.Added):
    """base(x) + x (scaling · Re(F^-1(S))^T).

    base: kernel [..., in, out], or an operator. spectrum [..., n]; seed: of its places.
    """

    base: Any
    spectrum: jax.Array
    scaling: float = operators.static(default=1.0)
    seed: int = operators.static(default=0)

    def delta(self) -> jax.Array:
        """What is added to the kernel [..., in, out], in float32."""
        *lead, fan_in, fan_out = self.shape
        places = drawn(fan_in * fan_out, self.spectrum.shape[-1], self.seed)
        whole = jnp.zeros((*lead, fan_out, fan_in), jnp.float32)
        whole = whole.at[..., places // fan_in, places % fan_in].set(self.spectrum)
        return self.scaling * jnp.swapaxes(jnp.fft.ifft2(whole).real, -1, -2)


@functools.cache
def drawn(size: int, count: int, seed: int) -> np.ndarray:
    """The first ``count`` entries of torch.randperm(size) of that seed [count], without its other entries."""
    numbers = np.random.RandomState(seed).randint(0, 2**32, count, np.uint32)
    moved: dict[int, int] = {}
    out = np.empty(count, np.int64)
    for i, number in enumerate(numbers.tolist()):
        other = i + number % (size - i)
        out[i] = moved.get(other, other)
        moved[other] = moved.get(i, i)
    return out


def fourierft(
    targets: str | list[str] = "attention/{q,v}/kernel",
    n_frequency: int = 1000,
    scaling: float = 150.0,
    seed: int = 777,
    layers: str | int | None = None,
) -> Method:
    """Trains ``n_frequency`` coefficients of the spectrum of what is added to each kernel.

    Args:
      targets: globs over kernels; the queries' and values' of the paper unless told.
      n_frequency: coefficients n of a kernel.
      scaling: of the inverse transform, which divides by the kernel's size.
      seed: of the places, whatever the run's own seed.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: n_frequency below 1, a seed that is no number of 32 bits.
      TargetError (from init): nothing matched, what matched is no kernel, or a kernel has fewer than n_frequency
        entries or `LARGEST`.
    """
    if n_frequency < 1:
        raise errors.ConfigError(f"fourierft: n_frequency is {n_frequency}; it must be at least 1")
    if not 0 <= seed < 2**32:
        raise errors.ConfigError(f"fourierft: seed is {seed}; it must lie in [0, 2^32)")

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        *lead, fan_in, fan_out = kernel.shape
        if not n_frequency <= fan_in * fan_out < LARGEST:
            raise errors.TargetError(
                f"fourierft: a kernel of {fan_in} x {fan_out} has {fan_in * fan_out} coefficients; it needs at least "
                f"n_frequency, {n_frequency}, and less than {LARGEST}"
            )
        return {"spectrum": jnp.zeros((*lead, n_frequency), jnp.float32)}

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Spectral:
        return Spectral(kernel, arrays["spectrum"], scaling, seed)

    return methods.per_site("fourierft", targets, new, wrap, layers=layers)
