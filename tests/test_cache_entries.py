"""`EmbeddingCache` by itself: what it keeps, and what goes first."""

import threading

import jax.numpy as jnp

from clip_jax.cache import EmbeddingCache
from clip_jax.structs import TextEmbeddings


def entry(size):
    return TextEmbeddings(prompt_embeds=jnp.zeros((1, size // 4), jnp.float32), guidance=False)


def test_the_least_recently_used_goes_first():
    cache = EmbeddingCache(1000)
    generation = cache.renew({})

    def get(key):
        return cache.get(key, generation)

    for key in "abc":
        cache.put(key, entry(400), generation)
    assert get("a") is None
    assert get("b") is not None
    cache.put("d", entry(400), generation)
    assert get("c") is None
    assert get("b") is not None
    cache.put("d", entry(800), generation)
    assert (cache.stats().nbytes, cache.stats().entries) == (800, 1)
    cache.put("e", entry(1200), generation)
    assert get("e") is None
    assert get("d") is not None


def test_what_was_computed_for_another_state_is_not_kept():
    cache, one, other = EmbeddingCache(1000), object(), object()
    generation = cache.renew({"a": one})
    cache.renew({"a": other})
    cache.put("a", entry(100), generation)
    renewed = cache.renew({"a": other})
    assert cache.get("a", renewed) is None
    assert renewed != generation


def test_an_entry_of_another_state_is_not_found():
    cache = EmbeddingCache(1000)
    generation = cache.renew({"a": object()})
    cache.put("a", entry(100), generation)
    assert cache.get("a", generation) is not None
    assert cache.get("a", generation - 1) is None


def test_what_fills_the_cache_exactly_is_kept():
    full = EmbeddingCache(32)
    value = TextEmbeddings(prompt_embeds=jnp.zeros((1, 2, 4)), guidance=False)
    full.put("a", value, full.renew({}))
    assert full.stats().entries == 1


def test_what_was_donated_takes_no_room():
    cache, value = EmbeddingCache(1000), entry(400)
    generation = cache.renew({})
    cache.put("a", value, generation)
    value.prompt_embeds.delete()
    assert cache.get("a", generation) is None
    assert (cache.stats().entries, cache.stats().nbytes) == (0, 0)


def test_as_many_go_as_have_to():
    cache = EmbeddingCache(1000)
    generation = cache.renew({})
    for key, size in (("a", 400), ("b", 400), ("c", 1000)):
        cache.put(key, entry(size), generation)
    assert (cache.stats().entries, cache.stats().nbytes) == (1, 1000)


def test_what_is_looked_up_is_not_thrown_out_meanwhile():
    cache = EmbeddingCache(1000)
    generation = cache.renew({})
    cache.put("a", entry(100), generation)
    for use in (lambda: cache.get("a", generation), lambda: cache.put("a", entry(100), generation), cache.stats):
        thread = threading.Thread(target=use)
        with cache._lock:
            thread.start()
            thread.join(0.1)
            assert thread.is_alive()
        thread.join()
