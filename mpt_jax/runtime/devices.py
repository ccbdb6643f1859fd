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
            f"JAX finds no device of JAX_PLATFORMS={wanted!r} on this machine. Unset JAX_PLATFORMS "
            f"to use what JAX finds, or install the JAX of that device (jax[cuda12]).{reason}"
        ) from error
