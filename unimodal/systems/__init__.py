"""What single published systems add to the common model: one file each."""

from unimodal.systems.cca import CCA

__all__ = ["CCA"]
