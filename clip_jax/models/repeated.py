"""Blocks that are traced once for all of their kind, and what has to be traced anew each time."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, cast

import flax.linen as nn

# Not public, but Flax has no other way to tell; tests fail if it goes.
from flax.linen.module import _global_interceptor_stack as _interceptors

_Block = TypeVar("_Block", bound=nn.Module)

# One class for each, made once: a jit remembers what it has traced.
_jitted = functools.cache(nn.jit)


def repeated(block: type[_Block], parent: nn.Module) -> type[_Block]:
    """The class to make the blocks of `parent` of, which differ in nothing but their parameters.

    JAX traces one of them and XLA is given that once, to be called with each block's parameters; it inlines the calls,
    so that what is compiled stays the same.
    """
    return block if intercepted() or parent.is_initializing() else _jitted(cast(Any, block))


def intercepted() -> bool:
    """Whether `nn.intercept_methods` is in force (a LoRA).

    jit takes no notice of it: a function that was compiled without is run as it was. So what is jitted here is run
    without jit then.
    """
    return len(_interceptors) > 0
