"""The joint task: any objectives together on shared reads of the batch."""

from unimodal.tasks.base import Task


class Joint(Task):
    """Trains several heads at once; give `objectives` by name."""
