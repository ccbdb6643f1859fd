"""Check that JAX can use the devices that a command asks for."""

from __future__ import annotations


def check() -> None:
    """Checks that JAX finds a device.

    Raises:
        ValueError: JAX_PLATFORMS names a kind of device that this process cannot use.
    """
    import jax  # here, so that importing this module starts no backend

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that some platform was found
        wanted = jax.config.jax_platforms
        if not wanted:
            raise
        reason = f" JAX reports: {error}" if str(error) else ""
        raise ValueError(
            f"JAX finds no device for JAX_PLATFORMS={wanted!r} on this machine. Unset "
            "JAX_PLATFORMS to use any device that JAX finds, or install JAX for the wanted device "
            f"(such as jax[cuda12]).{reason}"
        ) from error
