"""Data: records of tasks from files, the hub or generators, mixed, tokenised and batched."""

from radargate_pl.data.flan import FlanMixture

__all__ = ["FlanMixture"]
