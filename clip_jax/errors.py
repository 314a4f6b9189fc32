"""Errors of this package. Each says what was expected, what was found, and what to do."""


class ClipJaxError(ValueError):
    """Base class of every error that this package raises for bad input."""


class PromptTooLongError(ClipJaxError):
    """A prompt has more tokens than its row: CLIP's 77 positions, or T5's `max_sequence_length`."""


class ConfigError(ClipJaxError):
    """A model configuration holds a value that this package cannot honour."""


class CheckpointError(ClipJaxError):
    """A checkpoint, or the tokenizer beside it, is not what it should be."""
