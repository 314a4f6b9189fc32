"""Pytrees of parameters: their shapes, and how they are made, cast, saved and loaded."""
