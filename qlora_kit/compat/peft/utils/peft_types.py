"""Enumerations."""

from ...configs import PeftType, TaskType

__all__ = ["PeftType", "TaskType"]
