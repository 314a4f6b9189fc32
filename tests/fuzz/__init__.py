"""Damaged files by the thousand: every one is refused, or read as what it says. See `__main__.py`."""
